"""The paper's eight conclusions, each tested: fine-tune what must be compared, and say what the
difference is worth.

    make claims DATA=data/xnli MODEL=bert-base-multilingual-uncased OUT=claims/xnli
    python -m experiments.claims --model sample/model --data sample/intents14 \\
        --out claims/sample --lr 2e-4 --controls

Reads   the encoder and a data set folder; with --grid a grid folder of grid_search.py, for what
        phase 1 says.
Writes  OUT/runs/NAME-seedS/ (run folders of train.py: a stopped call goes on, a second one trains
        nothing), OUT/claims.json and OUT/claims.md: for each conclusion what was compared, the
        difference with its 95 % interval over rows and seeds, and the verdict.
Paper   section 1.9.
"""

import argparse
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

import train
from data import group_numbers, read_labels, read_sets, split_languages, take, train_language
from evaluate import run_logits
from lib.encoders import blocks, check_layers, load_encoder
from lib.folders import read_grid, read_run, write_atomic, write_json
from lib.messages import UserError, cli, in_range
from lib.scores import at_best_rate, columns_of, mean_of_others, rank
from lib.significance import MARGIN, holm, intervals, parallel, verdict
from lib.tables import markdown_table, paper_order
from model import POOLINGS

DRAWS = 3  # of random layers, for each seed
TRAIN_ROWS = 1000  # that train accuracy is measured on


# --- what is trained, and what is compared -------------------------------------------------------


class Recipe(NamedTuple):
    """What the paper's system is, of which all others change one thing."""

    top: int  # the encoder's last layer
    layers: list
    pooling: str
    freeze_layers: list
    freeze_epoch: str  # a number, or auto
    hidden: int  # units of the deeper classifier
    epochs: int

    @property
    def flags(self):
        """MC-BERT's flags of train.py."""
        return ["--layers", *self.layers, "--pooling", self.pooling]


def systems(recipe):
    """The runs that the conclusions need: {name: flags of train.py}.

    Of 12 layers the middle one is layer 8, and layers 5 to 12 are those of the search.
    """
    top, chosen = recipe.top, recipe.flags
    upper = range(max(0, top // 2 - 1), top + 1)
    freezing = ["--freeze-layers", *recipe.freeze_layers, "--freeze-epoch", recipe.freeze_epoch]
    return {
        "baseline": ["--head", "pooler"],
        "last-layer": ["--layers", top, "--pooling", recipe.pooling],
        "middle-layer": ["--layers", 2 * top // 3, "--pooling", recipe.pooling],
        "upper-layers": ["--layers", *upper, "--pooling", recipe.pooling],
        "mc-bert": chosen,
        "mc-bert-long": [
            *chosen,
            *("--epochs", 2 * recipe.epochs),
            *("--schedule", "constant", "--keep-all"),
        ],
        "mc-bert-mean": ["--layers", *recipe.layers, "--pooling", "mean"],
        "mc-bert-cls": ["--layers", *recipe.layers, "--pooling", "cls"],
        "mc-bert-wf": [*chosen, *freezing],
        "mc-bert-no-dropout": [*chosen, "--dropout", 0, "--encoder-dropout", 0],
        "mc-bert-deep": [*chosen, "--hidden", recipe.hidden],
    }


class Control(NamedTuple):
    """A control of --controls in one seed."""

    what: str
    against: list  # the systems it is compared with
    runs: dict  # {name: flags of train.py}: one, or several draws, whose mean counts


def draw_layers(top, count, seed, kind, draw):
    """`count` random layers of 1 to `top`: others for each seed, kind of control and draw."""
    order = np.random.default_rng([seed, kind, draw]).permutation(top)
    return sorted((1 + order[:count]).tolist())


def controls(recipe, seed):
    """The runs of --controls for a seed, {name: Control}. Freezing in another way is compared with
    the paper's way, and with not freezing at all."""
    top, chosen = recipe.top, recipe.flags
    either = ["mc-bert-wf", "mc-bert"]
    found = {}

    def freeze(layers, epoch):
        return [*chosen, "--freeze-layers", *layers, "--freeze-epoch", epoch]

    for epoch in (1, 3):
        if str(epoch) != recipe.freeze_epoch and epoch < recipe.epochs:
            name = f"wf-epoch-{epoch}"
            flags = freeze(recipe.freeze_layers, epoch)
            found[name] = Control(f"frozen after epoch {epoch}", either, {name: flags})
    if recipe.freeze_epoch != "auto":
        flags = freeze(recipe.freeze_layers, "auto")
        what = "frozen at the first fall on joint dev"
        found["wf-epoch-auto"] = Control(what, either, {"wf-epoch-auto": flags})

    flags = freeze(range(top // 2 + 1), recipe.freeze_epoch)
    what = f"embeddings and lowest {top // 2} frozen instead"
    found["wf-lowest"] = Control(what, either, {"wf-lowest": flags})

    pooled, frozen = {}, {}
    for draw in range(DRAWS):
        layers = draw_layers(top, len(recipe.layers), seed, 0, draw)
        pooled[f"random-layers-{draw + 1}"] = ["--layers", *layers, "--pooling", recipe.pooling]
        layers = draw_layers(top, len(recipe.freeze_layers), seed, 1, draw)
        frozen[f"wf-random-{draw + 1}"] = freeze(layers, recipe.freeze_epoch)
    what = f"{len(recipe.freeze_layers)} random layers frozen instead"
    found["wf-random"] = Control(what, either, frozen)
    what = f"{len(recipe.layers)} random layers pooled instead"
    found["random-layers"] = Control(what, ["mc-bert"], pooled)

    flags = {"mc-bert-mix": [*chosen, "--combine", "mix"]}
    found["mc-bert-mix"] = Control("layers mixed, not side by side", ["mc-bert"], flags)
    return found


class Comparison(NamedTuple):
    """Two systems and what is claimed of them.

    A run counts at its last epoch; NAME@half: after half of them; NAME@mean: the mean of the
    weights after each.
    """

    number: int | None  # of the paper's conclusions; None: a control
    words: str
    a: str
    b: str
    way: str = "better"  # A is better; "no gain": A is at most MARGIN better


CONCLUSIONS = [
    Comparison(
        1, "longer fine-tuning hurts the other languages", "mc-bert-long@half", "mc-bert-long"
    ),
    Comparison(2, "more hidden states beat the [CLS] head", "mc-bert", "baseline"),
    Comparison(3, "max pooling beats mean", "mc-bert", "mc-bert-mean"),
    Comparison(3, "max pooling beats [CLS]", "mc-bert", "mc-bert-cls"),
    Comparison(4, "not all layers are needed", "upper-layers", "mc-bert", "no gain"),
    Comparison(4, "a middle layer beats the last", "middle-layer", "last-layer"),
    Comparison(5, "combining layers helps", "mc-bert", "middle-layer"),
    Comparison(5, "combining layers beats the last one", "mc-bert", "last-layer"),
    Comparison(6, "freezing on the go helps", "mc-bert-wf", "mc-bert"),
    Comparison(7, "dropout is needed", "mc-bert", "mc-bert-no-dropout"),
    Comparison(8, "a deeper classifier does not help", "mc-bert-deep", "mc-bert", "no gain"),
]
CONTROLS = [  # which need no further runs
    Comparison(None, "mean of the epochs, not the last", "mc-bert@mean", "mc-bert"),
    Comparison(None, "the same, trained for long", "mc-bert-long@mean", "mc-bert-long"),
    Comparison(None, "freezing, or the mean of the epochs", "mc-bert-wf", "mc-bert@mean"),
]
MORE_EPOCHS = {"mc-bert": ["mean"], "mc-bert-long": ["half", "mean"]}  # measured beside the last


# --- what a run says -----------------------------------------------------------------------------


class Data(NamedTuple):
    """What is compared on."""

    folder: str
    split: str
    source: str  # the language trained on
    sets: dict  # {language: Rows} of the split, translations of each other
    train: object  # Rows of the source language


class Outcome(NamedTuple):
    """What a run, or the mean of several draws, reaches in one seed."""

    right: np.ndarray  # (N, L), whether each row is right in each language
    train: float  # accuracy on train rows


class Run(NamedTuple):
    """What came of a run."""

    system: str  # its name, or that of the control of which it is a draw
    name: str
    seed: int
    arguments: dict  # flags of train.py
    frozen_after: float | None  # epochs done when layers froze; None: they never did
    outcomes: dict  # {last, half, mean: Outcome}

    @property
    def counts(self):
        """A run that was to freeze and never did is no frozen run."""
        return self.frozen_after is not None or not self.arguments["freeze_layers"]


def is_right(folder, run, epoch, data, split, sets, batch_size):
    """Whether a run's model after `epoch` is right on each row of {language: Rows}: (N, L)."""
    epochs = dict.fromkeys(sets, epoch)
    logits = run_logits(folder, run, epochs, data, split, sets, batch_size)
    columns = [logits[language].argmax(1) == rows.labels for language, rows in sets.items()]
    return np.stack(columns, axis=1).astype(float)


def measure(folder, run, which, data, batch_size):
    """The Outcome of a finished run at its epoch last, half or mean.

    Train accuracy: dropout off, on rows spread evenly over those trained on.
    """
    last = run["arguments"]["epochs"]
    epoch = {"last": last, "half": last // 2, "mean": "mean"}[which]
    trained = take(data.train, run["arguments"]["max_train_rows"])
    train_set = {data.source: take(trained, TRAIN_ROWS)}
    right = is_right(folder, run, epoch, data.folder, data.split, data.sets, batch_size)
    right_in_train = is_right(folder, run, epoch, data.folder, "train", train_set, batch_size)
    return Outcome(right, float(right_in_train.mean()))


def frozen_after(metrics):
    """How many epochs were done when layers froze, by the rows of metrics.jsonl; None: never."""
    done, last = 0, 0
    for row in metrics:
        if row["epoch"] > last:  # the rows of the next evaluation
            done, last = last, row["epoch"]
        if row["frozen_layers"]:
            return done
    return None


def read_outcome(folder, system, name, seed, data, batch_size):
    """The Run of a finished folder."""
    run, metrics = read_run(folder)
    if not run["complete"]:
        raise UserError(f"{folder} is not finished: give the same command again")
    outcomes = {}
    for which in ["last", *MORE_EPOCHS.get(name, [])]:
        outcomes[which] = measure(folder, run, which, data, batch_size)
    return Run(system, name, seed, run["arguments"], frozen_after(metrics), outcomes)


def mean_outcome(outcomes):
    right = np.mean([outcome.right for outcome in outcomes], axis=0)
    return Outcome(right, float(np.mean([outcome.train for outcome in outcomes])))


def by_system(runs):
    """{system or system@epoch: {seed: Outcome}}: of the runs that count, the mean of the draws."""
    gathered = {}
    for run in runs:
        for which, outcome in run.outcomes.items():
            name = run.system if which == "last" else f"{run.system}@{which}"
            seeds = gathered.setdefault(name, {})
            if run.counts:
                seeds.setdefault(run.seed, []).append(outcome)
    for seeds in gathered.values():
        for seed, draws in seeds.items():
            seeds[seed] = mean_outcome(draws)
    return gathered


# --- what is made of it --------------------------------------------------------------------------


def compare(a, b, groups, source):
    """A - B in the seeds that both have: seeds, Interval of the source language and of the mean of
    the others (None where there is no such seed).

    a, b: {seed: Outcome}; groups (N,): rows to resample together; source: the language's place.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return seeds, None, None
    difference = np.stack([a[seed].right - b[seed].right for seed in seeds])  # (S, N, L)
    others = np.delete(difference, source, axis=2).mean(2)  # (S, N)
    both = np.stack([difference[:, :, source], others], axis=2)  # (S, N, 2)
    return seeds, *intervals(both, groups)


def judge(comparisons, outcomes, groups, source):
    """What claims.json says of a family of Comparisons: Holm's correction is over all of them.

    outcomes: {system: {seed: Outcome}}. One seed has an interval of the rows and no verdict.
    """
    compared = [compare(outcomes[c.a], outcomes[c.b], groups, source) for c in comparisons]
    family = [others.p for seeds, _, others in compared if len(seeds) > 1]
    corrected = iter(holm(family))
    rows = []
    for comparison, (seeds, in_source, others) in zip(comparisons, compared):
        row = comparison._asdict() | {"seeds": seeds, "verdict": "no seed"}
        if seeds:
            row |= {"source": in_source._asdict(), "others": others._asdict()}
            row["verdict"] = "one seed"
        if len(seeds) > 1:
            row["p_holm"] = float(next(corrected))
            row["verdict"] = verdict(others, row["p_holm"], comparison.way)
        if comparison.number is None:  # a control claims nothing
            words = {"supported": "better", "not supported": "worse"}
            row["verdict"] = words.get(row["verdict"], row["verdict"])
        rows.append(row)
    return rows


def accuracies(outcomes, source):
    """What each system reaches: means over its seeds; `source` is the language's place."""
    rows = []
    for name, by_seed in outcomes.items():
        row = {"name": name, "seeds": sorted(by_seed)}
        if by_seed:
            mean = mean_outcome(by_seed.values())
            languages = mean.right.mean(0)  # (L,)
            row["train"] = mean.train
            row["source"] = float(languages[source])
            row["others"] = float(np.delete(languages, source).mean())
        rows.append(row)
    return rows


def phase_one(folder, split):
    """What a grid says on conclusions 3, 4 and 5, as Markdown lines: mean F1 of the other
    languages' sets, each combination at the rate that the search's own protocol preferred."""
    grid, columns, best = read_grid(folder)
    source, select = best["train_language"], best["select"]
    if not any(c.startswith(f"{split}_") and c != f"{split}_{source}" for c in columns):
        raise UserError(f"{folder} has no {split} scores in another language than {source}")

    selecting = [columns[i] for i in columns_of(columns, source)[select]]
    keys, ranked_by, named, by_pooling = [], [], [], {}
    for (pooling, layers), (lr, entry) in at_best_rate(grid, best).items():
        score = mean_of_others(entry, split, source).mean()
        keys.append((pooling, layers, lr))
        ranked_by.append(np.mean([entry[column] for column in selecting]) / 100)
        named.append(f"{pooling} of {'+'.join(map(str, layers))} at lr {lr:g}, {score:.1f}")
        by_pooling.setdefault(pooling, []).append(score)

    order = rank(keys, ranked_by)
    sizes = [len(layers) for _, layers, _ in keys]
    single = [named[g] for g in order if sizes[g] == 1]
    everything = [named[g] for g in order if sizes[g] == max(sizes)]
    means = ", ".join(f"{pooling} {np.mean(scores):.1f}" for pooling, scores in by_pooling.items())
    lines = [
        f"Phase 1, {folder}, trained on {source}: micro-F1, mean of the other languages' {split} "
        f"sets, without an interval; chosen by the search's protocol `{select}`.\n",
        f"- (3) mean over all combinations: {means}",
        f"- (4) all layers: {everything[0]}",
    ]
    if single:
        lines.append(f"- (4) the single layer chosen: {single[0]}")
    lines.append(f"- (5) the combination chosen: {named[order[0]]}")
    return lines


# --- the report ----------------------------------------------------------------------------------


def percent(value):
    return f"{100 * value:.1f}"


def interval_cell(row, key):
    """+1.2 [+0.3, +2.1], in points."""
    if key not in row:
        return ""
    points = {name: 100 * row[key][name] for name in ("difference", "low", "high")}
    return "{difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**points)


def comparison_table(rows, source):
    header = ["", "conclusion", "A - B", "other languages", source, "seeds", "verdict"]
    cells = []
    for row in rows:
        cells.append(
            [
                row["number"] or "",
                row["words"],
                f"{row['a']} - {row['b']}",
                interval_cell(row, "others"),
                interval_cell(row, "source"),
                len(row["seeds"]),
                row["verdict"],
            ]
        )
    return markdown_table(header, cells)


def accuracy_table(rows, source):
    cells = []
    for row in rows:
        values = [
            percent(row[key]) if row["seeds"] else "" for key in ("train", "source", "others")
        ]
        cells.append([row["name"], len(row["seeds"]), *values])
    return markdown_table(["system", "seeds", "train", source, "other languages"], cells)


def freezing_lines(froze):
    """When each seed of `--freeze-epoch auto` froze, a Markdown line a run."""
    by_run = {}
    for entry in froze:
        if entry["after"] is None:
            when = "never, not counted"
        else:
            when = f"after epoch {entry['after']:g}"
        by_run.setdefault(entry["run"], []).append(f"seed {entry['seed']} {when}")
    return "\n".join(f"- {run}: {', '.join(seeds)}" for run, seeds in by_run.items())


def draws_table(draws, middle):
    cells = []
    for draw in draws:
        layers = " ".join(map(str, draw["layers"]))
        accuracy = percent(draw["others"])
        cells.append([draw["run"], draw["seed"], layers, draw["above_middle"], accuracy])
    return markdown_table(["draw", "seed", "layers", f"above {middle:g}", "other languages"], cells)


def report(result):
    """claims.json's content as Markdown."""
    source, others = result["train_language"], result["others"]
    parts = [
        f"# The paper's conclusions on {result['data']}",
        comparison_table(result["conclusions"], source),
        f"Model {result['model']}, trained on {source}; {result['split']} set, {len(others)} other "
        f"languages: {' '.join(others)}; seeds {' '.join(map(str, result['seeds']))}.",
        f"""\
Differences of accuracy in points with the 95 % interval over rows and seeds (rows of one group are
resampled together); the verdict is on the other languages' mean, after Holm's correction over the
conclusions. Supported: A is better; where A is to gain nothing (upper-layers, mc-bert-deep): the
interval is below {100 * MARGIN:g} point. One seed: the interval is of the rows alone, no verdict.""",
        result["systems_are"],
        "## Accuracies",
        f"""\
Means over the seeds. `train`: on {TRAIN_ROWS:,} of the train rows, dropout off. A system that is low
there has not learned as much as the others: with more steps the differences may be others.""",
        accuracy_table(result["systems"], source),
        "## Controls",
        """\
A control claims nothing: A is better or worse by the same rule, with Holm's correction over the
controls. Of random layers the mean of a seed's draws counts.""",
        comparison_table(result["controls"], source),
    ]
    if result["froze"]:
        parts.append("When `--freeze-epoch auto` froze:")
        parts.append(freezing_lines(result["froze"]))
    if result["draws"]:
        parts.append("The random layers of each seed, and how many of them lie above the middle:")
        parts.append(draws_table(result["draws"], result["middle"]))
    if result["phase_one"]:
        parts.append("\n".join(result["phase_one"]))
    return "\n\n".join(parts) + "\n"


def describe_systems(recipe):
    """A paragraph on what the systems are."""
    flags = systems(recipe)
    middle, upper = flags["middle-layer"][1], flags["upper-layers"][1]
    layers, frozen = (" ".join(map(str, k)) for k in (recipe.layers, recipe.freeze_layers))
    return f"""\
- baseline: BERT's own [CLS] head; last-layer, middle-layer, upper-layers: {recipe.pooling} pooling
  of layer {recipe.top}, {middle}, {upper} to {recipe.top}
- mc-bert: {recipe.pooling} pooling of layers {layers}, {recipe.epochs} epochs; -long:
  {2 * recipe.epochs} epochs at a constant rate; -deep: a hidden layer of {recipe.hidden}
- mc-bert-wf: layers {frozen} frozen, --freeze-epoch {recipe.freeze_epoch}
- A run counts at its last epoch; @half: after half of them; @mean: the mean of the weights after each"""


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Flags not named here go to every train.py: --lr 5e-4, --max-train-rows 1000, ...",
    )
    parser.add_argument("--model", required=True, help="encoder: hub name or folder")
    parser.add_argument("--data", required=True, help="data set folder, its languages parallel")
    parser.add_argument("--out", required=True, help="folder for the runs and claims.md")
    parser.add_argument("--grid", help="grid folder, to add what phase 1 says")
    parser.add_argument(
        "--controls",
        nargs="*",
        metavar="NAME",
        help="also freeze at other epochs, or other layers; pool random layers; mix them (default: "
        "none; without a name: all)",
    )
    parser.add_argument(
        "--train-language",
        metavar="LANG",
        help="source language (default: en, or the only one there is)",
    )
    parser.add_argument(
        "--split", choices=["dev", "test"], default="test", help="to compare on (default: test)"
    )
    parser.add_argument(
        "--max-rows",
        type=in_range(int, 1),
        metavar="N",
        help="compare on N rows of each file, spread evenly (default: all)",
    )
    parser.add_argument(
        "--drop-models",
        action="store_true",
        help="delete each run's weights once its predictions are "
        "saved (epochs/ and resume/: several times the encoder's size a run): "
        "then no other --split or --max-rows can be had of it",
    )
    parser.add_argument(
        "--seeds", type=in_range(int, 1), default=3, help="runs of each system (default: 3)"
    )
    parser.add_argument(
        "--first-seed",
        type=in_range(int, 0),
        default=0,
        metavar="S",
        help="seeds S, S + 1, ...: several calls can share the work, and a last one over all seeds "
        "trains nothing (default: 0)",
    )
    parser.add_argument(
        "--epochs",
        type=in_range(int, 1),
        default=5,
        help="passes over the train rows; twice as many for conclusion 1 (default: 5)",
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[6, 8, 11], help="(default: 6 8 11)"
    )
    parser.add_argument("--pooling", choices=list(POOLINGS), default="max", help="(default: max)")
    parser.add_argument(
        "--freeze-layers", type=int, nargs="+", default=[9, 11, 12], help="(default: 9 11 12)"
    )
    parser.add_argument("--freeze-epoch", default="2", help="(default: 2)")
    parser.add_argument(
        "--hidden",
        type=in_range(int, 1),
        default=256,
        help="units of the deeper classifier (default: 256)",
    )
    parser.add_argument(
        "--batch-size",
        type=in_range(int, 1),
        default=32,
        help="rows an optimizer step (default: 32)",
    )
    args, more = parser.parse_known_args(argv)
    if any(flag.partition("=")[0] == "--seed" for flag in more):
        parser.error(
            "--seed: each system is trained with seeds 0, 1, ...; --seeds says how many, --first-seed which"
        )
    if args.freeze_epoch != "auto" and not (
        args.freeze_epoch.isdecimal() and int(args.freeze_epoch) < args.epochs
    ):
        parser.error(
            f"--freeze-epoch {args.freeze_epoch}: expected 0 to {args.epochs - 1} (of --epochs), or auto"
        )
    return args, more


def read_data(folder, split, source, max_rows):
    """The Data to compare on. UserError where the languages' rows are no translations."""
    languages = paper_order(split_languages(folder, split))
    if source not in languages or len(languages) < 2:
        raise UserError(
            f"{folder}: {split} is needed in {source} and in another language, it is there in: "
            f"{' '.join(languages)}"
        )
    keys = [("train", source), *((split, language) for language in languages)]
    rows = read_sets(folder, keys, read_labels(folder))
    sets = {language: take(rows[split, language], max_rows) for language in languages}
    if not parallel(sets):
        raise UserError(
            f"{folder}: the {split} rows of {' '.join(languages)} are no translations of each "
            "other, and the verdicts are on the languages' mean, row by row (evaluate.py compares "
            "systems language by language)"
        )
    return Data(folder, split, source, sets, rows["train", source])


def wanted_controls(recipe, seed, names):
    """The controls of --controls, {name: Control}: none for None, all for an empty list."""
    if names is None:
        return {}
    every = controls(recipe, seed)
    for name in names:
        if name not in every:
            raise UserError(f"--controls {name}: they are {' '.join(every)}")
    return {name: every[name] for name in names or every}


def main(argv=None):
    args, more = parse_args(argv)
    out, source = Path(args.out), train_language(args.data, args.train_language)
    data = read_data(args.data, args.split, source, args.max_rows)
    searched = phase_one(args.grid, args.split) if args.grid else []
    top = len(blocks(load_encoder(args.model)[0]))
    check_layers(args.layers, top, "--layers")
    check_layers(args.freeze_layers, top, "--freeze-layers")
    freezing = args.freeze_layers, args.freeze_epoch
    recipe = Recipe(top, args.layers, args.pooling, *freezing, args.hidden, args.epochs)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    added = {seed: wanted_controls(recipe, seed, args.controls) for seed in seeds}

    # Train what is not there yet, and measure it
    runs = []
    always = ["--model", args.model, "--data", args.data, "--train-language", source]
    always += ["--epochs", args.epochs, "--batch-size", args.batch_size, *more]
    for seed in seeds:
        planned = [(name, name, flags) for name, flags in systems(recipe).items()]
        for system, control in added[seed].items():
            planned += [(system, name, flags) for name, flags in control.runs.items()]
        for system, name, flags in planned:
            print(f"\n== {name}, seed {seed} ==")
            folder = out / "runs" / f"{name}-seed{seed}"
            command = [*always, "--out", folder, "--seed", seed, *flags]
            status = train.main(list(map(str, command)))
            if status:  # stopped by a signal
                return status
            runs.append(read_outcome(folder, system, name, seed, data, args.batch_size))
            if args.drop_models:
                shutil.rmtree(folder / "epochs", ignore_errors=True)
                shutil.rmtree(folder / "resume", ignore_errors=True)

    # Compare
    outcomes, place = by_system(runs), list(data.sets).index(source)
    groups = group_numbers(data.sets[source])
    compared = list(CONTROLS)
    for system, control in added[seeds[0]].items():
        compared += [Comparison(None, control.what, system, other) for other in control.against]
    result = {
        "data": args.data,
        "model": args.model,
        "split": args.split,
        "seeds": list(seeds),
        "train_language": source,
        "others": [language for language in data.sets if language != source],
        "systems_are": describe_systems(recipe),
        "conclusions": judge(CONCLUSIONS, outcomes, groups, place),
        "controls": judge(compared, outcomes, groups, place),
        "systems": accuracies(outcomes, place),
        "froze": [],
        "draws": [],
        "middle": top / 2,
        "phase_one": searched,
    }
    for run in runs:
        if run.arguments["freeze_epoch"] == "auto":
            entry = {"run": run.name, "seed": run.seed, "after": run.frozen_after}
            result["froze"].append(entry)
        if run.name != run.system:
            layers = run.arguments["freeze_layers"] or run.arguments["layers"]
            others = np.delete(run.outcomes["last"].right, place, axis=1).mean()
            entry = {"run": run.name, "seed": run.seed, "layers": layers}
            entry["above_middle"] = sum(layer > top / 2 for layer in layers)
            result["draws"].append(entry | {"others": float(others)})
    write_json(out / "claims.json", result)
    text = report(result)
    with write_atomic(out / "claims.md") as file:
        file.write(text)
    print(f"\n{text}\nwritten to {out}/claims.md")
    return 0


if __name__ == "__main__":
    cli(main)
