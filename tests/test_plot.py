"""plot.py: what is drawn is what the files say."""

import importlib
import json
import struct

import matplotlib
import numpy as np
import pytest
from conftest import refused

import plot


@pytest.fixture
def draw(script, monkeypatch, tmp_path):
    """draw("grid", folder, ...) runs plot.py: {name: figure}."""
    save = plot.save

    def run(*arguments):
        figures = {}

        def keep(figure, out, name):
            figures[name] = figure
            save(figure, out, name)

        monkeypatch.setattr(plot, "save", keep)
        status, out, error = script("plot", *arguments, "--out", tmp_path / "figures")
        assert status == 0, error
        assert out.split() == [f"{tmp_path}/figures/{name}.png" for name in figures]
        return figures

    return run


def texts(artists):
    return [artist.get_text().strip() for artist in artists]


@pytest.fixture
def grid(tmp_path):
    """A grid folder with two poolings of layers 3, 7 and both, two rates, two seeds, and known
    scores; the first rate is better on dev, the second on test, but for both layers together."""
    lines = ["pooling,layers,hidden,lr,seed,dev_en,dev_de,test_en,test_de,test_zh_Hant"]
    for p, pooling in enumerate(("max", "cls")):
        for m, layers in enumerate(("3", "7", "3+7")):
            for lr, worse in ((0.01, 0), (0.03, 0.1)):
                for seed in range(2):
                    de, zh = 0.5 + 0.1 * m - 0.05 * p + 0.01 * seed + worse, 0.3 + 0.1 * m + worse
                    if worse and m == 2:
                        de = zh = 0.11
                    scores = f"0.9,{0.8 - worse},0.9,{de},{zh}"
                    lines.append(f"{pooling},{layers},0,{lr},{seed},{scores}")
    folder = tmp_path / "grid"
    folder.mkdir()
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    (folder / "best.json").write_text('{"train_language": "en", "select": "joint"}')
    (folder / "confusion.de.csv").write_text("true \\ predicted,a,b\na,3,1\nb,0,4\n")
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two systems, one of two seeds that froze after epoch 1 and 2."""
    folders = []
    for name, seed, frozen in (("base", 0, []), ("wf-seed0", 0, [9]), ("wf-seed1", 1, [9])):
        folder = tmp_path / name
        folder.mkdir()
        arguments = {"seed": seed, "freeze_layers": frozen, "train_language": "en"}
        run = {"arguments": arguments, "labels": ["a", "b"], "pairs": False, "data": {}}
        (folder / "run.json").write_text(json.dumps(run | {"complete": True}))
        lines = []
        for epoch in (1, 2, 3):
            row = {"epoch": epoch, "accuracy": 0.1 * epoch + 0.02 * seed}
            row["frozen_layers"] = frozen if epoch > 1 + seed else []
            for split, language in ("train", ""), ("dev", "en"), ("dev", "zh"), ("dev", "de"):
                lines.append(json.dumps(row | {"split": split, "language": language}) + "\n")
        (folder / "metrics.jsonl").write_text("".join(lines))
        folders.append(folder)
    return folders


def test_importing_it_changes_nothing_in_a_notebook():
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.use("svg")
        before = dict(matplotlib.rcParams)
        importlib.reload(plot)
        assert dict(matplotlib.rcParams) == before and matplotlib.get_backend() == "svg"


def test_the_search_is_drawn_as_the_results_say(grid, draw, tmp_path):
    figures = draw("grid", grid)
    assert list(figures) == ["search-ranking", "search-single"]
    (axis,) = figures["search-ranking"].axes
    best = [60.25, 50.25, 40.25]  # max pooling at the rate that dev prefers
    np.testing.assert_allclose(axis.lines[0].get_ydata(), best)
    assert "languages but en" in axis.get_ylabel()
    assert texts(figures["search-single"].legends[0].get_texts()) == ["en", "de", "zh_Hant"]
    bars = figures["search-single"].axes[1].containers[1]  # cls, de
    np.testing.assert_allclose(bars[0].get_ydata(), [45.5, 55.5])
    header = (tmp_path / "figures/search-single.png").read_bytes()[:24]
    assert struct.unpack(">I", header[16:20])[0] == 2100  # a page of 7 inches


def test_a_search_from_another_source_and_one_in_the_source_alone(grid, draw):
    (grid / "best.json").write_text('{"train_language": "zh_Hant", "select": "test"}')
    (axis,) = draw("grid", grid)["search-ranking"].axes
    # the rate is test's choice, and what is shown the mean of en and de
    assert axis.lines[0].get_ydata()[0] == pytest.approx(100 * (0.9 + 0.705) / 2)
    lines = (grid / "results.csv").read_text().splitlines()
    lines = [line.rsplit(",", 4)[0] for line in lines if ",0.03," not in line]
    (grid / "results.csv").write_text("\n".join(lines) + "\n")
    (grid / "best.json").write_text('{"train_language": "en", "select": "en"}')
    figures = draw("grid", grid)
    assert list(figures) == ["search-ranking", "search-single"]
    (axis,) = figures["search-ranking"].axes
    assert "dev\nin en" in axis.get_ylabel() and axis.lines[0].get_ydata()[0] == 90


def test_training_curves_means_bands_and_the_freezing_moment(runs, draw):
    figure = draw("training", *runs)["training-dev"]
    shown = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    assert list(shown) == ["en", "zh", "de", "mean of all but the source", "train"]
    base, wf, *frozen = shown["zh"].lines
    np.testing.assert_allclose(base.get_ydata(), [10, 20, 30])
    np.testing.assert_allclose(wf.get_ydata(), [11, 21, 31])  # the mean of two seeds
    assert [line.get_xdata()[0] for line in frozen] == [1, 2]
    band = shown["zh"].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(10) and band[:, 1].max() == pytest.approx(32)
    assert texts(figure.legends[0].get_texts()) == ["base", "wf"]


def test_each_runs_mean_is_of_the_languages_other_than_its_own_source(runs, draw):
    for folder, source in zip(runs, ("zh", "de")):
        path = folder / "run.json"
        path.write_text(path.read_text().replace('"en"', f'"{source}"'))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        rows[2]["accuracy"] = 0.7  # zh at epoch 1
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    panel = draw("training", *runs[:2])["training-dev"].axes[3]
    assert panel.lines[0].get_ydata()[0] == pytest.approx(10)  # of en and de
    assert panel.lines[1].get_ydata()[0] == pytest.approx((10 + 70) / 2)  # of en and zh


def test_names_are_text_and_no_mathematics(runs, grid, tmp_path, draw):
    """`$5_{` is broken as mathematics, and a legend leaves `_x` out."""
    names = ["under $5_{ or $9", "_x"]
    for folder, name in zip(runs, names):
        folder.rename(tmp_path / name)
    figure = draw("training", *(tmp_path / name for name in names))["training-dev"]
    assert texts(figure.legends[0].get_texts()) == names
    (grid / "confusion.zh_Hant.csv").write_text("true \\ predicted,$5_{,$9\n$5_{,3,1\n$9,0,4\n")
    ticks = draw("confusion", grid)["confusion"].axes[1].get_xticklabels()
    assert texts(ticks) == ["$5_{", "$9"] and not any(tick.get_parse_math() for tick in ticks)


def test_confusion_shows_shares_of_the_true_class(grid, draw):
    axis = draw("confusion", grid)["confusion"].axes[0]
    np.testing.assert_allclose(axis.images[0].get_array(), [[75, 25], [0, 100]])
    assert axis.get_title() == "de  (micro-F1 87.5)"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["grid", "."], "best.json does not exist"),
        (["confusion", "."], "holds no confusion.LANG.csv: grid_search.py writes"),
        (["training", "base", "--split", "test"], "evaluated on test (train.py --track-test)"),
        (["differences", "results"], "compares no two systems"),
    ],
)
def test_what_is_missing_is_one_sentence(arguments, message, runs, tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/results.json").write_text('{"systems": [{}], "baseline": "base"}')
    refused(script("plot", *arguments, "--out", "figures"), message)


def test_differences_and_their_intervals(tmp_path, draw):
    """Of two seeds a filled mark and a dot for each; of one seed a hollow mark."""
    entry = {"difference": 0.02, "low": -0.01, "high": 0.06, "seeds": 2, "by_seed": [-0.02, 0.06]}
    two = {"en": entry, "others": entry | {"difference": 0.03}}
    one = {"others": entry | {"seeds": 1, "by_seed": [0.02]}}
    systems = [
        {"name": "base"},
        {"name": "wf", "difference": two},
        {"name": "x", "difference": one},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"baseline": "base", "systems": systems}))
    (axis,) = draw("differences", tmp_path)["differences"].axes
    assert texts(axis.get_yticklabels()) == ["en", "others"]
    points, _, (bars,) = axis.containers[0]
    np.testing.assert_allclose(points.get_xdata(), [2, 3])
    np.testing.assert_allclose(bars.get_segments()[0][:, 0], [-1, 6])
    dots = [line.get_xdata() for line in axis.lines if line.get_markersize() == 2]
    np.testing.assert_allclose(dots, [[-2, 6], [-2, 6]])
    hollow = axis.containers[1][0]
    assert hollow.get_markerfacecolor() == "white" and points.get_markerfacecolor() != "white"
    assert texts(axis.get_legend().get_texts())[1] == "x (one seed: interval of the rows)"
    assert "over rows and seeds" in axis.get_xlabel()
