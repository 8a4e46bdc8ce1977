"""Whatever bytes a file holds, the answer is data or one clear sentence: no traceback, no hang, nothing written
elsewhere.

500 cases in `make test`, 10,000 in `make prove`, which sets PROVE=1.
"""

import contextlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import make_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import evaluate
import extract
import grid_search
import train
from lib import archives, folders
from lib.messages import UserError

TIMES = 20 if os.environ.get("PROVE") else 1
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
PIECES = [
    b"",
    b"\0",
    b"\t",
    b"\n",
    b"\r\n",
    b"\xff",
    b'"',
    b"9" * 30,
    b"-1",
    b"1e999",
    b"NaN",
    b"{",
    b"[[[[",
    "😀\u202e".encode(),
    b"../../x",
    b"\xef\xbb\xbf",
    b" " * 9,
    b"null",
    b"x" * 300,
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [
            -1,
            0,
            1,
            7,
            10**30,
            1.5,
            float("nan"),
            "",
            "x",
            "../../x",
            [],
            {},
            [1],
            ["a"],
            {"a": 1},
            "a\n\tb",
            [[0]],
            "6+8",
        ]
    ),
)


def cases(count):
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        suppress_health_check=CHECKS,
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


@st.composite
def wrong_json(draw, valid):
    """JSON like `valid`, with a value changed or left out somewhere, or bytes that are no JSON."""
    if draw(st.integers(0, 5)) == 0:
        return draw(broken(valid))
    lines = (
        [json.loads(line) for line in valid.splitlines()]
        if valid.count(b"}\n{")
        else [json.loads(valid)]
    )
    place, key = lines, draw(st.integers(0, len(lines) - 1))
    while isinstance(place[key], (dict, list)) and place[key] and draw(st.integers(0, 3)):
        place = place[key]
        key = draw(
            st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place))))
        )
    if draw(st.integers(0, 3)) or place is lines:
        place[key] = draw(VALUES)
    else:
        del place[key]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def answers(work):
    """Run `work()`; anything but an answer or a sentence for the user is a failure."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            work()
    except UserError as error:
        assert str(error) and len(str(error)) < 3000
    except SystemExit as stop:
        assert stop.code == 2  # argparse has said it


def swapped(path, content):
    """A context in which the file at `path` holds other bytes."""

    @contextlib.contextmanager
    def swap():
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            yield
        finally:
            path.write_bytes(before)

    return swap()


@pytest.fixture(scope="module")
def world(model_folder, tmp_path_factory):
    """A folder of every kind that the scripts read."""
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "data", train=30, dev=7, test=7, languages=("en", "de"))
    common = [
        "--model",
        model_folder,
        "--data",
        str(folder / "data"),
        "--max-length",
        "32",
        "--precision",
        "fp32",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        extract.main([*common, "--out", str(folder / "features")])
        train.main([*common, "--out", str(folder / "run"), "--layers", "1", "2", "--epochs", "1"])
        grid_search.main(
            [
                "--features",
                str(folder / "features"),
                "--out",
                str(folder / "grid"),
                "--layers",
                "1",
                "2",
                "--seeds",
                "1",
                "--epochs",
                "1",
                "--lr",
                "1e-3",
            ]
        )
        evaluate.main(
            [
                str(folder / "run"),
                "--data",
                str(folder / "data"),
                "--out",
                str(folder / "results"),
                "--resamples",
                "10",
            ]
        )
    return folder


@cases(100)
@given(draw=st.data())
def test_data_sets(draw, world, model_folder):
    path = (
        world
        / "data"
        / draw.draw(st.sampled_from(["labels.txt", "train.en.tsv", "dev.de.tsv", "test.en.tsv"]))
    )
    with swapped(path, draw.draw(broken(path.read_bytes()))):
        answers(lambda: data.check(world / "data", model_folder))


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Small archives as XNLI's and MASSIVE's are."""
    folder = tmp_path_factory.mktemp("archives")
    with zipfile.ZipFile(folder / "mt.zip", "w") as file:
        file.writestr(
            "XNLI-MT-1.0/multinli/multinli.train.en.tsv",
            "premise\thypo\tlabel\n" + "A man\tA b\tneutral\n" * 3,
        )
    rows = "".join(
        f"{language}\tneutral\tp{i}\th{i}\t{i}\n" for i in range(3) for language in ("en", "de")
    )
    with zipfile.ZipFile(folder / "xnli.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for split in ("dev", "test"):
            file.writestr(
                f"XNLI-1.0/xnli.{split}.tsv",
                "language\tgold_label\tsentence1\tsentence2\tpairID\n" + rows,
            )
    with tarfile.open(folder / "massive.tar.gz", "w:gz") as file:
        for code in ("en-US", "de-DE"):
            lines = [
                {
                    "id": str(i),
                    "partition": ("train", "dev", "test")[i % 3],
                    "intent": "ab"[i // 3],
                    "utt": f"text {i}",
                }
                for i in range(6)
            ]
            content = "".join(json.dumps(line) + "\n" for line in lines).encode()
            info = tarfile.TarInfo(f"1.0/data/{code}.jsonl")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    archives.read_xnli(
        folder / "xnli.zip", folder / "mt.zip", ["en", "de"], ["en"]
    )  # they are good as they are
    archives.read_massive(folder / "massive.tar.gz", ["en", "de"], ["en"], 0, False, 0)
    return folder


@cases(120)
@given(draw=st.data())
def test_archives(draw, archives):
    path = archives / draw.draw(st.sampled_from(["mt.zip", "xnli.zip", "massive.tar.gz"]))
    with swapped(path, draw.draw(broken(path.read_bytes()))):
        if path.name == "massive.tar.gz":
            answers(lambda: archives.read_massive(path, ["en", "de"], ["en"], 0, False, 0))
        else:
            answers(
                lambda: archives.read_xnli(
                    archives / "xnli.zip", archives / "mt.zip", ["en", "de"], ["en"]
                )
            )


@cases(60)
@given(draw=st.data())
def test_feature_folders(draw, world):
    name = draw.draw(
        st.sampled_from(
            [
                "manifest.json",
                "manifest.json",
                "train.en.max.npy",
                "dev.de.labels.npy",
                "dev.de.max.npy",
            ]
        )
    )
    path = world / "features" / name
    content = draw.draw(
        wrong_json(path.read_bytes()) if name.endswith("json") else broken(path.read_bytes())
    )
    out = world / "fuzzed-grid"
    with swapped(path, content):
        answers(
            lambda: grid_search.main(
                [
                    "--features",
                    str(world / "features"),
                    "--out",
                    str(out),
                    "--layers",
                    "1",
                    "2",
                    "--seeds",
                    "1",
                    "--epochs",
                    "1",
                    "--poolings",
                    "max",
                    "--overwrite",
                ]
            )
        )
    shutil.rmtree(out, ignore_errors=True)


@cases(120)
@given(draw=st.data())
def test_run_folders(draw, world):
    name = draw.draw(
        st.sampled_from(
            [
                "run.json",
                "run.json",
                "metrics.jsonl",
                "epochs/1/classifier.json",
                "epochs/1/config.json",
                "epochs/1/classifier.safetensors",
                "epochs/1/tokenizer.json",
                "predictions/1/test.de.npy",
                "predictions/1/origins.json",
            ]
        )
    )
    path = world / "run" / name
    content = draw.draw(
        wrong_json(path.read_bytes()) if ".json" in name else broken(path.read_bytes())
    )
    kept = world / "kept"
    if name.startswith("epochs"):
        (world / "run" / "predictions").rename(kept)  # so that the model is read
    try:
        with swapped(path, content):
            answers(
                lambda: evaluate.main(
                    [
                        str(world / "run"),
                        "--data",
                        str(world / "data"),
                        "--out",
                        str(world / "out"),
                        "--resamples",
                        "5",
                    ]
                )
            )
    finally:
        if kept.exists():
            shutil.rmtree(world / "run" / "predictions", ignore_errors=True)
            kept.rename(world / "run" / "predictions")


@cases(60)
@given(draw=st.data())
def test_a_users_own_text(draw, world, model_folder):
    path = world / "mine.tsv"
    path.write_bytes(
        draw.draw(broken("text\tlabel\nmy money\trefund\n😀 \u202e x\tagent\n \tcancel\n".encode()))
    )
    answers(
        lambda: data.encode(
            data.load_tokenizer(model_folder),
            data.read_table(path, ["refund", "agent", "cancel"])[0],
            32,
        )
    )


@cases(40)
@given(draw=st.data())
def test_searches_and_their_parts(draw, world):
    name = draw.draw(st.sampled_from(["best.json", "results.csv"]))
    path = world / "grid" / name
    with swapped(
        path,
        draw.draw(
            wrong_json(path.read_bytes()) if name == "best.json" else broken(path.read_bytes())
        ),
    ):
        answers(
            {
                "best.json": lambda: train.parse_args(
                    ["--model", "m", "--data", "d", "--out", "o", "--layers-from", str(path)]
                ),
                "results.csv": lambda: folders.read_grid(world / "grid"),
            }[name]
        )


@pytest.mark.parametrize("rows", [10**12, -1])
def test_a_header_that_claims_too_many_rows(rows, world):
    path = world / "features" / "train.en.max.npy"
    whole = path.read_bytes()
    header = {"descr": "<f2", "fortran_order": False, "shape": (6, rows, 36)}
    claimed = io.BytesIO()
    np.lib.format.write_array_header_1_0(claimed, header)
    with (
        swapped(path, claimed.getvalue() + whole[128:]),
        pytest.raises(UserError, match="damaged or cut short"),
    ):
        grid_search.main(
            [
                "--features",
                str(world / "features"),
                "--out",
                str(world / "claimed"),
                "--layers",
                "1",
                "2",
            ]
        )


def test_a_line_of_50_megabytes(tmp_path):
    (tmp_path / "long.tsv").write_bytes(b"text\n" + b"x" * 50_000_000)
    with pytest.raises(UserError, match="line 2: longer than 1,048,576 bytes"):
        data.read_table(tmp_path / "long.tsv")


def test_an_archive_cannot_write_elsewhere(archives, tmp_path):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with (
        tarfile.open(inside / "amazon-massive-dataset-1.0.tar.gz", "w:gz") as file,
        tarfile.open(archives / "massive.tar.gz") as good,
    ):
        for name in ("../../x", "1.0/data/../../../x"):
            file.addfile(tarfile.TarInfo(name))
        for info in good:
            file.addfile(info, good.extractfile(info))
    data.main(
        [
            "massive",
            "--archives",
            str(inside),
            "--out",
            str(inside / "data"),
            "--languages",
            "en",
            "de",
        ]
    )
    assert sorted(path.name for path in Path(tmp_path).rglob("x")) == []
