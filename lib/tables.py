"""Every Markdown table and report."""

import numpy as np

from lib.scores import PROTOCOLS, choices, columns_of, rank, spread


def markdown_table(header, rows):
    """A Markdown table whose columns are aligned as plain text too, the first to the left."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| "
        + " | ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))
        )
        + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


PAPER_LANGUAGES = "en zh es de ar ur".split()  # the columns of the paper's Table 1, in its order


PAPER_TABLE = {  # Table 1: accuracy on the XNLI test sets, percent, in that order
    "BERT, Translate-Train, cased": [81.9, 76.6, 77.8, 75.9, 70.7, 61.6],
    "BERT, Zero-Shot, uncased (baseline)": [81.4, 63.8, 74.3, 70.5, 62.1, 58.3],
    "MC-BERT, Zero-Shot, uncased": [81.8, 65.3, 74.7, 70.6, 62.4, 57.8],
    "MC-BERT-WF, Zero-Shot, uncased": [82.1, 66.6, 74.4, 71.8, 64.3, 59.0],
}


PUBLISHED = {  # the same sets elsewhere, zero-shot
    "mBERT cased (Conneau et al. 2020, Table 1)": [
        82.1,
        69.3,
        74.3,
        71.1,
        64.9,
        58.0,
    ],  # chosen per language on dev
    "XLM-R base (He et al. 2021)": [85.8, 76.7, 80.7, 78.7, 73.8, 68.3],
    "mDeBERTa-v3 base (He et al. 2021)": [88.2, 79.5, 84.4, 82.7, 78.5, 72.4],
}


def paper_order(languages):
    """Languages in the order of the paper's Table 1, the others after them."""
    return sorted(languages, key=lambda l: ([*PAPER_LANGUAGES, l].index(l), l))


def report(results):
    """results.json's content as Markdown, in percent: accuracies, protocols where there are several, differences."""
    systems, rows = results["systems"], results["rows"]
    trained = list(dict.fromkeys(system["train_language"] or "each language" for system in systems))
    source = trained[0] if len(trained) == 1 else "of each system"
    meaning = {
        p: PROTOCOLS.get(p, f"number {p}").format(source=source) for p in systems[0]["protocols"]
    }
    counts = (
        f"{min(rows.values()):,} rows a language"
        if len(set(rows.values())) == 1
        else "rows: " + ", ".join(f"{language} {count:,}" for language, count in rows.items())
    )
    seeds = any(len({run["seed"] for run in system["runs"]}) > 1 for system in systems)
    text = (
        f"# Accuracy on {results['split']}, {results['data']}\n\nPercent; trained on {', '.join(trained)}; "
        f"epoch: {results['epoch']} ({meaning[results['epoch']]})"
        f"{'; ± is the standard deviation over seeds' * seeds}; {counts}.\n\n{accuracy_table(results)}\n"
    )
    if len(meaning) > 1:
        text += (
            "\nThe same runs at the epoch that each protocol chooses, source language / mean of the others.\n"
            + ";\n".join(f"`{p}`: {what}" for p, what in meaning.items())
            + f".\n\n{protocol_table(systems, meaning)}\n"
        )
    tables = {
        results["baseline"]: {system["name"]: system.get("difference") for system in systems},
        f"the same runs at `{results['epoch']}`": {
            f"{system['name']}, {p}": found
            for system in systems
            for p, found in system["protocol_differences"].items()
        },
    }
    tables = {
        to: {name: entries for name, entries in found.items() if entries}
        for to, found in tables.items()
    }
    for to, found in tables.items():
        if found:
            text += f"\nDifference to {to}, in points:\n\n{difference_table(found, [*rows, 'others'])}\n"
    if any(tables.values()):
        mean = (
            "`others`: mean of the languages that are no source, not corrected."
            if results["parallel"]
            else "the languages' rows are no translations: no mean over them."
        )
        text += (
            "\nIn brackets the 95 % interval: paired bootstrap of rows (whole premises where texts are pairs),\n"
            f"{results['resamples']:,} resamples, of the seeds' mean. * p < 0.05 after Holm's correction over the "
            f"languages;\n{mean}\n"
        )
    return text + "".join(f"\nwarning: {warning}\n" for warning in results["warnings"])


def accuracy_table(results):
    """A row for each system, the paper's first where they are there, and then the mean is over its languages."""
    languages, systems = list(results["rows"]), results["systems"]
    averaged = [
        language for language in languages if language in PAPER_LANGUAGES or "paper" not in results
    ]
    several = len({system["train_language"] for system in systems}) > 1

    def row(name, scores, deviation=None):
        cells = [
            f"{100 * scores[l]:.1f}" + (f" ±{100 * deviation[l]:.1f}" if deviation else "")
            if l in scores
            else ""
            for l in languages
        ]
        whole = set(averaged) <= set(scores)
        return [
            name,
            *cells,
            f"{100 * np.mean([scores[l] for l in averaged]):.1f}" if whole else "",
        ]

    rows = [
        row(f"{origin}: {name}", scores)
        for origin in ("paper", "published")
        for name, scores in results.get(origin, {}).items()
    ]
    for system in systems:
        seeds = len({run["seed"] for run in system["runs"]})
        rows.append(
            row(
                system["name"]
                + f" (from {system['train_language'] or 'each language'})" * several
                + f" ({seeds} seeds)" * (seeds > 1),
                system["mean"],
                system["std"] if seeds > 1 else None,
            )
        )
    mean = "mean" if averaged == languages else f"mean of {' '.join(averaged)}"
    return markdown_table(["system", *languages, mean], rows)


def protocol_table(systems, protocols):
    """For each system and protocol: accuracy in its source language / mean over the others."""

    def means(scores, source):
        groups = [
            [value for language, value in scores.items() if (source in (language, None)) == own]
            for own in (True, False)
        ]
        return " / ".join(f"{100 * np.mean(group):.1f}" if group else "" for group in groups)

    return markdown_table(
        ["system", *protocols],
        [
            [
                system["name"],
                *(means(system["protocols"][p], system["train_language"]) for p in protocols),
            ]
            for system in systems
        ],
    )


def difference_table(found, columns):
    """Points, interval and a star where it is significant, for {name: what difference() gave}; `others` by seed too."""
    columns = [column for column in columns if any(column in entries for entries in found.values())]

    def cell(entry):
        return entry and (
            f"{100 * entry['difference']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"
            + "*" * (entry.get("p_holm", entry["p"]) < 0.05)
        )

    by_seed = [
        " ".join(f"{100 * value:+.1f}" for value in entries.get("others", {}).get("by_seed", ()))
        for entries in found.values()
    ]
    rows = [
        [name, *(cell(entries.get(column)) or "" for column in columns), *[seeds] * any(by_seed)]
        for (name, entries), seeds in zip(found.items(), by_seed)
    ]
    return markdown_table(["system", *columns, *["others, each seed"] * any(by_seed)], rows)


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
    order = rank(keys, mean / 100)
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
        order = [places[i] for i in rank([keys[g] for g in places], mean[places] / 100)]
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
