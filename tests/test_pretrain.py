"""sample/pretrain.py: its batches and masks by hand, and that it learns and repeats itself."""

import json
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, make_tokenizer, toy_rows
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(ROOT / "sample"))

import pretrain

from data import Rows, encode

LANGUAGES = list(WORDS)


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """A data set folder whose train files are row-parallel in three languages, and a vocabulary."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "labels.txt").write_text("refund\nagent\ndelivery\ncancel\n")
    for language in LANGUAGES:
        lines = [
            f"{text}\t{['refund', 'agent', 'delivery', 'cancel'][label]}\n"
            for text, label in toy_rows(language, 41, 0)
        ]
        (folder / f"train.{language}.tsv").write_text(
            "text\tlabel\n" + "".join(lines), encoding="utf-8"
        )
    words = dict.fromkeys(word for rows in WORDS.values() for word in rows)
    letters = sorted({letter for word in words for letter in word})
    (folder / "vocab.txt").write_text(
        "\n".join(
            pretrain.SPECIAL
            + list(words)
            + [l for l in letters if l not in words]
            + [f"##{l}" for l in letters]
        )
        + "\n",
        encoding="utf-8",
    )
    return folder


def run(parallel, out, *more):
    return pretrain.main(
        [
            "--data",
            str(parallel),
            "--vocab",
            str(parallel / "vocab.txt"),
            "--out",
            str(out),
            "--hidden-size",
            "20",
            "--heads",
            "2",
            "--blocks",
            "3",
            "--tokens",
            "192",
            "--max-length",
            "48",
            *map(str, more),
        ]
    )


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        encode(tokenizer, Rows([text for text, _ in toy_rows(language, 23, 0)], None, [0] * 23), 48)
        for language in LANGUAGES
    ]


def test_a_pair_is_a_row_and_its_translation(encoded):
    rows = [
        [part.ids[part.starts[i] : part.starts[i + 1]].tolist() for i in range(23)]
        for part in encoded
    ]
    pairs = 0
    for ids, second in islice(pretrain.examples(encoded, np.random.default_rng(0), 0.5), 200):
        first, other = ids[:second].tolist(), ids[second:].tolist()
        a = [
            (language, i) for language in range(3) for i in range(23) if rows[language][i] == first
        ]
        assert a
        if other:
            pairs += 1
            b = [
                (language, i)
                for language in range(3)
                for i in range(23)
                if rows[language][i][1:] == other
            ]
            assert any(i == j and x != y for x, i in a for y, j in b)
    assert 60 < pairs < 140


def test_batches_have_one_shape_a_width_and_lose_no_token(encoded):
    stream = pretrain.examples(encoded, np.random.default_rng(0), 0.5)
    shapes = set()
    for ids, second in islice(
        pretrain.batches(stream, np.random.default_rng(1), 256, 48, pool=50), 30
    ):
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
    real = (ids >= 5).sum()
    assert len(positions) % 32 == 0 and len(positions) == int(0.2 * real) // 32 * 32 == len(
        set(positions)
    )
    assert (targets == ids.reshape(-1)[positions]).all() and (
        targets >= 5
    ).all()  # no special token, no padding
    untouched = np.setdiff1d(np.arange(ids.size), positions)
    assert (changed.reshape(-1)[untouched] == ids.reshape(-1)[untouched]).all()
    new = changed.reshape(-1)[positions]
    assert abs((new == 4).mean() - 0.8) < 0.06 and 0.06 < (new == targets).mean() < 0.16
    assert ((new == 4) | (new >= 5)).all()


def test_the_same_command_gives_the_same_weights_and_another_seed_others(parallel, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        assert run(parallel, tmp_path / name, "--steps", 6, "--seed", seed) == 0
    one, two, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other")
    )
    assert one == two != other
    note = json.loads((tmp_path / "one/pretrain.json").read_text())
    assert (
        "--steps 6" in note["command"]
        and note["languages"] == ["en", "de", "zh"]
        and note["rows"] == 41
    )


def test_the_model_is_one_that_every_script_reads(parallel, tmp_path):
    run(parallel, tmp_path / "model", "--steps", 2)
    model, tokenizer = (
        AutoModel.from_pretrained(tmp_path / "model"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    assert model.config.num_hidden_layers == 3 and model.config.hidden_dropout_prob == 0.1
    assert tokenizer.tokenize("MÓNEY Später") == [
        "money",
        "s",
        "##p",
        "##a",
        "##t",
        "##e",
        "##r",
    ]  # lower case, no accents
    assert next(model.parameters()).dtype == torch.float16  # on disk


def test_it_learns_to_fill_in_masks(parallel, tmp_path):
    losses = []
    for steps in (2, 150):
        run(parallel, tmp_path / str(steps), "--steps", steps, "--lr", "3e-3")
        losses.append(json.loads((tmp_path / str(steps) / "pretrain.json").read_text())["loss"])
    assert losses[1] < 0.85 * losses[0]


def test_a_vocabulary_is_trained_where_there_is_none(parallel, tmp_path):
    pretrain.main(
        [
            "--data",
            str(parallel),
            "--vocab",
            str(tmp_path / "new/vocab.txt"),
            "--vocab-size",
            "120",
            "--out",
            str(tmp_path / "m"),
            "--hidden-size",
            "20",
            "--heads",
            "2",
            "--blocks",
            "2",
            "--steps",
            "2",
            "--tokens",
            "192",
        ]
    )
    pieces = (tmp_path / "new/vocab.txt").read_text(encoding="utf-8").splitlines()
    assert pieces[:5] == pretrain.SPECIAL and len(pieces) == len(set(pieces)) <= 120


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--heads 5", "--heads 5: does not divide --hidden-size 96"),
        ("--steps 0", "--steps: 0, expected 1 or more"),
        ("--pairs 1.5", "--pairs 1.5"),
        ("--mask-rate 0", "--mask-rate: 0, expected more than 0 and less than 1"),
        ("--lr 0", "--lr: 0, expected more than 0"),
    ],
)
def test_bad_flags(flags, message, script, tmp_path):
    status, _, error = script(
        "pretrain", "--data", "d", "--vocab", "v", "--out", tmp_path / "out", *flags.split()
    )
    assert status == 2 and message in error and not (tmp_path / "out").exists()


def test_files_that_are_not_parallel_are_refused(parallel, tmp_path, script):
    for language in LANGUAGES:
        text = (parallel / f"train.{language}.tsv").read_text(encoding="utf-8")
        (tmp_path / f"train.{language}.tsv").write_text(
            text if language != "zh" else text + "钱\trefund\n", encoding="utf-8"
        )
    (tmp_path / "labels.txt").write_text((parallel / "labels.txt").read_text())
    status, _, error = script(
        "pretrain", "--data", tmp_path, "--vocab", parallel / "vocab.txt", "--out", tmp_path / "out"
    )
    assert status == 2 and "the train files are not row-parallel" in error
    (tmp_path / "train.zh.tsv").unlink(), (tmp_path / "train.de.tsv").unlink()
    status, _, error = script(
        "pretrain", "--data", tmp_path, "--vocab", parallel / "vocab.txt", "--out", tmp_path / "out"
    )
    assert status == 2 and "has train in en: two or more are needed" in error
