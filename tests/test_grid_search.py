"""grid_search.py against classifiers trained one at a time, scikit-learn's scores, and a ranking made from results.csv."""
import csv
import json
import re
import shutil
from itertools import combinations as choose

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import confusion_matrix, f1_score

import grid_search
from device import keep_mask
from files import UserError
from grid_search import confusion_matrices, train_models
from ranking import Results, choices, macro_f1, micro_f1, rank as best_first

CPU = torch.device("cpu")


def subset(model, layers):
    """The layers (counted from 0) that model number `model` uses, as the module's docstring numbers them."""
    return [layer for layer in range(layers) if model // 2 ** layer % 2]


# --- the joint training against one classifier at a time ---------------------------------------------------------

LAYERS, ROWS, SIZE, CLASSES = 3, 23, 5, 4  # 23 rows are 3 batches of 7 and one of 2; 5 values are not a multiple of 4


def odd_case(rows=ROWS, seed=0):
    """Random features (L, N, D) in float64 and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(LAYERS, rows, SIZE, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (rows,), generator=generator))


def train_alone(features, labels, used, seed, *, hidden, epochs, batch_size, lr, dropout):
    """One classifier in a plain loop: nn.Linear on the layers `used` side by side, torch.optim.Adam, one seed."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1

    layers, rows, size = features.shape
    units, inputs = hidden or CLASSES, len(used) * size
    draws, bias = [uniform(size, units) for _ in range(layers)], uniform(units)
    first = torch.nn.Linear(inputs, units, dtype=torch.float64)
    first.weight.data = torch.cat([draws[layer] for layer in used]).T / inputs ** 0.5
    first.bias.data = bias / inputs ** 0.5
    modules = [first]
    if hidden:
        last = torch.nn.Linear(hidden, CLASSES, dtype=torch.float64)
        last.weight.data = uniform(hidden, CLASSES).T / hidden ** 0.5
        last.bias.data = uniform(CLASSES) / hidden ** 0.5
        modules += [torch.nn.ReLU(), last]
    net = torch.nn.Sequential(*modules)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(epochs):
        order = torch.randperm(rows, generator=generator)
        for start in range(0, rows, batch_size):
            batch = order[start:start + batch_size]
            x, after = features[:, batch], 1
            if dropout:
                x = x * keep_mask((layers, len(batch), size), dropout, CPU, generator) / (1 - dropout)
                if hidden:
                    after = keep_mask((len(batch), hidden, 1), dropout, CPU, generator)[:, :, 0] / (1 - dropout)
            out = first(torch.cat([x[layer] for layer in used], dim=1))
            if hidden:
                out = last(out.relu() * after)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(out, labels[batch]).backward()
            optimizer.step()
    return net


@pytest.fixture(scope="module", params=[(0, 0.0), (0, 0.3), (3, 0.0), (3, 0.3)],
                ids=["plain", "dropout", "hidden", "hidden-dropout"])
def trained(request):
    """All subsets of three layers, seeds 4 and 9, trained together; and the settings, for training them alone."""
    settings = dict(hidden=request.param[0], epochs=4, batch_size=7, lr=0.05, dropout=request.param[1])
    return train_models(*odd_case(), CLASSES, [4, 9], dtype=torch.float64, **settings), settings


@pytest.mark.parametrize("model", range(1, 2 ** LAYERS))
@pytest.mark.parametrize("seed", [4, 9])
def test_every_model_comes_out_as_if_trained_alone(trained, model, seed):
    (weights, rest), settings = trained
    used, s = subset(model, LAYERS), [4, 9].index(seed)
    net = train_alone(*odd_case(), used, seed, **settings)
    first = net[0].weight.detach().T.unflatten(0, (len(used), SIZE))                            # (layers used, D, K)
    for k, layer in enumerate(used):
        # the columns of a layer's matrix are its models in rising order, for each unit
        column = [m for m in range(2 ** LAYERS) if layer in subset(m, LAYERS)].index(model)
        mine = weights[layer][s].detach().unflatten(1, (-1, 2 ** (LAYERS - 1)))[:, :, column]
        torch.testing.assert_close(mine, first[k], rtol=0, atol=1e-9)
    expected = [net[0].bias.detach(), *([net[2].weight.detach().T, net[2].bias.detach()] if settings["hidden"] else [])]
    assert len(rest) == len(expected)
    for mine, alone in zip(rest, expected):
        torch.testing.assert_close(mine[s, ..., model].detach(), alone, rtol=0, atol=1e-9)

    features, labels = odd_case(rows=29, seed=1)
    with torch.no_grad():
        predicted = net(torch.cat([features[layer] for layer in used], dim=1)).argmax(1)
    matrices = confusion_matrices(weights, rest, features, labels, CLASSES, chunk=8)
    assert matrices.shape == (2, 2 ** LAYERS, CLASSES, CLASSES)
    assert np.array_equal(matrices[s, model], confusion_matrix(labels, predicted, labels=range(CLASSES)))


def test_training_moves_the_weights_it_compares():
    """Guards the test above against comparing untrained weights: four epochs bring the loss well down."""
    features, labels = odd_case()
    settings = dict(hidden=0, batch_size=7, lr=0.05, dropout=0.0)
    start, end = (train_alone(features, labels, [0, 1, 2], 4, epochs=epochs, **settings) for epochs in (0, 4))
    x = torch.cat(list(features), dim=1)
    before, after = (torch.nn.functional.cross_entropy(net(x), labels).item() for net in (start, end))
    assert after < 0.7 * before


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_seed_is_trained_the_same_beside_any_others(hidden):
    settings = dict(hidden=hidden, epochs=2, batch_size=7, dropout=0.3, dtype=torch.float64)
    (together, rest), (alone, rest_alone) = (train_models(*odd_case(), CLASSES, seeds, **settings) for seeds in ([7, 2, 5], [2]))
    for mine, other in zip([*together, *rest], [*alone, *rest_alone]):
        torch.testing.assert_close(mine[1:2], other, rtol=0, atol=1e-12)


def test_progress_is_called_once_a_step():
    calls = []
    train_models(*odd_case(), CLASSES, [0], epochs=3, batch_size=7, dtype=torch.float64, progress=lambda: calls.append(1))
    assert len(calls) == 3 * 4


@pytest.mark.parametrize("epochs, loss", [(1, r"[\d.]+"), (3, "nan")])  # in the last step, and earlier
def test_weights_that_are_not_finite_are_an_error(epochs, loss):
    features, labels = odd_case()
    with pytest.raises(UserError, match=rf"the search's weights are not finite, its loss is {loss}: .*--lr 1e\+39 not too high"):
        train_models(features.float(), labels, CLASSES, [0], lr=1e39, epochs=epochs)


@pytest.mark.parametrize("dropout", [0.1, 0.37, 0.5, 0.9])
def test_dropout_keeps_its_share_of_the_values_everywhere(dropout):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    mask = torch.stack([keep_mask((31, 53, 37), dropout, CPU, g) for g in generators])  # 60,791 values, no multiple of 4
    assert mask.shape == (2, 31, 53, 37) and mask.dtype == torch.int16
    error = 5 * (dropout * (1 - dropout) / (31 * 53 * 37)) ** 0.5  # five standard deviations
    assert ((mask.double().mean((1, 2, 3)) - (1 - dropout)).abs() < error).all()
    for axes in ((0, 1, 2), (0, 1, 3), (0, 2, 3)):  # no row, layer or value is favoured
        share = mask.double().mean(axes)
        count = mask.numel() / share.numel()
        assert ((share - (1 - dropout)).abs() < 6 * (dropout * (1 - dropout) / count) ** 0.5).all()
    together = (mask[0] == mask[1]).double().mean()  # the seeds are independent
    assert abs(together - (dropout ** 2 + (1 - dropout) ** 2)) < 0.02


# --- scores and choices ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [2, 3, 5])
def test_scores_are_those_of_scikit_learn(classes):
    random = np.random.default_rng(classes)
    pairs = [(random.integers(classes, size=19), random.integers(classes, size=19)) for _ in range(6)]
    pairs += [(np.zeros(19, int), np.zeros(19, int)), (np.zeros(19, int), np.ones(19, int))]  # all right, all wrong
    matrices = np.stack([confusion_matrix(*pair, labels=range(classes)) for pair in pairs]).reshape(2, 4, classes, classes)
    for name, score in (("micro", micro_f1), ("macro", macro_f1)):
        expected = [f1_score(*pair, labels=range(classes), average=name, zero_division=0) for pair in pairs]
        np.testing.assert_allclose(score(matrices), np.reshape(expected, (2, 4)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(micro_f1(matrices).ravel(), [np.mean(true == predicted) for true, predicted in pairs], atol=1e-12)


def test_confusion_matrices_are_counted_over_all_chunks():
    features, labels = odd_case(rows=29)
    weights, rest = train_models(features, labels, CLASSES, [0, 1], epochs=1, dtype=torch.float64)
    whole = confusion_matrices(weights, rest, features, labels, CLASSES)
    assert (whole.sum((-2, -1)) == 29).all()
    assert (whole.sum(-1) == np.bincount(labels, minlength=CLASSES)).all()  # rows are the true classes
    assert np.array_equal(whole, confusion_matrices(weights, rest, features, labels, CLASSES, chunk=4))


def test_ties_go_to_fewer_layers_then_to_lower_ones_then_to_the_first_pooling():
    combinations, poolings = [(5,), (6,), (5, 6), (7,), (5, 7)], ["max", "mean"]

    def best(*winners):
        scores = np.full((2, 5), 0.3)
        for p, m in winners:
            scores[p, m] = 0.7 + 1e-12 * m  # a difference in the last bits is a tie
        p, m = best_first(scores, combinations)[0]
        return poolings[p], list(combinations[m])

    assert best((0, 4), (0, 2)) == ("max", [5, 6])
    assert best((0, 4), (0, 3)) == ("max", [7])
    assert best((1, 1), (0, 3), (0, 2)) == ("mean", [6])
    assert best((1, 1), (0, 1)) == ("max", [6])
    assert best((1, 4)) == ("mean", [5, 7])
    assert best() == ("max", [5])


def test_each_protocol_chooses_by_its_own_files():
    files = ["dev.en", "dev.de", "dev.zh", "test.en", "test.de", "test.zh"]
    f1 = np.full((1, 7, 2, 6), 0.1)
    for m, file in enumerate(files):
        f1[0, m, 0, file == np.array(files)] = 0.9
    f1[0, 6, :, 1:3] = 0.4    # the mean over de and zh is highest here, neither alone: 0.5 + 0.1 over two seeds
    f1[0, 5, :, 4:6] = 0.45
    combinations = [(m,) for m in range(7)]
    confusion = np.stack([f1, 1 - f1, 0 * f1, 0 * f1], -1).reshape(*f1.shape, 2, 2)  # all rows are of the first class
    chosen, oracle = choices(Results(confusion, ["cls"], combinations, files))
    assert chosen == {"en": (0, 0), "joint": (0, 6), "test": (0, 5)}
    assert oracle == {"en": (0, 0), "de": (0, 1), "zh": (0, 2)}
    chosen, oracle = choices(Results(confusion[..., :1, :, :], ["cls"], combinations, files[:1]))
    assert (chosen, oracle) == ({"en": (0, 0)}, {"en": (0, 0)})


# --- the script --------------------------------------------------------------------------------------------------

LABELS = ["refund", "agent", "delivery", "cancel"]
COUNTS = {"train.en": 41, "dev.en": 13, "dev.de": 13, "dev.zh": 13, "test.en": 17, "test.de": 17, "test.zh": 17}
POOLINGS = ["max", "mean", "cls"]
FAST = ("--layers", 1, 2, 4, "--seeds", 2, "--epochs", 3, "--batch-size", 16, "--precision", "fp32")


def make_features(folder, layers=6, size=9, noise=(3, 1, 0.6, 2, 0.4, 1.5), counts=COUNTS):
    """Write a feature folder by hand: class centres plus noise, of a different strength in each layer and language."""
    random = np.random.default_rng(0)
    folder.mkdir()
    centres = random.normal(size=(layers, 4, size))
    for stem, count in counts.items():
        labels = np.random.default_rng(len(stem) + count).integers(4, size=count)
        labels[:4] = range(4)
        np.save(folder / f"{stem}.labels.npy", labels)
        for pooling, more in zip(POOLINGS, (0.5, 0.8, 1.2)):
            strength = np.array(noise[:layers])[:, None, None] * more * {"en": 1, "de": 1.3, "zh": 1.6}[stem[-2:]]
            values = centres[:, labels] + strength * random.normal(size=(layers, count, size))
            np.save(folder / f"{stem}.{pooling}.npy", values.astype(np.float16))
    (folder / "manifest.json").write_text(json.dumps({
        "format": 1, "complete": True, "model": "toy", "revision": "1", "layers": list(range(layers)), "poolings": POOLINGS,
        "hidden_size": size, "dtype": "float16", "max_length": 33, "labels": LABELS,
        "inputs": {f"{stem}.tsv": {"sha256": "0", "rows": count} for stem, count in counts.items()}}))
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return make_features(tmp_path_factory.mktemp("features") / "toy")


@pytest.fixture(scope="module")
def grid(features, tmp_path_factory):
    """A finished search: 7 combinations of layers 1, 2, 4 x 3 poolings x 2 seeds."""
    out = tmp_path_factory.mktemp("grid") / "toy"
    grid_search.main(["--features", str(features), "--out", str(out), *map(str, FAST)])
    return out


@pytest.fixture
def run(script, features, tmp_path):
    """run("--flag", value, ...) searches the toy features to tmp_path/grid unless told otherwise."""
    def call(*arguments, features=features, out=tmp_path / "grid"):
        return script("grid_search", "--features", features, "--out", out, *FAST, *arguments)
    return call


def refused(result, *phrases):
    """The one line that a run printed as it exited with status 2; it holds all `phrases`."""
    code, _, err = result
    message = err.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in err and message.startswith("grid_search.py: error: "), result
    for phrase in phrases:
        assert phrase in message, message
    return message


def read_results(out):
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def rank(rows, columns):
    """An independent ranking of results.csv: (pooling, layers) from best to worst by the mean of some columns."""
    scores = {}
    for row in rows:
        key = row["pooling"], tuple(map(int, row["layers"].split("+")))
        scores.setdefault(key, []).append(np.mean([float(row[column]) for column in columns]))
    return sorted(scores, key=lambda key: (-round(np.mean(scores[key]), 5), len(key[1]), key[1], POOLINGS.index(key[0])))


def columns_of(protocol):
    return {"en": ["dev_en"], "joint": ["dev_de", "dev_zh"], "test": ["test_de", "test_zh"]}[protocol]


def report(out):
    """The files of a grid folder that must not depend on how often the search was stopped."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".csv" or path.name == "best.json"}


def without_training(monkeypatch):
    monkeypatch.setattr(grid_search, "train_models", lambda *_, **__: pytest.fail("a model was trained again"))


def test_results_have_a_row_for_each_model_and_a_column_for_each_file(grid):
    rows = read_results(grid)
    assert list(rows[0]) == ["pooling", "layers", "hidden", "seed", "dev_en", "dev_de", "dev_zh", "test_en", "test_de", "test_zh"]
    names = {"+".join(map(str, layers)) for n in (1, 2, 3) for layers in choose((1, 2, 4), n)}
    expected = {(pooling, layers, "0", seed) for pooling in POOLINGS for layers in names for seed in "01"}
    assert len(rows) == 42 and {(row["pooling"], row["layers"], row["hidden"], row["seed"]) for row in rows} == expected
    for row in rows:
        for column in list(row)[4:]:
            right = float(row[column]) * COUNTS[column.replace("_", ".")]
            assert 0 <= right <= 17 and abs(right - round(right)) < 1e-4  # a fraction of the file's rows
    assert len({row["test_zh"] for row in rows}) > 5


def test_a_row_is_the_score_of_that_model_trained_alone(grid, features):
    train = np.load(features / "train.en.mean.npy").astype(np.float64), np.load(features / "train.en.labels.npy")
    test = np.load(features / "test.de.mean.npy").astype(np.float64), np.load(features / "test.de.labels.npy")
    layers = torch.from_numpy(train[0])[[1, 2, 4]].float()
    weights, rest = train_models(layers, torch.from_numpy(train[1]), 4, [1], epochs=3, batch_size=16)
    wide = np.concatenate([test[0][layer] for layer in (1, 4)], axis=1)                         # layers 1+4: model 0b101
    column = [m for m in range(8) if m & 1].index(5), [m for m in range(8) if m & 4].index(5)
    matrix = np.concatenate([weights[layer].detach()[0].unflatten(1, (4, 4))[:, :, c].numpy() for layer, c in zip((0, 2), column)])
    predicted = (wide @ matrix + rest[0][0, :, 5].detach().numpy()).argmax(1)
    row, = [row for row in read_results(grid) if (row["pooling"], row["layers"], row["seed"]) == ("mean", "1+4", "1")]
    assert abs(float(row["test_de"]) - f1_score(test[1], predicted, average="micro")) < 1e-6


@pytest.mark.parametrize("select", ["joint", "en", "test"])
def test_the_choice_is_the_first_of_a_ranking_made_from_the_results(run, grid, tmp_path, monkeypatch, select):
    shutil.copytree(grid, tmp_path / "grid")
    before = (grid / "results.csv").read_bytes()
    without_training(monkeypatch)
    code, out, _ = run("--select", select)
    assert code == 0 and (tmp_path / "grid/results.csv").read_bytes() == before
    rows = read_results(grid)
    best = json.loads((tmp_path / "grid/best.json").read_text())
    assert best["select"] == select and (best["pooling"], tuple(best["layers"])) == rank(rows, columns_of(select))[0]
    for protocol in ("en", "joint", "test"):
        pooling, layers = rank(rows, columns_of(protocol))[0]
        assert best["protocols"][protocol] == {"layers": list(layers), "pooling": pooling}
    for language in ("en", "de", "zh"):
        pooling, layers = rank(rows, [f"dev_{language}"])[0]
        assert best["per_language"][language] == {"layers": list(layers), "pooling": pooling}
    assert (best["hidden"], best["model"]) == (0, "toy") and f"chosen: {best['pooling']} pooling of layers" in out


def test_the_summary_ranks_as_the_results_do(grid):
    rows, text = read_results(grid), re.sub(" +", " ", (grid / "summary.md").read_text())
    lines = re.findall(r"^\| (\d+) \| (\w+) \| ([\d+]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert [line[0] for line in lines] == [str(number) for number in range(1, 11)]
    assert [(line[1], tuple(map(int, line[2].split("+")))) for line in lines] == rank(rows, columns_of("joint"))[:10]
    for _, pooling, layers, score, spread, paper, paper_spread in lines:
        mine = [row for row in rows if (row["pooling"], row["layers"]) == (pooling, layers)]
        for shown, shown_spread, columns in ((score, spread, columns_of("joint")), (paper, paper_spread, columns_of("test"))):
            means = [100 * np.mean([float(row[column]) for column in columns]) for row in mine]
            assert abs(float(shown) - np.mean(means)) < 0.006 and abs(float(shown_spread) - np.std(means, ddof=1)) < 0.006
    scores = {(row["layers"], row["pooling"], row["seed"]): np.mean([float(row[column]) for column in columns_of("joint")]) for row in rows}
    for layer, with_it, without, difference in re.findall(r"^\| ([124]) \| ([\d.]+) \| ([\d.]+) \| ([+-][\d.]+) \| .*$", text, re.M):
        has = 100 * np.mean([score for key, score in scores.items() if layer in key[0].split("+")])
        lacks = 100 * np.mean([score for key, score in scores.items() if layer not in key[0].split("+")])
        np.testing.assert_allclose([float(with_it), float(without), float(difference)], [has, lacks, has - lacks], atol=0.006)
    assert "42 models (7 combinations x 3 poolings x 2 seeds)" in text and "ms a model" in text
    single = next(key for key in rank(rows, columns_of("joint")) if len(key[1]) == 1)
    assert f"Best single layer: {single[1][0]} ({single[0]}, " in text
    best_pooling = max(POOLINGS, key=lambda pooling: np.mean([score for key, score in scores.items() if key[1] == pooling]))
    assert f"Best pooling, averaged over all combinations: {best_pooling} (" in text


def test_the_summary_shows_each_protocols_scores(grid):
    best, text = json.loads((grid / "best.json").read_text()), re.sub(" +", " ", (grid / "summary.md").read_text())
    names = [[layer for layer, bit in ((1, 1), (2, 2), (4, 4)) if m & bit] for m in range(1, 8)]
    parts = {(pooling, seed): np.load(grid / f"parts/{pooling}.{seed}.npz")["confusion"] for pooling in POOLINGS for seed in (0, 1)}

    def scores(choice, file, average):
        """scikit-learn's F1 in percent, over the seeds, from the rows that a confusion matrix counts."""
        matrices = [parts[choice["pooling"], seed][file, names.index(choice["layers"])] for seed in (0, 1)]
        pairs = [np.repeat(np.indices((4, 4)).reshape(2, -1), matrix.ravel(), axis=1) for matrix in matrices]
        return np.mean([100 * f1_score(*pair, labels=range(4), average=average, zero_division=0) for pair in pairs])

    for protocol in ("en", "joint", "oracle", "test"):
        shown, = re.findall(rf"^\| {protocol} \| [^|]* \| (.*) \|$", text, re.M)
        languages = ["en", "de", "zh"]
        choices = [best["per_language"][language] if protocol == "oracle" else best["protocols"][protocol] for language in languages]
        micro = [scores(choice, file, "micro") for file, choice in enumerate(choices, 3)]  # test.en, test.de, test.zh
        macro = [scores(choice, file, "macro") for file, choice in enumerate(choices, 3)]
        expected = [*micro, np.mean(micro[1:]), np.mean(macro[1:])]
        np.testing.assert_allclose([float(value) for value in shown.split(" | ")], expected, rtol=0, atol=0.006)


def test_confusion_files_hold_the_chosen_models_counts(grid):
    best, rows = json.loads((grid / "best.json").read_text()), read_results(grid)
    name = best["pooling"], "+".join(map(str, best["layers"]))
    assert sorted(path.name for path in grid.glob("confusion.*")) == [f"confusion.{language}.csv" for language in ("de", "en", "zh")]
    for language in ("en", "de", "zh"):
        with open(grid / f"confusion.{language}.csv", newline="") as file:
            header, *lines = csv.reader(file)
        assert header == ["true \\ predicted", *LABELS] and [line[0] for line in lines] == LABELS
        matrix = np.array([line[1:] for line in lines], dtype=int)
        mine = [float(row[f"test_{language}"]) for row in rows if (row["pooling"], row["layers"]) == name]
        assert matrix.sum() == 2 * 17 and abs(np.trace(matrix) / 17 - sum(mine)) < 1e-4  # summed over the two seeds


def test_one_more_hidden_layer_and_one_pooling(run, tmp_path):
    code, out, _ = run("--hidden", 3, "--poolings", "cls")
    assert code == 0 and "x 1 poolings x 2 seeds = 14 models" in out
    rows = read_results(tmp_path / "grid")
    assert len(rows) == 14 and {(row["pooling"], row["hidden"]) for row in rows} == {("cls", "3")}
    assert json.loads((tmp_path / "grid/best.json").read_text())["hidden"] == 3


def test_layer_0_and_layers_out_of_order(run, tmp_path):
    assert run("--layers", 5, 0, "--poolings", "max")[0] == 0
    assert {row["layers"] for row in read_results(tmp_path / "grid")} == {"0", "5", "0+5"}


def test_features_without_test_or_other_languages(run, tmp_path):
    counts = {"train.en": 41, "dev.en": 13}
    alone = make_features(tmp_path / "alone", counts=counts)
    refused(run(features=alone), "--select joint: the features hold no file to choose by, only dev.en")
    assert run("--select", "en", features=alone)[0] == 0
    assert json.loads((tmp_path / "grid/best.json").read_text())["protocols"].keys() == {"en"}
    assert list(read_results(tmp_path / "grid")[0]) == ["pooling", "layers", "hidden", "seed", "dev_en"]
    assert "nan" not in (tmp_path / "grid/summary.md").read_text()


# --- stopping and going on ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("poolings", [0, 1, 2])
def test_a_stopped_search_goes_on_and_ends_the_same(run, grid, tmp_path, monkeypatch, poolings):
    trained, whole = [], grid_search.train_models

    def stopping(*arguments, **more):
        if len(trained) == poolings:
            raise KeyboardInterrupt
        trained.append(arguments[3])
        return whole(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(grid_search, "train_models", stopping)
        assert run()[0] == 130
    assert not (tmp_path / "grid/results.csv").exists() and len(list((tmp_path / "grid").glob("parts/*.npz"))) == 2 * poolings
    trained.clear()
    monkeypatch.setattr(grid_search, "train_models", lambda *arguments, **more: trained.append(arguments[3]) or whole(*arguments, **more))
    assert run()[0] == 0 and trained == [[0, 1]] * (3 - poolings)
    assert report(tmp_path / "grid") == report(grid)


def test_one_lost_part_is_trained_again_alone(run, grid, tmp_path, monkeypatch):
    shutil.copytree(grid, tmp_path / "grid")
    (tmp_path / "grid/parts/mean.1.npz").unlink()
    trained, whole = [], grid_search.train_models
    monkeypatch.setattr(grid_search, "train_models", lambda *arguments, **more: trained.append(arguments[3]) or whole(*arguments, **more))
    assert run()[0] == 0 and trained == [[1]]
    assert report(tmp_path / "grid") == report(grid)


@pytest.mark.parametrize("damage", [lambda raw: raw[:len(raw) // 2], lambda raw: b"", lambda raw: b"PK" + raw[:50]])
def test_a_damaged_part_is_named(run, grid, tmp_path, damage):
    shutil.copytree(grid, tmp_path / "grid")
    path = tmp_path / "grid/parts/mean.1.npz"
    path.write_bytes(damage(path.read_bytes()))
    refused(run(), f"{path} is damaged or cut short", "delete it, and run the search again")


def test_a_part_of_another_shape_is_named(run, grid, tmp_path):
    shutil.copytree(grid, tmp_path / "grid")
    path = tmp_path / "grid/parts/mean.1.npz"
    np.savez(path, confusion=np.zeros((6, 3, 4, 4), np.int32), seconds=1.0)
    refused(run(), f"{path} has shape (6, 3, 4, 4), expected (6, 7, 4, 4)")


# --- precision ---------------------------------------------------------------------------------------------------

def test_bf16_products_rank_the_combinations_as_fp32_does():
    layers, size, counts = 5, 13, {"train": 211, "test": 503}
    random = np.random.default_rng(3)
    centres = random.normal(size=(layers, 4, size))
    made = {}
    for name, count in counts.items():
        labels = random.integers(4, size=count)
        noise = np.array([6, 3, 2, 4, 1.5])[:, None, None] * random.normal(size=(layers, count, size))
        made[name] = torch.from_numpy(centres[:, labels] + noise), torch.from_numpy(labels)
    scores = {}
    for precision in (torch.float32, torch.bfloat16):
        features, labels = made["train"]
        models = train_models(features.to(precision), labels, 4, [0, 1, 2], epochs=6, batch_size=64, lr=1e-2)
        assert {weight.dtype for weight in models[0] + models[1]} == {torch.float32}
        matrices = confusion_matrices(*models, made["test"][0].to(precision), made["test"][1], 4)
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
    "manifest is no JSON": (lambda f: (f / "manifest.json").write_text("{"), ["manifest.json is not valid JSON"]),
    "manifest lacks a key": (lambda f: (f / "manifest.json").write_text('{"layers": [0]}'), ["manifest.json: expected 'hidden_size' to be a whole number"]),
    "not complete": (lambda f: change_manifest(f, complete=False), [" is not complete: run extract.py again with the same command"]),
    "no English train": (lambda f: change_manifest(f, inputs={"dev.en.tsv": {"rows": 13}}),
                         ["the search needs train.en and a dev or test file, it holds dev.en"]),
    "nothing to score": (lambda f: change_manifest(f, inputs={"train.en.tsv": {"rows": 41}}),
                         ["the search needs train.en and a dev or test file, it holds train.en"]),
    "a file is missing": (lambda f: (f / "test.zh.max.npy").unlink(), ["test.zh.max.npy does not exist: run extract.py again"]),
    "labels are missing": (lambda f: (f / "dev.de.labels.npy").unlink(), ["dev.de.labels.npy does not exist"]),
    "NaN": (lambda f: change_array(f / "dev.de.max.npy", lambda a: a.__setitem__((2, 3, 1), np.nan)),
            ["dev.de.max.npy holds values that are not finite numbers: run extract.py again"]),
    "infinity": (lambda f: change_array(f / "train.en.mean.npy", lambda a: a.__setitem__((1, 0, 0), np.inf)),
                 ["train.en.mean.npy holds values that are not finite numbers"]),
    "cut short": (lambda f: (f / "test.en.max.npy").write_bytes((f / "test.en.max.npy").read_bytes()[:-100]),
                  ["test.en.max.npy is damaged or cut short", "run extract.py again"]),
    "empty file": (lambda f: (f / "test.en.max.npy").write_bytes(b""), ["test.en.max.npy is damaged or cut short"]),
    "not an array": (lambda f: (f / "test.en.max.npy").write_bytes(b"text" * 99), ["test.en.max.npy is damaged or cut short"]),
    "an archive": (lambda f: np.savez(open(f / "test.en.max.npy", "wb"), a=np.zeros(3)), ["test.en.max.npy is damaged or cut short"]),
    "pickled objects": (lambda f: np.save(f / "dev.en.max.npy", np.array([{}, None]), allow_pickle=True),
                        ["dev.en.max.npy is damaged or cut short"]),
    "another shape": (lambda f: change_array(f / "train.en.max.npy", lambda a: a[:, :-1]),
                      ["train.en.max.npy has shape (6, 40, 9)", "expected (6, 41, 9)"]),
    "another hidden size": (lambda f: change_manifest(f, hidden_size=8), ["has shape (6, 41, 9)", "expected (6, 41, 8)"]),
    "text": (lambda f: np.save(f / "train.en.max.npy", np.full((6, 41, 9), "a")), ["has shape (6, 41, 9) and type <U1"]),
    "fewer labels than rows": (lambda f: change_array(f / "dev.de.labels.npy", lambda a: a[1:]), ["dev.de.labels.npy has shape (12,)"]),
    "label too high": (lambda f: change_array(f / "test.de.labels.npy", lambda a: a.__setitem__(3, 4)),
                       ["test.de.labels.npy holds classes outside 0..3"]),
    "label too low": (lambda f: change_array(f / "train.en.labels.npy", lambda a: a.__setitem__(3, -1)),
                      ["train.en.labels.npy holds classes outside 0..3"]),
    "labels are fractions": (lambda f: change_array(f / "train.en.labels.npy", lambda a: a + 0.5),
                             ["train.en.labels.npy has shape (41,) and type float64", "(41,) of integers"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_features_are_one_sentence(run, features, tmp_path, kind):
    damage, phrases = BROKEN[kind]
    shutil.copytree(features, tmp_path / "broken")
    damage(tmp_path / "broken")
    refused(run(features=tmp_path / "broken"), str(tmp_path / "broken"), *phrases)
    assert not (tmp_path / "grid/results.csv").exists() and not (tmp_path / "grid/best.json").exists()


def test_labels_of_a_smaller_integer_type_are_read(run, grid, features, tmp_path):
    shutil.copytree(features, tmp_path / "small")
    for path in (tmp_path / "small").glob("*.labels.npy"):
        change_array(path, lambda array: array.astype(np.int32))
    assert run(features=tmp_path / "small")[0] == 0
    assert report(tmp_path / "grid") == report(grid)


@pytest.mark.parametrize("arguments, phrase", [
    (("--layers", 4, 6), "--layers 6: the model has layers 0 (embeddings) to 5"),
    (("--layers", -1), "--layers -1: the model has layers 0 (embeddings) to 5"),
    (("--layers", 2, 4, 2), "--layers 2 4 2: a layer is named twice"),
    (("--layers", *range(15)), "--layers: 15 layers have 32,767 combinations; name 14 at most"),
    (("--poolings", "max", "max"), "--poolings max max: a pooling is named twice"),
    (("--poolings", "median"), "argument --poolings: invalid choice: 'median'"),
    (("--seeds", 0), "--seeds: 0, expected 1 or more"), (("--epochs", 0), "--epochs: 0, expected 1 or more"),
    (("--batch-size", 0), "--batch-size: 0, expected 1 or more"), (("--hidden", -1), "--hidden: -1, expected 0 or more"),
    (("--dropout", 1), "--dropout: 1, expected 0 or more and less than 1"), (("--lr", 0), "--lr: 0, expected more than 0"),
    (("--lr", "nan"), "--lr: nan, expected more than 0")])
def test_bad_flags_are_refused_before_anything_is_written(run, tmp_path, arguments, phrase):
    refused(run(*arguments), phrase)
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize("arguments, phrase", [
    (("--seeds", 3), "seeds was 2, is now 3"), (("--hidden", 3), "hidden was 0, is now 3"),
    (("--layers", 1, 2), "layers was [1, 2, 4], is now [1, 2]"), (("--poolings", "max"), "poolings was ["),
    (("--lr", 0.1), "lr was 0.001, is now 0.1"), (("--dropout", 0.2), "dropout was 0.1, is now 0.2"),
    (("--precision", "bf16"), "precision was 'float32', is now 'bfloat16'")])
def test_another_setting_over_the_same_folder_is_refused_by_name(run, grid, arguments, phrase):
    before = report(grid)
    refused(run(*arguments, out=grid), f"{grid} was made with other settings: ", phrase, "--overwrite")
    assert report(grid) == before


def test_features_made_anew_after_the_search_are_noticed(run, features, tmp_path):
    shutil.copytree(features, tmp_path / "features")
    assert run(features=tmp_path / "features")[0] == 0
    change_manifest(tmp_path / "features", revision="2")
    refused(run("--select", "en", features=tmp_path / "features"), "was made with other settings: manifest was ")
    assert run("--overwrite", features=tmp_path / "features")[0] == 0


def test_a_folder_that_holds_something_else_is_refused(run, tmp_path):
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid/thesis.txt").write_text("mine")
    refused(run(), f"{tmp_path / 'grid'} holds thesis.txt but no run.json: give another --out, or --overwrite")
    assert (tmp_path / "grid/thesis.txt").read_text() == "mine"
