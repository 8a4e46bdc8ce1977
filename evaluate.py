"""Accuracy by language of one or more runs, beside the paper's table; predictions for a user's own text.

    python evaluate.py runs/baseline runs/mc-bert runs/mc-bert-wf --data data/xnli --split test --out results/xnli
    python evaluate.py runs/baseline --translate-train runs/de runs/es --data data/xnli --out results/xnli
    python evaluate.py runs/mc-bert-wf --input my.tsv --predictions out.tsv

Reads   RUN/run.json, RUN/metrics.jsonl, RUN/epochs/K/ and DATA/SPLIT.*.tsv.
Writes  OUT/results.json (fractions), OUT/results.md (percent); RUN/predictions/K/SPLIT.LANG.npy, the logits, which a
        second call reads instead of the model, and origins.json, which data they are of. With --input: --predictions.
Paper   sections 1.5 and 1.7, Table 1.

Is one system better than another on the same rows, or is it luck? The rows of a test set are not independent (XNLI has
three hypotheses a premise, and translations of one sentence), so whole clusters are resampled: Efron and Tibshirani
(1993), section 8. What a resample varies is the test rows; the seeds are averaged over, not resampled.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import torch

from data import (
    encode,
    eval_batches,
    kind,
    load_tokenizer,
    read_labels,
    read_sets,
    read_table,
    split_languages,
    take,
    write_table,
)
from lib.devices import pick_device, pick_precision
from lib.encoders import check_length, check_tokens
from lib.folders import load_array, read_json, read_run, sha256, write_atomic, write_json
from lib.messages import UserError, cli, in_range, out_of_memory
from lib.scores import PROTOCOLS, choose_epochs, group_runs, spread
from lib.significance import difference, parallel
from lib.tables import PAPER_LANGUAGES, PAPER_TABLE, PUBLISHED, paper_order, report
from model import load_model, predict

# --- what a run folder says --------------------------------------------------------------------------------------


# --- logits ------------------------------------------------------------------------------------------------------


def load_epoch(folder, epoch, run):
    """The model a run kept after an epoch, on this machine's device: model, tokenizer, dtype of its products.

    That is the run's --precision; fp16 without a GPU is "auto".
    """
    path = Path(folder) / "epochs" / str(epoch)
    if not path.is_dir():
        kept = sorted(p.name for p in path.parent.glob("[!.]*"))
        raise UserError(f"{folder} did not keep epoch {epoch}, but {' '.join(kept) or 'none'}")
    model, device, precision = load_model(path), pick_device(), run["arguments"]["precision"]
    check_length(model.encoder, run["arguments"]["max_length"])
    if model.labels != run["labels"] or model.pairs != run["pairs"]:
        raise UserError(
            f"{path}/classifier.json and {folder}/run.json name different labels or texts"
        )
    precision = "auto" if precision == "fp16" and device.type == "cpu" else precision
    return model.to(device), load_tokenizer(path), pick_precision(precision, device)


def predict_rows(model, tokenizer, dtype, rows, max_length, batch_size, desc):
    """Logits of Rows by what load_epoch() gives: (N, C)."""
    encoded = encode(tokenizer, rows, max_length)
    check_tokens(model.encoder, encoded.ids)
    with out_of_memory(f"--batch-size {batch_size} is too much, try {max(1, batch_size // 2)}"):
        return predict(
            model,
            eval_batches(encoded, tokenizer.pad_token_id, max_length, batch_size),
            len(encoded.labels),
            dtype,
            desc,
        )


def run_logits(folder, run, epochs, data, split, sets, batch_size):
    """Logits of a run, {language: (rows, C)}: saved ones where they fit the data, else from the model.

    epochs: {language: epoch}; sets: {language: Rows}. Where a model is needed, it is loaded once for each epoch.
    """
    folder, logits, models = Path(folder), {}, {}
    for language, epoch in epochs.items():
        path = folder / "predictions" / str(epoch) / f"{split}.{language}.npy"
        rows, saved = sets[language], path.parent / "origins.json"
        origin = {
            "sha256": sha256(Path(data) / f"{split}.{language}.tsv"),
            "rows": len(rows.labels),
        }
        origins = read_json(saved, "evaluate.py", {}) if saved.exists() else {}
        if origins.get(path.name) != origin or not path.exists():
            if epoch not in models:
                models[epoch] = load_epoch(folder, epoch, run)
            values = predict_rows(
                *models[epoch],
                rows,
                run["arguments"]["max_length"],
                batch_size,
                f"{folder.name} epoch {epoch} {split} {language}",
            )
            with write_atomic(path, "wb") as file:
                np.save(file, values)
            write_json(saved, {**origins, path.name: origin})
        logits[language] = np.array(
            load_array(
                path,
                (len(rows.labels), len(run["labels"])),
                remedy="delete it, and it is computed again",
            )
        )
    return logits


# --- differences -------------------------------------------------------------------------------------------------


# --- the table ---------------------------------------------------------------------------------------------------


def is_xnli(data):
    """Whether a data set folder was made from the XNLI archives."""
    path = Path(data) / "sources.json"
    return path.exists() and any(
        "XNLI" in str(source) for source in read_json(path, "data.py", {}).values()
    )


def check_run(folder, run, labels, rows, name):
    """UserError unless a run has these labels and reads what Rows hold, pairs or single texts."""
    if run["labels"] != labels:
        raise UserError(
            f"{folder} was trained for the labels {' '.join(run['labels'][:6])}, "
            f"{name}/labels.txt says {' '.join(labels[:6])}"
        )
    if run["pairs"] != (rows.text_b is not None):
        raise UserError(
            f"{name} holds {kind(not run['pairs'])}, {folder} was trained on {kind(run['pairs'])}"
        )


def evaluate_run(folder, run, metrics, languages, sets, data, split, protocols, batch_size):
    """One run in some languages: what results.json says of it, and whether it is right on each row under each protocol,
    {protocol: {language: (N,) bool}}. sets: {language: Rows}."""
    source, found, rights = run["arguments"]["train_language"], {}, {}
    for name in protocols:
        epochs = choose_epochs(metrics, name, languages, source, folder)
        logits = run_logits(folder, run, epochs, data, split, sets, batch_size)
        rights[name] = {
            language: values.argmax(1) == sets[language].labels
            for language, values in logits.items()
        }
        found[name] = {
            "epochs": epochs,
            "accuracy": {key: float(value.mean()) for key, value in rights[name].items()},
        }
    return {
        "run": str(folder),
        "seed": run["arguments"]["seed"],
        "train_language": source,
        **found[protocols[0]],
        "protocols": found,
    }, rights


def average(scores, languages, of=np.mean):
    """By language, the mean (or another function) of runs' {language: accuracy}, over those that have it."""
    return {
        language: float(of([score[language] for score in scores if language in score]))
        for language in languages
        if any(language in score for score in scores)
    }


def run_warnings(folder, run, metrics, accuracy, sets):
    """A sentence for a run that is not finished, and for one that is near the largest class in some language."""
    if not run["complete"]:
        yield f"{folder} is not finished: its last epoch so far is {max(row['epoch'] for row in metrics)}"
    chance = {
        language: np.bincount(sets[language].labels).max() / len(sets[language].labels)
        for language in accuracy
    }
    if low := [
        f"{language} {100 * value:.1f} ({100 * chance[language]:.1f})"
        for language, value in accuracy.items()
        if value < chance[language] + 0.02
    ]:
        yield f"{folder} is within 2 points of chance (the largest class) or below in {', '.join(low)}"


def compare(folders, translate, data, split, protocols, baseline, max_rows, batch_size, resamples):
    """Evaluate runs on a split: the content of results.json, with accuracies as fractions.

    `translate`: further runs that make one system, each counting in its own source language alone.
    """
    labels, languages = read_labels(data), paper_order(split_languages(data, split))
    if not languages:
        raise UserError(f"{data} has no {split} file (--split)")
    sets = read_sets(data, [(split, language) for language in languages], labels)
    sets = {language: take(rows, max_rows) for (_, language), rows in sets.items()}
    count, folders = len(folders), [*folders, *translate]
    runs, metrics = zip(*map(read_run, folders))
    sources, seeds = ([run["arguments"][key] for run in runs] for key in ("train_language", "seed"))
    for folder, run in zip(folders, runs):
        check_run(folder, run, labels, sets[languages[0]], data)
    for folder, source in zip(translate, sources[count:]):
        if source not in languages:
            raise UserError(
                f"--translate-train {folder}: {data} has no {split} file in its language, {source}"
            )
    groups = group_runs(folders[:count], runs[:count])
    groups |= {"Translate-Train": range(count, len(folders))} if translate else {}
    baseline = baseline or next(iter(groups))
    if baseline not in groups:
        raise UserError(f"--baseline {baseline}: the systems are {' '.join(groups)}")

    scores, right = zip(
        *(
            evaluate_run(
                folder,
                run,
                rows,
                languages if i < count else [source],
                sets,
                data,
                split,
                protocols,
                batch_size,
            )
            for i, (folder, run, rows, source) in enumerate(zip(folders, runs, metrics, sources))
        )
    )
    groups = {name: sorted(members, key=seeds.__getitem__) for name, members in groups.items()}

    def against(mine, protocol, theirs, other, sources=sources[:count]):
        paired = (
            len(mine) > 1
            and max(mine + theirs) < count
            and [seeds[i] for i in mine] == [seeds[i] for i in theirs]
        )
        return difference(
            [right[i][protocol] for i in mine],
            [right[i][other] for i in theirs],
            sets,
            sources,
            resamples,
            paired,
        )

    systems, first = [], protocols[0]
    for name, members in groups.items():
        shown, own = [scores[i]["accuracy"] for i in members], {sources[i] for i in members}
        systems.append(
            {
                "name": name,
                "train_language": sources[members[0]] if members[0] < count else None,
                "runs": [scores[i] for i in members],
                "mean": average(shown, languages),
                "std": average(shown, languages, spread),
                "protocols": {
                    p: average([scores[i]["protocols"][p]["accuracy"] for i in members], languages)
                    for p in protocols
                },
                "protocol_differences": {
                    p: against(members, p, members, first, own) for p in protocols[1:]
                },
            }
        )
        if name != baseline:
            systems[-1]["difference"] = against(members, first, groups[baseline], first)
    return {
        "data": str(data),
        "split": split,
        "epoch": first,
        "rows": {language: len(rows.labels) for language, rows in sets.items()},
        "parallel": parallel(sets),
        "baseline": baseline,
        "resamples": resamples,
        "systems": systems,
        "warnings": [
            sentence
            for folder, run, rows, score in zip(folders, runs, metrics, scores)
            for sentence in run_warnings(folder, run, rows, score["accuracy"], sets)
        ],
    }


# --- a user's own text -------------------------------------------------------------------------------------------


def label_input(folder, protocol, source, target, batch_size):
    """Write a copy of a .tsv of texts with the predicted label and each label's probability beside every row."""
    run, metrics = read_run(folder)
    labels, trained = run["labels"], run["arguments"]["train_language"]
    rows, columns = read_table(source, labels, unknown=True)
    check_run(folder, run, labels, rows, source)
    epoch = choose_epochs(metrics, protocol, [trained], trained, folder)[trained]
    logits = predict_rows(
        *load_epoch(folder, epoch, run),
        rows,
        run["arguments"]["max_length"],
        batch_size,
        str(source),
    )
    probabilities = torch.from_numpy(logits).double().softmax(1).numpy()
    columns |= {"prediction": [labels[i] for i in logits.argmax(1)]}
    columns |= {
        f"p_{label}": [f"{p:.6f}" for p in column] for label, column in zip(labels, probabilities.T)
    }
    write_table(target, columns)
    known = np.array(rows.labels or [-1]) >= 0
    accuracy = (logits.argmax(1) == rows.labels)[known].mean() if known.any() else None
    print(
        f"{target}: {len(rows.text_a):,} rows, by epoch {epoch} of {folder}"
        + (
            f"; accuracy {100 * accuracy:.1f} on the {known.sum():,} whose label is known"
            if known.any()
            else ""
        )
    )


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
    group.add_argument(
        "--resamples",
        type=in_range(int, 1),
        default=10_000,
        metavar="N",
        help="of the bootstrap (default: 10000)",
    )
    group = parser.add_argument_group("your own text, with one run")
    group.add_argument(
        "--input",
        metavar="TSV",
        help="file with a header: text, or text_a and text_b; label where known; any other columns",
    )
    group.add_argument(
        "--predictions",
        metavar="TSV",
        help="file to write: the input with predictions and probabilities",
    )
    args = parser.parse_args(argv)
    for epoch in args.epoch:
        if epoch not in PROTOCOLS and not re.fullmatch(r"\d+", epoch):
            parser.error(f"--epoch {epoch}: expected {', '.join(PROTOCOLS)} or a number")
    if not args.runs + args.translate_train:
        parser.error("name a run folder of train.py, or more")
    if args.input is None and (args.data is None or args.out is None):
        parser.error(
            "give --data and --out for a table, or --input and --predictions for your own text"
        )
    if args.input is not None and (
        args.predictions is None
        or len(args.runs) != 1
        or args.epoch[0] == "oracle"
        or len(args.epoch) > 1
    ):
        parser.error("--input needs --predictions, exactly one run, and one --epoch, not oracle")
    if args.input is not None and (
        args.data or args.out or args.max_rows or args.baseline or args.translate_train
    ):
        parser.error(
            "--input labels your own text: leave out --data, --out, --max-rows, --baseline, --translate-train"
        )
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.input is not None:
        label_input(args.runs[0], args.epoch[0], args.input, args.predictions, args.batch_size)
        return 0
    results = compare(
        args.runs,
        args.translate_train,
        args.data,
        args.split,
        list(dict.fromkeys(args.epoch)),
        args.baseline,
        args.max_rows,
        args.batch_size,
        args.resamples,
    )
    if args.split == "test" and is_xnli(args.data):
        for key, table in (("paper", PAPER_TABLE), ("published", PUBLISHED)):
            results[key] = {
                name: {l: round(v / 100, 3) for l, v in zip(PAPER_LANGUAGES, values)}
                for name, values in table.items()
            }
    text = report(results)
    write_json(Path(args.out) / "results.json", results)
    with write_atomic(Path(args.out) / "results.md") as file:
        file.write(text)
    print(text + f"\nwritten to {args.out}/")
    return 0


if __name__ == "__main__":
    cli(main)
