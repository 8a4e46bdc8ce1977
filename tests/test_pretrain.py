"""sample/pretrain.py: its masks by hand, and that it learns and repeats itself."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, make_data, refused
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(ROOT / "sample"))

import pretrain

SMALL = "--split dev --hidden-size 20 --heads 2 --blocks 3 --tokens 192 --max-length 48"


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """A data set folder whose dev files are row-parallel in three languages."""
    return Path(make_data(tmp_path_factory.mktemp("parallel"), dev=41))


def command(data, out):
    return ["--data", str(data), "--vocab", str(data / "vocab.txt"), "--out", str(out)]


def run(data, out, flags):
    """The first call trains the vocabulary."""
    flags = [*command(data, out), *SMALL.split(), *flags.split(), "--vocab-size", "120"]
    assert pretrain.main(flags) == 0
    return json.loads((out / "pretrain.json").read_text())


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


def test_it_learns_and_the_model_is_one_that_every_script_reads(parallel, tmp_path):
    before, after = (run(parallel, tmp_path, f"--steps {n} --lr 3e-3")["loss"] for n in (2, 100))
    assert after < 0.9 * before
    model, tokenizer = (kind.from_pretrained(tmp_path) for kind in (AutoModel, AutoTokenizer))
    assert model.config.num_hidden_layers == 3 and model.config.hidden_dropout_prob == 0.1
    assert next(model.parameters()).dtype == torch.float16  # on disk
    # lower case, no accents
    assert tokenizer.tokenize("MÓNEY Später") == tokenizer.tokenize("money spater")
    pieces = (parallel / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert pieces[:5] == pretrain.SPECIAL and len(pieces) == len(set(pieces)) <= 120


def test_what_cannot_be_trained_on_is_one_sentence(tmp_path, script):
    data = Path(make_data(tmp_path / "data"))

    call = ["pretrain", *command(data, tmp_path / "out")]
    refused(script(*call, "--heads", 5), "--heads 5: does not divide --hidden-size 96")
    refused(script(*call), "has train in en: two or more are needed")
    with open(data / "dev.zh.tsv", "a", encoding="utf-8") as file:
        file.write("钱\trefund\n")
    refused(script(*call, "--split", "dev"), "the dev files are not row-parallel")
