"""The figures: what the search found, how fine-tuning went, which classes are confused.

    python plot.py grid      grid/massive --out figures    # search-ranking, -layers, -single, -worth, -rates
    python plot.py training  runs/*       --out figures    # training-dev (and training-test with --split test)
    python plot.py confusion grid/massive --out figures    # confusion
    python plot.py differences results/xnli --out figures  # differences

Reads   GRID/results.csv and best.json, GRID/confusion.*.csv; RUN/metrics.jsonl and run.json; RESULTS/results.json of
        evaluate.py. Of a search over several learning rates each combination stands at its own best, as in its summary.
Writes  OUT/NAME.png, 300 dots an inch, as wide as a column or a page of a paper; colours that colour-blind readers can
        tell. With --tensorboard DIR the figures go there too.
Paper   Figure 5; conclusions 1 and 3 to 6.
"""

import argparse
import csv
import math
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.font_manager import get_font_names
from matplotlib.ticker import MaxNLocator

from lib.folders import read_grid, read_json, read_run, write_atomic
from lib.messages import UserError, cli
from lib.scores import at_best_rate, group_runs, mean_of_others, spread
from lib.tables import paper_order

COLORS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C6D31",
]  # Okabe and Ito's
MARKERS, LINES = "osD^vP*X", ["-", "--", "-.", ":"]
COLUMN, PAGE = 3.4, 7.0  # inches
FONTS = [
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans Arabic",
    "Arial Unicode MS",
    "Unifont",
]  # the first that has it
plt.rcParams.update(
    {
        "font.size": 7.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "axes.titlesize": 8,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 300,
        "lines.linewidth": 1.1,
        "text.parse_math": False,  # a label's $ is a dollar
        "font.family": [font for font in FONTS if font in get_font_names()],
    }
)


def style(i):
    """What tells the i-th curve of a figure from the others: 32 are told apart."""
    return {
        "color": COLORS[i % 8],
        "marker": MARKERS[i % 8],
        "ms": 3,
        "ls": LINES[(i + i // 8) % 4],
    }


def shown(name):
    """A name for a legend, which would leave out one that begins with an underscore."""
    return re.sub("^_", " _", name)


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
    grid, columns, best = read_grid(folder)
    source, rates = best["train_language"], sorted({lr for *_, lr in grid})
    if all(column.split("_", 1)[1] == source for column in columns):
        raise UserError(
            f"{folder}/results.csv has no language but {source}: these figures show the others"
        )
    split = (
        "test"
        if any(column.startswith("test_") and column != f"test_{source}" for column in columns)
        else "dev"
    )
    poolings = list(dict.fromkeys(pooling for pooling, *_ in grid))
    layers = sorted({layer for _, combination, _ in grid for layer in combination})
    languages = paper_order(
        column.split("_", 1)[1] for column in columns if column.startswith(f"{split}_")
    )
    entries = {key: entry for key, (_, entry) in at_best_rate(grid, best).items()}
    score = {
        key: mean_of_others(entry, split, source) for key, entry in entries.items()
    }  # {...: (S,)}
    label = f"micro-F1 on {split}, mean of\nthe languages but {source} (%)"
    looks = {
        pooling: {"color": COLORS[p % 8], "marker": MARKERS[p % 8], "ms": 3}
        for p, pooling in enumerate(poolings)
    }
    save(draw_ranking(score, looks, label), "search-ranking")
    save(draw_layers(score, poolings, layers, label), "search-layers")
    save(
        draw_single(
            {
                key: {language: entry[f"{split}_{language}"] for language in languages}
                for key, entry in entries.items()
            },
            poolings,
            layers,
            split,
        ),
        "search-single",
    )
    save(
        draw_worth({key: scores.mean() for key, scores in score.items()}, looks, layers),
        "search-worth",
    )
    if len(rates) > 1:
        scores = {key: mean_of_others(entry, split, source).mean() for key, entry in grid.items()}
        save(draw_rates(scores, rates, looks, label), "search-rates")


def draw_ranking(score, looks, label):
    """All combinations by rank, and the best ones by name: score {(pooling, layers): (S,)}."""
    figure, (curve, top) = plt.subplots(1, 2, figsize=(PAGE, 2.9))
    for pooling, look in looks.items():
        mine = sorted((score[key] for key in score if key[0] == pooling), key=np.mean, reverse=True)
        mean, std, ranks = np.mean(mine, 1), spread(mine, 1), range(1, len(mine) + 1)
        curve.plot(ranks, mean, label=pooling, markevery=max(1, len(mine) // 8), **look)
        curve.fill_between(ranks, mean - std, mean + std, color=look["color"], alpha=0.15, lw=0)
    curve.set(
        xlabel="rank of the combination within its pooling",
        ylabel=label,
        title="All combinations (band: std over seeds)",
    )
    first = sorted(score, key=lambda key: -score[key].mean())[:15]
    for i, key in enumerate(first):
        look = looks[key[0]]
        top.errorbar(score[key].mean(), i, xerr=spread(score[key]), capsize=2, **look)
        top.plot(score[key], np.full(len(score[key]), i), "|", color=look["color"], ms=4, alpha=0.5)
    top.set(
        yticks=range(len(first)),
        xlabel="the same (%)",
        title=f"The best {len(first)} (ticks: seeds)",
        yticklabels=[
            f"{'+'.join(map(str, combination))}  {pooling}" for pooling, combination in first
        ],
    )
    top.invert_yaxis()
    figure.legend(*curve.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def draw_layers(score, poolings, layers, label):
    """Each layer alone under each pooling, as a table of colours: score {(pooling, layers): (S,)}."""
    single = np.array(
        [[score[pooling, (layer,)].mean() for layer in layers] for pooling in poolings]
    )
    figure, axis = plt.subplots(figsize=(COLUMN, 0.6 + 0.3 * len(poolings)))
    image = axis.imshow(single, aspect="auto", cmap="cividis")
    for (p, i), value in np.ndenumerate(single):
        axis.text(
            i,
            p,
            f"{value:.1f}",
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if value < (single.min() + single.max()) / 2 else "black",
        )
    axis.set(
        xticks=range(len(layers)),
        xticklabels=layers,
        yticks=range(len(poolings)),
        yticklabels=poolings,
        xlabel="single layer",
        title=label.replace("\n", " "),
    )
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, pad=0.02)
    return figure


def draw_single(entries, poolings, layers, split):
    """Each layer alone in each language: entries {(pooling, layers): {language: (S,)}}."""
    languages = list(next(iter(entries.values())))
    figure, axes = plt.subplots(
        1,
        len(poolings),
        figsize=(PAGE, max(2.3, 0.19 * len(languages))),
        sharey=True,
        squeeze=False,
    )
    for axis, pooling in zip(axes[0], poolings):
        for i, language in enumerate(languages):
            values = np.array([entries[pooling, (layer,)][language] for layer in layers])
            axis.errorbar(
                layers, values.mean(1), spread(values), label=language, elinewidth=0.6, **style(i)
            )
        axis.set(title=pooling, xlabel="single layer", xticks=layers)
    axes[0][0].set_ylabel(f"micro-F1 on {split} (%)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    return figure


def draw_worth(score, looks, layers):
    """What a layer adds to the combinations that have it: score {(pooling, layers): mean over seeds}."""
    figure, axis = plt.subplots(figsize=(COLUMN, 2.2))
    width = 0.78 / len(looks)
    for p, (pooling, look) in enumerate(looks.items()):
        worth = [
            np.mean([score[k] for k in score if k[0] == pooling and layer in k[1]])
            - np.mean(
                [score[k] for k in score if k[0] == pooling and layer not in k[1]] or [np.nan]
            )
            for layer in layers
        ]
        axis.bar(
            np.arange(len(layers)) + (p - (len(looks) - 1) / 2) * width,
            worth,
            width,
            color=look["color"],
            label=pooling,
            hatch=["", "///", "..."][p % 3],
            edgecolor="white",
            lw=0.4,
        )
    axis.axhline(0, color="black", lw=0.6)
    axis.set(
        xticks=range(len(layers)),
        xticklabels=layers,
        xlabel="layer",
        ylabel="mean F1 with the layer\nless mean F1 without (points)",
    )
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def draw_rates(score, rates, looks, label):
    """How the ranking depends on the learning rate: score {(pooling, layers, lr): mean over seeds}."""
    figure, axis = plt.subplots(figsize=(PAGE, 2.5))
    names = [f"lr {rate:g}" for rate in rates]
    for what, line in (("best combination", "-"), ("best single layer", "--")):
        best = [
            max(
                (key for key in score if key[2] == rate and (line == "-" or len(key[1]) == 1)),
                key=score.get,
            )
            for rate in rates
        ]
        axis.plot([score[key] for key in best], line, color="black", marker="*", ms=5, label=what)
        names = [f"{name}\n{'+'.join(map(str, key[1]))} {key[0]}" for name, key in zip(names, best)]
    names = [
        re.sub(r"((\d+\+){5})(?=\d)", r"\1\n", name) for name in names
    ]  # long ones on several lines
    for pooling, look in looks.items():
        axis.plot(
            [
                np.mean([score[key] for key in score if key[::2] == (pooling, rate)])
                for rate in rates
            ],
            label=f"all combinations: {pooling}",
            **look,
        )
    axis.set(
        xticks=range(len(rates)),
        xlim=(-0.5, len(rates) - 0.5),
        ylabel=label,
        title="At each learning rate of the classifiers: the best (named below), the poolings' means",
    )
    axis.set_xticklabels(names, fontsize=6)
    figure.legend(loc="outside right center")
    return figure


def plot_confusion(folder, save):
    paths = {path.name.split(".")[1]: path for path in sorted(Path(folder).glob("confusion.*.csv"))}
    if not paths:
        raise UserError(f"{folder} holds no confusion.LANG.csv: run grid_search.py")
    columns = min(4, len(paths))
    lines = math.ceil(len(paths) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(PAGE, 1.9 * lines), squeeze=False)
    for axis in axes.flat[len(paths) :]:
        axis.set_visible(False)
    for axis, language in zip(axes.flat, paper_order(paths)):
        try:
            with open(paths[language], encoding="utf-8", newline="") as file:
                (_, *names), *rows = csv.reader(file)
            counts = np.array([row[1:] for row in rows], dtype=float).reshape(
                len(names), len(names)
            )
        except (ValueError, csv.Error) as error:
            raise UserError(
                f"{paths[language]}: not what grid_search.py writes ({error}): "
                "delete it, and run the search again"
            ) from None
        share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="cividis", vmin=0, vmax=100)
        if len(names) <= 8:
            for (i, j), value in np.ndenumerate(share):
                axis.text(
                    j,
                    i,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if value < 50 else "black",
                )
            axis.set(xticks=range(len(names)), yticks=range(len(names)))
            axis.set_xticklabels(names, rotation=40, ha="right", rotation_mode="anchor", fontsize=6)
            axis.set_yticklabels(
                names if axis is axes.flat[0] or axis in axes[:, 0] else [], fontsize=6
            )
        axis.set_title(f"{language}  (micro-F1 {100 * np.trace(counts) / counts.sum():.1f})")
        axis.spines[:].set_visible(False)
    figure.supylabel("true class", fontsize=7.5)
    figure.supxlabel("predicted class (% of the true class, all seeds)", fontsize=7.5)
    save(figure, "confusion")


# --- fine-tuning -------------------------------------------------------------------------------------------------


def plot_training(folders, split, save):
    runs, metrics = zip(*map(read_run, folders))
    sources = sorted({run["arguments"]["train_language"] for run in runs})
    languages = paper_order(
        {row["language"] for rows in metrics for row in rows if row["split"] == split}
    )
    if not languages:
        raise UserError(
            f"no run was evaluated on {split}" + " (train.py --track-test)" * (split == "test")
        )
    others = f"mean of all but {sources[0] if len(sources) == 1 else 'the source'}"
    panels = [*languages, *[others] * (len(languages) > 2), "train"]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(PAGE, 1.55 * lines + 0.4), sharex=True, squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for s, (name, members) in enumerate(group_runs(folders, runs).items()):
        frozen = min(
            (row["epoch"] for row in metrics[members[0]] if row["frozen_layers"]), default=None
        )
        for axis, panel in zip(axes.flat, panels):
            curves = []
            for i in members:
                by_epoch = {}
                for row in metrics[i]:
                    wanted = (
                        row["split"] == "train"
                        if panel == "train"
                        else row["split"] == split
                        and (
                            row["language"] == panel
                            or panel == others
                            and row["language"] != runs[i]["arguments"]["train_language"]
                        )
                    )
                    if wanted:
                        by_epoch.setdefault(row["epoch"], []).append(100 * row["accuracy"])
                curves.append({epoch: np.mean(values) for epoch, values in by_epoch.items()})
            epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
            axis.plot(
                epochs,
                values.mean(0),
                label=shown(name) if panel == panels[0] else None,
                **style(s),
            )
            if len(members) > 1:
                axis.fill_between(
                    epochs, values.min(0), values.max(0), color=COLORS[s % 8], alpha=0.15, lw=0
                )
            if frozen is not None:
                before = max([epoch for epoch in epochs if epoch < frozen], default=0)
                axis.axvline(before, color=COLORS[s % 8], lw=0.7, ls=":")
            axis.set_title(panel)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy (%)")
    for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("epoch")
        axis.tick_params(labelbottom=True)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(
        loc="outside upper center",
        ncols=4,
        title=f"Accuracy on {split} by language; dotted: layers frozen from here on"
        + "; band: lowest to highest seed" * (len(folders) > len(group_runs(folders, runs))),
    )
    save(figure, f"training-{split}")


# --- differences -------------------------------------------------------------------------------------------------


def plot_differences(folder, save):
    results = read_json(
        Path(folder) / "results.json",
        "evaluate.py",
        {"systems": [{"name": str}], "baseline": str, "rows": {}},
    )
    systems = [system for system in results["systems"] if system.get("difference")]
    if not systems:
        raise UserError(
            f"{folder}/results.json compares no two systems: give evaluate.py two or more"
        )
    languages = [
        l
        for l in [*results["rows"], "others"]
        if any(l in system["difference"] for system in systems)
    ]
    rows = len(languages) * max(1, len(systems) * 0.7)
    figure, axis = plt.subplots(figsize=(COLUMN, 0.6 + 0.22 * rows + 0.15 * len(systems)))
    for s, system in enumerate(systems):
        there = [i for i, language in enumerate(languages) if language in system["difference"]]
        entries = [system["difference"][languages[i]] for i in there]
        mean, low, high = (
            100 * np.array([entry[key] for entry in entries])
            for key in ("difference", "low", "high")
        )
        beside = (s - (len(systems) - 1) / 2) * 0.8 / max(4, len(systems))
        axis.errorbar(
            mean,
            np.array(there) + beside,
            xerr=[mean - low, high - mean],
            fmt=MARKERS[s % 8],
            color=COLORS[s % 8],
            ms=3.5,
            capsize=2,
            label=shown(system["name"]),
        )
        seeds = [
            (100 * value, i + beside)
            for i, entry in zip(there, entries)
            for value in entry.get("by_seed", ())
        ]
        if seeds:
            axis.scatter(
                *zip(*seeds),
                s=5,
                facecolors="none",
                edgecolors=COLORS[s % 8],
                linewidths=0.5,
                zorder=3,
            )
    by_seed = any(
        "by_seed" in entry for system in systems for entry in system["difference"].values()
    )
    axis.axvline(0, color="black", lw=0.6)
    axis.set(
        yticks=range(len(languages)),
        yticklabels=languages,
        xlabel=f"accuracy less {results['baseline']}'s\n(points; 95 % interval of the rows"
        + "; circles: each seed" * by_seed
        + ")",
    )
    axis.invert_yaxis()
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    save(figure, "differences")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("grid", "grid folder of grid_search.py"),
        ("training", "run folders of train.py"),
        ("confusion", "grid folder of grid_search.py"),
        ("differences", "results folder of evaluate.py"),
    ):
        command = commands.add_parser(name, help=f"figures of a {what}", allow_abbrev=False)
        command.add_argument("folders", nargs="+" if name == "training" else 1, help=what)
        command.add_argument("--out", required=True, help="folder for the figures")
        command.add_argument(
            "--tensorboard", metavar="DIR", help="write the figures as TensorBoard events there too"
        )
        if name == "training":
            command.add_argument(
                "--split",
                choices=["dev", "test"],
                default="dev",
                help="(default: dev; test needs train.py --track-test)",
            )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)

    def keep(figure, name):
        save(figure, args.out, name, args.tensorboard)

    if args.command == "training":
        plot_training(args.folders, args.split, keep)
    else:
        plot = {"grid": plot_grid, "confusion": plot_confusion, "differences": plot_differences}[
            args.command
        ]
        plot(args.folders[0], keep)
    return 0


if __name__ == "__main__":
    cli(main)
