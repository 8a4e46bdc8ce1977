"""grid_search.py against classifiers trained one at a time, scikit-learn's scores, a ranking made
from results.csv; and the model that it saves against the texts' own states."""

import csv
import json
import re
import shutil
from itertools import combinations as choose
from itertools import product

import numpy as np
import pytest
import torch
from conftest import LABELS as TOY_LABELS
from conftest import make_data, make_model, refused
from conftest import table as data_rows
from scipy.stats import spearmanr
from sklearn.metrics import confusion_matrix, f1_score
from transformers import AutoModel, AutoTokenizer

import extract
import grid_search
from grid_search import Recipe, f1_scores, one_model, scaled, scaling, train_models
from lib.messages import UserError
from model import POOLINGS, load_model


@pytest.fixture(scope="module", autouse=True)
def small_pool():
    """Dropout's masks are cut from 8 million values; drawing a thousand is quicker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid_search, "MASK_LENGTH", 997)
        yield


# --- the joint training against one classifier at a time ------------------------------------------

LAYERS, ROWS, SIZE, CLASSES = (2, 3, 7), 23, 5, 4  # 23 rows are 3 batches of 7 and one of 2
SUBSETS = [combination for n in (1, 2, 3) for combination in choose(LAYERS, n)]
FOUR = Recipe(epochs=4, batch_size=7)


def odd_case(rows=ROWS, seed=0):
    """Random features (L, N, D) in float64 and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(LAYERS), rows, SIZE, generator=generator, dtype=torch.float64)
    return features, torch.randint(CLASSES, (rows,), generator=generator)


def train_alone(features, labels, used, seed, lr, recipe):
    """One classifier in a plain loop: nn.Linear on the layers `used` (places) side by side."""
    hidden, epochs, batch_size, dropout = recipe
    generator = torch.Generator().manual_seed(seed)
    layers, rows, size = features.shape
    length = max(997, 2 * layers * batch_size * max(size, hidden))
    pool = torch.rand(length, generator=torch.Generator().manual_seed(0))

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=features.dtype) * 2 - 1

    def drop(values):
        """Dropout by the next window of the pool."""
        start = torch.randint(len(pool) - values.numel(), (), generator=generator)
        window = pool[start : start + values.numel()].view(values.shape)
        return values * (window >= dropout) / (1 - dropout)

    units, inputs = hidden or CLASSES, len(used) * size
    draws, bias = [uniform(size, units) for _ in range(layers)], uniform(units)
    net = torch.nn.Sequential(torch.nn.Linear(inputs, units, dtype=features.dtype))
    net[0].weight.data = torch.cat([draws[layer] for layer in used]).T / inputs**0.5
    net[0].bias.data = bias / inputs**0.5
    if hidden:
        net.extend([torch.nn.ReLU(), torch.nn.Linear(hidden, CLASSES, dtype=features.dtype)])
        net[2].weight.data = uniform(hidden, CLASSES).T / hidden**0.5
        net[2].bias.data = uniform(CLASSES) / hidden**0.5
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
    return net.requires_grad_(False)


@pytest.fixture(
    scope="module",
    params=[(0, 0.0), (0, 0.3), (3, 0.0), (3, 0.3)],
    ids=["plain", "dropout", "hidden", "hidden-dropout"],
)
def trained(request):
    """All subsets of three layers, seeds 4 and 9, trained together; and their recipe."""
    recipe = FOUR._replace(hidden=request.param[0], dropout=request.param[1])
    calls = []
    weights = train_models(
        *odd_case(), CLASSES, [4, 9], 0.05, recipe, torch.float64, lambda: calls.append(1)
    )
    assert len(calls) == 4 * 4  # progress, once a step
    return weights, recipe


@pytest.mark.parametrize("combination", SUBSETS)
@pytest.mark.parametrize("seed", [4, 9])
def test_every_model_comes_out_as_if_trained_alone(trained, combination, seed):
    (weights, recipe), s = trained, [4, 9].index(seed)
    used = [LAYERS.index(layer) for layer in combination]
    net = train_alone(*odd_case(), used, seed, 0.05, recipe)
    together = one_model(weights, LAYERS, combination, s).state_dict()
    assert together.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-9)
    features, labels = odd_case(rows=29, seed=1)
    guess = net(torch.cat([features[layer] for layer in used], dim=1)).argmax(1)
    number = sum(2**layer for layer in used)  # a model's number has a bit for each of its layers
    for chunk in (8, 512):
        scores = f1_scores(weights, features, labels, CLASSES, chunk)
        for average, ours in zip(("micro", "macro"), scores):
            assert ours.shape == (2, 8)
            assert abs(ours[s, number] - f1_score(labels, guess, average=average)) < 1e-12


@pytest.mark.parametrize("epochs, loss", [(1, r"[\d.]+"), (3, "nan")])  # last step, and earlier
def test_weights_that_are_not_finite_are_an_error(epochs, loss):
    features, labels = odd_case()
    message = rf"weights are not finite, its loss is {loss}: .*--lr 1e\+39 not too high"
    with pytest.raises(UserError, match=message):
        train_models(features.float(), labels, CLASSES, [0], 1e39, Recipe(epochs=epochs))


# --- the script -----------------------------------------------------------------------------------

LABELS = ["refund", 'an "agent"', "late, lost", "cancel"]
COUNTS = {"train.en": 41} | dict.fromkeys(("dev.en", "dev.de", "dev.zh"), 13)
COUNTS |= dict.fromkeys(("test.en", "test.de", "test.zh"), 17)
FILES = [name.replace(".", "_") for name in COUNTS if name != "train.en"]
NAMES, RATES = list(POOLINGS), [0.02, 0.3]
FAST = ["--layers", 1, 2, 4, "--seeds", 2, "--epochs", 3, "--batch-size", 16, "--precision", "fp32"]
FAST += ["--scale", "none", "--lr", 0.3, 0.02]
RECIPE = Recipe(epochs=3, batch_size=16)
MODELS = 7 * 2 * 2 * len(POOLINGS)  # combinations, rates, seeds, poolings


def make_features(folder, counts=COUNTS):
    """Write a feature folder by hand, of 6 layers and hidden size 9: class centres plus noise, of a
    different strength in each layer, pooling and language."""
    random = np.random.default_rng(0)
    folder.mkdir()
    centres = random.normal(size=(6, 4, 9))
    noise = np.array([3, 2.5, 2.1, 2, 1.8, 1.5])[:, None, None]
    for stem, count in counts.items():
        labels = np.random.default_rng(len(stem) + count).integers(4, size=count)
        labels[:4] = range(4)
        np.save(folder / f"{stem}.labels.npy", labels)
        for p, pooling in enumerate(NAMES):
            strength = noise * (0.5 + 0.35 * p) * {"en": 1, "de": 1.3}.get(stem[-2:], 1.6)
            values = centres[:, labels] + strength * random.normal(size=(6, count, 9))
            np.save(folder / f"{stem}.{pooling}.npy", values.astype(np.float16))
    manifest = {"complete": True, "model": "toy", "layers": list(range(6)), "poolings": NAMES}
    manifest |= {"hidden_size": 9, "labels": LABELS, "pairs": False, "revision": "1"}
    manifest["inputs"] = {f"{stem}.tsv": {"rows": count} for stem, count in counts.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
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
    """run("--flag", value, ...) searches the toy features to tmp_path/grid, or as told."""

    def call(*arguments, features=features, out=tmp_path / "grid"):
        return script("grid_search", "--features", features, "--out", out, *FAST, *arguments)

    return call


@pytest.fixture
def trainings(monkeypatch):
    """The (rate, seeds) of each training. `stop` in it raises KeyboardInterrupt at that one."""
    whole = train_models

    def watched(features, labels, classes, seeds, lr, *more, **named):
        if len(watched.made) == watched.stop:
            raise KeyboardInterrupt
        watched.made.append((lr, list(seeds)))
        return whole(features, labels, classes, seeds, lr, *more, **named)

    watched.stop, watched.made = None, []
    monkeypatch.setattr(grid_search, "train_models", watched)
    return watched


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
    """An independent ranking of results.csv: (pooling, layers, lr) by the mean of some columns."""
    scores = {key: round(np.mean(values), 5) for key, values in scores_by(rows, columns).items()}
    at_best = {}
    for pooling, layers, lr in sorted(scores, key=lambda key: (-scores[key], key[2])):
        at_best.setdefault((pooling, layers), lr)
    keys = [(*key, lr) for key, lr in at_best.items()]
    return sorted(keys, key=lambda k: (-scores[k], len(k[1]), k[1], NAMES.index(k[0])))


def described(key):
    return {"pooling": key[0], "layers": list(key[1]), "lr": key[2]}


def joined(layers):
    return "+".join(map(str, layers))


COLUMNS = {"en": ["dev_en"], "joint": ["dev_de", "dev_zh"], "test": ["test_de", "test_zh"]}


def report(out):
    """The files of a grid folder that must not depend on how often the search was stopped."""
    names = [p.name for p in out.iterdir() if p.suffix == ".csv" or p.name == "best.json"]
    return {name: (out / name).read_bytes() for name in names}


def guesses(features, choice, seed, stem):
    """The classes that one model, trained alone, gives the rows of a file; and the true ones."""
    values, labels = {}, {}
    for name in ("train.en", stem):
        array = np.load(features / f"{name}.{choice['pooling']}.npy")[[1, 2, 4]]
        values[name] = torch.from_numpy(array).float()
        labels[name] = torch.from_numpy(np.load(features / f"{name}.labels.npy"))
    used = [(1, 2, 4).index(layer) for layer in choice["layers"]]
    net = train_alone(values["train.en"], labels["train.en"], used, seed, choice["lr"], RECIPE)
    return net(torch.cat([values[stem][place] for place in used], 1)).argmax(1), labels[stem]


def test_results_have_a_row_for_each_model_and_a_column_for_each_file(grid):
    rows = read_results(grid)
    assert list(rows[0]) == ["pooling", "layers", "hidden", "lr", "seed", *FILES]
    names = "1 2 4 1+2 1+4 2+4 1+2+4".split()
    expected = set(product(NAMES, names, "0", ("0.02", "0.3"), "01"))
    assert len(rows) == MODELS and {tuple(row.values())[:5] for row in rows} == expected


@pytest.mark.parametrize("select", ["joint", "en", "test"])
def test_the_choice_is_the_first_of_a_ranking_made_from_the_results(
    run, grid, tmp_path, trainings, select
):
    shutil.copytree(grid, tmp_path / "grid")
    code, out, _ = run("--select", select)
    rows, best = read_results(grid), best_json(tmp_path / "grid")
    assert code == 0 and trainings.made == [(best["lr"], [0, 1])]  # the chosen one, once more
    assert (tmp_path / "grid/results.csv").read_bytes() == (grid / "results.csv").read_bytes()
    languages, protocols = {}, {}
    for language in ("en", "de", "zh"):
        languages[language] = described(rank(rows, [f"dev_{language}"])[0])
    for protocol, columns in COLUMNS.items():
        protocols[protocol] = described(rank(rows, columns)[0])
    assert best == {
        **protocols[select],
        "select": select,
        "hidden": 0,
        "model": "toy",
        "train_language": "en",
        "per_language": languages,
        "protocols": protocols,
    }
    choice = f"{best['pooling']} of {joined(best['layers'])}, lr {best['lr']}"
    assert f"The choice: {choice}." in out


def table(out, header):
    """The rows of the one table of summary.md whose header begins with these cells."""
    text = re.sub(" +", " ", (out / "summary.md").read_text())
    _, after = text.split(f"\n| {header} |")
    rows = after.split("\n\n")[0].splitlines()[2:]
    return [row.strip("| ").split(" | ") for row in rows]


def close(shown, expected):
    np.testing.assert_allclose([*map(float, shown)], expected, rtol=0, atol=0.011)


def test_the_summary_ranks_as_the_results_do(grid):
    rows, lines = read_results(grid), table(grid, "rank | pooling | layers | lr")
    order = rank(rows, COLUMNS["joint"])[:10]
    for place, (key, line) in enumerate(zip(order, lines, strict=True), 1):
        pooling, layers, lr = key
        assert line[:4] == [str(place), pooling, joined(layers), str(lr)]
        expected = []
        for name in ("joint", "test"):
            seeds = 100 * np.array(scores_by(rows, COLUMNS[name])[key])
            expected += [seeds.mean(), seeds.std(ddof=1)]
        close(line[4:], expected)
    assert float(lines[0][5]) > 0  # a deviation to see


def test_the_summary_says_what_layers_and_poolings_are_worth_at_each_rate_and_at_the_best(grid):
    rows, columns = read_results(grid), COLUMNS["joint"]
    scores = {key: 100 * np.mean(values) for key, values in scores_by(rows, columns).items()}

    def mean(keys):
        return np.mean([scores[key] for key in keys])

    order = rank(rows, columns)
    for layer, *shown in table(grid, "layer | with it"):
        has = mean(key for key in order if int(layer) in key[1])
        lacks = mean(key for key in order if int(layer) not in key[1])
        alone = {key[0]: scores[key] for key in order if key[1] == (int(layer),)}
        close(shown, [has, lacks, has - lacks, *(alone[pooling] for pooling in NAMES)])
    names = []
    for name, *means, single, best, gain in table(grid, "lr | mean: max"):
        names.append(name)
        if name != "each at its best":
            order = rank([row for row in rows if row["lr"] == name], columns)
        else:
            order = rank(rows, columns)
        close(means, [mean(key for key in order if key[0] == pooling) for pooling in NAMES])
        first = [key for key in order if len(key[1]) == 1][0], order[0]
        shown = [f"{joined(key[1])} {key[0]} {scores[key]:.2f}" for key in first]
        assert shown == [single, best]
        close([gain], [scores[first[1]] - scores[first[0]]])
    assert names == ["0.02", "0.3", "each at its best"]


def test_the_summary_shows_each_protocols_scores(grid, features):
    """scikit-learn's F1 of models trained alone: each language's, and the means over the others."""
    best, lines = best_json(grid), {line[0]: line for line in table(grid, "protocol | choice")}
    assert list(lines) == ["en", "joint", "oracle", "test"]
    for protocol, (_, choice, *shown) in lines.items():
        f1 = {"micro": [], "macro": []}
        for language in ("en", "de", "zh"):
            pick = best["protocols"].get(protocol, best["per_language"][language])
            if protocol != "oracle":
                assert f"{pick['pooling']} of {joined(pick['layers'])}" in choice
            pairs = [guesses(features, pick, seed, f"test.{language}") for seed in (0, 1)]
            for average, values in f1.items():
                scores = [f1_score(true, guess, average=average) for guess, true in pairs]
                values.append(100 * np.mean(scores))
        close(shown, [*f1["micro"], np.mean(f1["micro"][1:]), np.mean(f1["macro"][1:])])


def test_confusion_files_hold_the_chosen_models_counts(grid, features):
    assert len(list(grid.glob("confusion.*"))) == 3
    for language in ("en", "de", "zh"):
        expected = 0  # added up over the two seeds
        for seed in (0, 1):
            guess, true = guesses(features, best_json(grid), seed, f"test.{language}")
            expected += confusion_matrix(true, guess, labels=range(4))
        with open(grid / f"confusion.{language}.csv", newline="") as file:
            header, *lines = csv.reader(file)
        assert header == ["true \\ predicted", *LABELS] and [line[0] for line in lines] == LABELS
        assert np.array_equal(np.array([line[1:] for line in lines], int), expected)
    assert (expected != expected.T).any()


def test_bf16_products_rank_the_combinations_as_fp32_does(run, grid, tmp_path):
    assert run("--precision", "bf16")[0] == 0
    means = []
    for out in (grid, tmp_path / "grid"):
        by_key = scores_by(read_results(out), FILES)
        means.append([np.mean(seeds) for seeds in by_key.values()])
    assert np.ptp(means[0]) > 0.3 and means[0] != means[1]
    assert spearmanr(*means).statistic > 0.9


def test_one_more_hidden_layer_one_pooling_and_layer_0(run, tmp_path):
    code, out, _ = run("--hidden", 3, "--poolings", "cls", "--lr", 0.1, "--layers", 5, 0)
    size = "6 models (3 combinations x 1 poolings x 1 learning rates x 2 seeds, hidden layer of 3)"
    assert code == 0 and size in out
    cells = {tuple(row.values())[:3] for row in read_results(tmp_path / "grid")}
    assert cells == {("cls", layers, "3") for layers in ("0", "5", "0+5")}
    assert best_json(tmp_path / "grid")["hidden"] == 3
    assert len(table(tmp_path / "grid", "lr | mean: cls")) == 1


@pytest.mark.parametrize("files", [["dev.en"], ["dev.en", "test.en"], ["dev.en", "test.de"]])
def test_where_there_is_no_other_language_to_choose_by(run, tmp_path, files):
    folder = make_features(tmp_path / "alone", dict.fromkeys(["train.en", *files], 41))
    code, out, _ = run(features=folder)
    assert code == 0 and "no other language has a dev file: the choice is by that of en" in out
    rows, best = read_results(tmp_path / "grid"), best_json(tmp_path / "grid")
    assert best["select"] == "en" and described(rank(rows, ["dev_en"])[0]).items() <= best.items()
    assert list(rows[0])[5:] == [stem.replace(".", "_") for stem in files]
    assert "nan" not in (tmp_path / "grid/summary.md").read_text()
    if "test.de" not in files:
        refused(run("--select", "test", features=folder), "--select test: ", "(possible: en)")


# --- the source language --------------------------------------------------------------------------


def test_another_source_language(run, tmp_path):
    sets = ["dev.es", "dev.en", "dev.zh_Hant", "test.es", "test.en", "test.zh_Hant"]
    assert (
        run(features=make_features(tmp_path / "es", dict.fromkeys(["train.es", *sets], 17)))[0] == 0
    )
    rows, best = read_results(tmp_path / "grid"), best_json(tmp_path / "grid")
    columns = [stem.replace(".", "_", 1) for stem in sets]
    assert list(rows[0])[5:] == columns and best["train_language"] == "es"
    for protocol, by in (("en", columns[:1]), ("joint", columns[1:3]), ("test", columns[4:])):
        assert best["protocols"][protocol] == described(rank(rows, by)[0])
    assert described(rank(rows, columns[2:3])[0]) == best["per_language"]["zh_Hant"]
    assert (tmp_path / "grid/confusion.zh_Hant.csv").exists()
    line = table(tmp_path / "grid", "protocol | choice | es | en | zh_Hant | paper F1")[1]
    close(line[-2:-1], np.mean([float(value) for value in line[3:5]]))


def test_which_train_file_is_the_sources(run, tmp_path):
    both = make_features(tmp_path / "both", dict.fromkeys(["train.de", "train.en", "dev.fr"], 13))
    for language, arguments in (("en", ()), ("de", ("--train-language", "de"))):
        assert run(*arguments, "--select", "joint", features=both, out=tmp_path / language)[0] == 0
        assert best_json(tmp_path / language)["train_language"] == language
    assert read_results(tmp_path / "en") != read_results(tmp_path / "de")
    other = run("--train-language", "fr", features=both)
    refused(other, "the search needs train.fr", "train.de train.en")
    neither = make_features(tmp_path / "neither", dict.fromkeys(["train.de", "train.es"], 13))
    refused(run(features=neither), "the search needs train.en and a dev or test file, it holds")
    assert not (tmp_path / "grid").exists()


# --- stopping and going on ------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 3])
def test_a_stopped_search_goes_on_and_ends_the_same(run, grid, tmp_path, trainings, calls):
    trainings.stop = calls
    assert run()[0] == 130
    assert not (tmp_path / "grid/results.csv").exists()
    assert len(list((tmp_path / "grid").glob("parts/*.npz"))) == 2 * calls
    trainings.stop, trainings.made[:] = None, []
    assert run()[0] == 0
    assert len(trainings.made) == len(NAMES) * len(RATES) - calls + 1  # and the chosen one
    assert report(tmp_path / "grid") == report(grid)


def test_a_part_that_is_lost_is_trained_again_alone(run, grid, tmp_path, trainings):
    shutil.copytree(grid, tmp_path / "grid")
    parts = tmp_path / "grid/parts"
    assert (parts / "max.0.3.0.npz").stat().st_size < 4000  # scores, and no C x C matrices
    (parts / "max.0.02.1.npz").unlink()
    assert run()[0] == 0 and trainings.made[:-1] == [(0.02, [1])]
    assert report(tmp_path / "grid") == report(grid)


def test_processes_share_the_models_evenly(run, monkeypatch, tmp_path):
    shares = []
    for rank in (1, 2):
        monkeypatch.setattr(grid_search, "start_processes", lambda rank=rank: (rank, 3))
        assert run("--seeds", 5, out=tmp_path / str(rank))[0] == 0
        shares.append({path.name for path in (tmp_path / str(rank)).glob("parts/*")})
    jobs = len(NAMES) * len(RATES) * 5
    assert [len(share) for share in shares] == [jobs // 3, jobs // 3] and not shares[0] & shares[1]


# --- the saved model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """An encoder of five blocks, a data set, and its features of float32, which scale badly."""
    folder = tmp_path_factory.mktemp("texts")
    model, data = make_model(folder / "model"), make_data(folder / "data", train=41)
    flags = ["--model", model, "--data", data, "--out", folder / "features", "--max-length", 33]
    extract.main([*map(str, flags), "--dtype", "float32", "--precision", "fp32"])
    return folder


def scaled_case(texts, pooling, stem):
    """The features of layers 0, 2, 3 as --scale layer makes them, by NumPy: (L, N, D); labels."""
    train = np.load(texts / f"features/train.en.{pooling}.npy").astype(np.float64)[[0, 2, 3]]
    values = np.load(texts / f"features/{stem}.{pooling}.npy").astype(np.float64)[[0, 2, 3]]
    mean = train.mean(1, keepdims=True)
    spread = np.sqrt(((train - mean) ** 2).mean((1, 2), keepdims=True))
    spread[spread < 1e-5] = np.inf  # [CLS] of the embeddings
    labels = np.load(texts / f"features/{stem}.labels.npy")
    return torch.from_numpy((values - mean) / spread).float(), torch.from_numpy(labels)


SEARCH = ["--layers", 0, 2, 3, "--seeds", 3, "--epochs", 9, "--batch-size", 16, "--lr", 0.01]
SEARCH += ["--precision", "fp32", "--save-model"]


@pytest.mark.parametrize("hidden, pooling", [(0, "max"), (0, "cls"), (3, "mean")])
def test_the_saved_model_labels_texts_as_the_mean_of_classifiers_trained_alone(
    script, texts, tmp_path, hidden, pooling
):
    out = tmp_path / "grid"
    flags = ["--features", texts / "features", "--out", out, *SEARCH, "--hidden", hidden]
    code, said, _ = script("grid_search", *flags, "--poolings", pooling)
    rows, best, seeds = read_results(out), best_json(out), [0, 1, 2]
    made = "the mean of 3 seeds' classifiers"
    if hidden:
        scores = scores_by(rows, COLUMNS["joint"])[pooling, tuple(best["layers"]), best["lr"]]
        seeds = [int(np.argmax(np.round(scores, 9)))]
        made = f"the classifier of seed {seeds[0]}, the best by joint"
    assert code == 0 and f"grid/model: {made}; 0 of 90 rows are labelled " in said

    # classifiers trained one at a time on features scaled by NumPy: of all layers, for the search
    recipe = Recipe(hidden=hidden, epochs=9, batch_size=16)
    train, labels = scaled_case(texts, pooling, "train.en")
    values, true = scaled_case(texts, pooling, "test.de")
    for seed, row in enumerate(row for row in rows if row["layers"] == "0+2+3"):
        net = train_alone(train, labels, [0, 1, 2], seed, 0.01, recipe)
        guess = net(torch.cat(list(values), 1)).argmax(1)
        score = f1_score(true, guess, average="micro")
        assert float(row["test_de"]) == pytest.approx(score)

    # of the chosen ones, for the saved model, which reads texts
    used = [(0, 2, 3).index(layer) for layer in best["layers"]]
    nets = [train_alone(train, labels, used, seed, best["lr"], recipe) for seed in seeds]
    tokenizer, model = AutoTokenizer.from_pretrained(out / "model"), load_model(out / "model")
    values, _ = scaled_case(texts, pooling, "test.zh")
    side_by_side = torch.cat([values[place] for place in used], 1)
    expected = torch.stack([net(side_by_side) for net in nets]).mean(0)
    lines = [row[0] for row in data_rows(texts / "data/test.zh.tsv")]
    with torch.no_grad():
        logits = model.eval()(tokenizer(lines, padding=True, return_tensors="pt"))
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
    assert expected.std() > 0.1
    blocks = AutoModel.from_pretrained(out / "model").config.num_hidden_layers
    saved = json.loads((out / "model/classifier.json").read_text())
    assert blocks == max(best["layers"]) and saved["layers"] == best["layers"]
    assert (saved["labels"], saved["pairs"], saved["hidden"]) == (TOY_LABELS, False, hidden)


def test_a_layer_that_is_the_same_in_every_row_is_zeros():
    features = torch.full((1, 7, 5), 0.37)
    assert not scaled(features, scaling(features), torch.float32).any()


def test_rows_that_the_saved_model_labels_otherwise_are_counted(
    script, texts, tmp_path, monkeypatch
):
    whole = grid_search.mean_classifier

    def negated(*arguments):
        classifier = whole(*arguments)
        for parameter in classifier.parameters():
            parameter.data *= -1
        return classifier

    monkeypatch.setattr(grid_search, "mean_classifier", negated)
    flags = ["--features", texts / "features", "--out", tmp_path / "grid", *SEARCH]
    _, out, _ = script("grid_search", *flags, "--poolings", "max")
    assert re.search(r"90 of 90 rows are .*, the two best of which are within \d", out)


@pytest.mark.parametrize("key", ["revision", "tokenizer"])
def test_a_model_that_is_not_the_features_any_more_is_refused(script, texts, tmp_path, key):
    features, out = shutil.copytree(texts / "features", tmp_path / "features"), tmp_path / "grid"
    change_manifest(features, **{key: "another"})
    result = script("grid_search", "--features", features, "--out", out, *SEARCH)
    refused(result, "--save-model: ", "has changed since", "run extract.py again")
    assert not out.exists()


# --- bad input ------------------------------------------------------------------------------------


def change_manifest(folder, **values):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BROKEN = [  # the manifest's changes, and what the message must hold
    ({"complete": False}, " is not complete: run extract.py again with the same command"),
    ({"poolings": NAMES[:2]}, f"--poolings {NAMES[2]}: "),
]


@pytest.mark.parametrize("changes, phrase", BROKEN)
def test_broken_features_are_one_sentence(run, features, tmp_path, changes, phrase):
    folder = shutil.copytree(features, tmp_path / "broken")
    change_manifest(folder, **changes)
    refused(run(features=folder), str(folder), phrase)
    assert not (tmp_path / "grid/results.csv").exists()


@pytest.mark.parametrize(
    "arguments, phrase",
    [
        (("--layers", 4, 6), "--layers 6: "),
        (("--layers", *range(15)), "--layers: 15 layers have 32,767 combinations; name 14 at most"),
        (("--lr", 0.1, "1e-1"), "--lr 0.1 0.1: one is named twice"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(run, tmp_path, arguments, phrase):
    refused(run(*arguments), phrase)
    assert not (tmp_path / "grid").exists()


def test_another_search_over_the_same_folder_is_refused(run, grid, features, tmp_path):
    before, changed = report(grid), shutil.copytree(features, tmp_path / "changed")
    refused(run("--seeds", 3, "--hidden", 3, out=grid), "hidden was 0, is now 3", "--overwrite")
    change_manifest(changed, revision="2")
    refused(run(out=grid, features=changed), "was made with other settings: manifest was ")
    assert report(grid) == before


def test_running_out_of_memory_is_one_sentence(run, monkeypatch):
    def full(*_, **named):
        raise MemoryError("Unable to allocate 12.5 GiB")

    monkeypatch.setattr(grid_search, "train_models", full)
    refused(run(), "out of memory (Unable to allocate 12.5 GiB", "name fewer --layers")
