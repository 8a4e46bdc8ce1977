"""sample/pretrain.py: its batches and masks by hand, and that it learns and repeats itself."""

import json
import shutil
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import LABELS, ROOT, WORDS, toy_rows
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(ROOT / "sample"))

import pretrain

from data import Rows, encode

SMALL = "--hidden-size 20 --heads 2 --blocks 3 --tokens 192 --max-length 48"


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """A data set folder whose train files are row-parallel in three languages, and a vocabulary."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    for language in WORDS:
        rows = [f"{text}\t{LABELS[label]}\n" for text, label in toy_rows(language, 41, 0)]
        text = "text\tlabel\n" + "".join(rows)
        (folder / f"train.{language}.tsv").write_text(text, encoding="utf-8")
    words = [word for rows in WORDS.values() for word in rows]
    letters = sorted(set("".join(words)))
    pieces = dict.fromkeys([*pretrain.SPECIAL, *words, *letters, *(f"##{l}" for l in letters)])
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return folder


def run(parallel, out, flags, vocabulary=None):
    paths = ["--data", parallel, "--vocab", vocabulary or parallel / "vocab.txt", "--out", out]
    assert pretrain.main([*map(str, paths), *SMALL.split(), *flags.split()]) == 0
    return json.loads((out / "pretrain.json").read_text())


@pytest.fixture(scope="module")
def encoded(model_folder):
    tokenizer, parts = AutoTokenizer.from_pretrained(model_folder), []
    for language in WORDS:
        texts = [text for text, _ in toy_rows(language, 23, 0)]
        parts.append(encode(tokenizer, Rows(texts), 48))
    return parts


def test_a_pair_is_a_row_and_its_translation(encoded):
    places, pairs = {}, 0  # {token ids: where they stand}
    for language, part in enumerate(encoded):
        for i in range(23):
            ids = tuple(part.ids[part.starts[i] : part.starts[i + 1]])
            places.setdefault(ids, []).append((language, i))
            places.setdefault(ids[1:], []).append((language, i))
    for ids, second in islice(pretrain.examples(encoded, np.random.default_rng(0), 0.5), 200):
        first = places[tuple(ids[:second])]
        if second < len(ids):
            pairs += 1
            translations = places[tuple(ids[second:])]
            assert any(i == j and x != y for x, i in first for y, j in translations)
    assert 60 < pairs < 140


def test_batches_have_one_shape_a_width_and_lose_no_token(encoded):
    stream = pretrain.examples(encoded, np.random.default_rng(0), 0.5)
    stream, shapes = pretrain.batches(stream, np.random.default_rng(1), 256, 48, pool=50), set()
    for ids, second in islice(stream, 30):
        assert ids.shape[1] % 8 == 0 and len(second) == len(ids) == 256 // ids.shape[1]
        lengths = (ids > 0).sum(1)
        assert (ids.shape[1] - lengths < 8).all() and (second <= lengths).all()
        shapes.add(ids.shape)
    assert len(shapes) == len({width for _, width in shapes})


def test_masking_is_berts():
    random = np.random.default_rng(0)
    ids = random.integers(5, 90, size=(100, 40))
    ids[:, 0], ids[:, -1], ids[:50, 20:] = 2, 3, 0
    changed, positions, targets = pretrain.mask_tokens(ids, random, 90, 0.2, 4)
    count = int(0.2 * (ids >= 5).sum()) // 32 * 32
    assert len(positions) == len(set(positions)) == count
    # no special token, no padding
    assert (targets == ids.reshape(-1)[positions]).all() and (targets >= 5).all()
    untouched = np.setdiff1d(np.arange(ids.size), positions)
    assert (changed.reshape(-1)[untouched] == ids.reshape(-1)[untouched]).all()
    new = changed.reshape(-1)[positions]
    assert abs((new == 4).mean() - 0.8) < 0.06 and 0.06 < (new == targets).mean() < 0.16
    assert ((new == 4) | (new >= 5)).all()


def test_the_same_command_gives_the_same_weights_and_another_seed_others(parallel, tmp_path):
    weights = []
    for i, seed in enumerate((0, 0, 1)):
        note = run(parallel, tmp_path / str(i), f"--steps 6 --seed {seed}")
        weights.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert "--steps 6" in note["command"] and note["languages"] == list(WORDS)
    assert note["rows"] == 41


def test_the_model_is_one_that_every_script_reads(parallel, tmp_path):
    run(parallel, tmp_path, "--steps 2")
    model, tokenizer = (kind.from_pretrained(tmp_path) for kind in (AutoModel, AutoTokenizer))
    assert model.config.num_hidden_layers == 3 and model.config.hidden_dropout_prob == 0.1
    pieces = tokenizer.tokenize("MÓNEY Später")  # lower case, no accents
    assert pieces == ["money", "s", *(f"##{letter}" for letter in "pater")]
    assert next(model.parameters()).dtype == torch.float16  # on disk


def test_it_learns_to_fill_in_masks(parallel, tmp_path):
    before, after = (run(parallel, tmp_path, f"--steps {n} --lr 3e-3")["loss"] for n in (2, 100))
    assert after < 0.9 * before


def test_a_vocabulary_is_trained_where_there_is_none(parallel, tmp_path):
    path = tmp_path / "new/vocab.txt"
    run(parallel, tmp_path / "m", "--vocab-size 120 --steps 2", path)
    pieces = path.read_text(encoding="utf-8").splitlines()
    assert pieces[:5] == pretrain.SPECIAL and len(pieces) == len(set(pieces)) <= 120


def test_heads_that_do_not_divide_the_hidden_size(script):
    status, _, error = script("pretrain", *"--data d --vocab v --out o --heads 5".split())
    assert status == 2 and "--heads 5: does not divide --hidden-size 96" in error


def test_files_that_are_not_parallel_are_refused(parallel, tmp_path, script):
    data = shutil.copytree(parallel, tmp_path / "data")
    with open(data / "train.zh.tsv", "a", encoding="utf-8") as file:
        file.write("钱\trefund\n")
    command = "pretrain", "--data", data, "--vocab", data / "vocab.txt", "--out", tmp_path / "out"
    status, _, error = script(*command)
    assert status == 2 and "the train files are not row-parallel" in error
    for language in ("zh", "de"):
        (data / f"train.{language}.tsv").unlink()
    status, _, error = script(*command)
    assert status == 2 and "has train in en: two or more are needed" in error
