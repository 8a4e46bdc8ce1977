"""F1, ranking, the protocols (which epoch, which combination), and the one rule for ties.

Letters as in model.py, and: F files (dev.de, test.zh, ...), G keys (pooling, layers, lr), which are
the models of a search but for their seed.
"""

import csv
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.folders import read_json
from lib.messages import UserError


def tied(value):
    """A score as it is compared: rounded, so that the last bits of a mean decide nothing."""
    return round(float(value), 9)


def spread(values, axis=-1):
    """Standard deviation over seeds (n - 1), 0 for a single one."""
    return np.std(values, axis, ddof=min(1, np.shape(values)[axis] - 1))


# --- which epoch ----------------------------------------------------------------------------------

PROTOCOLS = {  # {source} stands for the source language
    "last": "the last epoch",
    "mean": "the mean of the weights after each epoch",
    "en": "best on the source language's own dev set ({source}), true zero-shot",
    "joint": "best on the mean of the other languages' dev sets",
    "oracle": "each language at the best on its own dev set",
    "test": (
        "best on the mean of the other languages' test sets, as the paper did: "
        "too high by the choice"
    ),
}


def mean_accuracies(metrics, split, languages, by="epoch"):
    """Mean accuracy over these languages' sets, at each epoch (or "step"): {epoch: tied() mean}.

    metrics: rows of metrics.jsonl.
    """
    accuracies = {}
    for row in metrics:
        if row["split"] == split and row["language"] in languages:
            accuracies.setdefault(row[by], []).append(row["accuracy"])
    return {key: tied(np.mean(values)) for key, values in accuracies.items()}


def best_epochs(metrics, source):
    """The best epoch by each language's dev set, by `joint` and by `test`: {name: epoch}.

    `joint` and `test` are the means over the dev and test sets of the languages other than
    `source`. Ties go to the earlier epoch. A name whose sets were not evaluated after every epoch
    is left out; so are evaluations in the midst of one. metrics: rows of metrics.jsonl.
    """
    rows = [row for row in metrics if isinstance(row["epoch"], int) and row["split"] != "train"]
    epochs = {row["epoch"] for row in rows}
    languages = {row["language"] for row in rows}
    others = languages - {source}
    sets = {language: ("dev", {language}) for language in languages}
    sets |= {"joint": ("dev", others), "test": ("test", others)}
    best = {}
    for name, (split, members) in sets.items():
        means = mean_accuracies(rows, split, members)
        if means and means.keys() == epochs:
            best[name] = max(sorted(means), key=means.get)
    return best


def last_epoch(metrics):
    """The number of epochs that were evaluated. metrics: rows of metrics.jsonl."""
    return max(row["epoch"] for row in metrics if isinstance(row["epoch"], int))


def choose_epochs(metrics, protocol, languages, source, folder):
    """The epoch to report for each language under a protocol: {language: epoch}.

    protocol: one of PROTOCOLS, or a number. UserError where its dev (or test) sets are missing.
    """
    if protocol == "mean":
        return dict.fromkeys(languages, "mean")
    if protocol.isdecimal():
        return dict.fromkeys(languages, int(protocol))
    if protocol == "last":
        return dict.fromkeys(languages, last_epoch(metrics))
    best = best_epochs(metrics, source)
    chosen = {}
    for language in languages:
        name = protocol  # best_epochs() has joint, test, and each language by its own dev
        if protocol == "en":
            name = source
        elif protocol == "oracle":
            name = language
        if name not in best:
            raise UserError(
                f"--epoch {protocol}: {folder} was not evaluated after each epoch on the sets of "
                f"{name} (of dev; for test with train.py --track-test)"
            )
        chosen[language] = best[name]
    return chosen


def group_runs(folders, runs):
    """Runs that differ in nothing but the seed, together, in order: {name: [index, ...]}."""
    groups = {}
    for i, run in enumerate(runs):
        same = [{**run["arguments"], "seed": None}]
        same += [run.get(key) for key in ("revision", "tokenizer", "labels", "data")]
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(i)
    named = {}
    for members in groups.values():
        name = Path(folders[members[0]]).name
        if len(members) > 1:
            name = re.sub(r"[-_.]?(seed|s)?[-_.]?\d+$", "", name) or name
        while name in named:
            name += "'"
        named[name] = members
    return named


# --- which combination ----------------------------------------------------------------------------


class Results(NamedTuple):
    """The scores of all models on all files."""

    keys: list  # G of (pooling, layers, lr)
    columns: list  # F of dev_LANG and test_LANG, as in results.csv
    source: str  # the language trained on
    micro: np.ndarray  # (G, S, F), fractions
    macro: np.ndarray | None = None  # results.csv has none


def read_grid(folder):
    """The Results in a grid folder, and its best.json."""
    best = read_json(Path(folder) / "best.json", "grid_search.py", ("train_language", "select"))
    with open(Path(folder) / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if name.startswith(("dev_", "test_"))]
    scores = {}
    for row in rows:
        layers = tuple(int(layer) for layer in row["layers"].split("+"))
        key = row["pooling"], layers, float(row["lr"])
        scores.setdefault(key, []).append([float(row[column]) for column in columns])
    micro = np.array(list(scores.values()))
    return Results(list(scores), columns, best["train_language"], micro), best


def micro_f1(right, true):
    """Micro-F1 from counts by class (..., C): rows that are right, and rows; paper, section 1.5.

    Each row has one label, so there are as many false positives as false negatives: precision,
    recall, F1 and accuracy are one.
    """
    return right.sum(-1) / np.maximum(true.sum(-1), 1)


def macro_f1(right, true, predicted):
    """The mean F1 of the classes that have rows or predictions, from counts by class (..., C)."""
    both = true + predicted
    return (2 * right / np.maximum(both, 1)).sum(-1) / np.maximum((both > 0).sum(-1), 1)


def columns_of(columns, source):
    """The columns whose mean each protocol ranks by, where there are any: {protocol: [place, ...]}.

    "en": the source language's dev; "joint": the other languages' dev; "test": their test.
    """
    groups = {}
    for i, column in enumerate(columns):
        split, language = column.split("_", 1)
        if language != source:
            protocol = {"dev": "joint", "test": "test"}[split]
        elif split == "dev":
            protocol = "en"
        else:
            continue
        groups.setdefault(protocol, []).append(i)
    return groups


def rank(keys, scores):
    """The places of G keys by falling score (G,); each pooling and combination at its best rate.

    Ties go to fewer layers, to lower ones, to the first pooling; and to the smaller rate.
    """
    poolings = list(dict.fromkeys(pooling for pooling, _, _ in keys))

    def order(g):
        pooling, layers, lr = keys[g]
        return -tied(scores[g]), len(layers), layers, poolings.index(pooling), lr

    first = {}
    for g in sorted(range(len(keys)), key=order):
        first.setdefault(keys[g][:2], g)
    return list(first.values())


def ranked(results, protocol):
    """The places of rank() by a protocol's columns, its choice first."""
    group = columns_of(results.columns, results.source)[protocol]
    return rank(results.keys, results.micro.mean(1)[:, group].mean(1))


def choices(results):
    """What each protocol chooses, as places of keys.

    Returns {"en", "joint", "test": g}, and the oracle's {language: g}, by each language's own dev.
    """
    chosen, oracle = {}, {}
    for protocol in columns_of(results.columns, results.source):
        chosen[protocol] = ranked(results, protocol)[0]
    for i, column in enumerate(results.columns):
        if column.startswith("dev_"):
            by_language = results.micro[:, :, i].mean(1)  # (G,)
            oracle[column.removeprefix("dev_")] = rank(results.keys, by_language)[0]
    return chosen, oracle
