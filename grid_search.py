"""Phase 1b: train a small classifier on every combination of layers, pooling, learning rate and
seed, and rank them.

    python grid_search.py --features features/massive --out grid/massive --save-model

Reads   FEATURES/ as extract.py writes it. Trains on the source language, tests in every language
        there is. With --save-model also the encoder whose features they are.
Writes  OUT/results.csv (a row for each model), OUT/best.json (what train.py --layers-from takes),
        OUT/summary.md, OUT/confusion.LANG.csv of the chosen combination, OUT/run.json, and
        OUT/parts/ (the scores of all models: with them a stopped search goes on, and another call
        with another --select trains the chosen combination alone once more). With --save-model
        OUT/model/, the chosen combination as a model that labels text (evaluate.py --input).
Paper   sections 1.1 (phase one) and 1.5; conclusions 3, 4 and 5. 255 combinations of layers 5..12,
        3 poolings, 5 seeds.

All models of one pooling and rate train together. With L layers, the M = 2^L subsets are numbered
in binary: model m has layer l if bit l of m is set (model 0 has none and is not reported). Their
weights for layer l stand side by side in one matrix, so that a step is L matrix products, whatever
M is, and none is spent on a layer that a model does not use. users() says which models these are,
with_layer() is where their logits stand, and one_model() takes one of them out.

Letters as in model.py and lib/scores.py; also K, what a product puts out: H hidden units, or the C
classes where there is no hidden layer.
"""

import csv
import math
import shlex
import sys
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import load_tokenizer, tokenizer_identity
from lib.devices import (
    describe_device,
    pick_device,
    pick_precision,
    start_processes,
    wait_for_all,
)
from lib.encoders import cut_after, drop_pooler, load_encoder
from lib.folders import (
    finish_folder,
    lock,
    read_json,
    sha256,
    start_folder,
    versions,
    write_atomic,
    write_json,
    write_text,
)
from lib.hub import revision
from lib.messages import UserError, cli, in_range, make_parser, out_of_memory, progress_bar
from lib.scores import Results, choices, columns_of, macro_f1, micro_f1, tied
from lib.tables import joined, summary
from model import POOLINGS, Classifier, Settings, save_model

MASK_LENGTH = 1 << 23  # of the long mask that dropout's masks are cut from


class Recipe(NamedTuple):
    """How each small classifier is trained."""

    hidden: int = 0  # units of a hidden layer; 0: none
    epochs: int = 20
    batch_size: int = 128
    dropout: float = 0.1


# --- the models -----------------------------------------------------------------------------------


def users(layer, n_layers):
    """The numbers of the models that use a layer, those whose bit `layer` is 1: of 3 layers, layer
    1 is used by the models 2, 3, 6 and 7. (M/2,), the order of the columns of its weights."""
    return [m for m in range(2**n_layers) if m >> layer & 1]


def with_layer(full, layer):
    """The part of (S, B, K, M) that users(layer) have: (S, B, K, M / 2^(layer+1), 2^layer), a view.

    M is split into (higher bits, the bit of this layer, lower bits), and the bit is taken at 1.
    """
    return full.unflatten(3, (-1, 2, 2**layer)).select(4, 1)


def initial_weights(generators, n_layers, size, classes, hidden, dtype):
    """The first weights of all models, from each seed's generator; nn.Linear's distribution.

    All models of a seed begin from the same draw, scaled by their own number of inputs. Returns a
    list: for each layer (S, D, K * M/2), then the bias (S, K, M) and, with a hidden layer, the next
    weights (S, H, C, M) and bias (S, C, M).
    """
    device, models, units = generators[0].device, 2**n_layers, hidden or classes

    def uniform(*shape):
        draws = [torch.rand(*shape, generator=g, dtype=dtype, device=device) for g in generators]
        return 2 * torch.stack(draws) - 1

    used = [max(1, m.bit_count()) for m in range(models)]
    bound = 1 / (torch.tensor(used, dtype=dtype, device=device) * size).sqrt()  # (M,)
    weights = []
    for layer in range(n_layers):
        columns = uniform(size, units)[..., None] * bound[users(layer, n_layers)]  # (S, D, K, M/2)
        weights.append(columns.flatten(2))
    weights.append(uniform(units)[..., None] * bound)
    if hidden:
        for shape in ((hidden, classes), (classes,)):
            drawn = uniform(*shape) / hidden**0.5
            weights.append(drawn[..., None].repeat_interleave(models, -1))
    return weights


def forward(weights, x, rescale=1.0, hidden_mask=1.0):
    """The logits of all models: x (L, S, B, D) -> (S, B, C, M).

    rescale: dropout's 1 / (1 - p); x was masked by the caller, and hidden_mask (S, B, H, 1) is the
    hidden layer's mask.
    """
    of_layers, (bias, *head) = weights[: len(x)], weights[len(x) :]
    out = bias.new_zeros(x.shape[1], x.shape[2], *bias.shape[1:])  # (S, B, K, M)
    for layer, weight in enumerate(of_layers):
        part = with_layer(out, layer)  # a view: what is added to it is added to out
        part += torch.bmm(x[layer], weight.to(x.dtype)).view_as(part)
    out = out * rescale + bias[:, None]
    if head:
        out = out.relu() * hidden_mask * rescale
        out = torch.einsum("sbhm,shcm->sbcm", out, head[0]) + head[1][:, None]
    return out


def train_models(
    features, labels, classes, seeds, lr, recipe, dtype=torch.float32, progress=lambda: None
):
    """Train all subsets of the layers, for several seeds, together: Adam on the mean cross-entropy
    of each model.

    features (L, N, D) in the dtype of the products, labels (N,). Every model of a seed sees the
    same rows in the same order under the same dropout mask, so that any of them trained alone comes
    out the same. Returns the weights as initial_weights() does. UserError when one is not finite.
    """
    features = features.contiguous()  # or each step copies the whole to take a batch from it
    (n_layers, count, size), device = features.shape, features.device
    hidden, epochs, batch_size, dropout = recipe
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    weights = initial_weights(generators, n_layers, size, classes, hidden, dtype)
    optimizer = torch.optim.Adam([weight.requires_grad_() for weight in weights], lr=lr, fused=True)
    # dropout's masks are windows of a long one: to draw each anew costs a fifth of a step
    length = max(MASK_LENGTH, 2 * n_layers * batch_size * max(size, hidden))
    generator = torch.Generator(device).manual_seed(0)
    long_mask = torch.rand(length, device=device, generator=generator) >= dropout
    long_mask = long_mask.to(features.dtype)  # 1 where a value is kept

    def draw_mask(generator, *shape):
        count = math.prod(shape)
        last = len(long_mask) - count
        start = int(torch.randint(last, (), generator=generator, device=device))
        return long_mask[start : start + count].view(shape)

    for _ in range(epochs):
        orders = [torch.randperm(count, generator=g, device=device) for g in generators]
        for rows in torch.stack(orders).split(batch_size, dim=1):  # (S, B)
            x = features.index_select(1, rows.flatten()).unflatten(1, rows.shape)  # (L, S, B, D)
            hidden_mask = 1.0
            if dropout:
                for part, generator in zip(x.unbind(1), generators):
                    part *= draw_mask(generator, *part.shape)
                if hidden:
                    masks = [draw_mask(g, rows.shape[1], hidden, 1) for g in generators]
                    hidden_mask = torch.stack(masks)
            logits = forward(weights, x, 1 / (1 - dropout), hidden_mask)
            logits = logits.flatten(0, 1)  # (S * B, C, M)
            targets = labels[rows].flatten()[:, None].expand(-1, logits.shape[2])  # (S * B, M)
            loss = F.cross_entropy(logits, targets, reduction="sum") / rows.shape[1]
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


def model_number(layers, combination):
    """The number m of the model that has these of the layers."""
    return sum(2 ** layers.index(layer) for layer in combination)


def one_model(weights, layers, combination, seed):
    """One of the models of train_models() as a module: the scaled features of its layers, side by
    side (B, layers * D) -> (B, C).

    layers: those of the features, in order (bit l is the l-th); combination: some of them, in
    order; seed: its place among the seeds.
    """
    number = model_number(layers, combination)
    parts = []
    for layer in combination:
        l = layers.index(layer)
        models = users(l, len(layers))
        columns = weights[l][seed].unflatten(1, (-1, len(models)))  # (D, K, M/2)
        parts.append(columns[:, :, models.index(number)])
    bias, *head = [weight[seed, ..., number] for weight in weights[len(layers) :]]
    model = nn.Sequential(linear(torch.cat(parts), bias))
    if head:
        model.extend([nn.ReLU(), linear(*head)])
    return model


def linear(weight, bias):
    """nn.Linear with these weights (inputs, outputs) and bias (outputs,)."""
    module = nn.Linear(*weight.shape, dtype=weight.dtype, device=weight.device)
    module.weight.data, module.bias.data = weight.T.contiguous(), bias.clone()
    return module


def all_logits(weights, features, chunk=512):
    """Yield the logits of all models, chunk after chunk: features (L, N, D) -> (S, B, C, M)."""
    n_layers, seeds = len(features), len(weights[-1])
    weights = [weight.to(features.dtype) for weight in weights[:n_layers]] + weights[n_layers:]
    for rows in features.split(chunk, dim=1):
        yield forward(weights, rows[:, None].expand(-1, seeds, -1, -1))


def f1_scores(weights, features, labels, classes, chunk=512):
    """Micro-F1 and macro-F1 of all models on one file: two of (S, M), NumPy."""
    shape = 2, len(weights[-1]), weights[-1].shape[-1], classes
    right, predicted = torch.zeros(shape, dtype=torch.int64, device=features.device)  # (S, M, C)
    for logits, true in zip(all_logits(weights, features, chunk), labels.split(chunk)):
        guess = logits.argmax(2).mT  # (S, M, B)
        predicted.scatter_add_(2, guess, torch.ones_like(guess))
        right.scatter_add_(2, guess, (guess == true).long())
    counts = right, labels.bincount(minlength=classes), predicted
    right, true, predicted = [count.cpu().numpy() for count in counts]
    return micro_f1(right, true), macro_f1(right, true, predicted)


# --- features -------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is searched."""

    folder: str  # of the features
    manifest: dict
    source: str  # the language trained on
    files: list  # tested on, as dev.de, in the order of results.csv
    layers: list  # to combine, in order
    poolings: list
    rates: list  # in order
    seeds: int
    recipe: Recipe
    scale: str  # "layer" or "none"
    precision: torch.dtype  # of the products
    device: torch.device

    @property
    def keys(self):
        """All models but for their seed, (pooling, layers, lr), by pooling, rate and number: the
        order of results.csv, in which join_parts() lays their scores out."""
        combinations = []
        for m in range(1, 2 ** len(self.layers)):  # model 0 has no layer
            combinations.append(tuple(layer for l, layer in enumerate(self.layers) if m >> l & 1))
        keys = product(self.poolings, self.rates, combinations)
        return [(pooling, combination, lr) for pooling, lr, combination in keys]

    @property
    def steps(self):
        """Optimizer steps of one pooling and rate."""
        rows = self.manifest["inputs"][f"train.{self.source}.tsv"]["rows"]
        return math.ceil(rows / self.recipe.batch_size) * self.recipe.epochs

    def description(self):
        """What defines the search's scores, for run.json."""
        return {
            **self.recipe._asdict(),
            "seeds": self.seeds,
            "layers": self.layers,
            "poolings": self.poolings,
            "lr": self.rates,
            "scale": self.scale,
            "train_language": self.source,
            "precision": str(self.precision).removeprefix("torch."),
            "manifest": sha256(Path(self.folder) / "manifest.json"),
        }


def load_features(plan, pooling, stem):
    """The layers of one file of features, (L, N, D) float32."""
    array = np.load(Path(plan.folder) / f"{stem}.{pooling}.npy", mmap_mode="r")
    places = [plan.manifest["layers"].index(layer) for layer in plan.layers]
    features = torch.from_numpy(array[places].astype(np.float32))
    return features.to(plan.device)


def load_labels(plan, stem):
    """The classes of one file's rows, (N,)."""
    labels = np.load(Path(plan.folder) / f"{stem}.labels.npy")
    return torch.from_numpy(labels).to(plan.device)


def scaling(features):
    """What --scale layer does to features (L, N, D) of train rows: the mean (L, 1, D) to take off,
    and one number a layer (L, 1, 1), the root mean square of what is left, to divide by; infinite,
    which leaves zeros, for a layer that is the same in every row, as [CLS] of the embeddings is."""
    mean = features.mean(1, keepdim=True)
    rms = (features - mean).square().mean((1, 2), keepdim=True).sqrt()
    constant = rms <= 1e-5 * mean.square().mean(2, keepdim=True).sqrt()
    return mean, torch.where(constant, torch.inf, rms)  # x / inf is 0


def scaled(features, statistics, precision):
    """Features by what scaling() gave of the train rows, in the dtype of the products."""
    mean, divisor = statistics
    return ((features - mean) / divisor).to(precision)


# --- the search -----------------------------------------------------------------------------------


def list_parts(plan, out):
    """The file of the scores of each pooling, rate and seed: {(pooling, lr, seed): path}."""
    jobs = product(plan.poolings, plan.rates, range(plan.seeds))
    return {job: out / "parts" / "{}.{}.{}.npz".format(*job) for job in jobs}


def train_group(plan, pooling, lr, seeds, progress):
    """Train all combinations under one pooling and rate: their weights, and their scaling()."""
    stem = f"train.{plan.source}"
    features, labels = load_features(plan, pooling, stem), load_labels(plan, stem)
    mean, divisor = scaling(features)
    if plan.scale == "none":
        mean, divisor = torch.zeros_like(mean), torch.ones_like(divisor)
    features = scaled(features, (mean, divisor), plan.precision)
    classes = len(plan.manifest["labels"])
    weights = train_models(features, labels, classes, seeds, lr, plan.recipe, progress=progress)
    return weights, (mean, divisor)


def search(plan, parts):
    """Train what is not there yet of `parts`, as list_parts() gives, and write it."""
    rank, world = start_processes()
    todo = [job for job, path in parts.items() if not path.exists()]
    wait_for_all()  # all have looked before one writes
    groups = {}  # this process's share
    for pooling, lr, seed in todo[rank::world]:
        groups.setdefault((pooling, lr), []).append(seed)
    classes = len(plan.manifest["labels"])
    with progress_bar(total=plan.steps * len(groups), unit="step", disable=rank > 0) as bar:
        for (pooling, lr), seeds in groups.items():
            bar.set_description(f"{pooling}, lr {lr:g}")
            start = time.perf_counter()
            weights, statistics = train_group(plan, pooling, lr, seeds, bar.update)
            scores = []
            for stem in plan.files:
                features = scaled(load_features(plan, pooling, stem), statistics, plan.precision)
                scores.append(f1_scores(weights, features, load_labels(plan, stem), classes))
            seconds = (time.perf_counter() - start) / len(seeds)
            scores = np.array(scores)[..., 1:]  # (F, 2, S, M): model 0 has no layer
            for s, seed in enumerate(seeds):
                with write_atomic(parts[pooling, lr, seed], "wb") as file:
                    np.savez(file, scores=scores[:, :, s], seconds=seconds)
    wait_for_all()  # all parts are there


def join_parts(plan, parts):
    """Micro-F1 and macro-F1 of all parts, (2, G, S, F), and the seconds they took.

    Of P poolings, R rates and M = 2^L - 1 models, as model 0 has no layer: G = P * R * M.
    """
    scores, seconds = [], 0.0
    for path in parts.values():
        with np.load(path) as part:
            scores.append(part["scores"])
            seconds += float(part["seconds"])
    scores = np.array(scores)  # (P * R * S, F, 2, M)
    scores = scores.reshape(-1, plan.seeds, *scores.shape[1:])  # (P * R, S, F, 2, M)
    scores = scores.transpose(3, 0, 4, 1, 2)  # (2, P * R, M, S, F)
    return scores.reshape(2, -1, plan.seeds, len(plan.files)), seconds


# --- the chosen combination -----------------------------------------------------------------------


@torch.no_grad()
def mean_classifier(plan, combination, weights, statistics, seeds):
    """The mean of these seeds' classifiers, for features as they were extracted.

    A mean of linear classifiers is one linear classifier, which scales its features, too; with a
    hidden layer there is one seed.
    """
    assert len(seeds) == 1 or not plan.recipe.hidden
    models = [one_model(weights, plan.layers, combination, seed).double() for seed in seeds]
    classifier = models[0]
    for name, parameter in classifier.named_parameters():
        parameter.data = torch.stack([model.get_parameter(name) for model in models]).mean(0)
    places = [plan.layers.index(layer) for layer in combination]
    mean, divisor = statistics[0][places].double(), statistics[1][places]  # (L, 1, D), (L, 1, 1)
    first = classifier[0]  # W (x - mean) / divisor + b = (W / divisor) x + b - (W / divisor) mean
    first.weight /= divisor.expand_as(mean).flatten()
    first.bias -= first.weight @ mean.flatten()
    return classifier.float().requires_grad_(False)


def choose_seeds(results, chosen, select, hidden):
    """The seeds whose classifiers make the model, and what that is in words.

    A hidden layer's weights have no mean: there it is the seed best by the protocol `select`.
    """
    group = columns_of(results.columns, results.source)[select]
    scores = results.micro[chosen][:, group].mean(1)  # (S,)
    seeds = list(range(len(scores)))
    if not hidden:
        return seeds, f"the mean of {len(seeds)} seeds' classifiers"
    best = max(seeds, key=lambda seed: tied(scores[seed]))
    return [best], f"the classifier of seed {best}, the best by {select}"


def train_again(plan, key):
    """Train the models of a key's pooling and rate once more, which gives the same ones: what
    train_group() does."""
    pooling, _, lr = key
    with progress_bar(total=plan.steps, unit="step", desc="the chosen one again") as bar:
        return train_group(plan, pooling, lr, range(plan.seeds), bar.update)


def logits_of(plan, key, weights, statistics):
    """The logits of a key's models on all files, {stem: (S, N, C)}."""
    pooling, combination, _ = key
    number, logits = model_number(plan.layers, combination), {}
    for stem in plan.files:
        features = scaled(load_features(plan, pooling, stem), statistics, plan.precision)
        chunks = all_logits(weights, features)
        logits[stem] = torch.cat([chunk[..., number].clone() for chunk in chunks], dim=1)
    return logits


def compare_labels(plan, key, classifier, logits):
    """How often mean_classifier() labels otherwise than the mean of its seeds' logits, in words.

    Both are the same function but for rounding. logits: {stem: (S, N, C)} of these seeds.
    """
    pooling, combination, _ = key
    places = [plan.layers.index(layer) for layer in combination]
    rows, gaps = 0, []
    for stem, of_seeds in logits.items():
        features = load_features(plan, pooling, stem)
        side_by_side = features[places].transpose(0, 1).flatten(1)  # (N, layers * D)
        mean = of_seeds.mean(0)  # (N, C)
        best, second = mean.topk(2).values.unbind(1)
        otherwise = classifier(side_by_side).argmax(1) != mean.argmax(1)
        gaps += (best - second)[otherwise].tolist()
        rows += len(mean)
    note = f"{len(gaps)} of {rows:,} rows are labelled otherwise than by the search's own logits"
    if gaps:
        note += f", the two best of which are within {max(gaps):.1g} there"
    return note


def check_encoder(features):
    """UserError unless the encoder whose features these are is what it was."""
    keys = ("model", "revision", "tokenizer", "pairs", "max_length")
    manifest = read_json(Path(features) / "manifest.json", "extract.py", keys)
    model = manifest["model"]
    identity = revision(model), tokenizer_identity(load_tokenizer(model))
    if identity != (manifest["revision"], manifest["tokenizer"]):
        raise UserError(
            f"--save-model: {model} has changed since {features} was made: run extract.py again"
        )


def save_chosen(plan, key, classifier, folder):
    """Write the encoder, cut at its highest layer, with the classifier, as train.py does."""
    manifest, (pooling, combination, _) = plan.manifest, key
    encoder, _ = load_encoder(manifest["model"])
    drop_pooler(encoder)
    cut_after(encoder, max(combination))
    settings = Settings(
        labels=manifest["labels"],
        layers=list(combination),
        pooling=pooling,
        dropout=plan.recipe.dropout,
        hidden=plan.recipe.hidden,
        pairs=manifest["pairs"],
        max_length=manifest["max_length"],
    )
    model = Classifier(encoder, settings)
    for parameter, trained in zip(model.classifier.parameters(), classifier.parameters()):
        parameter.data = trained.data.cpu()
    save_model(model, load_tokenizer(manifest["model"]), folder)


# --- the grid folder ------------------------------------------------------------------------------


def write_csv(path, rows):
    with write_atomic(path) as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_results(out, results, hidden):
    rows = [["pooling", "layers", "hidden", "lr", "seed", *results.columns]]
    for (pooling, layers, lr), seeds in zip(results.keys, results.micro):
        for seed, scores in enumerate(seeds):
            cells = [f"{value:.12g}" for value in scores]
            rows.append([pooling, joined(layers), hidden, lr, seed, *cells])
    write_csv(out / "results.csv", rows)


def write_confusions(plan, logits, out):
    """Write confusion.LANG.csv of the test files: {stem: (S, N, C)}, added up over the seeds."""
    names = plan.manifest["labels"]
    for stem, of_seeds in logits.items():
        split, language = stem.split(".")
        if split != "test":
            continue
        cells = load_labels(plan, stem) * len(names) + of_seeds.argmax(2)  # (S, N)
        counts = cells.flatten().bincount(minlength=len(names) ** 2).view(len(names), -1)
        rows = [["true \\ predicted", *names]]
        for name, row in zip(names, counts.tolist()):
            rows.append([name, *row])
        write_csv(out / f"confusion.{language}.csv", rows)


def write_best(out, results, chosen, oracle, select, hidden, model):
    """Write best.json, what train.py --layers-from takes; chosen, oracle: of choices()."""

    def entry(g):
        pooling, layers, lr = results.keys[g]
        return {"layers": list(layers), "pooling": pooling, "lr": lr}

    best = {
        **entry(chosen[select]),
        "select": select,
        "hidden": hidden,
        "model": model,
        "train_language": results.source,
        "per_language": {language: entry(g) for language, g in oracle.items()},
        "protocols": {protocol: entry(g) for protocol, g in chosen.items()},
    }
    write_json(out / "best.json", best)


# --- what there is to search ----------------------------------------------------------------------


def read_manifest(folder, layers, poolings):
    """The manifest.json of a feature folder, which must hold these layers and poolings."""
    keys = ("complete", "layers", "poolings", "labels", "inputs")
    manifest = read_json(Path(folder) / "manifest.json", "extract.py", keys)
    if not manifest["complete"]:
        raise UserError(f"{folder} is not complete: run extract.py again with the same command")
    for flag, wanted in (("layers", layers), ("poolings", poolings)):
        for value in wanted:
            if value not in manifest[flag]:
                raise UserError(
                    f"--{flag} {value}: {folder} holds {' '.join(map(str, manifest[flag]))} alone: "
                    f"name those with --{flag}, or extract anew"
                )
    return manifest


def choose_files(folder, manifest, language):
    """The source language, and the files to test on, as dev.de, the source's own first."""
    stems = sorted(name.removesuffix(".tsv") for name in manifest["inputs"])
    trained = [stem.removeprefix("train.") for stem in stems if stem.startswith("train.")]
    files = [stem for stem in stems if not stem.startswith("train.")]
    source = language or (trained[0] if len(trained) == 1 else "en")
    files.sort(key=lambda stem: (stem.split(".")[0], not stem.endswith(f".{source}")))
    if source not in trained or not files:
        raise UserError(
            f"{folder}: the search needs train.{source} and a dev or test file, it holds "
            f"{' '.join(stems)} (--train-language)"
        )
    return source, files


def choose_protocol(select, columns, source):
    """The protocol to select by: `en` for `joint` where no other language has a dev file."""
    possible = columns_of(columns, source)
    if select == "joint" and select not in possible and "en" in possible:
        return "en"
    if select not in possible:
        raise UserError(
            f"--select {select}: the features hold no file to choose by, only {' '.join(columns)} "
            f"(possible: {' '.join(possible)})"
        )
    return select


def parse_args(argv):
    parser = make_parser(__doc__)
    some, any_number = in_range(int, 1), in_range(int, 0)
    add = parser.add_argument_group("files").add_argument
    add("--features", required=True, help="feature folder (extract.py)")
    add("--out", required=True, help="grid folder to write")
    add("--overwrite", action="store_true", help="delete the search that is in OUT and start anew")
    add(
        "--train-language",
        metavar="LANG",
        help="source language (default: en, or the only one whose train file was extracted)",
    )
    add(
        "--save-model",
        action="store_true",
        help="write OUT/model/ too, which labels text: the encoder with the mean of the chosen "
        "combination's classifiers (with --hidden: with that of the best seed)",
    )
    add = parser.add_argument_group("the search").add_argument
    add(
        "--layers",
        type=int,
        nargs="+",
        default=list(range(5, 13)),
        metavar="K",
        help="layers to combine, 0 is the embeddings (default: 5 6 ... 12)",
    )
    add(
        "--poolings",
        nargs="+",
        choices=list(POOLINGS),
        default=list(POOLINGS),
        help=f"(default: {' '.join(POOLINGS)})",
    )
    add("--seeds", type=some, default=5, help="models of each combination (default: 5)")
    add(
        "--select",
        choices=["joint", "en", "test"],
        default="joint",
        help="rank by the mean of the other languages' dev sets (joint, the default; where there "
        "are none it is en), by the source language's dev (en: true zero-shot), or by the mean of "
        "the other languages' test sets, as the paper did (test: too high by the choice)",
    )
    add = parser.add_argument_group("each classifier").add_argument
    add("--hidden", type=any_number, default=0, help="units of a hidden layer (default: 0: none)")
    add("--epochs", type=some, default=20, help="passes over the train rows (default: 20)")
    add("--batch-size", type=some, default=128, help="rows a step (default: 128)")
    add(
        "--lr",
        type=in_range(float, above=0),
        nargs="+",
        default=[1e-4, 3e-4, 1e-3],
        metavar="LR",
        help="Adam's learning rates: each combination stands at its best one by --select "
        "(default: 1e-4 3e-4 1e-3)",
    )
    add(
        "--scale",
        choices=["layer", "none"],
        default="layer",
        help="take each layer's mean off its features and divide them by one number, their spread "
        "over the train rows (layer, the default), or take them as they are (none; with --lr 1e-3 "
        "the paper's plain way, 3,825 models)",
    )
    add(
        "--dropout",
        type=in_range(float, 0, below=1),
        default=0.1,
        help="on the classifier's input (default: 0.1)",
    )
    add(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="of matrix products (default: auto: bf16 where the hardware has it)",
    )
    args = parser.parse_args(argv)
    for flag in ("layers", "poolings", "lr"):
        values = getattr(args, flag)
        if len(set(values)) < len(values):
            parser.error(f"--{flag} {' '.join(map(str, values))}: one is named twice")
    if len(args.layers) > 14:
        parser.error(
            f"--layers: {len(args.layers)} layers have {2 ** len(args.layers) - 1:,} combinations; "
            "name 14 at most"
        )
    return args


def make_plan(args):
    """What the flags ask for. UserError where the features do not hold it."""
    manifest = read_manifest(args.features, args.layers, args.poolings)
    source, files = choose_files(args.features, manifest, args.train_language)
    device = pick_device()
    precision = pick_precision(args.precision, device)
    if precision == torch.float16:  # what "auto" is on older GPUs: its range is too small here
        precision = torch.float32
    return Plan(
        folder=args.features,
        manifest=manifest,
        source=source,
        files=files,
        layers=sorted(args.layers),
        poolings=args.poolings,
        rates=sorted(args.lr),
        seeds=args.seeds,
        recipe=Recipe(args.hidden, args.epochs, args.batch_size, args.dropout),
        scale=args.scale,
        precision=precision,
        device=device,
    )


def read_plan(out):
    """The Plan of the search in a grid folder."""
    keys = ("command", "precision")
    run = read_json(Path(out) / "run.json", "grid_search.py", keys)
    _, *flags = shlex.split(run["command"])
    plan = make_plan(parse_args(flags))
    return plan._replace(precision=getattr(torch, run["precision"]))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    args = parse_args(argv)
    out, (rank, _) = Path(args.out), start_processes()
    # 1. what there is to train on, to test on and to choose by
    plan = make_plan(args)
    columns = [stem.replace(".", "_", 1) for stem in plan.files]
    select = choose_protocol(args.select, columns, plan.source)
    # a model that was saved before must not outlive another --select
    save = args.save_model or (out / "model").exists()
    if save:
        check_encoder(args.features)
    keys, parts = plan.keys, list_parts(plan, out)
    command = shlex.join(["grid_search.py", *argv])
    not_compared = {"features": args.features, "command": command, "versions": versions()}
    with lock(out, rank), out_of_memory("name fewer --layers, or --seeds at a time"):
        # 2. train what is not kept yet
        if rank == 0:
            described, ignored = plan.description() | not_compared, tuple(not_compared)
            start_folder(out, "run.json", "grid_search.py", described, ignored, args.overwrite)
            print(f"{len(keys) * plan.seeds:,} models on {describe_device()}")
            print(f"trained on {plan.source}, chosen by {select}")
            if select != args.select:
                print(f"no other language has a dev file: the choice is by that of {plan.source}")
        wait_for_all()
        search(plan, parts)
        if rank > 0:
            return 0
        # 3. rank all
        scores, seconds = join_parts(plan, parts)
        results = Results(keys, columns, plan.source, *scores)
        write_results(out, results, args.hidden)
        chosen, oracle = choices(results)
        model = plan.manifest.get("model")
        write_best(out, results, chosen, oracle, select, args.hidden, model)
        text = summary(results, select, args.hidden, seconds)
        write_text(out / "summary.md", text)
        # 4. train the chosen combination once more
        best = chosen[select]
        weights, statistics = train_again(plan, keys[best])
        logits = logits_of(plan, keys[best], weights, statistics)
        write_confusions(plan, logits, out)
        if save:
            seeds, made = choose_seeds(results, best, select, args.hidden)
            classifier = mean_classifier(plan, keys[best][1], weights, statistics, seeds)
            of_seeds = {stem: values[seeds] for stem, values in logits.items()}
            note = compare_labels(plan, keys[best], classifier, of_seeds)
            save_chosen(plan, keys[best], classifier, out / "model")
            print(f"{out}/model: {made}; {note}")
        finish_folder(out, "run.json")
    print(text, f"written to {out}/", sep="\n")
    return 0


if __name__ == "__main__":
    cli(main)
