"""Full disks, folders that cannot be written, and files cut short, for each script that works long: one sentence,
nothing that was complete is lost or changed, and the same command goes on once there is room."""

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_data, make_model
from test_kill import contents

SCRIPTS = ["extract", "grid_search", "train"]
# a limit on the size of a file that the small ones keep and the large one does not
LARGEST = {
    "extract": ("test.en.max.npy", 8_000),
    "grid_search": ("parts/max.0.001.0.npz", 1_500),
    "train": ("resume/state.pt", 300_000),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return {
        "model": make_model(folder / "model"),
        "data": make_data(folder / "data", test=40),
        "features": folder / "features",
    }


def flags(name, world):
    common = [
        "--model",
        world["model"],
        "--data",
        world["data"],
        "--max-length",
        32,
        "--precision",
        "fp32",
    ]
    return {
        "extract": common,
        "grid_search": [
            "--features",
            world["features"],
            "--layers",
            1,
            2,
            3,
            "--seeds",
            2,
            "--epochs",
            2,
            "--lr",
            "1e-3",
        ],
        "train": [*common, "--layers", 1, 3, "--epochs", 2, "--batch-size", 13, "--save-steps", 2],
    }[name]


@pytest.fixture
def start(script, world):
    """start(name, out) runs a script on the toy world: (exit status, stdout, stderr)."""

    def call(name, out, *more):
        if name == "grid_search" and not world["features"].exists():
            assert script("extract", *flags("extract", world), "--out", world["features"])[0] == 0
        return script(name, *flags(name, world), "--out", out, *more)

    return call


def files_of(out):
    return {
        path.relative_to(out): path.read_bytes()
        for path in Path(out).rglob("*")
        if path.is_file() and not path.name.startswith((".", "events.out"))
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(name, start, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start(name, whole)[0] == 0
    path, limit = LARGEST[name]
    assert (whole / path).stat().st_size > limit
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code, _, error = start(name, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and "File too large" in error.splitlines()[-1] and "Traceback" not in error
    assert not (out / path).exists() and [p.name for p in out.rglob(".*.tmp")] == []
    assert start(name, out)[0] == 0
    assert contents(name, out) == contents(name, whole)


def test_a_disk_that_fills_later_keeps_the_last_good_state(start, tmp_path, monkeypatch):
    import train

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start("train", whole)[0] == 0
    save, states = train.save_state, []

    def full_at_the_third(folder, *rest, step, **more):
        if len(states) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            states.append(files_of(out))
        save(folder, *rest, step=step, **more)
        states.append(step)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_state", full_at_the_third)
        try:
            code, _, error = start("train", out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and "File too large" in error.splitlines()[-1] and states[:2] == [2, 4]
    assert files_of(out) == states[2]
    code, text, _ = start("train", out)
    assert (
        code == 0
        and "going on after step 4" in text
        and contents("train", out) == contents("train", whole)
    )


def without_root():
    """In a child process: root, too, must ask before it writes."""
    for capability in (1, 2, 3):  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
        ctypes.CDLL(None).prctl(
            24, capability, 0, 0, 0
        )  # PR_CAPBSET_DROP: gone with the next program


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_that_cannot_be_written_is_one_sentence(name, start, world, tmp_path):
    assert start(name, tmp_path / "out")[0] == 0
    before = files_of(tmp_path / "out")
    for folder, _, names in os.walk(tmp_path / "out"):
        for file in names:
            os.chmod(Path(folder) / file, 0o444)
        os.chmod(folder, 0o555)
    command = [
        sys.executable,
        ROOT / f"{name}.py",
        *flags(name, world),
        "--out",
        tmp_path / "out",
        "--overwrite",
    ]
    ended = subprocess.run(
        [*map(str, command)], text=True, capture_output=True, preexec_fn=without_root
    )
    os.chmod(tmp_path / "out", 0o755)
    assert ended.returncode == 2 and "Permission denied" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("keep", [0, 5, 130, 1000])
def test_a_feature_file_cut_short_while_it_grew_is_said(keep, start, tmp_path, monkeypatch):
    import extract

    monkeypatch.setattr(extract, "pool_all", lambda *_: sys.exit(9))
    assert start("extract", tmp_path)[0] == 9
    monkeypatch.undo()
    part = next(tmp_path.glob(".*.max.npy.part"))
    part.write_bytes(part.read_bytes()[:keep])
    code, _, error = start("extract", tmp_path)
    assert code == 2 and f"{part} is damaged or cut short" in error
    assert error.strip().endswith("--overwrite starts anew")
    assert start("extract", tmp_path, "--overwrite")[0] == 0
