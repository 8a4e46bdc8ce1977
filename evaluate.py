"""Accuracy by language of one or more runs, beside the paper's table; labels for a user's own text.

    python evaluate.py runs/baseline runs/mc-bert --data data/xnli --split test --out results/xnli
    python evaluate.py runs/baseline --translate-train runs/de runs/es --data data/xnli --out out
    python evaluate.py runs/mc-bert --input my.csv --text body --predictions labelled.csv

Reads   RUN/run.json, RUN/metrics.jsonl, RUN/epochs/K/ and DATA/SPLIT.*.tsv.
        With --input: that file, and a run or any folder with a classifier.json (grid/x/model).
Writes  OUT/results.json (fractions), OUT/results.md (percent); RUN/predictions/K/SPLIT.LANG.npz,
        the logits, which a second call reads instead of the model. With --input: --predictions.
Paper   sections 1.5 and 1.7, Table 1.
"""

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
from lib.folders import read_json, read_run, sha256, write_atomic, write_json, write_text
from lib.messages import UserError, cli, in_range, make_parser, out_of_memory, say_once
from lib.scores import PROTOCOLS, choose_epochs, group_runs, last_epoch, spread
from lib.significance import RESAMPLES, compare, parallel
from lib.tables import PAPER_LANGUAGES, PAPER_TABLE, PUBLISHED, paper_order, report
from model import load_model, predict


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


class System(NamedTuple):
    """Runs that are averaged: they differ in the seed alone, or are those of --translate-train."""

    name: str
    source: str | None  # the language that they were trained on; None: each counts in its own
    runs: list


# --- labels for texts ----------------------------------------------------------------------------


def classify(folder, texts, batch_size=64, desc=None):
    """Label N texts, or N pairs (text_a, text_b) by a model that was trained on pairs.

    folder: a run of train.py, which counts at its last epoch, or any folder with a classifier.json
    (grid/x/model, runs/x/epochs/mean). desc: what to call a progress bar.

    Returns N labels, and the probabilities of all C labels, (N, C), in classifier.json's order:

        labels, probabilities = classify("grid/tickets/model", ["wo ist mein geld"])
    """
    if isinstance(texts, str):
        raise UserError("classify() labels a list of texts, not one text")
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


def find_model(folder):
    """The folder of a model: the one given, a grid's, or that of a run's last epoch."""
    for path in (Path(folder), Path(folder) / "model"):
        if (path / "classifier.json").is_file():
            return path
    if not (Path(folder) / "metrics.jsonl").exists():
        raise UserError(
            f"{folder} is no run of train.py and no model: it has no classifier.json (the search "
            "writes one with --save-model)"
        )
    _, metrics = read_run(folder)
    return kept_epoch(folder, last_epoch(metrics))


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


def label_file(folder, source, target, names, batch_size):
    """Copy a table with the label of each row's text and each label's probability beside it.

    names: what the columns of the text, and of a pair's second text, are called; None: the usual.
    """
    path = find_model(folder)
    settings = read_json(path / "classifier.json", "train.py", ("labels", "pairs"))
    columns, lines = read_columns(source)

    # the columns to read, and those to add
    usual = ["text_a", "text_b"] if settings["pairs"] else ["text"]
    used = [name or default for name, default in zip(names, usual)]
    added = ["prediction", *(f"p_{label}" for label in settings["labels"])]
    for name in used:
        if name not in columns:
            raise UserError(
                f"{source} has no column {name!r} but {', '.join(columns)}; {folder} was trained "
                f"on {kind(settings['pairs'])}: name them with --text and --text-b"
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
        texts = zip(texts, columns[used[1]])
    labels, probabilities = classify(path, texts, batch_size, str(source))
    columns["prediction"] = labels
    for name, column in zip(added[1:], probabilities.T):
        columns[name] = column.round(6).tolist()
    write_columns(target, columns)
    sentence = f"{target}: {len(labels):,} rows, by {path}"
    if known:
        accuracy = np.mean([labels[row] == label for row, label in known.items()])
        sentence += f"; accuracy {100 * accuracy:.1f} on the {len(known):,} whose label is known"
    print(sentence, file=sys.stderr if target == "-" else sys.stdout)


# --- logits of a data set, which a run keeps -----------------------------------------------------


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
    """The logits in a file of keep_logits(); None unless it is there, whole, and of `origin`."""
    try:
        with np.load(path) as kept:
            if all(kept[key].item() == value for key, value in origin.items()):
                return kept["logits"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        pass  # they are computed again
    return None


def keep_logits(path, logits, origin):
    """Write logits and what they are of. A run that cannot be written is evaluated all the same."""
    try:
        with write_atomic(path, "wb") as file:
            np.savez(file, logits=logits, **origin)
    except OSError as error:
        say_once(f"note: {path.parent} cannot be written ({error.strerror}): no logits are kept")


# --- accuracy by language ------------------------------------------------------------------------


def open_split(folder, name, max_rows=None):
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
    if not run.about["complete"]:
        say_once(f"warning: {folder} is not finished")
    return run


def by_language(right, function):
    """A function of the seeds' accuracies, {language: value}; right: {language: {seed: (N,)}}."""
    values = {}
    for language, seeds in right.items():
        values[language] = float(function([of_seed.mean() for of_seed in seeds.values()]))
    return values


def open_systems(folders, translate, split):
    """Run folders as Systems; `translate`: further ones that make one, each in its own language."""
    runs = [open_run(folder, split) for folder in folders]
    systems = []
    for name, members in group_runs(folders, [run.about for run in runs]).items():
        members = sorted((runs[i] for i in members), key=lambda run: run.seed)
        for run, after in zip(members, members[1:]):
            if run.seed == after.seed:
                raise UserError(
                    f"{run.folder} and {after.folder} are the same run (seed {run.seed}), which "
                    "would count twice: name one of them"
                )
        systems.append(System(name, members[0].source, members))
    runs = [open_run(folder, split) for folder in translate]
    for run in runs:
        if run.source not in split.rows:
            raise UserError(
                f"--translate-train {run.folder}: {split.folder} has no {split.name} file in its "
                f"language, {run.source}"
            )
    if runs:
        systems.append(System("Translate-Train", None, runs))
    return systems


def evaluate_system(system, split, protocols, batch_size):
    """What results.json says of a System, and whether its runs are right on each row:
    {protocol: {language: {seed: (N,) bool}}}."""
    entries, right = [], {protocol: {} for protocol in protocols}
    for run in system.runs:
        languages = list(split.rows) if system.source else [run.source]
        by_protocol = {}
        for protocol in protocols:
            epochs = choose_epochs(run.metrics, protocol, languages, run.source, run.folder)
            accuracy = {}
            for language, logits in run_logits(run.folder, epochs, split, batch_size).items():
                is_right = logits.argmax(1) == split.rows[language].labels  # (N, C) -> (N,)
                accuracy[language] = float(is_right.mean())
                right[protocol].setdefault(language, {})[run.seed] = is_right
            by_protocol[protocol] = {"epochs": epochs, "accuracy": accuracy}
        about = {"run": str(run.folder), "seed": run.seed, "train_language": run.source}
        # the first protocol's numbers stand beside these, too: they are those of the table
        entries.append(about | by_protocol[protocols[0]] | {"protocols": by_protocol})
    means = {protocol: by_language(right[protocol], np.mean) for protocol in protocols}
    entry = {"name": system.name, "train_language": system.source, "runs": entries}
    entry["mean"] = means[protocols[0]]
    entry["std"] = by_language(right[protocols[0]], spread)
    entry["protocols"] = means
    return entry, right


def evaluate(systems, split, protocols, baseline, batch_size):
    """Systems on a Split: the content of results.json.

    protocols: which epochs to report, the first in the table. baseline: the name of the system to
    compare with.
    """
    entries, right = [], {}
    for system in systems:
        entry, right[system.name] = evaluate_system(system, split, protocols, batch_size)
        entries.append(entry)

    # differences between protocols, and between systems
    first, together = protocols[0], parallel(split.rows)
    groups = {language: group_numbers(rows) for language, rows in split.rows.items()}
    sources = {system.source for system in systems}
    for system, entry in zip(systems, entries):
        by_protocol, trained_on = right[system.name], {run.source for run in system.runs}
        at_first, entry["protocol_differences"] = by_protocol[first], {}
        for protocol in protocols[1:]:
            difference = compare(by_protocol[protocol], at_first, groups, trained_on, together)
            entry["protocol_differences"][protocol] = difference
        if system.name != baseline:
            other = right[baseline][first]
            entry["difference"] = compare(at_first, other, groups, sources, together)
    return {
        "data": str(split.folder),
        "split": split.name,
        "epoch": first,
        "rows": {language: len(rows.labels) for language, rows in split.rows.items()},
        "parallel": together,
        "baseline": baseline,
        "resamples": RESAMPLES,
        "systems": entries,
    }


def paper_tables(data):
    """What stands beside the test sets of XNLI: the paper's Table 1 and other published results."""
    path, tables = Path(data) / "sources.json", {}
    if not path.exists() or "XNLI" not in str(read_json(path, "data.py")):
        return {}
    for key, table in (("paper", PAPER_TABLE), ("published", PUBLISHED)):
        tables[key] = {}
        for name, values in table.items():
            tables[key][name] = {l: round(v / 100, 3) for l, v in zip(PAPER_LANGUAGES, values)}
    return tables


# --- the command ---------------------------------------------------------------------------------


def parse_args(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        help="run folders of train.py; those that differ only in --seed are averaged",
    )
    add(
        "--batch-size",
        type=in_range(int, 1),
        default=64,
        help="rows of 24 tokens at once; of longer ones fewer, of shorter ones more (default: 64)",
    )
    add = parser.add_argument_group("a table").add_argument
    add("--data", help="data set folder")
    add("--split", choices=["dev", "test"], default="test", help="(default: test)")
    add("--out", help="folder for results.json and results.md")
    add(
        "--epoch",
        nargs="+",
        default=["last"],
        metavar="last|mean|en|joint|oracle|test|K",
        help="epochs to report, the first in the table: the last (default); the mean of the "
        "weights after each; the best on the source's dev (en, true zero-shot), on the mean of "
        "the other languages' dev (joint), for each language on its own dev (oracle), on the mean "
        "of the other languages' test sets (test: the paper's own way, too high by the choice; "
        "needs train.py --track-test); or a number",
    )
    add(
        "--translate-train",
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs trained on other languages, which make one row: each counts in its own language",
    )
    add(
        "--max-rows",
        type=in_range(int, 1),
        metavar="N",
        help="evaluate on N rows of each file, spread evenly (default: all)",
    )
    add(
        "--baseline",
        metavar="NAME",
        help="system to compare the others with (default: the first run's)",
    )
    add = parser.add_argument_group("your own text, labelled by one run or model").add_argument
    add(
        "--input",
        metavar="FILE",
        help="table of texts with a header, .csv, .tsv or .jsonl; - is standard input (.tsv); "
        "with a column label, accuracy is printed",
    )
    add(
        "--predictions",
        metavar="FILE",
        help="table to write, .csv, .tsv or .jsonl, - is standard output (.tsv): the input with "
        "predictions and probabilities",
    )
    add("--text", metavar="COLUMN", help="(default: text, or text_a of pairs)")
    add("--text-b", metavar="COLUMN", help="second text of pairs (default: text_b)")
    args = parser.parse_args(argv)
    for epoch in args.epoch:
        if epoch not in PROTOCOLS and not re.fullmatch(r"\d+", epoch):
            parser.error(f"--epoch {epoch}: expected {', '.join(PROTOCOLS)} or a number")
    if not args.runs + args.translate_train:
        parser.error("name a run folder of train.py, or more")
    for_table = [args.data, args.out, args.max_rows, args.baseline, *args.translate_train]
    for_text = [args.input, args.predictions, args.text, args.text_b]
    if any(for_text):
        if any(for_table) or args.epoch != ["last"]:
            parser.error("--input labels your own text: leave out the flags of a table")
        if len(args.runs) != 1 or not args.input or not args.predictions:
            parser.error("your own text needs --input, --predictions and exactly one run or model")
        if args.input == args.predictions != "-":
            parser.error("--predictions would be written over --input: give it another name")
    elif not args.data or not args.out:
        parser.error("give --data and --out for a table, or --input and --predictions for text")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.input:
        names = [args.text, args.text_b]
        label_file(args.runs[0], args.input, args.predictions, names, args.batch_size)
        return 0
    split = open_split(args.data, args.split, args.max_rows)
    systems = open_systems(args.runs, args.translate_train, split)
    names = [system.name for system in systems]
    baseline = args.baseline or names[0]
    if baseline not in names:
        raise UserError(f"--baseline {baseline}: the systems are {' '.join(names)}")
    protocols = list(dict.fromkeys(args.epoch))
    results = evaluate(systems, split, protocols, baseline, args.batch_size)
    if args.split == "test":
        results |= paper_tables(args.data)
    text = report(results)
    write_json(Path(args.out) / "results.json", results)
    write_text(Path(args.out) / "results.md", text)
    print(f"{text}\nwritten to {args.out}/")
    return 0


if __name__ == "__main__":
    cli(main)
