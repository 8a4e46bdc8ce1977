"""extract.py against plain transformers states pooled by hand, one row at a time; files, stops."""

import errno
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LABELS, make_data, make_model, refused, table
from transformers import AutoModel, AutoTokenizer

import extract
from lib.folders import sha256
from model import POOLINGS

ROWS = {"train.en": 13, "dev.en": 5, "dev.de": 5, "test.en": 7, "test.de": 7}
FINAL = sorted(f"{stem}.{kind}.npy" for stem in ROWS for kind in (*POOLINGS, "labels"))
FP32 = ("--precision", "fp32", "--batch-size", 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(
        tmp_path_factory.mktemp("data") / "toy", train=13, dev=5, test=7, languages=("en", "de")
    )


def flags(model, data, out, *more):
    return ["--model", model, "--data", data, "--out", out, "--max-length", 33, *more]


@pytest.fixture
def run(script, model_folder, data, tmp_path):
    """run("--flag", value, ...) extracts from the toy model to tmp_path/out, or as told."""

    def call(*more, model=model_folder, data=data, out=tmp_path / "out"):
        return script("extract", *flags(model, data, out, *FP32, *more))

    return call


@pytest.fixture(scope="module")
def unstopped(model_folder, data, tmp_path_factory):
    """A feature folder made in one go, by batches of 72 tokens: 3 + 2 + 2 + 2 + 2 of them."""
    out = tmp_path_factory.mktemp("features") / "unstopped"
    assert extract.main(list(map(str, flags(model_folder, data, out, *FP32)))) == 0
    return out


@pytest.fixture(scope="module")
def exact(model_folder, data, tmp_path_factory):
    """The same in float32."""
    out = tmp_path_factory.mktemp("features") / "exact"
    more = (*FP32, "--dtype", "float32")
    assert extract.main(list(map(str, flags(model_folder, data, out, *more)))) == 0
    return out


def finals(out):
    return sorted(path.name for path in Path(out).iterdir() if not path.name.startswith("."))


def hidden_names(out):
    return [path.name for path in Path(out).iterdir() if path.name.startswith(".")]


def contents(out):
    return {name: (Path(out) / name).read_bytes() for name in finals(out)}


def manifest(out):
    return json.loads((Path(out) / "manifest.json").read_text())


def stop_after(monkeypatch, batches):
    """Let pool_all() work for so many batches, then raise. Returns the list of its calls."""
    calls, whole = [], extract.pool_all

    def pool_all(*arguments):
        if len(calls) == batches:
            raise KeyboardInterrupt
        calls.append(arguments)
        return whole(*arguments)

    monkeypatch.setattr(extract, "pool_all", pool_all)
    return calls


# --- what is written ------------------------------------------------------------------------------


@functools.cache
def plain(folder):
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


@torch.no_grad()
def plain_states(folder, *texts):
    """The states of one row: (L, T, D)."""
    tokenizer, model = plain(folder)
    output = model(**tokenizer(*texts, return_tensors="pt"), output_hidden_states=True)
    return torch.stack(output.hidden_states)[:, 0].numpy()


def close(values, expected):
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5)


def test_files_hold_the_states_of_plain_transformers_row_by_row(exact, model_folder, data):
    for stem, count in ROWS.items():
        arrays = {pooling: np.load(exact / f"{stem}.{pooling}.npy") for pooling in POOLINGS}
        for array in arrays.values():
            assert array.shape == (6, count, 36) and array.dtype.str == "<f4"
        rows = table(f"{data}/{stem}.tsv")
        for i, (text, _) in enumerate(rows):
            states = plain_states(model_folder, text)
            close(arrays["max"][:, i], states.max(1))
            close(arrays["mean"][:, i], states.mean(1))
            close(arrays["cls"][:, i], states[:, 0])
        labels = np.load(exact / f"{stem}.labels.npy")
        assert labels.dtype == np.int64
        assert labels.tolist() == [LABELS.index(label) for _, label in rows]


def test_pairs_are_read_as_pairs_and_cut_to_the_length(run, model_folder, tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/labels.txt").write_text("yes\nno\n")
    first, second = "money refund agent person parcel late cancel", "order please"
    lines = f"text_a\ttext_b\tlabel\n{second}\t{second}\tno\n{first}\t{second}\tyes\n"
    for name in ("train.en.tsv", "dev.en.tsv"):
        (tmp_path / "pairs" / name).write_text(lines)
    assert run("--dtype", "float32", "--max-length", 9, data=tmp_path / "pairs")[0] == 0
    # 9 tokens: the longer text is cut
    states = plain_states(model_folder, "money refund agent person", second)
    assert states.shape[1] == 9 and manifest(tmp_path / "out")["pairs"] is True
    close(np.load(tmp_path / "out/dev.en.mean.npy")[:, 1], states.mean(1))


def test_float16_is_the_default_and_is_the_float32_file_rounded(unstopped, exact):
    for name in FINAL:
        half, whole = (np.load(folder / name) for folder in (unstopped, exact))
        if "labels" not in name:
            assert half.dtype == np.float16
        assert np.array_equal(half, whole.astype(half.dtype))


def test_bf16_products_come_close_to_float32(run, exact, tmp_path):
    run("--precision", "bf16", "--dtype", "float32")
    for pooling in POOLINGS:
        rough, whole = (
            np.load(folder / f"train.en.{pooling}.npy") for folder in (tmp_path / "out", exact)
        )
        assert 0 < np.abs(rough - whole).max() < 0.1


def test_the_manifest_says_what_the_files_are(exact, model_folder, data):
    assert finals(exact) == sorted([*FINAL, "manifest.json"]) and hidden_names(exact) == [".lock"]
    inputs = {}
    for stem, count in ROWS.items():
        inputs[f"{stem}.tsv"] = {"sha256": sha256(f"{data}/{stem}.tsv"), "rows": count}
    expected = {
        "format": 1,
        "complete": True,
        "model": model_folder,
        "revision": sha256(f"{model_folder}/model.safetensors"),
        "layers": [0, 1, 2, 3, 4, 5],
        "poolings": list(POOLINGS),
        "hidden_size": 36,
        "dtype": "float32",
        "precision": "float32",
        "max_length": 33,
        "labels": LABELS,
        "batch_size": 3,
        "pairs": False,
        "inputs": inputs,
    }
    found = manifest(exact)
    assert {key: found[key] for key in expected} == expected
    assert found["versions"]["torch"] == torch.__version__


# --- values that cannot be kept -------------------------------------------------------------------


def scaled_model(model_folder, folder, factor):
    """A copy of the toy model with the last block's first LayerNorm weight times `factor`."""
    shutil.copytree(model_folder, folder)
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.weight[0] *= factor
    model.save_pretrained(folder)
    return folder


def test_a_value_too_large_for_float16_names_the_flag_and_leaves_no_file(
    run, model_folder, tmp_path
):
    large = scaled_model(model_folder, tmp_path / "large", 1e6)
    words = "train.en.tsv: a hidden state of ", " does not fit float16: give --dtype float32"
    refused(run(model=large), *words)
    assert finals(tmp_path / "out") == ["manifest.json"]
    assert manifest(tmp_path / "out")["complete"] is False
    assert run("--dtype", "float32", "--overwrite", model=large)[0] == 0
    assert np.abs(np.load(tmp_path / "out/train.en.max.npy")).max() > np.finfo(np.float16).max


def test_states_that_are_not_finite_are_an_error(run, model_folder, tmp_path):
    broken = scaled_model(model_folder, tmp_path / "broken", float("inf"))
    words = "train.en.tsv: the encoder gives hidden states that are not finite"
    refused(run(model=broken), words)
    assert finals(tmp_path / "out") == ["manifest.json"]


# --- stopping and going on ------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [0, 2, 3, 10])
def test_a_stopped_run_goes_on_where_it_was(run, unstopped, tmp_path, monkeypatch, batches):
    with monkeypatch.context() as patch:
        stop_after(patch, batches)
        assert run()[0] == 130
    written = [name for name in finals(tmp_path / "out") if name.endswith("labels.npy")]
    # whole files alone have their final name
    assert len(written) == sum(batches >= done for done in (3, 5, 7, 9, 11))
    assert manifest(tmp_path / "out")["complete"] is False
    calls = stop_after(monkeypatch, 99)
    assert run()[0] == 0
    assert len(calls) == 11 - batches
    assert contents(tmp_path / "out") == contents(unstopped)


@pytest.mark.parametrize("moved", range(2 * len(POOLINGS) + 3))
def test_a_stop_while_a_files_parts_are_renamed_loses_nothing(
    run, unstopped, tmp_path, monkeypatch, moved
):
    replace, moves = os.replace, []

    def stopping(source, target):
        if "train.en." in Path(target).name:
            if len(moves) == moved:
                raise KeyboardInterrupt
            moves.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        # the files of zeros and the list of what is done; their final names, the labels
        assert run()[0] == (130 if moved < 2 * len(POOLINGS) + 2 else 0)
    assert run()[0] == 0
    assert contents(tmp_path / "out") == contents(unstopped)
    assert hidden_names(tmp_path / "out") == [".lock"]


def test_a_full_disk_is_one_sentence_before_any_row_is_computed(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    calls = stop_after(monkeypatch, 99)
    refused(run(), "No space left on device")
    assert calls == [] and finals(tmp_path / "out") == ["manifest.json"]


def test_another_model_or_other_data_over_the_same_folder_are_refused_by_name(
    run, unstopped, data, tmp_path
):
    refused(run(model=make_model(tmp_path / "other", seed=1), out=unstopped), "revision was ")
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data/dev.de.tsv"
    path.write_text(path.read_text().replace("bitte", "jetzt"))
    words = "settings: inputs.dev.de.tsv.sha256 was "
    refused(run(data=tmp_path / "data", out=unstopped), words)


def test_a_list_says_which_batches_are_done(run, unstopped, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run()[0] == 130
    done = np.load(tmp_path / "out/.train.en.part", mmap_mode="r+")
    assert done.tolist() == [1, 1, 0]
    done[:] = [0, 1, 0]  # as of two processes, of which the first was stopped in its first batch
    done.flush()
    calls = stop_after(monkeypatch, 99)
    assert run()[0] == 0 and len(calls) == 10
    assert contents(tmp_path / "out") == contents(unstopped)


# --- what is read ---------------------------------------------------------------------------------


def test_train_files_are_read_that_are_asked_for(run, data, tmp_path):
    world = shutil.copytree(data, tmp_path / "world")
    for language in ("zh_Hant", "pt-BR"):
        shutil.copy(world / "train.en.tsv", world / f"train.{language}.tsv")
    others = [stem for stem in ROWS if stem != "train.en"]
    for names in ["en"], ["zh_Hant", "pt-BR"]:
        asked = ["--train-languages", *names] if len(names) > 1 else []
        assert run("--overwrite", *asked, data=world)[0] == 0
        files = [f"{stem}.tsv" for stem in (*others, *(f"train.{name}" for name in names))]
        assert sorted(manifest(tmp_path / "out")["inputs"]) == sorted(files)
    (world / "train.en.tsv").unlink()
    refused(run(data=world), f"{world} has train files in pt-BR zh_Hant")


def test_bad_input_is_one_sentence_and_makes_no_folder(run, data, tmp_path):
    shutil.copytree(data, tmp_path / "bad")
    with open(tmp_path / "bad/dev.de.tsv", "a") as file:
        file.write("geld\tmoney\n")
    refused(run(data=tmp_path / "bad"), f"{tmp_path}/bad/dev.de.tsv, line 7: unknown label 'money'")
    refused(run(model=tmp_path / "nowhere"), f"'{tmp_path}/nowhere': no such folder")
    refused(run("--max-length", 65), "--max-length 65: expected 3 to 64, the positions")
    assert not (tmp_path / "out").exists()


def test_a_token_that_the_encoder_does_not_know_is_an_error(run, model_folder, data, tmp_path):
    model = shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    known = len(tokenizer)
    tokenizer.add_tokens(["bitt"])  # of the German "bitte"
    tokenizer.save_pretrained(model)
    refused(run(model=model), f"the tokenizer gives token {known}, the encoder knows {known}")
    names = finals(tmp_path / "out")
    assert "dev.en.max.npy" in names and "dev.de.max.npy" not in names
