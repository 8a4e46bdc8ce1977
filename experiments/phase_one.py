"""The paper's conclusions 3 to 5 on the search itself: chosen on dev, compared on test.

    python -m experiments.phase_one grid/massive

Trains the search of a grid folder once more (the same random numbers give the same models) and
keeps whether each model is right on each test row of the other languages:

(3) the mean over all combinations under max pooling, less that under mean and under [CLS] (4) the
middle layer (8 of 12), less the last one, both alone under max (5) the chosen combination, less the
best single layer, both chosen by the search's own protocol

Every combination stands at the rate that its dev sets prefer. Reads the grid and its features; the
intervals are over rows and seeds (lib/significance.py). Prints a Markdown table.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from grid_search import (
    Plan,
    Recipe,
    all_logits,
    load_features,
    model_number,
    read_manifest,
    scaled,
    train_group,
)
from lib.devices import pick_device
from lib.folders import read_grid, read_json
from lib.messages import cli, progress_bar
from lib.scores import at_best_rate, protocol_scores, rank
from lib.significance import holm, intervals, verdict
from lib.tables import joined, markdown_table


def read_plan(folder):
    """The Plan of a grid folder, tested on the other languages' test files."""
    run = read_json(folder / "run.json", "grid_search.py", ("features", "seeds", "precision"))
    manifest = read_manifest(run["features"], run["layers"], run["poolings"])
    source = run["train_language"]
    files = []
    for name in sorted(manifest["inputs"]):
        split, language, _ = name.split(".")
        if split == "test" and language != source:
            files.append(f"test.{language}")
    return Plan(
        folder=run["features"],
        manifest=manifest,
        source=source,
        files=files,
        layers=run["layers"],
        poolings=run["poolings"],
        rates=run["lr"],
        seeds=run["seeds"],
        recipe=Recipe(*(run[field] for field in Recipe._fields)),
        scale=run["scale"],
        precision=getattr(torch, run["precision"]),
        device=pick_device(),
    )


def correctness(plan, weights, scale, pooling):
    """Whether each model is right, mean over the files: (S, N, M)."""
    total = 0
    for stem in plan.files:
        features, labels = load_features(plan, pooling, stem)
        chunks = all_logits(weights, scaled(features, scale, plan.precision))
        guesses = torch.cat([chunk.argmax(2) for chunk in chunks], dim=1)  # (S, N, M)
        total = total + (guesses == labels[None, :, None]).float()
    return total / len(plan.files)


def main():
    folder = Path(sys.argv[1])
    plan = read_plan(folder)
    grid, _, best = read_grid(folder)
    at_best = at_best_rate(grid, best)

    # the choices, on the sets that the search chose by
    keys, scores = [], []
    for (pooling, layers), (lr, entry) in at_best.items():
        keys.append((pooling, layers, lr))
        seed_scores = protocol_scores(entry, best["select"], best["train_language"])
        scores.append(np.mean(seed_scores) / 100)
    ranked = [keys[g] for g in rank(keys, scores)]
    singles = [key for key in ranked if len(key[1]) == 1]
    last = max(plan.layers)
    middle = min(plan.layers, key=lambda layer: abs(layer - 2 * last / 3))
    kept = {"chosen": ranked[0], "best single": singles[0]}
    for key in singles:
        if key[0] == "max" and key[1][0] in (middle, last):
            kept["middle" if key[1][0] == middle else "last"] = key

    # train once more, and look at the test rows
    right, by_pooling = {}, {}
    groups = sorted({(pooling, lr) for pooling, _, lr in keys})
    for pooling, lr in progress_bar(iterable=groups):
        weights, scale = train_group(plan, pooling, lr, range(plan.seeds), lambda: None)
        answers = correctness(plan, weights, scale, pooling)
        numbers = [model_number(plan.layers, key[1]) for key in keys if key[::2] == (pooling, lr)]
        sums = by_pooling.setdefault(pooling, [0, 0])
        sums[0] = sums[0] + answers[:, :, numbers].sum(2)
        sums[1] += len(numbers)
        for name, key in kept.items():
            if key[::2] == (pooling, lr):
                right[name] = answers[:, :, model_number(plan.layers, key[1])]
    for pooling, (answers, count) in by_pooling.items():
        right[f"all under {pooling}"] = answers / count  # (S, N)

    # compare
    pairs = [("3", "all under max", "all under mean"), ("3", "all under max", "all under cls")]
    pairs += [("4", "middle", "last"), ("5", "chosen", "best single")]
    rows = len(next(iter(right.values()))[0])
    compared = []
    for _, a, b in pairs:
        difference = (right[a] - right[b]).cpu().numpy()[:, :, None]  # (S, N, 1)
        compared.append(intervals(difference, np.arange(rows))[0])
    lines = []
    for (number, a, b), interval, p in zip(pairs, compared, holm([i.p for i in compared])):
        points = [100 * value for value in interval[:3]]
        cell = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points)
        by_seed = " ".join(f"{100 * value:+.1f}" for value in interval.by_seed)
        lines.append([number, f"{a} - {b}", cell, by_seed, verdict(interval, p, "better")])
    for name, (pooling, layers, lr) in kept.items():
        accuracy = 100 * right[name].mean()
        print(f"{name}: {pooling} of {joined(layers)}, lr {lr:g}: {accuracy:.1f} on test")
    print()
    print(markdown_table(["", "A - B", "other languages' test", "each seed", "verdict"], lines))
    return 0


if __name__ == "__main__":
    cli(main)
