"""What a search says: scores from confusion matrices, the ranking, each protocol's choice, and the grid folder's files.

Read by grid_search.py, plot.py and claims.py, run by none. Paper: section 1.5; conclusions 3, 4 and 5.
Letters: P poolings, M combinations of layers, S seeds, F files (named dev.de, test.zh, ...), C classes.
"""
import csv
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files import UserError, markdown_table, write_atomic, write_json
from significance import spread


class Results(NamedTuple):
    """All models' confusion matrices on all files, with the names of the axes."""
    confusion: np.ndarray  # (P, M, S, F, true C, predicted C)
    poolings: list
    combinations: list     # of tuples of layer numbers
    files: list


def micro_f1(confusion):
    """Micro-F1 from confusion matrices (..., C, C), as in the paper's section 1.5; here it equals accuracy."""
    true = np.trace(confusion, axis1=-2, axis2=-1)
    precision = recall = true / np.maximum(confusion.sum((-2, -1)), 1)  # one label a row: as many FP as FN
    return 2 * precision * recall / np.maximum(precision + recall, 1e-300)


def macro_f1(confusion):
    """The classes' mean F1 from confusion matrices (..., C, C); a class with neither rows nor predictions counts 0."""
    true = np.diagonal(confusion, axis1=-2, axis2=-1)
    return (2 * true / np.maximum(confusion.sum(-1) + confusion.sum(-2), 1)).mean(-1)


def columns_of(files):
    """The files whose mean each protocol ranks by: {"en": [index, ...], "joint": ..., "test": ...}, those there are."""
    def where(split, en):
        return [i for i, name in enumerate(files) if name.startswith(f"{split}.") and (name == f"{split}.en") == en]

    groups = {"en": where("dev", True), "joint": where("dev", False), "test": where("test", False)}
    return {name: group for name, group in groups.items() if group}


def rank(scores, combinations):
    """Indices (p, m) of scores (P, M), best first; ties go to fewer layers, then lower ones, then the first pooling."""
    return sorted(np.ndindex(scores.shape), key=lambda i: (
        -round(scores[i], 9), len(combinations[i[1]]), combinations[i[1]], i[0]))


def choices(results):
    """What each protocol chooses, as indices (p, m): {"en", "joint", "test": ...} and the oracle's {language: ...}."""
    mean = micro_f1(results.confusion).mean(2)                                                  # (P, M, F)
    chosen = {name: rank(mean[..., group].mean(-1), results.combinations)[0]
              for name, group in columns_of(results.files).items()}
    oracle = {name.split(".")[1]: rank(mean[..., i], results.combinations)[0]
              for i, name in enumerate(results.files) if name.startswith("dev.")}
    return chosen, oracle


def read_grid(folder):
    """results.csv -> {(pooling, layers): {column: scores over seeds, percent}}, and the columns in the file's order."""
    path = Path(folder) / "results.csv"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = [name for name in rows[0] if name.startswith(("dev_", "test_"))]
        grid = {}
        for row in rows:
            key = row["pooling"], tuple(map(int, row["layers"].split("+")))
            entry = grid.setdefault(key, {c: [] for c in columns})
            for column in columns:
                entry[column].append(100 * float(row[column]))
    except (OSError, KeyError, ValueError, IndexError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as the results of grid_search.py ({error!r})") from None
    return {key: {c: np.array(v) for c, v in entry.items()} for key, entry in grid.items()}, columns


def foreign(entry, split):
    """Mean over the non-English languages of a split, for each seed."""
    return np.mean([scores for column, scores in entry.items()
                    if column.startswith(f"{split}_") and column != f"{split}_en"], 0)


def summary(results, chosen, oracle, select, hidden, seconds):
    """The report in Markdown, with what choices() gave. `select`: the protocol to rank by; `seconds`: of all models."""
    f1, macro = 100 * micro_f1(results.confusion), 100 * macro_f1(results.confusion)            # (P, M, S, F)
    poolings, combinations, files = results.poolings, results.combinations, results.files
    groups = columns_of(files)
    score = f1[..., groups[select]].mean(-1)                                                    # (P, M, S)
    test = f1[..., groups["test"]].mean(-1) if "test" in groups else np.full(score.shape, np.nan)
    mean = score.mean(2)                                                                        # (P, M)
    order = rank(mean, combinations)
    models = f1[..., 0].size

    def number(value):
        return "" if np.isnan(value) else f"{value:.2f}"

    top = [[place, poolings[p], "+".join(map(str, combinations[m])), number(mean[p, m]), number(spread(score[p, m])),
            number(test[p, m].mean()), number(spread(test[p, m]))] for place, (p, m) in enumerate(order[:10], 1)]
    single = {combinations[m][0]: m for m in range(len(combinations)) if len(combinations[m]) == 1}
    worth = []
    for layer, alone in sorted(single.items()):
        has = np.array([layer in combination for combination in combinations])
        with_it, without = mean[:, has].mean(), mean[:, ~has].mean() if (~has).any() else np.nan
        worth.append([layer, number(with_it), number(without), f"{with_it - without:+.2f}" if (~has).any() else "",
                      *(number(value) for value in mean[:, alone])])
    best_p, best_m = next(i for i in order if len(combinations[i[1]]) == 1)
    tests = [i for i, name in enumerate(files) if name.startswith("test.")]
    picks = {name: [pick] * len(tests) for name, pick in chosen.items()}
    if {files[i].split(".")[1] for i in tests} <= set(oracle):
        picks["oracle"] = [oracle[files[i].split(".")[1]] for i in tests]
    protocols = []
    for name in [name for name in ("en", "joint", "oracle", "test") if name in picks and "test" in groups]:
        micros, macros = ([table[pick][:, i].mean() for pick, i in zip(picks[name], tests)] for table in (f1, macro))
        others = [k for k, i in enumerate(tests) if i in groups["test"]]
        p, m = picks[name][0]
        choice = "per language" if name == "oracle" else f"{poolings[p]} of {'+'.join(map(str, combinations[m]))}"
        protocols.append([name, choice, *map(number, micros), number(np.mean([micros[k] for k in others])),
                          number(np.mean([macros[k] for k in others]))])
    layer_columns = ["layer", "mean with it", "mean without it", "difference", *(f"alone: {p}" for p in poolings)]
    return f"""# The search

{models:,} models ({len(combinations)} combinations x {len(poolings)} poolings x {f1.shape[2]} seeds\
{f', hidden layer of {hidden}' if hidden else ''}), {seconds:.1f} s, {1000 * seconds / models:.1f} ms a model.
Micro-F1 in percent, mean and standard deviation (+-) over the seeds. Ranked by `{select}`: the mean over \
{', '.join(files[i] for i in groups[select])}.
`paper F1` is the mean over the non-English test sets.

{markdown_table(["rank", "pooling", "layers", "ranked by", "+-", "paper F1", "+-"], top)}

Best single layer: {combinations[best_m][0]} ({poolings[best_p]}, {mean[best_p, best_m]:.2f}). \
Best pooling, averaged over all combinations: {poolings[int(mean.mean(1).argmax())]} \
({', '.join(f'{pooling} {mean[p].mean():.2f}' for p, pooling in enumerate(poolings))}).

{markdown_table(layer_columns, worth)}
""" + (f"""
What each protocol chooses, and its micro-F1 on the test sets. `en`: on English dev, true zero-shot; \
`joint`: on the mean of
the other languages' dev; `oracle`: each language on its own dev; `test`: on the test sets, as the paper did.

{markdown_table(["protocol", "choice", *(files[i].split(".")[1] for i in tests), "paper F1", "macro-F1"], protocols)}
""" if protocols else "")


def write_grid(out, results, labels, select, hidden, seconds, model):
    """Write results.csv, confusion.LANG.csv, summary.md and best.json of a grid folder; returns the summary."""
    chosen, oracle = choices(results)
    f1 = micro_f1(results.confusion)

    def described(pick):
        return {"layers": list(results.combinations[pick[1]]), "pooling": results.poolings[pick[0]]}

    with write_atomic(out / "results.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["pooling", "layers", "hidden", "seed", *(name.replace(".", "_") for name in results.files)])
        for p, m, seed in itertools.product(*map(range, f1.shape[:3])):
            writer.writerow([results.poolings[p], "+".join(map(str, results.combinations[m])), hidden, seed,
                             *(f"{value:.6f}" for value in f1[p, m, seed])])
    for name, counts in zip(results.files, results.confusion[chosen[select]].sum(0)):           # (C, C), over seeds
        if name.startswith("test."):
            with write_atomic(out / f"confusion.{name[5:]}.csv") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["true \\ predicted", *labels])
                writer.writerows([label, *row] for label, row in zip(labels, counts.tolist()))
    text = summary(results, chosen, oracle, select, hidden, seconds)
    with write_atomic(out / "summary.md") as file:
        file.write(text)
    write_json(out / "best.json", {
        **described(chosen[select]), "select": select, "hidden": hidden, "model": model,
        "per_language": {language: described(pick) for language, pick in oracle.items()},
        "protocols": {name: described(pick) for name, pick in chosen.items()}})
    return text
