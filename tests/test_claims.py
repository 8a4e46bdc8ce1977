"""claims.py: the verdict's rules by hand, and the whole on a toy encoder of 12 blocks."""

import json
import shutil

import numpy as np
import pytest
from conftest import make_data, make_model

import train
from experiments import claims
from model import POOLINGS


@pytest.mark.parametrize(
    "low, high, by_seed, way, expected",
    [
        (0.01, 0.05, [0.02, 0.04], "better", "supported"),
        (0.01, 0.05, [0.07, -0.01], "better", "undecided"),  # a seed disagrees
        (-0.01, 0.05, [0.02, 0.02], "better", "undecided"),
        (-0.05, -0.01, [-0.02, -0.04], "better", "not supported"),
        (-0.05, -0.01, [-0.07, 0.01], "better", "undecided"),
        (-0.02, 0.009, [0.0, 0.001], "no gain", "supported"),
        (-0.02, 0.011, [0.0, 0.001], "no gain", "undecided"),
        (0.002, 0.03, [0.01, 0.02], "no gain", "not supported"),
        (0.002, 0.03, [-0.01, 0.04], "no gain", "undecided"),
    ],
)
def test_verdict(low, high, by_seed, way, expected):
    assert claims.verdict(low, high, by_seed, way) == expected


def test_a_comparison_averages_languages_and_pairs_seeds():
    random = np.random.default_rng(0)
    a, b = (random.integers(2, size=(2, 40, 3)).astype(float) for _ in range(2))
    found = claims.compare(a, b, np.arange(40), 1, 200)
    assert found["source"]["difference"] == pytest.approx((a - b)[:, :, 1].mean())
    assert found["others"]["difference"] == pytest.approx((a - b)[:, :, [0, 2]].mean())
    assert found["others"]["by_seed"] == pytest.approx((a - b)[:, :, [0, 2]].mean((1, 2)))
    assert found["others"]["low"] <= found["others"]["difference"] <= found["others"]["high"]


@pytest.fixture
def german(tmp_path):
    """The toy world with German as the only train language."""
    folder = make_data(tmp_path / "german", train=24, dev=5)
    shutil.move(f"{folder}/train.en.tsv", f"{folder}/train.de.tsv")
    return folder


def test_all_conclusions_are_tested_and_a_second_call_trains_nothing(
    german, tmp_path, script, monkeypatch
):
    model, out = make_model(tmp_path / "model", blocks=12), tmp_path / "claims"
    flags = (
        "experiments.claims",
        "--model",
        model,
        "--data",
        german,
        "--out",
        out,
        "--seeds",
        2,
        "--epochs",
        1,
        "--freeze-epoch",
        0,
        "--hidden",
        7,
        "--resamples",
        200,
        "--max-length",
        32,
        "--lr",
        "1e-3",
        "--precision",
        "fp32",
        "--controls",
    )
    status, _, error = script(*flags)
    assert status == 0, error
    written, text = json.loads((out / "claims.json").read_text()), (out / "claims.md").read_text()
    rows = written["conclusions"]
    assert (
        written["train_language"] == "de"
        and written["others"] == ["en", "zh"]
        and "other languages |" in text
    )
    assert {row["number"] for row in rows} == {*range(1, 9), ""} and all(
        row["claim"] in text for row in rows
    )
    for row in rows:
        control = row["claim"].startswith("control: ")
        assert row["verdict"] in (
            {"better", "worse", "undecided"}
            if control
            else {"supported", "not supported", "undecided"}
        )
    means = {(row["number"], row["a"], row["b"]) for row in rows if "@mean" in row["a"] + row["b"]}
    assert means == {
        (1, "mc-bert@mean", "mc-bert"),
        (1, "mc-bert-long@mean", "mc-bert-long"),
        (6, "mc-bert-wf", "mc-bert@mean"),
    }
    reached = {row["name"]: row for row in written["systems"]}
    assert set(reached) == {name for row in rows for name in (row["a"], row["b"])}
    for name, epoch in (("mc-bert-long@half", 1), ("mc-bert-long", 2)):
        folders = [out / f"runs/mc-bert-long-seed{seed}/predictions/{epoch}" for seed in (0, 1)]
        accuracy = {
            language: np.mean(
                [
                    np.load(folder / f"test.{language}.npy").argmax(1) == classes(german, language)
                    for folder in folders
                ]
            )
            for language in ("de", "en", "zh")
        }
        assert reached[name]["source"] == pytest.approx(accuracy["de"])
        assert reached[name]["others"] == pytest.approx((accuracy["en"] + accuracy["zh"]) / 2)
    metrics = [
        [json.loads(line) for line in open(out / f"runs/mc-bert-long-seed{seed}/metrics.jsonl")]
        for seed in (0, 1)
    ]
    assert reached["mc-bert-long"]["train"] == pytest.approx(
        np.mean(
            [
                next(
                    row["accuracy"] for row in run if row["split"] == "train" and row["epoch"] == 2
                )
                for run in metrics
            ]
        )
    )
    assert reached["mc-bert-long@half"]["train"] is None
    assert f"{100 * reached['mc-bert-long']['others']:.1f}" in text.split("Accuracies")[1]
    names = {path.name for path in (out / "runs").iterdir()}
    expected = {
        *claims.systems(12, [6], "max", [9], "0", 7, 1),
        *claims.controls(12, [6], "max", [9], "0", 1, 0),
    }
    assert names == {f"{name}-seed{seed}" for name in expected for seed in (0, 1)}

    def arguments(name):
        return json.loads((out / f"runs/{name}/run.json").read_text())["arguments"]

    long = arguments("mc-bert-long-seed0")
    assert (long["epochs"], long["schedule"], long["keep_all"]) == (2, "constant", True)
    for name, layers in (
        ("last-layer", [12]),
        ("middle-layer", [8]),
        ("upper-layers", [*range(5, 13)]),
        ("mc-bert", [6, 8, 11]),
    ):
        assert arguments(f"{name}-seed0")["layers"] == layers
    assert arguments("mc-bert-mix-seed1")["combine"] == "mix"
    row = next(
        row for row in rows if row["a"] == "mc-bert-long@half"
    )  # its first epoch against its second
    for seed in (0, 1):
        first, second = (
            [
                np.load(
                    out / f"runs/mc-bert-long-seed{seed}/predictions/{epoch}/test.{other}.npy"
                ).argmax(1)
                == classes(german, other)
                for other in ("en", "zh")
            ]
            for epoch in (1, 2)
        )
        assert row["others"]["by_seed"][seed] == pytest.approx(np.mean(first) - np.mean(second))

    def no_training(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "learning_rate", no_training)
    status, again, _ = script(*flags)
    assert status == 0 and again.count("is complete already") == 2 * len(expected)
    assert json.loads((out / "claims.json").read_text()) == written
    status, _, error = script(*flags, "--dropout", 0.3)
    assert status == 2 and "dropout was 0.1, is now 0.3" in error
    assert script(*flags, "--max-rows", 3)[0] == 0
    assert len(np.load(out / "runs/mc-bert-seed1/predictions/mean/test.zh.npy")) == 3
    assert (
        script(*flags, "mc-bert-mix", "wf-random")[0] == 0
    )  # after --controls, which is the last of the flags
    assert [
        row["a"]
        for row in json.loads((out / "claims.json").read_text())["conclusions"]
        if row["number"] == ""
    ] == ["wf-random", "mc-bert-mix"]
    status, _, error = script(*flags, "mix")
    assert (
        status == 2
        and "--controls mix: they are wf-epoch-auto wf-lowest wf-random random-layers mc-bert-mix"
        in error
    )
    status, once, _ = script(*flags, "--seeds", 1, "--first-seed", 1)
    assert (
        status == 0 and once.count("is complete already") == len(expected) and "seed 0" not in once
    )
    for _ in range(2):
        assert script(*flags, "--drop-models")[0] == 0 and not [
            *out.rglob("*.safetensors"),
            *out.rglob("state.pt"),
        ]
        assert json.loads((out / "claims.json").read_text()) == written
    status, _, error = script(*flags, "--max-rows", 3)
    assert status == 2 and "baseline-seed0 did not keep epoch 1, but none" in error


def classes(folder, language):
    """The classes of the rows of a test file, read by hand."""
    labels = open(f"{folder}/labels.txt").read().split()
    return [
        labels.index(line.split("\t")[1])
        for line in open(f"{folder}/test.{language}.tsv").read().splitlines()[1:]
    ]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--resamples 0", "--resamples: 0, expected 1 or more"),
        ("--hidden 0", "--hidden: 0, expected 1 or more"),
        ("--seed 3", "--seeds says how many"),
        ("--seed=3", "--seed: each system"),
        ("--freeze-epoch 5", "--freeze-epoch 5: expected 0 to 4 (of --epochs), or auto"),
        ("--freeze-epoch x", "or auto"),
        ("--train-language fr", "train.fr.tsv does not exist"),
        ("--freeze-layers 6", "--freeze-layers 6: the model has layers 0 (embeddings) to 5"),
        ("--layers 6 8 11", "--layers 6: the model has layers 0 (embeddings) to 5"),
    ],
)
def test_bad_flags_are_said_before_anything_is_trained(
    flags, message, script, model_folder, data_folder, tmp_path
):
    given = ("--layers", 2, "--freeze-layers", 1, *flags.split())
    status, _, error = script(
        "experiments.claims",
        "--model",
        model_folder,
        "--data",
        data_folder,
        "--out",
        tmp_path / "out",
        *given,
    )
    assert status == 2 and message in error and not (tmp_path / "out").exists()


def test_a_stop_stops_the_whole_and_what_is_not_finished_is_not_compared(
    model_folder, data_folder, tmp_path, script, monkeypatch
):
    calls = []
    monkeypatch.setattr(train, "main", lambda arguments: calls.append(arguments) or 130)
    assert (
        script(
            "experiments.claims",
            "--model",
            model_folder,
            "--data",
            data_folder,
            "--out",
            tmp_path,
            "--layers",
            2,
            "--freeze-layers",
            1,
        )[0]
        == 130
        and len(calls) == 1
    )
    monkeypatch.setattr(claims, "read_run", lambda folder: ({"complete": False}, []))
    with pytest.raises(claims.UserError, match="is not finished"):
        claims.correctness("x", data_folder, "test", "last", {"en": None}, 8)


def test_the_controls_freeze_at_other_epochs_and_draw_other_layers_for_each_seed():
    by_seed = [
        claims.controls(12, [6, 8, 11], "max", [9, 11, 12], "2", 5, seed) for seed in range(9)
    ]
    assert set(by_seed[0]) == {
        "wf-epoch-1",
        "wf-epoch-3",
        "wf-epoch-auto",
        "wf-lowest",
        "wf-random",
        "random-layers",
        "mc-bert-mix",
    }
    for name, flag in (("random-layers", "--layers"), ("wf-random", "--freeze-layers")):
        drawn = []
        for flags, _, _ in (found[name] for found in by_seed):
            at = flags.index(flag) + 1
            drawn.append(tuple(flags[at : at + 3]))
            assert len(set(drawn[-1])) == 3 and set(drawn[-1]) <= set(range(1, 13))
        assert len(set(drawn)) > 5


def test_what_phase_one_says_is_of_each_combination_at_its_best_rate(tmp_path):
    """Two layers, two poolings, two rates; joint dev prefers 0.1 for max of 5 and 0.01 for all else."""
    lines = ["pooling,layers,hidden,lr,seed,dev_en,dev_de,test_en,test_de,test_zh"]
    first, second = list(POOLINGS)[:2]
    for pooling, layers, lr, dev, test in (
        (first, "5", 0.1, 0.9, 0.5),
        (first, "5", 0.01, 0.8, 0.99),
        (first, "6", 0.01, 0.9, 0.7),
        (first, "6", 0.1, 0.8, 0.99),
        (first, "5+6", 0.01, 0.9, 0.6),
        (second, "6", 0.01, 0.9, 0.2),
    ):
        lines += [
            f"{pooling},{layers},0,{lr},{seed},0,{dev},1,{test},{test + 0.1 * seed - 0.05}"
            for seed in (0, 1)
        ]
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "best.json").write_text(
        json.dumps({"train_language": "en", "select": "joint", "layers": [6], "pooling": first})
    )
    said = "\n".join(claims.phase_one(tmp_path, "test"))
    assert (
        f"{first} 60.0, {second} 20.0" in said
        and f"best single layer: {first} of 6 at lr 0.01, 70.0" in said
    )
    assert f"all layers: {first} of 5+6 at lr 0.01, 60.0" in said and "trained on en" in said
    (tmp_path / "results.csv").write_text(
        "pooling,layers,hidden,lr,seed,dev_de,test_en\nmax,5,0,0.1,0,0.5,0.5\n"
    )
    with pytest.raises(claims.UserError, match="has no test scores in another language than en"):
        claims.phase_one(tmp_path, "test")


def test_another_language_is_needed_and_rows_that_are_translations(model_folder, tmp_path, script):
    data = make_data(tmp_path / "data", train=5, dev=3, test=7, languages=("en", "de"))
    flags = (
        "experiments.claims",
        "--model",
        model_folder,
        "--data",
        data,
        "--out",
        tmp_path / "out",
    )
    lines = (tmp_path / "data/test.de.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "data/test.de.tsv").write_text("".join(lines[:-1]))
    status, _, error = script(*flags)
    assert status == 2 and "the test rows of en de are no translations of each other" in error
    (tmp_path / "data/test.de.tsv").unlink()
    status, _, error = script(*flags)
    assert (
        status == 2 and "test is needed in en and in another language, it is there in: en" in error
    )
