"""files.py: whole files or none, output folders that go on or refuse, and what a user sees of an error."""
import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest

import files
from conftest import ROOT

FULL = OSError(28, "No space left on device")


def run_cli(main, monkeypatch, capsys):
    """Exit status, stdout and stderr of a script with this main."""
    monkeypatch.setattr(sys, "argv", ["some/where/train.py", "--flag"])
    with pytest.raises(SystemExit) as stop:
        files.cli(main)
    return stop.value.code or 0, *capsys.readouterr()


# --- cli ---------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def keep_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("error, status, message", [
    (files.UserError("x.tsv, line 3: no"), 2, "train.py: error: x.tsv, line 3: no\n"),
    (FULL, 2, "train.py: error: [Errno 28] No space left on device\n"),
    (FileNotFoundError(2, "Not there", "a/b"), 2, "train.py: error: [Errno 2] Not there: 'a/b'\n"),
    (KeyboardInterrupt(), 130, ""),
    (SystemExit(5), 5, ""),
])
def test_cli_turns_an_error_into_a_status_and_a_line(monkeypatch, capsys, error, status, message):
    def main():
        print("so far")
        raise error
    assert run_cli(main, monkeypatch, capsys) == (status, "so far\n", message)


@pytest.mark.parametrize("status", [None, 0, 1])
def test_cli_passes_mains_status_on(monkeypatch, capsys, status):
    assert run_cli(lambda: status, monkeypatch, capsys) == (status or 0, "", "")


def test_cli_leaves_our_own_mistakes_their_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        files.cli(lambda: 1 / 0)


def child(code, **options):
    """A Python process that has imported files."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, "-c", "import files, time, sys\n" + code], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_reader_that_went_away_is_no_error():
    with child("sys.stdin.readline()\nfiles.cli(lambda: print('x'))", stdin=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert (process.wait(20), process.stderr.read()) == (141, "")


def test_sigterm_leaves_no_temporary_file(tmp_path):
    code = f"""
def main():
    with files.write_atomic({str(tmp_path / 'x.txt')!r}) as file:
        file.write('half')
        print('writing', flush=True)
        time.sleep(20)
files.cli(main)"""
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
        with files.write_atomic(path) as file:
            file.write("half")
            file.flush()
            raise error
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == ({} if old is None else {"x.txt": old})


@pytest.mark.parametrize("mode, content, expected", [("w", "ä\r\n\n", b"\xc3\xa4\r\n\n"), ("wb", b"\xff\n", b"\xff\n")])
def test_write_atomic_takes_the_place_when_it_is_whole(tmp_path, mode, content, expected):
    path = tmp_path / "a" / "b" / "x"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"old")
    with files.write_atomic(path, mode) as file:
        file.write(content)
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == expected and [p.name for p in path.parent.iterdir()] == ["x"]
    assert path.stat().st_mode & 0o777 == 0o644
    assert files.sha256(path) == hashlib.sha256(expected).hexdigest()


def test_json_goes_and_comes_back(tmp_path):
    value = {"ä": [1, 2.5, None], "b": {"c": "中"}}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json", {"ä": list, "b": {"c": str}}) == value
    assert "中" in (tmp_path / "x.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("content, message", [
    (None, "x.json does not exist"),
    (b"", "x.json is not valid JSON: Expecting value"),
    (b'{"a": 1', "x.json is not valid JSON: "),
    (b'{"a": "\xff"}', "x.json is not valid JSON: "),
    (b"[" * 100_000, "x.json is not valid JSON: "),
    (b'{"b": "\\ud800"}', "x.json is not valid JSON: "),
    (b"[1]", "x.json: expected it to be an object"),
    (b'{"b": {}}', "x.json: expected 'a' to be a list"),
    (b'{"a": {}, "b": {}}', "x.json: expected 'a' to be a list"),
    (b'{"a": [1, true], "b": {}}', "x.json: expected each entry of 'a' to be a whole number"),
    (b'{"a": [1], "b": {"c": {"d": 1}}}', "x.json: expected 'd' to be text"),
    (b'{"a": [1], "b": {"c": []}}', "x.json: expected each entry of 'b' to be an object"),
])
def test_read_json_says_what_is_wrong(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(files.UserError) as error:
        files.read_json(tmp_path / "x.json", {"a": [int], "b": {str: {"d": str}}})
    assert f"{tmp_path}/{message}" in str(error.value)


# --- output folders ----------------------------------------------------------------------------------------------

JOB = {"model": "tiny", "layers": (6, 8), "sha256": {"dev.en": "ab", "dev.de": "cd"}}


def test_the_same_job_goes_on_and_ends(tmp_path):
    assert files.start_folder(tmp_path, "run.json", JOB, extra={"command": "first"}) is False
    (tmp_path / "part.npy").write_bytes(b"1")
    assert files.start_folder(tmp_path, "run.json", JOB, extra={"command": "second"}) is False
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "complete": False, **JOB, "layers": [6, 8], "command": "first"}
    files.finish_folder(tmp_path, "run.json")
    assert files.start_folder(tmp_path, "run.json", JOB) is True
    assert (tmp_path / "part.npy").read_bytes() == b"1"


@pytest.mark.parametrize("change, message", [
    ({"model": "big"}, "model was 'tiny', is now 'big'"),
    ({"layers": [6, 8, 11]}, "layers was [6, 8], is now [6, 8, 11]"),
    ({"sha256": {"dev.en": "ab", "dev.de": "ef"}}, "sha256.dev.de was 'cd', is now 'ef'"),
    ({"seed": 1}, "seed was None, is now 1"),
    ({"model": "big", "layers": []}, "model was 'tiny', is now 'big'; layers was [6, 8], is now []"),
])
def test_another_job_is_refused_with_what_differs(tmp_path, change, message):
    files.start_folder(tmp_path, "run.json", JOB)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(files.UserError) as error:
        files.start_folder(tmp_path, "run.json", {**JOB, **change})
    assert str(error.value) == (f"{tmp_path} was made with other settings: {message}. Give another --out, or --overwrite to "
                                "delete it and start anew")
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(files.UserError, match="holds thesis.tex but no run.json: give another --out, or --overwrite"):
        files.start_folder(tmp_path, "run.json", JOB)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("complete", [False, True])
def test_what_a_killed_process_left_half_written_is_swept(tmp_path, complete):
    files.start_folder(tmp_path, "run.json", JOB)
    if complete:
        files.finish_folder(tmp_path, "run.json")
    (tmp_path / "parts").mkdir()
    for name in (".results.csv.abc.tmp", "parts/.max.0.npz.abc.tmp", "kept.tmp"):
        (tmp_path / name).write_text("half")
    assert files.start_folder(tmp_path, "run.json", JOB) is complete
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["kept.tmp", "run.json"]


def test_a_killed_start_is_gone_on_from(tmp_path):
    (tmp_path / ".run.json.k3x.tmp").write_text("{")  # what write_atomic leaves when it is killed outright
    assert files.start_folder(tmp_path, "run.json", JOB) is False


def test_overwrite_starts_anew(tmp_path):
    with files.claim(tmp_path):
        files.start_folder(tmp_path, "run.json", JOB)
        (tmp_path / "epochs" / "1").mkdir(parents=True)
        (tmp_path / "epochs" / "1" / "x").touch()
        files.finish_folder(tmp_path, "run.json")
        assert files.start_folder(tmp_path, "run.json", {"model": "big"}, overwrite=True) is False
    assert json.loads((tmp_path / "run.json").read_text()) == {"complete": False, "model": "big"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json"]


def test_start_folder_says_when_its_note_is_broken(tmp_path):
    (tmp_path / "run.json").write_text('{"model": "tiny"}')
    with pytest.raises(files.UserError, match="run.json: expected 'complete' to be true or false"):
        files.start_folder(tmp_path, "run.json", JOB)


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    code = f"with files.claim({str(folder)!r}):\n    print('held', flush=True)\n    time.sleep(20)"
    with child(code) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(files.UserError, match=f"^{folder} is in use by another process$"):
            with files.claim(folder):
                pass
        process.kill()
        process.wait(20)
        with files.claim(folder):  # a killed process holds nothing
            pass


@pytest.mark.parametrize("old, new, expected", [
    ({"a": 1, "b": {"c": [1]}}, {"b": {"c": [1]}, "a": 1}, []),
    ({"a": 1}, {"b": 2}, ["a was 1, is now None", "b was None, is now 2"]),
    ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}}, ["a.b.d was 2, is now 3"]),
    ({"a": {"b": 1}}, {"a": 5}, ["a was {'b': 1}, is now 5"]),
])
def test_differences(old, new, expected):
    assert files.differences(old, new) == expected
    assert len(files.differences({"a": "x" * 999}, {"a": ""})[0]) == 200
