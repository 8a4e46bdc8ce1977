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
from lib.messages import DISK, UserError, first_line

TOKENIZER_FILES = [
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
    if (
        len(path.parts) > 2
        or str(name).startswith((".", "~"))
        or path.parent.name
        and path.parent.is_dir()
    ):
        raise UserError(f"{name}: no such folder")
    download = functools.partial(hf_hub_download, str(name), tqdm_class=DownloadBar)
    try:
        folder = Path(download("config.json")).parent

        def fetch(file, required=False):
            """The file, of the same commit; None where the model has none."""
            if (
                try_to_load_from_cache(str(name), file, revision=folder.name) is None
            ):  # not known to be missing either
                try:
                    download(file, revision=folder.name)
                except EntryNotFoundError as error:
                    if (
                        required
                        or isinstance(error, LocalEntryNotFoundError)
                        and not HF_HUB_OFFLINE
                    ):
                        raise  # the connection was lost, which does not say that there is none
            return folder / file if (folder / file).exists() else None

        for file in TOKENIZER_FILES:
            fetch(file)
        if weights and fetch(WEIGHTS) is None:
            index = fetch(WEIGHTS_INDEX, required=True)
            for file in sorted(set(json.loads(index.read_bytes())["weight_map"].values())):
                fetch(file, required=True)
    except HFValidationError:
        raise UserError(
            f"{name}: no such folder, and no name that a model of the hub can have"
        ) from None
    except GatedRepoError:
        raise UserError(
            f"the model {name!r} is gated: accept its terms on its page of the hub, then log in with "
            "`hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name!r} is neither a folder here nor a model of the hub: check the spelling; if it is "
            "private, log in with `hf auth login`"
        ) from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"the model {name!r} is not in the hub's cache, or not all of it, and the hub cannot be reached "
            "(or HF_HUB_OFFLINE is set): run this once where it can, or give a folder"
        ) from None
    except EntryNotFoundError as error:
        raise UserError(
            f"the model {name!r} of the hub lacks a file: {first_line(error)}; a config.json and safetensors "
            "are needed"
        ) from None
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        raise UserError(
            f"the download of {name!r} broke off ({first_line(error)}): the same command goes on "
            "with it"
        ) from None
    return folder


def revision(name):
    """What tells a model from another: its weight files' SHA-256, or the hub's commit."""
    folder = model_folder(name)
    if folder != Path(name):
        return folder.name
    return " ".join(sha256(path) for path in sorted(folder.glob("*.safetensors")))


def what_is_in(folder):
    """What keeps a folder from being a model's, in words; None where nothing is seen."""
    folder = Path(folder)
    if folder.is_file():
        return "it is a file: give the folder that holds it"
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with open(path, "rb") as file:
                start = file.read(40)
            if start.startswith(b"version https://git-lfs"):
                return (
                    f"{path.name} is a pointer of Git LFS, not the file: run `git lfs pull` there"
                )
    if (folder / "config.json").exists():
        return None
    if folder.name.startswith("models--"):
        return "it is the hub's cache of a model: give the folder snapshots/COMMIT in it"
    for path in sorted(folder.glob("*/config.json")):
        return f"it has no config.json, but {path.parent.name} in it has one: give that folder"
    return "it has no config.json"
