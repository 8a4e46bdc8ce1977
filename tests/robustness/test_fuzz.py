"""Whatever bytes a user's file holds, the answer is data or one clear sentence: no traceback, no
hang, nothing written elsewhere.

`make prove`: 6,000 cases with PROVE=1, else 300.
"""

import contextlib
import io
import os
import shutil

import pytest
from conftest import make_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import write_massive, write_xnli

import data
import evaluate
import train
from lib import archives
from lib.messages import UserError

PIECES = [b"", b"\0", b"\t", b"\n", b"\r\n", b"\r", b"\xff", b'"', b",", b"\xef\xbb\xbf", b" " * 9]
PIECES += [b"9" * 30, b"-1", b"1e999", b"NaN", b"null", b"{", b"[[[[", b"../../x", b"x" * 300]
PIECES += ["😀\u202e".encode(), "\u2028".encode()]


cases = settings(
    max_examples=2000 if os.environ.get("PROVE") else 100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


@st.composite
def broken(draw, valid):
    """Some bytes: anything, or `valid` ones with pieces changed, put in or cut off."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([0, 1, 1, 4, 50, len(content)]))
        content[at : at + length] = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=4)))
    return bytes(content)


def answers(main, *arguments):
    """Run a command; anything but an answer or a sentence for the user is a failure."""
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            main([str(argument) for argument in arguments])
    except UserError as error:
        assert str(error) and len(str(error)) < 3000
    except SystemExit as stop:
        assert stop.code == 2  # argparse has said it


@contextlib.contextmanager
def swapped(path, draw):
    """A context in which the file at `path` holds other bytes."""
    before = path.read_bytes()
    path.write_bytes(draw.draw(broken(before)))
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def world(model_folder, tmp_path_factory):
    """A data set, a run, and small archives as XNLI's and MASSIVE's are."""
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "data", train=30, dev=7, test=7, languages=("en", "de"))
    flags = f"--model {model_folder} --data {folder}/data --max-length 32 --precision fp32"
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(f"{flags} --out {folder}/run --layers 1 2 --epochs 1".split())
    write_xnli(folder / "archives")
    write_massive(folder / "archives")
    return folder


@cases
@given(draw=st.data())
def test_data_sets(draw, world, model_folder):
    names = ["labels.txt", "train.en.tsv", "dev.de.tsv", "test.en.tsv"]
    with swapped(world / "data" / draw.draw(st.sampled_from(names)), draw):
        answers(data.main, "check", world / "data", "--model", model_folder)


def convert(world, name, out):
    kind = "massive" if "massive" in name else "xnli"
    flags = "--archives", world / "archives", "--languages", "en", "de", "--out", out / "data"
    return data.main, kind, *flags


@cases
@given(draw=st.data())
def test_archives(draw, world, tmp_path):
    names = sorted(path.name for path in (world / "archives").iterdir())
    name = draw.draw(st.sampled_from(names))
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    with swapped(world / "archives" / name, draw):
        answers(*convert(world, name, tmp_path))


@cases
@given(draw=st.data())
def test_a_users_own_text(draw, world, tmp_path):
    """As text to label, and as the source of a data set."""
    form = draw.draw(st.sampled_from(["tsv", "csv", "jsonl"]))
    path = tmp_path / f"mine.{form}"
    texts = ['my "money"', "😀 \u202e x", " "]
    archives.write_columns(path, {"text": texts, "label": ["refund", "agent", "cancel"]})
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    with swapped(path, draw):
        files = "--input", path, "--predictions", tmp_path / f"out.{form}"
        answers(evaluate.main, world / "run", *files)
        flags = "--out", tmp_path / "data", "--train", f"en={path}", "--dev", f"en={path}"
        answers(data.main, "own", *flags, "--text", "text", "--label", "label")
