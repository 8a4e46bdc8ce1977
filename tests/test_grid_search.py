"""grid_search.py against classifiers trained one at a time, scikit-learn's scores, a ranking made from results.csv."""

import csv
import json
import re
import shutil
from itertools import combinations as choose
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import confusion_matrix, f1_score

import grid_search
from grid_search import confusion_matrices, one_model, train_models
from lib import devices, scores
from lib.folders import read_grid
from lib.messages import UserError
from lib.scores import at_best_rate, macro_f1, micro_f1
from model import POOLINGS


@pytest.fixture(scope="module", autouse=True)
def small_pool():
    """Dropout's masks are cut from 8 million values; drawing a thousand is quicker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid_search, "POOL", 997)
        yield


# --- the joint training against one classifier at a time ---------------------------------------------------------

LAYERS, ROWS, SIZE, CLASSES = (2, 3, 7), 23, 5, 4  # 23 rows are 3 batches of 7 and one of 2
SUBSETS = [combination for n in (1, 2, 3) for combination in choose(LAYERS, n)]


def odd_case(rows=ROWS, seed=0):
    """Random features (L, N, D) in float64 and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(len(LAYERS), rows, SIZE, generator=generator, dtype=torch.float64),
        torch.randint(CLASSES, (rows,), generator=generator),
    )


def train_alone(features, labels, used, seed, *, hidden=0, epochs, batch_size, lr, dropout=0.1):
    """One classifier in a plain loop: nn.Linear on the layers `used` (places) side by side, torch.optim.Adam."""
    generator = torch.Generator().manual_seed(seed)
    layers, rows, size = features.shape
    pool = torch.rand(
        max(997, 2 * layers * batch_size * max(size, hidden)),
        generator=torch.Generator().manual_seed(0),
    )

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=features.dtype) * 2 - 1

    def drop(values):
        """Dropout by the next window of the pool."""
        start = torch.randint(len(pool) - values.numel(), (), generator=generator)
        return (
            values
            * (pool[start : start + values.numel()].view(values.shape) >= dropout)
            / (1 - dropout)
        )

    units, inputs = hidden or CLASSES, len(used) * size
    draws, bias = [uniform(size, units) for _ in range(layers)], uniform(units)
    net = torch.nn.Sequential(torch.nn.Linear(inputs, units, dtype=features.dtype))
    net[0].weight.data = torch.cat([draws[layer] for layer in used]).T / inputs**0.5
    net[0].bias.data = bias / inputs**0.5
    if hidden:
        net.extend([torch.nn.ReLU(), torch.nn.Linear(hidden, CLASSES, dtype=features.dtype)])
        net[2].weight.data, net[2].bias.data = (
            uniform(hidden, CLASSES).T / hidden**0.5,
            uniform(CLASSES) / hidden**0.5,
        )
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(epochs):
        for batch in torch.randperm(rows, generator=generator).split(batch_size):
            x = features[:, batch]
            x = drop(x) if dropout else x
            mask = drop(torch.ones(len(batch), hidden, dtype=x.dtype)) if dropout and hidden else 1
            out = net[0](torch.cat([x[layer] for layer in used], dim=1))
            out = net[2](out.relu() * mask) if hidden else out
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(out, labels[batch]).backward()
            optimizer.step()
    return net


@pytest.fixture(
    scope="module",
    params=[(0, 0.0), (0, 0.3), (3, 0.0), (3, 0.3)],
    ids=["plain", "dropout", "hidden", "hidden-dropout"],
)
def trained(request):
    """All subsets of three layers, seeds 4 and 9, trained together; and the settings, for training them alone."""
    settings = dict(
        hidden=request.param[0], epochs=4, batch_size=7, lr=0.05, dropout=request.param[1]
    )
    return train_models(*odd_case(), CLASSES, [4, 9], dtype=torch.float64, **settings), settings


@pytest.mark.parametrize("combination", SUBSETS)
@pytest.mark.parametrize("seed", [4, 9])
def test_every_model_comes_out_as_if_trained_alone(trained, combination, seed):
    (weights, settings), s = trained, [4, 9].index(seed)
    used = [LAYERS.index(layer) for layer in combination]
    net, mine = (
        train_alone(*odd_case(), used, seed, **settings),
        one_model(weights, LAYERS, combination, s),
    )
    assert mine.state_dict().keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value, rtol=0, atol=1e-9)
    features, labels = odd_case(rows=29, seed=1)
    with torch.no_grad():
        predicted = net(torch.cat([features[layer] for layer in used], dim=1)).argmax(1)
    matrices = confusion_matrices(weights, features, labels, CLASSES, chunk=8)
    number = sum(2**layer for layer in used)  # a model's number has a bit for each of its layers
    assert matrices.shape == (2, 8, CLASSES, CLASSES)
    assert np.array_equal(
        matrices[s, number], confusion_matrix(labels, predicted, labels=range(CLASSES))
    )


def test_training_moves_the_weights_it_compares():
    """Guards the test above against comparing untrained weights: four epochs bring the loss well down."""
    features, labels = odd_case()
    settings = dict(batch_size=7, lr=0.05, dropout=0.0)
    start, end = (
        train_alone(features, labels, [0, 1, 2], 4, epochs=epochs, **settings) for epochs in (0, 4)
    )
    x = torch.cat(list(features), dim=1)
    before, after = (
        torch.nn.functional.cross_entropy(net(x), labels).item() for net in (start, end)
    )
    assert after < 0.7 * before


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_seed_is_trained_the_same_beside_any_others(hidden):
    settings = dict(hidden=hidden, epochs=2, batch_size=7, dropout=0.3, dtype=torch.float64)
    together, alone = (
        train_models(*odd_case(), CLASSES, seeds, **settings) for seeds in ([7, 2, 5], [2])
    )
    for mine, other in zip(together, alone, strict=True):
        torch.testing.assert_close(mine[1:2], other, rtol=0, atol=1e-12)


def test_progress_is_called_once_a_step():
    calls = []
    train_models(
        *odd_case(),
        CLASSES,
        [0],
        epochs=3,
        batch_size=7,
        dtype=torch.float64,
        progress=lambda: calls.append(1),
    )
    assert len(calls) == 3 * 4


@pytest.mark.parametrize(
    "epochs, loss", [(1, r"[\d.]+"), (3, "nan")]
)  # in the last step, and earlier
def test_weights_that_are_not_finite_are_an_error(epochs, loss):
    features, labels = odd_case()
    with pytest.raises(
        UserError, match=rf"weights are not finite, its loss is {loss}: .*--lr 1e\+39 not too high"
    ):
        train_models(features.float(), labels, CLASSES, [0], lr=1e39, epochs=epochs)


@pytest.mark.parametrize("dropout", [0.1, 0.37, 0.9])
def test_dropout_keeps_its_share_of_the_values_everywhere(monkeypatch, dropout):
    """Features of ones: what the forward pass is given are the masks."""
    given, plain = [], grid_search.forward
    monkeypatch.setattr(grid_search, "POOL", 1 << 20)
    monkeypatch.setattr(
        grid_search,
        "forward",
        lambda weights, x, *more: given.append(x.clone()) or plain(weights, x, *more),
    )
    train_models(
        torch.ones(3, 31, 53),
        torch.zeros(31, dtype=torch.long),
        2,
        [0, 1],
        epochs=20,
        batch_size=31,
        dropout=dropout,
    )
    masks = torch.stack(given)  # (20 steps, L, S, B, D)
    assert masks.shape == (20, 3, 2, 31, 53) and masks.unique().tolist() == [0, 1]
    for axes in (
        (0, 1, 3, 4),
        (0, 1, 2, 3),
        (0, 2, 3, 4),
        (0, 1, 2, 4),
        (1, 2, 3, 4),
    ):  # no seed, value, layer, row or step is favoured
        share = masks.double().mean(axes)
        count = masks.numel() / share.numel()
        assert ((share - (1 - dropout)).abs() < 6 * (dropout * (1 - dropout) / count) ** 0.5).all()
    for one, other in (
        (masks[:, :, 0], masks[:, :, 1]),
        (masks[1:], masks[:-1]),
    ):  # seeds and steps are independent
        assert abs((one == other).double().mean() - (dropout**2 + (1 - dropout) ** 2)) < 0.02


# --- scores and choices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_scores_are_those_of_scikit_learn(classes):
    random = np.random.default_rng(classes)
    pairs = [
        (random.integers(classes, size=19), random.integers(classes, size=19)) for _ in range(6)
    ]
    pairs += [
        (np.zeros(19, int), np.zeros(19, int)),
        (np.zeros(19, int), np.ones(19, int)),
    ]  # all right, all wrong
    matrices = np.stack([confusion_matrix(*pair, labels=range(classes)) for pair in pairs]).reshape(
        2, 4, classes, classes
    )
    for name, score in (("micro", micro_f1), ("macro", macro_f1)):
        expected = [
            f1_score(*pair, labels=range(classes), average=name, zero_division=0) for pair in pairs
        ]
        np.testing.assert_allclose(
            score(matrices), np.reshape(expected, (2, 4)), rtol=0, atol=1e-12
        )
    np.testing.assert_allclose(
        micro_f1(matrices).ravel(),
        [np.mean(true == predicted) for true, predicted in pairs],
        atol=1e-12,
    )


def test_confusion_matrices_are_counted_over_all_chunks():
    features, labels = odd_case(rows=29)
    weights = train_models(features, labels, CLASSES, [0, 1], epochs=1, dtype=torch.float64)
    whole = confusion_matrices(weights, features, labels, CLASSES)
    assert (whole.sum((-2, -1)) == 29).all()
    assert (
        whole.sum(-1) == np.bincount(labels, minlength=CLASSES)
    ).all()  # rows are the true classes
    assert np.array_equal(whole, confusion_matrices(weights, features, labels, CLASSES, chunk=4))


def test_ties_go_to_fewer_layers_then_to_lower_ones_then_to_the_first_pooling_at_the_smaller_rate():
    combinations, poolings, rates = (
        [(5,), (6,), (5, 6), (7,), (5, 7)],
        ["max", "cls"],
        [0.01, 0.1, 0.5],
    )
    keys = [(pooling, layers, lr) for pooling, lr, layers in product(poolings, rates, combinations)]

    def best(*winners):
        scores = [
            0.7 + 1e-12 * g if key in winners else 0.3 for g, key in enumerate(keys)
        ]  # the last bits are a tie
        order = [keys[g] for g in scores.rank(keys, scores)]
        assert sorted((pooling, layers) for pooling, layers, _ in order) == sorted(
            product(poolings, combinations)
        )
        return order[0]

    assert best(("max", (5, 7), 0.01), ("max", (5, 6), 0.01)) == ("max", (5, 6), 0.01)
    assert best(("max", (5, 7), 0.01), ("max", (7,), 0.1)) == ("max", (7,), 0.1)
    assert best(("cls", (6,), 0.1), ("max", (7,), 0.01), ("max", (5, 6), 0.01)) == (
        "cls",
        (6,),
        0.1,
    )
    assert best(("cls", (6,), 0.01), ("max", (6,), 0.5), ("max", (6,), 0.1)) == ("max", (6,), 0.1)
    assert best(("cls", (5, 7), 0.5)) == ("cls", (5, 7), 0.5)
    assert best() == ("max", (5,), 0.01)


def test_each_protocol_chooses_by_its_own_columns():
    columns = ["dev_en", "dev_de", "dev_zh_Hant", "test_en", "test_de", "test_zh_Hant"]
    f1 = np.full((7, 2, 6), 0.1)  # (G, S, F)
    f1[range(6), 0, range(6)] = 0.9
    f1[6, :, 1:3] = (
        0.4  # the mean over de and zh_Hant is highest here, neither alone: 0.5 + 0.1 over two seeds
    )
    f1[5, :, 4:6] = 0.45
    confusion = np.stack([f1, 1 - f1, 0 * f1, 0 * f1], -1).reshape(
        *f1.shape, 2, 2
    )  # all rows are of the first class
    results = scores.Results([("cls", (m,), 0.1) for m in range(7)], columns, "en", confusion)
    assert scores.choices(results) == (
        {"en": 0, "joint": 6, "test": 5},
        {"en": 0, "de": 1, "zh_Hant": 2},
    )
    from_de = results._replace(source="de")  # joint: en and zh_Hant
    assert scores.choices(from_de)[0]["en"] == 1 and scores.columns_of(columns, "de") == {
        "joint": [0, 2],
        "en": [1],
        "test": [3, 5],
    }
    alone = results._replace(columns=columns[:1], confusion=confusion[:, :, :1])
    assert scores.choices(alone) == ({"en": 0}, {"en": 0})


# --- the script --------------------------------------------------------------------------------------------------

LABELS = ["refund", "agent", "delivery", "cancel"]
COUNTS = {
    "train.en": 41,
    "dev.en": 13,
    "dev.de": 13,
    "dev.zh": 13,
    "test.en": 17,
    "test.de": 17,
    "test.zh": 17,
}
FILES = [name.replace(".", "_") for name in COUNTS if name != "train.en"]
NAMES = list(POOLINGS)
RATES = [0.02, 0.3]
FAST = (
    "--layers",
    1,
    2,
    4,
    "--seeds",
    2,
    "--epochs",
    3,
    "--batch-size",
    16,
    "--precision",
    "fp32",
    "--scale",
    "none",
    "--lr",
    0.3,
    0.02,
)
MODELS = 7 * 2 * 2 * len(POOLINGS)  # combinations, rates, seeds, poolings


def make_features(folder, layers=6, size=9, noise=(3, 1, 0.6, 2, 0.4, 1.5), counts=COUNTS):
    """Write a feature folder by hand: class centres plus noise, of a different strength in each layer and language."""
    random = np.random.default_rng(0)
    folder.mkdir()
    centres = random.normal(size=(layers, 4, size))
    for stem, count in counts.items():
        labels = np.random.default_rng(len(stem) + count).integers(4, size=count)
        labels[:4] = range(4)
        np.save(folder / f"{stem}.labels.npy", labels)
        for p, pooling in enumerate(NAMES):
            strength = np.array(noise[:layers])[:, None, None] * (0.5 + 0.35 * p)
            strength = strength * {"en": 1, "de": 1.3}.get(stem.split(".")[1], 1.6)
            values = centres[:, labels] + strength * random.normal(size=(layers, count, size))
            np.save(folder / f"{stem}.{pooling}.npy", values.astype(np.float16))
    (folder / "manifest.json").write_text(
        json.dumps(
            {
                "format": 1,
                "complete": True,
                "model": "toy",
                "revision": "1",
                "layers": list(range(layers)),
                "poolings": NAMES,
                "hidden_size": size,
                "dtype": "float16",
                "max_length": 33,
                "labels": LABELS,
                "inputs": {
                    f"{stem}.tsv": {"sha256": "0", "rows": count} for stem, count in counts.items()
                },
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return make_features(tmp_path_factory.mktemp("features") / "toy")


@pytest.fixture(scope="module")
def grid(features, tmp_path_factory):
    """A finished search: 7 combinations of layers 1, 2, 4 x all poolings x 2 rates x 2 seeds."""
    out = tmp_path_factory.mktemp("grid") / "toy"
    grid_search.main(["--features", str(features), "--out", str(out), *map(str, FAST)])
    return out


@pytest.fixture
def run(script, features, tmp_path):
    """run("--flag", value, ...) searches the toy features to tmp_path/grid unless told otherwise."""

    def call(*arguments, features=features, out=tmp_path / "grid"):
        return script("grid_search", "--features", features, "--out", out, *FAST, *arguments)

    return call


@pytest.fixture
def trainings(monkeypatch):
    """The (rate, seeds) of each train_models() call. `stop` in it raises KeyboardInterrupt at that call."""
    made, whole = [], train_models

    def watched(*arguments, **more):
        if len(made) == watched.stop:
            raise KeyboardInterrupt
        made.append((more["lr"], arguments[3]))
        return whole(*arguments, **more)

    watched.stop, watched.made = None, made
    monkeypatch.setattr(grid_search, "train_models", watched)
    return watched


def refused(result, *phrases):
    """The one line that a run printed as it exited with status 2; it holds all `phrases`."""
    code, _, err = result
    message = err.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in err and message.startswith("grid_search.py: error: "), (
        result
    )
    for phrase in phrases:
        assert phrase in message, message
    return message


def read_results(out):
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def best_json(out):
    return json.loads((out / "best.json").read_text())


def scores_by(rows, columns):
    """Mean of some columns of results.csv for each seed: {(pooling, layers, lr): [...]}."""
    scores = {}
    for row in rows:
        key = row["pooling"], tuple(map(int, row["layers"].split("+"))), float(row["lr"])
        scores.setdefault(key, []).append(np.mean([float(row[column]) for column in columns]))
    return scores


def rank(rows, columns):
    """An independent ranking of results.csv: (pooling, layers, lr) from best to worst by the mean of some columns."""
    scores = {key: round(np.mean(values), 5) for key, values in scores_by(rows, columns).items()}
    at_best = {}
    for pooling, layers, lr in sorted(scores, key=lambda key: (-scores[key], key[2])):
        at_best.setdefault((pooling, layers), lr)
    return sorted(
        ((*key, lr) for key, lr in at_best.items()),
        key=lambda key: (-scores[key], len(key[1]), key[1], NAMES.index(key[0])),
    )


def described(key):
    return {"pooling": key[0], "layers": list(key[1]), "lr": key[2]}


COLUMNS = {"en": ["dev_en"], "joint": ["dev_de", "dev_zh"], "test": ["test_de", "test_zh"]}


def report(out):
    """The files of a grid folder that must not depend on how often the search was stopped."""
    return {
        path.name: path.read_bytes()
        for path in out.iterdir()
        if path.suffix == ".csv" or path.name == "best.json"
    }


def test_results_have_a_row_for_each_model_and_a_column_for_each_file(grid):
    rows = read_results(grid)
    assert list(rows[0]) == ["pooling", "layers", "hidden", "lr", "seed", *FILES]
    names = {"+".join(map(str, layers)) for n in (1, 2, 3) for layers in choose((1, 2, 4), n)}
    expected = set(product(NAMES, names, "0", ("0.02", "0.3"), "01"))
    assert len(rows) == MODELS and {tuple(row.values())[:5] for row in rows} == expected
    for row in rows:
        for column in FILES:
            right = float(row[column]) * COUNTS[column.replace("_", ".")]
            assert (
                0 <= right <= 17 and abs(right - round(right)) < 1e-4
            )  # a fraction of the file's rows
    assert len({row["test_zh"] for row in rows}) > 5


@pytest.mark.parametrize("lr", RATES)
def test_a_row_is_the_score_of_that_model_trained_alone(grid, features, lr):
    train, test = (
        torch.from_numpy(np.load(features / f"{stem}.mean.npy")[[1, 2, 4]]).float()
        for stem in ("train.en", "test.de")
    )
    labels, right = (np.load(features / f"{stem}.labels.npy") for stem in ("train.en", "test.de"))
    net = train_alone(train, torch.from_numpy(labels), [0, 2], 1, epochs=3, batch_size=16, lr=lr)
    with torch.no_grad():
        predicted = net(torch.cat([test[0], test[2]], 1)).argmax(1)
    (row,) = [
        row
        for row in read_results(grid)
        if list(row.values())[:5] == ["mean", "1+4", "0", f"{lr}", "1"]
    ]
    assert abs(float(row["test_de"]) - f1_score(right, predicted, average="micro")) < 1e-6


@pytest.mark.parametrize("select", ["joint", "en", "test"])
def test_the_choice_is_the_first_of_a_ranking_made_from_the_results(
    run, grid, tmp_path, trainings, select
):
    shutil.copytree(grid, tmp_path / "grid")
    code, out, _ = run("--select", select)
    assert code == 0 and trainings.made == []
    assert (tmp_path / "grid/results.csv").read_bytes() == (grid / "results.csv").read_bytes()
    rows, best = read_results(grid), best_json(tmp_path / "grid")
    assert best == {
        **described(rank(rows, COLUMNS[select])[0]),
        "select": select,
        "hidden": 0,
        "model": "toy",
        "train_language": "en",
        "per_language": {
            language: described(rank(rows, [f"dev_{language}"])[0])
            for language in ("en", "de", "zh")
        },
        "protocols": {
            protocol: described(rank(rows, columns)[0]) for protocol, columns in COLUMNS.items()
        },
    }
    assert (
        f"The choice: {best['pooling']} of {'+'.join(map(str, best['layers']))}, lr {best['lr']}."
        in out
    )


def test_each_rate_gives_what_it_gives_alone(run, grid, tmp_path):
    for lr in RATES:
        assert run("--lr", lr, out=tmp_path / str(lr))[0] == 0
        alone = read_results(tmp_path / str(lr))
        assert (
            alone == [row for row in read_results(grid) if float(row["lr"]) == lr]
            and len(alone) == MODELS / 2
        )
    assert (
        len({key[2] for key in rank(read_results(grid), COLUMNS["joint"])}) == 2
    )  # both are some combination's best


def table(out, header):
    """The rows of the one table of summary.md whose header begins with these cells."""
    lines = re.sub(" +", " ", (out / "summary.md").read_text()).splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(f"| {header} |")]
    rows = lines[start + 2 :]
    rows = rows[: next((i for i, line in enumerate(rows) if not line.startswith("|")), len(rows))]
    return [line.strip("| ").split(" | ") for line in rows]


def test_the_summary_ranks_as_the_results_do(grid):
    rows, lines = read_results(grid), table(grid, "rank | pooling | layers | lr")
    order = rank(rows, COLUMNS["joint"])
    assert [line[0] for line in lines] == [str(number) for number in range(1, 11)]
    assert [
        (line[1], tuple(map(int, line[2].split("+"))), float(line[3])) for line in lines
    ] == order[:10]
    for key, line in zip(order, lines):
        ranked, paper = (
            100 * np.array(scores_by(rows, COLUMNS[name])[key]) for name in ("joint", "test")
        )
        np.testing.assert_allclose(
            [*map(float, line[4:])],
            [ranked.mean(), ranked.std(ddof=1), paper.mean(), paper.std(ddof=1)],
            rtol=0,
            atol=0.006,
        )
    text = (grid / "summary.md").read_text()
    assert (
        f"{MODELS} models (7 combinations x {len(NAMES)} poolings x 2 learning rates x 2 seeds)"
        in text
    )
    assert "ms a model" in text and "Trained on en" in text


def test_the_summary_says_what_layers_and_poolings_are_worth_at_each_rate_and_at_the_best(grid):
    scores = {
        key: 100 * np.mean(values)
        for key, values in scores_by(read_results(grid), COLUMNS["joint"]).items()
    }
    order = rank(read_results(grid), COLUMNS["joint"])
    for layer, *shown in table(grid, "layer | with it"):
        has, lacks = (
            np.mean([scores[key] for key in order if (int(layer) in key[1]) == own])
            for own in (True, False)
        )
        alone = [
            scores[next(key for key in order if key[:2] == (pooling, (int(layer),)))]
            for pooling in NAMES
        ]
        np.testing.assert_allclose(
            [*map(float, shown)], [has, lacks, has - lacks, *alone], rtol=0, atol=0.011
        )
    lines = table(grid, "lr | mean: max")
    assert [line[0] for line in lines] == ["0.02", "0.3", "each at its best"]
    for lr, line in zip((*RATES, None), lines):
        mine = {
            key[:2]: scores[key]
            for key in (order if lr is None else scores)
            if lr in (None, key[2])
        }
        means = [
            np.mean([score for key, score in mine.items() if key[0] == pooling])
            for pooling in NAMES
        ]
        single, best = (
            max(score for key, score in mine.items() if len(key[1]) == 1),
            max(mine.values()),
        )
        shown = [
            *map(float, line[1 : 1 + len(NAMES)]),
            float(line[-3].split()[-1]),
            float(line[-2].split()[-1]),
            float(line[-1]),
        ]
        np.testing.assert_allclose(shown, [*means, single, best, best - single], rtol=0, atol=0.006)
        layers, pooling, _ = line[-2].split()
        assert abs(mine[pooling, tuple(map(int, layers.split("+")))] - best) < 1e-9


def test_the_summary_shows_each_protocols_scores(grid):
    best, lines = best_json(grid), {line[0]: line for line in table(grid, "protocol | choice")}
    names = [[layer for layer, bit in ((1, 1), (2, 2), (4, 4)) if m & bit] for m in range(1, 8)]

    def score(choice, file, average):
        """scikit-learn's F1 in percent, mean over the seeds, from the rows that the parts' confusion matrices count."""
        matrices = [
            np.load(grid / f"parts/{choice['pooling']}.{choice['lr']:g}.{seed}.npz")["confusion"][
                file, names.index(choice["layers"])
            ]
            for seed in (0, 1)
        ]
        pairs = [
            np.repeat(np.indices((4, 4)).reshape(2, -1), matrix.ravel(), axis=1)
            for matrix in matrices
        ]
        return np.mean(
            [
                100 * f1_score(*pair, labels=range(4), average=average, zero_division=0)
                for pair in pairs
            ]
        )

    assert list(lines) == ["en", "joint", "oracle", "test"]
    for protocol, (_, choice, *shown) in lines.items():
        picks = [
            best["per_language"][language] if protocol == "oracle" else best["protocols"][protocol]
            for language in ("en", "de", "zh")
        ]
        assert (
            protocol == "oracle"
            or f"{picks[0]['pooling']} of {'+'.join(map(str, picks[0]['layers']))}" in choice
        )
        micro, macro = (
            [score(pick, file, average) for file, pick in enumerate(picks, 3)]
            for average in ("micro", "macro")
        )
        np.testing.assert_allclose(
            [*map(float, shown)],
            [*micro, np.mean(micro[1:]), np.mean(macro[1:])],
            rtol=0,
            atol=0.006,
        )


def test_confusion_files_hold_the_chosen_models_counts(grid):
    best, rows = best_json(grid), read_results(grid)
    name = [best["pooling"], "+".join(map(str, best["layers"])), "0", f"{best['lr']:g}"]
    assert {path.name for path in grid.glob("confusion.*")} == {
        f"confusion.{code}.csv" for code in ("de", "en", "zh")
    }
    for language in ("en", "de", "zh"):
        with open(grid / f"confusion.{language}.csv", newline="") as file:
            header, *lines = csv.reader(file)
        assert header == ["true \\ predicted", *LABELS] and [line[0] for line in lines] == LABELS
        matrix = np.array([line[1:] for line in lines], dtype=int)
        mine = [float(row[f"test_{language}"]) for row in rows if list(row.values())[:4] == name]
        assert (
            matrix.sum() == 2 * 17 and abs(np.trace(matrix) / 17 - sum(mine)) < 1e-4
        )  # summed over the two seeds


def test_one_more_hidden_layer_and_one_pooling(run, tmp_path):
    code, out, _ = run("--hidden", 3, "--poolings", "cls", "--lr", 0.1)
    assert code == 0 and "x 1 poolings x 1 learning rates x 2 seeds = 14 models" in out
    rows = read_results(tmp_path / "grid")
    assert len(rows) == 14 and {(row["pooling"], row["hidden"]) for row in rows} == {("cls", "3")}
    assert (
        best_json(tmp_path / "grid")["hidden"] == 3
        and len(table(tmp_path / "grid", "lr | mean: cls")) == 1
    )


def test_layer_0_and_layers_out_of_order(run, tmp_path):
    assert run("--layers", 5, 0, "--poolings", "max")[0] == 0
    assert {row["layers"] for row in read_results(tmp_path / "grid")} == {"0", "5", "0+5"}


def test_features_without_test_or_other_languages(run, tmp_path):
    alone = make_features(tmp_path / "alone", counts={"train.en": 41, "dev.en": 13})
    refused(
        run(features=alone), "--select joint: the features hold no file to choose by, only dev.en"
    )
    assert run("--select", "en", features=alone)[0] == 0
    assert best_json(tmp_path / "grid")["protocols"].keys() == {"en"}
    assert list(read_results(tmp_path / "grid")[0]) == [
        "pooling",
        "layers",
        "hidden",
        "lr",
        "seed",
        "dev_en",
    ]
    assert "nan" not in (tmp_path / "grid/summary.md").read_text()


# --- scaled features ---------------------------------------------------------------------------------------------


def test_scaled_layers_are_those_scaled_by_hand(run, features, tmp_path):
    """A search of scaled features is the plain search of features that NumPy scaled; a layer without spread is zero."""
    for name in ("raw", "hand"):
        shutil.copytree(features, tmp_path / name)
    for pooling in NAMES:
        train = np.load(features / f"train.en.{pooling}.npy").astype(np.float64)
        for stem in COUNTS:
            values = np.load(features / f"{stem}.{pooling}.npy").astype(np.float64)
            values[2] = 50 * values[2] + 300  # of another size and place than its neighbours
            if pooling == "cls":
                values[4] = 0.37  # the same in every row, of the others' files too
            np.save(tmp_path / f"raw/{stem}.{pooling}.npy", values.astype(np.float32))
            for k in range(len(values)):
                base = 50 * train[k] + 300 if k == 2 else train[k]
                centred = base - base.mean(0)
                values[k] = (values[k] - base.mean(0)) / np.sqrt((centred**2).mean())
            if pooling == "cls":
                values[4] = 0
            np.save(tmp_path / f"hand/{stem}.{pooling}.npy", values.astype(np.float32))
    code, out, _ = run("--scale", "layer", features=tmp_path / "raw")
    assert code == 0 and out.count("is the same for every row") == 1
    assert "cls of layer 4 is the same for every row: left at zero" in out
    code, out, _ = run(features=tmp_path / "hand", out=tmp_path / "hand-grid")
    assert code == 0 and "is the same for every row" not in out
    assert report(tmp_path / "grid") == report(tmp_path / "hand-grid")
    assert run(features=tmp_path / "raw", out=tmp_path / "raw-grid")[0] == 0
    assert read_results(tmp_path / "grid") != read_results(tmp_path / "raw-grid")


def test_scaling_is_the_train_files(features):
    values = torch.from_numpy(np.load(features / "train.en.max.npy").astype(np.float32))
    values[3] = 1e4  # rounding leaves no spread where there is none
    mean, number = grid_search.scaling(values)
    np.testing.assert_allclose(
        mean[:, 0], values.numpy().astype(np.float64).mean(1), rtol=1e-5, atol=1e-5
    )
    assert (
        number.shape == (6, 1, 1) and number[3].isinf() and not ((values - mean) / number)[3].any()
    )
    np.testing.assert_allclose(
        number.flatten()[:3],
        [layer.numpy().std(0, dtype=np.float64).__pow__(2).mean() ** 0.5 for layer in values[:3]],
        rtol=1e-5,
    )


# --- the source language -----------------------------------------------------------------------------------------


def counts_of(train, others):
    return {
        **{f"train.{language}": 41 for language in train},
        **{f"dev.{language}": 13 for language in others},
        **{f"test.{language}": 17 for language in others},
    }


def test_another_source_language(run, tmp_path):
    folder = make_features(
        tmp_path / "es", counts=counts_of(["es"], ["en", "es", "pt-BR", "zh_Hant"])
    )
    assert run(features=folder)[0] == 0
    rows, best = read_results(tmp_path / "grid"), best_json(tmp_path / "grid")
    assert list(rows[0])[5:] == [
        f"{split}_{language}"
        for split in ("dev", "test")
        for language in ("es", "en", "pt-BR", "zh_Hant")
    ]
    others = ["en", "pt-BR", "zh_Hant"]
    columns = {
        "en": ["dev_es"],
        "joint": [f"dev_{language}" for language in others],
        "test": [f"test_{language}" for language in others],
    }
    assert best["train_language"] == "es" and best["per_language"].keys() == {"es", *others}
    assert best["protocols"] == {
        name: described(rank(rows, mine)[0]) for name, mine in columns.items()
    }
    assert described(rank(rows, ["dev_zh_Hant"])[0]) == best["per_language"]["zh_Hant"]
    assert (tmp_path / "grid/confusion.zh_Hant.csv").exists()
    assert "Trained on es." in (tmp_path / "grid/summary.md").read_text()
    line = table(tmp_path / "grid", "protocol | choice | es | en | pt-BR | zh_Hant | paper F1")[1]
    assert abs(float(line[-2]) - np.mean([float(value) for value in line[3:6]])) < 0.011
    found, columns, _ = read_grid(tmp_path / "grid")
    assert columns == list(rows[0])[5:] and len(found) == MODELS / 2
    entry = found["max", (1, 2), 0.3]
    np.testing.assert_allclose(
        scores.mean_of_others(entry, "test", "es"), np.mean([entry[f"test_{o}"] for o in others], 0)
    )


def test_which_train_file_is_the_sources(run, tmp_path, trainings):
    both = make_features(tmp_path / "both", counts=counts_of(["de", "en"], ["de", "en"]))
    for language, arguments in (("en", ()), ("de", ("--train-language", "de"))):
        assert run(*arguments, "--poolings", "max", features=both, out=tmp_path / language)[0] == 0
        assert best_json(tmp_path / language)["train_language"] == language
    assert read_results(tmp_path / "en") != read_results(tmp_path / "de")
    refused(
        run("--train-language", "en", features=both, out=tmp_path / "de"),
        "train_language was 'de', is now 'en'",
    )
    refused(
        run("--train-language", "fr", features=both),
        "the search needs train.fr",
        "train.de train.en",
    )
    neither = make_features(tmp_path / "neither", counts=counts_of(["de", "es"], ["de", "en"]))
    refused(run(features=neither), "the search needs train.en", "train.de train.es")
    assert not (tmp_path / "grid").exists()


# --- reading a grid folder ---------------------------------------------------------------------------------------


def test_a_grid_is_read_as_it_was_written(grid):
    found, columns, best = read_grid(grid)
    rows = read_results(grid)
    assert (
        columns == FILES
        and best == best_json(grid)
        and found.keys() == scores_by(rows, FILES).keys()
    )
    for key, entry in found.items():
        assert entry.keys() == set(FILES)
        for column in FILES:
            np.testing.assert_allclose(
                entry[column], 100 * np.array(scores_by(rows, [column])[key]), rtol=0, atol=1e-9
            )


@pytest.mark.parametrize("select", ["joint", "en", "test"])
def test_each_combination_is_read_at_the_rate_it_is_best_at(run, grid, tmp_path, select):
    shutil.copytree(grid, tmp_path / "grid")
    assert run("--select", select)[0] == 0
    found, _, best = read_grid(tmp_path / "grid")
    at_best = at_best_rate(found, best)
    assert {(*key, lr) for key, (lr, _) in at_best.items()} == set(
        rank(read_results(grid), COLUMNS[select])
    )
    assert all(entry is found[(*key, lr)] for key, (lr, entry) in at_best.items())


def test_a_tie_between_rates_is_one_for_readers_too():
    tie = {
        f"dev_{language}": np.array([value])
        for language, value in zip(("en", "de", "fr", "zh"), (50, 100 / 3, 100 / 3, 100 / 3))
    }
    other = {
        "dev_en": np.array([40.0]),
        "dev_de": np.array([100.0]),
        "dev_fr": np.array([0.0]),
        "dev_zh": np.array([0.0]),
    }
    grid = {("max", (8,), 0.1): other, ("max", (8,), 0.01): tie}
    assert at_best_rate(grid, {"train_language": "en", "select": "joint"}) == {
        ("max", (8,)): (0.01, tie)
    }
    assert at_best_rate(grid, {"train_language": "de", "select": "en"}) == {
        ("max", (8,)): (0.1, other)
    }


@pytest.mark.parametrize(
    "name, text, phrase",
    [
        ("results.csv", "", "not what grid_search.py writes"),
        ("results.csv", "pooling,layers\nmax,8\n", "not what grid_search.py writes"),
        (
            "results.csv",
            "pooling,layers,hidden,lr,seed,dev_en\nmax,8,0,0.1,0,x\n",
            "not what grid_search.py writes",
        ),
        (
            "results.csv",
            "pooling,layers,hidden,lr,seed,dev_en\nmax,8,0,0.1,0\n",
            "not what grid_search.py writes",
        ),
        ("best.json", "{", "not what grid_search.py writes"),
        ("best.json", '{"select": "en"}', "not what grid_search.py writes (train_language)"),
    ],
)
def test_a_broken_grid_is_one_sentence(grid, tmp_path, name, text, phrase):
    shutil.copytree(grid, tmp_path / "grid")
    (tmp_path / "grid" / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/grid/{name}: {phrase}")):
        read_grid(tmp_path / "grid")


# --- stopping and going on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_stopped_search_goes_on_and_ends_the_same(run, grid, tmp_path, trainings, calls):
    trainings.stop = calls
    assert run()[0] == 130
    assert not (tmp_path / "grid/results.csv").exists()
    assert len(list((tmp_path / "grid").glob("parts/*.npz"))) == 2 * calls
    trainings.stop = None
    assert run()[0] == 0 and trainings.made == [(lr, [0, 1]) for _ in NAMES for lr in RATES]
    assert report(tmp_path / "grid") == report(grid)


def test_one_lost_part_is_trained_again_alone(run, grid, tmp_path, trainings):
    shutil.copytree(grid, tmp_path / "grid")
    (tmp_path / "grid/parts/mean.0.3.1.npz").unlink()
    assert run()[0] == 0 and trainings.made == [(0.3, [1])]
    assert report(tmp_path / "grid") == report(grid)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"PK" + raw[:50]]
)
def test_a_damaged_part_is_named(run, grid, tmp_path, damage):
    shutil.copytree(grid, tmp_path / "grid")
    path = tmp_path / "grid/parts/mean.0.3.1.npz"
    path.write_bytes(damage(path.read_bytes()))
    refused(run(), f"{path} is damaged or cut short", "delete it, and run the search again")


def test_a_part_of_another_shape_is_named(run, grid, tmp_path):
    shutil.copytree(grid, tmp_path / "grid")
    path = tmp_path / "grid/parts/mean.0.3.1.npz"
    np.savez(path, confusion=np.zeros((6, 3, 4, 4), np.int32), seconds=1.0)
    refused(run(), f"{path} has shape (6, 3, 4, 4), expected (6, 7, 4, 4)")


def test_processes_share_the_models_evenly(run, monkeypatch, tmp_path):
    shares = []

    def stopped(jobs, *_, **__):
        shares.append([(*job, seed) for job, seeds in jobs.items() for seed in seeds])
        raise KeyboardInterrupt

    monkeypatch.setattr(grid_search, "search", stopped)
    for number in range(3):
        monkeypatch.setattr(devices, "start_processes", lambda: (number, 3))
        assert run("--seeds", 5)[0] == 130
    assert sorted(sum(shares, [])) == sorted(product(NAMES, RATES, range(5)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# --- precision ---------------------------------------------------------------------------------------------------


def test_bf16_products_rank_the_combinations_as_fp32_does():
    layers, size, counts = 5, 13, {"train": 211, "test": 503}
    random = np.random.default_rng(3)
    centres = random.normal(size=(layers, 4, size))
    made = {}
    for name, count in counts.items():
        labels = random.integers(4, size=count)
        noise = np.array([6, 3, 2, 4, 1.5])[:, None, None] * random.normal(
            size=(layers, count, size)
        )
        made[name] = torch.from_numpy(centres[:, labels] + noise), torch.from_numpy(labels)
    scores = {}
    for precision in (torch.float32, torch.bfloat16):
        features, labels = made["train"]
        weights = train_models(
            features.to(precision), labels, 4, [0, 1, 2], epochs=6, batch_size=64, lr=1e-2
        )
        assert {weight.dtype for weight in weights} == {torch.float32}
        matrices = confusion_matrices(weights, made["test"][0].to(precision), made["test"][1], 4)
        scores[precision] = micro_f1(matrices)[:, 1:].mean(0)
    exact, rough = scores.values()
    assert exact.max() - exact.min() > 0.3  # the combinations do differ
    assert spearmanr(exact, rough).statistic > 0.9


# --- bad input ---------------------------------------------------------------------------------------------------


def change_manifest(folder, **values):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_array(path, change):
    array = np.load(path)
    np.save(path, array if (changed := change(array)) is None else changed)


BROKEN = {  # what is done to the features, and what the message must hold
    "no folder": (shutil.rmtree, ["manifest.json does not exist"]),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), ["manifest.json does not exist"]),
    "manifest is no JSON": (
        lambda f: (f / "manifest.json").write_text("{"),
        ["manifest.json: not what extract.py writes (", "): delete it, or --overwrite"],
    ),
    "manifest lacks a key": (
        lambda f: (f / "manifest.json").write_text('{"layers": [0]}'),
        ["manifest.json: not what extract.py writes (poolings)"],
    ),
    "not complete": (
        lambda f: change_manifest(f, complete=False),
        [" is not complete: run extract.py again with the same command"],
    ),
    "no English train": (
        lambda f: change_manifest(f, inputs={"dev.en.tsv": {"rows": 13}}),
        ["the search needs train.en and a dev or test file, it holds dev.en"],
    ),
    "nothing to score": (
        lambda f: change_manifest(f, inputs={"train.en.tsv": {"rows": 41}}),
        ["the search needs train.en and a dev or test file, it holds train.en"],
    ),
    "a file is missing": (
        lambda f: (f / "test.zh.max.npy").unlink(),
        ["test.zh.max.npy does not exist: run extract.py again"],
    ),
    "labels are missing": (
        lambda f: (f / "dev.de.labels.npy").unlink(),
        ["dev.de.labels.npy does not exist"],
    ),
    "NaN": (
        lambda f: change_array(f / "dev.de.max.npy", lambda a: a.__setitem__((2, 3, 1), np.nan)),
        ["dev.de.max.npy holds values that are not finite numbers: run extract.py again"],
    ),
    "infinity": (
        lambda f: change_array(f / "train.en.mean.npy", lambda a: a.__setitem__((1, 0, 0), np.inf)),
        ["train.en.mean.npy holds values that are not finite numbers"],
    ),
    "cut short": (
        lambda f: (f / "test.en.max.npy").write_bytes((f / "test.en.max.npy").read_bytes()[:-100]),
        ["test.en.max.npy is damaged or cut short", "run extract.py again"],
    ),
    "empty file": (
        lambda f: (f / "test.en.max.npy").write_bytes(b""),
        ["test.en.max.npy is damaged or cut short"],
    ),
    "not an array": (
        lambda f: (f / "test.en.max.npy").write_bytes(b"text" * 99),
        ["test.en.max.npy is damaged or cut short"],
    ),
    "an archive": (
        lambda f: np.savez(open(f / "test.en.max.npy", "wb"), a=np.zeros(3)),
        ["test.en.max.npy is damaged or cut short"],
    ),
    "pickled objects": (
        lambda f: np.save(f / "dev.en.max.npy", np.array([{}, None]), allow_pickle=True),
        ["dev.en.max.npy is damaged or cut short"],
    ),
    "another shape": (
        lambda f: change_array(f / "train.en.max.npy", lambda a: a[:, :-1]),
        ["train.en.max.npy has shape (6, 40, 9)", "expected (6, 41, 9)"],
    ),
    "another hidden size": (
        lambda f: change_manifest(f, hidden_size=8),
        ["has shape (6, 41, 9)", "expected (6, 41, 8)"],
    ),
    "text": (
        lambda f: np.save(f / "train.en.max.npy", np.full((6, 41, 9), "a")),
        ["has shape (6, 41, 9) and type <U1"],
    ),
    "fewer labels than rows": (
        lambda f: change_array(f / "dev.de.labels.npy", lambda a: a[1:]),
        ["dev.de.labels.npy has shape (12,)"],
    ),
    "label too high": (
        lambda f: change_array(f / "test.de.labels.npy", lambda a: a.__setitem__(3, 4)),
        ["test.de.labels.npy holds classes outside 0..3"],
    ),
    "label too low": (
        lambda f: change_array(f / "train.en.labels.npy", lambda a: a.__setitem__(3, -1)),
        ["train.en.labels.npy holds classes outside 0..3"],
    ),
    "labels are fractions": (
        lambda f: change_array(f / "train.en.labels.npy", lambda a: a + 0.5),
        ["train.en.labels.npy has shape (41,) and type float64", "(41,) of integers"],
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_features_are_one_sentence(run, features, tmp_path, kind):
    damage, phrases = BROKEN[kind]
    shutil.copytree(features, tmp_path / "broken")
    damage(tmp_path / "broken")
    refused(run(features=tmp_path / "broken"), str(tmp_path / "broken"), *phrases)
    assert (
        not (tmp_path / "grid/results.csv").exists() and not (tmp_path / "grid/best.json").exists()
    )


def test_labels_of_a_smaller_integer_type_are_read(run, grid, features, tmp_path):
    shutil.copytree(features, tmp_path / "small")
    for path in (tmp_path / "small").glob("*.labels.npy"):
        change_array(path, lambda array: array.astype(np.int32))
    assert run(features=tmp_path / "small")[0] == 0
    assert report(tmp_path / "grid") == report(grid)


@pytest.mark.parametrize(
    "arguments, phrase",
    [
        (("--layers", 4, 6), "--layers 6: "),
        (("--layers", -1), "--layers -1: "),
        (("--layers", 2, 4, 2), "--layers 2 4 2: "),
        (("--layers", 2, 4, 2), "is named twice"),
        (("--layers", *range(15)), "--layers: 15 layers have 32,767 combinations; name 14 at most"),
        (("--poolings", "max", "max"), "--poolings max max: one is named twice"),
        (("--lr", 0.1, "1e-1"), "--lr 0.1 0.1: one is named"),
        (("--poolings", "median"), "argument --poolings: invalid choice: 'median'"),
        (("--scale", "row"), "--scale: invalid choice"),
        (("--over",), "unrecognized arguments: --over"),
        (("--seeds", 0), "--seeds: 0, expected 1 or more"),
        (("--epochs", 0), "--epochs: 0, expected 1 or more"),
        (("--batch-size", 0), "--batch-size: 0, expected 1 or more"),
        (("--hidden", -1), "--hidden: -1, expected 0 or more"),
        (("--dropout", 1), "--dropout: 1, expected 0 or more and less than 1"),
        (("--lr", 0), "--lr: 0, expected more than 0"),
        (("--lr", "nan"), "--lr: nan, expected more than 0"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(run, tmp_path, arguments, phrase):
    refused(run(*arguments), phrase)
    assert not (tmp_path / "grid").exists()


def test_what_the_features_lack_is_refused_before_anything_is_trained(
    run, features, tmp_path, trainings
):
    shutil.copytree(features, tmp_path / "old")
    change_manifest(tmp_path / "old", poolings=NAMES[:2], layers=[0, 1, 3, 4, 5, 9])
    refused(
        run("--poolings", *reversed(NAMES[:3]), "--layers", 1, features=tmp_path / "old"),
        f"--poolings {NAMES[2]}: ",
        f"{tmp_path / 'old'} holds {' '.join(NAMES[:2])}",
    )
    refused(
        run("--poolings", "max", "--layers", 1, 2, 9, features=tmp_path / "old"), "--layers 2: "
    )
    assert trainings.made == [] and not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    "arguments, phrase",
    [
        (("--seeds", 3), "seeds was 2, is now 3"),
        (("--hidden", 3), "hidden was 0, is now 3"),
        (("--layers", 1, 2), "layers was [1, 2, 4], is now [1, 2]"),
        (("--poolings", "max"), "poolings was ["),
        (("--lr", 0.1), "lr was [0.02, 0.3], is now [0.1]"),
        (("--dropout", 0.2), "dropout was 0.1, is now 0.2"),
        (("--precision", "bf16"), "precision was 'float32', is now 'bfloat16'"),
        (("--scale", "layer"), "scale was 'none', is now 'layer'"),
    ],
)
def test_another_setting_over_the_same_folder_is_refused_by_name(run, grid, arguments, phrase):
    before = report(grid)
    refused(
        run(*arguments, out=grid), f"{grid} was made with other settings: ", phrase, "--overwrite"
    )
    assert report(grid) == before


def test_features_made_anew_after_the_search_are_noticed(run, features, tmp_path):
    shutil.copytree(features, tmp_path / "features")
    assert run(features=tmp_path / "features")[0] == 0
    change_manifest(tmp_path / "features", revision="2")
    refused(
        run("--select", "en", features=tmp_path / "features"),
        "was made with other settings: manifest was ",
    )
    assert run("--overwrite", features=tmp_path / "features")[0] == 0


def test_a_folder_that_holds_something_else_is_refused(run, tmp_path):
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid/thesis.txt").write_text("mine")
    refused(run(), f"{tmp_path / 'grid'} holds thesis.txt but no run.json")
    refused(run("--overwrite"), f"{tmp_path / 'grid'} holds thesis.txt but no run.json")
    assert (tmp_path / "grid/thesis.txt").read_text() == "mine"
