"""A model's name: a folder, or the hub's model of that name, downloaded once."""

import functools
import json
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from tqdm import tqdm

from lib.folders import sha256
from lib.messages import USERS_ERRNOS, UserError, first_line

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_FILES = [
    "adapter_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
]


def model_folder(name, weights=True):
    """The folder of a model: `name` where that is one, else the hub cache's snapshot of that name.

    What the cache lacks is downloaded: configuration, tokenizer and, with `weights`, safetensors,
    all of one commit, by which the cache names the folder. UserError where it cannot be had.
    """
    if Path(name).exists():
        return check_folder(Path(name))
    try:
        return check_folder(download(str(name), weights))
    except HFValidationError:
        reason = "no such folder, and no name that a model of the hub can have"
    except GatedRepoError:
        reason = "gated: accept its terms on its page of the hub, then `hf auth login`"
    except RepositoryNotFoundError:
        reason = (
            "neither a folder here nor a model of the hub: check the spelling; if it is private, "
            "`hf auth login`"
        )
    except LocalEntryNotFoundError:
        reason = (
            "no such folder, and not in the hub's cache, or not all of it; the hub cannot be "
            "reached (or HF_HUB_OFFLINE is set): run this once where it can"
        )
    except EntryNotFoundError as error:
        reason = f"it lacks config.json or safetensors ({first_line(error)})"
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in USERS_ERRNOS:
            raise
        reason = f"the download broke off ({first_line(error)}): the same command goes on with it"
    raise UserError(f"model {str(name)!r}: {reason}")


def download(name, weights):
    """Fetch what the cache lacks of a model of the hub; returns the snapshot's folder."""
    fetch = functools.partial(hf_hub_download, name, tqdm_class=DownloadBar)
    folder = Path(fetch("config.json")).parent
    fetch = functools.partial(fetch, revision=folder.name)
    for file in OTHER_FILES:
        fetch_optional(name, file, folder, fetch)
    if weights and not fetch_optional(name, WEIGHTS, folder, fetch):
        index = json.loads(Path(fetch(WEIGHTS_INDEX)).read_bytes())
        for file in sorted(set(index["weight_map"].values())):
            fetch(file)
    return folder


def fetch_optional(name, file, folder, fetch):
    """Fetch a file that a model may lack; returns whether it has it."""
    if try_to_load_from_cache(name, file, revision=folder.name) is None:  # nor known to be missing
        try:
            fetch(file)
        except EntryNotFoundError as error:
            # a lost connection does not say that the model has no such file
            if isinstance(error, LocalEntryNotFoundError) and not HF_HUB_OFFLINE:
                raise
    return (folder / file).exists()


class DownloadBar(tqdm):
    """A download's bar, in a log file too: the hub's client shows it on a terminal alone."""

    def __init__(self, *args, name=None, disable=None, **settings):
        super().__init__(*args, mininterval=0.1 if sys.stderr.isatty() else 20, **settings)


def check_folder(folder):
    """The folder of a model. UserError, which says what it holds instead, where it is none."""
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json), which only some machines would "
            "load: merge it first (peft's merge_and_unload) and save the whole encoder"
        )
    if not (folder / "config.json").is_file():
        advice = ""
        inner = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
        if folder.is_file():
            advice = ": it is a file, give the folder that holds it"
        elif inner:
            advice = f"; did you mean {inner[0].parent}?"
        elif folder.name.startswith("models--"):
            advice = ", but the hub's cache of one: give the folder snapshots/COMMIT in it"
        raise UserError(f"{folder} is no model: it has no config.json{advice}")
    for path in [*folder.glob("*.safetensors"), *folder.glob("tokenizer*.json")]:
        with open(path, "rb") as file:
            if file.read(24) == b"version https://git-lfs.":
                raise UserError(f"{path} is a pointer of Git LFS: run `git lfs pull` in {folder}")
    return folder


def revision(name):
    """What tells a model from another: its weight files' SHA-256, or the hub's commit."""
    folder = model_folder(name)
    if folder != Path(name):
        return folder.name
    return " ".join(sha256(path) for path in sorted(folder.glob("*.safetensors")))
