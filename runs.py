"""What run folders say: settings, dev accuracies by epoch, which epoch a protocol reports, which runs belong together.

Read by evaluate.py, plot.py and claims.py, run by none.
"""
import json
import re
from pathlib import Path

import numpy as np

from files import UserError, read_json

PAPER_LANGUAGES = "en zh es de ar ur".split()  # the columns of the paper's Table 1, in its order


RUN = {"arguments": {"max_length": int, "train_language": str, "precision": str, "seed": int}, "labels": [str],
       "complete": bool}


def paper_order(languages):
    """Languages in the order of the paper's Table 1, the others after them."""
    return sorted(languages, key=lambda l: ([*PAPER_LANGUAGES, l].index(l), l))


def read_metrics(folder):
    """metrics.jsonl's rows. UserError when it cannot be read."""
    path = Path(folder) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        # `+ 0` and `+ ""` are the checks: a TypeError for what is no number, no text
        return [{**row, "epoch": row["epoch"] + 0, "accuracy": float(row["accuracy"]), "split": row["split"] + "",
                 "language": row["language"] + "", "frozen_layers": list(row.get("frozen_layers", []))} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): has train.py finished an epoch?") from None


def read_run(folder):
    """A run's description (run.json) and what its epochs scored, {epoch: {"dev": {language: accuracy}, "test": ...}}.

    test is there for runs with --track-test.
    """
    run = read_json(Path(folder) / "run.json", RUN)
    history = {}
    for row in read_metrics(folder):
        if row["split"] != "train" and isinstance(row["epoch"], int):
            history.setdefault(row["epoch"], {}).setdefault(row["split"], {})[row["language"]] = row["accuracy"]
    if not history:
        raise UserError(f"{Path(folder) / 'metrics.jsonl'} holds no evaluation at the end of an epoch")
    return run, history


def choose_epochs(history, protocol, languages, folder):
    """The epoch to report for each language, {language: epoch}, under a protocol: last, en, joint, oracle, test or
    a number.

    Ties go to the earlier epoch. UserError for a protocol whose dev (or test) sets are not there.
    """
    if protocol == "last":
        return dict.fromkeys(languages, max(history))
    if protocol.isdecimal():
        return dict.fromkeys(languages, int(protocol))

    split = "test" if protocol == "test" else "dev"
    there = history[max(history)].get(split, {})
    others = [language for language in there if language != "en"]
    needed = {"en": ["en"], "joint": others, "oracle": languages, "test": others}[protocol]
    if not needed or any(set(needed) - set(scores.get(split, {})) for scores in history.values()):
        raise UserError(f"--epoch {protocol}: {folder} was evaluated on {split} in "
                        f"{' '.join(there) or 'no language'} alone" + " (train.py --track-test)" * (split == "test"))

    def best(score):
        return max(history, key=lambda epoch: (round(score(history[epoch][split]), 9), -epoch))  # rounding parts no tie

    if protocol == "oracle":
        return {language: best(lambda scores: scores[language]) for language in languages}
    return dict.fromkeys(languages, best(lambda scores: np.mean([scores[language] for language in needed])))


def group_runs(folders, runs):
    """Runs that differ in nothing but the seed, together: {name: [index, ...]}, in the order given.

    Those that were trained on other languages than English make one system, Translate-Train: a model for each language.
    """
    groups = {}
    for i, run in enumerate(runs):
        settings = {key: value for key, value in run["arguments"].items() if key != "seed"}
        if settings["train_language"] != "en":
            settings["train_language"] = "each"
        groups.setdefault(json.dumps([settings, run["labels"]], sort_keys=True), []).append(i)
    named = {}
    for members in groups.values():
        name = Path(folders[members[0]]).name
        name = re.sub(r"[-_.]?(seed|s)?[-_.]?\d+$", "", name) or name if len(members) > 1 else name
        while name in named:
            name += "'"
        named[name] = members
    return named
