"""The paper's eight conclusions, each tested: fine-tune what must be compared, and say what the difference is worth.

    make claims DATA=data/xnli MODEL=bert-base-multilingual-uncased OUT=claims/xnli
    python claims.py --model sample/model --data sample/nli --out claims/nli --seeds 3 --lr 5e-4

Reads   the encoder and a data set folder; with --grid a grid folder of grid_search.py, for what phase 1 says.
Writes  OUT/runs/NAME-seedS/ (run folders of train.py: a stopped call goes on, a second one trains nothing),
        OUT/claims.json and OUT/claims.md: for each conclusion what was compared, the difference with its 95 % interval,
        and the verdict.
Paper   section 1.9.
"""
import argparse
from pathlib import Path

import numpy as np

import train
from data import check_rows, read_labels, read_split, split_languages
from evaluate import run_logits
from files import UserError, cli, in_range, markdown_table, write_atomic, write_json
from model import POOLINGS
from ranking import foreign, read_grid
from runs import paper_order, read_run
from significance import bootstrap_difference, premise_clusters

MARGIN = 0.01  # "does not help" means: helps by less than this, with 95 % confidence


def controls(layers, pooling, freeze, freeze_epoch, epochs):
    """The runs of --controls, {name: (flags of train.py, what it is, the system to compare with)}."""
    chosen = ["--layers", *layers, "--pooling", pooling]
    found = {f"wf-epoch-{n}": ([*chosen, "--freeze-layers", *freeze, "--freeze-epoch", n],
                               {1: "frozen after 1 epoch", 3: "frozen after 3 epochs",
                                "auto": "frozen at the first fall on joint dev"}[n],
                               "mc-bert-wf")
             for n in (1, 3, "auto") if str(n) != freeze_epoch and (n == "auto" or n < epochs)}
    found["wf-lowest"] = ([*chosen, "--freeze-layers", *range(7), "--freeze-epoch", freeze_epoch],
                          "embeddings and lowest 6 frozen instead", "mc-bert-wf")
    found["wf-random"] = ([*chosen, "--random-freeze", len(freeze), "--freeze-epoch", freeze_epoch],
                          f"{len(freeze)} random layers frozen instead", "mc-bert-wf")
    found["wf-slower"] = ([*chosen, "--freeze-layers", *freeze, "--freeze-epoch", freeze_epoch, "--freeze-lr", 0.1],
                          "a tenth of the learning rate instead of frozen", "mc-bert-wf")
    found["random-layers"] = (["--random-layers", len(layers), "--pooling", pooling],
                              f"{len(layers)} random layers pooled instead", "mc-bert")
    return found


def systems(layers, pooling, freeze, freeze_epoch, hidden, epochs):
    """The runs that the conclusions need, {name: flags of train.py}; all but the named thing is the paper's recipe."""
    chosen = ["--layers", *layers, "--pooling", pooling]
    return {
        "baseline": ["--head", "pooler"],
        "last-layer": ["--layers", 12, "--pooling", pooling],
        "single-8": ["--layers", 8, "--pooling", pooling],
        "layers-5-12": ["--layers", *range(5, 13), "--pooling", pooling],
        "mc-bert": chosen,
        "mc-bert-long": [*chosen, "--epochs", 2 * epochs, "--schedule", "constant", "--keep-epochs", epochs],
        "mc-bert-mean": ["--layers", *layers, "--pooling", "mean"],
        "mc-bert-cls": ["--layers", *layers, "--pooling", "cls"],
        "mc-bert-wf": [*chosen, "--freeze-layers", *freeze, "--freeze-epoch", freeze_epoch],
        "mc-bert-no-dropout": [*chosen, "--dropout", 0, "--encoder-dropout", 0],
        "mc-bert-deep": [*chosen, "--hidden", hidden],
    }


# (number, the paper's words, A, B, which way): A - B > 0 is the claim; "no gain": A is at most MARGIN better than B
CONCLUSIONS = [
    (1, "longer fine-tuning hurts the other languages", ("mc-bert-long", "half"), ("mc-bert-long", "last"), "better"),
    (2, "more hidden states beat the [CLS] head", ("mc-bert", "last"), ("baseline", "last"), "better"),
    (3, "max pooling beats mean", ("mc-bert", "last"), ("mc-bert-mean", "last"), "better"),
    (3, "max pooling beats [CLS]", ("mc-bert", "last"), ("mc-bert-cls", "last"), "better"),
    (4, "not all layers are needed", ("layers-5-12", "last"), ("mc-bert", "last"), "no gain"),
    (4, "a middle layer beats the last", ("single-8", "last"), ("last-layer", "last"), "better"),
    (5, "combining layers helps", ("mc-bert", "last"), ("single-8", "last"), "better"),
    (6, "freezing on the go helps", ("mc-bert-wf", "last"), ("mc-bert", "last"), "better"),
    (7, "dropout is needed", ("mc-bert", "last"), ("mc-bert-no-dropout", "last"), "better"),
    (8, "a deeper classifier does not help", ("mc-bert-deep", "last"), ("mc-bert", "last"), "no gain"),
]


def verdict(low, high, by_seed, way):
    """supported, not supported or undecided, from an interval of A - B and its value for each seed.

    "better": supported when the interval is above 0 and so is every seed; not supported when both are below.
    "no gain": supported when the interval is below MARGIN; not supported when it is above 0 and so is every seed.
    """
    if way == "no gain":
        return "supported" if high < MARGIN else "not supported" if low > 0 and min(by_seed) > 0 else "undecided"
    if low > 0 and min(by_seed) > 0:
        return "supported"
    return "not supported" if high < 0 and max(by_seed) < 0 else "undecided"


WORDS = {"supported": "better", "not supported": "worse", "undecided": "undecided"}  # a control claims nothing


def phase_one(grid):
    """What the search says on conclusions 3, 4 and 5, as Markdown lines (mean F1 of the non-English test sets)."""
    scores = {key: foreign(entry, "test").mean() for key, entry in read_grid(grid)[0].items()}
    poolings = {p: np.mean([s for (pooling, _), s in scores.items() if pooling == p])
                for p in dict.fromkeys(p for p, _ in scores)}
    single = {key: s for key, s in scores.items() if len(key[1]) == 1}
    best_single, best = max(single, key=single.get), max(scores, key=scores.get)
    everything = max((key for key in scores if len(key[1]) == max(len(k[1]) for k in scores)), key=scores.get)

    def named(key):
        return f"{key[0]} of {'+'.join(map(str, key[1]))} ({scores[key]:.1f})"

    return [f"- (3) mean over all combinations: {', '.join(f'{p} {s:.1f}' for p, s in poolings.items())}",
            f"- (4) best single layer: {named(best_single)}; all layers: {named(everything)}",
            f"- (5) best combination, chosen on these test sets: {named(best)}"]


def correctness(folders, data, split, which, truth, batch_size):
    """Whether each run is right on each row: (runs, rows, languages) 0 or 1. `which` epoch: last, or half of them.

    truth: {language: the rows' classes}.
    """
    right = []
    for folder in folders:
        run, history = read_run(folder)
        if not run["complete"]:
            raise UserError(f"{folder} is not finished: give the same command again")
        epoch = max(history) // 2 if which == "half" else max(history)
        logits = run_logits(folder, run, dict.fromkeys(truth, epoch), data, split, None, batch_size)
        right.append(np.stack([logits[language].argmax(1) == classes for language, classes in truth.items()], axis=1))
    return np.stack(right).astype(float)


def compare(a, b, clusters, english, resamples):
    """Differences A - B of two (seeds, rows, languages) arrays, on English and on the mean of the other languages."""
    difference = a - b                                                                      # the same seeds, paired
    others = [i for i in range(a.shape[2]) if i != english]
    both = np.stack([difference[:, :, english], difference[:, :, others].mean(2)], axis=2)  # (S, N, 2)
    mean, low, high, p = bootstrap_difference(both.mean(0), clusters, resamples)
    return {name: {"difference": mean[i], "low": low[i], "high": high[i], "p": p[i],
                   "by_seed": both[:, :, i].mean(1).tolist()} for i, name in enumerate(("en", "others"))}


def report(rows, data, model, seeds, split, count):
    """claims.json's rows as Markdown; `count` languages beside English."""
    def interval(entry):
        return f"{100 * entry['difference']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"

    lines = [[f"{row['number']}", row["claim"], f"{row['a']} - {row['b']}", interval(row["others"]),
              interval(row["en"]), row["verdict"]] for row in rows]
    return (f"# The paper's conclusions on {data}\n\nModel {model}, {seeds} seeds, {split} set, "
            f"{count} other languages. Differences of accuracy in points with the 95 % interval of the test rows "
            "(clustered by premise); the verdict is on the other languages' mean. Better: supported when the interval "
            "and every seed are above 0, not supported when all are below. No gain: supported when the interval is "
            f"below {100 * MARGIN:g} point.\n\n"
            + markdown_table(["", "conclusion", "compared", "other languages", "English", "verdict"], lines) + "\n")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, epilog="Flags not named here go to every train.py: --lr 5e-4, "
                                            "--max-train-rows 1000, ...")
    parser.add_argument("--model", required=True, help="encoder with 12 blocks: hub name or folder")
    parser.add_argument("--data", required=True, help="data set folder")
    parser.add_argument("--out", required=True, help="folder for the runs and claims.md")
    parser.add_argument("--grid", help="grid folder, to add what phase 1 says")
    parser.add_argument("--controls", action="store_true",
                        help="also freeze at other epochs, other layers, or none but slower; and pool random layers")
    parser.add_argument("--split", choices=["dev", "test"], default="test", help="to compare on (default: test)")
    parser.add_argument("--seeds", type=in_range(int, 1), default=3, help="runs of each system (default: 3)")
    parser.add_argument("--epochs", type=in_range(int, 1), default=5,
                        help="passes over the train rows; twice as many for conclusion 1 (default: 5)")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 8, 11], help="(default: 6 8 11)")
    parser.add_argument("--pooling", choices=POOLINGS, default="max", help="(default: max)")
    parser.add_argument("--freeze-layers", type=int, nargs="+", default=[9, 11, 12], help="(default: 9 11 12)")
    parser.add_argument("--freeze-epoch", default="2", help="(default: 2)")
    parser.add_argument("--hidden", type=in_range(int, 1), default=256,
                        help="units of the deeper classifier (default: 256)")
    parser.add_argument("--resamples", type=in_range(int, 1), default=10_000, help="of the bootstrap (default: 10000)")
    parser.add_argument("--batch-size", type=in_range(int, 1), default=32, help="rows an optimizer step (default: 32)")
    args, more = parser.parse_known_args(argv)
    if any(flag.partition("=")[0] == "--seed" for flag in more):
        parser.error("--seed: each system is trained with seeds 0, 1, ...; --seeds says how many")
    if args.freeze_epoch != "auto" and not (args.freeze_epoch.isdecimal() and int(args.freeze_epoch) < args.epochs):
        parser.error(f"--freeze-epoch {args.freeze_epoch}: expected 0 to {args.epochs - 1} (of --epochs), or auto")
    return args, more


def main(argv=None):
    args, more = parse_args(argv)
    out = Path(args.out)
    labels, languages = read_labels(args.data), paper_order(split_languages(args.data, args.split))
    if "en" not in languages or len(languages) < 2:
        raise UserError(f"{args.data}: {args.split} is needed in English and in another language, "
                        f"it is there in: {' '.join(languages)}")
    sets = {language: read_split(args.data, args.split, language, labels) for language in languages}
    check_rows(sets, args.data, args.split)
    searched = phase_one(args.grid) if args.grid else []
    everything = systems(args.layers, args.pooling, args.freeze_layers, args.freeze_epoch, args.hidden, args.epochs)
    comparisons = CONCLUSIONS
    if args.controls:
        added = controls(args.layers, args.pooling, args.freeze_layers, args.freeze_epoch, args.epochs)
        everything |= {name: flags for name, (flags, _, _) in added.items()}
        comparisons = CONCLUSIONS + [("", f"control: {what}", (name, "last"), (other, "last"), "control")
                                     for name, (_, what, other) in added.items()]
    folders = {name: [out / "runs" / f"{name}-seed{seed}" for seed in range(args.seeds)] for name in everything}
    for seed in range(args.seeds):
        for name, flags in everything.items():
            print(f"\n== {name}, seed {seed} ==")
            status = train.main([str(flag) for flag in (
                "--model", args.model, "--data", args.data, "--out", folders[name][seed], "--seed", seed,
                "--epochs", args.epochs, "--batch-size", args.batch_size, *more, *flags)])
            if status:  # stopped by a signal
                return status
    clusters = premise_clusters(sets["en"])
    truth, right, rows = {language: part.labels for language, part in sets.items()}, {}, []
    for number, claim, a, b, way in comparisons:
        for name, which in (a, b):
            if (name, which) not in right:
                right[name, which] = correctness(folders[name], args.data, args.split, which, truth, args.batch_size)
        found = compare(right[a], right[b], clusters, languages.index("en"), args.resamples)
        others = found["others"]
        said = verdict(others["low"], others["high"], others["by_seed"], way)
        rows.append({"number": number, "claim": claim, "a": f"{a[0]}{'@half' * (a[1] == 'half')}", "b": b[0], **found,
                     "verdict": WORDS[said] if way == "control" else said})
    text = report(rows, args.data, args.model, args.seeds, args.split, len(languages) - 1)
    if searched:
        text += "\nPhase 1, micro-F1 on the non-English test sets:\n\n" + "\n".join(searched) + "\n"
    write_json(out / "claims.json", {"data": args.data, "model": args.model, "split": args.split, "seeds": args.seeds,
                                     "conclusions": rows})
    with write_atomic(out / "claims.md") as file:
        file.write(text)
    print(f"\n{text}\nwritten to {out}/claims.md")
    return 0


if __name__ == "__main__":
    cli(main)
