"""A model by its hub name, as a user comes: scripts in processes of their own against a hub on the
loopback (hub.py), and then without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hub import COMMIT, Hub

import train

CALLS = """
import importlib, json, shlex, sys, time
from lib.messages import cli
time.sleep = lambda seconds: None  # the hub's client waits before it tries again
for line in sys.stdin:
    name, *sys.argv[1:] = shlex.split(line)
    sys.argv[0] = name
    try:
        cli(importlib.import_module(name.removesuffix(".py")).main)
    except SystemExit as stop:
        print("status", stop.code or 0, file=sys.stderr)
"""
TINY = "--layers 2 4 --max-length 32 --epochs 1 --lr 1e-3"
ABSENT = {
    "acme/none": "neither a folder here nor a model of the hub",
    "acme/gated": "gated: accept its terms",
    "acme/broken": "the download broke off",
    "acme/empty": "it lacks config.json or safetensors",
    "acme//tiny": "no name that a model of the hub can have",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(model_folder):
    models = dict.fromkeys(["acme/tiny", "acme/broken"], model_folder)
    models["acme/empty"] = ROOT / "experiments"
    with Hub(models, gated=["acme/gated"], breaking=["acme/broken"]) as served:
        yield served


def call(hub, place, lines, **environment):
    """Run lines as "train.py --flag value" in one process: the exit statuses, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-c", CALLS],
        input="\n".join(lines),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | hub.environment(place / "cache") | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert not done.returncode and "Traceback" not in done.stderr, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("status ")]
    return [int(line.split()[1]) for line in said], done.stdout, done.stderr


@pytest.fixture(scope="module")
def online(hub, place, data_folder):
    """What works by name, in one process on an empty cache; then what cannot be had."""
    given = f"--model acme/tiny --data {data_folder} --out {place}"
    again = f"train.py {given}/name {TINY}"
    claims = "--seeds 1 --epochs 1 --layers 2 4 --freeze-layers 3 --freeze-epoch 0"
    claims += " --max-train-rows 16 --max-eval-rows 4 --max-length 32"
    lines = [
        again,
        again,
        f"extract.py {given}/features --max-length 32",
        f"data.py check {data_folder} --model acme/tiny",
        f"experiments.claims {given}/claims {claims}",
    ]
    lines += [f"extract.py --model {n} --data {data_folder} --out {place}/absent" for n in ABSENT]
    statuses, out, err = call(hub, place, lines)
    assert statuses[:5] == [0] * 5, err
    return statuses[5:], out, err


def test_a_name_is_downloaded_once_with_its_progress_and_by_its_commit(online, hub, place):
    _, out, err = online
    assert "model.safetensors: 100%" in err
    assert "complete already" in out  # the same command again
    assert "tokens" in out and (place / "claims/claims.md").exists()
    for path in (place / "name/run.json", place / "features/manifest.json"):
        assert json.loads(path.read_text())["revision"] == COMMIT
    downloads = []
    for method, path in hub.asked:
        if "acme/tiny" in path:
            assert path.startswith("acme/tiny/resolve/")
            if method == "GET" and path.endswith(".safetensors"):
                downloads.append(path)
    assert len(downloads) == 1


def test_the_run_by_name_is_the_run_by_folder_bit_for_bit(online, place, model_folder, data_folder):
    flags = f"--model {model_folder} --data {data_folder} --out {place}/folder {TINY}"
    assert not train.main(flags.split())
    for name in ("model.safetensors", "classifier.safetensors"):
        by_name, by_folder = (place / made / "epochs/1" / name for made in ("name", "folder"))
        assert by_name.read_bytes() == by_folder.read_bytes()


def one_sentence_each(expected, statuses, err):
    """What is said of each name that cannot be had, {name: words}."""
    said = [line for line in err.splitlines() if line.startswith("extract.py: error: ")]
    assert statuses == [2] * len(expected)
    for (name, words), sentence in zip(expected.items(), said, strict=True):
        assert name in sentence and words in sentence


def test_what_cannot_be_had_is_one_sentence(online, place):
    statuses, _, err = online
    one_sentence_each(ABSENT, statuses, err)
    assert not (place / "absent").exists()


def test_offline_from_the_cache_also_one_that_another_program_filled(
    online, hub, place, model_folder, data_folder
):
    """As AutoModel or a copy leaves it: nothing says which files the model does not have."""
    snapshot = place / "cache/hub/models--acme--copied/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text(COMMIT)
    for path in Path(model_folder).iterdir():
        (snapshot / path.name).symlink_to(path)
    given = f"--data {data_folder} --out {place}"
    lines = [
        f"train.py --model acme/tiny {given}/offline {TINY}",
        f"extract.py --model acme/copied {given}/copied --max-length 32",
        f"extract.py --model acme/unseen {given}/unseen",
    ]
    nowhere = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    statuses, _, err = call(hub, place, lines, **nowhere)
    assert statuses[:2] == [0, 0] and "safetensors: " not in err
    assert json.loads((place / "offline/run.json").read_text())["revision"] == COMMIT
    one_sentence_each(
        {"acme/unseen": "no such folder, and not in the hub's cache"}, statuses[2:], err
    )
