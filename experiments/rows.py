"""How many labelled rows does one need? The search, fine-tuning, and a classic, on the same rows.

    python -m experiments.rows --model intfloat/multilingual-e5-small --data data/massive \\
        --rows 40 100 500 3240 --out rows/massive

For each number of train rows, spread evenly over the source's train file:

search      extract.py and grid_search.py --save-model; its model labels the test files
logistic    what one would take instead: scikit-learn's logistic regression on the mean of the last
            layer, normalised, which is what sentence encoders give; its C by the same dev sets
fine-tuned  train.py with layers 6 8 11 under max, at its last epoch, several seeds

Reads   the encoder and a data set folder whose test files are row-parallel.
Writes  OUT/ROWS/ (data, features, grid, runs: a stopped call goes on), OUT/rows.json, OUT/rows.md.
Needs scikit-learn (requirements-bench.txt).
"""

import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

import extract
import grid_search
import train
from data import group_numbers, read_labels, read_split, split_languages, take, train_language
from evaluate import classify
from lib.archives import write_columns
from lib.folders import write_atomic, write_json
from lib.messages import UserError, cli, in_range, make_parser
from lib.significance import LEVEL, holm, intervals
from lib.tables import interval_cell, markdown_table

CS = [10.0**power for power in range(-1, 5)]
EPOCHS = 5  # of fine-tuning
SYSTEMS = ("search", "logistic", "fine-tuned")


def write_subset(source, out, rows, language, test_rows, copies=1):
    """A data set folder with `rows` of the train rows, each so many times, and dev and test of all
    languages."""
    labels = read_labels(source)
    with write_atomic(out / "labels.txt") as file:
        file.writelines(f"{label}\n" for label in labels)
    limits = {"train": rows, "dev": None, "test": test_rows}
    for split, limit in limits.items():
        for code in [language] if split == "train" else split_languages(source, split):
            part = take(read_split(source, split, code, labels), limit)
            columns = {"text": part.text_a, "label": [labels[i] for i in part.labels]}
            if split == "train":
                columns = {name: cells * copies for name, cells in columns.items()}
            write_columns(out / f"{split}.{code}.tsv", columns)
    return labels


def seconds_of(path, work):
    """Do `work` and keep how long it took beside what it made; the kept number when done before."""
    if path.exists():
        return json.loads(path.read_text())
    start = time.perf_counter()
    if work():
        raise UserError(f"{path.parent} is not finished: give the same command again")
    seconds = time.perf_counter() - start
    write_json(path, seconds)
    return seconds


def sentence_vectors(features, stem):
    """The normalised mean of the last layer's states: (N, D), and the classes (N,)."""
    states = np.load(features / f"{stem}.mean.npy", mmap_mode="r")[-1].astype(np.float64)
    vectors = states / np.linalg.norm(states, axis=1, keepdims=True)
    return vectors, np.load(features / f"{stem}.labels.npy")


def logistic(features, language, others):
    """The best C by the mean accuracy on the others' dev sets: (its model, C)."""
    vectors, classes = sentence_vectors(features, f"train.{language}")
    best = None
    for c in CS:
        model = LogisticRegression(C=c, max_iter=2000).fit(vectors, classes)
        dev = np.mean([model.score(*sentence_vectors(features, f"dev.{code}")) for code in others])
        if best is None or dev > best[0]:
            best = dev, model, c
    return best[1:]


def run_rows(args, rows, language, languages):
    """All systems on one number of rows: {system: (S, N, L) 0 or 1}, {system: seconds}."""
    folder = Path(args.out) / str(rows)
    labels = write_subset(args.data, folder / "data", rows, language, args.max_test_rows)
    others = [code for code in languages if code != language]
    sets = {code: read_split(folder / "data", "test", code, labels) for code in languages}
    right, seconds = {}, {}

    def correctness(predict):
        """predict: {language} -> predicted classes. Returns (N, L)."""
        columns = [np.equal(predict(code), sets[code].labels) for code in languages]
        return np.stack(columns, axis=1) * 1.0

    def label_with(model):
        def predict(code):
            names, _ = classify(model, sets[code].text_a)
            return [labels.index(name) for name in names]

        return predict

    # the search, and its model
    data, features, grid = folder / "data", folder / "features", folder / "grid"
    flags = ["--model", args.model, "--data", str(data), "--out", str(features)]
    extraction = seconds_of(folder / "extract.json", lambda: extract.main(flags))
    flags = ["--features", str(features), "--out", str(grid), "--save-model"]
    search = seconds_of(folder / "search.json", lambda: grid_search.main(flags))
    right["search"] = correctness(label_with(grid / "model"))[None]
    seconds["search"] = extraction + search

    # logistic regression
    start = time.perf_counter()
    model, c = logistic(features, language, others)
    seconds["logistic"] = extraction + time.perf_counter() - start
    print(f"logistic regression: C {c:g}")
    right["logistic"] = correctness(
        lambda code: model.predict(sentence_vectors(features, f"test.{code}")[0])
    )[None]

    # fine-tuning: few rows stand several times in an epoch, or each would save a model
    batch = min(32, max(8, rows // 10))
    copies = max(1, math.ceil(args.steps * batch / (EPOCHS * rows)))
    repeated = folder / "repeated"
    if args.seeds:
        write_subset(args.data, repeated, rows, language, 1, copies)
    runs = []
    for seed in range(args.seeds):
        run, kept = folder / "runs" / f"mc-bert-seed{seed}", folder / f"run{seed}.npy"
        flags = ["--model", args.model, "--data", repeated, "--out", run, "--lr", args.lr]
        flags += ["--batch-size", batch, "--epochs", EPOCHS, "--seed", seed]
        flags += ["--max-eval-rows", 20, "--save-steps", 0]
        words = [str(flag) for flag in flags]
        seconds["fine-tuned"] = seconds_of(
            folder / f"run{seed}.json", lambda words=words: train.main(words)
        )
        if not kept.exists():
            answers = correctness(label_with(run / "epochs" / str(EPOCHS)))
            with write_atomic(kept, "wb") as file:
                np.save(file, answers)
            shutil.rmtree(run / "epochs")  # several times the encoder's size
            shutil.rmtree(run / "resume")
        runs.append(np.load(kept))
    if runs:
        right["fine-tuned"] = np.stack(runs)
    return right, seconds, group_numbers(sets[language])


def others_mean(right, languages, language):
    """(S, N, L) -> (S, N, 1), the mean of the languages but one."""
    places = [i for i, code in enumerate(languages) if code != language]
    return right[:, :, places].mean(2, keepdims=True)


def row_of(rows, right, seconds, groups, languages, language):
    """What rows.json says of one number of rows."""
    entry = {"rows": rows, "systems": {}, "differences": {}}
    for name, values in right.items():
        entry["systems"][name] = {
            "source": float(values[:, :, languages.index(language)].mean()),
            "others": float(others_mean(values, languages, language).mean()),
            "seeds": len(values),
            "seconds": seconds[name],
        }
        if name == "search":
            continue
        search = others_mean(right["search"], languages, language)
        difference = search - others_mean(values, languages, language)  # the search has one model
        entry["differences"][name] = intervals(difference, groups)[0]._asdict()
    return entry


def report(entries, language):
    """rows.json's content as Markdown."""
    lines = []
    for entry in entries:
        cells = [f"{entry['rows']:,}"]
        for name in SYSTEMS:
            system = entry["systems"].get(name)
            if system is None:
                cells.append("")
                continue
            scores = f"{100 * system['others']:.1f} ({100 * system['source']:.1f})"
            cells.append(f"{scores}, {system['seconds']:.0f} s")
        for name in SYSTEMS[1:]:
            cells.append(interval_cell(entry["differences"].get(name)))
        lines.append(cells)
    header = ["rows", *SYSTEMS, "search - logistic", "search - fine-tuned"]
    return f"""Test accuracy (%): mean of the other languages ({language} in brackets), seconds.
Differences on the others' mean with the 95 % interval. \\* p < {LEVEL} after Holm's correction over
the table's differences. † One model each: the rows' interval, no star.

{markdown_table(header, lines)}
"""


def parse_args(argv):
    parser = make_parser(__doc__)
    count = in_range(int, 1)
    parser.add_argument("--model", required=True, help="encoder: hub name or folder")
    parser.add_argument("--data", required=True, help="data set folder of single texts")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--rows", type=count, nargs="+", required=True, help="train rows")
    parser.add_argument("--max-test-rows", type=count, help="of each language (default: all)")
    parser.add_argument("--train-language", metavar="LANG", help="source language (default: en)")
    parser.add_argument(
        "--seeds", type=in_range(int, 0), default=3, help="runs of fine-tuning (default: 3)"
    )
    parser.add_argument("--lr", default="1e-4", help="of fine-tuning (default: 1e-4)")
    parser.add_argument(
        "--steps", type=count, default=200, help="of fine-tuning, at least (default: 200)"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    language = train_language(args.data, args.train_language)
    languages = split_languages(args.data, "test", language)
    entries = []
    for rows in args.rows:
        print(f"\n== {rows} rows ==")
        right, seconds, groups = run_rows(args, rows, language, languages)
        entries.append(row_of(rows, right, seconds, groups, languages, language))
    differences = [found for entry in entries for found in entry["differences"].values()]
    for found, p in zip(differences, holm([found["p"] for found in differences])):
        found["p_holm"] = float(p)
    write_json(Path(args.out) / "rows.json", entries)
    text = report(entries, language)
    with write_atomic(Path(args.out) / "rows.md") as file:
        file.write(text)
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    cli(main)
