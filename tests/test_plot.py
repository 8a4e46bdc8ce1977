"""plot.py: what is drawn is what the files say."""

import json
import struct

import matplotlib.pyplot as plt
import numpy as np
import pytest

import plot


@pytest.fixture
def figures(monkeypatch):
    """The figures as they are saved, kept open: {name: figure}."""
    kept, close = {}, plt.close
    save = plot.save

    def keeping(figure, out, name, tensorboard):
        kept[name] = figure
        save(figure, out, name, tensorboard)

    monkeypatch.setattr(plot, "save", keeping)
    monkeypatch.setattr(plt, "close", lambda figure: None)
    yield kept
    close("all")


@pytest.fixture
def grid(tmp_path):
    """A grid folder with two poolings of layers 3, 7 and both, two rates, two seeds, and known scores; the first rate
    is better on dev, the second on test."""
    lines = ["pooling,layers,hidden,lr,seed,dev_en,dev_de,test_en,test_de,test_zh_Hant"]
    for p, pooling in enumerate(("max", "cls")):
        for m, layers in enumerate(("3", "7", "3+7")):
            for lr, worse in ((0.01, 0), (0.03, 0.1)):
                for seed in range(2):
                    test = 0.5 + 0.1 * m - 0.05 * p + 0.01 * seed, 0.3 + 0.1 * m
                    if worse and m == 2:  # at the second rate the combination is the worst
                        test = 0.01, 0.01
                    lines.append(
                        f"{pooling},{layers},0,{lr},{seed},0.9,{0.8 - worse},0.9,{test[0] + worse},{test[1] + worse}"
                    )
    folder = tmp_path / "grid"
    folder.mkdir()
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    (folder / "best.json").write_text('{"train_language": "en", "select": "joint"}')
    (folder / "confusion.de.csv").write_text("true \\ predicted,a,b\na,3,1\nb,0,4\n")
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two systems, one of two seeds that froze after epoch 1."""
    folders = []
    for name, seed, frozen in (("base", 0, []), ("wf-seed0", 0, [9]), ("wf-seed1", 1, [9])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(
            json.dumps(
                {
                    "arguments": {
                        "seed": seed,
                        "freeze_layers": frozen,
                        "max_length": 9,
                        "train_language": "en",
                        "precision": "auto",
                    },
                    "labels": ["a", "b"],
                    "pairs": False,
                    "data": {},
                    "complete": True,
                }
            )
        )
        rows = [
            {
                "epoch": epoch,
                "split": split,
                "language": language,
                "accuracy": 0.1 * epoch + 0.02 * seed,
                "frozen_layers": frozen if epoch > 1 else [],
            }
            for epoch in (1, 2, 3)
            for split, language in (("train", ""), ("dev", "en"), ("dev", "zh"), ("dev", "de"))
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folders.append(folder)
    return folders


def test_the_search_is_drawn_as_the_results_say(grid, tmp_path, script, figures):
    status, out, _ = script("plot", "grid", grid, "--out", tmp_path / "figures")
    names = ["search-ranking", "search-layers", "search-single", "search-worth", "search-rates"]
    assert (
        status == 0
        and list(figures) == names
        and [line.split("/")[-1] for line in out.split()] == [f"{n}.png" for n in names]
    )
    curve, top = figures["search-ranking"].axes
    best = curve.lines[0].get_ydata()  # max pooling, best combination first
    np.testing.assert_allclose(
        best,
        [100 * np.mean([0.705, 0.5]), 100 * np.mean([0.605, 0.4]), 100 * np.mean([0.505, 0.3])],
    )
    assert [label.get_text() for label in top.get_yticklabels()][:2] == ["3+7  max", "3+7  cls"]
    heat = figures["search-layers"].axes[0].images[0].get_array()
    np.testing.assert_allclose(heat, [[40.25, 50.25], [37.75, 47.75]])
    worth = (
        figures["search-worth"].axes[0].patches[0].get_height()
    )  # layer 3 under max: {3, 3+7} against {7}
    assert worth == pytest.approx((40.25 + 60.25) / 2 - 50.25)
    assert figures["search-single"].legends[0].get_texts()[-1].get_text() == "zh_Hant"
    (axis,) = figures["search-rates"].axes
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    np.testing.assert_allclose(lines["best combination"], [60.25, 60.25])  # 3+7, then 7 alone
    np.testing.assert_allclose(lines["best single layer"], [50.25, 60.25])
    np.testing.assert_allclose(lines["all combinations: max"], [50.25, (50.25 + 60.25 + 11) / 3])
    assert [label.get_text() for label in axis.get_xticklabels()] == [
        "lr 0.01\n3+7 max\n7 max",
        "lr 0.03\n7 max\n7 max",
    ]


def test_a_search_at_one_rate_from_another_source(grid, tmp_path, script, figures):
    lines = (grid / "results.csv").read_text().splitlines()
    (grid / "results.csv").write_text(
        "\n".join(line for line in lines if ",0.03," not in line) + "\n"
    )
    (grid / "best.json").write_text('{"train_language": "zh_Hant", "select": "test"}')
    assert (
        script("plot", "grid", grid, "--out", tmp_path / "figures")[0] == 0
        and "search-rates" not in figures
    )
    curve, _ = figures["search-ranking"].axes
    assert curve.lines[0].get_ydata()[0] == pytest.approx(
        100 * (0.9 + 0.705) / 2
    )  # the mean of en and de
    assert "languages but zh_Hant" in curve.get_ylabel()


@pytest.mark.parametrize("name, inches", [("search-layers", 3.4), ("search-single", 7.0)])
def test_figures_are_as_wide_as_a_column_or_a_page(grid, tmp_path, script, name, inches):
    script("plot", "grid", grid, "--out", tmp_path)
    header = (tmp_path / f"{name}.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", header[16:20])[0] == round(
        300 * inches
    )
    assert not list(tmp_path.glob(".*.png"))


def test_training_curves_means_bands_and_the_freezing_moment(runs, tmp_path, script, figures):
    assert script("plot", "training", *runs, "--out", tmp_path / "figures")[0] == 0
    figure = figures["training-dev"]
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    assert list(panels) == ["en", "zh", "de", "mean of all but en", "train"]
    base, wf, frozen = panels["zh"].lines
    np.testing.assert_allclose(base.get_ydata(), [10, 20, 30])
    np.testing.assert_allclose(wf.get_ydata(), [11, 21, 31])  # the mean of two seeds
    assert list(frozen.get_xdata()) == [1, 1]  # frozen after epoch 1
    band = panels["zh"].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(10) and band[:, 1].max() == pytest.approx(32)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base", "wf"]


def test_each_runs_mean_is_of_the_languages_other_than_its_own_source(
    runs, tmp_path, script, figures
):
    for name, source in (("base", "zh"), ("wf-seed0", "de")):
        path = tmp_path / name / "run.json"
        path.write_text(
            path.read_text().replace('"train_language": "en"', f'"train_language": "{source}"')
        )
        path = path.with_name("metrics.jsonl")
        path.write_text(
            path.read_text().replace('"zh", "accuracy": 0.1', '"zh", "accuracy": 0.7')
        )  # at epoch 1
    assert script("plot", "training", *runs[:2], "--out", tmp_path / "figures")[0] == 0
    panel = next(
        axis
        for axis in figures["training-dev"].axes
        if axis.get_title() == "mean of all but the source"
    )
    assert panel.lines[0].get_ydata()[0] == pytest.approx(10)  # of en and de
    assert panel.lines[1].get_ydata()[0] == pytest.approx((10 + 70) / 2)  # of en and zh


def test_names_are_text_and_no_mathematics(runs, grid, tmp_path, script, figures):
    """Neither `$5_{`, which is broken as mathematics, nor `_x`, which a legend leaves out, is lost."""
    runs[0].rename(tmp_path / "under $5_{ or $9")
    runs[1].rename(tmp_path / "_x")
    assert (
        script(
            "plot",
            "training",
            tmp_path / "under $5_{ or $9",
            tmp_path / "_x",
            "--out",
            tmp_path / "figures",
        )[0]
        == 0
    )
    texts = figures["training-dev"].legends[0].get_texts()
    assert [text.get_text().strip() for text in texts] == ["under $5_{ or $9", "_x"]
    (grid / "confusion.zh_Hant.csv").write_text("true \\ predicted,$5_{,$9\n$5_{,3,1\n$9,0,4\n")
    assert script("plot", "confusion", grid, "--out", tmp_path / "figures")[0] == 0
    axis = next(
        axis for axis in figures["confusion"].axes if axis.get_title().startswith("zh_Hant")
    )
    assert [label.get_text() for label in axis.get_xticklabels()] == ["$5_{", "$9"]
    assert not any(text.get_parse_math() for text in [*texts, *axis.get_xticklabels()])


def test_confusion_shows_shares_of_the_true_class(grid, tmp_path, script, figures):
    assert script("plot", "confusion", grid, "--out", tmp_path)[0] == 0
    axis = figures["confusion"].axes[0]
    np.testing.assert_allclose(axis.images[0].get_array(), [[75, 25], [0, 100]])
    assert axis.get_title() == "de  (micro-F1 87.5)"


@pytest.mark.parametrize(
    "content",
    ["", "true,a,b\n", "true,a,b\na,1,2\n", "true,a,b\na,1,x\nb,0,1\n", "t,a,b\na,1\nb,0,1\n"],
)
def test_a_broken_confusion_matrix_is_one_sentence(content, grid, tmp_path, script):
    (grid / "confusion.de.csv").write_text(content)
    status, _, error = script("plot", "confusion", grid, "--out", tmp_path / "figures")
    assert status == 2 and "confusion.de.csv: not what grid_search.py writes" in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["grid", "."], "best.json does not exist"),
        (["confusion", "."], "holds no confusion.LANG.csv: run grid_search.py"),
        (["training", "."], "run.json does not exist"),
    ],
)
def test_missing_files_are_one_sentence(arguments, message, tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = script("plot", *arguments, "--out", "figures")
    assert status == 2 and message in error and "Traceback" not in error


def test_a_search_in_the_source_language_alone_is_said(tmp_path, script):
    (tmp_path / "results.csv").write_text(
        "pooling,layers,hidden,lr,seed,dev_pt_BR\nmax,5,0,0.001,0,0.5\n"
    )
    (tmp_path / "best.json").write_text('{"train_language": "pt_BR", "select": "en"}')
    status, _, error = script("plot", "grid", tmp_path, "--out", tmp_path / "figures")
    assert status == 2 and "has no language but pt_BR" in error and "Traceback" not in error


def test_test_curves_need_track_test(runs, tmp_path, script):
    status, _, error = script("plot", "training", *runs, "--out", tmp_path, "--split", "test")
    assert status == 2 and "no run was evaluated on test (train.py --track-test)" in error


def test_differences_and_their_intervals(tmp_path, script, figures):
    entry = {"difference": 0.02, "low": -0.01, "high": 0.06}
    (tmp_path / "results.json").write_text(
        json.dumps(
            {
                "baseline": "base",
                "rows": {"en": 9, "zh": 9},
                "systems": [
                    {"name": "base"},
                    {
                        "name": "wf",
                        "difference": {
                            "en": {**entry, "by_seed": [-0.02, 0.06]},
                            "others": {**entry, "difference": 0.03},
                        },
                    },
                ],
            }
        )
    )
    status, _, _ = script(
        "plot",
        "differences",
        tmp_path,
        "--out",
        tmp_path / "figures",
        "--tensorboard",
        tmp_path / "events",
    )
    axis = figures["differences"].axes[0]
    assert status == 0 and [label.get_text() for label in axis.get_yticklabels()] == [
        "en",
        "others",
    ]
    points, _, (bars,) = axis.containers[0]
    np.testing.assert_allclose(points.get_xdata(), [2, 3])
    np.testing.assert_allclose(bars.get_segments()[0][:, 0], [-1, 6])
    circles = axis.collections[-1].get_offsets()
    np.testing.assert_allclose(circles, [[-2, points.get_ydata()[0]], [6, points.get_ydata()[0]]])
    assert "circles: each seed" in axis.get_xlabel()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert EventAccumulator(str(tmp_path / "events")).Reload().Tags()["images"] == ["differences"]
    (tmp_path / "results.json").write_text(
        json.dumps({"baseline": "base", "rows": {"en": 9}, "systems": [{"name": "base"}]})
    )
    status, _, error = script("plot", "differences", tmp_path, "--out", tmp_path / "figures")
    assert status == 2 and "compares no two systems" in error
