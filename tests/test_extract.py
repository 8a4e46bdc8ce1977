"""extract.py against plain transformers states pooled by hand, one row at a time; files, stops."""

import csv
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_data, make_model
from transformers import AutoModel, AutoTokenizer

import extract
from lib.folders import sha256
from model import POOLINGS

ROWS = {"train.en": 13, "dev.en": 5, "dev.de": 5, "test.en": 7, "test.de": 7}
FAMILIES = ["bert", "xlm-roberta", "distilbert"]
LAYERS, HIDDEN = 4, 36
FINAL = sorted(f"{stem}.{kind}.npy" for stem in ROWS for kind in (*POOLINGS, "labels"))
FP32 = ("--precision", "fp32", "--batch-size", 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved encoder of three blocks of each family: {family: folder}."""
    return {
        family: make_model(tmp_path_factory.mktemp(family), family, blocks=LAYERS - 1)
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(
        tmp_path_factory.mktemp("data") / "toy", train=13, dev=5, test=7, languages=("en", "de")
    )


@pytest.fixture
def run(script, folders, data, tmp_path):
    """run("--flag", value, ...) extracts from the BERT encoder to tmp_path/out, or as told."""

    def call(*arguments, model=folders["bert"], data=data, out=tmp_path / "out"):
        flags = ["--model", model, "--data", data, "--out", out, "--max-length", 33]
        return script("extract", *flags, *arguments)

    return call


def refused(result, *phrases):
    """The one line that a run printed as it exited with status 2; it holds all `phrases`."""
    code, _, err = result
    message = err.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in err and message.startswith("extract.py: error: "), (
        result
    )
    for phrase in phrases:
        assert phrase in message, message
    return message


def finals(out):
    return sorted(path.name for path in Path(out).iterdir() if not path.name.startswith("."))


def hidden_names(out):
    return [path.name for path in Path(out).iterdir() if path.name.startswith(".")]


def contents(out):
    return {name: (Path(out) / name).read_bytes() for name in finals(out)}


def stop_after(monkeypatch, batches):
    """Let pool_all() work for so many batches, then raise. Returns the list of its calls."""
    calls, whole = [], extract.pool_all

    def pool_all(*arguments):
        if len(calls) == batches:
            raise KeyboardInterrupt
        calls.append(len(arguments[1]["labels"]))
        return whole(*arguments)

    monkeypatch.setattr(extract, "pool_all", pool_all)
    return calls


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_files_hold_the_states_of_plain_transformers_row_by_row(
    run, folders, data, tmp_path, family
):
    assert run("--dtype", "float32", *FP32, model=folders[family])[0] == 0
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folders[family]),
        AutoModel.from_pretrained(folders[family]).eval(),
    )
    names = Path(data, "labels.txt").read_text().split()
    for stem, count in ROWS.items():
        with open(Path(data, f"{stem}.tsv"), encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        arrays = {
            pooling: np.load(tmp_path / "out" / f"{stem}.{pooling}.npy") for pooling in POOLINGS
        }
        assert {(array.shape, array.dtype.str) for array in arrays.values()} == {
            ((LAYERS, count, HIDDEN), "<f4")
        }
        for i, row in enumerate(rows):
            inputs = tokenizer(row["text"], return_tensors="pt")
            if family == "distilbert":
                del inputs["token_type_ids"]
            with torch.no_grad():
                states = torch.stack(model(**inputs, output_hidden_states=True).hidden_states)[
                    :, 0
                ].numpy()  # (L, T, D)
            for pooling, expected in {
                "max": states.max(1),
                "mean": states.mean(1),
                "cls": states[:, 0],
            }.items():
                np.testing.assert_allclose(
                    arrays[pooling][:, i],
                    expected,
                    rtol=0,
                    atol=1e-5,
                    err_msg=f"{stem} {pooling} {i}",
                )
        labels = np.load(tmp_path / "out" / f"{stem}.labels.npy")
        assert labels.dtype == np.int64 and labels.tolist() == [
            names.index(row["label"]) for row in rows
        ]


def test_pairs_are_read_as_pairs_and_cut_to_the_length(run, folders, tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/labels.txt").write_text("yes\nno\n")
    first, second = "money refund agent person parcel late cancel", "order please"
    lines = ["text_a\ttext_b\tlabel", f"{second}\t{second}\tno", f"{first}\t{second}\tyes", ""]
    (tmp_path / "pairs/dev.en.tsv").write_text("\n".join(lines))
    shutil.copy(tmp_path / "pairs/dev.en.tsv", tmp_path / "pairs/train.en.tsv")
    assert run("--dtype", "float32", *FP32, "--max-length", 9, data=tmp_path / "pairs")[0] == 0
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folders["bert"]),
        AutoModel.from_pretrained(folders["bert"]).eval(),
    )
    with torch.no_grad():
        inputs = tokenizer(
            "money refund agent person", second, return_tensors="pt"
        )  # 9 tokens: the longer text is cut
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert inputs["token_type_ids"].tolist() == [[0] * 6 + [1] * 3]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["pairs"] is True
    mean = np.load(tmp_path / "out/dev.en.mean.npy")
    np.testing.assert_allclose(
        mean[:, 1], torch.stack(states)[:, 0].mean(1).numpy(), rtol=0, atol=1e-5
    )


def test_float16_is_the_default_and_is_the_float32_file_rounded(run, tmp_path):
    run(*FP32)
    run("--dtype", "float32", *FP32, out=tmp_path / "exact")
    for stem in ROWS:
        for pooling in POOLINGS:
            half, exact = (
                np.load(tmp_path / folder / f"{stem}.{pooling}.npy") for folder in ("out", "exact")
            )
            assert half.dtype == np.float16 and np.array_equal(half, exact.astype(np.float16))


def test_bf16_products_come_close_to_float32(run, tmp_path):
    run("--precision", "bf16", "--dtype", "float32")
    run(*FP32, "--dtype", "float32", out=tmp_path / "exact")
    for pooling in POOLINGS:
        rough, exact = (
            np.load(tmp_path / folder / f"train.en.{pooling}.npy") for folder in ("out", "exact")
        )
        assert 0 < np.abs(rough - exact).max() < 0.1


def test_the_manifest_says_what_the_files_are(run, folders, data, tmp_path):
    code, out, _ = run("--dtype", "float32", *FP32, "--max-length", 17)
    assert (
        code == 0
        and f"37 rows in 5 files -> 4 layers x {len(POOLINGS)} poolings x 36, float32" in out
    )
    assert finals(tmp_path / "out") == sorted([*FINAL, "manifest.json"])
    assert hidden_names(tmp_path / "out") == [".lock"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    expected = {
        "format": 1,
        "complete": True,
        "model": folders["bert"],
        "revision": sha256(f"{folders['bert']}/model.safetensors"),
        "layers": [0, 1, 2, 3],
        "poolings": list(POOLINGS),
        "hidden_size": 36,
        "dtype": "float32",
        "precision": "float32",
        "max_length": 17,
        "labels": ["refund", "agent", "delivery", "cancel"],
        "batch_size": 3,
        "pairs": False,
        "inputs": {
            f"{stem}.tsv": {"sha256": sha256(f"{data}/{stem}.tsv"), "rows": count}
            for stem, count in ROWS.items()
        },
    }
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["versions"]["torch"] == torch.__version__


def test_the_batch_size_moves_no_row(run, tmp_path):
    for size in (1, 64):
        run(
            "--dtype",
            "float32",
            "--precision",
            "fp32",
            "--batch-size",
            size,
            out=tmp_path / str(size),
        )
    for name in FINAL:
        np.testing.assert_allclose(
            np.load(tmp_path / "1" / name), np.load(tmp_path / "64" / name), rtol=0, atol=1e-5
        )


# --- values that cannot be kept -------------------------------------------------------------------


def scaled_model(folders, folder, factor):
    """A copy of the BERT encoder with the last block's LayerNorm weights times `factor`."""
    shutil.copytree(folders["bert"], folder)
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.weight *= factor
    model.save_pretrained(folder)
    return folder


def test_a_value_too_large_for_float16_names_the_flag_and_leaves_no_file(
    run, folders, data, tmp_path
):
    large = scaled_model(folders, tmp_path / "large", 1e6)
    refused(
        run(*FP32, model=large),
        "train.en.tsv: a hidden state of ",
        " does not fit float16: give --dtype float32",
    )
    assert finals(tmp_path / "out") == ["manifest.json"]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["complete"] is False
    assert run(*FP32, "--dtype", "float32", "--overwrite", model=large)[0] == 0
    assert np.abs(np.load(tmp_path / "out/train.en.max.npy")).max() > np.finfo(np.float16).max


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_states_that_are_not_finite_are_an_error(run, folders, tmp_path, dtype):
    refused(
        run(
            *FP32, "--dtype", dtype, model=scaled_model(folders, tmp_path / "broken", float("inf"))
        ),
        "train.en.tsv: the encoder gives hidden states that are not finite",
    )
    assert finals(tmp_path / "out") == ["manifest.json"]


# --- stopping and going on ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unstopped(folders, data, tmp_path_factory):
    """A feature folder made in one go, by batches of 72 tokens: 3 + 2 + 2 + 2 + 2 of them."""
    out = tmp_path_factory.mktemp("features") / "unstopped"
    flags = ["--model", folders["bert"], "--data", data, "--out", out, "--max-length", 33, *FP32]
    assert extract.main([*map(str, flags)]) == 0
    return out


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 5, 10])
def test_a_stopped_run_goes_on_where_it_was(run, unstopped, tmp_path, monkeypatch, batches):
    with monkeypatch.context() as patch:
        stop_after(patch, batches)
        assert run(*FP32)[0] == 130
    written = [name for name in finals(tmp_path / "out") if name.endswith("labels.npy")]
    assert len(written) == sum(
        batches >= done for done in (3, 5, 7, 9, 11)
    )  # whole files alone have their final name
    assert json.loads((tmp_path / "out/manifest.json").read_text())["complete"] is False
    calls = stop_after(monkeypatch, 99)
    assert run(*FP32)[0] == 0
    assert len(calls) == 11 - batches
    assert contents(tmp_path / "out") == contents(unstopped)


@pytest.mark.parametrize("moved", range(2 * len(POOLINGS) + 4))
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
        # the files of zeros and the list of what is done; their final names, the labels, the mark
        assert run(*FP32)[0] == (130 if moved < 2 * len(POOLINGS) + 3 else 0)
    assert run(*FP32)[0] == 0
    assert contents(tmp_path / "out") == contents(unstopped)
    assert hidden_names(tmp_path / "out") == [".lock"]


def test_a_full_disk_is_one_sentence_before_any_row_is_computed(
    run, unstopped, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        calls = stop_after(patch, 99)
        refused(run(*FP32), "No space left on device")
    assert calls == [] and finals(tmp_path / "out") == ["manifest.json"]
    assert run(*FP32)[0] == 0 and contents(tmp_path / "out") == contents(unstopped)


def test_a_complete_folder_is_left_alone(run, unstopped, monkeypatch):
    before = {
        path.name: path.stat().st_mtime_ns for path in unstopped.iterdir() if path.name != ".lock"
    }
    calls = stop_after(monkeypatch, 99)
    code, out, _ = run(*FP32, out=unstopped)
    assert (code, calls) == (0, []) and f"{unstopped} is complete already: nothing to do" in out
    assert {
        path.name: path.stat().st_mtime_ns for path in unstopped.iterdir() if path.name != ".lock"
    } == before


def test_another_model_or_other_data_over_the_same_folder_are_refused_by_name(
    run, folders, unstopped, data, tmp_path
):
    other = make_model(tmp_path / "other", blocks=LAYERS - 1, seed=1)
    assert "model was" not in refused(run(*FP32, model=other, out=unstopped), "revision was ")
    shutil.copytree(data, tmp_path / "changed")
    path = tmp_path / "changed/dev.de.tsv"
    path.write_text(path.read_text().replace("bitte", "jetzt"))
    changed = run(*FP32, data=tmp_path / "changed", out=unstopped)
    message = refused(changed, "inputs.dev.de.tsv.sha256 was ", "--overwrite")
    assert "dev.en" not in message
    (tmp_path / "changed/test.de.tsv").unlink()
    refused(run(*FP32, data=tmp_path / "changed", out=unstopped), "inputs.test.de.tsv")
    assert run(*FP32, data=tmp_path / "changed", model=other, out=tmp_path / "copy")[0] == 0


def test_a_list_says_which_batches_are_done(run, unstopped, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(*FP32)[0] == 130
    (path,) = (
        path for path in (tmp_path / "out").glob(".train.en.*.part") if path.name.count(".") == 4
    )
    done = np.load(path, mmap_mode="r+")
    assert done.tolist() == [1, 1, 0]
    done[:] = [0, 1, 0]  # as of two processes, of which the first was stopped in its first batch
    done.flush()
    assert len(calls := stop_after(monkeypatch, 99)) == 0 and run(*FP32)[0] == 0
    assert len(calls) == 10 and contents(tmp_path / "out") == contents(unstopped)


def test_files_of_another_extraction_are_not_taken_for_this_ones(
    run, unstopped, tmp_path, monkeypatch
):
    """A folder that was stopped, copied over that of another model, which had come further."""
    other = make_model(tmp_path / "other", blocks=LAYERS - 1, seed=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert run(*FP32, model=other)[0] == 130
    assert "dev.en.labels.npy" in finals(tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert run(*FP32, out=tmp_path / "copied")[0] == 130
    shutil.copytree(tmp_path / "copied", tmp_path / "out", dirs_exist_ok=True)
    assert run(*FP32)[0] == 0 and contents(tmp_path / "out") == contents(unstopped)
    assert hidden_names(tmp_path / "out") == [".lock"]


# --- the source language --------------------------------------------------------------------------


def test_train_files_are_read_that_are_asked_for(run, data, tmp_path):
    def stems():
        return {
            name.split(".labels")[0]
            for name in finals(tmp_path / "out")
            if name.endswith("labels.npy")
        }

    world = tmp_path / "world"
    shutil.copytree(data, world)
    for language in ("de", "zh_Hant", "pt-BR"):
        shutil.copy(world / "train.en.tsv", world / f"train.{language}.tsv")
    shutil.copy(world / "dev.de.tsv", world / "dev.zh_Hant.tsv")
    others = {"dev.en", "dev.de", "dev.zh_Hant", "test.en", "test.de"}
    assert run(*FP32, data=world)[0] == 0 and stems() == {"train.en", *others}
    two = run(*FP32, "--train-languages", "zh_Hant", "pt-BR", "--overwrite", data=world)
    assert two[0] == 0 and stems() == {"train.zh_Hant", "train.pt-BR", *others}
    (world / "train.en.tsv").unlink()
    refused(run(data=world, out=tmp_path / "new"), f"{world} has train files in de pt-BR zh_Hant")
    for language in ("de", "pt-BR"):
        (world / f"train.{language}.tsv").unlink()
    assert run(*FP32, "--overwrite", data=world)[0] == 0
    assert stems() == {"train.zh_Hant", *others}  # the only one


# --- a pooling more -------------------------------------------------------------------------------


def test_a_pooling_that_is_added_to_the_dict_works_in_both_phases(
    run, script, folders, data, tmp_path, monkeypatch
):
    monkeypatch.setitem(
        POOLINGS, "least", lambda states, tokens: states.masked_fill(~tokens, torch.inf).amin(dim=1)
    )
    assert run("--dtype", "float32", *FP32)[0] == 0
    features = np.load(tmp_path / "out/dev.de.least.npy")  # (L, N, D)
    tokenizer = AutoTokenizer.from_pretrained(folders["bert"])
    with open(Path(data, "dev.de.tsv"), encoding="utf-8") as file:
        inputs = tokenizer(file.readlines()[1].split("\t")[0], return_tensors="pt")
    with torch.no_grad():
        output = AutoModel.from_pretrained(folders["bert"])(**inputs, output_hidden_states=True)
    states = torch.stack(output.hidden_states)[:, 0]  # (L, T, D)
    np.testing.assert_allclose(features[:, 0], states.amin(1), rtol=0, atol=1e-5)

    search = ["--features", tmp_path / "out", "--out", tmp_path / "grid", "--layers", 1, 3]
    search += ["--seeds", 1, "--epochs", 1, "--lr", 0.1, "--poolings", "least"]
    code, out, _ = script("grid_search", *search)
    assert code == 0 and "x 1 poolings" in out and "mean: least" in out
    best = tmp_path / "grid/best.json"
    tune = ["--model", folders["bert"], "--data", data, "--out", tmp_path / "run", "--epochs", 1]
    tune += ["--layers-from", best, "--precision", "fp32", "--max-length", 33]
    assert script("train", *tune)[0] == 0
    saved = json.loads((tmp_path / "run/epochs/1/classifier.json").read_text())
    assert (saved["pooling"], saved["layers"]) == ("least", json.loads(best.read_text())["layers"])
    monkeypatch.delitem(POOLINGS, "least")
    code, _, err = script("grid_search", *search)
    assert code == 2 and "invalid choice: 'least'" in err


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence_and_makes_no_folder(run, data, tmp_path):
    shutil.copytree(data, tmp_path / "bad")
    with open(tmp_path / "bad/dev.de.tsv", "a") as file:
        file.write("geld\tmoney\n")
    refused(run(data=tmp_path / "bad"), f"{tmp_path}/bad/dev.de.tsv, line 7: unknown label 'money'")
    refused(run(model=tmp_path / "nowhere"), f"{tmp_path / 'nowhere'}: no such folder")
    refused(run("--max-length", 65), "--max-length 65: expected 3 to 64, the positions")
    assert not (tmp_path / "out").exists()


def test_a_token_that_the_encoder_does_not_know_is_an_error(run, folders, data, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    known = len(tokenizer)
    tokenizer.add_tokens(["xxurlxx"])
    tokenizer.save_pretrained(tmp_path / "model")
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data/dev.de.tsv"
    path.write_text(path.read_text().replace("bitte", "xxurlxx", 1))
    refused(
        run(model=tmp_path / "model", data=tmp_path / "data"),
        f"the tokenizer gives token {known}, the encoder knows {known}",
    )
    assert "dev.de.max.npy" not in finals(tmp_path / "out") and "dev.en.max.npy" in finals(
        tmp_path / "out"
    )
