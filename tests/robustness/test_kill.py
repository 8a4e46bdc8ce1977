"""Real processes, killed with SIGKILL at random moments and started again: the files are those of a run never stopped.

Three kills in `make test`; thirty in `make prove`, which sets PROVE=1: ten for each script, half of them while a file
is being written.
"""

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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An encoder, a data set that takes a few seconds, and its features."""
    folder = tmp_path_factory.mktemp("world")
    model, data = (
        make_model(folder / "model"),
        make_data(folder / "data", train=200, dev=30, test=150),
    )
    run(
        [
            "extract",
            "--model",
            model,
            "--data",
            data,
            "--out",
            folder / "features",
            "--max-length",
            32,
        ]
    )
    return folder


def flags(script, world):
    model, data = ["--model", world / "model"], ["--data", world / "data"]
    return {
        "extract": [*model, *data, "--batch-size", 2, "--max-length", 32],
        "grid_search": [
            "--features",
            world / "features",
            "--layers",
            1,
            2,
            3,
            4,
            5,
            "--seeds",
            3,
            "--epochs",
            16,
        ],
        "train": [
            *model,
            *data,
            "--layers",
            1,
            3,
            "--freeze-layers",
            0,
            2,
            "--freeze-epoch",
            1,
            "--epochs",
            3,
            "--batch-size",
            4,
            "--save-steps",
            7,
            "--eval-steps",
            40,
            "--max-length",
            32,
            "--lr",
            "1e-3",
        ],
    }[script]


def start(arguments):
    script, *rest = map(str, arguments)
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{script}.py"), *rest],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def run(arguments):
    process = start(arguments)
    _, error = process.communicate()
    assert process.returncode == 0, error.decode()


def killed(arguments, out, marker, wait, during_a_write):
    """Start a process and kill it; whether it was still at work then."""
    process = start([*arguments, "--out", out])
    begun = out / marker
    while not begun.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(wait)
    if during_a_write:  # a file that has not got its final name yet
        written = set(out.rglob(".*"))
        while process.poll() is None and not any(
            path.name != ".lock" for path in set(out.rglob(".*")) - written
        ):
            pass
    process.kill()
    process.communicate()
    return process.returncode == -9


def contents(script, out):
    """What must be equal: everything but times, the notes of TensorBoard, and the lock."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if path.name.startswith(("events.out", ".lock")):
            continue
        assert not path.name.startswith(".") or "." not in path.name[1:], f"{name} was left behind"
        if path.name == "metrics.jsonl":
            found[name] = [
                {k: v for k, v in json.loads(line).items() if k != "examples_per_second"}
                for line in path.read_text().splitlines()
            ]
        elif path.name == "state.pt":
            state = torch.load(path, weights_only=True)
            state.pop("metrics")
            found[name] = {k: v.tolist() for k, v in state.pop("model").items()} | {
                "rest": repr(state)
            }
        elif path.suffix == ".npz":
            found[name] = np.load(path)["confusion"].tolist()  # beside it: seconds
        elif path.name == "run.json":
            found[name] = {k: v for k, v in json.loads(path.read_bytes()).items() if k != "command"}
        elif path.name == "summary.md":
            found[name] = [
                line for line in path.read_text().splitlines() if "ms a model" not in line
            ]
        else:
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize("script", SECONDS)
def test_killed_at_any_moment_and_started_again_is_as_never_stopped(script, world, tmp_path):
    arguments, dice = [script, *flags(script, world)], random.Random(script)
    began = time.perf_counter()
    run([*arguments, "--out", tmp_path / "unstopped"])
    expected, kills, out = contents(script, tmp_path / "unstopped"), 0, tmp_path / "0"
    while kills < KILLS:
        assert time.perf_counter() - began < 600, f"{kills} kills in ten minutes"
        hit = killed(
            arguments,
            out,
            MARKER[script],
            dice.uniform(0, SECONDS[script] * 0.6),
            during_a_write=kills % 2 == 1,
        )
        kills += hit
        if not hit:  # it was done before: compare, and begin again
            assert contents(script, out) == expected
            out = tmp_path / str(int(out.name) + 1)
    run([*arguments, "--out", out])
    found = contents(script, out)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
