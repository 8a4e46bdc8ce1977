"""The figures: what the search found, how fine-tuning went, which classes are confused.

    python plot.py grid      grid/massive --out figures    # search-ranking, search-layers, search-single, search-worth
    python plot.py training  runs/*       --out figures    # training-dev (and training-test with --split test)
    python plot.py confusion grid/massive --out figures    # confusion
    python plot.py differences results/xnli --out figures  # differences

Reads   GRID/results.csv, GRID/confusion.*.csv; RUN/metrics.jsonl and RUN/run.json; RESULTS/results.json of evaluate.py.
Writes  OUT/NAME.png, 300 dots an inch, as wide as a column or a page of a paper; colours that colour-blind readers can
        tell. With --tensorboard DIR the figures go there too.
Paper   Figure 5; conclusions 1 and 3 to 6.
"""
import argparse
import csv
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from common import UserError, cli, read_json, spread, write_atomic
from evaluate import group_runs, paper_order, read_run
from grid_search import at_best_rate, mean_of_others, read_grid

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"]  # Okabe and Ito's
MARKERS, LINES = "osD^vP*X", ["-", "--", "-.", ":"]
COLUMN, PAGE = 3.4, 7.0  # inches
plt.rcParams.update({"font.size": 7.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                     "axes.titlesize": 8, "figure.constrained_layout.use": True, "savefig.dpi": 300,
                     "lines.linewidth": 1.1})


def save(figure, out, name, tensorboard=None):
    """Write a figure beside its place, move it there whole and say so; and into TensorBoard where a folder is given."""
    path = Path(out) / f"{name}.png"
    with write_atomic(path, "wb") as file:
        figure.savefig(file, format="png")
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and seldom needed
        with SummaryWriter(tensorboard) as writer:
            writer.add_figure(name, figure, close=False)
    plt.close(figure)
    print(path)


# --- the search --------------------------------------------------------------------------------------------------

def plot_grid(folder, save):
    grid, columns = read_grid(folder)
    split = "test" if any(c.startswith("test_") and c != "test_en" for c in columns) else "dev"
    poolings = list(dict.fromkeys(pooling for pooling, _ in grid))
    layers = sorted({layer for _, combination in grid for layer in combination})
    colors = dict(zip(poolings, COLORS))
    if all(column.endswith("_en") for column in columns):
        raise UserError(f"{folder}/results.csv has no language but English: these figures show the others")
    score = {key: foreign(entry, split) for key, entry in grid.items()}
    label = f"micro-F1 on {split}, mean of the\nnon-English languages (%)"

    figure, (curve, top) = plt.subplots(2, 1, figsize=(COLUMN, 4.6), height_ratios=[2, 3])
    for pooling, marker in zip(poolings, MARKERS):
        mine = sorted((score[key] for key in score if key[0] == pooling), key=np.mean, reverse=True)
        mean, std = np.mean(mine, 1), spread(mine, 1)
        curve.plot(range(1, len(mean) + 1), mean, color=colors[pooling], label=pooling, marker=marker,
                   markevery=max(1, len(mean) // 8), ms=3)
        curve.fill_between(range(1, len(mean) + 1), mean - std, mean + std, color=colors[pooling], alpha=0.15, lw=0)
    curve.set(xlabel="rank of the combination within its pooling", ylabel=label,
              title="All combinations (band: std over seeds)")
    curve.legend(ncols=len(poolings))
    best = sorted(score, key=lambda key: -score[key].mean())[:15]
    for i, key in enumerate(best):
        top.errorbar(score[key].mean(), i, xerr=spread(score[key]), color=colors[key[0]],
                     marker=MARKERS[poolings.index(key[0])], ms=3, capsize=2)
        top.plot(score[key], np.full(len(score[key]), i), "|", color=colors[key[0]], ms=4, alpha=0.5)
    top.set(yticks=range(len(best)), xlabel="the same (%)", title="The best 15 (ticks: seeds)",
            yticklabels=[f"{'+'.join(map(str, combination))}  {pooling}" for pooling, combination in best])
    top.invert_yaxis()
    save(figure, "search-ranking")

    single = np.array([[score[pooling, (layer,)].mean() for layer in layers] for pooling in poolings])
    figure, axis = plt.subplots(figsize=(COLUMN, 1.5))
    image = axis.imshow(single, aspect="auto", cmap="cividis")
    for (p, i), value in np.ndenumerate(single):
        axis.text(i, p, f"{value:.1f}", ha="center", va="center", fontsize=6.5,
                  color="white" if value < (single.min() + single.max()) / 2 else "black")
    axis.set(xticks=range(len(layers)), xticklabels=layers, yticks=range(len(poolings)), yticklabels=poolings,
             xlabel="single layer", title=label.replace("\n", " "))
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, pad=0.02)
    save(figure, "search-layers")

    figure, axes = plt.subplots(1, len(poolings), figsize=(PAGE, 2.3), sharey=True, squeeze=False)
    languages = paper_order(c.split("_")[1] for c in columns if c.startswith(split))
    for axis, pooling in zip(axes[0], poolings):
        for i, language in enumerate(languages):
            values = np.array([grid[pooling, (layer,)][f"{split}_{language}"] for layer in layers])
            axis.errorbar(layers, values.mean(1), spread(values), label=language, color=COLORS[i % 8],
                          marker=MARKERS[i % 8], ms=3, ls=LINES[i % 4], elinewidth=0.6)
        axis.set(title=pooling, xlabel="single layer", xticks=layers)
    axes[0][0].set_ylabel(f"micro-F1 on {split} (%)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    save(figure, "search-single")

    figure, axis = plt.subplots(figsize=(COLUMN, 2.2))
    for p, pooling in enumerate(poolings):
        worth = [np.mean([score[k] for k in score if k[0] == pooling and layer in k[1]])
                 - np.mean([score[k] for k in score if k[0] == pooling and layer not in k[1]] or [np.nan])
                 for layer in layers]
        axis.bar(np.arange(len(layers)) + (p - (len(poolings) - 1) / 2) * 0.26, worth, 0.26, color=colors[pooling],
                 label=pooling, hatch=["", "///", "..."][p % 3], edgecolor="white", lw=0.4)
    axis.axhline(0, color="black", lw=0.6)
    axis.set(xticks=range(len(layers)), xticklabels=layers, xlabel="layer",
             ylabel="mean F1 with the layer\nless mean F1 without (points)")
    axis.legend(ncols=len(poolings))
    save(figure, "search-worth")


def plot_confusion(folder, save):
    paths = {path.name.split(".")[1]: path for path in sorted(Path(folder).glob("confusion.*.csv"))}
    if not paths:
        raise UserError(f"{folder} holds no confusion.LANG.csv: run grid_search.py")
    columns = min(4, len(paths))
    lines = math.ceil(len(paths) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(PAGE, 1.9 * lines), squeeze=False)
    for axis in axes.flat[len(paths):]:
        axis.set_visible(False)
    for axis, language in zip(axes.flat, paper_order(paths)):
        with open(paths[language], encoding="utf-8", newline="") as file:
            (_, *names), *rows = csv.reader(file)
        counts = np.array([row[1:] for row in rows], dtype=float)
        share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="cividis", vmin=0, vmax=100)
        if len(names) <= 8:
            for (i, j), value in np.ndenumerate(share):
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=6,
                          color="white" if value < 50 else "black")
            axis.set(xticks=range(len(names)), yticks=range(len(names)))
            axis.set_xticklabels(names, rotation=40, ha="right", rotation_mode="anchor", fontsize=6)
            axis.set_yticklabels(names if axis is axes.flat[0] or axis in axes[:, 0] else [], fontsize=6)
        axis.set_title(f"{language}  (micro-F1 {100 * np.trace(counts) / counts.sum():.1f})")
        axis.spines[:].set_visible(False)
    figure.supylabel("true class", fontsize=7.5)
    figure.supxlabel("predicted class (% of the true class, all seeds)", fontsize=7.5)
    save(figure, "confusion")


# --- fine-tuning -------------------------------------------------------------------------------------------------

def plot_training(folders, split, save):
    runs = [read_json(Path(folder) / "run.json", RUN) for folder in folders]
    metrics = [read_metrics(folder) for folder in folders]
    languages = paper_order({row["language"] for rows in metrics for row in rows if row["split"] == split})
    if not languages:
        raise UserError(f"no run was evaluated on {split}" + " (train.py --track-test)" * (split == "test"))
    panels = [*languages, *["mean of non-English"] * (len(languages) > 2), "train"]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(PAGE, 1.55 * lines + 0.4), sharex=True, squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    for s, (name, members) in enumerate(group_runs(folders, runs).items()):
        style = {"color": COLORS[s % 8], "marker": MARKERS[s % 8], "ms": 3, "ls": LINES[s % 4]}
        frozen = min((row["epoch"] for row in metrics[members[0]] if row["frozen_layers"]), default=None)
        for axis, panel in zip(axes.flat, panels):
            curves = []
            for i in members:
                by_epoch = {}
                for row in metrics[i]:
                    wanted = row["split"] == "train" if panel == "train" else row["split"] == split and (
                        row["language"] == panel or panel == "mean of non-English" and row["language"] != "en")
                    if wanted:
                        by_epoch.setdefault(row["epoch"], []).append(100 * row["accuracy"])
                curves.append({epoch: np.mean(values) for epoch, values in by_epoch.items()})
            epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
            axis.plot(epochs, values.mean(0), label=name if panel == panels[0] else None, **style)
            if len(members) > 1:
                axis.fill_between(epochs, values.min(0), values.max(0), color=style["color"], alpha=0.15, lw=0)
            if frozen is not None:
                before = max([epoch for epoch in epochs if epoch < frozen], default=0)
                axis.axvline(before, color=style["color"], lw=0.7, ls=":")
            axis.set_title(panel)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy (%)")
    for axis in axes.flat[max(0, len(panels) - columns):len(panels)]:
        axis.set_xlabel("epoch")
        axis.tick_params(labelbottom=True)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper center", ncols=4,
                  title=f"Accuracy on {split} by language; dotted: layers frozen from here on"
                  + "; band: lowest to highest seed" * (len(folders) > len(group_runs(folders, runs))))
    save(figure, f"training-{split}")


# --- differences -------------------------------------------------------------------------------------------------

def plot_differences(folder, save):
    results = read_json(Path(folder) / "results.json", {"systems": [{"name": str}], "baseline": str, "rows": {}})
    systems = [system for system in results["systems"] if system.get("difference")]
    if not systems:
        raise UserError(f"{folder}/results.json compares no two systems: give evaluate.py two or more")
    languages = [l for l in [*results["rows"], "others"] if any(l in system["difference"] for system in systems)]
    figure, axis = plt.subplots(figsize=(COLUMN, 0.6 + 0.22 * len(languages) * max(1, len(systems) * 0.7)))
    for s, system in enumerate(systems):
        there = [i for i, language in enumerate(languages) if language in system["difference"]]
        entries = [system["difference"][languages[i]] for i in there]
        mean, low, high = (100 * np.array([entry[key] for entry in entries]) for key in ("difference", "low", "high"))
        axis.errorbar(mean, np.array(there) + (s - (len(systems) - 1) / 2) * 0.22, xerr=[mean - low, high - mean],
                      fmt=MARKERS[s % 8], color=COLORS[s % 8], ms=3.5, capsize=2, label=system["name"])
    axis.axvline(0, color="black", lw=0.6)
    axis.set(yticks=range(len(languages)), yticklabels=languages,
             xlabel=f"accuracy less {results['baseline']}'s (points, 95 % interval)")
    axis.invert_yaxis()
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    save(figure, "differences")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("grid", "grid folder of grid_search.py"), ("training", "run folders of train.py"),
                       ("confusion", "grid folder of grid_search.py"),
                       ("differences", "results folder of evaluate.py")):
        command = commands.add_parser(name, help=f"figures of a {what}")
        command.add_argument("folders", nargs="+" if name == "training" else 1, help=what)
        command.add_argument("--out", required=True, help="folder for the figures")
        command.add_argument("--tensorboard", metavar="DIR", help="write the figures as TensorBoard events there too")
        if name == "training":
            command.add_argument("--split", choices=["dev", "test"], default="dev",
                                 help="(default: dev; test needs train.py --track-test)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)

    def keep(figure, name):
        save(figure, args.out, name, args.tensorboard)

    if args.command == "training":
        plot_training(args.folders, args.split, keep)
    else:
        plot = {"grid": plot_grid, "confusion": plot_confusion, "differences": plot_differences}[args.command]
        plot(args.folders[0], keep)
    return 0


if __name__ == "__main__":
    cli(main)
