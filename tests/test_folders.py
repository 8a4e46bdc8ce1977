"""lib/folders.py: whole files or none, output folders that go on or refuse, arrays, locks."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import threading
import time

import pytest
from test_messages import FULL, Child

from lib import folders
from lib.messages import UserError

# --- whole files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("old", [b"old", None])
def test_write_atomic_leaves_the_old_file_on_an_error(tmp_path, error, old):
    path = tmp_path / "x.txt"
    if old:
        path.write_bytes(old)
    with pytest.raises(type(error)), folders.write_atomic(path) as file:
        file.write("half")
        file.flush()
        raise error
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"x.txt": old} if old else {})


@pytest.mark.parametrize("mode, content", [("w", "ä\r\n\n"), ("wb", b"\xff\n")])
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_write_atomic_takes_the_place_when_it_is_whole(tmp_path, mode, content, mask):
    path = tmp_path / "a" / "b" / "x"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"old")
    before = os.umask(mask)
    try:
        with folders.write_atomic(path, mode) as file:
            file.write(content)
            file.flush()
            assert path.read_bytes() == b"old"
    finally:
        os.umask(before)
    written = content if mode == "wb" else content.encode()
    assert path.read_bytes() == written and [p.name for p in path.parent.iterdir()] == ["x"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert folders.sha256(path) == hashlib.sha256(written).hexdigest()


def test_sigterm_leaves_no_temporary_file(tmp_path):
    def main():
        with folders.write_atomic(tmp_path / "x.txt") as file:
            file.write("half")
            print("writing", flush=True)
            time.sleep(60)

    process = Child(main)
    assert process.stdout.readline() == "writing\n" and list(tmp_path.iterdir())
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == (143, "") and list(tmp_path.iterdir()) == []


def test_of_a_link_the_target_is_replaced(tmp_path):
    for name in ("old", "new"):  # the second is not there yet
        (tmp_path / f"{name}.link").symlink_to(f"{name}.txt")
    (tmp_path / "old.txt").write_text("old")
    for name in ("old", "new"):
        with folders.write_atomic(tmp_path / f"{name}.link") as file:
            file.write("written")
        assert (tmp_path / f"{name}.link").is_symlink()
        assert (tmp_path / f"{name}.txt").read_text() == "written"
    assert len(list(tmp_path.iterdir())) == 4


def test_a_pipe_and_a_device_are_written_to_as_they_are(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    master, device = os.openpty()
    for path in (pipe, os.ttyname(device)):
        with folders.write_atomic(path) as file:
            file.write("text")
    reader.join(20)
    assert read == ["text"] and pipe.is_fifo() and os.read(master, 9) == b"text"
    assert list(tmp_path.iterdir()) == [pipe]


def test_json_goes_and_comes_back_and_what_is_missing_is_said(tmp_path):
    path, value = tmp_path / "x.json", {"ä": [1, 2.5, None], "b": {"c": "中"}}
    with pytest.raises(UserError, match="x.json does not exist: it is made by data.py$"):
        folders.read_json(path, "data.py")
    folders.write_json(path, value)
    assert folders.read_json(path, "data.py", ("ä", "b")) == value
    assert "中" in path.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="lacks 'c': not made by this version of data.py.$"):
        folders.read_json(path, "data.py", ("b", "c"))


# --- output folders -------------------------------------------------------------------------------

JOB = {"model": "tiny", "layers": (6, 8), "sha256": {"dev.en": "ab", "dev.de": "cd"}}


def start(folder, job=JOB, script="train.py", ignored=("command",), **more):
    return folders.start_folder(folder, "run.json", script, job, ignored, **more)


def test_the_same_job_goes_on_and_ends(tmp_path):
    assert start(tmp_path, {**JOB, "command": "first"}) is False
    (tmp_path / "part.npy").write_bytes(b"1")
    assert start(tmp_path, {**JOB, "command": "second"}) is False
    note = {"complete": False, "script": "train.py", **JOB, "layers": [6, 8], "command": "first"}
    assert json.loads((tmp_path / "run.json").read_text()) == note
    folders.finish_folder(tmp_path, "run.json")
    assert start(tmp_path) is True and (tmp_path / "part.npy").read_bytes() == b"1"


def test_another_job_is_refused_with_what_differs(tmp_path):
    start(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    sums = {"dev.en": "ab", "dev.de": "ef"}
    with pytest.raises(UserError) as error:
        start(tmp_path, {"model": "big", "layers": [], "sha256": sums, "seed": 1})
    assert str(error.value) == (
        f"{tmp_path} was made with other settings: model was 'tiny', is now 'big'; layers was "
        "[6, 8], is now []; sha256.dev.de was 'cd', is now 'ef'; seed was None, is now 1. Give "
        "another --out, or --overwrite to delete it and start anew"
    )
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_key_that_the_older_job_does_not_know_counts_as_at_its_default(tmp_path):
    start(tmp_path)
    defaults = {"sha256": {"dev.zh": "ef", "unasked": 3}, "seed": 0, "other": 1}
    sums = {**JOB["sha256"], "dev.zh": "ef"}
    assert start(tmp_path, {**JOB, "sha256": sums, "seed": 0}, defaults=defaults) is False
    with pytest.raises(UserError, match="settings: seed was 0, is now 1. Give"):
        start(tmp_path, {**JOB, "sha256": sums, "seed": 1}, defaults=defaults)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused_and_left_alone(overwrite, tmp_path):
    """--overwrite, too, deletes only what holds our own file: not a repository, not the folder
    above the runs, not a grid, which has a run.json too."""
    for content in (None, '{"script": "grid_search.py"}'):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "thesis.tex").write_text("x")
        if content:
            (tmp_path / "run.json").write_text(content)
        before = sorted(tmp_path.rglob("*"))
        message = f"{tmp_path} holds mine and is none that train.py made: give another --out"
        with pytest.raises(UserError, match=message):
            start(tmp_path, overwrite=overwrite)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("complete", [False, True])
def test_what_a_killed_process_left_half_written_is_swept(tmp_path, complete):
    (tmp_path / ".run.json.k3x.tmp").write_text("{")
    assert start(tmp_path) is False
    if complete:
        folders.finish_folder(tmp_path, "run.json")
    (tmp_path / "parts/.1.abc.tmp").mkdir(parents=True)
    for name in (".results.csv.abc.tmp", "parts/.1.abc.tmp/.x.abc.tmp", "kept.tmp"):
        (tmp_path / name).write_text("half")
    assert start(tmp_path) is complete
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["kept.tmp", "parts", "run.json"]


def test_overwrite_starts_anew(tmp_path):
    with folders.lock(tmp_path):
        start(tmp_path)
        (tmp_path / "epochs" / "1").mkdir(parents=True)
        folders.finish_folder(tmp_path, "run.json")
        with pytest.MonkeyPatch.context() as patch:  # killed in the midst of it
            patch.setattr(folders, "remove", None)
            pytest.raises(TypeError, start, tmp_path, {"model": "big"}, overwrite=True)
        assert start(tmp_path) is False  # it does not say that it is complete
        assert start(tmp_path, {"model": "big"}, overwrite=True) is False
    note = {"complete": False, "script": "train.py", "model": "big"}
    assert json.loads((tmp_path / "run.json").read_text()) == note
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json"]


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    folder = tmp_path / "new" / "run"

    def main():
        with folders.lock(folder):
            print("held", flush=True)
            time.sleep(60)

    process = Child(main)
    assert process.stdout.readline() == "held\n"
    refused = pytest.raises(UserError, match=f"^{folder} is in use by another process$")
    with refused, folders.lock(folder):
        pass
    with folders.lock(folder, rank=1):  # of several processes the first holds it
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with folders.lock(folder):  # a killed process holds nothing
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with folders.lock(tmp_path):
        start(tmp_path)
    words = f"warning: {tmp_path} cannot be locked ([Errno 37] No locks available): start nothing"
    assert words in capsys.readouterr().err and (tmp_path / "run.json").exists()
