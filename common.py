"""What all scripts share: a user's mistake as one sentence, files written whole, device, precision, torchrun.

Read by the scripts, run by none.
"""
import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (EntryNotFoundError, GatedRepoError, HFValidationError, HTTPError,
                                    LocalEntryNotFoundError, RepositoryNotFoundError)
from tqdm import tqdm

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# --- a user's mistake as one sentence ----------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can put right: one sentence with file, line, value and what was expected."""


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR,
        errno.EISDIR}  # no room, no permission, a file where a folder should be: the user's to put right


def cli(main):
    """Run a script's main: a UserError or a full disk is one sentence and exit status 2; a bug keeps its traceback."""
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
        if isinstance(error, OSError) and error.errno not in DISK:
            raise
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.exit(print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr) or 2)


def first_line(error):
    """An exception's first sentence, for a message of one line; with the next line when it only announces that one."""
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return (f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first)[:300]



def in_range(kind, low=-math.inf, above=-math.inf, below=math.inf):
    """A type for argparse: an int or a float that is `low` or more, more than `above` and less than `below`."""
    expected = " and ".join([f"{low} or more"] * (low > -math.inf) + [f"more than {above}"] * (above > -math.inf)
                            + [f"less than {below}"] * (below < math.inf))

    def parse(text):
        value = kind(text)
        if not (low <= value < below and value > above) and not value == math.inf == below:  # nan fits nothing
            raise argparse.ArgumentTypeError(f"{text}, expected {expected}")
        return value

    parse.__name__ = kind.__name__  # argparse says it when the text is no number
    return parse


@contextlib.contextmanager
def out_of_memory(advice):
    """Turn running out of memory into one sentence that ends with `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        what = next(part for part in first_line(error).split(". ") if "memory" in part)
        raise UserError(f"out of memory on {pick_device()} ({what}): {advice}") from None


def progress_bar(**settings):
    """A tqdm bar; where nobody watches, as in a log file, it is drawn every 20 seconds only."""
    return tqdm(mininterval=0.1 if sys.stderr.isatty() else 20, **settings)


def markdown_table(header, rows):
    """A Markdown table whose columns are aligned as plain text too, the first to the left."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
             + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def spread(values, axis=-1):
    """Standard deviation over seeds (n - 1), 0 for a single one."""
    return np.std(values, axis, ddof=min(1, np.shape(values)[axis] - 1))


# --- files, whole or not at all ----------------------------------------------------------------------------------

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
    with write_atomic(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def fits(value, form):
    """Whether a JSON value has a form: a type; [form], a list of such; {key: form}, or {str: form} for any keys."""
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(entry, form[0]) for entry in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(fits(entry, part) for key, part in form.items() for entry in (
            value.values() if key is str else [value.get(key)]))
    return type(value) is form


def read_json(path, script, form):
    """The object in a JSON file that `script` writes, of a {key: form} of fits(). UserError when it is another."""
    try:
        value = json.loads(Path(path).read_bytes())
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be written again
        wrong = next(iter(key for key in form if not fits(value, {key: form[key]})), None)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        wrong = error
    if wrong is not None or not isinstance(value, dict):
        raise UserError(f"{path}: not what {script} writes ({wrong}): delete it, or --overwrite") from None
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
        raise UserError(f"{path} has shape {array.shape} and type {array.dtype}, expected {shape} "
                        f"of {'integers' if kind == 'i' else 'floats'}: {remedy}")
    return array


def best_epochs(metrics, source):
    """The best epoch by each language's dev set, by `joint` and by `test`, the means over the dev and test sets of the
    languages other than `source`: {name: epoch}, from the rows of metrics.jsonl. Ties go to the earlier epoch.

    A name whose sets were not evaluated after every epoch is left out; so are evaluations in the midst of one.
    """
    scores, epochs = {}, {row["epoch"] for row in metrics if isinstance(row["epoch"], int) and row["split"] != "train"}
    for row in metrics:
        if row["epoch"] in epochs and row["split"] != "train":
            names = [row["language"]] * (row["split"] == "dev")
            if row["language"] != source:
                names.append({"dev": "joint", "test": "test"}[row["split"]])
            for name in names:
                scores.setdefault(name, {}).setdefault(row["epoch"], []).append(row["accuracy"])
    return {name: max(sorted(found), key=lambda epoch: round(float(np.mean(found[epoch])), 9))
            for name, found in scores.items() if found.keys() == epochs}


# --- a model's name ----------------------------------------------------------------------------------------------

TOKENIZER_FILES = ["tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
                   "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model"]
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


class DownloadBar(tqdm):
    """A download's bar, in a log file too: the hub's client would show it on a terminal alone."""

    def __init__(self, *args, name=None, disable=None, **settings):
        super().__init__(*args, mininterval=0.1 if sys.stderr.isatty() else 20, **settings)


def model_folder(name, weights=True):
    """The folder of a model: `name` where that is one, else the hub cache's snapshot of the hub's model of that name.

    What the cache lacks is downloaded: configuration, tokenizer and, with `weights`, safetensors; all of one commit, by
    which the cache names the folder. UserError where it cannot be had.
    """
    path = Path(name)
    if path.exists():
        return path
    if len(path.parts) > 2 or str(name).startswith((".", "~")) or path.parent.name and path.parent.is_dir():
        raise UserError(f"{name}: no such folder")
    download = functools.partial(hf_hub_download, str(name), tqdm_class=DownloadBar)
    try:
        folder = Path(download("config.json")).parent

        def fetch(file, required=False):
            """The file, of the same commit; None where the model has none."""
            if try_to_load_from_cache(str(name), file, revision=folder.name) is None:  # not known to be missing either
                try:
                    download(file, revision=folder.name)
                except EntryNotFoundError as error:
                    if required or isinstance(error, LocalEntryNotFoundError) and not HF_HUB_OFFLINE:
                        raise  # the connection was lost, which does not say that there is none
            return folder / file if (folder / file).exists() else None

        for file in TOKENIZER_FILES:
            fetch(file)
        if weights and fetch(WEIGHTS) is None:
            index = fetch(WEIGHTS_INDEX, required=True)
            for file in sorted(set(json.loads(index.read_bytes())["weight_map"].values())):
                fetch(file, required=True)
    except HFValidationError:
        raise UserError(f"{name}: no such folder, and no name that a model of the hub can have") from None
    except GatedRepoError:
        raise UserError(f"the model {name!r} is gated: accept its terms on its page of the hub, then log in with "
                        "`hf auth login`") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name!r} is neither a folder here nor a model of the hub: check the spelling; if it is "
                        "private, log in with `hf auth login`") from None
    except LocalEntryNotFoundError:
        raise UserError(f"the model {name!r} is not in the hub's cache, or not all of it, and the hub cannot be reached "
                        "(or HF_HUB_OFFLINE is set): run this once where it can, or give a folder") from None
    except EntryNotFoundError as error:
        raise UserError(f"the model {name!r} of the hub lacks a file: {first_line(error)}; a config.json and safetensors "
                        "are needed") from None
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        raise UserError(f"the download of {name!r} broke off ({first_line(error)}): the same command goes on "
                        "with it") from None
    return folder


# --- output folders of long jobs ---------------------------------------------------------------------------------

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
    there = sorted(path for path in folder.iterdir() if path.name != ".lock" and path.suffix != ".tmp")
    if there and folder / name not in there:
        raise UserError(f"{folder} holds {there[0].name} but no {name}, so it is none that {script} made: "
                        "give another --out, or delete it yourself")
    if there and f'"script": "{script}"' not in (folder / name).read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{folder / name} is none that {script} made: give another --out, or delete the folder "
                        "yourself")
    for path in folder.iterdir() if overwrite else folder.rglob(".*.tmp"):  # what a killed process left half-written
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not overwrite and there:
        old = read_json(folder / name, script, {"complete": bool})
        if different := differences({key: old.get(key) for key in description}, description):
            raise UserError(f"{folder} was made with other settings: {'; '.join(different[:6])}. "
                            "Give another --out, or --overwrite to delete it and start anew")
        return old["complete"]
    write_json(folder / name, {"complete": False, "script": script, **description, **noted})
    return False


def finish_folder(folder, name):
    """Note in folder/name that the job of start_folder() is complete."""
    write_json(Path(folder) / name, {**json.loads((Path(folder) / name).read_bytes()), "complete": True})


def versions():
    """What this runs on, for the records."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}


# --- device, precision, the processes of torchrun ----------------------------------------------------------------

def pick_device():
    """The GPU of this process where there is one, else the CPU."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def pick_precision(name, device):
    """The dtype of matrix products: "auto" is bf16 where the hardware multiplies it, fp16 on older GPUs, else fp32."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        name = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device, dtype):
    """Matrix products in `dtype`, weights and sums in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def to_device(batch, device):
    """A batch of data.collate() as tensors on `device`, copied while the device computes."""
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    if device.type == "cuda":
        tensors = {key: value.pin_memory().to(device, non_blocking=True) for key, value in tensors.items()}
    return tensors


def start_processes():
    """Join the processes of torchrun, when there are several. Returns (rank, how many there are)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        if "RANK" not in os.environ:
            raise UserError(f"WORLD_SIZE is {world} and RANK is not set: start with torchrun, or unset it")
        if torch.cuda.is_available():
            if pick_device().index >= torch.cuda.device_count():
                raise UserError(f"torchrun started more processes than there are GPUs, {torch.cuda.device_count()}: "
                                "lower --nproc-per-node")
            torch.cuda.set_device(pick_device())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo",
                                timeout=timedelta(days=7))  # one may evaluate or search while the others wait
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def agree(value=0):
    """The first process's `value`, a number, in every process of torchrun; all wait for each other here."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(float(value), device=pick_device())
    dist.barrier()  # a broadcast alone does not hold the first process
    dist.broadcast(shared, 0)
    return type(value)(shared.item())
