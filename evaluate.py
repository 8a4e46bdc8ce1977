"""Accuracy by language of one or more runs, beside the paper's table; predictions for a user's own text.

    python evaluate.py runs/baseline runs/mc-bert runs/mc-bert-wf --data data/xnli --split test --out results/xnli
    python evaluate.py runs/mc-bert-wf --input my.tsv --predictions out.tsv

Reads   RUN/run.json, RUN/metrics.jsonl, RUN/epochs/K/ and DATA/SPLIT.*.tsv.
Writes  OUT/results.json (fractions), OUT/results.md (percent); RUN/predictions/K/SPLIT.LANG.npy, the logits, which a
        second call reads instead of the model.
Paper   sections 1.5 and 1.7, Table 1.
"""
import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch

from data import encode, read_labels, read_split, read_table, split_languages, take
from files import UserError, cli, read_json, sha256, write_atomic, write_json
from grid_search import load_array
from model import load_model, pick_device, pick_precision, predict

PAPER_LANGUAGES = "en zh es de ar ur".split()
PAPER_TABLE = {  # Table 1, percent
    "BERT, Translate-Train, cased": [81.9, 76.6, 77.8, 75.9, 70.7, 61.6],
    "BERT, Zero-Shot, uncased (baseline)": [81.4, 63.8, 74.3, 70.5, 62.1, 58.3],
    "MC-BERT, Zero-Shot, uncased": [81.8, 65.3, 74.7, 70.6, 62.4, 57.8],
    "MC-BERT-WF, Zero-Shot, uncased": [82.1, 66.6, 74.4, 71.8, 64.3, 59.0],
}


# --- a run and its epochs ----------------------------------------------------------------------------------------

def read_run(folder):
    """A run's description (run.json) and its epochs' dev accuracies, {epoch: {language: accuracy}}."""
    folder = Path(folder)
    run = read_json(folder / "run.json", "arguments", "labels", "complete", "precision")
    history = {}
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, lines):
            if row["split"] == "dev" and isinstance(row["epoch"], int):
                history.setdefault(row["epoch"], {})[row["language"]] = float(row["accuracy"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'metrics.jsonl'} cannot be read ({error!r}): has train.py finished an epoch?") from None
    if not history:
        raise UserError(f"{folder / 'metrics.jsonl'} holds no evaluation at the end of an epoch")
    return run, history


def choose_epochs(history, protocol, languages, folder):
    """The epoch to report for each language, {language: epoch}, under a protocol: last, en, joint, oracle or a number.

    Ties go to the earlier epoch. UserError for a protocol whose dev sets are not there.
    """
    if protocol == "last":
        return dict.fromkeys(languages, max(history))
    if protocol.isdecimal():
        return dict.fromkeys(languages, int(protocol))

    def best(score):
        return max(history, key=lambda epoch: (score(history[epoch]), -epoch))

    there = history[max(history)]
    needed = {"en": ["en"], "joint": [language for language in there if language != "en"], "oracle": languages}[protocol]
    if not needed or not set(needed) <= set(there):
        raise UserError(f"--epoch {protocol}: {folder} was evaluated on dev in {' '.join(there)} alone")
    if protocol == "oracle":
        return {language: best(lambda scores: scores[language]) for language in languages}
    return dict.fromkeys(languages, best(lambda scores: np.mean([scores[language] for language in needed])))


def run_logits(folder, run, epochs, data, split, max_rows, batch_size):
    """Logits of a run on a split, {language: (rows, C)}: saved ones where they fit the data, else from the model.

    epochs: {language: epoch}. Where a model is needed, it is loaded once for each epoch.
    """
    folder, logits, models = Path(folder), {}, {}
    for language, epoch in epochs.items():
        path = folder / "predictions" / str(epoch) / f"{split}.{language}.npy"
        rows = take(read_split(data, split, language, run["labels"]), max_rows)
        origin = {"sha256": sha256(Path(data) / f"{split}.{language}.tsv"), "rows": len(rows.labels)}
        origins = read_json(path.parent / "origins.json") if (path.parent / "origins.json").exists() else {}
        if origins.get(path.name) != origin or not path.exists():
            if epoch not in models:
                models[epoch] = load_epoch(folder, epoch, run["arguments"].get("precision", "auto"))
            model, tokenizer, dtype = models[epoch]
            encoded = encode(tokenizer, rows, run["arguments"]["max_length"])
            values = predict(model, encoded, tokenizer.pad_token_id, dtype, run["arguments"]["max_length"], batch_size,
                             f"{folder.name} epoch {epoch} {split} {language}")
            with write_atomic(path, "wb") as file:
                np.save(file, values)
            write_json(path.parent / "origins.json", {**origins, path.name: origin})
        try:
            logits[language] = np.array(load_array(path, (len(rows.labels), len(run["labels"]))))
        except UserError:
            raise UserError(f"{path} is damaged or cut short: delete it, and it is computed again") from None
    return logits


def load_epoch(folder, epoch, precision="auto"):
    """The model a run kept after an epoch, on this machine's device: model, tokenizer, dtype of its products.

    precision: the run's --precision, so that dev accuracies are those of metrics.jsonl; fp16 without a GPU is "auto".
    """
    path = Path(folder) / "epochs" / str(epoch)
    if not path.is_dir():
        kept = sorted(int(p.name) for p in path.parent.glob("*") if p.name.isdecimal())
        raise UserError(f"{folder} did not keep epoch {epoch}, but {' '.join(map(str, kept)) or 'none'}")
    model, tokenizer = load_model(path)
    device = pick_device()
    precision = "auto" if precision == "fp16" and device.type == "cpu" else precision
    return model.to(device), tokenizer, pick_precision(precision, device)


# --- the table ---------------------------------------------------------------------------------------------------

def group_runs(folders, runs):
    """Runs that differ in nothing but the seed, together: {name: [index, ...]}, in the order given."""
    groups = {}
    for i, run in enumerate(runs):
        settings = {key: value for key, value in run["arguments"].items() if key != "seed"}
        groups.setdefault(json.dumps([settings, run["labels"]], sort_keys=True), []).append(i)
    named = {}
    for members in groups.values():
        name = Path(folders[members[0]]).name
        name = re.sub(r"[-_.]?(seed|s)?[-_.]?\d+$", "", name) or name if len(members) > 1 else name
        while name in named:
            name += "'"
        named[name] = members
    return named


def is_xnli(data):
    """Whether a data set folder was made from the XNLI archives."""
    path = Path(data) / "sources.json"
    return path.exists() and any("XNLI" in str(source) for source in read_json(path).values())


def table(header, rows):
    """A Markdown table whose columns are aligned in plain text too."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) + " |"
             for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def report(results, languages, paper):
    """results.json's content as Markdown, in percent."""
    def row(name, scores, spread=None):
        values = [scores.get(language) for language in languages]
        shown = ["" if v is None else f"{100 * v:.1f}" + (f" ±{100 * spread[l]:.1f}" if spread else "") for l, v in zip(languages, values)]
        there = [v for v in values if v is not None]
        return [name, *shown, f"{100 * np.mean(there):.1f}"]

    rows = []
    if paper:
        rows += [row(f"paper: {name}", dict(zip(PAPER_LANGUAGES, np.array(values) / 100))) for name, values in PAPER_TABLE.items()]
    for system in results["systems"]:
        several = len(system["runs"]) > 1
        rows.append(row(system["name"] + f" ({len(system['runs'])} seeds)" * several, system["mean"], system["std"] if several else None))
    text = f"# Accuracy on {results['split']}, {results['data']}\n\nPercent; epoch: {results['epoch']}"
    text += "; ± is the standard deviation over seeds" * any(len(system["runs"]) > 1 for system in results["systems"])
    text += f"; {min(results['rows'].values()):,} rows a language.\n\n" + table(["system", *languages, "mean"], rows) + "\n"
    return text + "".join(f"\nwarning: {warning}\n" for warning in results["warnings"])


def paper_order(languages):
    """Languages in the order of the paper's Table 1, the others after them."""
    return sorted(languages, key=lambda l: (PAPER_LANGUAGES.index(l) if l in PAPER_LANGUAGES else len(PAPER_LANGUAGES), l))


def compare(folders, data, split, protocol, max_rows, batch_size):
    """Evaluate runs on a split: the content of results.json, with accuracies as fractions."""
    labels = read_labels(data)
    languages = paper_order(split_languages(data, split))
    if not languages:
        raise UserError(f"{data} has no {split} file")
    truth = {language: np.array(take(read_split(data, split, language, labels), max_rows).labels) for language in languages}
    runs, warnings, scores = [], [], []
    for folder in folders:
        run, history = read_run(folder)
        if run["labels"] != labels:
            raise UserError(f"{folder} was trained for the labels {' '.join(run['labels'][:6])}, "
                            f"{data}/labels.txt says {' '.join(labels[:6])}")
        if not run["complete"]:
            warnings.append(f"{folder} is not finished: its last epoch so far is {max(history)}")
        epochs = choose_epochs(history, protocol, languages, folder)
        logits = run_logits(folder, run, epochs, data, split, max_rows, batch_size)
        accuracy = {l: float((logits[l].argmax(1) == truth[l]).mean()) for l in languages}
        for language in languages:
            chance = np.bincount(truth[language]).max() / len(truth[language])
            if accuracy[language] < chance + 0.02:
                warnings.append(f"{folder} has {100 * accuracy[language]:.1f} in {language}, within 2 points of chance "
                                f"({100 * chance:.1f}, the largest class): it learned nothing that carries over")
        runs.append(run)
        scores.append({"run": str(folder), "seed": run["arguments"].get("seed"), "epochs": epochs, "accuracy": accuracy})
    systems = []
    for name, members in group_runs(folders, runs).items():
        values = {l: np.array([scores[i]["accuracy"][l] for i in members]) for l in languages}
        systems.append({"name": name, "runs": [scores[i] for i in members],
                        "mean": {l: float(v.mean()) for l, v in values.items()},
                        "std": {l: float(v.std(ddof=1)) if len(v) > 1 else 0.0 for l, v in values.items()}})
    return {"data": str(data), "split": split, "epoch": protocol, "rows": {l: len(t) for l, t in truth.items()},
            "systems": systems, "warnings": warnings}


# --- a user's own text -------------------------------------------------------------------------------------------

def label_input(folder, protocol, source, target, batch_size):
    """Write a copy of a .tsv of texts with the predicted label and each label's probability beside every row."""
    run, history = read_run(folder)
    labels = run["labels"]
    rows = read_table(source, labels)
    epoch = next(iter(choose_epochs(history, protocol, ["en"], folder).values()))
    model, tokenizer, dtype = load_epoch(folder, epoch, run["arguments"].get("precision", "auto"))
    encoded = encode(tokenizer, rows, run["arguments"]["max_length"])
    logits = predict(model, encoded, tokenizer.pad_token_id, dtype, run["arguments"]["max_length"], batch_size, str(source))
    probabilities = torch.from_numpy(logits).double().softmax(1).numpy()
    texts = {"text": rows.text_a} if rows.text_b is None else {"text_a": rows.text_a, "text_b": rows.text_b}
    columns = [*texts.values(), *([[labels[i] for i in rows.labels]] if rows.labels else []),
               [labels[i] for i in logits.argmax(1)], *([f"{p:.6f}" for p in column] for column in probabilities.T)]
    with write_atomic(target) as file:
        file.write("\t".join([*texts, *(["label"] if rows.labels else []), "prediction", *(f"p_{label}" for label in labels)]) + "\n")
        file.writelines("\t".join(cells) + "\n" for cells in zip(*columns))
    print(f"{target}: {len(rows.text_a):,} rows, by epoch {epoch} of {folder}"
          + (f"; accuracy {100 * (logits.argmax(1) == encoded.labels).mean():.1f}" if rows.labels else ""))


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders of train.py; those that differ only in --seed are averaged")
    parser.add_argument("--epoch", default="last", metavar="last|en|joint|oracle|K",
                        help="epoch to report: the last (default); the best on English dev (en, true zero-shot), on the mean of the "
                             "other languages' dev (joint), for each language on its own dev (oracle); or a number")
    parser.add_argument("--batch-size", type=int, default=64, help="rows at once (default: 64)")
    group = parser.add_argument_group("a table")
    group.add_argument("--data", help="data set folder")
    group.add_argument("--split", choices=["dev", "test"], default="test", help="(default: test)")
    group.add_argument("--out", help="folder for results.json and results.md")
    group.add_argument("--max-rows", type=int, metavar="N", help="evaluate on N rows of each file, spread evenly (default: all)")
    group = parser.add_argument_group("your own text, with one run")
    group.add_argument("--input", metavar="TSV", help="file with a header text or text_a, text_b, and label where it is known")
    group.add_argument("--predictions", metavar="TSV", help="file to write: the input with predictions and probabilities")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"last|en|joint|oracle|\d+", args.epoch):
        parser.error(f"--epoch {args.epoch}: expected last, en, joint, oracle or a number")
    if args.input is None and (args.data is None or args.out is None):
        parser.error("give --data and --out for a table, or --input and --predictions for your own text")
    if args.input is not None and (args.predictions is None or len(args.runs) > 1 or args.epoch == "oracle"):
        parser.error("--input needs --predictions, exactly one run, and another --epoch than oracle")
    for name in ("batch_size", "max_rows"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 1 or more")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.input is not None:
        label_input(args.runs[0], args.epoch, args.input, args.predictions, args.batch_size)
        return 0
    results = compare(args.runs, args.data, args.split, args.epoch, args.max_rows, args.batch_size)
    paper = is_xnli(args.data)
    if paper:
        results["paper"] = {name: dict(zip(PAPER_LANGUAGES, (round(v / 100, 3) for v in values))) for name, values in PAPER_TABLE.items()}
    text = report(results, list(results["rows"]), paper)
    write_json(Path(args.out) / "results.json", results)
    with write_atomic(Path(args.out) / "results.md") as file:
        file.write(text)
    print(text + f"\nwritten to {args.out}/")
    return 0


if __name__ == "__main__":
    cli(main)
