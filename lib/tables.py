"""Every Markdown table and report."""

import numpy as np

from lib.scores import PROTOCOLS, choices, columns_of, rank, ranked, spread
from lib.significance import LEVEL, RESAMPLES

PAPER_LANGUAGES = ["en", "zh", "es", "de", "ar", "ur"]  # the columns of the paper's Table 1

PAPER_TABLE = {  # Table 1: accuracy on the XNLI test sets, percent, in that order
    "BERT, Translate-Train, cased": [81.9, 76.6, 77.8, 75.9, 70.7, 61.6],
    "BERT, Zero-Shot, uncased (baseline)": [81.4, 63.8, 74.3, 70.5, 62.1, 58.3],
    "MC-BERT, Zero-Shot, uncased": [81.8, 65.3, 74.7, 70.6, 62.4, 57.8],
    "MC-BERT-WF, Zero-Shot, uncased": [82.1, 66.6, 74.4, 71.8, 64.3, 59.0],
}

PUBLISHED = {  # the same sets elsewhere, zero-shot; the first chosen per language on dev
    "mBERT cased (Conneau et al. 2020, Table 1)": [82.1, 69.3, 74.3, 71.1, 64.9, 58.0],
    "XLM-R base (He et al. 2021)": [85.8, 76.7, 80.7, 78.7, 73.8, 68.3],
    "mDeBERTa-v3 base (He et al. 2021)": [88.2, 79.5, 84.4, 82.7, 78.5, 72.4],
}


def markdown_table(header, rows):
    """A Markdown table whose columns are aligned as plain text too, the first to the left."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *others in cells:
        aligned = [first.ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append(f"| {' | '.join(aligned)} |")
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def paper_order(languages):
    """Languages in the order of the paper's Table 1, the others after them."""
    in_paper = [language for language in PAPER_LANGUAGES if language in languages]
    return in_paper + sorted(set(languages) - set(in_paper))


# --- accuracies of runs ---------------------------------------------------------------------------


def report(results):
    """results.json's content as Markdown, in percent."""
    systems, rows = results["systems"], results["rows"]
    sources = list(dict.fromkeys(system["train_language"] or "each language" for system in systems))
    source = sources[0] if len(sources) == 1 else "of each system"
    meaning = {}
    for name in systems[0]["protocols"]:
        meaning[name] = PROTOCOLS.get(name, f"number {name}").format(source=source)

    # accuracies
    text = f"# Accuracy on {results['split']}, {results['data']}\n\n"
    text += f"Percent; trained on {', '.join(sources)}; "
    text += f"epoch: {results['epoch']} ({meaning[results['epoch']]})"
    if any(count_seeds(system) > 1 for system in systems):
        text += "; ± is the standard deviation over seeds"
    if len(set(rows.values())) == 1:
        text += f"; {min(rows.values()):,} rows a language"
    else:
        counts = [f"{language} {count:,}" for language, count in rows.items()]
        text += f"; rows: {', '.join(counts)}"
    text += f".\n\n{accuracy_table(results)}\n"

    # protocols
    if len(meaning) > 1:
        text += "\nThe same runs at the epoch that each protocol chooses, "
        text += "source language / mean of the others.\n"
        text += ";\n".join(f"`{name}`: {what}" for name, what in meaning.items())
        text += f".\n\n{protocol_table(systems, meaning)}\n"

    # differences
    to_baseline, to_first, alone = {}, {}, []
    for system in systems:
        name, difference = system["name"], system.get("difference", {})
        shared = max((entry["seeds"] for entry in difference.values()), default=0)
        if shared:
            if shared < count_seeds(system):
                name += f" ({shared} of {count_seeds(system)} seeds)"
            to_baseline[name] = difference
        elif "difference" in system:
            alone.append(name)
        for protocol, entries in system["protocol_differences"].items():
            if entries:  # Translate-Train's languages may share no seed
                to_first[f"{system['name']}, {protocol}"] = entries
    columns = [*rows, "others"]
    if to_baseline:
        text += f"\nDifference to {results['baseline']}, in points:\n\n"
        text += difference_table(to_baseline, columns) + "\n"
    if alone:
        text += f"\nNot compared, for want of a seed in common: {', '.join(alone)}.\n"
    if to_first:
        text += f"\nDifference to the same runs at `{results['epoch']}`, in points:\n\n"
        text += difference_table(to_first, columns) + "\n"
    if to_baseline or to_first:
        text += INTERVALS
        if results["parallel"]:
            text += "`others`: mean of the languages that are no source, not corrected.\n"
        else:
            text += "The languages' rows are no translations: no mean over them.\n"
    return text


INTERVALS = f"""
On the seeds that both have. In brackets the 95 % interval over rows and seeds: {RESAMPLES:,}
resamples of the rows (those that belong together are drawn together) for the seeds' mean, and
Student's t for the seeds.
* p < {LEVEL} after Holm's correction over the languages. † One seed: the rows' interval, no star.
"""


def count_seeds(system):
    return len({run["seed"] for run in system["runs"]})


def accuracy_table(results):
    """A row for each system; the paper's first where they are, and then the mean is over its
    languages."""
    languages, systems = list(results["rows"]), results["systems"]
    averaged, mean = languages, "mean"
    if "paper" in results:
        averaged = [language for language in languages if language in PAPER_LANGUAGES]
        if averaged != languages:
            mean = f"mean of {' '.join(averaged)}"

    def row(name, scores, deviation=None):
        cells = [name]
        for language in languages:
            cell = ""
            if language in scores:
                cell = percent([scores[language]])
                if deviation:
                    cell += f" ±{100 * deviation[language]:.1f}"
            cells.append(cell)
        if all(language in scores for language in averaged):
            return [*cells, percent([scores[language] for language in averaged])]
        return [*cells, ""]

    rows = []
    for origin in ("paper", "published"):
        for name, scores in results.get(origin, {}).items():
            rows.append(row(f"{origin}: {name}", scores))
    several_sources = len({system["train_language"] for system in systems}) > 1
    for system in systems:
        name, deviation = system["name"], None
        if several_sources:
            name += f" (from {system['train_language'] or 'each language'})"
        if count_seeds(system) > 1:
            name += f" ({count_seeds(system)} seeds)"
            deviation = system["std"]
        rows.append(row(name, system["mean"], deviation))
    return markdown_table(["system", *languages, mean], rows)


def percent(scores):
    """The mean of some fractions in percent, as text; nothing of none."""
    return f"{100 * np.mean(scores):.1f}" if scores else ""


def protocol_table(systems, protocols):
    """For each system and protocol: accuracy in its source language / mean over the others."""
    rows = []
    for system in systems:
        source = system["train_language"]
        cells = [system["name"]]
        for protocol in protocols:
            scores = system["protocols"][protocol]
            sources = [source]
            if source is None:  # Translate-Train: each run counts in its own language
                sources = list(scores)
            home = [scores[language] for language in scores if language in sources]
            others = [scores[language] for language in scores if language not in sources]
            cells.append(f"{percent(home)} / {percent(others)}")
        rows.append(cells)
    return markdown_table(["system", *protocols], rows)


def difference_table(differences, columns):
    """What compare() gave, {name: {column: entry}}, a row each; `others` seed by seed too."""
    columns = [name for name in columns if any(name in row for row in differences.values())]
    header, rows = ["system", *columns], []
    for name, entries in differences.items():
        rows.append([name, *(interval_cell(entries.get(column)) for column in columns)])
    by_seed = [row.get("others", {}).get("by_seed", []) for row in differences.values()]
    if any(len(values) > 1 for values in by_seed):
        header.append("others, each seed")
        for row, values in zip(rows, by_seed):
            row.append(" ".join(f"{100 * value:+.1f}" for value in values))
    return markdown_table(header, rows)


def interval_cell(entry):
    """Points and their interval, with a star where it is significant, a dagger for one seed;
    nothing for None."""
    if entry is None:
        return ""
    low, high = 100 * entry["low"], 100 * entry["high"]
    cell = f"{100 * entry['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
    if entry["seeds"] == 1:
        return cell + "†"
    if entry.get("p_holm", entry["p"]) < LEVEL:
        return cell + "*"
    return cell


# --- the search -----------------------------------------------------------------------------------


def joined(layers):
    return "+".join(map(str, layers))


def described(key):
    pooling, layers, lr = key
    return f"{pooling} of {joined(layers)}, lr {lr:g}"


def number(value):
    return "" if np.isnan(value) else f"{value:.2f}"


def average(scores):
    return np.mean(scores) if len(scores) else np.nan


def summary(results, select, hidden, seconds):
    """The search's report in Markdown. select: the protocol to rank by; seconds: of all models."""
    keys, columns, source, *_ = results
    groups = columns_of(columns, source)
    micro = 100 * results.micro
    score = micro[..., groups[select]].mean(2)  # (G, S)
    paper = np.full(score.shape, np.nan)
    if "test" in groups:
        paper = micro[..., groups["test"]].mean(2)
    mean = score.mean(1)  # (G,)
    order = ranked(results, select)
    poolings = list(dict.fromkeys(pooling for pooling, _, _ in keys))
    rates = list(dict.fromkeys(lr for _, _, lr in keys))
    size = f"{len(order) // len(poolings)} combinations x {len(poolings)} poolings"
    size += f" x {len(rates)} learning rates x {score.shape[1]} seeds"
    if hidden:
        size += f", hidden layer of {hidden}"
    text = f"""# The search

{score.size:,} models ({size}), {seconds:.1f} s, {1000 * seconds / score.size:.1f} ms a model.
Micro-F1 in percent, mean and standard deviation (+-) over the seeds. Trained on {source}. Ranked
by `{select}`: the mean of {", ".join(columns[i] for i in groups[select])}; each combination
at the learning rate that is best by it. `paper F1` is the mean over the test sets of the languages
other than {source}.

The choice: {described(keys[order[0]])}.

{top_table(keys, order[:10], score, paper)}

Conclusions 3 (which pooling: mean over all combinations), 4 (the best single layer) and 5 (what
combining adds), at each learning rate:

{rates_table(keys, mean, poolings, rates)}

What each layer is worth:

{worth_table(keys, order, mean, poolings)}
"""
    if any(column.startswith("test_") for column in columns):
        text += f"""
What each protocol chooses, and its micro-F1 on the test sets. `en`: on the dev set of {source},
true zero-shot; `joint`: on the mean of the other languages' dev; `oracle`: each language on its own
dev; `test`: on the test sets, as the paper did.

{protocols_table(results)}
"""
    return text


def top_table(keys, places, score, paper):
    """The best combinations: score and paper (G, S), what they are ranked by and their paper F1."""
    rows = []
    for place, g in enumerate(places, 1):
        pooling, layers, lr = keys[g]
        row = [place, pooling, joined(layers), f"{lr:g}"]
        for seeds in (score[g], paper[g]):
            deviation = spread(seeds) if len(seeds) > 1 else np.nan
            row += [number(seeds.mean()), number(deviation)]
        rows.append(row)
    header = ["rank", "pooling", "layers", "lr", "ranked by", "+-", "paper F1", "+-"]
    return markdown_table(header, rows)


def rates_table(keys, mean, poolings, rates):
    """Conclusions 3 to 5 at each learning rate, and with each combination at its best one."""
    groups = {}
    for lr in rates:
        groups[f"{lr:g}"] = [g for g, key in enumerate(keys) if key[2] == lr]
    if len(rates) > 1:
        groups["each at its best"] = range(len(keys))
    rows = []
    for name, places in groups.items():
        ranked_places = rank([keys[g] for g in places], mean[places] / 100)  # of fractions
        order = [places[i] for i in ranked_places]
        best = order[0]
        single = next(g for g in order if len(keys[g][1]) == 1)
        row = [name]
        for pooling in poolings:
            row.append(number(mean[[g for g in order if keys[g][0] == pooling]].mean()))
        for g in (single, best):
            row.append(f"{joined(keys[g][1])} {keys[g][0]} {mean[g]:.2f}")
        rows.append([*row, f"{mean[best] - mean[single]:+.2f}"])
    header = ["lr", *(f"mean: {pooling}" for pooling in poolings), "best single", "best", "gain"]
    return markdown_table(header, rows)


def worth_table(keys, order, mean, poolings):
    """What a layer adds to the combinations that have it, each at its best rate; and it alone."""
    rows = []
    for layer in keys[-1][1]:  # the last combination has all layers
        having = average([mean[g] for g in order if layer in keys[g][1]])
        lacking = average([mean[g] for g in order if layer not in keys[g][1]])
        row = [layer, number(having), number(lacking), number(having - lacking)]
        for pooling in poolings:
            row += [number(mean[g]) for g in order if keys[g][:2] == (pooling, (layer,))]
        rows.append(row)
    alone = [f"alone: {pooling}" for pooling in poolings]
    return markdown_table(["layer", "with it", "without it", "difference", *alone], rows)


def protocols_table(results):
    """What each protocol chooses, and what that reaches on the test sets."""
    chosen, oracle = choices(results)
    tests = [i for i, column in enumerate(results.columns) if column.startswith("test_")]
    languages = [results.columns[i].removeprefix("test_") for i in tests]
    others = [language != results.source for language in languages]
    rows = []
    for protocol in ("en", "joint", "oracle", "test"):
        picks = [chosen.get(protocol)] * len(languages)
        if protocol == "oracle":
            picks = [oracle.get(language) for language in languages]
        if None in picks:
            continue
        micro = 100 * results.micro[picks, :, tests].mean(1)  # (languages,)
        macro = 100 * results.macro[picks, :, tests].mean(1)
        choice = "per language" if protocol == "oracle" else described(results.keys[picks[0]])
        means = [average(micro[others]), average(macro[others])]
        rows.append([protocol, choice, *map(number, [*micro, *means])])
    return markdown_table(["protocol", "choice", *languages, "paper F1", "macro-F1"], rows)
