"""The figures: what the search found, how fine-tuning went, which classes are confused.

    python plot.py grid        grid/massive --out figures  # search-ranking, search-single
    python plot.py confusion   grid/massive --out figures  # confusion
    python plot.py training    runs/*       --out figures  # training-dev (-test with --split test)
    python plot.py differences results/xnli --out figures  # differences

Reads   GRID/results.csv and best.json, GRID/confusion.*.csv; RUN/metrics.jsonl and run.json;
        RESULTS/results.json of evaluate.py. Of a search over several learning rates each
        combination stands at its own best, as in its summary.
Writes  OUT/NAME.png, 300 dots an inch, as wide as a column or a page of a paper; colours that
        colour-blind readers can tell.
Paper   Figure 5; conclusions 1 and 3 to 6.
"""

import csv
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.ticker import MaxNLocator

from lib.folders import read_json, read_run, write_atomic
from lib.messages import UserError, cli, make_parser
from lib.scores import columns_of, group_runs, mean_accuracies, ranked, read_grid, spread
from lib.tables import paper_order

COLUMN, PAGE = 3.4, 7.0  # inches
COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #8C6D31".split()  # Okabe and Ito
MARKERS, LINES = "osD^vP*X", ["-", "--", "-.", ":"]
CENTRED = {"ha": "center", "va": "center", "fontsize": 6}
SLANTED = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
FONTS = "DejaVu Sans,Noto Sans CJK SC,Noto Sans Arabic,Arial Unicode MS,Unifont".split(",")


def paper_style():
    """Settings of matplotlib for a paper's figures."""
    return {
        "font.size": 7.5,
        "font.family": [font for font in FONTS if font in get_font_names()],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 8,
        "legend.frameon": False,
        "lines.linewidth": 1.1,
        "lines.markersize": 3,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 300,
        "text.parse_math": False,  # a label's $ is a dollar
    }


def look(i):
    """What tells the i-th curve of a figure from the others: 32 are told apart."""
    return {
        "color": COLORS[i % 8],
        "marker": MARKERS[i % 8],
        "linestyle": LINES[(i + i // 8) % 4],
    }


def visible(name):
    """A name for a legend, which would leave out one that begins with an underscore."""
    return re.sub("^_", " _", name)


def panels(count, columns, height):
    """A figure of a page's width with `count` panels, and an array of axes, (lines, columns)."""
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(PAGE, height * lines + 0.4))
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes


def save(figure, out, name):
    """Write a figure as OUT/NAME.png."""
    path = Path(out) / f"{name}.png"
    with write_atomic(path, "wb") as file:
        figure.savefig(file, format="png")
    print(path)


# --- the search -----------------------------------------------------------------------------------


def plot_grid(folder):
    """The search's figures, {name: figure}."""
    results, best = read_grid(folder)
    places = ranked(results, best["select"])
    poolings = list(dict.fromkeys(pooling for pooling, _, _ in results.keys))
    of_others = f"mean of\nthe languages but {results.source}"
    labels = {
        "test": f"micro-F1 on test, {of_others} (%)",
        "joint": f"micro-F1 on dev, {of_others} (%)",
        "en": f"micro-F1 on dev\nin {results.source} (%)",
    }
    groups = columns_of(results.columns, results.source)
    shown = next(protocol for protocol in labels if protocol in groups)
    split = "test" if shown == "test" else "dev"
    return {
        "search-ranking": draw_ranking(results, places, poolings, groups[shown], labels[shown]),
        "search-single": draw_single(results, places, poolings, split),
    }


def draw_ranking(results, places, poolings, group, label):
    """All combinations by rank within their pooling; the best are named in summary.md.

    places: of each combination at its best rate; group: those of the columns whose mean counts.
    """
    figure = Figure(figsize=(COLUMN, 2.9))
    axis = figure.subplots()
    scores = 100 * results.micro[:, :, group].mean(2)  # (G, S)
    for i, pooling in enumerate(poolings):
        of_pooling = [scores[g] for g in places if results.keys[g][0] == pooling]
        values = np.array(sorted(of_pooling, key=np.mean, reverse=True))  # (ranks, S)
        ranks, mean, std = np.arange(1, len(values) + 1), values.mean(1), spread(values)
        axis.plot(ranks, mean, label=pooling, markevery=max(1, len(values) // 8), **look(i))
        axis.fill_between(ranks, mean - std, mean + std, color=COLORS[i], alpha=0.15, lw=0)
    axis.set_xlabel(
        "rank of the combination within its pooling\n(band: standard deviation over seeds)"
    )
    axis.set_ylabel(label)
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def draw_single(results, places, poolings, split):
    """Each layer alone in each language."""
    keys, columns = results.keys, results.columns
    singles = sorted((g for g in places if len(keys[g][1]) == 1), key=lambda g: keys[g][1])
    languages = [c.removeprefix(f"{split}_") for c in columns if c.startswith(f"{split}_")]
    figure = Figure(figsize=(PAGE, max(2.3, 0.19 * len(languages))))
    axes = figure.subplots(1, len(poolings), sharey=True, squeeze=False)[0]
    for axis, pooling in zip(axes, poolings):
        of_pooling = [g for g in singles if keys[g][0] == pooling]
        layers = [keys[g][1][0] for g in of_pooling]
        for i, language in enumerate(paper_order(languages)):
            column = columns.index(f"{split}_{language}")
            values = 100 * results.micro[of_pooling, :, column]  # (L, S)
            mean, std = values.mean(1), spread(values)
            axis.errorbar(layers, mean, std, label=language, elinewidth=0.6, **look(i))
        axis.set(title=pooling, xlabel="single layer", xticks=layers)
    axes[0].set_ylabel(f"micro-F1 on {split} (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def plot_confusion(folder):
    """The confusion matrices of the chosen combination, a panel a language."""
    paths = {path.name.split(".")[1]: path for path in Path(folder).glob("confusion.*.csv")}
    if not paths:
        raise UserError(
            f"{folder} holds no confusion.LANG.csv: grid_search.py writes one for each test file"
        )
    figure, axes = panels(len(paths), columns=4, height=1.7)
    for axis, language in zip(axes.flat, paper_order(paths)):
        with open(paths[language], encoding="utf-8", newline="") as file:
            (_, *names), *rows = csv.reader(file)
        counts = np.array([row[1:] for row in rows], dtype=float)  # (true C, predicted C)
        share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axis.set_title(f"{language}  (micro-F1 {100 * np.trace(counts) / counts.sum():.1f})")
        axis.set(xticks=[], yticks=[])
        if len(names) <= 8:  # more cannot be read
            for (true, predicted), value in np.ndenumerate(share):
                color = "white" if value < 50 else "black"
                axis.text(predicted, true, f"{value:.0f}", color=color, **CENTRED)
            axis.set_xticks(range(len(names)), names, fontsize=6, **SLANTED)
            if axis in axes[:, 0]:
                axis.set_yticks(range(len(names)), names, fontsize=6)
    figure.supylabel("true class", fontsize=7.5)
    figure.supxlabel("predicted class (% of the true class, all seeds)", fontsize=7.5)
    return {"confusion": figure}


# --- fine-tuning ----------------------------------------------------------------------------------


def plot_training(folders, split):
    """Accuracy after each epoch, a panel a language (the paper's Figure 5)."""
    runs, metrics = zip(*[read_run(folder) for folder in folders])
    languages = set()
    for rows in metrics:
        languages |= {row["language"] for row in rows if row["split"] == split}
    if not languages:
        advice = " (train.py --track-test)" if split == "test" else ""
        raise UserError(f"no run was evaluated on {split}{advice}")
    curves = []
    for run, rows in zip(runs, metrics):
        source = run["arguments"]["train_language"]
        curves.append(curves_of(rows, split, paper_order(languages), source))

    figure, axes = panels(len(curves[0]), columns=3, height=1.55)
    systems = group_runs(folders, runs)
    for i, (name, members) in enumerate(systems.items()):
        for axis, title in zip(axes.flat, curves[0]):
            draw_curves(axis, [curves[m][title] for m in members], i, visible(name))
            for m in members:
                draw_freezing(axis, metrics[m], COLORS[i % 8])
            axis.set(title=title, xlabel="epoch")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy (%)")
    heading = f"Accuracy on {split} by language; dotted: layers frozen from here on"
    if len(systems) < len(folders):
        heading += "; band: lowest to highest seed"
    handles = axes.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, title=heading)
    return {f"training-{split}": figure}


def curves_of(rows, split, languages, source):
    """The panels of a run, {title: {epoch: percent}}, from the rows of its metrics.jsonl."""
    shown = {language: (split, [language]) for language in languages}
    if len(languages) > 2:
        others = [language for language in languages if language != source]
        shown["mean of all but the source"] = split, others
    shown["train"] = "train", [""]
    curves = {}
    for title, (of_split, members) in shown.items():
        means = mean_accuracies(rows, of_split, members)
        curves[title] = {epoch: 100 * mean for epoch, mean in means.items()}
    return curves


def draw_curves(axis, curves, i, name):
    """A system's mean over seeds, and their range: {epoch: percent} of each."""
    epochs = sorted(set.intersection(*map(set, curves)))
    values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])  # (S, epochs)
    axis.plot(epochs, values.mean(0), label=name, **look(i))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(curves) > 1:
        low, high = values.min(0), values.max(0)
        axis.fill_between(epochs, low, high, color=COLORS[i % 8], alpha=0.15, lw=0)


def draw_freezing(axis, rows, color):
    """A dotted line at the last evaluation before a run froze layers."""
    before = [row["epoch"] for row in rows if not row["frozen_layers"]]
    if len(before) < len(rows):
        axis.axvline(max(before, default=0), color=color, lw=0.7, ls=":")


def plot_differences(folder):
    """Each system against the baseline, with intervals, in each language."""
    results = read_json(Path(folder) / "results.json", "evaluate.py", ("systems", "baseline"))
    systems = [system for system in results["systems"] if system.get("difference")]
    if not systems:
        raise UserError(
            f"{folder}/results.json compares no two systems: give evaluate.py two or more that "
            "have a seed in common"
        )
    languages = list(systems[0]["difference"])
    for system in systems:
        languages += [language for language in system["difference"] if language not in languages]
    rows = len(languages) * max(1, len(systems) * 0.7)
    figure = Figure(figsize=(COLUMN, 0.6 + 0.22 * rows + 0.15 * len(systems)))
    axis = figure.subplots()
    for s, system in enumerate(systems):
        beside = (s - (len(systems) - 1) / 2) * 0.8 / max(4, len(systems))
        draw_system(axis, system, s, languages, beside)
    axis.axvline(0, color="black", lw=0.6)
    axis.set_yticks(range(len(languages)), languages)
    axis.invert_yaxis()
    what = f"accuracy less {results['baseline']}'s"
    axis.set_xlabel(f"{what} (points; 95 % interval\nover rows and seeds; small dots: each seed)")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    return {"differences": figure}


def draw_system(axis, system, s, languages, beside):
    """The s-th system's differences. One of a single seed is hollow: its interval is the rows'."""
    label, color, fill = visible(system["name"]), COLORS[s % 8], COLORS[s % 8]
    entries = list(system["difference"].values())
    if all(entry["seeds"] == 1 for entry in entries):
        label, fill = f"{label} (one seed: interval of the rows)", "white"
    places = beside + np.array([languages.index(language) for language in system["difference"]])
    middle, low, high = (
        100 * np.array([entry[key] for entry in entries]) for key in ("difference", "low", "high")
    )
    style = {"fmt": MARKERS[s % 8], "color": color, "mfc": fill, "ms": 3.5, "capsize": 2}
    axis.errorbar(middle, places, xerr=[middle - low, high - middle], label=label, **style)
    for place, entry in zip(places, entries):
        if entry["seeds"] > 1:
            seeds = 100 * np.array(entry["by_seed"])
            axis.plot(seeds, np.full(len(seeds), place), "o", color=color, ms=2)


PLOTS = {"grid": plot_grid, "confusion": plot_confusion, "differences": plot_differences}


# --- the command ----------------------------------------------------------------------------------


def parse_args(argv):
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, folder in (
        ("grid", "grid folder of grid_search.py"),
        ("confusion", "grid folder of grid_search.py"),
        ("training", "run folders of train.py"),
        ("differences", "results folder of evaluate.py"),
    ):
        command = commands.add_parser(name, help=f"figures of a {folder}", allow_abbrev=False)
        add = command.add_argument
        if name == "training":
            add("folders", nargs="+", help=folder)
            add(
                "--split",
                choices=["dev", "test"],
                default="dev",
                help="(default: dev; test needs train.py --track-test)",
            )
        else:
            add("folder", help=folder)
        add("--out", required=True, help="folder for the figures")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with matplotlib.rc_context(paper_style()):
        if args.command == "training":
            figures = plot_training(args.folders, args.split)
        else:
            figures = PLOTS[args.command](args.folder)
        for name, figure in figures.items():
            save(figure, args.out, name)
    return 0


if __name__ == "__main__":
    cli(main)
