"""common.py: whole files or none, output folders that go on or refuse, and what a user sees of an error."""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from lib import devices, folders, hub, messages, tables

FULL = OSError(28, "No space left on device")


def run_cli(main, monkeypatch, capsys):
    """Exit status, stdout and stderr of a script with this main."""
    monkeypatch.setattr(sys, "argv", ["some/where/train.py", "--flag"])
    with pytest.raises(SystemExit) as stop:
        messages.cli(main)
    return stop.value.code or 0, *capsys.readouterr()


# --- cli ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def keep_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "error, status, message",
    [
        (messages.UserError("x.tsv, line 3: no"), 2, "train.py: error: x.tsv, line 3: no\n"),
        (FULL, 2, "train.py: error: [Errno 28] No space left on device\n"),
        (PermissionError(13, "Denied", "a/b"), 2, "train.py: error: [Errno 13] Denied: 'a/b'\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(5), 5, ""),
    ],
)
def test_cli_turns_an_error_into_a_status_and_a_line(monkeypatch, capsys, error, status, message):
    def main():
        print("so far")
        raise error

    assert run_cli(main, monkeypatch, capsys) == (status, "so far\n", message)


@pytest.mark.parametrize("status", [None, 0, 1])
def test_cli_passes_mains_status_on(monkeypatch, capsys, status):
    assert run_cli(lambda: status, monkeypatch, capsys) == (status or 0, "", "")


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError(), FileNotFoundError(2, "Not there", "a/b"), ConnectionError("gone")],
)
def test_cli_leaves_our_own_mistakes_their_traceback(error, monkeypatch):
    def main():
        raise error

    with pytest.raises(type(error)):
        messages.cli(main)


def child(code, **options):
    """A Python process that has imported common."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, "-c", "from lib import messages; import time, sys\n" + code],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_a_reader_that_went_away_is_no_error():
    with child(
        "sys.stdin.readline()\nmessages.cli(lambda: print('x'))", stdin=subprocess.PIPE
    ) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert (process.wait(20), process.stderr.read()) == (141, "")


def test_sigterm_leaves_no_temporary_file(tmp_path):
    code = f"""
def main():
    with folders.write_atomic({str(tmp_path / "x.txt")!r}) as file:
        file.write('half')
        print('writing', flush=True)
        time.sleep(20)
messages.cli(main)"""
    with child(code) as process:
        assert process.stdout.readline() == "writing\n" and list(tmp_path.iterdir())
        process.terminate()
        assert (process.wait(20), process.stderr.read(), list(tmp_path.iterdir())) == (143, "", [])


# --- whole files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("old", [b"old", None])
def test_write_atomic_leaves_the_old_file_on_an_error(tmp_path, error, old):
    path = tmp_path / "new" / "x.txt"
    if old is not None:
        path.parent.mkdir()
        path.write_bytes(old)
    with pytest.raises(type(error)):
        with folders.write_atomic(path) as file:
            file.write("half")
            file.flush()
            raise error
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == (
        {} if old is None else {"x.txt": old}
    )


@pytest.mark.parametrize(
    "mode, content, expected", [("w", "ä\r\n\n", b"\xc3\xa4\r\n\n"), ("wb", b"\xff\n", b"\xff\n")]
)
def test_write_atomic_takes_the_place_when_it_is_whole(tmp_path, mode, content, expected):
    path = tmp_path / "a" / "b" / "x"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"old")
    with folders.write_atomic(path, mode) as file:
        file.write(content)
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == expected and [p.name for p in path.parent.iterdir()] == ["x"]
    assert path.stat().st_mode & 0o777 == 0o644
    assert folders.sha256(path) == hashlib.sha256(expected).hexdigest()


def test_json_goes_and_comes_back(tmp_path):
    value = {"ä": [1, 2.5, None], "b": {"c": "中"}}
    folders.write_json(tmp_path / "x.json", value)
    assert folders.read_json(tmp_path / "x.json", "data.py", {"ä": list, "b": {"c": str}}) == value
    assert "中" in (tmp_path / "x.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "x.json does not exist"),
        (b"", "Expecting value: line 1"),
        (b'{"a": 1', "Expecting ',' delimiter"),
        (b'{"a": "\xff"}', "'utf-8' codec can't decode"),
        (b"[" * 100_000, "maximum recursion depth"),
        (b'{"b": "\\ud800"}', "'utf-8' codec can't encode"),
        (b"[1]", "a"),
        (b'{"b": {}}', "a"),
        (b'{"a": {}, "b": {}}', "a"),
        (b'{"a": [1, true], "b": {}}', "a"),
        (b'{"a": [1], "b": {"c": {"d": 1}}}', "b"),
        (b'{"a": [1], "b": {"c": []}}', "b"),
        (b'{"a": [1], "b": {"c": {}}}', "b"),
    ],
)
def test_read_json_says_what_is_wrong(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(messages.UserError) as error:
        folders.read_json(tmp_path / "x.json", "train.py", {"a": [int], "b": {str: {"d": str}}})
    if content is not None:
        assert str(error.value).endswith("): delete it, or --overwrite")
        message = f"x.json: not what train.py writes ({message}"
    assert str(error.value).startswith(f"{tmp_path}/{message}")


@pytest.mark.parametrize(
    "value, fits",
    [
        ({"a": [1, 2], "b": {"x": {"d": "y"}, "z": {"d": ""}}}, True),
        ({"a": [], "b": {}, "c": None}, True),
        ({"a": [1.0], "b": {}}, False),
    ],
)
def test_forms_of_json(value, fits):
    assert folders.fits(value, {"a": [int], "b": {str: {"d": str}}}) is fits


# --- output folders ----------------------------------------------------------------------------------------------

JOB = {"model": "tiny", "layers": (6, 8), "sha256": {"dev.en": "ab", "dev.de": "cd"}}


def start(folder, job=JOB, overwrite=False, **noted):
    return folders.start_folder(folder, "run.json", "train.py", job, noted, overwrite)


def test_the_same_job_goes_on_and_ends(tmp_path):
    assert start(tmp_path, command="first") is False
    (tmp_path / "part.npy").write_bytes(b"1")
    assert start(tmp_path, command="second") is False
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "complete": False,
        "script": "train.py",
        **JOB,
        "layers": [6, 8],
        "command": "first",
    }
    folders.finish_folder(tmp_path, "run.json")
    assert start(tmp_path) is True
    assert (tmp_path / "part.npy").read_bytes() == b"1"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "big"}, "model was 'tiny', is now 'big'"),
        ({"layers": [6, 8, 11]}, "layers was [6, 8], is now [6, 8, 11]"),
        ({"sha256": {"dev.en": "ab", "dev.de": "ef"}}, "sha256.dev.de was 'cd', is now 'ef'"),
        ({"seed": 1}, "seed was None, is now 1"),
        (
            {"model": "big", "layers": []},
            "model was 'tiny', is now 'big'; layers was [6, 8], is now []",
        ),
    ],
)
def test_another_job_is_refused_with_what_differs(tmp_path, change, message):
    start(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(messages.UserError) as error:
        start(tmp_path, {**JOB, **change})
    assert str(error.value) == (
        f"{tmp_path} was made with other settings: {message}. Give another --out, or "
        "--overwrite to delete it and start anew"
    )
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused_and_left_alone(overwrite, tmp_path):
    """--overwrite, too, deletes only what holds our own file: not a repository, not the folder above the runs."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("x")
    with folders.claim(tmp_path), pytest.raises(messages.UserError) as error:
        start(tmp_path, overwrite=overwrite)
    assert str(error.value) == (
        f"{tmp_path} holds mine but no run.json, so it is none that train.py made: give "
        "another --out, or delete it yourself"
    )
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        ".lock",
        "mine",
        "run.json",
        "thesis.tex",
    ]


@pytest.mark.parametrize("complete", [False, True])
def test_what_a_killed_process_left_half_written_is_swept(tmp_path, complete):
    start(tmp_path)
    if complete:
        folders.finish_folder(tmp_path, "run.json")
    (tmp_path / "parts").mkdir()
    for name in (".results.csv.abc.tmp", "parts/.max.0.npz.abc.tmp", "kept.tmp"):
        (tmp_path / name).write_text("half")
    assert start(tmp_path) is complete
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "kept.tmp",
        "run.json",
    ]


def test_a_killed_start_is_gone_on_from(tmp_path):
    (tmp_path / ".run.json.k3x.tmp").write_text(
        "{"
    )  # what write_atomic leaves when it is killed outright
    assert start(tmp_path) is False


def test_overwrite_starts_anew(tmp_path):
    with folders.claim(tmp_path):
        start(tmp_path)
        (tmp_path / "epochs" / "1").mkdir(parents=True)
        (tmp_path / "epochs" / "1" / "x").touch()
        folders.finish_folder(tmp_path, "run.json")
        assert start(tmp_path, {"model": "big"}, overwrite=True) is False
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "complete": False,
        "script": "train.py",
        "model": "big",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json"]


def test_start_folder_says_when_its_note_is_broken(tmp_path):
    (tmp_path / "run.json").write_text('{"script": "train.py"}')
    with pytest.raises(
        messages.UserError, match=r"run.json: not what train.py writes \(complete\)"
    ):
        start(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_scripts_folder_is_left_alone(tmp_path, overwrite):
    """A grid and a run both have a run.json: --overwrite of the one must not delete the other."""
    folders.start_folder(tmp_path, "run.json", "grid_search.py", JOB, {})
    (tmp_path / "results.csv").write_text("hours")
    with pytest.raises(
        messages.UserError, match="run.json is none that train.py made: give another --out"
    ):
        start(tmp_path, overwrite=overwrite)
    assert (tmp_path / "results.csv").read_text() == "hours"


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    code = (
        f"with folders.claim({str(folder)!r}):\n    print('held', flush=True)\n    time.sleep(20)"
    )
    with child(code) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(messages.UserError, match=f"^{folder} is in use by another process$"):
            with folders.claim(folder):
                pass
        process.kill()
        process.wait(20)
        with folders.claim(folder):  # a killed process holds nothing
            pass


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ({"a": 1, "b": {"c": [1]}}, {"b": {"c": [1]}, "a": 1}, []),
        ({"a": 1}, {"b": 2}, ["a was 1, is now None", "b was None, is now 2"]),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}}, ["a.b.d was 2, is now 3"]),
        ({"a": {"b": 1}}, {"a": 5}, ["a was {'b': 1}, is now 5"]),
    ],
)
def test_differences(old, new, expected):
    assert folders.differences(old, new) == expected
    assert len(folders.differences({"a": "x" * 999}, {"a": ""})[0]) == 200


# --- what the scripts share beside ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds, good, bad",
    [({"low": 1}, ["1", "7"], ["0", "-3"]), ({"low": 0, "below": 4}, ["0", "3"], ["4", "-1"])],
)
def test_in_range_of_whole_numbers(bounds, good, bad):
    parse = messages.in_range(int, **bounds)
    assert [parse(text) for text in good] == [
        int(text) for text in good
    ] and parse.__name__ == "int"
    for text in bad:
        with pytest.raises(
            argparse.ArgumentTypeError, match=f"^{text}, expected {bounds['low']} or more"
        ):
            parse(text)
    with pytest.raises(ValueError):
        parse("1.5")


@pytest.mark.parametrize(
    "bounds, good, bad",
    [
        ({"above": 0}, ["1e-9", "inf"], ["0", "-1", "nan"]),
        ({"low": 0, "below": 1}, ["0", "0.999"], ["1", "nan", "inf", "-0.1"]),
    ],
)
def test_in_range_of_fractions(bounds, good, bad):
    parse = messages.in_range(float, **bounds)
    assert [parse(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


@pytest.mark.parametrize(
    "content, shape, message",
    [
        (None, (2, 3), "x.npy does not exist: do it again"),
        (b"", (2, 3), "x.npy is damaged or cut short"),
        (
            np.zeros((2, 3), "f2"),
            (3, 2),
            r"x.npy has shape \(2, 3\) and type float16, expected \(3, 2\) of floats: do",
        ),
        (np.zeros((2, 3), "i8"), (2, 3), "type int64, expected"),
        (np.zeros((2, 3), "f2"), (2, 3), None),
    ],
)
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_arrays_are_mapped_when_they_are_whole(content, shape, message, mode, tmp_path):
    path = tmp_path / "x.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    if message is None:
        array = folders.load_array(path, shape, mode=mode)
        assert isinstance(array, np.memmap) and array.shape == shape and array.mode == mode
        path.write_bytes(path.read_bytes()[:-1])
        message = "x.npy is damaged or cut short"
    with pytest.raises(messages.UserError, match=message):
        folders.load_array(path, shape, remedy="do it again", mode=mode)


@pytest.mark.parametrize(
    "name, folder",
    [
        ("runs/of/mine", True),
        ("./model", True),
        ("~/model", True),
        ("here/model", True),
        ("bert-base-uncased", False),
        ("google/bert", False),
    ],
)
def test_a_model_path_that_looks_like_a_folder_and_is_none(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    words = f"^{name}: no such folder$" if folder else "is not in the hub's cache"
    with pytest.raises(messages.UserError, match=words):
        hub.model_folder(name)


@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. See more"), True),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Buy new"
            ),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_running_out_of_memory_is_one_sentence_with_advice(error, said):
    with pytest.raises(messages.UserError if said else RuntimeError) as caught:
        with messages.out_of_memory("halve it"):
            raise error
    assert (
        str(caught.value).startswith("out of memory on ")
        and str(caught.value).endswith(": halve it")
    ) == said


def test_a_markdown_table_is_aligned_and_its_bars_are_escaped():
    assert tables.markdown_table(["name", "a"], [["x|y", 1.5], ["z", 20]]).splitlines() == [
        "| name |   a |",
        "|------|-----|",
        "| x\\|y | 1.5 |",
        "| z    |  20 |",
    ]


@pytest.mark.parametrize("has, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_precision_is_fp16_on_a_gpu_without_bf16(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert devices.pick_precision("auto", torch.device("cuda")) == expected


def test_processes_that_torchrun_did_not_start_right_are_one_sentence(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        messages.UserError, match="WORLD_SIZE is 2 and RANK is not set: start with torchrun"
    ):
        devices.start_processes()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        messages.UserError, match="more processes than there are GPUs, 1: lower --nproc-per-node"
    ):
        devices.start_processes()
