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
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from common import (UserError, best_epochs, cli, in_range, load_array, markdown_table, out_of_memory, pick_device,
                    pick_precision, read_json, sha256, spread, write_atomic, write_json)
from data import (encode, eval_batches, kind, load_tokenizer, read_labels, read_sets, read_table, split_languages, take,
                  write_table)
from model import check_length, check_tokens, load_model, predict

PAPER_LANGUAGES = "en zh es de ar ur".split()  # the columns of the paper's Table 1, in its order
PAPER_TABLE = {  # Table 1: accuracy on the XNLI test sets, percent, in that order
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
PROTOCOLS = {  # {table} stands for the source language
    "last": "the last epoch", "mean": "the mean of the weights after each epoch",
    "en": "best on the source language's own dev set ({source}), true zero-shot",
    "joint": "best on the mean of the other languages' dev sets",
    "oracle": "each language at the best on its own dev set",
    "test": "best on the mean of the other languages' test sets, as the paper did: too high by the choice"}


# --- what a run folder says --------------------------------------------------------------------------------------

def paper_order(languages):
    """Languages in the order of the paper's Table 1, the others after them."""
    return sorted(languages, key=lambda l: ([*PAPER_LANGUAGES, l].index(l), l))


def read_run(folder):
    """A run's description (run.json) and the rows of its metrics.jsonl. UserError when they cannot be read."""
    run = read_json(Path(folder) / "run.json", "train.py", {
        "arguments": {"max_length": int, "train_language": str, "precision": str, "seed": int}, "labels": [str],
        "pairs": bool, "data": {str: str}, "complete": bool})
    path = Path(folder) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            row["epoch"] + row["accuracy"], row["split"] + row["language"], list(row["frozen_layers"])  # the checks
        if not any(type(row["epoch"]) is int and row["split"] in ("dev", "test") for row in rows):
            raise ValueError("no evaluation at the end of an epoch")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not what train.py writes ({error!r}): has it finished an epoch?") from None
    return run, rows


def choose_epochs(metrics, protocol, languages, source, folder):
    """The epoch to report for each language, {language: epoch}, under a protocol: one of PROTOCOLS, or a number.

    Ties go to the earlier epoch. UserError for a protocol whose dev (or test) sets are not there.
    """
    if protocol == "mean" or protocol.isdecimal():
        return dict.fromkeys(languages, protocol if protocol == "mean" else int(protocol))
    if protocol == "last":
        return dict.fromkeys(languages, max(row["epoch"] for row in metrics if type(row["epoch"]) is int))
    best, split = best_epochs(metrics, source), "test" if protocol == "test" else "dev"
    needed = {language: language if protocol == "oracle" else source if protocol == "en" else protocol
              for language in languages}
    if missing := set(needed.values()) - set(best):
        there = dict.fromkeys(row["language"] for row in metrics if row["split"] == split)
        raise UserError(f"--epoch {protocol}: {folder} was evaluated on {split} in {' '.join(there) or 'no language'} "
                        f"alone ({' '.join(sorted(missing))} is missing)"
                        + " (train.py --track-test)" * (split == "test"))
    return {language: best[name] for language, name in needed.items()}


def group_runs(folders, runs):
    """Runs that differ in nothing but the seed, together: {name: [index, ...]}, in the order given."""
    groups = {}
    for i, run in enumerate(runs):
        settings = {key: value for key, value in run["arguments"].items() if key != "seed"}
        same = [settings, *(run.get(key) for key in ("revision", "tokenizer", "labels", "data"))]
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(i)
    named = {}
    for members in groups.values():
        name = Path(folders[members[0]]).name
        name = re.sub(r"[-_.]?(seed|s)?[-_.]?\d+$", "", name) or name if len(members) > 1 else name
        while name in named:
            name += "'"
        named[name] = members
    return named


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
        raise UserError(f"{path}/classifier.json and {folder}/run.json name different labels or texts")
    precision = "auto" if precision == "fp16" and device.type == "cpu" else precision
    return model.to(device), load_tokenizer(path), pick_precision(precision, device)


def predict_rows(model, tokenizer, dtype, rows, max_length, batch_size, desc):
    """Logits of Rows by what load_epoch() gives: (N, C)."""
    encoded = encode(tokenizer, rows, max_length)
    check_tokens(model.encoder, encoded.ids)
    with out_of_memory(f"--batch-size {batch_size} is too much, try {max(1, batch_size // 2)}"):
        return predict(model, eval_batches(encoded, tokenizer.pad_token_id, max_length, batch_size),
                       len(encoded.labels), dtype, desc)


def run_logits(folder, run, epochs, data, split, sets, batch_size):
    """Logits of a run, {language: (rows, C)}: saved ones where they fit the data, else from the model.

    epochs: {language: epoch}; sets: {language: Rows}. Where a model is needed, it is loaded once for each epoch.
    """
    folder, logits, models = Path(folder), {}, {}
    for language, epoch in epochs.items():
        path = folder / "predictions" / str(epoch) / f"{split}.{language}.npy"
        rows, saved = sets[language], path.parent / "origins.json"
        origin = {"sha256": sha256(Path(data) / f"{split}.{language}.tsv"), "rows": len(rows.labels)}
        origins = read_json(saved, "evaluate.py", {}) if saved.exists() else {}
        if origins.get(path.name) != origin or not path.exists():
            if epoch not in models:
                models[epoch] = load_epoch(folder, epoch, run)
            values = predict_rows(*models[epoch], rows, run["arguments"]["max_length"], batch_size,
                                  f"{folder.name} epoch {epoch} {split} {language}")
            with write_atomic(path, "wb") as file:
                np.save(file, values)
            write_json(saved, {**origins, path.name: origin})
        logits[language] = np.array(load_array(path, (len(rows.labels), len(run["labels"])),
                                               remedy="delete it, and it is computed again"))
    return logits


# --- differences -------------------------------------------------------------------------------------------------

def premise_clusters(rows):
    """Number the rows' distinct premises in order of appearance: Rows -> (N,) int64; each single text is a cluster."""
    numbers = {}
    keys = rows.text_a if rows.text_b else range(len(rows.text_a))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def bootstrap_difference(differences, clusters, resamples=10_000, seed=0):
    """Cluster bootstrap of mean differences between two systems on the same rows.

    differences (N, L): for each row and language, correctness of A less that of B, each averaged over its seeds.
    clusters (N,): the rows with one number are drawn together. Each resample draws as many clusters as there are, with
    replacement, the same ones in every language.

    Returns the mean (L,), the 95 % interval's ends (L,), (L,) by percentiles, and the two-sided p-value (L,): twice the
    smaller share of resamples on either side of 0, which inverts that interval.
    """
    differences = np.asarray(differences, dtype=float)
    count = int(clusters.max()) + 1
    sums = np.zeros((count, differences.shape[1]))
    np.add.at(sums, clusters, differences)
    sizes = np.bincount(clusters, minlength=count).astype(float)
    random, draws, chunk = np.random.default_rng(seed), [], max(1, min(1000, 10_000_000 // count))  # to bound memory
    for start in range(0, resamples, chunk):
        n = min(chunk, resamples - start)
        picked = random.integers(count, size=(n, count)) + count * np.arange(n)[:, None]
        weights = np.bincount(picked.ravel(), minlength=n * count).reshape(n, count).astype(float)
        draws.append(weights @ sums / (weights @ sizes)[:, None])
    draws = np.concatenate(draws)                                                       # (resamples, L)
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    # a mean that is 0 but for rounding counts on both sides
    tails = [(1 + (sign * draws <= 1e-12).sum(0)) / (resamples + 1) for sign in (1, -1)]
    return differences.mean(0), low, high, np.minimum(1, 2 * np.minimum(*tails))


def holm(p_values):
    """Holm's (1979) step-down correction of several p-values: (L,) -> (L,), each at least as large as before."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty_like(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    corrected[order] = np.minimum(1, stepped)
    return corrected


def mcnemar(right_a, right_b):
    """McNemar's (1947) exact test of two single runs, from the rows where just one is right: two-sided p-value.

    right_a, right_b: (N,) bool. Rows count as independent here, which clusters are not: information, not the verdict.
    """
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2 ** n)


def parallel(sets):
    """Whether the languages of {language: Rows} have the same classes row by row, as translations have."""
    first, *others = sets.values()
    return all(rows.labels == first.labels for rows in others)


def difference(right, baseline, sets, sources, resamples, paired=False):
    """A system against another on the same rows: {language: difference, interval, p-values}.

    right, baseline: lists of each run's {language: (N,) bool}, `paired` when they are of the same seeds in the same
    order: then `by_seed` is the difference of each seed. sets: {language: Rows}. Where rows are parallel, `others` is
    the mean over the languages that are not in `sources`, and resamples are of the same rows in every language. The
    Holm correction is over the languages, not over it.
    """
    shared = [language for language in sets if any(language in run for run in right)
              and any(language in run for run in baseline)]
    together = shared and parallel({language: sets[language] for language in shared})

    def mean(runs, language):
        return np.mean([run[language] for run in runs if language in run], axis=0)

    def by_row(right, baseline):
        columns = {language: mean(right, language) - mean(baseline, language) for language in shared}
        others = [columns[language] for language in shared if language not in sources]
        return columns | ({"others": np.mean(others, axis=0)} if together and len(others) > 1 else {})

    columns = by_row(right, baseline)
    groups = [list(columns)] if together else [[language] for language in shared]
    rows = {}
    for group in groups:
        clusters = premise_clusters(sets[next((source for source in sources if source in group), group[0])])
        found = bootstrap_difference(np.stack([columns[name] for name in group], axis=1), clusters, resamples)
        rows |= {name: dict(zip(("difference", "low", "high", "p"), map(float, values)))
                 for name, values in zip(group, zip(*found))}
    for a, b in zip(right, baseline) if paired else ():
        for name, values in by_row([a], [b]).items():
            rows[name].setdefault("by_seed", []).append(float(values.mean()))
    for language, p in zip(shared, holm([rows[language]["p"] for language in shared])):
        rows[language]["p_holm"] = float(p)
        if len(right) == len(baseline) == 1:
            rows[language]["p_mcnemar"] = mcnemar(right[0][language], baseline[0][language])
    return rows


# --- the table ---------------------------------------------------------------------------------------------------

def is_xnli(data):
    """Whether a data set folder was made from the XNLI archives."""
    path = Path(data) / "sources.json"
    return path.exists() and any("XNLI" in str(source) for source in read_json(path, "data.py", {}).values())


def check_run(folder, run, labels, rows, name):
    """UserError unless a run has these labels and reads what Rows hold, pairs or single texts."""
    if run["labels"] != labels:
        raise UserError(f"{folder} was trained for the labels {' '.join(run['labels'][:6])}, "
                        f"{name}/labels.txt says {' '.join(labels[:6])}")
    if run["pairs"] != (rows.text_b is not None):
        raise UserError(f"{name} holds {kind(not run['pairs'])}, {folder} was trained on {kind(run['pairs'])}")


def evaluate_run(folder, run, metrics, languages, sets, data, split, protocols, batch_size):
    """One run in some languages: what results.json says of it, and whether it is right on each row under each protocol,
    {protocol: {language: (N,) bool}}. sets: {language: Rows}."""
    source, found, rights = run["arguments"]["train_language"], {}, {}
    for name in protocols:
        epochs = choose_epochs(metrics, name, languages, source, folder)
        logits = run_logits(folder, run, epochs, data, split, sets, batch_size)
        rights[name] = {language: values.argmax(1) == sets[language].labels for language, values in logits.items()}
        found[name] = {"epochs": epochs, "accuracy": {key: float(value.mean()) for key, value in rights[name].items()}}
    return {"run": str(folder), "seed": run["arguments"]["seed"], "train_language": source, **found[protocols[0]],
            "protocols": found}, rights


def average(scores, languages, of=np.mean):
    """By language, the mean (or another function) of runs' {language: accuracy}, over those that have it."""
    return {language: float(of([score[language] for score in scores if language in score]))
            for language in languages if any(language in score for score in scores)}


def run_warnings(folder, run, metrics, accuracy, sets):
    """A sentence for a run that is not finished, and for one that is near the largest class in some language."""
    if not run["complete"]:
        yield f"{folder} is not finished: its last epoch so far is {max(row['epoch'] for row in metrics)}"
    chance = {language: np.bincount(sets[language].labels).max() / len(sets[language].labels) for language in accuracy}
    if low := [f"{language} {100 * value:.1f} ({100 * chance[language]:.1f})" for language, value in accuracy.items()
               if value < chance[language] + 0.02]:
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
            raise UserError(f"--translate-train {folder}: {data} has no {split} file in its language, {source}")
    groups = group_runs(folders[:count], runs[:count])
    groups |= {"Translate-Train": range(count, len(folders))} if translate else {}
    baseline = baseline or next(iter(groups))
    if baseline not in groups:
        raise UserError(f"--baseline {baseline}: the systems are {' '.join(groups)}")

    scores, right = zip(*(evaluate_run(folder, run, rows, languages if i < count else [source], sets, data, split,
                                       protocols, batch_size)
                          for i, (folder, run, rows, source) in enumerate(zip(folders, runs, metrics, sources))))
    groups = {name: sorted(members, key=seeds.__getitem__) for name, members in groups.items()}

    def against(mine, protocol, theirs, other, sources=sources[:count]):
        paired = len(mine) > 1 and max(mine + theirs) < count and [seeds[i] for i in mine] == [seeds[i] for i in theirs]
        return difference([right[i][protocol] for i in mine], [right[i][other] for i in theirs], sets, sources,
                          resamples, paired)

    systems, first = [], protocols[0]
    for name, members in groups.items():
        shown, own = [scores[i]["accuracy"] for i in members], {sources[i] for i in members}
        systems.append({"name": name, "train_language": sources[members[0]] if members[0] < count else None,
                        "runs": [scores[i] for i in members], "mean": average(shown, languages),
                        "std": average(shown, languages, spread),
                        "protocols": {p: average([scores[i]["protocols"][p]["accuracy"] for i in members], languages)
                                      for p in protocols},
                        "protocol_differences": {p: against(members, p, members, first, own) for p in protocols[1:]}})
        if name != baseline:
            systems[-1]["difference"] = against(members, first, groups[baseline], first)
    return {"data": str(data), "split": split, "epoch": first,
            "rows": {language: len(rows.labels) for language, rows in sets.items()}, "parallel": parallel(sets),
            "baseline": baseline, "resamples": resamples, "systems": systems,
            "warnings": [sentence for folder, run, rows, score in zip(folders, runs, metrics, scores)
                         for sentence in run_warnings(folder, run, rows, score["accuracy"], sets)]}


def report(results):
    """results.json's content as Markdown, in percent: accuracies, protocols where there are several, differences."""
    systems, rows = results["systems"], results["rows"]
    trained = list(dict.fromkeys(system["train_language"] or "each language" for system in systems))
    source = trained[0] if len(trained) == 1 else "of each system"
    meaning = {p: PROTOCOLS.get(p, f"number {p}").format(source=source) for p in systems[0]["protocols"]}
    counts = f"{min(rows.values()):,} rows a language" if len(set(rows.values())) == 1 else \
        "rows: " + ", ".join(f"{language} {count:,}" for language, count in rows.items())
    seeds = any(len({run["seed"] for run in system["runs"]}) > 1 for system in systems)
    text = (f"# Accuracy on {results['split']}, {results['data']}\n\nPercent; trained on {', '.join(trained)}; "
            f"epoch: {results['epoch']} ({meaning[results['epoch']]})"
            f"{'; ± is the standard deviation over seeds' * seeds}; {counts}.\n\n{accuracy_table(results)}\n")
    if len(meaning) > 1:
        text += ("\nThe same runs at the epoch that each protocol chooses, source language / mean of the others.\n"
                 + ";\n".join(f"`{p}`: {what}" for p, what in meaning.items())
                 + f".\n\n{protocol_table(systems, meaning)}\n")
    tables = {results["baseline"]: {system["name"]: system.get("difference") for system in systems},
              f"the same runs at `{results['epoch']}`": {f"{system['name']}, {p}": found for system in systems
                                                         for p, found in system["protocol_differences"].items()}}
    tables = {to: {name: entries for name, entries in found.items() if entries} for to, found in tables.items()}
    for to, found in tables.items():
        if found:
            text += f"\nDifference to {to}, in points:\n\n{difference_table(found, [*rows, 'others'])}\n"
    if any(tables.values()):
        mean = "`others`: mean of the languages that are no source, not corrected." if results["parallel"] else \
            "the languages' rows are no translations: no mean over them."
        text += ("\nIn brackets the 95 % interval: paired bootstrap of rows (whole premises where texts are pairs),\n"
                 f"{results['resamples']:,} resamples, of the seeds' mean. * p < 0.05 after Holm's correction over the "
                 f"languages;\n{mean}\n")
    return text + "".join(f"\nwarning: {warning}\n" for warning in results["warnings"])


def accuracy_table(results):
    """A row for each system, the paper's first where they are there, and then the mean is over its languages."""
    languages, systems = list(results["rows"]), results["systems"]
    averaged = [language for language in languages if language in PAPER_LANGUAGES or "paper" not in results]
    several = len({system["train_language"] for system in systems}) > 1

    def row(name, scores, deviation=None):
        cells = [f"{100 * scores[l]:.1f}" + (f" ±{100 * deviation[l]:.1f}" if deviation else "") if l in scores else ""
                 for l in languages]
        whole = set(averaged) <= set(scores)
        return [name, *cells, f"{100 * np.mean([scores[l] for l in averaged]):.1f}" if whole else ""]

    rows = [row(f"{origin}: {name}", scores) for origin in ("paper", "published")
            for name, scores in results.get(origin, {}).items()]
    for system in systems:
        seeds = len({run["seed"] for run in system["runs"]})
        rows.append(row(system["name"] + f" (from {system['train_language'] or 'each language'})" * several
                        + f" ({seeds} seeds)" * (seeds > 1), system["mean"], system["std"] if seeds > 1 else None))
    mean = "mean" if averaged == languages else f"mean of {' '.join(averaged)}"
    return markdown_table(["system", *languages, mean], rows)


def protocol_table(systems, protocols):
    """For each system and protocol: accuracy in its source language / mean over the others."""
    def means(scores, source):
        groups = [[value for language, value in scores.items() if (source in (language, None)) == own]
                  for own in (True, False)]
        return " / ".join(f"{100 * np.mean(group):.1f}" if group else "" for group in groups)

    return markdown_table(["system", *protocols], [
        [system["name"], *(means(system["protocols"][p], system["train_language"]) for p in protocols)]
        for system in systems])


def difference_table(found, columns):
    """Points, interval and a star where it is significant, for {name: what difference() gave}; `others` by seed too."""
    columns = [column for column in columns if any(column in entries for entries in found.values())]

    def cell(entry):
        return entry and (f"{100 * entry['difference']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"
                          + "*" * (entry.get("p_holm", entry["p"]) < 0.05))

    by_seed = [" ".join(f"{100 * value:+.1f}" for value in entries.get("others", {}).get("by_seed", ()))
               for entries in found.values()]
    rows = [[name, *(cell(entries.get(column)) or "" for column in columns), *[seeds] * any(by_seed)]
            for (name, entries), seeds in zip(found.items(), by_seed)]
    return markdown_table(["system", *columns, *["others, each seed"] * any(by_seed)], rows)


# --- a user's own text -------------------------------------------------------------------------------------------

def label_input(folder, protocol, source, target, batch_size):
    """Write a copy of a .tsv of texts with the predicted label and each label's probability beside every row."""
    run, metrics = read_run(folder)
    labels, trained = run["labels"], run["arguments"]["train_language"]
    rows, columns = read_table(source, labels, unknown=True)
    check_run(folder, run, labels, rows, source)
    epoch = choose_epochs(metrics, protocol, [trained], trained, folder)[trained]
    logits = predict_rows(*load_epoch(folder, epoch, run), rows, run["arguments"]["max_length"], batch_size,
                          str(source))
    probabilities = torch.from_numpy(logits).double().softmax(1).numpy()
    columns |= {"prediction": [labels[i] for i in logits.argmax(1)]}
    columns |= {f"p_{label}": [f"{p:.6f}" for p in column] for label, column in zip(labels, probabilities.T)}
    write_table(target, columns)
    known = np.array(rows.labels or [-1]) >= 0
    accuracy = (logits.argmax(1) == rows.labels)[known].mean() if known.any() else None
    print(f"{target}: {len(rows.text_a):,} rows, by epoch {epoch} of {folder}" + (
        f"; accuracy {100 * accuracy:.1f} on the {known.sum():,} whose label is known" if known.any() else ""))


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("runs", nargs="*",
                        help="run folders of train.py; those that differ only in --seed are averaged")
    parser.add_argument("--epoch", nargs="+", default=["last"], metavar="last|mean|en|joint|oracle|test|K",
                        help="epochs to report, the first in the table: the last (default); the mean of the weights "
                             "after each; the best on the source language's dev (en, true zero-shot), on the mean of "
                             "the other languages' dev (joint), for each language on its own dev (oracle), on the mean "
                             "of the other languages' test sets (test: the paper's own way, too high by the choice; "
                             "needs train.py --track-test); or a number")
    parser.add_argument("--batch-size", type=in_range(int, 1), default=64,
                        help="rows of 24 tokens at once; of longer ones fewer, of shorter ones more (default: 64)")
    group = parser.add_argument_group("a table")
    group.add_argument("--data", help="data set folder")
    group.add_argument("--split", choices=["dev", "test"], default="test", help="(default: test)")
    group.add_argument("--out", help="folder for results.json and results.md")
    group.add_argument("--translate-train", nargs="+", default=[], metavar="RUN",
                       help="runs trained on other languages, which make one row: each counts in its own language")
    group.add_argument("--max-rows", type=in_range(int, 1), metavar="N",
                       help="evaluate on N rows of each file, spread evenly (default: all)")
    group.add_argument("--baseline", metavar="NAME",
                       help="system to compare the others with (default: the first run's)")
    group.add_argument("--resamples", type=in_range(int, 1), default=10_000, metavar="N",
                       help="of the bootstrap (default: 10000)")
    group = parser.add_argument_group("your own text, with one run")
    group.add_argument("--input", metavar="TSV",
                       help="file with a header: text, or text_a and text_b; label where known; any other columns")
    group.add_argument("--predictions", metavar="TSV",
                       help="file to write: the input with predictions and probabilities")
    args = parser.parse_args(argv)
    for epoch in args.epoch:
        if epoch not in PROTOCOLS and not re.fullmatch(r"\d+", epoch):
            parser.error(f"--epoch {epoch}: expected {', '.join(PROTOCOLS)} or a number")
    if not args.runs + args.translate_train:
        parser.error("name a run folder of train.py, or more")
    if args.input is None and (args.data is None or args.out is None):
        parser.error("give --data and --out for a table, or --input and --predictions for your own text")
    if args.input is not None and (args.predictions is None or len(args.runs) != 1 or args.epoch[0] == "oracle"
                                   or len(args.epoch) > 1):
        parser.error("--input needs --predictions, exactly one run, and one --epoch, not oracle")
    if args.input is not None and (args.data or args.out or args.max_rows or args.baseline or args.translate_train):
        parser.error("--input labels your own text: leave out --data, --out, --max-rows, --baseline, --translate-train")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.input is not None:
        label_input(args.runs[0], args.epoch[0], args.input, args.predictions, args.batch_size)
        return 0
    results = compare(args.runs, args.translate_train, args.data, args.split, list(dict.fromkeys(args.epoch)),
                      args.baseline, args.max_rows, args.batch_size, args.resamples)
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
