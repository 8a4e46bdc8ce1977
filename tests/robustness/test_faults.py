"""Full disks and folders that cannot be written, for each script that works long: one sentence,
nothing that was complete is lost or changed, and the same command goes on once there is room."""

import contextlib
import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_data, make_model
from test_kill import assert_same_files

SOURCE = "--model {world}/model --data {world}/data --max-length 32 --precision fp32 "
FLAGS = {
    "extract": SOURCE,
    "grid_search": "--features {world}/features --layers 1 2 3 --seeds 2 --epochs 2 --lr 1e-3",
    "train": SOURCE + "--layers 1 3 --epochs 2 --batch-size 13 --save-steps 2",
}
# a limit on the size of a file that the small ones keep and the large one does not
LARGEST = {
    "extract": ("test.en.max.npy", 8_000),
    "grid_search": ("results.csv", 1_500),
    "train": ("resume/state.pt", 300_000),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    make_model(folder / "model")
    make_data(folder / "data", test=40)
    return folder


@pytest.fixture
def start(script, world):
    """start(name, out) runs a script on the toy world: (exit status, stdout, stderr)."""

    def call(name, out):
        if name == "grid_search" and not (world / "features").exists():
            assert call("extract", world / "features")[0] == 0
        return script(name, *FLAGS[name].format(world=world).split(), "--out", out)

    return call


def files_of(out):
    files = {}
    for path in Path(out).rglob("*"):
        if path.is_file() and not path.name.startswith((".", "events.out")):
            files[path.relative_to(out)] = path.read_bytes()
    return files


@contextlib.contextmanager
def file_limit(limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_full(code, error):
    assert code == 2 and "File too large" in error.splitlines()[-1] and "Traceback" not in error


@pytest.mark.parametrize("name", FLAGS)
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(name, start, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start(name, whole)[0] == 0
    path, limit = LARGEST[name]
    assert (whole / path).stat().st_size > limit
    with file_limit(limit):
        code, _, error = start(name, out)
    assert_full(code, error)
    assert not (out / path).exists() and list(out.rglob(".*.tmp")) == []
    assert start(name, out)[0] == 0
    assert_same_files(out, whole)


def test_a_disk_that_fills_later_keeps_the_last_good_state(start, tmp_path, monkeypatch):
    import train

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start("train", whole)[0] == 0
    save, before = train.save_state, []

    def full_at_the_third(*arguments):
        before.append(files_of(out))
        with file_limit(100_000) if len(before) == 3 else contextlib.nullcontext():
            save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_state", full_at_the_third)
        code, _, error = start("train", out)
    assert_full(code, error)
    assert len(before) == 3 and files_of(out) == before[2]
    code, text, _ = start("train", out)
    assert code == 0 and "going on after step 4" in text
    assert_same_files(out, whole)


def without_root():
    """In a child process: root, too, must ask before it writes."""
    for capability in (1, 2, 3):  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
        # PR_CAPBSET_DROP: gone with the next program
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
def test_a_folder_that_cannot_be_written_is_one_sentence(start, world, tmp_path):
    out = tmp_path / "out"
    assert start("train", out)[0] == 0
    before = files_of(out)
    for folder, _, names in os.walk(out):
        for file in names:
            os.chmod(Path(folder) / file, 0o444)
        os.chmod(folder, 0o555)
    flags = FLAGS["train"].format(world=world).split()
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(out), "--overwrite"]
    pipes = dict(text=True, capture_output=True)
    ended = subprocess.run(command, preexec_fn=without_root, check=False, **pipes)
    os.chmod(out, 0o755)
    assert ended.returncode == 2 and "Permission denied" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr and files_of(out) == before
