"""The paper's eight conclusions, each tested: fine-tune what must be compared, and say what the difference is worth.

    make claims DATA=data/xnli MODEL=bert-base-multilingual-uncased OUT=claims/xnli
    python -m experiments.claims --model sample/model --data sample/intents14 --out claims/sample --lr 2e-4 --controls

Reads   the encoder and a data set folder; with --grid a grid folder of grid_search.py, for what phase 1 says.
Writes  OUT/runs/NAME-seedS/ (run folders of train.py: a stopped call goes on, a second one trains nothing),
        OUT/claims.json and OUT/claims.md: for each conclusion what was compared, the difference with its 95 % interval,
        and the verdict.
Paper   section 1.9.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

import train
from data import read_labels, read_sets, split_languages, take, train_language
from evaluate import run_logits
from lib.encoders import blocks, check_layers, load_encoder
from lib.folders import read_grid, read_run, write_atomic, write_json
from lib.messages import UserError, cli, in_range
from lib.scores import at_best_rate, choose_epochs, mean_of_others
from lib.significance import bootstrap_difference, parallel, premise_clusters
from lib.tables import markdown_table, paper_order
from model import POOLINGS

MARGIN = 0.01  # "does not help" means: helps by less than this, with 95 % confidence


def systems(top, layers, pooling, freeze, freeze_epoch, hidden, epochs):
    """The runs that the conclusions need, {name: flags of train.py}; all but the named thing is the paper's recipe.

    top: the encoder's last layer. Of 12 blocks the middle one is layer 8, and layers 5 to 12 are those of the search.
    """
    chosen = ["--layers", *layers, "--pooling", pooling]
    return {
        "baseline": ["--head", "pooler"],
        "last-layer": ["--layers", top, "--pooling", pooling],
        "middle-layer": ["--layers", 2 * top // 3, "--pooling", pooling],
        "upper-layers": ["--layers", *range(max(0, top // 2 - 1), top + 1), "--pooling", pooling],
        "mc-bert": chosen,
        "mc-bert-long": [*chosen, "--epochs", 2 * epochs, "--schedule", "constant", "--keep-all"],
        "mc-bert-mean": ["--layers", *layers, "--pooling", "mean"],
        "mc-bert-cls": ["--layers", *layers, "--pooling", "cls"],
        "mc-bert-wf": [*chosen, "--freeze-layers", *freeze, "--freeze-epoch", freeze_epoch],
        "mc-bert-no-dropout": [*chosen, "--dropout", 0, "--encoder-dropout", 0],
        "mc-bert-deep": [*chosen, "--hidden", hidden],
    }


def controls(top, layers, pooling, freeze, freeze_epoch, epochs, seed):
    """The runs of --controls, {name: (flags of train.py, what it is, the system to compare with)}."""
    chosen = ["--layers", *layers, "--pooling", pooling]
    pooled, frozen = (
        sorted((1 + np.random.default_rng([seed, i]).permutation(top)[: len(drawn)]).tolist())
        for i, drawn in enumerate((layers, freeze))
    )  # other layers for each seed
    found = {
        f"wf-epoch-{n}": (
            [*chosen, "--freeze-layers", *freeze, "--freeze-epoch", n],
            what,
            "mc-bert-wf",
        )
        for n, what in (
            (1, "frozen after 1 epoch"),
            (3, "frozen after 3 epochs"),
            ("auto", "frozen at the first fall on joint dev"),
        )
        if str(n) != freeze_epoch and (n == "auto" or n < epochs)
    }
    for name, instead, what in (
        ("wf-lowest", range(top // 2 + 1), f"embeddings and lowest {top // 2} frozen instead"),
        ("wf-random", frozen, f"{len(freeze)} random layers frozen instead"),
    ):
        found[name] = (
            [*chosen, "--freeze-layers", *instead, "--freeze-epoch", freeze_epoch],
            what,
            "mc-bert-wf",
        )
    found["random-layers"] = (
        ["--layers", *pooled, "--pooling", pooling],
        f"{len(layers)} random layers pooled instead",
        "mc-bert",
    )
    found["mc-bert-mix"] = (
        [*chosen, "--combine", "mix"],
        "layers mixed, not side by side",
        "mc-bert",
    )
    return found


# (number, the paper's words, A, B, which way): A - B > 0 is the claim; "no gain": A is at most MARGIN better than B
CONCLUSIONS = [
    (
        1,
        "longer fine-tuning hurts the other languages",
        "mc-bert-long@half",
        "mc-bert-long",
        "better",
    ),
    (1, "control: mean of the epochs, not the last", "mc-bert@mean", "mc-bert", "control"),
    (1, "control: the same, trained for long", "mc-bert-long@mean", "mc-bert-long", "control"),
    (2, "more hidden states beat the [CLS] head", "mc-bert", "baseline", "better"),
    (3, "max pooling beats mean", "mc-bert", "mc-bert-mean", "better"),
    (3, "max pooling beats [CLS]", "mc-bert", "mc-bert-cls", "better"),
    (4, "not all layers are needed", "upper-layers", "mc-bert", "no gain"),
    (4, "a middle layer beats the last", "middle-layer", "last-layer", "better"),
    (5, "combining layers helps", "mc-bert", "middle-layer", "better"),
    (5, "combining layers beats the last one", "mc-bert", "last-layer", "better"),
    (6, "freezing on the go helps", "mc-bert-wf", "mc-bert", "better"),
    (6, "control: freezing, or the mean of the epochs", "mc-bert-wf", "mc-bert@mean", "control"),
    (7, "dropout is needed", "mc-bert", "mc-bert-no-dropout", "better"),
    (8, "a deeper classifier does not help", "mc-bert-deep", "mc-bert", "no gain"),
]


def verdict(low, high, by_seed, way):
    """supported, not supported or undecided, from an interval of A - B and its value for each seed.

    "better": supported when the interval is above 0 and so is every seed; not supported when both are below.
    "no gain": supported when the interval is below MARGIN; not supported when it is above 0 and so is every seed.
    """
    if way == "no gain":
        return (
            "supported"
            if high < MARGIN
            else "not supported"
            if low > 0 and min(by_seed) > 0
            else "undecided"
        )
    if low > 0 and min(by_seed) > 0:
        return "supported"
    return "not supported" if high < 0 and max(by_seed) < 0 else "undecided"


WORDS = {
    "supported": "better",
    "not supported": "worse",
    "undecided": "undecided",
}  # a control claims nothing


def phase_one(folder, split):
    """What a grid says on conclusions 3, 4 and 5, as Markdown lines: mean F1 of the other languages' sets, each
    combination at the learning rate that the search preferred."""
    grid, columns, best = read_grid(folder)
    source = best["train_language"]
    if not any(
        column.startswith(f"{split}_") and column != f"{split}_{source}" for column in columns
    ):
        raise UserError(f"{folder} has no {split} scores in another language than {source}")
    at_best = at_best_rate(grid, best)
    scores = {
        key: mean_of_others(entry, split, source).mean() for key, (_, entry) in at_best.items()
    }
    poolings = {
        p: np.mean([s for (pooling, _), s in scores.items() if pooling == p])
        for p in dict.fromkeys(p for p, _ in scores)
    }
    single = {key: s for key, s in scores.items() if len(key[1]) == 1}
    most = max(len(layers) for _, layers in scores)
    everything = {key: s for key, s in scores.items() if len(key[1]) == most}

    def top(some):
        pooling, layers = key = max(some, key=some.get)
        return (
            f"{pooling} of {'+'.join(map(str, layers))} at lr {at_best[key][0]:g}, {some[key]:.1f}"
        )

    return [
        f"Phase 1, {folder}, trained on {source}: micro-F1, mean of the other languages' {split} sets\n",
        f"- (3) mean over all combinations: {', '.join(f'{p} {s:.1f}' for p, s in poolings.items())}",
        f"- (4) best single layer: {top(single)}; all layers: {top(everything)}"
        if single
        else f"- (4) all layers: {top(everything)}",
        f"- (5) best combination, chosen on these sets: {top(scores)}",
    ]


def correctness(folder, data, split, epoch, sets, batch_size):
    """Whether a run is right on each row: (rows, languages) 0 or 1.

    epoch: last, mean, or half of the last; sets: {language: Rows}.
    """
    run, metrics = read_run(folder)
    if not run["complete"]:
        raise UserError(f"{folder} is not finished: give the same command again")
    protocol = str(run["arguments"]["epochs"] // 2) if epoch == "half" else epoch
    epochs = choose_epochs(metrics, protocol, sets, run["arguments"]["train_language"], folder)
    logits = run_logits(folder, run, epochs, data, split, sets, batch_size)
    return (
        np.stack(
            [logits[language].argmax(1) == rows.labels for language, rows in sets.items()], axis=1
        )
        * 1.0
    )


def accuracies(right, trained, source):
    """What each system reaches, means over its seeds: on the source language, whose place is `source`, on the others'
    mean, and on the train rows in the last epoch, which says whether it has learned by then.

    right: {system or system@epoch: for each seed, (rows, languages)}; trained: {system: for each seed}.
    """
    rows = []
    for name, seeds in right.items():
        languages = np.stack(seeds).mean((0, 1))
        rows.append(
            {
                "name": name,
                "train": float(np.mean(trained[name])) if name in trained else None,
                "source": float(languages[source]),
                "others": float(np.delete(languages, source).mean()),
            }
        )
    return rows


def compare(a, b, clusters, source, resamples):
    """Differences A - B of two (seeds, rows, languages) arrays, on the source language, whose place `source` is, and on
    the mean of the others."""
    difference = a - b  # the same seeds, paired
    others = [i for i in range(a.shape[2]) if i != source]
    both = np.stack(
        [difference[:, :, source], difference[:, :, others].mean(2)], axis=2
    )  # (S, N, 2)
    mean, low, high, p = bootstrap_difference(both.mean(0), clusters, resamples)
    return {
        name: {
            "difference": mean[i],
            "low": low[i],
            "high": high[i],
            "p": p[i],
            "by_seed": both[:, :, i].mean(1).tolist(),
        }
        for i, name in enumerate(("source", "others"))
    }


def report(found, what):
    """claims.json's content as Markdown; `what`: a paragraph on what the systems are."""

    def interval(entry):
        return f"{100 * entry['difference']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"

    reached = [
        [
            row["name"],
            *(
                f"{100 * row[key]:.1f}" if row[key] is not None else ""
                for key in ("train", "source", "others")
            ),
        ]
        for row in found["systems"]
    ]
    lines = [
        [
            f"{row['number']}",
            row["claim"],
            f"{row['a']} - {row['b']}",
            interval(row["others"]),
            interval(row["source"]),
            row["verdict"],
        ]
        for row in found["conclusions"]
    ]
    return (
        f"# The paper's conclusions on {found['data']}\n\nModel {found['model']}, trained on "
        f"{found['train_language']}, {found['seeds']} seed{'s' * (found['seeds'] > 1)} from {found['first_seed']}; "
        f"{found['split']} set, "
        f"{len(found['others'])} other languages: {' '.join(found['others'])}.\n\n{what}\n\n"
        "Differences of accuracy in points with the 95 % interval of the rows (clustered by premise); the verdict "
        "is\non the other languages' mean. Supported: the interval and every seed are above 0; not supported: all "
        "are\nbelow. Where A is to gain nothing (upper-layers, mc-bert-deep), supported: the interval is below "
        f"{100 * MARGIN:g} point;\nnot supported: it and every seed are above 0. A control claims nothing: A is "
        "better or worse by the same rule.\n\n"
        + markdown_table(
            ["", "conclusion", "A - B", "other languages", found["train_language"], "verdict"],
            lines,
        )
        + "\n\nAccuracies, means over the seeds; `train`: on the train rows during the last epoch, dropout on. A "
        "system that is low\nthere has not learned as much as the others by then: with more steps the differences "
        "may be others.\n\n"
        + markdown_table(["system", "train", found["train_language"], "other languages"], reached)
        + "\n"
    )


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
        "--resamples",
        type=in_range(int, 1),
        default=10_000,
        help="of the bootstrap (default: 10000)",
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


def main(argv=None):
    args, more = parse_args(argv)
    out, source = Path(args.out), train_language(args.data, args.train_language)
    languages = paper_order(split_languages(args.data, args.split))
    if source not in languages or len(languages) < 2:
        raise UserError(
            f"{args.data}: {args.split} is needed in {source} and in another language, "
            f"it is there in: {' '.join(languages)}"
        )
    sets = read_sets(
        args.data, [(args.split, language) for language in languages], read_labels(args.data)
    )
    sets = {language: take(rows, args.max_rows) for (_, language), rows in sets.items()}
    if not parallel(sets):
        raise UserError(
            f"{args.data}: the {args.split} rows of {' '.join(languages)} are no translations of each "
            "other, and the verdicts are on the languages' mean, row by row (evaluate.py compares systems "
            "language by language)"
        )
    searched = phase_one(args.grid, args.split) if args.grid else []
    top = len(blocks(load_encoder(args.model)[0]))
    check_layers(args.layers, top, "--layers")
    check_layers(args.freeze_layers, top, "--freeze-layers")
    recipe = top, args.layers, args.pooling, args.freeze_layers, args.freeze_epoch
    right, trained = {}, {}  # see accuracies()
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        added = controls(*recipe, args.epochs, seed) if args.controls is not None else {}
        if unknown := set(args.controls or ()) - set(added):
            raise UserError(f"--controls {min(unknown)}: they are {' '.join(added)}")
        added = {
            name: control for name, control in added.items() if name in (args.controls or added)
        }
        comparisons = CONCLUSIONS + [
            ("", f"control: {what}", name, other, "control")
            for name, (_, what, other) in added.items()
        ]
        compared = dict.fromkeys(name for _, _, *pair, _ in comparisons for name in pair)
        runs = systems(*recipe, args.hidden, args.epochs) | {
            name: flags for name, (flags, _, _) in added.items()
        }
        for name, flags in runs.items():
            folder = out / "runs" / f"{name}-seed{seed}"
            print(f"\n== {name}, seed {seed} ==")
            status = train.main(
                [
                    str(flag)
                    for flag in (
                        "--model",
                        args.model,
                        "--data",
                        args.data,
                        "--out",
                        folder,
                        "--seed",
                        seed,
                        "--train-language",
                        source,
                        "--epochs",
                        args.epochs,
                        "--batch-size",
                        args.batch_size,
                        *more,
                        *flags,
                    )
                ]
            )
            if status:  # stopped by a signal
                return status
            metrics = read_run(folder)[1]
            trained.setdefault(name, []).append(
                [row["accuracy"] for row in metrics if row["split"] == "train"][-1]
            )
            for one in compared:
                system, _, epoch = one.partition("@")
                if system == name:
                    right.setdefault(one, []).append(
                        correctness(
                            folder, args.data, args.split, epoch or "last", sets, args.batch_size
                        )
                    )
            if args.drop_models:
                shutil.rmtree(folder / "epochs", ignore_errors=True)
                shutil.rmtree(folder / "resume", ignore_errors=True)
    clusters, rows = premise_clusters(sets[source]), []
    for number, claim, a, b, way in comparisons:
        found = compare(
            np.stack(right[a]),
            np.stack(right[b]),
            clusters,
            languages.index(source),
            args.resamples,
        )
        said = verdict(
            found["others"]["low"], found["others"]["high"], found["others"]["by_seed"], way
        )
        rows.append(
            {
                "number": number,
                "claim": claim,
                "a": a,
                "b": b,
                **found,
                "verdict": WORDS[said] if way == "control" else said,
            }
        )
    result = {
        "data": args.data,
        "model": args.model,
        "split": args.split,
        "seeds": args.seeds,
        "first_seed": args.first_seed,
        "train_language": source,
        "others": [language for language in languages if language != source],
        "conclusions": rows,
        "systems": accuracies(right, trained, languages.index(source)),
    }
    text = report(
        result,
        f"""\
- baseline: BERT's own [CLS] head; last-layer, middle-layer, upper-layers: {args.pooling} pooling of layer {top}, \
{runs["middle-layer"][1]}, {runs["upper-layers"][1]} to {top}
- mc-bert: {args.pooling} pooling of layers {" ".join(map(str, args.layers))}, {args.epochs} epochs; -long: \
{2 * args.epochs} epochs at a constant rate; -deep: a hidden layer of {args.hidden}
- mc-bert-wf: layers {" ".join(map(str, args.freeze_layers))} frozen, --freeze-epoch {args.freeze_epoch}
- A run counts at its last epoch; @half: after half of them; @mean: the mean of the weights after each""",
    )
    text += "\n" + "\n".join(searched) + "\n" if searched else ""
    write_json(out / "claims.json", result)
    with write_atomic(out / "claims.md") as file:
        file.write(text)
    print(f"\n{text}\nwritten to {out}/claims.md")
    return 0


if __name__ == "__main__":
    cli(main)
