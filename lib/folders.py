"""Files written whole or not at all, JSON, arrays, hashes; the output folders of long jobs; reading a run and a grid."""

import contextlib
import csv
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from lib.messages import UserError, first_line


@contextlib.contextmanager
def write_atomic(path, mode="w"):
    """Open a file beside `path` that takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(
            handle, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})
        ) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path, value):
    with write_atomic(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def fits(value, form):
    """Whether a JSON value has a form: a type; [form], a list of such; {key: form}, or {str: form} for any keys."""
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(entry, form[0]) for entry in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(
            fits(entry, part)
            for key, part in form.items()
            for entry in (value.values() if key is str else [value.get(key)])
        )
    return type(value) is form


def read_json(path, script, form):
    """The object in a JSON file that `script` writes, of a {key: form} of fits(). UserError when it is another."""
    try:
        value = json.loads(Path(path).read_bytes())
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # half of a surrogate pair cannot be written again
        wrong = next(iter(key for key in form if not fits(value, {key: form[key]})), None)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        wrong = error
    if wrong is not None or not isinstance(value, dict):
        raise UserError(
            f"{path}: not what {script} writes ({wrong}): delete it, or --overwrite"
        ) from None
    return value


def sha256(path):
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_array(path, shape, kind="f", remedy="run extract.py again", mode="r"):
    """A .npy file of that shape and NumPy kind, memory-mapped. UserError when it is missing, cut short or another."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        if mode != "r":  # which alone would fill up a short file
            array = np.lib.format.open_memmap(path, mode)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {remedy}") from None
    except Exception as error:  # NumPy raises a dozen different ones
        raise UserError(f"{path} is damaged or cut short ({first_line(error)}): {remedy}") from None
    if array.shape != shape or array.dtype.kind != kind:
        raise UserError(
            f"{path} has shape {array.shape} and type {array.dtype}, expected {shape} "
            f"of {'integers' if kind == 'i' else 'floats'}: {remedy}"
        )
    return array


@contextlib.contextmanager
def claim(folder, rank=0):
    """Hold an output folder for this process (of several, for the first). UserError when another holds it."""
    if rank > 0:
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder} is in use by another process") from None
        yield


def differences(old, new, prefix=""):
    """How two nested dicts differ, a phrase for each value; the empty list when they do not."""
    phrases = []
    for key in {**old, **new}:
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            phrases += differences(before, now, f"{prefix}{key}.")
        elif before != now:
            phrases.append(f"{prefix}{key} was {before!r}, is now {now!r}"[:200])
    return phrases


def start_folder(folder, name, script, description, noted, overwrite=False):
    """Begin, or go on with, the output folder of a long job that `description` (a dict) defines.

    Writes folder/name (JSON) with "complete": false; finish_folder() turns it to true. Returns whether the job is
    complete already. UserError names what differs when the folder is another job's; `noted` (a dict) is not compared.
    """
    folder, description = Path(folder), json.loads(json.dumps(description))
    there = sorted(
        path for path in folder.iterdir() if path.name != ".lock" and path.suffix != ".tmp"
    )
    if there and folder / name not in there:
        raise UserError(
            f"{folder} holds {there[0].name} but no {name}, so it is none that {script} made: "
            "give another --out, or delete it yourself"
        )
    if there and f'"script": "{script}"' not in (folder / name).read_text(
        encoding="utf-8", errors="replace"
    ):
        raise UserError(
            f"{folder / name} is none that {script} made: give another --out, or delete the folder "
            "yourself"
        )
    for path in (
        folder.iterdir() if overwrite else folder.rglob(".*.tmp")
    ):  # what a killed process left half-written
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not overwrite and there:
        old = read_json(folder / name, script, {"complete": bool})
        if different := differences({key: old.get(key) for key in description}, description):
            raise UserError(
                f"{folder} was made with other settings: {'; '.join(different[:6])}. "
                "Give another --out, or --overwrite to delete it and start anew"
            )
        return old["complete"]
    write_json(folder / name, {"complete": False, "script": script, **description, **noted})
    return False


def finish_folder(folder, name):
    """Note in folder/name that the job of start_folder() is complete."""
    write_json(
        Path(folder) / name, {**json.loads((Path(folder) / name).read_bytes()), "complete": True}
    )


def versions():
    """What this runs on, for the records."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def read_run(folder):
    """A run's description (run.json) and the rows of its metrics.jsonl. UserError when they cannot be read."""
    run = read_json(
        Path(folder) / "run.json",
        "train.py",
        {
            "arguments": {"max_length": int, "train_language": str, "precision": str, "seed": int},
            "labels": [str],
            "pairs": bool,
            "data": {str: str},
            "complete": bool,
        },
    )
    path = Path(folder) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            (
                row["epoch"] + row["accuracy"],
                row["split"] + row["language"],
                list(row["frozen_layers"]),
            )  # the checks
        if not any(type(row["epoch"]) is int and row["split"] in ("dev", "test") for row in rows):
            raise ValueError("no evaluation at the end of an epoch")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not what train.py writes ({error!r}): has it finished an epoch?"
        ) from None
    return run, rows


def read_grid(folder):
    """A grid folder -> {(pooling, layers, lr): {"dev_de": percent for each seed, ...}}, its columns, its best.json."""
    best = read_json(
        Path(folder) / "best.json", "grid_search.py", {"train_language": str, "select": str}
    )
    path, grid = Path(folder) / "results.csv", {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = [name for name in rows[0] if name.startswith(("dev_", "test_"))]
        for row in rows:
            key = row["pooling"], tuple(map(int, row["layers"].split("+"))), float(row["lr"])
            grid.setdefault(key, []).append([100 * float(row[column]) for column in columns])
    except (
        OSError,
        KeyError,
        ValueError,
        IndexError,
        TypeError,
        AttributeError,
        csv.Error,
    ) as error:
        raise UserError(
            f"{path}: not what grid_search.py writes ({error!r}): "
            "delete it, and run the search again"
        ) from None
    return (
        {key: dict(zip(columns, np.transpose(scores))) for key, scores in grid.items()},
        columns,
        best,
    )
