"""The paper's eight conclusions, each tested: train what must be compared, and say what the
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
from evaluate import Split, run_logits
from lib.encoders import blocks, check_layers, load_encoder
from lib.folders import read_run, write_atomic, write_json
from lib.messages import UserError, cli, in_range, make_parser
from lib.scores import columns_of, ranked, read_grid
from lib.significance import MARGIN, holm, intervals, parallel, verdict
from lib.tables import markdown_table, paper_order
from model import POOLINGS

DRAWS = 3  # of random layers, for each seed
TRAIN_ROWS = 1000  # that train accuracy is measured on


# --- what is trained ------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """The paper's system, of which all others change one thing."""

    top: int  # the encoder's last layer
    layers: list
    pooling: str
    freeze_layers: list
    freeze_epoch: str  # a number, or auto
    hidden: int  # units of the deeper classifier
    epochs: int

    def pooled(self, layers):
        """Flags of train.py that pool these layers."""
        return ["--layers", *layers, "--pooling", self.pooling]

    def frozen(self, layers, epoch):
        """Flags of train.py for MC-BERT with these layers frozen."""
        freezing = ["--freeze-layers", *layers, "--freeze-epoch", epoch]
        return self.pooled(self.layers) + freezing


def systems(recipe):
    """The runs that the conclusions need: {name: flags of train.py}.

    Of 12 layers the middle one is layer 8, and layers 5 to 12 are those of the search.
    """
    top, chosen = recipe.top, recipe.pooled(recipe.layers)
    upper = range(max(0, top // 2 - 1), top + 1)
    longer = ["--epochs", 2 * recipe.epochs, "--schedule", "constant", "--keep-all"]
    return {
        "baseline": ["--head", "pooler"],
        "last-layer": recipe.pooled([top]),
        "middle-layer": recipe.pooled([2 * top // 3]),
        "upper-layers": recipe.pooled(upper),
        "mc-bert": chosen,
        "mc-bert-long": chosen + longer,
        "mc-bert-mean": ["--layers", *recipe.layers, "--pooling", "mean"],
        "mc-bert-cls": ["--layers", *recipe.layers, "--pooling", "cls"],
        "mc-bert-wf": recipe.frozen(recipe.freeze_layers, recipe.freeze_epoch),
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
    """The runs of --controls: {name: Control}.

    Freezing in another way stands beside the paper's way, and beside not freezing at all.
    """
    top, frozen, when = recipe.top, recipe.freeze_layers, recipe.freeze_epoch
    either = ["mc-bert-wf", "mc-bert"]
    every = {}

    # frozen at another time
    for epoch in ("1", "3", "auto"):
        if epoch == when or (epoch != "auto" and int(epoch) >= recipe.epochs):
            continue
        what = f"frozen after epoch {epoch}"
        if epoch == "auto":
            what = "frozen at the first fall on joint dev"
        name = f"wf-epoch-{epoch}"
        every[name] = Control(what, either, {name: recipe.frozen(frozen, epoch)})

    # other layers
    low = range(top // 2 + 1)
    what = f"embeddings and lowest {top // 2} frozen instead"
    every["wf-lowest"] = Control(what, either, {"wf-lowest": recipe.frozen(low, when)})
    random_frozen, random_pooled = {}, {}
    for draw in range(DRAWS):
        layers = draw_layers(top, len(recipe.layers), seed, 0, draw)
        random_pooled[f"random-layers-{draw + 1}"] = recipe.pooled(layers)
        layers = draw_layers(top, len(frozen), seed, 1, draw)
        random_frozen[f"wf-random-{draw + 1}"] = recipe.frozen(layers, when)
    what = f"{len(frozen)} random layers frozen instead"
    every["wf-random"] = Control(what, either, random_frozen)
    what = f"{len(recipe.layers)} random layers pooled instead"
    every["random-layers"] = Control(what, ["mc-bert"], random_pooled)

    mixed = [*recipe.pooled(recipe.layers), "--combine", "mix"]
    what = "layers mixed, not side by side"
    every["mc-bert-mix"] = Control(what, ["mc-bert"], {"mc-bert-mix": mixed})
    return every


def plan(recipe, added):
    """All runs of a seed, (system, name, flags of train.py); added: {name: Control}."""
    planned = [(name, name, flags) for name, flags in systems(recipe).items()]
    for system, control in added.items():
        planned += [(system, name, flags) for name, flags in control.runs.items()]
    return planned


# --- what is compared -----------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Two systems, and what is claimed of them."""

    number: int | None  # of the paper's conclusions; None: a control
    claim: str
    a: str  # counts at its last epoch; NAME@half: after half of them; NAME@mean: the mean of all
    b: str
    way: str = "better"  # A is better; "no gain": A is not better by MARGIN


CONCLUSIONS = [
    Comparison(1, "longer fine-tuning hurts the others", "mc-bert-long@half", "mc-bert-long"),
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
CONTROLS = [  # which need no runs of their own
    Comparison(None, "mean of the epochs, not the last", "mc-bert@mean", "mc-bert"),
    Comparison(None, "the same after long training", "mc-bert-long@mean", "mc-bert-long"),
    Comparison(None, "freezing, or the mean of the epochs", "mc-bert-wf", "mc-bert@mean"),
]
MORE_EPOCHS = {"mc-bert": ["mean"], "mc-bert-long": ["half", "mean"]}  # beside the last


class Outcome(NamedTuple):
    """What a run, or the mean of several draws, reaches in one seed."""

    right: np.ndarray  # (N, L), whether each row is right in each language
    train: float  # accuracy on train rows


class Run(NamedTuple):
    """A run, and what came of it."""

    system: str  # its name, or that of the control of which it is a draw
    name: str
    arguments: dict  # flags of train.py
    frozen_after: float | None  # epochs done when layers froze; None: they never did
    outcomes: dict  # {last, half, mean: Outcome}

    @property
    def seed(self):
        return self.arguments["seed"]

    @property
    def counts(self):
        """A run that was to freeze and never did is no frozen run."""
        return self.frozen_after is not None or not self.arguments["freeze_layers"]


def is_right(folder, epoch, split, batch_size):
    """Whether a run's model after `epoch` is right on the rows of a Split: (N, L)."""
    logits = run_logits(folder, dict.fromkeys(split.rows, epoch), split, batch_size)
    columns = []
    for language, rows in split.rows.items():
        columns.append(logits[language].argmax(1) == rows.labels)  # (N, C) -> (N,)
    return np.stack(columns, axis=1).astype(float)


def frozen_after(metrics):
    """How many epochs were done when layers froze, by the rows of metrics.jsonl; None: never."""
    before = [row["epoch"] for row in metrics if not row["frozen_layers"]]
    if len(before) == len(metrics):
        return None
    return max(before, default=0)


def read_outcomes(folder, system, name, split, train_rows, batch_size):
    """The Run of a finished folder. split: what is compared on; train_rows: of the source language.

    Train accuracy: dropout off, on rows spread evenly over those trained on.
    """
    about, metrics = read_run(folder)
    if not about["complete"]:
        raise UserError(f"{folder} is not finished: give the same command again")
    arguments = about["arguments"]
    last, source = arguments["epochs"], arguments["train_language"]
    sample = take(take(train_rows, arguments["max_train_rows"]), TRAIN_ROWS)
    train_split = Split(split.folder, "train", {source: sample})
    outcomes = {}
    for which in ["last", *MORE_EPOCHS.get(name, [])]:
        epoch = {"last": last, "half": last // 2, "mean": "mean"}[which]
        right = is_right(folder, epoch, split, batch_size)
        in_train = is_right(folder, epoch, train_split, batch_size)
        outcomes[which] = Outcome(right, float(in_train.mean()))
    return Run(system, name, arguments, frozen_after(metrics), outcomes)


def mean_outcome(outcomes):
    right = np.mean([outcome.right for outcome in outcomes], axis=0)
    return Outcome(right, float(np.mean([outcome.train for outcome in outcomes])))


def by_system(runs):
    """{system or system@epoch: {seed: Outcome}}: of the runs that count, the mean of the draws."""
    gathered = {}
    for run in runs:
        for which, outcome in run.outcomes.items():
            name = run.system
            if which != "last":
                name += f"@{which}"
            seeds = gathered.setdefault(name, {})
            if run.counts:
                seeds.setdefault(run.seed, []).append(outcome)
    for seeds in gathered.values():
        for seed, draws in seeds.items():
            seeds[seed] = mean_outcome(draws)
    return gathered


def compare(a, b, groups, source):
    """A - B, {seed: Outcome} each, in the seeds that both have: the seeds, and an Interval of the
    source language and one of the mean of the others (None without a seed).

    groups (N,): rows to resample together; source: the language's place.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return seeds, None, None
    difference = np.stack([a[seed].right - b[seed].right for seed in seeds])  # (S, N, L)
    others = np.delete(difference, source, axis=2).mean(2)  # (S, N)
    both = np.stack([difference[:, :, source], others], axis=2)  # (S, N, 2)
    return seeds, *intervals(both, groups)


def no_gain_p(a, b, groups, source):
    """The p-value of A - B - MARGIN: of the claim that A gains nothing over B."""
    less = {seed: outcome._replace(right=outcome.right - MARGIN) for seed, outcome in a.items()}
    return compare(less, b, groups, source)[2].p


def judge(comparisons, outcomes, groups, source):
    """What claims.json says of a family of Comparisons: Holm's correction is over all of them.

    outcomes: {system: {seed: Outcome}}. One seed has an interval of the rows and no verdict.
    """
    compared = [compare(outcomes[c.a], outcomes[c.b], groups, source) for c in comparisons]
    p_values = []
    for c, (seeds, _, others) in zip(comparisons, compared):
        if len(seeds) > 1 and c.way == "no gain":
            p_values.append(no_gain_p(outcomes[c.a], outcomes[c.b], groups, source))
        elif len(seeds) > 1:
            p_values.append(others.p)
    corrected = iter(holm(p_values))
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
    for name, seeds in outcomes.items():
        row = {"name": name, "seeds": sorted(seeds)}
        if seeds:
            mean = mean_outcome(seeds.values())
            languages = mean.right.mean(0)  # (N, L) -> (L,)
            row["train"] = mean.train
            row["source"] = float(languages[source])
            row["others"] = float(np.delete(languages, source).mean())
        rows.append(row)
    return rows


def what_happened(runs, top, source):
    """When each run of --freeze-epoch auto froze, and which layers were drawn at random: two lists
    of what claims.json says of them. top: the last layer; source: the language's place."""
    froze, draws = [], []
    for run in runs:
        entry = {"run": run.name, "seed": run.seed}
        if run.arguments["freeze_epoch"] == "auto":
            froze.append(entry | {"after": run.frozen_after})
        if run.name != run.system:
            layers = run.arguments["freeze_layers"] or run.arguments["layers"]
            above = sum(layer > top / 2 for layer in layers)
            others = np.delete(run.outcomes["last"].right, source, axis=1).mean()
            entry |= {"layers": layers, "above_middle": above, "others": float(others)}
            draws.append(entry)
    return froze, draws


def phase_one(folder, split):
    """What a grid says on conclusions 3, 4 and 5, as Markdown lines: mean F1 of the other
    languages' sets, each combination at the rate that the search's own protocol preferred."""
    results, best = read_grid(folder)
    source, select = results.source, best["select"]
    others = columns_of(results.columns, source).get({"dev": "joint", "test": "test"}[split])
    if others is None:
        raise UserError(f"{folder} has no {split} scores in another language than {source}")

    order, named, by_pooling = ranked(results, select), {}, {}
    for g in sorted(order):
        pooling, layers, lr = results.keys[g]
        score = 100 * results.micro[g][:, others].mean()
        named[g] = f"{pooling} of {'+'.join(map(str, layers))} at lr {lr:g}, {score:.1f}"
        by_pooling.setdefault(pooling, []).append(score)

    sizes = [len(layers) for _, layers, _ in results.keys]
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
    return "\n".join(lines)


# --- the report -----------------------------------------------------------------------------------


def interval_cell(row, key):
    """+1.2 [+0.3, +2.1], in points."""
    if key not in row:
        return ""
    difference, low, high = (100 * row[key][name] for name in ("difference", "low", "high"))
    return f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def comparison_table(rows, source):
    cells = []
    for row in rows:
        claim = row["claim"]
        if row["number"]:
            claim = f"{row['number']}: {claim}"
        pair = f"{row['a']} - {row['b']}"
        points = interval_cell(row, "others"), interval_cell(row, "source")
        cells.append([claim, pair, *points, len(row["seeds"]), row["verdict"]])
    header = ["", "A - B", "other languages", source, "seeds", "verdict"]
    return markdown_table(header, cells)


def accuracy_table(rows, source):
    cells = []
    for row in rows:
        scores = [f"{100 * row[key]:.1f}" for key in ("train", "source", "others") if key in row]
        cells.append([row["name"], len(row["seeds"]), *(scores or ["", "", ""])])
    return markdown_table(["system", "seeds", "train", source, "other languages"], cells)


def freezing_lines(froze):
    """When each seed froze, a Markdown line a run."""
    by_run = {}
    for entry in froze:
        when = "never, not counted"
        if entry["after"] is not None:
            when = f"after epoch {entry['after']:g}"
        by_run.setdefault(entry["run"], []).append(f"seed {entry['seed']} {when}")
    return "\n".join(f"- {run}: {'; '.join(seeds)}" for run, seeds in by_run.items())


def draws_table(draws):
    cells = []
    for draw in draws:
        layers = " ".join(map(str, draw["layers"]))
        accuracy = f"{100 * draw['others']:.1f}"
        cells.append([draw["run"], draw["seed"], layers, draw["above_middle"], accuracy])
    return markdown_table(["draw", "seed", "layers", "above", "other languages"], cells)


def describe_systems(recipe):
    """What the systems are, as Markdown lines."""
    flags = systems(recipe)
    middle, lowest = flags["middle-layer"][1], flags["upper-layers"][1]
    layers = " ".join(map(str, recipe.layers))
    frozen = " ".join(map(str, recipe.freeze_layers))
    return f"""\
- baseline: BERT's own [CLS] head
- last-layer, middle-layer, upper-layers: {recipe.pooling} pooling of layer {recipe.top}, {middle},
  {lowest} to {recipe.top}
- mc-bert: {recipe.pooling} pooling of layers {layers}, {recipe.epochs} epochs; -long:
  {2 * recipe.epochs} epochs at a constant rate; -deep: a hidden layer of {recipe.hidden}
- mc-bert-wf: layers {frozen} frozen, --freeze-epoch {recipe.freeze_epoch}
- a run counts at its last epoch; @half: after half of them; @mean: the mean of the weights after
  each"""


def report(result):
    """claims.json's content as Markdown."""
    source = result["train_language"]
    text = f"""\
# The paper's conclusions on {result["data"]}

{comparison_table(result["conclusions"], source)}

Model {result["model"]}, trained on {source}; {result["split"]} set; other languages: \
{" ".join(result["others"])}; seeds {" ".join(map(str, result["seeds"]))}.

Differences of accuracy in points with the 95 % interval over rows and seeds (rows of one group are
resampled together); the verdict is on the other languages' mean, after Holm's correction over the
conclusions. Supported: A is better; where A is to gain nothing (upper-layers, mc-bert-deep): the
interval is below {100 * MARGIN:g} point. One seed: the interval is of the rows alone, no verdict.

{result["meaning"]}

## Accuracies

Means over the seeds. `train`: on up to {TRAIN_ROWS:,} of the rows trained on, dropout off. A system
that is low there has not learned as much as the others: with more steps the differences may be
others.

{accuracy_table(result["systems"], source)}

## Controls

A control claims nothing: A is better or worse by the same rule, with Holm's correction over the
controls. Of random layers the mean of a seed's draws counts.

{comparison_table(result["controls"], source)}
"""
    if result["froze"]:
        text += f"\nWhen `--freeze-epoch auto` froze:\n\n{freezing_lines(result['froze'])}\n"
    if result["draws"]:
        text += f"""
The random layers, and how many of them lie above the middle:

{draws_table(result["draws"])}
"""
    if result["phase_one"]:
        text += f"\n{result['phase_one']}\n"
    return text


def share(text):
    """An argparse type: "2/15" -> (2, 15)."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected 1/N to N/N, got {text}")
    return int(number), int(count)


def parse_args(argv):
    parser = make_parser(
        __doc__,
        epilog="Flags not named here go to every train.py: --lr 5e-4, --max-train-rows 1000, ...",
    )
    positive = in_range(int, 1)
    add = parser.add_argument
    add("--model", required=True, help="encoder: hub name or folder")
    add("--data", required=True, help="data set folder, its languages parallel")
    add("--out", required=True, help="folder for the runs and claims.md")
    add("--grid", help="grid folder, to add what phase 1 says")
    add(
        "--controls",
        nargs="*",
        metavar="NAME",
        help="also freeze at other epochs, or other layers; pool random layers; mix them (default: "
        "none; without a name: all)",
    )
    add(
        "--train-language",
        metavar="LANG",
        help="source language (default: en, or the only one there is)",
    )
    add("--split", choices=["dev", "test"], default="test", help="to compare on (default: test)")
    add(
        "--max-rows",
        type=positive,
        metavar="N",
        help="compare on N rows of each file, spread evenly (default: all)",
    )
    add(
        "--drop-models",
        action="store_true",
        help="delete each run's weights once its predictions are saved (epochs/ and resume/: "
        "several times the encoder's size a run): then no other --split or --max-rows can be had",
    )
    add("--seeds", type=positive, default=3, help="runs of each system (default: 3)")
    add(
        "--share",
        type=share,
        metavar="I/N",
        help="only train and measure every Nth run, from the Ith: N calls, I from 1 to N, share "
        "the work, and one without --share then writes the tables",
    )
    add(
        "--epochs",
        type=positive,
        default=5,
        help="passes over the train rows; twice as many for conclusion 1 (default: 5)",
    )
    add("--layers", type=int, nargs="+", default=[6, 8, 11], help="(default: 6 8 11)")
    add("--pooling", choices=list(POOLINGS), default="max", help="(default: max)")
    add("--freeze-layers", type=int, nargs="+", default=[9, 11, 12], help="(default: 9 11 12)")
    add("--freeze-epoch", metavar="N|auto", default="2", help="(default: 2)")
    add(
        "--hidden",
        type=positive,
        default=256,
        help="units of the deeper classifier (default: 256)",
    )
    add("--batch-size", type=positive, default=32, help="rows an optimizer step (default: 32)")
    args, more = parser.parse_known_args(argv)
    if any(flag.partition("=")[0] == "--seed" for flag in more):
        parser.error("--seed: each system is trained with seeds 0, 1, ...; --seeds says how many")
    number = args.freeze_epoch.isdecimal() and int(args.freeze_epoch) < args.epochs
    if args.freeze_epoch != "auto" and not number:
        parser.error(
            f"--freeze-epoch {args.freeze_epoch}: expected 0 to {args.epochs - 1} (of --epochs), "
            "or auto"
        )
    return args, more


def read_data(folder, name, source, max_rows):
    """The Split to compare on, and the Rows that were trained on. UserError where the languages'
    rows are no translations."""
    languages = paper_order(split_languages(folder, name))
    if source not in languages or len(languages) < 2:
        raise UserError(
            f"{folder}: {name} is needed in {source} and in another language, it is there in: "
            f"{' '.join(languages)}"
        )
    keys = [("train", source), *((name, language) for language in languages)]
    sets = read_sets(folder, keys, read_labels(folder))
    rows = {language: take(sets[name, language], max_rows) for language in languages}
    if not parallel(rows):
        raise UserError(
            f"{folder}: the {name} rows of {' '.join(languages)} are no translations of each other,"
            " and the verdicts are on the languages' mean, row by row (evaluate.py compares systems"
            " language by language)"
        )
    return Split(folder, name, rows), sets["train", source]


def choose_controls(recipe, seed, names):
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
    split, train_rows = read_data(args.data, args.split, source, args.max_rows)
    searched = phase_one(args.grid, args.split) if args.grid else None
    top = len(blocks(load_encoder(args.model)[0]))
    check_layers(args.layers, top, "--layers")
    check_layers(args.freeze_layers, top, "--freeze-layers")
    freezing = args.freeze_layers, args.freeze_epoch
    recipe = Recipe(top, args.layers, args.pooling, *freezing, args.hidden, args.epochs)
    seeds = range(args.seeds)
    added = {seed: choose_controls(recipe, seed, args.controls) for seed in seeds}

    # train what is not there yet, and measure it
    runs = []
    always = ["--model", args.model, "--data", args.data, "--train-language", source]
    always += ["--epochs", args.epochs, "--batch-size", args.batch_size, *more]
    planned = [(seed, *run) for seed in seeds for run in plan(recipe, added[seed])]
    first, step = args.share or (1, 1)
    for seed, system, name, flags in planned[first - 1 :: step]:
        print(f"\n== {name}, seed {seed} ==")
        folder = out / "runs" / f"{name}-seed{seed}"
        command = [*always, "--out", folder, "--seed", seed, *flags]
        status = train.main([str(part) for part in command])
        if status:  # stopped by a signal
            return status
        runs.append(read_outcomes(folder, system, name, split, train_rows, args.batch_size))
        if args.drop_models:
            shutil.rmtree(folder / "epochs", ignore_errors=True)
            shutil.rmtree(folder / "resume", ignore_errors=True)
    if args.share:
        print(f"\n{len(runs)} of {len(planned)} runs are there: share {first} of {step}")
        return 0

    # compare
    place = list(split.rows).index(source)
    groups = group_numbers(split.rows[source])
    outcomes = by_system(runs)
    compared = list(CONTROLS)
    for system, control in added[seeds[0]].items():
        compared += [Comparison(None, control.what, system, other) for other in control.against]
    froze, draws = what_happened(runs, top, place)
    result = {
        "data": args.data,
        "model": args.model,
        "split": args.split,
        "seeds": list(seeds),
        "train_language": source,
        "others": [language for language in split.rows if language != source],
        "meaning": describe_systems(recipe),
        "conclusions": judge(CONCLUSIONS, outcomes, groups, place),
        "controls": judge(compared, outcomes, groups, place),
        "systems": accuracies(outcomes, place),
        "froze": froze,
        "draws": draws,
        "phase_one": searched,
    }
    text = report(result)
    write_json(out / "claims.json", result)
    with write_atomic(out / "claims.md") as file:
        file.write(text)
    print(f"\n{text}\nwritten to {out}/claims.md")
    return 0


if __name__ == "__main__":
    cli(main)
