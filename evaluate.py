"""Accuracy by language of one or more runs, beside the paper's table; labels for a user's own text.

    python evaluate.py runs/baseline runs/mc-bert --data data/xnli --split test --out results/xnli
    python evaluate.py runs/baseline --translate-train runs/de runs/es --data data/xnli --out results
    python evaluate.py runs/mc-bert --input my.csv --text body --predictions labelled.csv

Reads   RUN/run.json, RUN/metrics.jsonl, RUN/epochs/K/ and DATA/SPLIT.*.tsv.
        With --input: that file, and a run or any folder with a classifier.json (grid/x/model).
Writes  OUT/results.json (fractions), OUT/results.md (percent); RUN/predictions/K/SPLIT.LANG.npz, the
        logits, which a second call reads instead of the model. With --input: --predictions.
Paper   sections 1.5 and 1.7, Table 1.
"""

import argparse
import re
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import (
    Rows,
    encode,
    eval_batches,
    group_numbers,
    kind,
    load_tokenizer,
    read_labels,
    read_sets,
    split_languages,
    split_path,
    take,
)
from lib.archives import label_index, read_columns, write_columns
from lib.devices import pick_device, pick_precision
from lib.encoders import check_length, check_tokens
from lib.folders import read_json, read_run, sha256, write_atomic, write_json
from lib.messages import UserError, cli, in_range, out_of_memory, say_once
from lib.scores import PROTOCOLS, choose_epochs, group_runs, spread
from lib.significance import Answers, compare, parallel
from lib.tables import PAPER_LANGUAGES, PAPER_TABLE, PUBLISHED, paper_order, report
from model import load_model, predict

TRANSLATE_TRAIN = "Translate-Train"  # the system of --translate-train


class Split(NamedTuple):
    """One split of a data set folder in several languages, in the order of the paper's table."""

    folder: str
    name: str  # dev or test
    rows: dict  # {language: Rows}


class Run(NamedTuple):
    """A run folder of train.py."""

    folder: str
    about: dict  # run.json
    metrics: list  # the rows of metrics.jsonl

    @property
    def seed(self):
        return self.about["arguments"]["seed"]

    @property
    def source(self):
        """The language that it was trained on."""
        return self.about["arguments"]["train_language"]


class Score(NamedTuple):
    """What came of evaluating a run."""

    entry: dict  # its place in results.json
    answers: dict  # {protocol: Answers}


# --- labels for texts -----------------------------------------------------------------------------


def classify(folder, texts, batch_size=64, desc=None):
    """Label N texts, or N pairs (text_a, text_b) by a model that was trained on pairs.

    folder: a run of train.py, which counts at its last epoch, or any folder with a classifier.json
    (grid/x/model, runs/x/epochs/mean). desc: what to call a progress bar.

    Returns N labels, and the probabilities of all labels, (N, C), in the order of classifier.json's:

        labels, probabilities = classify("grid/tickets/model", ["wo ist mein geld"])
    """
    texts = list(texts)
    model = load(find_model(folder))
    settings = model.classifier.settings
    if not texts:
        raise UserError("there are no texts to label")
    pairs = not isinstance(texts[0], str)
    if pairs != settings.pairs:
        raise UserError(f"{folder} was trained on {kind(not pairs)}, these are {kind(pairs)}")
    rows = Rows(*map(list, zip(*texts))) if pairs else Rows(texts)
    logits = predict_rows(model, rows, batch_size, desc)  # (N, C)
    labels = [settings.labels[best] for best in logits.argmax(1)]
    return labels, torch.from_numpy(logits).double().softmax(1).numpy()


class Model(NamedTuple):
    """A trained model, ready to label on this machine."""

    classifier: torch.nn.Module
    tokenizer: object
    dtype: torch.dtype  # of matrix products


def find_model(folder, protocol="last"):
    """The folder of a model: the one that is given, or of the epoch that a protocol chooses of a run."""
    if (Path(folder) / "classifier.json").is_file():
        if protocol != "last":
            raise UserError(f"--epoch {protocol}: {folder} is one model, not a run")
        return Path(folder)
    run = Run(folder, *read_run(folder))
    epochs = choose_epochs(run.metrics, protocol, [run.source], run.source, folder)
    return kept_epoch(folder, epochs[run.source])


def kept_epoch(folder, epoch):
    """The folder of the model that a run kept after an epoch."""
    path = Path(folder) / "epochs" / str(epoch)
    if not path.is_dir():
        kept = sorted(p.name for p in path.parent.glob("[!.]*"))
        raise UserError(f"{folder} did not keep epoch {epoch}, but {' '.join(kept) or 'none'}")
    return path


def load(path):
    """The Model in a folder of model.save_model(). fp16 without a GPU is "auto"."""
    device, classifier = pick_device(), load_model(path)
    check_length(classifier.encoder, classifier.settings.max_length)
    precision = classifier.settings.precision
    if precision == "fp16" and device.type == "cpu":
        precision = "auto"
    dtype = pick_precision(precision, device)
    return Model(classifier.to(device), load_tokenizer(path), dtype)


def predict_rows(model, rows, batch_size, desc=None):
    """Logits of Rows: (N, C) float32."""
    max_length = model.classifier.settings.max_length
    encoded = encode(model.tokenizer, rows, max_length)
    check_tokens(model.classifier.encoder, encoded.ids)
    batches = eval_batches(encoded, model.tokenizer.pad_token_id, max_length, batch_size)
    with out_of_memory(f"--batch-size {batch_size} is too much, try {max(1, batch_size // 2)}"):
        return predict(model.classifier, batches, len(encoded.labels), model.dtype, desc)


def label_file(folder, protocol, source, target, names, batch_size):
    """Copy a table with the label of each row's text and each label's probability beside it.

    names: what the columns of the text, and of a pair's second text, are called; None: the usual.
    """
    # the columns there are, and those to add
    path = find_model(folder, protocol)
    settings = read_json(path / "classifier.json", "train.py", ("labels", "pairs"))
    columns, lines = read_columns(source)
    usual = ["text_a", "text_b"] if settings["pairs"] else ["text"]
    if names[1] and not settings["pairs"]:
        raise UserError(f"--text-b {names[1]}: {folder} was trained on {kind(False)}")
    used = [name or default for name, default in zip(names, usual)]
    added = ["prediction", *(f"p_{label}" for label in settings["labels"])]
    for name in used:
        if name not in columns:
            raise UserError(
                f"{source} has no column {name!r} but {', '.join(columns)}; {folder} was trained on "
                f"{kind(settings['pairs'])} (--text and --text-b name the columns)"
            )
    for name in added:
        if name in columns:
            raise UserError(f"{source} has a column {name!r}, which would be lost: rename it")
    known = {}  # {row: its label}
    for row, label in enumerate(columns.get("label", [])):
        if label:
            label_index(label, settings["labels"], f"{source}, line {lines[row]}")
            known[row] = label

    # the labels
    texts = columns[used[0]]
    if settings["pairs"]:
        texts = list(zip(*(columns[name] for name in used)))
    labels, probabilities = classify(path, texts, batch_size, str(source))
    columns["prediction"] = labels
    for name, column in zip(added[1:], probabilities.T):
        columns[name] = [f"{probability:.6f}" for probability in column]
    write_columns(target, columns)
    sentence = f"{target}: {len(labels):,} rows, by {path}"
    if known:
        accuracy = np.mean([labels[row] == label for row, label in known.items()])
        sentence += f"; accuracy {100 * accuracy:.1f} on the {len(known):,} whose label is known"
    print(sentence, file=sys.stderr if target == "-" else sys.stdout)


# --- logits of a data set, which a run keeps ------------------------------------------------------


def run_logits(folder, epochs, split, batch_size):
    """A run's logits, {language: (N, C)}: kept ones of the same weights and rows, else the model's.

    epochs: {language: epoch}. Where a model is needed, it is loaded once for each epoch.
    """
    logits, weights, models = {}, {}, {}
    for language, epoch in epochs.items():
        path = Path(folder) / "epochs" / str(epoch)
        if epoch not in weights:
            weights[epoch] = hash_weights(path)
        rows = split.rows[language]
        data = sha256(split_path(split.folder, split.name, language))
        origin = {"data": data, "rows": len(rows.text_a), **weights[epoch]}
        kept = Path(folder) / "predictions" / str(epoch) / f"{split.name}.{language}.npz"
        values = read_logits(kept, origin)
        if values is None:
            if epoch not in models:
                models[epoch] = load(kept_epoch(folder, epoch))
            desc = f"{Path(folder).name} epoch {epoch} {split.name} {language}"
            values = predict_rows(models[epoch], rows, batch_size, desc)
            keep_logits(kept, values, origin)
        logits[language] = values
    return logits


def hash_weights(path):
    """SHA-256 of a model's two files; of none where the model was deleted and its logits kept."""
    files = {"model": path / "model.safetensors", "classifier": path / "classifier.safetensors"}
    return {name: sha256(file) for name, file in files.items() if file.exists()}


def read_logits(path, origin):
    """The logits in a file of keep_logits(), or None unless they are there, whole, and of `origin`."""
    if not path.exists():
        return None
    try:
        with np.load(path) as kept:
            if all(kept[key].item() == value for key, value in origin.items()):
                return kept["logits"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        say_once(f"note: {path} cannot be read ({error}): computed again")
    return None


def keep_logits(path, logits, origin):
    """Write logits and what they are of. A run that cannot be written is evaluated all the same."""
    try:
        with write_atomic(path, "wb") as file:
            np.savez(file, logits=logits, **origin)
    except OSError as error:
        say_once(f"note: {path.parent} cannot be written ({error.strerror}): no logits are kept")


# --- accuracy by language -------------------------------------------------------------------------


def read_split(folder, name, max_rows=None):
    """A Split of a data set folder, of at most so many rows a language."""
    languages = paper_order(split_languages(folder, name))
    if not languages:
        raise UserError(f"{folder} has no {name} file (--split)")
    sets = read_sets(folder, [(name, language) for language in languages], read_labels(folder))
    return Split(folder, name, {key[1]: take(rows, max_rows) for key, rows in sets.items()})


def open_run(folder, split):
    """A Run. UserError unless it has the labels of a Split and was trained on what that holds."""
    run = Run(folder, *read_run(folder))
    labels, pairs = read_labels(split.folder), run.about["pairs"]
    if run.about["labels"] != labels:
        raise UserError(
            f"{folder} was trained for the labels {' '.join(run.about['labels'][:6])}, "
            f"{split.folder}/labels.txt says {' '.join(labels[:6])}"
        )
    if pairs != (next(iter(split.rows.values())).text_b is not None):
        raise UserError(
            f"{split.folder} holds {kind(not pairs)}, {folder} was trained on {kind(pairs)}"
        )
    return run


def evaluate_run(run, split, languages, protocols, batch_size):
    """The Score of a run in some languages, at the epochs that each protocol chooses."""
    found, answers = {}, {}
    for protocol in protocols:
        epochs = choose_epochs(run.metrics, protocol, languages, run.source, run.folder)
        logits = run_logits(run.folder, epochs, split, batch_size)
        right = {}
        for language, values in logits.items():
            right[language] = values.argmax(1) == split.rows[language].labels  # (N,)
        accuracy = {language: float(values.mean()) for language, values in right.items()}
        found[protocol] = {"epochs": epochs, "accuracy": accuracy}
        answers[protocol] = Answers(run.seed, right)
    entry = {"run": str(run.folder), "seed": run.seed, "train_language": run.source}
    entry |= {**found[protocols[0]], "protocols": found}
    return Score(entry, answers)


def by_language(scores, protocol, function):
    """A function of several runs' accuracies under a protocol: {language: value}."""
    values = {}
    for score in scores:
        for language, accuracy in score["protocols"][protocol]["accuracy"].items():
            values.setdefault(language, []).append(accuracy)
    return {language: float(function(column)) for language, column in values.items()}


def run_warnings(run, accuracies, split):
    """What a reader of a run's {language: accuracy} should know: unfinished, or near chance."""
    sentences, low = [], []
    if not run.about["complete"]:
        last = max(row["epoch"] for row in run.metrics)
        sentences.append(f"{run.folder} is not finished: its last epoch so far is {last}")
    for language, accuracy in accuracies.items():
        labels = split.rows[language].labels
        chance = np.bincount(labels).max() / len(labels)
        if accuracy < chance + 0.02:
            low.append(f"{language} {100 * accuracy:.1f} ({100 * chance:.1f})")
    if low:
        sentences.append(
            f"{run.folder} is within 2 points of chance (the largest class) or below in "
            f"{', '.join(low)}"
        )
    return sentences


def open_systems(folders, translate, split):
    """Runs as systems, {name: [Run]}: those that differ in the seed alone are one.

    translate: further runs that make one, each in its own language.
    """
    runs = [open_run(folder, split) for folder in folders]
    systems = {}
    for name, members in group_runs(folders, [run.about for run in runs]).items():
        systems[name] = sorted((runs[i] for i in members), key=lambda run: run.seed)
    for folder in translate:
        run = open_run(folder, split)
        if run.source not in split.rows:
            raise UserError(
                f"--translate-train {folder}: {split.folder} has no {split.name} file in its "
                f"language, {run.source}"
            )
        systems.setdefault(TRANSLATE_TRAIN, []).append(run)
    return systems


def evaluate(systems, split, protocols, baseline, batch_size):
    """Systems, {name: [Run]}, on a Split: the content of results.json.

    protocols: which epochs to report, the first in the table. baseline: the system to compare with.
    """
    # accuracy of each run
    languages, first = list(split.rows), protocols[0]
    entries, answers, sources, warnings = [], {}, set(), []
    for name, runs in systems.items():
        scores = []
        for run in runs:
            read = [run.source] if name == TRANSLATE_TRAIN else languages
            score = evaluate_run(run, split, read, protocols, batch_size)
            scores.append(score.entry)
            warnings += run_warnings(run, score.entry["accuracy"], split)
            for protocol in protocols:
                answers.setdefault((name, protocol), []).append(score.answers[protocol])
        source = None
        if name != TRANSLATE_TRAIN:
            source = runs[0].source
            sources.add(source)
        entry = {"name": name, "train_language": source, "runs": scores}
        entry["mean"] = by_language(scores, first, np.mean)
        entry["std"] = by_language(scores, first, spread)
        entry["protocols"] = {p: by_language(scores, p, np.mean) for p in protocols}
        entries.append(entry)

    # differences between protocols, and between systems
    groups = {language: group_numbers(rows) for language, rows in split.rows.items()}
    together = parallel(split.rows)
    for entry in entries:
        name, own = entry["name"], {run.source for run in systems[entry["name"]]}
        usual = answers[name, first]
        entry["protocol_differences"] = {}
        for p in protocols[1:]:
            difference = compare(answers[name, p], usual, groups, own, together)
            entry["protocol_differences"][p] = difference
        if name != baseline:
            other = answers[baseline, first]
            entry["difference"] = compare(usual, other, groups, sources, together)
    return {
        "data": str(split.folder),
        "split": split.name,
        "epoch": first,
        "rows": {language: len(rows.labels) for language, rows in split.rows.items()},
        "parallel": together,
        "baseline": baseline,
        "systems": entries,
        "warnings": warnings,
    }


def paper_tables(data):
    """What stands beside the test sets of XNLI: the paper's Table 1 and other published results."""
    path, tables = Path(data) / "sources.json", {}
    if not path.exists() or "XNLI" not in str(read_json(path, "data.py")):
        return {}
    for key, table in (("paper", PAPER_TABLE), ("published", PUBLISHED)):
        tables[key] = {}
        for name, values in table.items():
            fractions = [round(value / 100, 3) for value in values]
            tables[key][name] = dict(zip(PAPER_LANGUAGES, fractions))
    return tables


# --- the command ----------------------------------------------------------------------------------


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="*",
        help="run folders of train.py; those that differ only in --seed are averaged",
    )
    parser.add_argument(
        "--epoch",
        nargs="+",
        default=["last"],
        metavar="last|mean|en|joint|oracle|test|K",
        help="epochs to report, the first in the table: the last (default); the mean of the weights "
        "after each; the best on the source language's dev (en, true zero-shot), on the mean of "
        "the other languages' dev (joint), for each language on its own dev (oracle), on the mean "
        "of the other languages' test sets (test: the paper's own way, too high by the choice; "
        "needs train.py --track-test); or a number",
    )
    parser.add_argument(
        "--batch-size",
        type=in_range(int, 1),
        default=64,
        help="rows of 24 tokens at once; of longer ones fewer, of shorter ones more (default: 64)",
    )
    group = parser.add_argument_group("a table")
    group.add_argument("--data", help="data set folder")
    group.add_argument("--split", choices=["dev", "test"], default="test", help="(default: test)")
    group.add_argument("--out", help="folder for results.json and results.md")
    group.add_argument(
        "--translate-train",
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs trained on other languages, which make one row: each counts in its own language",
    )
    group.add_argument(
        "--max-rows",
        type=in_range(int, 1),
        metavar="N",
        help="evaluate on N rows of each file, spread evenly (default: all)",
    )
    group.add_argument(
        "--baseline",
        metavar="NAME",
        help="system to compare the others with (default: the first run's)",
    )
    group = parser.add_argument_group("your own text, with one run or one folder of a model")
    group.add_argument(
        "--input",
        metavar="FILE",
        help="table of texts with a header, .csv, .tsv or .jsonl; - is standard input (.tsv); "
        "with a column label, accuracy is printed",
    )
    group.add_argument(
        "--predictions",
        metavar="FILE",
        help="table to write, .csv, .tsv or .jsonl, - is standard output (.tsv): the input with "
        "predictions and probabilities",
    )
    group.add_argument("--text", metavar="COLUMN", help="(default: text, or text_a of pairs)")
    group.add_argument("--text-b", metavar="COLUMN", help="second text of pairs (default: text_b)")
    args = parser.parse_args(argv)
    for epoch in args.epoch:
        if epoch not in PROTOCOLS and not re.fullmatch(r"\d+", epoch):
            parser.error(f"--epoch {epoch}: expected {', '.join(PROTOCOLS)} or a number")
    if not args.runs + args.translate_train:
        parser.error("name a run folder of train.py, or more")
    for_table = args.data or args.out or args.max_rows or args.baseline or args.translate_train
    if args.input is None:
        if args.data is None or args.out is None:
            parser.error("give --data and --out for a table, --input and --predictions for a file")
        if args.predictions or args.text or args.text_b:
            parser.error("--predictions, --text and --text-b go with --input")
    elif for_table:
        parser.error(
            "--input labels your own text: leave out --data, --out, --max-rows, --baseline, "
            "--translate-train"
        )
    elif args.predictions is None or len(args.runs) > 1 or len(args.epoch) > 1:
        parser.error("--input needs --predictions, exactly one run, and one --epoch")
    elif args.epoch == ["oracle"]:
        parser.error("--epoch oracle: expected one epoch for all texts")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.input is not None:
        names = [args.text, args.text_b]
        label_file(
            args.runs[0], args.epoch[0], args.input, args.predictions, names, args.batch_size
        )
        return 0
    split = read_split(args.data, args.split, args.max_rows)
    systems = open_systems(args.runs, args.translate_train, split)
    baseline = args.baseline or next(iter(systems))
    if baseline not in systems:
        raise UserError(f"--baseline {baseline}: the systems are {' '.join(systems)}")
    protocols = list(dict.fromkeys(args.epoch))
    results = evaluate(systems, split, protocols, baseline, args.batch_size)
    if args.split == "test":
        results |= paper_tables(args.data)
    text = report(results)
    write_json(Path(args.out) / "results.json", results)
    with write_atomic(Path(args.out) / "results.md") as file:
        file.write(text)
    print(f"{text}\nwritten to {args.out}/")
    return 0


if __name__ == "__main__":
    cli(main)
