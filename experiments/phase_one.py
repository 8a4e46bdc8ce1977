"""The paper's conclusions 3 to 5 on the search itself: chosen on dev, compared on test.

    python -m experiments.phase_one grid/massive --data data/massive

Trains the search of a grid folder once more (the same random numbers give the same models) and
keeps whether each model is right on each test row of the other languages:

(3) the mean over all combinations under max pooling, less that under mean and under [CLS]
(4) the middle layer (8 of 12), less the last one, both alone under max
(5) the chosen combination, less the best single layer, both chosen by the search's own protocol

Every combination stands at the rate that its dev sets prefer. Reads the grid, its features, and the
data set folder for the rows that belong together. Prints a Markdown table; the intervals are over
rows and seeds (lib/significance.py).
"""

import torch

from data import group_numbers, read_labels, read_sets
from grid_search import (
    all_logits,
    load_features,
    load_labels,
    model_number,
    read_plan,
    scaled,
    train_group,
)
from lib.messages import UserError, cli, make_parser, progress_bar
from lib.scores import ranked, read_grid
from lib.significance import holm, intervals, parallel, verdict
from lib.tables import joined, markdown_table

COMPARED = [  # number of the conclusion, A, B
    ("3", "all under max", "all under mean"),
    ("3", "all under max", "all under cls"),
    ("4", "middle", "last"),
    ("5", "chosen", "best single"),
]


def correctness(plan, weights, scale, pooling):
    """Whether each model is right, mean over the files: (S, N, M)."""
    total = 0
    for stem in plan.files:
        features = scaled(load_features(plan, pooling, stem), scale, plan.precision)
        labels, chunks = load_labels(plan, stem), all_logits(weights, features)
        guesses = torch.cat([chunk.argmax(2) for chunk in chunks], dim=1)  # (S, N, M)
        total = total + (guesses == labels[None, :, None]).float()
    return total / len(plan.files)


def choose(results, select, layers):
    """The models to compare, {name: (pooling, layers, lr)}, by the dev sets that chose; and all
    models at their best rates."""
    places = ranked(results, select)
    keys = [results.keys[g] for g in places]
    singles = [key for key in keys if len(key[1]) == 1]
    last = max(layers)
    middle = min(layers, key=lambda layer: abs(layer - 2 * last / 3))
    kept = {"chosen": keys[0], "best single": singles[0]}
    for pooling, combination, lr in singles:
        if pooling == "max" and combination == (middle,):
            kept["middle"] = pooling, combination, lr
        if pooling == "max" and combination == (last,):
            kept["last"] = pooling, combination, lr
    return kept, [results.keys[g] for g in sorted(places)]


def answers(plan, kept, keys):
    """Train once more, and look at the test rows: {name: whether it is right, (S, N)}.

    Of "all under POOLING" it is the share of its models that are.
    """
    right, by_pooling = {}, {}
    for pooling, lr in progress_bar(iterable=sorted({(key[0], key[2]) for key in keys})):
        weights, scale = train_group(plan, pooling, lr, range(plan.seeds), lambda: None)
        of_group = correctness(plan, weights, scale, pooling)  # (S, N, M)
        numbers = [model_number(plan.layers, key[1]) for key in keys if key[::2] == (pooling, lr)]
        by_pooling.setdefault(pooling, []).append(of_group[:, :, numbers])
        for name, key in kept.items():
            if key[::2] == (pooling, lr):
                right[name] = of_group[:, :, model_number(plan.layers, key[1])]
    for pooling, groups in by_pooling.items():
        right[f"all under {pooling}"] = torch.cat(groups, dim=2).mean(2)
    return {name: values.cpu().numpy() for name, values in right.items()}


def compared_table(right, groups):
    """The conclusions as Markdown; groups (N,): rows that are resampled together."""
    pairs = [pair for pair in COMPARED if pair[1] in right and pair[2] in right]
    found = []
    for _, a, b in pairs:
        found.append(intervals((right[a] - right[b])[:, :, None], groups)[0])
    lines = []
    for (number, a, b), interval, p in zip(pairs, found, holm([i.p for i in found])):
        points = [100 * value for value in interval[:3]]
        cell = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points)
        by_seed = " ".join(f"{100 * value:+.1f}" for value in interval.by_seed)
        lines.append([number, f"{a} - {b}", cell, by_seed, verdict(interval, p, "better")])
    return markdown_table(["", "A - B", "other languages' test", "each seed", "verdict"], lines)


def read_groups(folder, plan):
    """Groups of the test rows, (N,). UserError unless the languages' rows are translations."""
    keys = [tuple(stem.split(".")) for stem in plan.files]
    sets = read_sets(folder, keys, read_labels(folder))
    if not parallel(sets):
        raise UserError(f"{folder}: the test rows are no translations: there is no mean over them")
    return group_numbers(sets[keys[0]])


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("grid", help="grid folder of grid_search.py")
    parser.add_argument("--data", required=True, help="data set folder that the features are of")
    args = parser.parse_args(argv)
    plan = read_plan(args.grid)
    of_test = [stem for stem in plan.files if stem.startswith("test.")]
    plan = plan._replace(files=[stem for stem in of_test if stem != f"test.{plan.source}"])
    groups = read_groups(args.data, plan)
    results, best = read_grid(args.grid)
    kept, keys = choose(results, best["select"], plan.layers)
    right = answers(plan, kept, keys)
    for name, (pooling, layers, lr) in kept.items():
        accuracy = 100 * right[name].mean()
        print(f"{name}: {pooling} of {joined(layers)}, lr {lr:g}: {accuracy:.1f} on test")
    print()
    print(compared_table(right, groups))
    return 0


if __name__ == "__main__":
    cli(main)
