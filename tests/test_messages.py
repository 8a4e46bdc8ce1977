"""lib/messages.py and lib/devices.py: what a user sees of an error, flags' types, precision and
processes."""

import argparse
import os
import signal
import sys
import traceback

import pytest
import torch

from lib import devices, messages

FULL = OSError(28, "No space left on device")


class Child:
    """A process of its own, a fork of this one, that runs a script's main with pipes for output."""

    def __init__(self, main, encoding="utf-8"):
        out, err = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for write, (read, end) in ((1, out), (2, err)):
                os.dup2(end, write)
                os.close(read)
            sys.stdout = os.fdopen(1, "w", encoding=encoding)
            sys.stderr = os.fdopen(2, "w", buffering=1, encoding=encoding)
            status = 1
            try:
                messages.cli(main)
            except SystemExit as stop:
                status = stop.code or 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        os.close(out[1])
        os.close(err[1])
        self.stdout, self.stderr = os.fdopen(out[0]), os.fdopen(err[0])

    def wait(self):
        """The exit status, and what stands in stderr."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return status, self.stderr.read()


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Exit status, stdout and stderr of a script with this main."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["some/where/train.py", "--flag"])

    def run(main):
        with pytest.raises(SystemExit) as stop:
            messages.cli(main)
        return stop.value.code or 0, *capsys.readouterr()

    yield run
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
def test_cli_turns_an_error_into_a_status_and_a_line(run_cli, error, status, message):
    def main():
        print("so far")
        raise error

    assert run_cli(main) == (status, "so far\n", message)


@pytest.mark.parametrize("status", [None, 1])
def test_cli_passes_mains_status_on(run_cli, status):
    assert run_cli(lambda: status) == (status or 0, "", "")


@pytest.mark.parametrize("error", [ZeroDivisionError(), FileNotFoundError(2, "Not there", "a/b")])
def test_cli_leaves_our_own_mistakes_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        messages.cli(main)


def test_a_reader_that_went_away_is_no_error():
    wait, go_on = os.pipe()

    def main():
        os.read(wait, 1)
        print("x")

    process = Child(main)
    process.stdout.close()
    os.write(go_on, b"x")
    assert process.wait() == (141, "")


def test_what_an_ascii_terminal_cannot_print_is_escaped():
    def main():
        print("é")
        raise messages.UserError("退")

    process = Child(main, encoding="ascii")
    status, error = process.wait()
    assert (status, process.stdout.read()) == (2, "\\xe9\n")
    assert error.endswith(": error: \\u9000\n")


@pytest.mark.parametrize(
    "kind, bounds, good, bad, words",
    [
        (int, {"low": 1}, ["1", "7"], ["0", "-3"], "1 or more"),
        (int, {"low": 0, "below": 4}, ["0", "3"], ["4", "-1"], "0 or more and less than 4"),
        (float, {"above": 0}, ["1e-9", "3"], ["0", "nan"], "more than 0"),
        (float, {"low": 0, "below": 1}, ["0.9"], ["1", "nan"], "0 or more and less than 1"),
    ],
)
def test_in_range(kind, bounds, good, bad, words):
    parse = messages.in_range(kind, **bounds)
    assert [parse(text) for text in good] == [kind(text) for text in good]
    assert parse.__name__ == kind.__name__
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text}, expected {words}$"):
            parse(text)
    with pytest.raises(ValueError):
        parse("many")


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. See more")
CPU = RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes. Buy")


@pytest.mark.parametrize(
    "error, reason",
    [
        (CUDA, "CUDA out of memory"),
        (CPU, "[enforce] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        (MemoryError(), "MemoryError"),
        (MemoryError("Unable to allocate 9 GiB"), "Unable to allocate 9 GiB"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_running_out_of_memory_is_one_sentence_with_advice(error, reason):
    expected = pytest.raises(messages.UserError if reason else RuntimeError)
    with expected as caught, messages.out_of_memory("halve it"):
        raise error
    if reason:
        assert str(caught.value) == f"out of memory ({reason}): halve it"


@pytest.mark.parametrize("has, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_precision_is_fp16_on_a_gpu_without_bf16(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert devices.pick_precision("auto", torch.device("cuda")) == expected


def test_processes_that_torchrun_did_not_start_right_are_one_sentence(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(messages.UserError, match="WORLD_SIZE is 2 and RANK is not set: start with"):
        devices.start_processes()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(messages.UserError, match="than there are GPUs, 1: lower --nproc-per-node"):
        devices.start_processes()
