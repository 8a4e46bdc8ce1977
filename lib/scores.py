"""F1, ranking, the protocols (which epoch, which combination), and the one rule for ties."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.messages import UserError


def spread(values, axis=-1):
    """Standard deviation over seeds (n - 1), 0 for a single one."""
    return np.std(values, axis, ddof=min(1, np.shape(values)[axis] - 1))


def tied(value):
    """A score as it is compared: rounding must not look like a difference."""
    return round(float(value), 9)


def best_epochs(metrics, source):
    """The best epoch by each language's dev set, by `joint` and by `test`, the means over the dev and test sets of the
    languages other than `source`: {name: epoch}, from the rows of metrics.jsonl. Ties go to the earlier epoch.

    A name whose sets were not evaluated after every epoch is left out; so are evaluations in the midst of one.
    """
    scores, epochs = (
        {},
        {
            row["epoch"]
            for row in metrics
            if isinstance(row["epoch"], int) and row["split"] != "train"
        },
    )
    for row in metrics:
        if row["epoch"] in epochs and row["split"] != "train":
            names = [row["language"]] * (row["split"] == "dev")
            if row["language"] != source:
                names.append({"dev": "joint", "test": "test"}[row["split"]])
            for name in names:
                scores.setdefault(name, {}).setdefault(row["epoch"], []).append(row["accuracy"])
    return {
        name: max(sorted(found), key=lambda epoch: round(float(np.mean(found[epoch])), 9))
        for name, found in scores.items()
        if found.keys() == epochs
    }


PROTOCOLS = {  # {table} stands for the source language
    "last": "the last epoch",
    "mean": "the mean of the weights after each epoch",
    "en": "best on the source language's own dev set ({source}), true zero-shot",
    "joint": "best on the mean of the other languages' dev sets",
    "oracle": "each language at the best on its own dev set",
    "test": "best on the mean of the other languages' test sets, as the paper did: too high by the choice",
}


def choose_epochs(metrics, protocol, languages, source, folder):
    """The epoch to report for each language, {language: epoch}, under a protocol: one of PROTOCOLS, or a number.

    Ties go to the earlier epoch. UserError for a protocol whose dev (or test) sets are not there.
    """
    if protocol == "mean" or protocol.isdecimal():
        return dict.fromkeys(languages, protocol if protocol == "mean" else int(protocol))
    if protocol == "last":
        return dict.fromkeys(
            languages, max(row["epoch"] for row in metrics if type(row["epoch"]) is int)
        )
    best, split = best_epochs(metrics, source), "test" if protocol == "test" else "dev"
    needed = {
        language: language if protocol == "oracle" else source if protocol == "en" else protocol
        for language in languages
    }
    if missing := set(needed.values()) - set(best):
        there = dict.fromkeys(row["language"] for row in metrics if row["split"] == split)
        raise UserError(
            f"--epoch {protocol}: {folder} was evaluated on {split} in {' '.join(there) or 'no language'} "
            f"alone ({' '.join(sorted(missing))} is missing)"
            + " (train.py --track-test)"
            * (split == "test")
        )
    return {language: best[name] for language, name in needed.items()}


def group_runs(folders, runs):
    """Runs that differ in nothing but the seed, together: {name: [index, ...]}, in the order given."""
    groups = {}
    for i, run in enumerate(runs):
        settings = {key: value for key, value in run["arguments"].items() if key != "seed"}
        same = [settings, *(run.get(key) for key in ("revision", "tokenizer", "labels", "data"))]
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(i)
    named = {}
    for members in groups.values():
        name = Path(folders[members[0]]).name
        name = re.sub(r"[-_.]?(seed|s)?[-_.]?\d+$", "", name) or name if len(members) > 1 else name
        while name in named:
            name += "'"
        named[name] = members
    return named


class Results(NamedTuple):
    """The confusion matrices of all models on all files."""

    keys: list  # G of (pooling, layers, lr)
    columns: list  # F of dev_LANG and test_LANG, as in results.csv
    source: str  # the language trained on
    confusion: np.ndarray  # (G, S, F, true C, predicted C)


def micro_f1(confusion):
    """Micro-F1 from confusion matrices (..., C, C), as in the paper's section 1.5. Each row has one label, so there are
    as many false positives as false negatives: precision, recall, F1 and accuracy are one."""
    return np.trace(confusion, axis1=-2, axis2=-1) / np.maximum(confusion.sum((-2, -1)), 1)


def macro_f1(confusion):
    """The classes' mean F1 from confusion matrices (..., C, C); a class with neither rows nor predictions counts 0."""
    true = np.diagonal(confusion, axis1=-2, axis2=-1)
    return (2 * true / np.maximum(confusion.sum(-1) + confusion.sum(-2), 1)).mean(-1)


def columns_of(columns, source):
    """The columns whose mean each protocol ranks by, those there are: {"en": the source language's dev, "joint": the
    other languages' dev, "test": their test}, as places [i, ...]."""
    groups = {}
    for i, column in enumerate(columns):
        split, language = column.split("_", 1)
        if language != source or split == "dev":
            groups.setdefault(
                "en" if language == source else {"dev": "joint", "test": "test"}[split], []
            ).append(i)
    return groups


def rank(keys, scores):
    """The places of G keys by falling score (G,), each pooling and combination once, at its own best rate.

    Ties go to fewer layers, to lower ones, to the first pooling; and to the smaller rate.
    """
    poolings, found = list(dict.fromkeys(pooling for pooling, _, _ in keys)), {}

    def order(g):
        pooling, layers, lr = keys[g]
        return -round(float(scores[g]), 9), len(layers), layers, poolings.index(pooling), lr

    for g in sorted(range(len(keys)), key=order):
        found.setdefault(keys[g][:2], g)
    return list(found.values())


def choices(results):
    """What each protocol chooses, as places of keys: {"en", "joint", "test": g}, and the oracle's {language: g}."""
    mean = micro_f1(results.confusion).mean(1)  # (G, F)
    chosen = {
        name: rank(results.keys, mean[:, group].mean(1))[0]
        for name, group in columns_of(results.columns, results.source).items()
    }
    oracle = {
        column[4:]: rank(results.keys, mean[:, i])[0]
        for i, column in enumerate(results.columns)
        if column.startswith("dev_")
    }
    return chosen, oracle


def mean_of_others(entry, split, source):
    """Mean over the other languages' scores on a split, for each seed."""
    return np.mean(
        [
            scores
            for column, scores in entry.items()
            if column.startswith(f"{split}_") and column != f"{split}_{source}"
        ],
        0,
    )


def at_best_rate(grid, best):
    """Each pooling and combination of read_grid() at the rate that the selecting protocol prefers:
    {(pooling, layers): (lr, entry)}."""
    keys = list(grid)
    group = columns_of(grid[keys[0]], best["train_language"])[best["select"]]
    places = rank(
        keys, [np.mean([list(entry.values())[i] for i in group]) / 100 for entry in grid.values()]
    )
    return {keys[g][:2]: (keys[g][2], grid[keys[g]]) for g in sorted(places)}
