"""Files written whole or not at all, JSON, hashes; the output folders of long jobs; reading
a run."""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

from lib.messages import UserError, say_once

# --- files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def write_atomic(path, mode="w"):
    """Open a file beside `path` that takes its place when the block ends without an error.

    It gets the permissions of any new file. A device or a pipe is written to as it is; of a link,
    what it points to is replaced.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if path.exists() and not path.is_file():
        with open(path, mode, **text) as file:
            yield file
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = hidden_beside(path)
    try:
        with open(beside, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def hidden_beside(path):
    """A new name beside a file or folder; start_folder() removes what a killed process leaves."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_text(path, text):
    with write_atomic(path) as file:
        file.write(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path, script, keys=()):
    """The object in a JSON file of `script`. UserError where it is missing or lacks a key."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: it is made by {script}") from None
    except ValueError:
        raise UserError(f"{path} is no JSON: it was not made by {script}") from None
    for key in keys:
        if key not in value:
            raise UserError(f"{path} lacks {key!r}: not made by this version of {script}?")
    return value


def sha256(path):
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- output folders of long jobs ------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder, rank=0):
    """Hold an output folder for this process (of several, for the first).

    UserError when another process holds it. A file system without locks is taken as it is.
    """
    if rank > 0:
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process") from None
        except OSError as error:  # NFS and Lustre may have none
            say_once(f"warning: {folder} cannot be locked ({error}): start nothing else in it")
        yield


def flat(nested, prefix=""):
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    values = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def start_folder(folder, name, script, description, ignored, overwrite=False, defaults=None):
    """Begin, or go on with, the output folder of a long job that `description` (a dict) defines.

    Writes folder/name (JSON) with "complete": false; finish_folder() turns it to true. Returns
    whether the job is complete already. UserError names what differs when the folder is another
    job's: all but the `ignored` keys ("versions", "arguments.save_steps") is compared. A key that
    the older job did not know yet counts as having been as in `defaults` (nested like description).
    """
    folder, old = Path(folder), {}
    if (folder / name).exists():
        old = read_json(folder / name, script)
    # a folder of anybody else is never touched
    present = {path.name for path in folder.iterdir() if path.suffix != ".tmp"} - {".lock"}
    if present and old.get("script") != script:
        raise UserError(
            f"{folder} holds {min(present)} and is none that {script} made: give another --out, or "
            "delete it yourself"
        )
    for path in folder.rglob(".*.tmp"):  # what a killed process left half-written
        remove(path)
    if old and not overwrite:
        now = flat(json.loads(json.dumps(description)))
        new_flags = {key: value for key, value in flat(defaults or {}).items() if key in now}
        check_same(folder, new_flags | flat(old), now, ignored)
        return old["complete"]
    if old:
        write_json(folder / name, old | {"complete": False})  # whatever happens while it is emptied
        for other in present - {name}:
            remove(folder / other)
    write_json(folder / name, {"complete": False, "script": script, **description})
    return False


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_same(folder, before, now, ignored):
    """UserError, with what differs, unless the job in a folder is the one that is asked for."""
    different = []
    for key in before | now:
        skipped = key in ("complete", "script", *ignored) or key.split(".")[0] in ignored
        if not skipped and before.get(key) != now.get(key):
            different.append(f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"[:200])
    if not different:
        return
    advice = "Give another --out, or --overwrite to delete it and start anew"
    if before.get("precision") != now.get("precision"):
        flag = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[before["precision"]]
        advice = f"--precision {flag} is what it was made with. {advice}"
    raise UserError(f"{folder} was made with other settings: {'; '.join(different[:6])}. {advice}")


def finish_folder(folder, name):
    """Note in folder/name that the job of start_folder() is complete."""
    path = Path(folder) / name
    write_json(path, {**json.loads(path.read_bytes()), "complete": True})


def versions():
    """What this runs on, for the records."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


# --- what the scripts read of a run ---------------------------------------------------------------


def read_run(folder):
    """A run's description (run.json) and the rows of its metrics.jsonl."""
    keys = ("arguments", "labels", "pairs", "data", "complete")
    run = read_json(Path(folder) / "run.json", "train.py", keys)
    path = Path(folder) / "metrics.jsonl"
    rows = []
    if path.exists():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(isinstance(row["epoch"], int) and row["split"] != "train" for row in rows):
        raise UserError(f"{path} holds no evaluation: has the run finished an epoch?")
    return run, rows
