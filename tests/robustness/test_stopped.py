"""Each script that works long, stopped: by SIGKILL at random moments, by a full disk, by a folder
that cannot be written. Nothing that was complete is lost, and the same command goes on to the files
of a run never stopped.

`make prove`: with PROVE=1 thirty kills, ten for each script, else three; half of them while a file
is being written.
"""

import contextlib
import ctypes
import json
import os
import random
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, make_data, make_model

import extract
import train

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
# a limit on the size of a file that the small ones keep and the large one does not
LARGEST = {
    "extract": ("train.en.max.npy", 80_000),
    "grid_search": ("results.csv", 30_000),
    "train": ("resume/state.pt", 250_000),
}


def flags(name, world, out):
    return [*FLAGS[name].format(world=world).split(), "--out", str(out)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An encoder, a data set that takes a few seconds, and its features."""
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    make_data(folder / "data", train=200, dev=30, test=150)
    extract.main(flags("extract", folder, folder / "features"))
    return folder


@pytest.fixture
def run(script, world):
    """run(name, out) runs a script in this process: (exit status, stdout, stderr)."""
    return lambda name, out: script(name, *flags(name, world, out))


def start(name, world, out, *more, **options):
    """The same in a process of its own, which is returned."""
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags(name, world, out), *more]
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) | options
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


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


def assert_same_files(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """whole(name): the files of a run never stopped."""
    made = {}

    def get(name):
        if name not in made:
            out = tmp_path_factory.mktemp("whole") / name
            assert start(name, world, out).wait() == 0
            made[name] = contents(out)
        return made[name]

    return get


# --- killed ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", FLAGS)
def test_killed_at_any_moment_and_started_again_is_as_never_stopped(
    name, run, world, whole, tmp_path
):
    dice, began, kills, out = random.Random(name), time.perf_counter(), 0, tmp_path / "0"
    while kills < KILLS:
        assert time.perf_counter() - began < 600, f"{kills} kills in ten minutes"
        wait = dice.uniform(0, SECONDS[name] * 0.6)
        if killed(start(name, world, out), out, MARKER[name], wait, kills % 2 == 1):
            kills += 1
        else:  # it was done before: compare, and begin again
            assert_same_files(contents(out), whole(name))
            out = tmp_path / str(int(out.name) + 1)
    assert run(name, out)[0] == 0
    assert_same_files(contents(out), whole(name))


# --- a full disk ----------------------------------------------------------------------------------


@contextlib.contextmanager
def file_limit(limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_one_sentence(code, error, words):
    assert code == 2 and words in error.splitlines()[-1] and "Traceback" not in error


@pytest.mark.parametrize("name", FLAGS)
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(name, run, whole, tmp_path):
    path, limit = LARGEST[name]
    with file_limit(limit):
        code, _, error = run(name, tmp_path)
    assert_one_sentence(code, error, "File too large")
    assert not (tmp_path / path).exists() and contents(tmp_path)
    assert run(name, tmp_path)[0] == 0
    assert_same_files(contents(tmp_path), whole(name))


def test_a_disk_that_fills_later_keeps_the_last_good_state(run, whole, tmp_path, monkeypatch):
    save, before = train.save_state, []

    def full_at_the_third(*arguments):
        before.append(contents(tmp_path))
        with file_limit(100_000) if len(before) == 3 else contextlib.nullcontext():
            save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_state", full_at_the_third)
        code, _, error = run("train", tmp_path)
    assert_one_sentence(code, error, "File too large")
    assert len(before) == 3 and contents(tmp_path) == before[2]
    code, text, _ = run("train", tmp_path)
    assert code == 0 and "going on after step 14" in text
    assert_same_files(contents(tmp_path), whole("train"))


# --- a folder that cannot be written --------------------------------------------------------------


def without_root():
    """In a child process: root, too, must ask before it writes."""
    for capability in (1, 2, 3):  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
        # PR_CAPBSET_DROP: gone with the next program
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
def test_a_folder_that_cannot_be_written_is_one_sentence(run, world, tmp_path):
    assert run("train", tmp_path)[0] == 0
    before = contents(tmp_path)
    for path in [*tmp_path.rglob("*"), tmp_path]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    pipe = dict(stderr=subprocess.PIPE, text=True)
    process = start("train", world, tmp_path, "--overwrite", preexec_fn=without_root, **pipe)
    _, error = process.communicate()
    tmp_path.chmod(0o755)
    assert_one_sentence(process.returncode, error, "Permission denied")
    assert contents(tmp_path) == before
