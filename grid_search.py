"""Phase 1b: train a small classifier on every combination of layers, pooling and seed, and rank them.

    python grid_search.py --features features/massive --out grid/massive

Reads   FEATURES/ as extract.py writes it. Trains on English, tests in every language there is.
Writes  OUT/results.csv (a row for each model), OUT/best.json (what train.py --layers-from takes), OUT/summary.md,
        OUT/confusion.LANG.csv of the chosen combination, OUT/parts/ (the confusion matrices of all models: with them
        a second call with another --select takes a second, and a stopped search goes on), OUT/run.json.
Paper   sections 1.1 (phase one) and 1.5. 255 combinations of layers 5..12, 3 poolings, 5 seeds: 3,825 models.

All models of one pooling train together. With L layers, the M = 2^L subsets are numbered in binary: model m has layer l
if bit l of m is set (model 0 has none and is not reported). Their weights for layer l stand side by side in one matrix,
so that a step is L matrix products, whatever M is, and no product is spent on a layer that a model does not use.
Letters as in model.py; K is what a product puts out: H hidden units, or the C classes where there is no hidden layer.
"""
import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from device import agree, keep_mask, out_of_memory, pick_device, pick_precision, start_processes, versions
from files import (UserError, claim, cli, finish_folder, in_range, load_array, progress_bar, read_json, sha256,
                   start_folder, write_atomic)
from model import POOLINGS, check_layers
from ranking import Results, columns_of, write_grid


# --- the models --------------------------------------------------------------------------------------------------

def half(full, layer):
    """The half of (S, B, K, M) whose models use a layer: (S, B, K, M / 2^(layer+1), 2^layer), a view.

    Seen as (..., 2, 2, ..., 2), the last dimension has an axis a layer.
    """
    return full.unflatten(3, (-1, 2, 2 ** layer))[:, :, :, :, 1]


def initial_weights(generators, layers, size, classes, hidden, dtype, device):
    """The first weights of all models, from each seed's generator; nn.Linear's uniform distribution.

    All models of a seed begin from the same draw, scaled by their own number of inputs. Returns the L weights
    (S, D, K * M/2); and a list: the bias (S, K, M) and, with a hidden layer, the next one's weights (S, H, C, M) and
    bias (S, C, M).
    """
    models, units = 2 ** layers, hidden or classes

    def uniform(*shape):
        return torch.stack([torch.rand(*shape, generator=g, dtype=dtype, device=device) * 2 - 1 for g in generators])

    used = torch.tensor([bin(m).count("1") for m in range(models)], dtype=dtype, device=device).clamp(min=1)
    scale = 1 / (used * size).sqrt()                                                           # (M,)
    weights = [(uniform(size, units)[..., None]
                * half(scale[None, None, None], layer).reshape(-1)).flatten(2)
               for layer in range(layers)]
    rest = [uniform(units)[..., None] * scale]
    if hidden:
        rest += [(uniform(hidden, classes) / hidden ** 0.5)[..., None].repeat(1, 1, 1, models),
                 (uniform(classes) / hidden ** 0.5)[..., None].repeat(1, 1, models)]
    return weights, rest


def products(x, weights, bias):
    """Every model's features times its own weights: x (L, S, B, D), L weights (S, D, K * M/2) of its dtype, and the
    bias (S, K, M), read for its shape -> (S, B, K, M) float32."""
    out = bias.new_zeros(x.shape[1], x.shape[2], *bias.shape[1:])
    for layer, weight in enumerate(weights):
        part = half(out, layer)
        part += torch.bmm(x[layer], weight).view_as(part)
    return out


def logits_of(out, rest, scale=1.0, mask=None):
    """From the products (S, B, K, M) to the logits of all models (S, B, C, M); `scale` and `mask` (S, B, H, 1) are
    dropout's."""
    bias, *head = rest
    out = out * scale + bias[:, None]
    if head:
        out = out.relu() * (mask * scale if mask is not None else 1)
        out = torch.einsum("sbhm,shcm->sbcm", out, head[0]) + head[1][:, None]
    return out


def train_models(features, labels, classes, seeds, *, hidden=0, epochs=20, batch_size=128, lr=1e-3, dropout=0.1,
                 dtype=torch.float32, progress=lambda: None):
    """Train all subsets of the layers, for several seeds, together: Adam on the mean cross-entropy of each model.

    features (L, N, D) in the dtype of the products, labels (N,). Every model of a seed sees the same rows in the same
    order under the same dropout mask, so that any of them trained alone comes out the same. Returns the weights as
    initial_weights() does. UserError when a weight is not finite.
    """
    features = features.contiguous()  # or each step copies the whole to take a batch from it
    layers, count, size = features.shape
    device = features.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    weights, rest = initial_weights(generators, layers, size, classes, hidden, dtype, device)
    low = [weight.to(features.dtype) for weight in weights]  # what the products read
    *optimizers, of_rest = [torch.optim.Adam(parameters, lr=lr, fused=True)
                            for parameters in (*([weight] for weight in weights), rest)]
    for parameter in rest:
        parameter.requires_grad_()
    gradient = torch.empty_like(weights[0])  # of one layer at a time: it stays in the processor's cache
    scale = 1 / (1 - dropout)
    for _ in range(epochs):
        orders = torch.stack([torch.randperm(count, generator=g, device=device) for g in generators])    # (S, N)
        for rows in orders.split(batch_size, dim=1):                                                     # (S, B)
            x = features.index_select(1, rows.flatten()).unflatten(1, rows.shape)                        # (L, S, B, D)
            mask = None
            if dropout:
                for seed, g in enumerate(generators):
                    x[:, seed] *= keep_mask((layers, rows.shape[1], size), dropout, device, g).to(x.dtype)
                if hidden:
                    mask = torch.stack([keep_mask((rows.shape[1], hidden, 1), dropout, device, g) for g in generators])
            out = products(x, low, rest[0]).requires_grad_()                                             # (S, B, K, M)
            logits = logits_of(out, rest, scale, mask)                                                   # (S, B, C, M)
            right = logits.gather(2, labels[rows][:, :, None, None].expand(-1, -1, 1, logits.shape[3]))
            loss = (logits.logsumexp(2) - right[:, :, 0]).sum() / rows.shape[1]
            of_rest.zero_grad()
            loss.backward()
            of_rest.step()
            for layer, weight in enumerate(weights):  # the products' own backward, and the update at once
                part = half(out.grad, layer).flatten(2).to(x.dtype)
                weight.grad = gradient.copy_(torch.bmm(x[layer].transpose(1, 2), part))
                optimizers[layer].step()
                low[layer].copy_(weight)
            progress()
    if not all(torch.isfinite(parameter).all() for parameter in weights + rest):
        raise UserError(f"the search's weights are not finite, its loss is {loss.item():.3g}: "
                        f"are the features sane, and is --lr {lr} not too high?")
    return weights, rest


@torch.inference_mode()
def confusion_matrices(weights, rest, features, labels, classes, chunk=512):
    """Confusion matrices of all models on one test file: (S, M, true C, predicted C) int32 NumPy."""
    seeds, models = rest[0].shape[0], rest[0].shape[2]
    total = torch.zeros(seeds * models * classes * classes, dtype=torch.int64, device=features.device)
    model = torch.arange(seeds * models, device=features.device).view(seeds, 1, models)
    low = [weight.to(features.dtype) for weight in weights]
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        x = features[:, None, part].expand(-1, seeds, -1, -1)
        predicted = logits_of(products(x, low, rest[0]), rest).argmax(2)             # (S, B, M)
        index = (model * classes + labels[part][None, :, None]) * classes + predicted
        total += torch.bincount(index.flatten(), minlength=len(total))
    return total.view(seeds, models, classes, classes).cpu().numpy().astype(np.int32)


# --- files -------------------------------------------------------------------------------------------------------

def load_features(folder, manifest, stem, pooling, layers, dtype, device):
    """The chosen layers of one file of features (L, N, D) and its labels (N,), as tensors. UserError for NaN."""
    rows = manifest["inputs"][f"{stem}.tsv"]["rows"]
    path = Path(folder) / f"{stem}.{pooling}.npy"
    array = load_array(path, (len(manifest["layers"]), rows, manifest["hidden_size"]))
    array = np.stack([array[manifest["layers"].index(layer)] for layer in layers]).astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds values that are not finite numbers: run extract.py again")
    labels = np.array(load_array(Path(folder) / f"{stem}.labels.npy", (rows,), "i"))
    if not ((0 <= labels) & (labels < len(manifest["labels"]))).all():
        raise UserError(f"{folder}/{stem}.labels.npy holds classes outside 0..{len(manifest['labels']) - 1}")
    return torch.from_numpy(array).to(device, dtype), torch.from_numpy(labels).to(device)


def part_path(out, pooling, seed):
    return Path(out) / "parts" / f"{pooling}.{seed}.npz"


def load_part(path, shape):
    """The confusion matrices (files, M, C, C) of one pooling and seed, and the seconds they took."""
    try:
        with np.load(path) as part:
            confusion, seconds = part["confusion"], float(part["seconds"])
    except Exception as error:  # NumPy and zipfile raise a dozen different ones
        raise UserError(f"{path} is damaged or cut short ({error}): delete it, and run the search again") from None
    if confusion.shape != shape:
        raise UserError(f"{path} has shape {confusion.shape}, expected {shape}: delete it, and run the search again")
    return confusion, seconds


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("files")
    group.add_argument("--features", required=True, help="feature folder (extract.py)")
    group.add_argument("--out", required=True, help="grid folder to write")
    group.add_argument("--overwrite", action="store_true", help="delete what is in OUT and start anew")
    group = parser.add_argument_group("the search")
    group.add_argument("--layers", type=int, nargs="+", default=list(range(5, 13)), metavar="K",
                       help="layers to combine, 0 is the embeddings (default: 5 6 ... 12)")
    group.add_argument("--poolings", nargs="+", choices=POOLINGS, default=list(POOLINGS),
                       help="(default: max mean cls)")
    group.add_argument("--seeds", type=in_range(int, 1), default=5, help="models of each combination (default: 5)")
    group.add_argument("--select", choices=["joint", "en", "test"], default="joint",
                       help="rank by the mean of the non-English dev sets (default), by English dev (true zero-shot), "
                            "or by the mean of the non-English test sets, as the paper did: its scores are then too "
                            "high by the choice")
    group = parser.add_argument_group("each classifier")
    group.add_argument("--hidden", type=in_range(int, 0), default=0, help="units of a hidden layer (default: 0: none)")
    group.add_argument("--epochs", type=in_range(int, 1), default=20, help="passes over the train rows (default: 20)")
    group.add_argument("--batch-size", type=in_range(int, 1), default=128, help="rows a step (default: 128)")
    group.add_argument("--lr", type=in_range(float, above=0), default=1e-3, help="Adam's learning rate (default: 1e-3)")
    group.add_argument("--dropout", type=in_range(float, 0, below=1), default=0.1,
                       help="on the classifier's input (default: 0.1)")
    group.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                       help="of matrix products (default: auto: bf16 where the hardware has it)")
    args = parser.parse_args(argv)
    if len(set(args.poolings)) < len(args.poolings):
        parser.error(f"--poolings {' '.join(args.poolings)}: a pooling is named twice")
    if len(args.layers) > 14:
        parser.error(f"--layers: {len(args.layers)} layers have {2 ** len(args.layers) - 1:,} combinations; "
                     "name 14 at most")
    return args


def main(argv=None):
    args = parse_args(argv)
    out, device, (rank, world) = Path(args.out), pick_device(), start_processes()
    manifest = read_json(Path(args.features) / "manifest.json", {
        "layers": [int], "hidden_size": int, "labels": [str], "inputs": {str: {"rows": int}}, "complete": bool})
    if not manifest["complete"]:
        raise UserError(f"{args.features} is not complete: run extract.py again with the same command")
    check_layers(args.layers, max(manifest["layers"]), "--layers")
    layers, seeds, classes = sorted(args.layers), list(range(args.seeds)), len(manifest["labels"])
    stems = sorted((name.removesuffix(".tsv") for name in manifest["inputs"]),
                   key=lambda s: (s[:3], not s.endswith(".en"), s))
    files = [stem for stem in stems if not stem.startswith("train.")]
    if "train.en" not in stems or not files:
        raise UserError(f"{args.features}: the search needs train.en and a dev or test file, "
                        f"it holds {' '.join(stems)}")
    if args.select not in columns_of(files):
        raise UserError(f"--select {args.select}: the features hold no file to choose by, only {' '.join(files)}")
    precision = pick_precision("fp32" if args.precision == "auto" and device.type == "cuda"
                               and not torch.cuda.is_bf16_supported(including_emulation=False) else args.precision,
                               device)
    combinations = [tuple(k for bit, k in enumerate(layers) if m >> bit & 1) for m in range(1, 2 ** len(layers))]
    shape = (len(files), len(combinations), classes, classes)
    description = {**{key: getattr(args, key) for key in "features seeds hidden epochs batch_size lr dropout".split()},
                   "layers": layers, "poolings": args.poolings, "precision": str(precision).removeprefix("torch."),
                   "manifest": sha256(Path(args.features) / "manifest.json")}
    with claim(out) if rank == 0 else nullcontext():
        agree(rank == 0 and start_folder(out, "run.json", description, {"versions": versions()}, args.overwrite))
        if rank == 0:
            print(f"{len(combinations)} combinations of layers {' '.join(map(str, layers))} x {len(args.poolings)} "
                  f"poolings x {args.seeds} seeds = {len(combinations) * len(args.poolings) * args.seeds:,} models on "
                  f"{f'{world} processes' if world > 1 else device}, {description['precision']} products")
        jobs = [(pooling, seed) for pooling in args.poolings for seed in seeds
                if not part_path(out, pooling, seed).exists()]
        agree(0)  # all have looked before one writes
        mine = {}  # this process's share: {pooling: [seed, ...]}
        for pooling, seed in jobs[rank::world]:
            mine.setdefault(pooling, []).append(seed)
        steps = -(-manifest["inputs"]["train.en.tsv"]["rows"] // args.batch_size) * args.epochs
        with progress_bar(total=steps * len(mine), unit="step", disable=rank > 0) as bar, \
                out_of_memory("name fewer --layers, or --seeds at a time"):
            for pooling, todo in mine.items():
                bar.set_description(pooling)
                start = time.perf_counter()
                train_set = load_features(args.features, manifest, "train.en", pooling, layers, precision, device)
                models = train_models(*train_set, classes, todo, hidden=args.hidden, epochs=args.epochs, lr=args.lr,
                                      batch_size=args.batch_size, dropout=args.dropout, progress=bar.update)
                tables = [confusion_matrices(*models, *load_features(args.features, manifest, stem, pooling, layers,
                                                                     precision, device), classes) for stem in files]
                tables = np.stack(tables)[:, :, 1:]                                     # (files, S, combinations, C, C)
                seconds = (time.perf_counter() - start) / len(todo)
                for i, seed in enumerate(todo):
                    with write_atomic(part_path(out, pooling, seed), "wb") as file:
                        np.savez(file, confusion=tables[:, i], seconds=seconds)
        agree(0)  # all parts are there
        if rank > 0:
            return 0
        parts = [[load_part(part_path(out, pooling, seed), shape) for seed in seeds] for pooling in args.poolings]
        confusion = np.array([[p[0] for p in row] for row in parts]).transpose(0, 3, 1, 2, 4, 5)  # (P, M, S, F, C, C)
        text = write_grid(out, Results(confusion, args.poolings, combinations, files), manifest["labels"], args.select,
                          args.hidden, sum(part[1] for row in parts for part in row), manifest.get("model"))
        finish_folder(out, "run.json")
    best = read_json(out / "best.json", {})
    print(text + f"\nchosen: {best['pooling']} pooling of layers {' '.join(map(str, best['layers']))}; "
          f"written to {out}/")
    return 0


if __name__ == "__main__":
    cli(main)
