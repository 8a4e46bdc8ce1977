"""Phase 1b: train a small classifier on every combination of layers, pooling, learning rate and seed, and rank them.

    python grid_search.py --features features/massive --out grid/massive

Reads   FEATURES/ as extract.py writes it. Trains on the source language, tests in every language there is.
Writes  OUT/results.csv (a row for each model), OUT/best.json (what train.py --layers-from takes), OUT/summary.md,
        OUT/confusion.LANG.csv of the chosen combination, OUT/parts/ (the confusion matrices of all models: with them
        a second call with another --select takes a second, and a stopped search goes on), OUT/run.json.
Paper   sections 1.1 (phase one) and 1.5; conclusions 3, 4 and 5. 255 combinations of layers 5..12, 3 poolings, 5 seeds.

All models of one pooling train together. With L layers, the M = 2^L subsets are numbered in binary: model m has layer l
if bit l of m is set (model 0 has none and is not reported). Their weights for layer l stand side by side in one matrix,
so that a step is L matrix products, whatever M is, and no product is spent on a layer that a model does not use.
Letters as in model.py; also P poolings, R learning rates, F files (dev.de, test.zh, ...), and K, what a product puts
out: H hidden units, or the C classes where there is no hidden layer.
"""
import argparse
import csv
import itertools
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (UserError, agree, claim, cli, finish_folder, in_range, load_array, markdown_table, out_of_memory,
                    pick_device, pick_precision, progress_bar, read_json, sha256, spread, start_folder,
                    start_processes, versions, write_atomic, write_json)
from model import POOLINGS, check_layers

POOL = 1 << 23  # random values that dropout's masks are cut from


# --- the models --------------------------------------------------------------------------------------------------

def half(full, layer):
    """The half of (S, B, K, M) whose models use a layer: (S, B, K, M / 2^(layer+1), 2^layer), a view.

    Seen as (..., 2, 2, ..., 2), the last dimension has an axis a layer.
    """
    return full.unflatten(3, (-1, 2, 2 ** layer))[:, :, :, :, 1]


def initial_weights(generators, layers, size, classes, hidden, dtype, device):
    """The first weights of all models, from each seed's generator; nn.Linear's uniform distribution.

    All models of a seed begin from the same draw, scaled by their own number of inputs. Returns a list: for each layer
    (S, D, K * M/2), then the bias (S, K, M) and, with a hidden layer, the next weights (S, H, C, M) and bias (S, C, M).
    """
    models, units = 2 ** layers, hidden or classes

    def uniform(*shape):
        return torch.stack([torch.rand(*shape, generator=g, dtype=dtype, device=device) * 2 - 1 for g in generators])

    used = torch.tensor([bin(m).count("1") for m in range(models)], dtype=dtype, device=device).clamp(min=1)
    scale = 1 / (used * size).sqrt()                                                           # (M,)
    weights = [(uniform(size, units)[..., None] * half(scale[None, None, None], layer).reshape(-1)).flatten(2)
               for layer in range(layers)]
    weights += [uniform(units)[..., None] * scale]
    if hidden:
        weights += [(uniform(hidden, classes) / hidden ** 0.5)[..., None].repeat(1, 1, 1, models),
                    (uniform(classes) / hidden ** 0.5)[..., None].repeat(1, 1, models)]
    return weights


def forward(weights, x, scale=1.0, mask=1.0):
    """The logits of all models: x (L, S, B, D) -> (S, B, C, M). `scale` and `mask` (S, B, H, 1) are dropout's."""
    layers, (bias, *head) = weights[:len(x)], weights[len(x):]
    out = bias.new_zeros(x.shape[1], x.shape[2], *bias.shape[1:])                              # (S, B, K, M)
    for layer, weight in enumerate(layers):
        part = half(out, layer)
        part += torch.bmm(x[layer], weight.to(x.dtype)).view_as(part)
    out = out * scale + bias[:, None]
    if head:
        out = out.relu() * mask * scale
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
    device, scale = features.device, 1 / (1 - dropout)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    weights = [weight.requires_grad_() for weight in initial_weights(generators, layers, size, classes, hidden, dtype,
                                                                     device)]
    optimizer = torch.optim.Adam(weights, lr=lr, fused=True)
    # a mask is a window of this, at a place that the seed's generator draws: drawing it anew costs a fifth of a step
    kept = torch.rand(max(POOL, 2 * layers * batch_size * max(size, hidden)), device=device,
                      generator=torch.Generator(device).manual_seed(0)).ge(dropout).to(features.dtype)

    def masks(*shape):
        length = int(np.prod(shape))
        starts = [int(torch.randint(len(kept) - length, (), generator=g, device=device)) for g in generators]
        return [kept[start:start + length].view(shape) for start in starts]

    for _ in range(epochs):
        orders = torch.stack([torch.randperm(count, generator=g, device=device) for g in generators])    # (S, N)
        for rows in orders.split(batch_size, dim=1):                                                     # (S, B)
            x = features.index_select(1, rows.flatten()).unflatten(1, rows.shape)                        # (L, S, B, D)
            mask = 1.0
            if dropout:
                for part, window in zip(x.unbind(1), masks(layers, rows.shape[1], size)):
                    part *= window
                if hidden:
                    mask = torch.stack(masks(rows.shape[1], hidden, 1))
            logits = forward(weights, x, scale, mask).flatten(0, 1)                                      # (S * B, C, M)
            right = labels[rows].flatten()[:, None].expand(-1, logits.shape[2])                          # (S * B, M)
            loss = F.cross_entropy(logits, right, reduction="sum") / rows.shape[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress()
    if not all(weight.isfinite().all() for weight in weights):
        raise UserError(f"the search's weights are not finite, its loss is {loss.item():.3g}: "
                        f"are the features sane, and is --lr {lr} not too high?")
    return [weight.detach() for weight in weights]


def one_model(weights, layers, combination, seed):
    """One of the models of train_models() as a module: the features (B, D) of its layers, side by side -> (B, C).

    layers: those of the features, in order; combination: some of them; seed: its place among the seeds.
    """
    bits = [l for l, layer in enumerate(layers) if layer in combination]
    m = sum(1 << l for l in bits)
    columns = [(m >> l + 1 << l) | m & (1 << l) - 1 for l in bits]  # its place among the models that have layer l
    bias, *head = [weight[seed, ..., m] for weight in weights[len(layers):]]
    parts = [weights[l][seed].unflatten(1, (len(bias), -1))[:, :, column] for l, column in zip(bits, columns)]
    modules = [nn.Linear(sum(map(len, parts)), len(bias), dtype=bias.dtype, device=bias.device)]
    modules[0].weight.data, modules[0].bias.data = torch.cat(parts).T.contiguous(), bias.clone()
    if head:
        modules += [nn.ReLU(), nn.Linear(*head[0].shape, dtype=bias.dtype, device=bias.device)]
        modules[2].weight.data, modules[2].bias.data = head[0].T.contiguous(), head[1].clone()
    return nn.Sequential(*modules)


@torch.inference_mode()
def confusion_matrices(weights, features, labels, classes, chunk=512):
    """Confusion matrices of all models on one test file: (S, M, true C, predicted C) int32 NumPy."""
    seeds, models = weights[-1].shape[0], weights[-1].shape[-1]
    total = torch.zeros(seeds * models * classes * classes, dtype=torch.int64, device=features.device)
    model = torch.arange(seeds * models, device=features.device).view(seeds, 1, models)
    weights = [weight.to(features.dtype) for weight in weights[:len(features)]] + weights[len(features):]
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        predicted = forward(weights, features[:, None, part].expand(-1, seeds, -1, -1)).argmax(2)    # (S, B, M)
        index = (model * classes + labels[part][None, :, None]) * classes + predicted
        total += torch.bincount(index.flatten(), minlength=len(total))
    return total.view(seeds, models, classes, classes).cpu().numpy().astype(np.int32)


# --- features ----------------------------------------------------------------------------------------------------

def load_features(folder, manifest, stem, pooling, layers, device):
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
    return torch.from_numpy(array).to(device), torch.from_numpy(labels).to(device)


def scaling(features):
    """What --scale layer does to features (L, N, D) of train rows: the mean (L, 1, D) to take off, and one number a
    layer, the root mean square of what is left, (L, 1, 1), to divide by; infinite for a layer that is the same in every
    row, as [CLS] of the embeddings is."""
    mean = features.mean(1, keepdim=True)
    number = (features - mean).square().mean((1, 2), keepdim=True).sqrt()
    same = number <= 1e-5 * mean.square().mean(2, keepdim=True).sqrt()
    return mean, torch.where(same, torch.inf, number)


# --- what a search says ------------------------------------------------------------------------------------------

class Results(NamedTuple):
    """All models' confusion matrices on all files, with the names of the axes, and the source language."""
    confusion: np.ndarray  # (P, R, M, S, F, true C, predicted C)
    poolings: list
    rates: list            # rising
    combinations: list     # of tuples of layer numbers
    files: list
    source: str


def micro_f1(confusion):
    """Micro-F1 from confusion matrices (..., C, C), as in the paper's section 1.5. Each row has one label, so there are
    as many false positives as false negatives: precision, recall, F1 and accuracy are one."""
    return np.trace(confusion, axis1=-2, axis2=-1) / np.maximum(confusion.sum((-2, -1)), 1)


def macro_f1(confusion):
    """The classes' mean F1 from confusion matrices (..., C, C); a class with neither rows nor predictions counts 0."""
    true = np.diagonal(confusion, axis1=-2, axis2=-1)
    return (2 * true / np.maximum(confusion.sum(-1) + confusion.sum(-2), 1)).mean(-1)


def columns_of(files, source):
    """The files whose mean each protocol ranks by: {"en": [index, ...], "joint": ..., "test": ...}, those there are.

    en: the source language's dev; joint and test: the other languages' dev and test.
    """
    def where(split, own):
        return [i for i, name in enumerate(files) if name.startswith(f"{split}.") and (name == f"{split}.{source}") == own]

    groups = {"en": where("dev", True), "joint": where("dev", False), "test": where("test", False)}
    return {name: group for name, group in groups.items() if group}


def rank(scores, combinations):
    """Indices (p, r, m) of scores (P, R, M), best first, each pooling and combination once, at its own best rate.

    Ties go to the smaller rate; then to fewer layers, to lower ones, to the first pooling.
    """
    scores = np.round(scores, 9)
    best = scores.argmax(1)                                                                     # (P, M)
    order = sorted(np.ndindex(best.shape), key=lambda i: (
        -scores[i[0], best[i], i[1]], len(combinations[i[1]]), combinations[i[1]], i[0]))
    return [(p, int(best[p, m]), m) for p, m in order]


def choices(results):
    """What each protocol chooses, as indices (p, r, m): {"en", "joint", "test": ...} and the oracle's {language: ...}."""
    mean = micro_f1(results.confusion).mean(3)                                                  # (P, R, M, F)
    chosen = {name: rank(mean[..., group].mean(-1), results.combinations)[0]
              for name, group in columns_of(results.files, results.source).items()}
    oracle = {name.split(".")[1]: rank(mean[..., i], results.combinations)[0]
              for i, name in enumerate(results.files) if name.startswith("dev.")}
    return chosen, oracle


def number(value):
    return "" if np.isnan(value) else f"{value:.2f}"


def conclusions(score, poolings, combinations):
    """The paper's conclusions 3, 4 and 5 as cells, from scores (P, M): each pooling's mean over the combinations, the
    best single layer, the best combination, and what it is better by."""
    first = [m for m, combination in enumerate(combinations) if len(combination) == 1]
    p, s = np.unravel_index(score[:, first].argmax(), (len(poolings), len(first)))
    q, m = np.unravel_index(score.argmax(), score.shape)
    best_single = score[p, first[s]]
    return [*(number(mean) for mean in score.mean(1)),
            f"{combinations[first[s]][0]} {poolings[p]} {best_single:.2f}",
            f"{'+'.join(map(str, combinations[m]))} {poolings[q]} {score[q, m]:.2f}", f"{score[q, m] - best_single:+.2f}"]


def summary(results, chosen, oracle, select, hidden, seconds):
    """The report in Markdown, with what choices() gave. `select`: the protocol to rank by; `seconds`: of all models."""
    confusion, poolings, rates, combinations, files, source = results
    f1, macro = 100 * micro_f1(confusion), 100 * macro_f1(confusion)                            # (P, R, M, S, F)
    groups = columns_of(files, source)
    score = f1[..., groups[select]].mean(-1)                                                    # (P, R, M, S)
    test = f1[..., groups["test"]].mean(-1) if "test" in groups else np.full(score.shape, np.nan)
    mean = score.mean(3)                                                                        # (P, R, M)
    best = mean.max(1)                                                                          # (P, M)
    top = [[place, poolings[i[0]], "+".join(map(str, combinations[i[2]])), f"{rates[i[1]]:g}", number(mean[i]),
            number(spread(score[i])), number(test[i].mean()), number(spread(test[i]))]
           for place, i in enumerate(rank(mean, combinations)[:10], 1)]
    by_rate = [[f"{rate:g}", *conclusions(mean[:, r], poolings, combinations)] for r, rate in enumerate(rates)]
    by_rate += [["each at its best", *conclusions(best, poolings, combinations)]] * (len(rates) > 1)
    worth = []
    for layer in sorted({layer for combination in combinations for layer in combination}):
        has = np.array([layer in combination for combination in combinations])
        without = best[:, ~has].mean() if (~has).any() else np.nan
        worth.append([layer, number(best[:, has].mean()), number(without), number(best[:, has].mean() - without),
                      *map(number, best[:, combinations.index((layer,))])])
    tests = [i for i, name in enumerate(files) if name.startswith("test.")]
    others = [k for k, i in enumerate(tests) if i in groups.get("test", [])]
    picks = {name: [pick] * len(tests) for name, pick in chosen.items()}
    if {files[i].split(".")[1] for i in tests} <= set(oracle):
        picks["oracle"] = [oracle[files[i].split(".")[1]] for i in tests]
    protocols = []
    for name in [name for name in ("en", "joint", "oracle", "test") if name in picks and others]:
        micros, macros = ([table[pick][:, i].mean() for pick, i in zip(picks[name], tests)] for table in (f1, macro))
        p, r, m = picks[name][0]
        choice = f"{poolings[p]} of {'+'.join(map(str, combinations[m]))}, lr {rates[r]:g}"
        protocols.append([name, "per language" if name == "oracle" else choice, *map(number, micros),
                          number(np.mean([micros[k] for k in others])), number(np.mean([macros[k] for k in others]))])
    models = f1[..., 0].size
    text = f"""# The search

{models:,} models ({len(combinations)} combinations x {len(poolings)} poolings x {len(rates)} learning rates x \
{f1.shape[3]} seeds{f', hidden layer of {hidden}' if hidden else ''}), {seconds:.1f} s, {1000 * seconds / models:.1f} ms \
a model.
Micro-F1 in percent, mean and standard deviation (+-) over the seeds. Trained on {source}. Ranked by `{select}`: the
mean over {', '.join(files[i] for i in groups[select])}; each combination at the learning rate that is best by it.
`paper F1` is the mean over the test sets of the languages other than {source}.

{markdown_table(["rank", "pooling", "layers", "lr", "ranked by", "+-", "paper F1", "+-"], top)}

Conclusions 3 (which pooling: mean over all combinations), 4 (the best single layer) and 5 (what combining adds), at each
learning rate:

{markdown_table(["lr", *(f"mean: {p}" for p in poolings), "best single", "best", "gain"], by_rate)}

What each layer is worth:

{markdown_table(["layer", "with it", "without it", "difference", *(f"alone: {p}" for p in poolings)], worth)}
"""
    if protocols:
        text += f"""
What each protocol chooses, and its micro-F1 on the test sets. `en`: on the dev set of {source}, true zero-shot; `joint`: \
on the
mean of the other languages' dev; `oracle`: each language on its own dev; `test`: on the test sets, as the paper did.

{markdown_table(["protocol", "choice", *(files[i].split(".")[1] for i in tests), "paper F1", "macro-F1"], protocols)}
"""
    return text


def write_grid(out, results, labels, select, hidden, seconds, model):
    """Write results.csv, confusion.LANG.csv, summary.md and best.json of a grid folder; returns the summary."""
    chosen, oracle = choices(results)
    f1 = micro_f1(results.confusion)

    def described(pick):
        return {"layers": list(results.combinations[pick[2]]), "pooling": results.poolings[pick[0]],
                "lr": results.rates[pick[1]]}

    with write_atomic(out / "results.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["pooling", "layers", "hidden", "lr", "seed",
                         *(name.replace(".", "_", 1) for name in results.files)])
        for p, r, m, seed in itertools.product(*map(range, f1.shape[:4])):
            writer.writerow([results.poolings[p], "+".join(map(str, results.combinations[m])), hidden,
                             f"{results.rates[r]:g}", seed, *(f"{value:.6f}" for value in f1[p, r, m, seed])])
    for name, counts in zip(results.files, results.confusion[chosen[select]].sum(0)):           # (C, C), over seeds
        if name.startswith("test."):
            with write_atomic(out / f"confusion.{name[5:]}.csv") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["true \\ predicted", *labels])
                writer.writerows([label, *row] for label, row in zip(labels, counts.tolist()))
    text = summary(results, chosen, oracle, select, hidden, seconds)
    with write_atomic(out / "summary.md") as file:
        file.write(text)
    write_json(out / "best.json", {
        **described(chosen[select]), "select": select, "hidden": hidden, "model": model,
        "train_language": results.source,
        "per_language": {language: described(pick) for language, pick in oracle.items()},
        "protocols": {name: described(pick) for name, pick in chosen.items()}})
    return text


def read_grid(folder):
    """A grid folder -> {(pooling, layers, lr): {"dev_de": scores over seeds, percent, ...}}, its columns, its best.json."""
    best = read_json(Path(folder) / "best.json", "grid_search.py", {"train_language": str, "select": str})
    path, grid = Path(folder) / "results.csv", {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = [name for name in rows[0] if name.startswith(("dev_", "test_"))]
        for row in rows:
            key = row["pooling"], tuple(map(int, row["layers"].split("+"))), float(row["lr"])
            entry = grid.setdefault(key, {column: [] for column in columns})
            for column in columns:
                entry[column].append(100 * float(row[column]))
        grid = {key: {c: np.array(v) for c, v in entry.items()} for key, entry in grid.items()}
    except (OSError, KeyError, ValueError, IndexError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path}: not what grid_search.py writes ({error!r}): delete it, and run the search again") from None
    return grid, columns, best


def mean_of_others(entry, split, source):
    """Mean over the other languages' scores on a split, for each seed."""
    return np.mean([scores for column, scores in entry.items()
                    if column.startswith(f"{split}_") and column != f"{split}_{source}"], 0)


def at_best_rate(grid, best):
    """Each pooling and combination of read_grid() at the rate that the selecting protocol prefers:
    {(pooling, layers): (lr, entry)}; ties go to the smaller."""
    source, select = best["train_language"], best["select"]
    found = {}
    for (pooling, layers, lr), entry in sorted(grid.items(), key=lambda item: item[0][2]):
        score = np.mean(entry[f"dev_{source}"] if select == "en" else
                        mean_of_others(entry, "test" if select == "test" else "dev", source))
        if (pooling, layers) not in found or score > found[pooling, layers][0] + 1e-7:
            found[pooling, layers] = score, lr, entry
    return {key: value[1:] for key, value in found.items()}


# --- the search --------------------------------------------------------------------------------------------------

def part_path(out, pooling, lr, seed):
    return Path(out) / "parts" / f"{pooling}.{lr:g}.{seed}.npz"


def load_part(path, shape):
    """The confusion matrices (F, M, C, C) of one pooling, rate and seed, and the seconds they took."""
    try:
        with np.load(path) as part:
            confusion, seconds = part["confusion"], float(part["seconds"])
    except Exception as error:  # NumPy and zipfile raise a dozen different ones
        raise UserError(f"{path} is damaged or cut short ({error}): delete it, and run the search again") from None
    if confusion.shape != shape:
        raise UserError(f"{path} has shape {confusion.shape}, expected {shape}: delete it, and run the search again")
    return confusion, seconds


def search(jobs, out, folder, manifest, layers, source, files, *, scale, precision, device, **settings):
    """Train what `jobs`, {(pooling, lr): [seed, ...]}, names, and keep each pooling, rate and seed as a part."""
    classes, say = len(manifest["labels"]), set()
    steps = -(-manifest["inputs"][f"train.{source}.tsv"]["rows"] // settings["batch_size"]) * settings["epochs"]
    with progress_bar(total=steps * len(jobs), unit="step", disable=start_processes()[0] > 0) as bar:
        for (pooling, lr), seeds in jobs.items():
            bar.set_description(f"{pooling}, lr {lr:g}")
            start = time.perf_counter()

            def load(stem):
                features, labels = load_features(folder, manifest, stem, pooling, layers, device)
                if scale == "layer":
                    features = (features - mean) / spread_of
                return features.to(precision), labels

            if scale == "layer":
                mean, spread_of = scaling(load_features(folder, manifest, f"train.{source}", pooling, layers, device)[0])
                if same := [layer for layer, value in zip(layers, spread_of.flatten()) if value.isinf()]:
                    say.add(f"{pooling} of layer {' '.join(map(str, same))} is the same for every row: left at zero")
            weights = train_models(*load(f"train.{source}"), classes, seeds, lr=lr, progress=bar.update, **settings)
            tables = np.stack([confusion_matrices(weights, *load(stem), classes) for stem in files])
            seconds = (time.perf_counter() - start) / len(seeds)
            for i, seed in enumerate(seeds):
                with write_atomic(part_path(out, pooling, lr, seed), "wb") as file:
                    np.savez(file, confusion=tables[:, i, 1:], seconds=seconds)             # (F, M, C, C)
    print("".join(f"{sentence}\n" for sentence in sorted(say)), end="")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    group = parser.add_argument_group("files")
    group.add_argument("--features", required=True, help="feature folder (extract.py)")
    group.add_argument("--out", required=True, help="grid folder to write")
    group.add_argument("--overwrite", action="store_true", help="delete the search that is in OUT and start anew")
    group.add_argument("--train-language", metavar="LANG",
                       help="source language (default: en, or the only one whose train file was extracted)")
    group = parser.add_argument_group("the search")
    group.add_argument("--layers", type=int, nargs="+", default=list(range(5, 13)), metavar="K",
                       help="layers to combine, 0 is the embeddings (default: 5 6 ... 12)")
    group.add_argument("--poolings", nargs="+", choices=list(POOLINGS), default=list(POOLINGS),
                       help=f"(default: {' '.join(POOLINGS)})")
    group.add_argument("--seeds", type=in_range(int, 1), default=5, help="models of each combination (default: 5)")
    group.add_argument("--select", choices=["joint", "en", "test"], default="joint",
                       help="rank by the mean of the other languages' dev sets (default), by the source language's dev "
                            "(en: true zero-shot), or by the mean of the other languages' test sets, as the paper did: "
                            "its scores are then too high by the choice")
    group = parser.add_argument_group("each classifier")
    group.add_argument("--hidden", type=in_range(int, 0), default=0, help="units of a hidden layer (default: 0: none)")
    group.add_argument("--epochs", type=in_range(int, 1), default=20, help="passes over the train rows (default: 20)")
    group.add_argument("--batch-size", type=in_range(int, 1), default=128, help="rows a step (default: 128)")
    group.add_argument("--lr", type=in_range(float, above=0), nargs="+", default=[1e-3], metavar="LR",
                       help="Adam's learning rates to try (default: 1e-3)")
    group.add_argument("--scale", choices=["layer", "none"], default="none",
                       help="take each layer's mean off its features and divide them by one number, their spread over "
                            "the train rows (layer), or take them as they are (none, the default)")
    group.add_argument("--dropout", type=in_range(float, 0, below=1), default=0.1,
                       help="on the classifier's input (default: 0.1)")
    group.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                       help="of matrix products (default: auto: bf16 where the hardware has it)")
    args = parser.parse_args(argv)
    for flag, values in (("--poolings", args.poolings), ("--lr", args.lr)):
        if len(set(values)) < len(values):
            parser.error(f"{flag} {' '.join(map(str, values))}: one is named twice")
    if len(args.layers) > 14:
        parser.error(f"--layers: {len(args.layers)} layers have {2 ** len(args.layers) - 1:,} combinations; "
                     "name 14 at most")
    return args


def main(argv=None):
    args = parse_args(argv)
    out, device, (rank, world) = Path(args.out), pick_device(), start_processes()
    manifest = read_json(Path(args.features) / "manifest.json", "extract.py", {
        "layers": [int], "poolings": [str], "hidden_size": int, "labels": [str], "inputs": {str: {"rows": int}},
        "complete": bool})
    if not manifest["complete"]:
        raise UserError(f"{args.features} is not complete: run extract.py again with the same command")
    check_layers(args.layers, max(manifest["layers"]), "--layers")
    if missing := [pooling for pooling in args.poolings if pooling not in manifest["poolings"]]:
        raise UserError(f"--poolings {missing[0]}: {args.features} holds {' '.join(manifest['poolings'])}: "
                        "run extract.py again")
    layers, seeds, rates = sorted(args.layers), list(range(args.seeds)), sorted(args.lr)
    stems = [name.removesuffix(".tsv") for name in manifest["inputs"]]
    trained = [stem.removeprefix("train.") for stem in stems if stem.startswith("train.")]
    source = args.train_language or ("en" if "en" in trained or len(trained) != 1 else trained[0])
    files = sorted((stem for stem in stems if not stem.startswith("train.")),
                   key=lambda s: (s[:3], not s.endswith(f".{source}"), s))
    if source not in trained or not files:
        raise UserError(f"{args.features}: the search needs train.{source} and a dev or test file, "
                        f"it holds {' '.join(sorted(stems))}")
    if args.select not in columns_of(files, source):
        raise UserError(f"--select {args.select}: the features hold no file to choose by, only {' '.join(files)}")
    precision = pick_precision("fp32" if args.precision == "auto" and device.type == "cuda"
                               and not torch.cuda.is_bf16_supported(including_emulation=False) else args.precision,
                               device)
    combinations = [tuple(k for bit, k in enumerate(layers) if m >> bit & 1) for m in range(1, 2 ** len(layers))]
    classes = len(manifest["labels"])
    settings = {key: getattr(args, key) for key in ("hidden", "epochs", "batch_size", "dropout")}
    description = {**settings, "seeds": args.seeds, "layers": layers, "poolings": args.poolings, "lr": rates,
                   "scale": args.scale, "train_language": source, "precision": str(precision).removeprefix("torch."),
                   "manifest": sha256(Path(args.features) / "manifest.json")}
    with claim(out, rank):
        agree(rank == 0 and start_folder(out, "run.json", "grid_search.py", description,
                                         {"features": args.features, "versions": versions()}, args.overwrite))
        if rank == 0:
            print(f"{len(combinations)} combinations of layers {' '.join(map(str, layers))} x {len(args.poolings)} "
                  f"poolings x {len(rates)} learning rates x {args.seeds} seeds = "
                  f"{len(combinations) * len(args.poolings) * len(rates) * args.seeds:,} models, trained on {source}, on "
                  f"{f'{world} processes' if world > 1 else device}, {description['precision']} products")
        todo = [job for job in itertools.product(args.poolings, rates, seeds) if not part_path(out, *job).exists()]
        agree()  # all have looked before one writes
        mine = {}  # this process's share
        for pooling, lr, seed in todo[rank::world]:
            mine.setdefault((pooling, lr), []).append(seed)
        with out_of_memory("name fewer --layers, or --seeds at a time"):
            search(mine, out, args.features, manifest, layers, source, files, scale=args.scale, precision=precision,
                   device=device, **settings)
        agree()  # all parts are there
        if rank > 0:
            return 0
        parts = [[[load_part(part_path(out, pooling, lr, seed), (len(files), len(combinations), classes, classes))
                   for seed in seeds] for lr in rates] for pooling in args.poolings]
        confusion = np.array([[[part[0] for part in row] for row in rows] for rows in parts])  # (P, R, S, F, M, C, C)
        results = Results(confusion.transpose(0, 1, 4, 2, 3, 5, 6), args.poolings, rates, combinations, files, source)
        text = write_grid(out, results, manifest["labels"], args.select, args.hidden,
                          sum(part[1] for rows in parts for row in rows for part in row), manifest.get("model"))
        finish_folder(out, "run.json")
    best = read_json(out / "best.json", "grid_search.py", {})
    print(text + f"\nchosen: {best['pooling']} pooling of layers {' '.join(map(str, best['layers']))}; "
          f"written to {out}/")
    return 0


if __name__ == "__main__":
    cli(main)
