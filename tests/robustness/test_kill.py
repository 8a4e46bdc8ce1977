"""Real processes, killed with SIGKILL at random moments and started again: the files are those of a
run never stopped.

`make prove`: with PROVE=1 thirty kills, ten for each script, else three; half of them while a file
is being written.
"""

import importlib
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, make_data, make_model

KILLS = 10 if os.environ.get("PROVE") else 1
SECONDS = {"extract": 0.8, "grid_search": 2.0, "train": 3.0}  # about what the work itself takes
MARKER = {"extract": "manifest.json", "grid_search": "run.json", "train": "run.json"}
SOURCE = "--model {world}/model --data {world}/data --max-length 32 "
FLAGS = {
    "extract": SOURCE + "--batch-size 2",
    "grid_search": "--features {world}/features --layers 1 2 3 4 5 --seeds 3 --epochs 16",
    "train": SOURCE + "--layers 1 3 --freeze-layers 0 2 --freeze-epoch 1 --epochs 3 --batch-size 4 "
    "--save-steps 7 --eval-steps 40 --lr 1e-3",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An encoder, a data set that takes a few seconds, and its features."""
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    make_data(folder / "data", train=200, dev=30, test=150)
    run("extract", folder, folder / "features")
    return folder


def flags(script, world, out):
    return [*FLAGS[script].format(world=world).split(), "--out", str(out)]


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{script}.py"), *flags(script, *arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run(script, *arguments):
    """In this process, which has imported everything."""
    assert not importlib.import_module(script).main(flags(script, *arguments))


def half_written(out):
    return {path for path in out.rglob(".*") if path.name != ".lock"}


def killed(process, out, marker, wait, during_a_write):
    """Kill a process; whether it was still at work then."""
    while not (out / marker).exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(wait)
    if during_a_write:  # a file that has not got its final name yet
        before = half_written(out)
        while process.poll() is None and half_written(out) <= before:
            pass
    process.kill()
    return process.wait() == -9


TIMES = {"metrics.jsonl": "examples_per_second", "run.json": "command"}


def contents(out):
    """What must be equal: everything but times, the notes of TensorBoard, and the lock."""
    files = {}
    for path in out.rglob("*"):
        name = str(path.relative_to(out))
        if path.is_dir() or path.name.startswith(("events.out", ".lock")):
            continue
        assert not name.endswith(".tmp"), f"{name} was left behind"
        content = path.read_bytes()
        if path.name in TIMES:
            documents = content.splitlines() if path.suffix == ".jsonl" else [content]
            files[name] = list(map(json.loads, documents))
            for document in files[name]:
                document.pop(TIMES[path.name], None)
        elif path.name == "state.pt":
            state = torch.load(path, weights_only=True)
            state.pop("metrics")
            files[name] = repr({key: value.tolist() for key, value in state.pop("model").items()})
            files[name] += repr(state)
        elif path.suffix == ".npz":
            arrays = np.load(path)
            files[name] = {key: arrays[key].tolist() for key in arrays if key != "seconds"}
        elif path.name == "summary.md":
            files[name] = [line for line in content.splitlines() if b"ms a model" not in line]
        else:
            files[name] = content
    return files


def assert_same_files(out, other):
    found, expected = contents(out), contents(other)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.mark.parametrize("script", SECONDS)
def test_killed_at_any_moment_and_started_again_is_as_never_stopped(script, world, tmp_path):
    dice, began, kills = random.Random(script), time.perf_counter(), 0
    whole, out = tmp_path / "unstopped", tmp_path / "0"
    run(script, world, whole)
    while kills < KILLS:
        assert time.perf_counter() - began < 600, f"{kills} kills in ten minutes"
        wait = dice.uniform(0, SECONDS[script] * 0.6)
        if killed(start(script, world, out), out, MARKER[script], wait, kills % 2 == 1):
            kills += 1
        else:  # it was done before: compare, and begin again
            assert_same_files(out, whole)
            out = tmp_path / str(int(out.name) + 1)
    run(script, world, out)
    assert_same_files(out, whole)
