"""Phase 1b: train a small classifier on every combination of layers, pooling, learning rate and seed, and rank them.

    python grid_search.py --features features/massive --out grid/massive

Reads   FEATURES/ as extract.py writes it. Trains on the source language, tests in every language there is.
Writes  OUT/results.csv (a row for each model), OUT/best.json (what train.py --layers-from takes), OUT/summary.md,
        OUT/confusion.LANG.csv of the chosen combination, OUT/parts/ (the confusion matrices of all models: with them
        a second call with another --select takes a second, and a stopped search goes on), OUT/run.json.
Paper   sections 1.1 (phase one) and 1.5; conclusions 3, 4 and 5. 255 combinations of layers 5..12, 3 poolings, 5 seeds.

All models of one pooling and rate train together. With L layers, the M = 2^L subsets are numbered in binary: model m
has layer l if bit l of m is set (model 0 has none and is not reported). Their weights for layer l stand side by side in
one matrix, so that a step is L matrix products, whatever M is, and none is spent on a layer that a model does not use.
half() alone knows which column is which model's; one_model() takes one out.
Letters as in model.py; also F files (dev.de, test.zh, ...), and K, what a product puts out: H hidden units, or the C
classes where there is no hidden layer. A model but for its seed is known by its key, (pooling, layers, lr).
"""

import argparse
import csv
import functools
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.devices import agree, pick_device, pick_precision, start_processes
from lib.folders import (
    claim,
    finish_folder,
    load_array,
    read_json,
    sha256,
    start_folder,
    versions,
    write_atomic,
    write_json,
)
from lib.messages import UserError, cli, in_range, out_of_memory, progress_bar
from lib.scores import Results, choices, columns_of, micro_f1
from lib.tables import joined, summary
from model import POOLINGS

POOL = 1 << 23  # random values that dropout's masks are cut from


# --- the models --------------------------------------------------------------------------------------------------


def half(full, layer):
    """The half of (S, B, K, M) whose models use a layer: (S, B, K, M / 2^(layer+1), 2^layer), a view.

    Seen as (..., 2, 2, ..., 2), the last dimension has an axis a layer.
    """
    return full.unflatten(3, (-1, 2, 2**layer))[:, :, :, :, 1]


def initial_weights(generators, layers, size, classes, hidden, dtype, device):
    """The first weights of all models, from each seed's generator; nn.Linear's uniform distribution.

    All models of a seed begin from the same draw, scaled by their own number of inputs. Returns a list: for each layer
    (S, D, K * M/2), then the bias (S, K, M) and, with a hidden layer, the next weights (S, H, C, M) and bias (S, C, M).
    """
    models, units = 2**layers, hidden or classes

    def uniform(*shape):
        return torch.stack(
            [
                torch.rand(*shape, generator=g, dtype=dtype, device=device) * 2 - 1
                for g in generators
            ]
        )

    used = torch.tensor(
        [bin(m).count("1") for m in range(models)], dtype=dtype, device=device
    ).clamp(min=1)
    scale = 1 / (used * size).sqrt()  # (M,)
    weights = [
        (
            uniform(size, units)[..., None] * half(scale[None, None, None], layer).reshape(-1)
        ).flatten(2)
        for layer in range(layers)
    ]
    weights += [uniform(units)[..., None] * scale]
    if hidden:
        weights += [
            (uniform(hidden, classes) / hidden**0.5)[..., None].repeat(1, 1, 1, models),
            (uniform(classes) / hidden**0.5)[..., None].repeat(1, 1, models),
        ]
    return weights


def forward(weights, x, scale=1.0, mask=1.0):
    """The logits of all models: x (L, S, B, D) -> (S, B, C, M). `scale` and `mask` (S, B, H, 1) are dropout's."""
    layers, (bias, *head) = weights[: len(x)], weights[len(x) :]
    out = bias.new_zeros(x.shape[1], x.shape[2], *bias.shape[1:])  # (S, B, K, M)
    for layer, weight in enumerate(layers):
        part = half(out, layer)
        part += torch.bmm(x[layer], weight.to(x.dtype)).view_as(part)
    out = out * scale + bias[:, None]
    if head:
        out = out.relu() * mask * scale
        out = torch.einsum("sbhm,shcm->sbcm", out, head[0]) + head[1][:, None]
    return out


def train_models(
    features,
    labels,
    classes,
    seeds,
    *,
    hidden=0,
    epochs=20,
    batch_size=128,
    lr=1e-3,
    dropout=0.1,
    dtype=torch.float32,
    progress=lambda: None,
):
    """Train all subsets of the layers, for several seeds, together: Adam on the mean cross-entropy of each model.

    features (L, N, D) in the dtype of the products, labels (N,). Every model of a seed sees the same rows in the same
    order under the same dropout mask, so that any of them trained alone comes out the same. Returns the weights as
    initial_weights() does. UserError when a weight is not finite.
    """
    features = features.contiguous()  # or each step copies the whole to take a batch from it
    (layers, count, size), device = features.shape, features.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    weights = initial_weights(generators, layers, size, classes, hidden, dtype, device)
    optimizer = torch.optim.Adam([weight.requires_grad_() for weight in weights], lr=lr, fused=True)
    pool = (
        torch.rand(
            max(POOL, 2 * layers * batch_size * max(size, hidden)),
            device=device,
            generator=torch.Generator(device).manual_seed(0),
        )
        .ge(dropout)
        .to(features.dtype)
    )

    def mask(
        generator, *shape
    ):  # a window of the pool: to draw a mask anew costs a fifth of a step
        start = int(
            torch.randint(len(pool) - math.prod(shape), (), generator=generator, device=device)
        )
        return pool[start : start + math.prod(shape)].view(shape)

    for _ in range(epochs):
        orders = torch.stack(
            [torch.randperm(count, generator=g, device=device) for g in generators]
        )  # (S, N)
        for rows in orders.split(batch_size, dim=1):  # (S, B)
            x, after = (
                features.index_select(1, rows.flatten()).unflatten(1, rows.shape),
                1.0,
            )  # (L, S, B, D)
            if dropout:
                for part, generator in zip(x.unbind(1), generators):
                    part *= mask(generator, *part.shape)
                if hidden:
                    after = torch.stack(
                        [mask(generator, rows.shape[1], hidden, 1) for generator in generators]
                    )
            logits = forward(weights, x, 1 / (1 - dropout), after).flatten(0, 1)  # (S * B, C, M)
            right = labels[rows].flatten()[:, None].expand(-1, logits.shape[2])  # (S * B, M)
            loss = F.cross_entropy(logits, right, reduction="sum") / rows.shape[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress()
    if not all(weight.isfinite().all() for weight in weights):
        raise UserError(
            f"the search's weights are not finite, its loss is {loss.item():.3g}: "
            f"are the features sane, and is --lr {lr} not too high?"
        )
    return [weight.detach() for weight in weights]


def one_model(weights, layers, combination, seed):
    """One of the models of train_models() as a module: the features (B, D) of its layers, side by side -> (B, C).

    layers: those of the features, in order (bit l is the l-th); combination: some of them; seed: its place among the
    seeds. A grid keeps no weights: train them again, and give the module features scaled as those were (scaling()).
    """
    bits = [l for l, layer in enumerate(layers) if layer in combination]
    m, parts = sum(2**l for l in bits), []
    for l in bits:
        having = (
            half(torch.arange(2 ** len(layers))[None, None, None], l).flatten().tolist()
        )  # the models with layer l
        parts.append(
            weights[l][seed].unflatten(1, (-1, len(having)))[:, :, having.index(m)]
        )  # (D, K)
    rest = [weight[seed, ..., m] for weight in weights[len(layers) :]]
    modules = []
    for weight, bias in zip([torch.cat(parts), *rest[1::2]], rest[::2]):
        modules += [nn.ReLU()] * bool(modules) + [
            nn.Linear(*weight.shape, dtype=weight.dtype, device=weight.device)
        ]
        modules[-1].weight.data, modules[-1].bias.data = weight.T.contiguous(), bias.clone()
    return nn.Sequential(*modules)


@torch.inference_mode()
def confusion_matrices(weights, features, labels, classes, chunk=512):
    """Confusion matrices of all models on one test file: (S, M, true C, predicted C) int32 NumPy."""
    seeds, models = weights[-1].shape[0], weights[-1].shape[-1]
    total = torch.zeros(
        seeds * models * classes * classes, dtype=torch.int64, device=features.device
    )
    model = torch.arange(seeds * models, device=features.device).view(seeds, 1, models)
    weights = [weight.to(features.dtype) for weight in weights[: len(features)]] + weights[
        len(features) :
    ]
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        predicted = forward(weights, features[:, None, part].expand(-1, seeds, -1, -1)).argmax(
            2
        )  # (S, B, M)
        index = (model * classes + labels[part][None, :, None]) * classes + predicted
        total += torch.bincount(index.flatten(), minlength=len(total))
    return total.view(seeds, models, classes, classes).cpu().numpy().astype(np.int32)


# --- features ----------------------------------------------------------------------------------------------------


def load_features(folder, manifest, layers, device, pooling, stem):
    """These layers of one file of features (L, N, D) and its labels (N,), as tensors. UserError for NaN."""
    rows, classes = manifest["inputs"][f"{stem}.tsv"]["rows"], len(manifest["labels"])
    path = Path(folder) / f"{stem}.{pooling}.npy"
    array = load_array(path, (len(manifest["layers"]), rows, manifest["hidden_size"]))
    array = np.stack([array[manifest["layers"].index(layer)] for layer in layers]).astype(
        np.float32
    )
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds values that are not finite numbers: run extract.py again")
    labels = np.array(load_array(Path(folder) / f"{stem}.labels.npy", (rows,), "i"), np.int64)
    if not ((0 <= labels) & (labels < classes)).all():
        raise UserError(f"{folder}/{stem}.labels.npy holds classes outside 0..{classes - 1}")
    return torch.from_numpy(array).to(device), torch.from_numpy(labels).to(device)


def scaling(features):
    """What --scale layer does to features (L, N, D) of train rows: the mean (L, 1, D) to take off, and one number a
    layer, the root mean square of what is left, (L, 1, 1), to divide by; infinite for a layer that is the same in every
    row, as [CLS] of the embeddings is."""
    mean = features.mean(1, keepdim=True)
    number = (features - mean).square().mean((1, 2), keepdim=True).sqrt()
    same = number <= 1e-5 * mean.square().mean(2, keepdim=True).sqrt()
    return mean, torch.where(same, torch.inf, number)


# --- scores and choices ------------------------------------------------------------------------------------------


# --- the grid folder ---------------------------------------------------------------------------------------------


def write_grid(out, results, labels, select, hidden, seconds, model):
    """Write results.csv, confusion.LANG.csv, summary.md and best.json of a grid folder; returns the summary."""
    (keys, columns, source, confusion), (chosen, oracle) = results, choices(results)
    described = [
        {"layers": list(layers), "pooling": pooling, "lr": lr} for pooling, layers, lr in keys
    ]

    def write_csv(name, *rows):
        with write_atomic(out / name) as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    write_csv(
        "results.csv",
        ["pooling", "layers", "hidden", "lr", "seed", *columns],
        *(
            [pooling, joined(layers), hidden, lr, seed, *(f"{value:.12g}" for value in scores)]
            for (pooling, layers, lr), seeds in zip(keys, micro_f1(confusion))
            for seed, scores in enumerate(seeds)
        ),
    )
    for column, counts in zip(columns, confusion[chosen[select]].sum(0)):  # (C, C), over seeds
        if column.startswith("test_"):
            write_csv(
                f"confusion.{column[5:]}.csv",
                ["true \\ predicted", *labels],
                *([label, *row] for label, row in zip(labels, counts.tolist())),
            )
    text = summary(results, chosen, oracle, select, hidden, seconds)
    with write_atomic(out / "summary.md") as file:
        file.write(text)
    write_json(
        out / "best.json",
        {
            **described[chosen[select]],
            "select": select,
            "hidden": hidden,
            "model": model,
            "train_language": source,
            "per_language": {language: described[g] for language, g in oracle.items()},
            "protocols": {name: described[g] for name, g in chosen.items()},
        },
    )
    return text


# --- the search --------------------------------------------------------------------------------------------------


def part_path(out, pooling, lr, seed):
    return Path(out) / "parts" / f"{pooling}.{lr}.{seed}.npz"


def load_part(path, shape):
    """The confusion matrices (F, M, C, C) of one pooling, rate and seed, and the seconds they took."""
    try:
        with np.load(path) as part:
            confusion, seconds = part["confusion"], float(part["seconds"])
    except Exception as error:  # NumPy and zipfile raise a dozen different ones
        raise UserError(
            f"{path} is damaged or cut short ({error}): delete it, and run the search again"
        ) from None
    if confusion.shape != shape:
        raise UserError(
            f"{path} has shape {confusion.shape}, expected {shape}: delete it, and run the search again"
        )
    return confusion, seconds


def search(jobs, out, load, source, files, classes, *, scale, precision, bar, **settings):
    """Train what `jobs`, {(pooling, lr): [seed, ...]}, names, and keep each pooling, rate and seed as a part.

    load: load_features() of (pooling, stem). Returns the places of layers without spread, {pooling: [l, ...]}.
    """
    same = {}
    for (pooling, lr), seeds in jobs.items():
        bar.set_description(f"{pooling}, lr {lr:g}")
        start, mean, divisor = time.perf_counter(), 0, 1
        features, labels = load(pooling, f"train.{source}")
        if scale == "layer":
            mean, divisor = scaling(features)
            if places := divisor.isinf().flatten().nonzero().flatten().tolist():
                same[pooling] = places
        features = ((features - mean) / divisor).to(precision)
        weights = train_models(
            features, labels, classes, seeds, lr=lr, progress=bar.update, **settings
        )
        tables = []
        for stem in files:
            features, labels = load(pooling, stem)
            tables.append(
                confusion_matrices(
                    weights, ((features - mean) / divisor).to(precision), labels, classes
                )
            )
        seconds = (time.perf_counter() - start) / len(seeds)
        for seed, confusion in zip(seeds, np.stack(tables, 1)):  # (F, M, C, C)
            with write_atomic(part_path(out, pooling, lr, seed), "wb") as file:
                np.savez(file, confusion=confusion[:, 1:], seconds=seconds)
    return same


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("files")
    group.add_argument("--features", required=True, help="feature folder (extract.py)")
    group.add_argument("--out", required=True, help="grid folder to write")
    group.add_argument(
        "--overwrite", action="store_true", help="delete the search that is in OUT and start anew"
    )
    group.add_argument(
        "--train-language",
        metavar="LANG",
        help="source language (default: en, or the only one whose train file was extracted)",
    )
    group = parser.add_argument_group("the search")
    group.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=list(range(5, 13)),
        metavar="K",
        help="layers to combine, 0 is the embeddings (default: 5 6 ... 12)",
    )
    group.add_argument(
        "--poolings",
        nargs="+",
        choices=list(POOLINGS),
        default=list(POOLINGS),
        help=f"(default: {' '.join(POOLINGS)})",
    )
    group.add_argument(
        "--seeds", type=in_range(int, 1), default=5, help="models of each combination (default: 5)"
    )
    group.add_argument(
        "--select",
        choices=["joint", "en", "test"],
        default="joint",
        help="rank by the mean of the other languages' dev sets (default), by the source language's dev "
        "(en: true zero-shot), or by the mean of the other languages' test sets, as the paper did: "
        "its scores are then too high by the choice",
    )
    group = parser.add_argument_group("each classifier")
    group.add_argument(
        "--hidden",
        type=in_range(int, 0),
        default=0,
        help="units of a hidden layer (default: 0: none)",
    )
    group.add_argument(
        "--epochs",
        type=in_range(int, 1),
        default=20,
        help="passes over the train rows (default: 20)",
    )
    group.add_argument(
        "--batch-size", type=in_range(int, 1), default=128, help="rows a step (default: 128)"
    )
    group.add_argument(
        "--lr",
        type=in_range(float, above=0),
        nargs="+",
        default=[1e-4, 3e-4, 1e-3],
        metavar="LR",
        help="Adam's learning rates: each combination stands at its best one by --select "
        "(default: 1e-4 3e-4 1e-3)",
    )
    group.add_argument(
        "--scale",
        choices=["layer", "none"],
        default="layer",
        help="take each layer's mean off its features and divide them by one number, their spread over "
        "the train rows (layer, the default), or take them as they are (none; with --lr 1e-3 the "
        "paper's plain way, 3,825 models)",
    )
    group.add_argument(
        "--dropout",
        type=in_range(float, 0, below=1),
        default=0.1,
        help="on the classifier's input (default: 0.1)",
    )
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="of matrix products (default: auto: bf16 where the hardware has it)",
    )
    args = parser.parse_args(argv)
    for key in ("layers", "poolings", "lr"):
        if len(set(values := getattr(args, key))) < len(values):
            parser.error(f"--{key} {' '.join(map(str, values))}: one is named twice")
    if len(args.layers) > 14:
        parser.error(
            f"--layers: {len(args.layers)} layers have {2 ** len(args.layers) - 1:,} combinations; "
            "name 14 at most"
        )
    return args


def main(argv=None):
    args = parse_args(argv)
    out, device, (rank, world) = Path(args.out), pick_device(), start_processes()
    manifest = read_json(
        Path(args.features) / "manifest.json",
        "extract.py",
        {
            "layers": [int],
            "poolings": [str],
            "hidden_size": int,
            "labels": [str],
            "inputs": {str: {"rows": int}},
            "complete": bool,
        },
    )
    if not manifest["complete"]:
        raise UserError(
            f"{args.features} is not complete: run extract.py again with the same command"
        )
    for key in ("layers", "poolings"):
        if missing := [value for value in getattr(args, key) if value not in manifest[key]]:
            raise UserError(
                f"--{key} {missing[0]}: {args.features} holds {' '.join(map(str, manifest[key]))}, "
                "which was all there was when extract.py wrote it"
            )
    stems = sorted(name.removesuffix(".tsv") for name in manifest["inputs"])
    trained = [stem[6:] for stem in stems if stem.startswith("train.")]
    source = args.train_language or (trained[0] if len(trained) == 1 else "en")
    files = sorted(
        (stem for stem in stems if not stem.startswith("train.")),
        key=lambda stem: (stem[:3], not stem.endswith(f".{source}"), stem),
    )
    columns = [stem.replace(".", "_", 1) for stem in files]
    if source not in trained or not files:
        raise UserError(
            f"{args.features}: the search needs train.{source} and a dev or test file, "
            f"it holds {' '.join(stems)} (--train-language)"
        )
    if args.select not in columns_of(columns, source):
        raise UserError(
            f"--select {args.select}: the features hold no file to choose by, only {' '.join(files)} "
            f"(possible: {' '.join(columns_of(columns, source))})"
        )
    precision = pick_precision(args.precision, device)
    if precision == torch.float16:  # what "auto" is on older GPUs: its range is too small here
        precision = torch.float32
    layers, rates, seeds, classes = (
        sorted(args.layers),
        sorted(args.lr),
        range(args.seeds),
        len(manifest["labels"]),
    )
    combinations = [
        tuple(k for bit, k in enumerate(layers) if m >> bit & 1) for m in range(1, 2 ** len(layers))
    ]
    groups = list(itertools.product(args.poolings, rates))
    settings = {key: getattr(args, key) for key in ("hidden", "epochs", "batch_size", "dropout")}
    description = {
        **settings,
        "seeds": args.seeds,
        "layers": layers,
        "poolings": args.poolings,
        "lr": rates,
        "scale": args.scale,
        "train_language": source,
        "precision": str(precision).removeprefix("torch."),
        "manifest": sha256(Path(args.features) / "manifest.json"),
    }
    with claim(out, rank):
        agree(
            rank == 0
            and start_folder(
                out,
                "run.json",
                "grid_search.py",
                description,
                {"features": args.features, "versions": versions()},
                args.overwrite,
            )
        )
        if rank == 0:
            print(
                f"{len(combinations)} combinations of layers {' '.join(map(str, layers))} x {len(args.poolings)} "
                f"poolings x {len(rates)} learning rates x {args.seeds} seeds = "
                f"{len(combinations) * len(groups) * args.seeds:,} models, trained on {source}, on "
                f"{f'{world} processes' if world > 1 else device}, {description['precision']} products"
            )
        todo = [
            (group, seed)
            for group in groups
            for seed in seeds
            if not part_path(out, *group, seed).exists()
        ]
        agree()  # all have looked before one writes
        mine = {}  # this process's share
        for group, seed in todo[rank::world]:
            mine.setdefault(group, []).append(seed)
        load = functools.partial(load_features, args.features, manifest, layers, device)
        steps = (
            -(-manifest["inputs"][f"train.{source}.tsv"]["rows"] // args.batch_size)
            * args.epochs
            * len(mine)
        )
        with (
            out_of_memory("name fewer --layers, or --seeds at a time"),
            progress_bar(total=steps, unit="step", disable=rank > 0) as bar,
        ):
            same = search(
                mine,
                out,
                load,
                source,
                files,
                classes,
                scale=args.scale,
                precision=precision,
                bar=bar,
                **settings,
            )
        agree()  # all parts are there
        if rank > 0:
            return 0
        for pooling, places in same.items():
            print(
                f"{pooling} of layer {' '.join(str(layers[l]) for l in places)} is the same for every row: "
                "left at zero"
            )
        shape = len(files), len(combinations), classes, classes
        parts = [
            [load_part(part_path(out, *group, seed), shape) for seed in seeds] for group in groups
        ]
        confusion = np.moveaxis(
            [[part[0] for part in row] for row in parts], 3, 1
        )  # (P * R, M, S, F, C, C)
        results = Results(
            [(pooling, layers, lr) for pooling, lr in groups for layers in combinations],
            columns,
            source,
            confusion.reshape(-1, *confusion.shape[2:]),
        )
        text = write_grid(
            out,
            results,
            manifest["labels"],
            args.select,
            args.hidden,
            sum(part[1] for row in parts for part in row),
            manifest.get("model"),
        )
        finish_folder(out, "run.json")
    print(text, f"written to {out}/", sep="\n")
    return 0


if __name__ == "__main__":
    cli(main)
