"""claims.py: the verdict's rules by hand, and the whole on a toy encoder of 12 blocks."""
import json

import numpy as np
import pytest
from conftest import make_model

import claims
import train


@pytest.mark.parametrize("low, high, by_seed, way, expected", [
    (0.01, 0.05, [0.02, 0.04], "better", "supported"),
    (0.01, 0.05, [0.07, -0.01], "better", "undecided"),       # a seed disagrees
    (-0.01, 0.05, [0.02, 0.02], "better", "undecided"),
    (-0.05, -0.01, [-0.02, -0.04], "better", "not supported"),
    (-0.05, -0.01, [-0.07, 0.01], "better", "undecided"),
    (-0.02, 0.009, [0.0, 0.001], "no gain", "supported"),
    (-0.02, 0.011, [0.0, 0.001], "no gain", "undecided"),
    (0.002, 0.03, [0.01, 0.02], "no gain", "not supported"),
    (0.002, 0.03, [-0.01, 0.04], "no gain", "undecided"),
])
def test_verdict(low, high, by_seed, way, expected):
    assert claims.verdict(low, high, by_seed, way) == expected


def test_a_comparison_averages_languages_and_pairs_seeds():
    random = np.random.default_rng(0)
    a, b = (random.integers(2, size=(2, 40, 3)).astype(float) for _ in range(2))
    found = claims.compare(a, b, np.arange(40), 1, 200)
    assert found["en"]["difference"] == pytest.approx((a - b)[:, :, 1].mean())
    assert found["others"]["difference"] == pytest.approx((a - b)[:, :, [0, 2]].mean())
    assert found["others"]["by_seed"] == pytest.approx((a - b)[:, :, [0, 2]].mean((1, 2)))
    assert found["others"]["low"] <= found["others"]["difference"] <= found["others"]["high"]


def test_all_conclusions_are_tested_and_a_second_call_trains_nothing(data_folder, tmp_path, script, monkeypatch):
    model = make_model(tmp_path / "model", blocks=12)
    flags = ("claims", "--model", model, "--data", data_folder, "--out", tmp_path / "claims", "--seeds", 2, "--epochs", 1,
             "--freeze-epoch", 0, "--hidden", 7, "--resamples", 200, "--max-length", 32, "--lr", "1e-3", "--precision", "fp32",
             "--controls")
    status, out, _ = script(*flags)
    assert status == 0
    written = json.loads((tmp_path / "claims/claims.json").read_text())
    assert {row["number"] for row in written["conclusions"]} == {*range(1, 9), ""}
    assert {row["verdict"] for row in written["conclusions"] if row["number"]} <= {"supported", "not supported", "undecided"}
    assert {row["verdict"] for row in written["conclusions"] if not row["number"]} <= {"better", "worse", "undecided"}
    assert all(row["claim"] in (tmp_path / "claims/claims.md").read_text() for row in written["conclusions"])
    names = {path.name for path in (tmp_path / "claims/runs").iterdir()}
    expected = {*claims.systems([6], "max", [9], 0, 7, 1), *claims.controls([6], "max", [9], "0", 1)}
    assert names == {f"{name}-seed{seed}" for name in expected for seed in (0, 1)}
    long = json.loads((tmp_path / "claims/runs/mc-bert-long-seed0/run.json").read_text())["arguments"]
    assert (long["epochs"], long["schedule"], long["keep_epochs"]) == (2, "constant", [1])

    def no_training(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "train_step", no_training)
    status, again, _ = script(*flags)
    assert status == 0 and again.count("is complete already") == 2 * len(expected)
    assert json.loads((tmp_path / "claims/claims.json").read_text()) == written
    status, _, error = script(*flags, "--dropout", 0.3)
    assert status == 2 and "dropout was 0.1, is now 0.3" in error


@pytest.mark.parametrize("flags, message", [
    ("--resamples 0", "--resamples: 0, expected 1 or more"), ("--hidden 0", "--hidden: 0, expected 1 or more"),
    ("--seed 3", "--seeds says how many"), ("--seed=3", "--seed: each system"),
    ("--freeze-epoch 5", "--freeze-epoch 5: expected 0 to 4 (of --epochs), or auto"), ("--freeze-epoch x", "or auto")])
def test_bad_flags_are_said_before_anything_is_trained(flags, message, script, tmp_path):
    status, _, error = script("claims", "--model", "m", "--data", "d", "--out", tmp_path / "out", *flags.split())
    assert status == 2 and message in error and not (tmp_path / "out").exists()


def test_a_stop_stops_the_whole_and_what_is_not_finished_is_not_compared(model_folder, data_folder, tmp_path, script, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "main", lambda arguments: calls.append(arguments) or 130)
    assert script("claims", "--model", model_folder, "--data", data_folder, "--out", tmp_path)[0] == 130 and len(calls) == 1
    monkeypatch.setattr(claims, "read_run", lambda folder: ({"complete": False}, {1: {}}))
    with pytest.raises(claims.UserError, match="is not finished"):
        claims.correctness(["x"], data_folder, "test", "last", {"en": [0]}, 8)


def test_the_controls_cover_freezing_at_other_epochs_and_other_layers():
    names = set(claims.controls([6, 8, 11], "max", [9, 11, 12], "2", 5))
    assert names == {"wf-epoch-1", "wf-epoch-3", "wf-epoch-auto", "wf-lowest", "wf-random", "wf-slower", "random-layers"}


def test_two_languages_are_needed(data_folder, tmp_path, script):
    (tmp_path / "labels.txt").write_text("refund\nagent\ndelivery\ncancel\n")
    (tmp_path / "test.en.tsv").write_text("text\tlabel\nmoney\trefund\n")
    status, _, error = script("claims", "--model", "m", "--data", tmp_path, "--out", tmp_path / "out")
    assert status == 2 and "test is needed in English and in another language, it is there in: en" in error
