"""What all scripts share: files written whole or not at all, going on after a stop, saying in a sentence what is wrong.

Read by the scripts, run by none.
"""
import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm


class UserError(Exception):
    """Something the user can put right: one sentence with file, line, value and what was expected."""


def first_line(error):
    """An exception's first sentence, for a message of one line; with the next line when it only announces that one."""
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return (f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first)[:300]


def cli(main):
    """Run a script's main: a user's mistake or a full disk is one sentence and exit status 2, not a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = main()
        sys.stdout.flush()  # here a closed pipe can still be met below, not at the interpreter's end
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os._exit(141)
    except (UserError, OSError) as error:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.exit(print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr) or 2)


def in_range(kind, low=-math.inf, above=-math.inf, below=None):
    """A type for argparse: an int or a float that is `low` or more, more than `above` and less than `below`."""
    expected = " and ".join([f"{low} or more"] * (low > -math.inf) + [f"more than {above}"] * (above > -math.inf)
                            + [f"less than {below}"] * (below is not None))

    def parse(text):
        value = kind(text)
        if not (value >= low and value > above and (below is None or value < below)):  # nan fits nothing
            raise argparse.ArgumentTypeError(f"{text}, expected {expected}")
        return value

    parse.__name__ = kind.__name__  # argparse says it when the text is no number
    return parse


@contextlib.contextmanager
def write_atomic(path, mode="w"):
    """Open a file beside `path` that takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(handle, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path, value):
    """Write `value` as indented JSON, whole or not at all."""
    with write_atomic(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


KINDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false"}


def misfit(value, form, name="it"):
    """Where a JSON value does not have a form, as "'labels' to be a list"; None where it has.

    A form is a type; [form] for a list of such; {key: form} for an object with at least these keys, {str: form} for one
    whose values are all such.
    """
    kind = form if isinstance(form, type) else type(form)
    if type(value) is not kind:
        return f"{name} to be {KINDS[kind]}"
    if kind is list and form is not list:
        parts = [(entry, form[0], f"each entry of {name}") for entry in value]
    elif kind is dict and str in form:
        parts = [(entry, form[str], f"each entry of {name}") for entry in value.values()]
    else:
        parts = [(value.get(key), part, repr(key)) for key, part in form.items()] if isinstance(form, dict) else []
    return next(filter(None, (misfit(*part) for part in parts)), None)


def read_json(path, form):
    """The JSON object in a file, of a form that misfit() explains. UserError when it is missing, broken or another."""
    try:
        value = json.loads(Path(path).read_bytes())
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be written again
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if wrong := misfit(value, form):
        raise UserError(f"{path}: expected {wrong}")
    return value


def sha256(path):
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


@contextlib.contextmanager
def claim(folder):
    """Hold an output folder for this process. UserError when another process holds it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder} is in use by another process") from None
        yield


def start_folder(folder, name, description, extra=None, overwrite=False):
    """Begin, or go on with, the output folder of a long job that `description` (a dict) defines.

    Writes folder/name (JSON) with "complete": false; finish_folder() turns it to true. Returns whether the job is
    complete already. UserError names what differs when the folder is another job's. `extra` is noted, not compared.
    """
    folder, description = Path(folder), json.loads(json.dumps(description))

    def clear(paths):
        for path in list(paths):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    if overwrite:
        clear(path for path in folder.iterdir() if path.name != ".lock")
    elif (folder / name).is_file():
        old = read_json(folder / name, {"complete": bool})
        different = differences({key: old.get(key) for key in description}, description)
        if different:
            raise UserError(f"{folder} was made with other settings: {'; '.join(different[:6])}. "
                            "Give another --out, or --overwrite to delete it and start anew")
        clear(folder.rglob(".*.tmp"))  # half-written by a process that was killed
        return old["complete"]
    else:
        clear(folder.glob(f".{name}.*.tmp"))
        if there := sorted(path.name for path in folder.iterdir() if path.name != ".lock"):
            raise UserError(f"{folder} holds {there[0]} but no {name}: "
                            "give another --out, or --overwrite to delete it all")
    write_json(folder / name, {"complete": False, **description, **(extra or {})})
    return False


def finish_folder(folder, name):
    """Note in folder/name that the job of start_folder() is complete."""
    write_json(Path(folder) / name, {**read_json(Path(folder) / name, {}), "complete": True})


def load_array(path, shape, kind="f", remedy="run extract.py again", mode="r"):
    """A .npy file of that shape and NumPy kind, memory-mapped. UserError when it is missing, cut short or another."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        if mode != "r":  # which alone would fill up a short file
            array = np.lib.format.open_memmap(path, mode)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {remedy}") from None
    except Exception as error:  # NumPy raises a dozen different ones
        raise UserError(f"{path} is damaged or cut short ({error}): {remedy}") from None
    if array.shape != shape or array.dtype.kind != kind:
        raise UserError(f"{path} has shape {array.shape} and type {array.dtype}, expected {shape} "
                        f"of {'integers' if kind == 'i' else 'floats'}: {remedy}")
    return array


def create_array(path, shape, dtype):
    """Make an empty .npy file of that shape, to be memory-mapped, and take its room on the disk. OSError, and no file,
    where the disk is full: it would be a bus error later."""
    try:
        np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError:
        Path(path).unlink(missing_ok=True)
        raise


def progress_bar(**settings):
    """A tqdm bar; where nobody watches, as in a log file, it is drawn every 20 seconds only."""
    return tqdm(mininterval=0.1 if sys.stderr.isatty() else 20, **settings)


def markdown_table(header, rows):
    """A Markdown table whose columns are aligned as plain text too, the first to the left."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
             + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
