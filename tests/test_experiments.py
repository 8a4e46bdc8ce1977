"""experiments/: rows.py and phase_one.py on a part of the sample, against counts from what the
scripts write; widen.py against the two limits that have a closed form."""

import csv
import json
import re

import numpy as np
import pytest
from conftest import ROOT, table
from sklearn.linear_model import LogisticRegression

from experiments import rows
from experiments.widen import entries, widen
from lib.scores import rank

OTHERS = ("de", "zh")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What rows.py writes for 24 of the sample's rows, and one run of fine-tuning."""
    folder = tmp_path_factory.mktemp("rows")
    sample, data = ROOT / "sample" / "intents", folder / "data"
    data.mkdir()
    (data / "labels.txt").write_text((sample / "labels.txt").read_text())
    for name in ("train.en", "dev.en", "dev.de", "dev.zh", "test.en", "test.de", "test.zh"):
        lines = (sample / f"{name}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / f"{name}.tsv").write_text("".join(lines[:25]), encoding="utf-8")
    flags = ["--model", ROOT / "sample/model", "--data", data, "--out", folder / "out"]
    flags += ["--rows", 24, "--seeds", 1, "--steps", 5]
    search, small = rows.grid_search.main, "--layers 8 11 12 --seeds 2 --epochs 4 --lr 1e-3 3e-3"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows.grid_search, "main", lambda flags: search([*flags, *small.split()]))
        assert not rows.main([str(flag) for flag in flags])
    return folder / "out"


def test_rows_compares_the_three_on_the_same_rows(made, script):
    (entry,) = json.loads((made / "rows.json").read_text())
    assert len(table(made / "24/data/train.en.tsv")) == 24
    # the search's model, by evaluate.py and a count
    shares = {}
    for language in ("en", *OTHERS):
        file, out = made / f"24/data/test.{language}.tsv", made / f"{language}.tsv"
        call = ["--input", file, "--predictions", out]
        assert not script("evaluate", made / "24/grid/model", *call)[0]
        shares[language] = np.mean([row[1] == row[2] for row in table(out)])
    found = entry["systems"]["search"]
    assert found["source"] == pytest.approx(shares["en"])
    assert found["others"] == pytest.approx(np.mean([shares[code] for code in OTHERS]))
    # logistic regression, whose C the others' dev sets choose
    vectors = {}
    for stem in ("train.en", "dev.de", "dev.zh", "test.de", "test.zh"):
        states = np.load(made / f"24/features/{stem}.mean.npy")[12].astype(float)
        states /= np.sqrt((states**2).sum(1))[:, None]
        vectors[stem] = states, np.load(made / f"24/features/{stem}.labels.npy")
    models = [LogisticRegression(C=c, max_iter=2000).fit(*vectors["train.en"]) for c in rows.CS]
    on_dev = [model.score(*vectors["dev.de"]) + model.score(*vectors["dev.zh"]) for model in models]
    best = models[int(np.argmax(on_dev))]
    expected = np.mean([best.score(*vectors[f"test.{code}"]) for code in OTHERS])
    logistic = entry["systems"]["logistic"]["others"]
    assert logistic == pytest.approx(expected)
    difference = entry["differences"]["logistic"]
    assert difference["difference"] == pytest.approx(found["others"] - logistic)
    assert difference["low"] <= difference["difference"] <= difference["high"]
    assert entry["systems"]["fine-tuned"]["seeds"] == 1
    assert "search - fine-tuned" in (made / "rows.md").read_text()


def test_a_second_call_trains_nothing(made, script, monkeypatch):
    before = (made / "rows.json").read_text()
    for module in (rows.extract, rows.grid_search, rows.train):
        monkeypatch.setattr(module, "main", None)
    flags = ["--model", ROOT / "sample/model", "--data", made.parent / "data", "--out", made]
    status, _, error = script("experiments.rows", *flags, "--rows", 24, "--seeds", 1)
    assert status == 0, error
    after = json.loads((made / "rows.json").read_text())
    assert after[0]["differences"] == json.loads(before)[0]["differences"]


def test_phase_one_compares_what_dev_chose_on_test(made, script):
    """Against results.csv, which has each model's accuracy on each file."""
    grid = made / "24/grid"
    status, out, error = script("experiments.phase_one", grid, "--data", made / "24/data")
    assert status == 0, error
    dev, test = {}, {}
    for row in csv.DictReader((grid / "results.csv").open()):
        key = row["pooling"], tuple(map(int, row["layers"].split("+"))), float(row["lr"])
        dev.setdefault(key, []).append(np.mean([float(row[f"dev_{code}"]) for code in OTHERS]))
        test.setdefault(key, []).append(np.mean([float(row[f"test_{code}"]) for code in OTHERS]))
    keys = list(dev)
    best = [keys[g] for g in rank(keys, np.mean(list(dev.values()), axis=1))]
    single = next(key for key in best if len(key[1]) == 1)
    of_pooling = {}
    for pooling in ("max", "mean", "cls"):
        of_pooling[pooling] = np.mean([test[key] for key in best if key[0] == pooling], axis=0)
    alone = {key[1]: test[key] for key in best if key[0] == "max"}
    expected = [
        of_pooling["max"] - of_pooling["mean"],
        of_pooling["max"] - of_pooling["cls"],
        np.subtract(alone[8,], alone[12,]),
        np.subtract(test[best[0]], test[single]),
    ]
    lines = [line for line in out.splitlines() if re.match(r"\| [345] ", line)]
    for line, by_seed in zip(lines, expected, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        np.testing.assert_allclose(
            [float(value) for value in cells[3].split()], 100 * by_seed, atol=0.051
        )
        assert float(cells[2].split()[0]) == pytest.approx(100 * by_seed.mean(), abs=0.051)


def test_widen_at_the_limits_where_the_seeds_and_where_the_rows_decide():
    seeds = [0.02, 0.05, 0.11]
    entry = {"difference": 0.06, "low": 0.06 - 1e-9, "high": 0.06 + 1e-9, "by_seed": seeds}
    half = 4.3027 * np.std(seeds, ddof=1) / 3**0.5  # t(0.975) of 2 degrees of freedom
    (low, high), p = widen(entry)
    assert [low, high] == pytest.approx([0.06 - half, 0.06 + half], rel=0.02) and 0.1 < p < 0.2
    entry = {"difference": 0.06, "low": 0.01, "high": 0.11, "by_seed": [0.06, 0.06, 0.06]}
    assert widen(entry)[0] == pytest.approx([0.01, 0.11], abs=5e-4)


def test_widen_leaves_out_single_seeds_and_names_what_stands_in_lists():
    several, single = {"by_seed": [0.1, 0.2]}, {"by_seed": [0.1]}
    named = entries([{"a": "x", "b": "y", "others": several, "en": single}])
    assert list(named) == [(("x - y", "others"), several)]
