"""lib/scores.py against scikit-learn, the statistics module and choices made by hand."""

import json
from itertools import product

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score

from lib import scores
from lib.scores import macro_f1, micro_f1

# --- F1 -------------------------------------------------------------------------------------------

ALL_WRONG, ALL_RIGHT = (np.zeros(19, int), np.ones(19, int)), (np.zeros(19, int), np.zeros(19, int))


@pytest.mark.parametrize("classes", [2, 3, 5, 60])  # of 60, many have neither rows nor predictions
def test_scores_are_those_of_scikit_learn(classes):
    random = np.random.default_rng(classes)
    pairs = [random.integers(classes, size=(2, 19)) for _ in range(6)] + [ALL_WRONG, ALL_RIGHT]
    matrices = [confusion_matrix(*pair, labels=range(classes)) for pair in pairs]
    matrices = np.reshape(matrices, (2, 4, classes, classes))
    right, true = np.diagonal(matrices, axis1=-2, axis2=-1), matrices.sum(-1)
    predicted = matrices.sum(-2)
    for average, ours in (
        ("micro", micro_f1(right, true)),
        ("macro", macro_f1(right, true, predicted)),
    ):
        expected = [f1_score(*pair, average=average, zero_division=0) for pair in pairs]
        np.testing.assert_allclose(ours, np.reshape(expected, (2, 4)), rtol=0, atol=1e-12)
    accuracy = [np.mean(true == predicted) for true, predicted in pairs]
    np.testing.assert_allclose(micro_f1(right, true).ravel(), accuracy, atol=1e-12)


# --- which epoch ----------------------------------------------------------------------------------


def rows_of(dev, split="dev"):
    """Rows of metrics.jsonl: {language: accuracy after each epoch}."""
    rows = []
    for language, accuracies in dev.items():
        for epoch, accuracy in enumerate(accuracies, 1):
            row = {"epoch": epoch, "split": split, "language": language, "accuracy": accuracy}
            rows.append({**row, "step": 7 * epoch})
    return rows


THREE = {"en": [0.3, 0.9, 0.6], "de": [0.7, 0.2, 0.5], "zh": [0.4, 0.5, 0.7]}


@pytest.mark.parametrize(
    "source, joint",  # by hand: .55 .35 .6; .35 .7 .65: all but the source
    [("en", 3), ("de", 2)],
)
def test_the_best_epoch_by_each_protocol(source, joint):
    rows, expected = rows_of(THREE), {"en": 2, "de": 1, "zh": 3, "joint": joint}
    # no model is saved in the midst of an epoch
    half = {"epoch": 2.5, "split": "dev", "language": "en", "accuracy": 1.0}
    train = {"epoch": 3, "split": "train", "language": "", "accuracy": 1.0}
    assert scores.best_epochs([*rows, half, train], source) == expected
    assert scores.best_epochs([train], source) == {}


def test_ties_go_to_the_earlier_epoch_and_sets_that_were_not_always_there_are_left_out():
    rows = rows_of({"en": [0.5, 0.5, 0.4], "de": [0.1, 0.3, 0.3]})
    assert scores.best_epochs(rows, "en") == {"en": 1, "de": 2, "joint": 2}
    assert scores.best_epochs(rows[:-1], "en") == {"en": 1}
    rows += rows_of({"en": [0.9, 0.1, 0.1], "de": [0.1, 0.2, 0.3]}, "test")
    assert scores.best_epochs(rows, "en") == {"en": 1, "de": 2, "joint": 2, "test": 3}
    last_bits = rows_of({"de": [0.0, 0.0], "fr": [0.0, 0.1], "zh": [0.3, 0.2]})
    assert scores.best_epochs(last_bits, "en")["joint"] == 1


def test_means_by_step():
    means = scores.mean_accuracies(rows_of(THREE), "dev", {"de", "zh"}, by="step")
    assert means == pytest.approx({7: 0.55, 14: 0.35, 21: 0.6})


@pytest.mark.parametrize(
    "protocol, en, de",
    [
        ("last", 3, 3),
        ("mean", "mean", "mean"),
        ("1", 1, 1),
        ("en", 2, 2),
        ("joint", 3, 3),
        ("oracle", 2, 1),
    ],
)
def test_the_epoch_that_a_protocol_reports(protocol, en, de):
    chosen = scores.choose_epochs(rows_of(THREE), protocol, ["en", "de"], "en", "runs/x")
    assert chosen == {"en": en, "de": de}


# --- which combination ----------------------------------------------------------------------------

COMBINATIONS, POOLINGS, RATES = [(5,), (6,), (5, 6), (7,), (5, 7)], ["max", "cls"], [0.01, 0.1, 0.5]
KEYS = [(pooling, layers, lr) for pooling, lr, layers in product(POOLINGS, RATES, COMBINATIONS)]


@pytest.mark.parametrize(
    "winners",
    [
        # the first of these is to win
        [("max", (5, 6), 0.01), ("max", (5, 7), 0.01)],
        [("max", (7,), 0.1), ("max", (5, 7), 0.01)],
        [("cls", (6,), 0.1), ("max", (7,), 0.01)],
        [("max", (6,), 0.1), ("cls", (6,), 0.01), ("max", (6,), 0.5)],
        [("cls", (5, 7), 0.5)],
        KEYS,
    ],
)
def test_ties_go_to_fewer_layers_then_lower_ones_then_the_first_pooling_then_the_smaller_rate(
    winners,
):
    values = [0.7 + 1e-12 * g if key in winners else 0.3 for g, key in enumerate(KEYS)]
    order = [KEYS[g] for g in scores.rank(KEYS, values)]  # the last bits are a tie
    assert order[0] == winners[0]
    assert sorted(key[:2] for key in order) == sorted(product(POOLINGS, COMBINATIONS))


def test_each_protocol_chooses_by_its_own_columns():
    columns = ["dev_en", "dev_de", "dev_zh_Hant", "test_en", "test_de", "test_zh_Hant"]
    micro = np.full((7, 2, 6), 0.1)  # (G, S, F)
    micro[range(6), 0, range(6)] = 0.9
    micro[6, :, 1:3] = 0.4  # the mean over de and zh_Hant is highest here: 0.5 + 0.1 over two seeds
    micro[5, :, 4:6] = 0.45
    keys = [("cls", (m,), 0.1) for m in range(7)]
    results = scores.Results(keys, columns, "en", micro, micro)
    by_language = {"en": 0, "de": 1, "zh_Hant": 2}
    assert scores.choices(results) == ({"en": 0, "joint": 6, "test": 5}, by_language)
    assert scores.choices(results._replace(source="de"))[0]["en"] == 1
    of_de = {"joint": [0, 2], "en": [1], "test": [3, 5]}
    assert scores.columns_of(columns, "de") == of_de
    alone = results._replace(columns=columns[:1], micro=micro[..., :1])
    assert scores.choices(alone) == ({"en": 0}, {"en": 0})


def test_a_grid_is_read_as_it_was_written_and_a_tie_between_rates_is_one(tmp_path):
    languages = ("dev_en", "dev_de", "dev_fr", "dev_zh")
    third = f"{1 / 3:.12g}"  # three of which have another mean than 1, 0 and 0, in the last bit
    lines = [f"pooling,layers,hidden,lr,seed,{','.join(languages)}"]
    lines += ["max,8,0,0.1,0,0.4,1,0,0", f"max,8,0,0.01,0,0.5,{third},{third},{third}"]
    (tmp_path / "results.csv").write_text("\n".join(lines))
    for source, select, best in (("en", "joint", 1), ("de", "en", 0)):
        about = {"train_language": source, "select": select}
        (tmp_path / "best.json").write_text(json.dumps(about))
        results, read = scores.read_grid(tmp_path)
        assert read == about and results.source == source and results.columns == [*languages]
        assert results.keys == [("max", (8,), 0.1), ("max", (8,), 0.01)]
        np.testing.assert_allclose(results.micro, [[[0.4, 1, 0, 0]], [[0.5, *[1 / 3] * 3]]])
        assert scores.ranked(results, select) == [best]
