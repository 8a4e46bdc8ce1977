"""Accuracy by language of one or more runs, beside the paper's table; predictions for a user's own text.

    python evaluate.py runs/baseline runs/mc-bert runs/mc-bert-wf --data data/xnli --split test --out results/xnli
    python evaluate.py runs/mc-bert-wf --input my.tsv --predictions out.tsv

Reads   RUN/run.json, RUN/metrics.jsonl, RUN/epochs/K/ and DATA/SPLIT.*.tsv.
Writes  OUT/results.json (fractions), OUT/results.md (percent); RUN/predictions/K/SPLIT.LANG.npy, the logits, which a
        second call reads instead of the model, and origins.json, which data they are of. With --input: --predictions.
Paper   sections 1.5 and 1.7, Table 1.
"""
import argparse
import re
from pathlib import Path

import numpy as np
import torch

from data import check_rows, encode, read_labels, read_split, read_table, split_languages, take, write_table
from device import out_of_memory, pick_device, pick_precision
from files import UserError, cli, in_range, load_array, markdown_table, read_json, sha256, write_atomic, write_json
from model import load_model, predict, token_limit
from runs import PAPER_LANGUAGES, choose_epochs, group_runs, paper_order, read_run
from significance import bootstrap_difference, holm, mcnemar, premise_clusters, spread

PAPER_TABLE = {  # Table 1: accuracy on the XNLI test sets, percent, in the order of PAPER_LANGUAGES
    "BERT, Translate-Train, cased": [81.9, 76.6, 77.8, 75.9, 70.7, 61.6],
    "BERT, Zero-Shot, uncased (baseline)": [81.4, 63.8, 74.3, 70.5, 62.1, 58.3],
    "MC-BERT, Zero-Shot, uncased": [81.8, 65.3, 74.7, 70.6, 62.4, 57.8],
    "MC-BERT-WF, Zero-Shot, uncased": [82.1, 66.6, 74.4, 71.8, 64.3, 59.0],
}
PUBLISHED = {  # the same sets elsewhere, zero-shot
    "mBERT cased (Conneau et al. 2020, Table 1)": [82.1, 69.3, 74.3, 71.1, 64.9, 58.0],  # chosen per language on dev
    "XLM-R base (He et al. 2021)": [85.8, 76.7, 80.7, 78.7, 73.8, 68.3],
    "mDeBERTa-v3 base (He et al. 2021)": [88.2, 79.5, 84.4, 82.7, 78.5, 72.4],
}


# --- logits -----------------------------------------------------------------------------------------------------

def run_logits(folder, run, epochs, data, split, max_rows, batch_size):
    """Logits of a run on a split, {language: (rows, C)}: saved ones where they fit the data, else from the model.

    epochs: {language: epoch}. Where a model is needed, it is loaded once for each epoch.
    """
    folder, logits, models = Path(folder), {}, {}
    for language, epoch in epochs.items():
        path = folder / "predictions" / str(epoch) / f"{split}.{language}.npy"
        rows = take(read_split(data, split, language, run["labels"]), max_rows)
        origin = {"sha256": sha256(Path(data) / f"{split}.{language}.tsv"), "rows": len(rows.labels)}
        origins = read_json(path.parent / "origins.json", {}) if (path.parent / "origins.json").exists() else {}
        if origins.get(path.name) != origin or not path.exists():
            if epoch not in models:
                models[epoch] = load_epoch(folder, epoch, run)
            values = predict_rows(*models[epoch], rows, run["arguments"]["max_length"], batch_size,
                                  f"{folder.name} epoch {epoch} {split} {language}")
            with write_atomic(path, "wb") as file:
                np.save(file, values)
            write_json(path.parent / "origins.json", {**origins, path.name: origin})
        logits[language] = np.array(load_array(path, (len(rows.labels), len(run["labels"])),
                                               remedy="delete it, and it is computed again"))
    return logits


def load_epoch(folder, epoch, run):
    """The model a run kept after an epoch, on this machine's device: model, tokenizer, dtype of its products.

    That is the run's --precision, so that dev accuracies are those of metrics.jsonl; fp16 without a GPU is "auto".
    """
    path = Path(folder) / "epochs" / str(epoch)
    if not path.is_dir():
        kept = sorted(int(p.name) for p in path.parent.glob("*") if p.name.isdecimal())
        raise UserError(f"{folder} did not keep epoch {epoch}, but {' '.join(map(str, kept)) or 'none'}")
    model, tokenizer = load_model(path)
    token_limit(model.encoder, run["arguments"]["max_length"])
    if model.labels != run["labels"]:
        raise UserError(f"{path}/classifier.json and {folder}/run.json name different labels")
    device, precision = pick_device(), run["arguments"]["precision"]
    precision = "auto" if precision == "fp16" and device.type == "cpu" else precision
    return model.to(device), tokenizer, pick_precision(precision, device)


def predict_rows(model, tokenizer, dtype, rows, max_length, batch_size, desc):
    """Logits of Rows by what load_epoch() gives: (N, C)."""
    encoded = encode(tokenizer, rows, max_length)
    with out_of_memory(f"--batch-size {batch_size} is too much, try {max(1, batch_size // 2)}"):
        return predict(model, encoded, tokenizer.pad_token_id, dtype, max_length, batch_size, desc)


# --- the table ---------------------------------------------------------------------------------------------------

def is_xnli(data):
    """Whether a data set folder was made from the XNLI archives."""
    path = Path(data) / "sources.json"
    return path.exists() and any("XNLI" in str(source) for source in read_json(path, {}).values())


def evaluate_run(folder, truth, data, split, protocol, max_rows, batch_size):
    """One run on a split: what results.json says of it, and whether it is right on each row, {language: (N,) bool}.

    truth: {language: (N,) classes}. A run that was trained on another language than English counts in that one alone.
    """
    run, history = read_run(folder)
    trained = run["arguments"]["train_language"]
    languages = list(truth) if trained == "en" else [trained] if trained in truth else []
    protocols = {}
    for name in dict.fromkeys([protocol, "last", "en", "joint", "oracle", "test"]):
        try:
            epochs = choose_epochs(history, name, languages, folder)
        except UserError:
            if name == protocol:
                raise
            continue  # the sets that protocol looks at were not evaluated
        if name != protocol and not all((Path(folder) / "epochs" / str(k)).is_dir() for k in epochs.values()):
            continue  # its epoch was not kept
        logits = run_logits(folder, run, epochs, data, split, max_rows, batch_size)
        right = {language: values.argmax(1) == truth[language] for language, values in logits.items()}
        protocols[name] = {"epochs": epochs, "accuracy": {language: float(r.mean()) for language, r in right.items()}}
        if name == protocol:
            shown = right
    return {"run": str(folder), "seed": run["arguments"]["seed"], "train_language": trained, **protocols[protocol],
            "protocols": protocols}, shown


def average(dicts):
    """Mean and standard deviation by language of runs' {language: accuracy}, each over those that have it."""
    values = {}
    for scores in dicts:
        for language, accuracy in scores.items():
            values.setdefault(language, []).append(accuracy)
    return ({language: float(np.mean(v)) for language, v in values.items()},
            {language: float(spread(v)) for language, v in values.items()})


def difference(right, baseline, clusters, resamples):
    """A system against another on the same rows: {language: difference, interval, p-values}.

    right, baseline: lists of each run's {language: (N,) bool}. `others` is the mean over the non-English languages; the
    Holm correction is over the languages, not over it.
    """
    there = dict.fromkeys(language for run in right for language in run)
    shared = [language for language in there if any(language in run for run in baseline)]
    if not shared:
        return {}

    def mean(runs, language):
        return np.mean([run[language] for run in runs if language in run], axis=0)

    columns = {language: mean(right, language) - mean(baseline, language) for language in shared}
    others = [column for language, column in columns.items() if language != "en"]
    if len(others) > 1:
        columns["others"] = np.mean(others, axis=0)
    found = bootstrap_difference(np.stack(list(columns.values()), axis=1), clusters, resamples)
    rows = {language: dict(zip(("difference", "low", "high", "p"), map(float, values)))
            for language, values in zip(columns, zip(*found))}
    for language, p in zip(shared, holm([rows[language]["p"] for language in shared])):
        rows[language]["p_holm"] = float(p)
        if len(right) == len(baseline) == 1:
            rows[language]["p_mcnemar"] = mcnemar(right[0][language], baseline[0][language])
    return rows


def compare(folders, data, split, protocol, baseline, max_rows, batch_size, resamples):
    """Evaluate runs on a split: the content of results.json, with accuracies as fractions."""
    labels = read_labels(data)
    languages = paper_order(split_languages(data, split))
    if not languages:
        raise UserError(f"{data} has no {split} file")
    rows = {language: take(read_split(data, split, language, labels), max_rows) for language in languages}
    truth = {language: np.array(row.labels) for language, row in rows.items()}
    runs, histories = zip(*map(read_run, folders))
    for folder, run in zip(folders, runs):
        if run["labels"] != labels:
            raise UserError(f"{folder} was trained for the labels {' '.join(run['labels'][:6])}, "
                            f"{data}/labels.txt says {' '.join(labels[:6])}")
    groups = group_runs(folders, runs)
    if len(groups) > 1:
        check_rows(rows, data, split)
    baseline = next(iter(groups)) if baseline is None else baseline
    if baseline not in groups:
        raise UserError(f"--baseline {baseline}: the systems are {' '.join(groups)}")
    scores, right = zip(*(evaluate_run(folder, truth, data, split, protocol, max_rows, batch_size)
                          for folder in folders))
    warnings = [f"{folder} is not finished: its last epoch so far is {max(history)}"
                for folder, run, history in zip(folders, runs, histories) if not run["complete"]]
    for score in scores:
        for language, accuracy in score["accuracy"].items():
            chance = np.bincount(truth[language]).max() / len(truth[language])
            if accuracy < chance + 0.02:
                warnings.append(f"{score['run']} has {100 * accuracy:.1f} in {language}, within 2 points of chance "
                                f"({100 * chance:.1f}, the largest class): it learned nothing that carries over")
    clusters = premise_clusters(rows["en" if "en" in rows else languages[0]])
    systems = []
    for name, members in groups.items():
        mean, std = average(scores[i]["accuracy"] for i in members)
        system = {"name": name, "runs": [scores[i] for i in members], "mean": mean, "std": std,
                  "protocols": {p: average(scores[i]["protocols"][p]["accuracy"] for i in members)[0]
                                for p in scores[members[0]]["protocols"]
                                if all(p in scores[i]["protocols"] for i in members)}}
        if name != baseline:
            system["difference"] = difference([right[i] for i in members], [right[i] for i in groups[baseline]],
                                              clusters, resamples)
        systems.append(system)
    return {"data": str(data), "split": split, "epoch": protocol, "rows": {l: len(t) for l, t in truth.items()},
            "baseline": baseline, "resamples": resamples, "systems": systems, "warnings": warnings}


def report(results):
    """results.json's content as Markdown, in percent."""
    languages = list(results["rows"])
    compared = [l for l in languages if l in PAPER_LANGUAGES or "paper" not in results]

    def row(name, scores, spread=None):
        shown = [f"{100 * scores[l]:.1f}" + (f" ±{100 * spread[l]:.1f}" if spread else "") if l in scores else ""
                 for l in languages]
        whole = set(compared) <= set(scores)
        return [name, *shown, f"{100 * np.mean([scores[l] for l in compared]):.1f}" if whole else ""]

    def mean_of(scores, english):
        there = [value for language, value in scores.items() if (language == "en") == english]
        return f"{100 * np.mean(there):.1f}" if there else ""

    rows = [row(f"{source}: {name}", results[source][name])
            for source in ("paper", "published") for name in results.get(source, {})]
    for system in results["systems"]:
        seeds = len({run["seed"] for run in system["runs"]})
        rows.append(row(system["name"] + f" ({seeds} seeds)" * (seeds > 1), system["mean"],
                        system["std"] if seeds > 1 else None))
    mean = "mean" if compared == languages else f"mean of {' '.join(compared)}"
    text = f"# Accuracy on {results['split']}, {results['data']}\n\nPercent; epoch: {results['epoch']}"
    several = any(len({run["seed"] for run in system["runs"]}) > 1 for system in results["systems"])
    text += "; ± is the standard deviation over seeds" * several
    text += f"; {min(results['rows'].values()):,} rows a language.\n\n"
    text += markdown_table(["system", *languages, mean], rows) + "\n"
    names = list(dict.fromkeys(p for system in results["systems"] for p in system["protocols"]))
    text += ("\nThe same runs at the epoch that each protocol chooses, English / mean of the other languages. "
             "`en`: best on English dev, true zero-shot;\n"
             "`joint`: on the mean of the other languages' dev; `oracle`: each language on its own dev"
             + "; `test`: on the other languages'\ntest sets, as the paper did: too high by the choice"
             * ("test" in names) + ".\n\n")
    text += markdown_table(["system", *names], [[system["name"], *(
        f"{mean_of(system['protocols'].get(p, {}), True)} / {mean_of(system['protocols'].get(p, {}), False)}"
        for p in names)] for system in results["systems"]]) + "\n"
    compared_systems = [system for system in results["systems"] if system.get("difference")]
    if compared_systems:
        columns = [l for l in [*languages, "others"] if any(l in system["difference"] for system in compared_systems)]
        text += (f"\nDifference to {results['baseline']}, in points, with its 95 % interval: paired bootstrap of the "
                 f"rows, clustered by premise, {results['resamples']:,} resamples.\n* p < 0.05 after Holm's correction "
                 "over the languages; `others`: mean of the non-English languages, not corrected.\n\n")
        text += markdown_table(["system", *columns], [
            [system["name"], *(shown_difference(system["difference"].get(l)) for l in columns)]
            for system in compared_systems]) + "\n"
    return text + "".join(f"\nwarning: {warning}\n" for warning in results["warnings"])


def shown_difference(entry):
    """One cell of the table of differences: points, interval, a star when it is significant."""
    if entry is None:
        return ""
    return (f"{100 * entry['difference']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"
            + "*" * (entry.get("p_holm", entry["p"]) < 0.05))


# --- a user's own text -------------------------------------------------------------------------------------------

def label_input(folder, protocol, source, target, batch_size):
    """Write a copy of a .tsv of texts with the predicted label and each label's probability beside every row."""
    run, history = read_run(folder)
    labels = run["labels"]
    rows = read_table(source, labels)
    epoch = next(iter(choose_epochs(history, protocol, ["en"], folder).values()))
    logits = predict_rows(*load_epoch(folder, epoch, run), rows, run["arguments"]["max_length"], batch_size,
                          str(source))
    probabilities = torch.from_numpy(logits).double().softmax(1).numpy()
    columns = rows.columns(labels) | {"prediction": [labels[i] for i in logits.argmax(1)]}
    columns |= {f"p_{label}": [f"{p:.6f}" for p in column] for label, column in zip(labels, probabilities.T)}
    write_table(target, columns)
    print(f"{target}: {len(rows.text_a):,} rows, by epoch {epoch} of {folder}"
          + (f"; accuracy {100 * (logits.argmax(1) == rows.labels).mean():.1f}" if rows.labels else ""))


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+",
                        help="run folders of train.py; those that differ only in --seed are averaged")
    parser.add_argument("--epoch", default="last", metavar="last|en|joint|oracle|test|K",
                        help="epoch to report: the last (default); the best on English dev (en, true zero-shot), on "
                             "the mean of the other languages' dev (joint), for each language on its own dev (oracle); "
                             "on the mean of the non-English test sets (test: the paper's own way; its accuracies are "
                             "too high by the choice; needs train.py --track-test); or a number")
    parser.add_argument("--batch-size", type=in_range(int, 1), default=64,
                        help="rows of 24 tokens at once; of longer ones fewer, of shorter ones more (default: 64)")
    group = parser.add_argument_group("a table")
    group.add_argument("--data", help="data set folder")
    group.add_argument("--split", choices=["dev", "test"], default="test", help="(default: test)")
    group.add_argument("--out", help="folder for results.json and results.md")
    group.add_argument("--max-rows", type=in_range(int, 1), metavar="N",
                       help="evaluate on N rows of each file, spread evenly (default: all)")
    group.add_argument("--baseline", metavar="NAME",
                       help="system to compare the others with (default: the first run's)")
    group.add_argument("--resamples", type=in_range(int, 1), default=10_000, metavar="N",
                       help="of the bootstrap (default: 10000)")
    group = parser.add_argument_group("your own text, with one run")
    group.add_argument("--input", metavar="TSV",
                       help="file with a header text or text_a, text_b, and label where it is known")
    group.add_argument("--predictions", metavar="TSV",
                       help="file to write: the input with predictions and probabilities")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"last|en|joint|oracle|test|\d+", args.epoch):
        parser.error(f"--epoch {args.epoch}: expected last, en, joint, oracle, test or a number")
    if args.input is None and (args.data is None or args.out is None):
        parser.error("give --data and --out for a table, or --input and --predictions for your own text")
    if args.input is not None and (args.predictions is None or len(args.runs) > 1 or args.epoch == "oracle"):
        parser.error("--input needs --predictions, exactly one run, and another --epoch than oracle")
    if args.input is not None and (args.data or args.out or args.max_rows or args.baseline):
        parser.error("--input labels your own text: leave out --data, --out, --max-rows and --baseline")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.input is not None:
        label_input(args.runs[0], args.epoch, args.input, args.predictions, args.batch_size)
        return 0
    results = compare(args.runs, args.data, args.split, args.epoch, args.baseline, args.max_rows, args.batch_size,
                      args.resamples)
    if args.split == "test" and is_xnli(args.data):
        for key, table in (("paper", PAPER_TABLE), ("published", PUBLISHED)):
            results[key] = {name: {l: round(v / 100, 3) for l, v in zip(PAPER_LANGUAGES, values)}
                            for name, values in table.items()}
    text = report(results)
    write_json(Path(args.out) / "results.json", results)
    with write_atomic(Path(args.out) / "results.md") as file:
        file.write(text)
    print(text + f"\nwritten to {args.out}/")
    return 0


if __name__ == "__main__":
    cli(main)
