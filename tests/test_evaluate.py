import contextlib
import errno
import io
import itertools
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_data, toy_rows
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score
from transformers import AutoModel, AutoTokenizer

import evaluate
import train
from data import Rows
from lib import scores, significance
from lib.significance import bootstrap_difference, holm, mcnemar, premise_clusters

LABELS = ["refund", "agent", "delivery", "cancel"]
LANGUAGES = ["en", "zh", "de"]  # the paper's order
ROWS = 17


@pytest.fixture(scope="module")
def runs(model_folder, data_folder, tmp_path_factory):
    """Two seeds of a run over layers 1 and 3, and one with BERT's own head; three epochs each. Not to be written to."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in "01":
        fine_tune(
            model_folder,
            data_folder,
            folder / f"wf-seed{seed}",
            "--epochs",
            3,
            "--layers",
            1,
            3,
            "--seed",
            seed,
        )
    fine_tune(model_folder, data_folder, folder / "baseline", "--epochs", 3, "--head", "pooler")
    return folder


@pytest.fixture(scope="module")
def pair_run(model_folder, tmp_path_factory):
    """A run of one epoch on pairs, beside its data. Not to be written to."""
    folder = tmp_path_factory.mktemp("pairs")
    data = Path(make_data(folder / "data", train=30))
    for path in data.glob("*.tsv"):
        lines = path.read_text().splitlines()[1:]
        path.write_text(
            "text_a\ttext_b\tlabel\n" + "".join(f"my order\t{line}\n" for line in lines)
        )
    return fine_tune(model_folder, data, folder / "run", "--layers", 1, 3)


@pytest.fixture(scope="module")
def sources(model_folder, tmp_path_factory):
    """Two runs of one epoch, from German and from Chinese, beside their data. Not to be written to."""
    folder = tmp_path_factory.mktemp("sources")
    data = Path(make_data(folder / "data"))
    for language in ("de", "zh"):
        shutil.copy(data / f"dev.{language}.tsv", data / f"train.{language}.tsv")
        fine_tune(
            model_folder,
            data,
            folder / f"from-{language}",
            "--train-language",
            language,
            "--layers",
            3,
        )
    return folder


def fine_tune(model, data, out, *flags):
    """A run folder of train.py, of one epoch unless `flags` say more."""
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(
            [
                *map(
                    str,
                    [
                        "--model",
                        model,
                        "--data",
                        data,
                        "--out",
                        out,
                        "--epochs",
                        1,
                        "--batch-size",
                        13,
                        "--lr",
                        3e-3,
                        "--precision",
                        "fp32",
                        "--max-length",
                        32,
                        *flags,
                    ],
                )
            ]
        )
    return out


@pytest.fixture
def run(runs, tmp_path):
    """A run of one's own, that nobody evaluated yet."""
    return shutil.copytree(
        runs / "wf-seed0", tmp_path / "run", ignore=shutil.ignore_patterns("predictions")
    )


@pytest.fixture
def data(data_folder, tmp_path):
    return shutil.copytree(data_folder, tmp_path / "data")


def tabulate(out, data, *arguments):
    """evaluate.py in this process: results.json and results.md."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        evaluate.main([*map(str, arguments), "--data", str(data), "--out", str(out)])
    written = (Path(out) / "results.md").read_text()
    assert written in text.getvalue()
    return json.loads((Path(out) / "results.json").read_text()), written


def read_rows(path):
    """(texts, class) of each row of a data set file."""
    return [
        (cells[:-1], LABELS.index(cells[-1]))
        for cells in (line.split("\t") for line in Path(path).read_text().splitlines()[1:])
    ]


def logits_by_hand(folder, texts):
    """Logits of a kept epoch by plain transformers, one text at a time, so without padding."""
    tokenizer, encoder = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder).eval(),
    )
    linear, settings = (
        load_file(folder / "classifier.safetensors"),
        json.loads((folder / "classifier.json").read_text()),
    )
    logits = []
    for text in texts:
        with torch.no_grad():
            output = encoder(**tokenizer(*text, return_tensors="pt"), output_hidden_states=True)
        features = (
            output.pooler_output
            if settings["head"] == "pooler"
            else torch.cat([output.hidden_states[k].amax(1) for k in settings["layers"]], 1)
        )
        logits.append(
            (features @ linear["classifier.1.weight"].T + linear["classifier.1.bias"])[0].numpy()
        )
    return np.array(logits)


def columns(markdown):
    """The first table of results.md: {first cell: the other cells}; its lines are aligned."""
    lines = markdown[markdown.index("|") :].split("\n\n")[0].splitlines()
    assert len({len(line) for line in lines}) == 1
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if not line.startswith("|--")
    ]
    return {row[0]: row[1:] for row in rows}


def no_models(monkeypatch):
    def load_model(_):
        raise AssertionError("no model is needed here")

    monkeypatch.setattr(evaluate, "load_model", load_model)


# --- logits and accuracies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wf-seed1", "baseline"])
def test_saved_logits_are_those_of_plain_transformers(name, runs, data_folder, tmp_path):
    results, _ = tabulate(tmp_path / "out", data_folder, runs / name)
    for language in LANGUAGES:
        rows = read_rows(Path(data_folder) / f"test.{language}.tsv")
        logits = np.load(runs / name / "predictions" / "3" / f"test.{language}.npy")
        expected = logits_by_hand(runs / name / "epochs" / "3", [texts for texts, _ in rows])
        assert logits.dtype == np.float32 and logits.shape == (ROWS, 4)
        assert np.abs(logits - expected).max() < 1e-5
        assert results["systems"][0]["runs"][0]["accuracy"][language] == accuracy_score(
            [y for _, y in rows], logits.argmax(1)
        )


def test_dev_accuracies_are_those_of_the_metrics(runs, data_folder, tmp_path):
    results, _ = tabulate(tmp_path / "out", data_folder, runs / "wf-seed0", "--split", "dev")
    rows = [
        json.loads(line) for line in (runs / "wf-seed0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert results["systems"][0]["mean"] == {
        row["language"]: row["accuracy"]
        for row in rows
        if row["split"] == "dev" and row["epoch"] == 3
    }
    assert results["split"] == "dev" and results["rows"] == dict.fromkeys(LANGUAGES, 13)


def test_a_second_call_reads_the_logits_and_no_model(run, data, tmp_path, monkeypatch):
    first, _ = tabulate(tmp_path / "one", data, run)
    no_models(monkeypatch)
    second, _ = tabulate(tmp_path / "two", data, run)
    assert first == second


def test_changed_data_is_computed_again(run, data, tmp_path, monkeypatch):
    tabulate(tmp_path / "one", data, run)
    rows = toy_rows("de", 11, 5)
    (data / "test.de.tsv").write_text(
        "text\tlabel\n" + "".join(f"{text}\t{LABELS[label]}\n" for text, label in rows)
    )
    results, _ = tabulate(tmp_path / "two", data, run)
    expected = logits_by_hand(run / "epochs" / "3", [[text] for text, _ in rows]).argmax(1)
    assert results["systems"][0]["mean"]["de"] == accuracy_score(
        [label for _, label in rows], expected
    )
    assert results["rows"] == {"en": ROWS, "zh": ROWS, "de": 11}
    no_models(monkeypatch)
    tabulate(tmp_path / "three", data, run)


def test_max_rows_are_spread_evenly(run, data, tmp_path):
    tabulate(tmp_path / "all", data, run)
    logits = {
        language: np.load(run / "predictions" / "3" / f"test.{language}.npy")
        for language in LANGUAGES
    }
    results, _ = tabulate(tmp_path / "some", data, run, "--max-rows", 5)
    for language in LANGUAGES:
        chosen = [0, 3, 6, 10, 13]  # of 17
        truth = [read_rows(data / f"test.{language}.tsv")[i][1] for i in chosen]
        assert results["systems"][0]["mean"][language] == accuracy_score(
            truth, logits[language][chosen].argmax(1)
        )
    assert results["rows"] == dict.fromkeys(LANGUAGES, 5)
    assert tabulate(tmp_path / "again", data, run)[0]["rows"] == dict.fromkeys(LANGUAGES, ROWS)


def test_damaged_logits_are_said(run, data, script, tmp_path):
    tabulate(tmp_path / "one", data, run)
    path = run / "predictions" / "3" / "test.zh.npy"
    path.write_bytes(path.read_bytes()[:100])
    status, _, error = script("evaluate", run, "--data", data, "--out", tmp_path / "two")
    assert (
        status == 2
        and f"{path} is damaged or cut short (" in error
        and not (tmp_path / "two").exists()
    )


# --- the epoch to report -----------------------------------------------------------------------------------------


@pytest.fixture
def four_epochs(run):
    """A run that kept four epochs, whose best are by hand: en 2 (tied with 3), de 4, zh 1, their mean 1."""
    rows = []
    for language, values in {
        "en": [0.5, 0.7, 0.7, 0.6],
        "de": [0.3, 0.3, 0.2, 0.5],
        "zh": [0.6, 0.2, 0.4, 0.3],
    }.items():
        rows += [
            {"epoch": 1 + i, "split": "dev", "language": language, "accuracy": value}
            for i, value in enumerate(values)
        ]
    shutil.copytree(run / "epochs" / "3", run / "epochs" / "4")
    rows += [
        {
            "epoch": 2.5,
            "split": "dev",
            "language": "en",
            "accuracy": 0.99,
        },  # in the midst of an epoch: not kept
        {"epoch": 3, "split": "train", "language": "", "accuracy": 0.99},
        *(
            {"epoch": 3, "split": "test", "language": language, "accuracy": 0.99}
            for language in LANGUAGES
        ),
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({**row, "frozen_layers": []}) + "\n" for row in rows)
    )
    for epoch in "12":
        shutil.copytree(run / "epochs" / "3", run / "epochs" / epoch, dirs_exist_ok=True)
    return run


@pytest.mark.parametrize(
    "protocol, expected",
    [
        ("last", [4, 4, 4]),
        ("mean", ["mean"] * 3),
        ("en", [2, 2, 2]),
        ("joint", [1, 1, 1]),
        ("oracle", [2, 1, 4]),
        ("3", [3, 3, 3]),
    ],
)
def test_epoch_of_each_protocol(protocol, expected, four_epochs, data, tmp_path):
    results, text = tabulate(tmp_path / "out", data, four_epochs, "--epoch", protocol)
    assert results["systems"][0]["runs"][0]["epochs"] == dict(zip(LANGUAGES, expected))
    assert results["epoch"] == protocol and f"epoch: {protocol}" in text
    for language, epoch in zip(LANGUAGES, expected):
        assert (four_epochs / "predictions" / str(epoch) / f"test.{language}.npy").is_file()


def test_the_papers_own_way_is_the_epoch_best_on_test(four_epochs, data, script, tmp_path):
    arguments = four_epochs, "--data", data, "--out", tmp_path / "out", "--epoch", "test"
    lines = (four_epochs / "metrics.jsonl").read_text().splitlines(keepends=True)
    (four_epochs / "metrics.jsonl").write_text(
        "".join(line for line in lines if json.loads(line)["split"] != "test")
    )
    status, _, error = script("evaluate", *arguments)
    assert (
        status == 2
        and "was evaluated on test in no language alone (test is missing) (train.py --track-test)"
        in error
    )
    with open(four_epochs / "metrics.jsonl", "a") as file:
        for epoch, (en, de, zh) in enumerate(
            [(0.9, 0.2, 0.2), (0.1, 0.3, 0.6), (0.2, 0.5, 0.4), (0.9, 0.4, 0.4)], 1
        ):
            file.writelines(
                json.dumps(
                    {
                        "epoch": epoch,
                        "split": "test",
                        "language": language,
                        "accuracy": value,
                        "frozen_layers": [],
                    }
                )
                + "\n"
                for language, value in (("en", en), ("de", de), ("zh", zh))
            )
    results, text = tabulate(tmp_path / "out", data, four_epochs, "--epoch", "test")
    assert results["systems"][0]["runs"][0]["epochs"] == {
        "en": 2,
        "zh": 2,
        "de": 2,
    }  # 45 %, as epoch 3, which is later
    assert "as the paper did: too high by the choice" in text


def test_only_what_is_asked_for_is_computed(four_epochs, data, tmp_path, monkeypatch):
    """Each file is predicted once by each epoch that a protocol names, each epoch loaded once, and no other."""
    predicted, loaded, predict, load = [], [], evaluate.predict, evaluate.load_model
    monkeypatch.setattr(
        evaluate, "predict", lambda *args: predicted.append(args[-1]) or predict(*args)
    )
    monkeypatch.setattr(evaluate, "load_model", lambda path: loaded.append(path.name) or load(path))
    names = {language: f"run epoch {{}} test {language}" for language in LANGUAGES}
    results, text = tabulate(tmp_path / "one", data, four_epochs)
    assert predicted == [names[language].format(4) for language in LANGUAGES] and loaded == ["4"]
    assert list(results["systems"][0]["protocols"]) == ["last"] and "each protocol" not in text
    results, text = tabulate(
        tmp_path / "two", data, four_epochs, "--epoch", "oracle", "joint", "last"
    )
    assert predicted[3:] == [
        names["en"].format(2),
        names["zh"].format(1),
        names["en"].format(1),
        names["de"].format(1),
    ]
    assert loaded[1:] == ["2", "1", "1"]  # once for each protocol at most
    (run,) = results["systems"][0]["runs"]
    assert {name: list(found["epochs"].values()) for name, found in run["protocols"].items()} == {
        "oracle": [2, 1, 4],
        "joint": [1, 1, 1],
        "last": [4, 4, 4],
    }
    assert (
        results["epoch"] == "oracle" and run["accuracy"] == run["protocols"]["oracle"]["accuracy"]
    )


def test_an_epoch_that_was_not_kept(four_epochs, data, script, tmp_path):
    shutil.rmtree(four_epochs / "epochs" / "3")
    status, _, error = script(
        "evaluate", four_epochs, "--data", data, "--out", tmp_path / "out", "--epoch", 3
    )
    assert (
        status == 2
        and f"{four_epochs} did not keep epoch 3, but 1 2 4" in error
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize("protocol, there", [("oracle", "en de"), ("joint", "en"), ("en", "de zh")])
def test_a_protocol_without_its_dev_sets(protocol, there, four_epochs, data, script, tmp_path):
    lines = (four_epochs / "metrics.jsonl").read_text().splitlines(keepends=True)
    (four_epochs / "metrics.jsonl").write_text(
        "".join(line for line in lines if json.loads(line)["language"] in there.split())
    )
    status, _, error = script(
        "evaluate", four_epochs, "--data", data, "--out", tmp_path / "out", "--epoch", protocol
    )
    assert (
        status == 2
        and f"--epoch {protocol}: {four_epochs} was evaluated on dev in {there} alone" in error
    )


# --- the table ---------------------------------------------------------------------------------------------------


def test_seeds_are_averaged_in_fractions_and_shown_in_percent(runs, data_folder, tmp_path):
    names = ["wf-seed0", "baseline", "wf-seed1"]
    results, text = tabulate(tmp_path / "out", data_folder, *(runs / name for name in names))
    seeds, baseline = results["systems"]
    assert [system["name"] for system in results["systems"]] == ["wf", "baseline"]
    assert [(Path(run["run"]).name, run["seed"]) for run in seeds["runs"]] == [
        ("wf-seed0", 0),
        ("wf-seed1", 1),
    ]
    table = columns(text)
    assert list(table) == ["system", "wf (2 seeds)", "baseline"] and table["system"] == [
        *LANGUAGES,
        "mean",
    ]
    for i, language in enumerate(LANGUAGES):
        values = [run["accuracy"][language] for run in seeds["runs"]]
        assert all(
            value * ROWS == pytest.approx(round(value * ROWS), abs=1e-12) for value in values
        )  # not rounded
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        assert seeds["mean"][language] == pytest.approx(mean, abs=1e-15)
        assert seeds["std"][language] == pytest.approx(deviation, abs=1e-15)
        assert table["wf (2 seeds)"][i] == f"{100 * mean:.1f} ±{100 * deviation:.1f}"
        assert (
            table["baseline"][i] == f"{100 * baseline['mean'][language]:.1f}"
            and baseline["std"][language] == 0
        )
    assert table["baseline"][3] == f"{100 * statistics.mean(baseline['mean'].values()):.1f}"
    assert "standard deviation over seeds" in text and "17 rows a language" in text


def some_run(seed, lr=1e-3, data="aa", path="data", source="en"):
    return {
        "arguments": {"lr": lr, "seed": seed, "train_language": source},
        "labels": LABELS,
        "data": {"train.en.tsv": data},
        "data_folder": path,
        "model": path,
        "command": f"train.py --data {path}",
    }


@pytest.mark.parametrize(
    "folders, settings, expected",
    [
        (["a/wf-seed0", "a/wf-seed1", "a/wf-seed10"], [(0,), (1,), (10,)], {"wf": [0, 1, 2]}),
        (["a/wf_s3", "b/wf"], [(3,), (4,)], {"wf": [0, 1]}),
        (["a/0", "a/1"], [(0,), (1,)], {"0": [0, 1]}),
        (
            ["layers-6-8", "layers-6-11"],
            [(0, 1e-3), (0, 2e-3)],
            {"layers-6-8": [0], "layers-6-11": [1]},
        ),
        (["a/wf", "b/wf"], [(0, 1e-3), (0, 2e-3)], {"wf": [0], "wf'": [1]}),
        (["wf-0", "base", "wf-1"], [(0,), (0, 1.0), (1,)], {"wf": [0, 2], "base": [1]}),
        (
            ["wf-0", "wf-1"],
            [(0, 1.0, "aa", "data"), (1, 1.0, "aa", "../data/")],
            {"wf": [0, 1]},
        ),  # the data, not its path
        (["wf-0", "wf-1"], [(0, 1.0, "aa"), (1, 1.0, "bb")], {"wf-0": [0], "wf-1": [1]}),
        (
            ["wf-0", "wf-1"],
            [(0, 1.0, "aa", "data", "de"), (1, 1.0, "aa", "data", "zh")],
            {"wf-0": [0], "wf-1": [1]},
        ),
    ],
)
def test_runs_that_differ_in_the_seed_alone_are_one_system(folders, settings, expected):
    assert scores.group_runs(folders, [some_run(*setting) for setting in settings]) == expected


PAPER = """BERT, Translate-Train, cased         81.9 76.6 77.8 75.9 70.7 61.6
           BERT, Zero-Shot, uncased (baseline)  81.4 63.8 74.3 70.5 62.1 58.3
           MC-BERT, Zero-Shot, uncased          81.8 65.3 74.7 70.6 62.4 57.8
           MC-BERT-WF, Zero-Shot, uncased       82.1 66.6 74.4 71.8 64.3 59.0"""


def test_the_paper_stands_beside_xnli(run, data, tmp_path):
    source = {"archive": "XNLI-1.0.zip", "member": "XNLI-1.0/xnli.test.tsv"}
    (data / "sources.json").write_text(json.dumps({"test.en.tsv": source}))
    results, text = tabulate(tmp_path / "out", data, run)
    table, paper = columns(text), {}
    for line in PAPER.splitlines():
        *name, en, zh, es, de, ar, ur = line.split()
        paper[" ".join(name)] = dict(
            zip("en zh es de ar ur".split(), map(float, (en, zh, es, de, ar, ur)))
        )
        mean = (float(en) + float(zh) + float(de)) / 3  # of the languages there are
        assert table[f"paper: {' '.join(name)}"] == [en, zh, de, f"{mean:.1f}"]
    assert results["paper"] == {
        name: {l: pytest.approx(v / 100) for l, v in row.items()} for name, row in paper.items()
    }
    assert list(table)[-1] == "run" and table["published: XLM-R base (He et al. 2021)"] == [
        "85.8",
        "76.7",
        "78.7",
        "80.4",
    ]


@pytest.mark.parametrize(
    "sources",
    [
        None,
        {"test.en.tsv": {"source": "sample/make_data.py"}},
        {"test.en.tsv": {"archive": "amazon-massive-dataset-1.0.tar.gz"}},
    ],
)
def test_the_paper_does_not_stand_beside_other_data(sources, run, data, tmp_path):
    if sources:
        (data / "sources.json").write_text(json.dumps(sources))
    results, text = tabulate(tmp_path / "out", data, run)
    assert (
        "paper" not in results and "paper:" not in text and list(columns(text)) == ["system", "run"]
    )


@pytest.mark.parametrize(
    "right, warned", [(20, True), (50, True), (51, True), (52, False), (80, False)]
)
def test_a_run_near_chance_is_called_out(right, warned, run, data, tmp_path):
    """100 rows, the largest class has 50; `right` of them are right in German, all are in the others."""
    truth = [0] * 50 + [1] * 30 + [3] * 20
    for language in LANGUAGES:
        (data / f"test.{language}.tsv").write_text(
            "text\tlabel\n" + "".join(f"my\t{LABELS[label]}\n" for label in truth)
        )
    tabulate(tmp_path / "one", data, run)
    for language in LANGUAGES:
        predicted = [
            label if language != "de" or i < right else (label + 1) % 4
            for i, label in enumerate(truth)
        ]
        np.save(
            run / "predictions" / "3" / f"test.{language}.npy",
            np.eye(4, dtype=np.float32)[predicted],
        )
    results, text = tabulate(tmp_path / "two", data, run)
    assert results["systems"][0]["mean"] == {"en": 1.0, "zh": 1.0, "de": right / 100}
    assert ("within 2 points of chance" in text) == warned
    assert len(results["warnings"]) == warned and all(
        f"below in de {right}.0 (50.0)" in line for line in results["warnings"]
    )


def test_a_run_that_is_not_finished_is_called_out(run, data, tmp_path):
    description = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**description, "complete": False}))
    results, text = tabulate(tmp_path / "out", data, run)
    assert f"warning: {run} is not finished: its last epoch so far is 3" in text
    assert any("not finished" in warning for warning in results["warnings"])


def test_only_the_results_are_written(run, data, tmp_path):
    before = sorted(run.rglob("*"))
    tabulate(tmp_path / "out", data, run)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == [
        "results.json",
        "results.md",
    ]
    assert (
        sorted(path for path in run.rglob("*") if "predictions" not in path.relative_to(run).parts)
        == before
    )
    assert sorted(path.name for path in (run / "predictions" / "3").iterdir()) == [
        "origins.json",
        *sorted(f"test.{l}.npy" for l in LANGUAGES),
    ]


# --- bad input ---------------------------------------------------------------------------------------------------


def test_labels_that_disagree(run, data, script, tmp_path):
    (data / "labels.txt").write_text("".join(f"{label}\n" for label in reversed(LABELS)))
    status, _, error = script("evaluate", run, "--data", data, "--out", tmp_path / "out")
    assert status == 2 and "trained for the labels refund agent delivery cancel" in error
    assert (
        "labels.txt says cancel delivery agent refund" in error and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("run.json", None, "run.json does not exist"),
        ("run.json", b"{", "run.json: not what train.py writes (Expecting property name"),
        ("run.json", b"{}", "run.json: not what train.py writes (arguments)"),
        (
            "run.json",
            b'{"arguments": {"max_length": "many"}}',
            "run.json: not what train.py writes (arguments)",
        ),
        ("metrics.jsonl", None, "has it finished an epoch?"),
        (
            "metrics.jsonl",
            b"",
            "(ValueError('no evaluation at the end of an epoch')): has it finished an epoch?",
        ),
        ("metrics.jsonl", b"garbage\n", "metrics.jsonl: not what train.py writes (JSONDecodeError"),
        (
            "metrics.jsonl",
            b"\xff\xfe\n",
            "metrics.jsonl: not what train.py writes (UnicodeDecodeError",
        ),
        ("metrics.jsonl", b"[1]\n", "metrics.jsonl: not what train.py writes (TypeError"),
        (
            "metrics.jsonl",
            b'{"split": "dev"}\n',
            "metrics.jsonl: not what train.py writes (KeyError('epoch')",
        ),
        (
            "metrics.jsonl",
            b'{"split": "dev", "epoch": 1, "language": "en", "accuracy": "high"}\n',
            "writes (TypeError",
        ),
        (
            "metrics.jsonl",
            b'{"split": "dev", "epoch": 0.5, "language": "en", "accuracy": 1, "frozen_layers": []}\n',
            "no evaluation at the end of an epoch",
        ),
        ("epochs/3/classifier.json", b"{}", "classifier.json"),
        ("epochs/3/classifier.safetensors", b"short", "classifier.safetensors do not fit"),
        ("epochs/3/model.safetensors", b"short", "no encoder can be loaded"),
    ],
)
def test_a_broken_run(name, content, message, run, data, script, tmp_path):
    (run / name).unlink() if content is None else (run / name).write_bytes(content)
    status, _, error = script("evaluate", run, "--data", data, "--out", tmp_path / "out")
    assert status == 2 and message in error and str(run) in error
    assert not (tmp_path / "out").exists() and not list(run.rglob("*.npy"))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda data: [path.unlink() for path in data.glob("test.*")], "has no test file"),
        (
            lambda data: (data / "labels.txt").unlink(),
            "is not a data set folder: it has no labels.txt",
        ),
        (
            lambda data: (data / "test.zh.tsv").write_text("text\tlabel\nmy\trefund\nmy\tmoney\n"),
            "test.zh.tsv, line 3: unknown label 'money'",
        ),
        (
            lambda data: (data / "test.de.tsv").write_text("text\nmy\n"),
            "test.de.tsv, line 1: no label column",
        ),
    ],
)
def test_a_broken_data_set(spoil, message, run, data, script, tmp_path):
    spoil(data)
    status, _, error = script("evaluate", run, "--data", data, "--out", tmp_path / "out")
    assert status == 2 and message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "run --input x --predictions y --data d",
            "--input labels your own text: leave out --data",
        ),
        ("run", "give --data and --out for a table"),
        ("run --data d", "give --data and --out"),
        ("--data d --out o", "name a run folder"),
        (
            "run --data d --out o --epoch last best",
            "--epoch best: expected last, mean, en, joint, oracle, test or a number",
        ),
        ("run --data d --out o --epoch -1", "--epoch"),
        ("run --data d --out o --max-rows 0", "--max-rows: 0, expected 1 or more"),
        ("run --data d --out o --batch-size 0", "--batch-size: 0, expected 1 or more"),
        ("run --data d --out o --split train", "invalid choice: 'train'"),
        ("run --input i", "--input needs --predictions"),
        ("a b --input i --predictions p", "exactly one run"),
        ("run --input i --predictions p --epoch oracle", "one --epoch, not oracle"),
        ("run --input i --predictions p --epoch last en", "one --epoch, not oracle"),
        (
            "run --input i --predictions p --translate-train r",
            "leave out --data, --out, --max-rows, --baseline, --translate-train",
        ),
    ],
)
def test_bad_flags(flags, message, script):
    status, _, error = script("evaluate", *flags.split())
    assert status == 2 and message in error


# --- a user's own text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_predictions_for_ones_own_text(pairs, labelled, runs, pair_run, script, tmp_path):
    rows = [
        ([text, 'the "parcel'] if pairs else [text], label) for text, label in toy_rows("en", 11, 9)
    ]
    names = ["text_a", "text_b"] if pairs else ["text"]
    lines = [
        "\t".join(names + ["label"] * labelled),
        *("\t".join(texts + [LABELS[label]] * labelled) for texts, label in rows),
    ]
    (tmp_path / "my.tsv").write_text("".join(f"{line}\n" for line in lines))
    run, epoch, target = (
        pair_run if pairs else runs / "wf-seed0",
        "1" if pairs else "3",
        tmp_path / "new" / "out.tsv",
    )
    status, text, _ = script(
        "evaluate", run, "--input", tmp_path / "my.tsv", "--predictions", target, "--batch-size", 3
    )
    assert status == 0
    header, *answers = [line.split("\t") for line in target.read_text().splitlines()]
    given = len(names) + labelled
    assert header == [
        *names,
        *["label"] * labelled,
        "prediction",
        *(f"p_{label}" for label in LABELS),
    ]
    assert ["\t".join(cells[:given]) for cells in answers] == lines[1:]  # the rows' own order
    logits = logits_by_hand(run / "epochs" / epoch, [texts for texts, _ in rows])
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probabilities = np.array([[float(cell) for cell in cells[given + 1 :]] for cells in answers])
    assert np.abs(probabilities - expected).max() < 1e-5
    assert probabilities.sum(1) == pytest.approx(np.ones(11), abs=3e-6)
    assert [cells[given] for cells in answers] == [LABELS[i] for i in expected.argmax(1)]
    accuracy = 100 * accuracy_score([label for _, label in rows], expected.argmax(1))
    assert ("accuracy" in text) == labelled and (not labelled or f"accuracy {accuracy:.1f}" in text)
    assert f"11 rows, by epoch {epoch} of {run}" in text


def test_columns_in_any_order_unknown_labels_and_its_own_output_again(runs, script, tmp_path):
    """Columns are found by name, the others pass through; accuracy is over the rows whose label is known."""
    rows = toy_rows("en", 7, 3)
    lines = [
        f"{LABELS[label] if i % 3 == 0 else ''}\t{i:03}\t{text}\tface to face"
        for i, (text, label) in enumerate(rows)
    ]
    (tmp_path / "my.tsv").write_text(
        "label\tid\ttext\tgenre\n" + "".join(f"{line}\n" for line in lines)
    )
    run, first, again = runs / "wf-seed0", tmp_path / "first.tsv", tmp_path / "again.tsv"
    status, text, _ = script(
        "evaluate", run, "--input", tmp_path / "my.tsv", "--predictions", first
    )
    header, *answers = [line.split("\t") for line in first.read_text().splitlines()]
    assert status == 0 and header == [
        "label",
        "id",
        "text",
        "genre",
        "prediction",
        *(f"p_{label}" for label in LABELS),
    ]
    assert ["\t".join(cells[:4]) for cells in answers] == lines
    predicted = logits_by_hand(run / "epochs" / "3", [[text] for text, _ in rows]).argmax(1)
    assert [cells[4] for cells in answers] == [LABELS[i] for i in predicted]
    right = [rows[i][1] == predicted[i] for i in (0, 3, 6)]
    assert f"accuracy {100 * np.mean(right):.1f} on the 3 whose label is known" in text
    assert script("evaluate", run, "--input", first, "--predictions", again)[0] == 0
    assert again.read_bytes() == first.read_bytes()
    (tmp_path / "my.tsv").write_text("label\ttext\n\tmy money\n")
    assert (
        "accuracy"
        not in script("evaluate", run, "--input", tmp_path / "my.tsv", "--predictions", again)[1]
    )


def test_pairs_and_single_texts_are_told_apart(runs, pair_run, data_folder, script, tmp_path):
    """By --input and by --data, both ways, in a sentence that names file or folder, run and both kinds."""
    single, pair = runs / "wf-seed0", pair_run
    (tmp_path / "single.tsv").write_text("text\nmy money\n")
    (tmp_path / "pair.tsv").write_text("text_a\ttext_b\nmy money\tmy parcel\n")
    words = {single: "single texts (text)", pair: "pairs (text_a, text_b)"}
    data = {single: data_folder, pair: pair_run.parent / "data"}
    for run, other, file in ((single, pair, "pair.tsv"), (pair, single, "single.tsv")):
        for arguments in (
            ["--input", tmp_path / file, "--predictions", tmp_path / "out.tsv"],
            ["--data", data[other], "--out", tmp_path / "out"],
        ):
            status, _, error = script("evaluate", run, *arguments)
            assert (
                status == 2
                and f"{arguments[1]} holds {words[other]}, {run} was trained on {words[run]}"
                in error
            )
    assert not (tmp_path / "out.tsv").exists() and not (tmp_path / "out").exists()


def test_a_token_that_the_encoder_does_not_know_is_refused(run, data, script, tmp_path):
    """Tokens were added to the tokenizer of a kept epoch, resize_token_embeddings() was forgotten."""
    tokenizer = AutoTokenizer.from_pretrained(run / "epochs" / "3")
    known = len(tokenizer)
    tokenizer.add_tokens(["xx<user>xx"])
    tokenizer.save_pretrained(run / "epochs" / "3")
    (tmp_path / "my.tsv").write_text("text\nhello xx<user>xx\n")
    (data / "test.de.tsv").write_text("text\tlabel\nxx<user>xx mein\tagent\n")
    for arguments in (
        ["--input", tmp_path / "my.tsv", "--predictions", tmp_path / "out.tsv"],
        ["--data", data, "--out", tmp_path / "out"],
    ):
        status, _, error = script("evaluate", run, *arguments)
        assert (
            status == 2 and f"the tokenizer gives token {known}, the encoder knows {known}" in error
        )
    assert not (tmp_path / "out.tsv").exists() and not (tmp_path / "out").exists()


def test_logits_that_are_not_finite_are_refused(run, data, script, tmp_path):
    path = run / "epochs" / "3" / "classifier.safetensors"
    weights = load_file(path)
    weights["classifier.1.bias"][2] = torch.nan
    save_file(weights, path)
    (tmp_path / "my.tsv").write_text("text\nmy money\n")
    for arguments in (
        ["--input", tmp_path / "my.tsv", "--predictions", tmp_path / "out.tsv"],
        ["--data", data, "--out", tmp_path / "out"],
    ):
        status, _, error = script("evaluate", run, *arguments)
        assert status == 2 and "logits that are not finite" in error
    assert (
        not (tmp_path / "out.tsv").exists()
        and not (tmp_path / "out").exists()
        and not list(run.rglob("*.npy"))
    )


def test_predictions_by_a_chosen_epoch(four_epochs, script, tmp_path):
    (tmp_path / "my.tsv").write_text("text\nmy money\n")
    for protocol, epoch in (("en", 2), ("joint", 1), ("4", 4), ("mean", "mean")):
        status, text, _ = script(
            "evaluate",
            four_epochs,
            "--input",
            tmp_path / "my.tsv",
            "--predictions",
            tmp_path / "out.tsv",
            "--epoch",
            protocol,
        )
        assert status == 0 and f"by epoch {epoch} of" in text


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "my.tsv does not exist"),
        (b"", "my.tsv is empty"),
        (b"text\n", "holds a header and no rows"),
        (
            b"text\tlabel\nmy money\trefund\nmy parcel\tdelivry\n",
            "line 3: unknown label 'delivry', expected one of refund, agent, delivery, cancel",
        ),
        (
            b"sentence\nmy money\n",
            "line 1: the header is ['sentence'], expected text, or text_a and text_b, and label",
        ),
        (b"text_a\tlabel\nmy money\trefund\n", "line 1: the header is"),
        (b"text\nmy\tmoney\n", "line 2: 2 columns, expected 1 (text)"),
        (b"text\nm\xff\n", "line 2: not UTF-8"),
    ],
)
def test_an_input_that_is_none(content, message, runs, script, tmp_path):
    if content is not None:
        (tmp_path / "my.tsv").write_bytes(content)
    status, _, error = script(
        "evaluate",
        runs / "wf-seed0",
        "--input",
        tmp_path / "my.tsv",
        "--predictions",
        tmp_path / "out.tsv",
    )
    assert status == 2 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["my.tsv"] * (content is not None)


def test_nothing_half_written_where_a_prediction_fails(runs, script, tmp_path, monkeypatch):
    (tmp_path / "my.tsv").write_text("text\nmy money\n")
    (tmp_path / "out.tsv").write_text("what was there")

    def predict(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(evaluate, "predict", predict)
    status, _, error = script(
        "evaluate",
        runs / "wf-seed0",
        "--input",
        tmp_path / "my.tsv",
        "--predictions",
        tmp_path / "out.tsv",
    )
    assert status == 2 and "no space left" in error
    assert (tmp_path / "out.tsv").read_text() == "what was there" and len(
        list(tmp_path.iterdir())
    ) == 2


def test_spaces_at_the_edges_and_lone_quotes_are_kept(runs, script, tmp_path):
    texts = [' "my money', "", "my  parcel ", "现在 \u202eabc 😀", "late\r now"]
    (tmp_path / "my.tsv").write_bytes(("text\n" + "".join(f"{text}\n" for text in texts)).encode())
    status, _, _ = script(
        "evaluate",
        runs / "baseline",
        "--input",
        tmp_path / "my.tsv",
        "--predictions",
        tmp_path / "out.tsv",
    )
    lines = (tmp_path / "out.tsv").read_bytes().decode().split("\n")
    assert status == 0 and [line.split("\t")[0] for line in lines[1:-1]] == texts


# --- differences, protocols, Translate-Train ---------------------------------------------------------------------


def test_differences_are_those_of_the_saved_logits(runs, data_folder, tmp_path):
    """Correctness averaged over seeds, every row its own cluster (single texts), against the first system."""
    results, text = tabulate(
        tmp_path / "out",
        data_folder,
        runs / "baseline",
        runs / "wf-seed0",
        runs / "wf-seed1",
        "--resamples",
        500,
    )
    truth = {
        l: np.array([label for _, label in read_rows(Path(data_folder) / f"test.{l}.tsv")])
        for l in LANGUAGES
    }

    def right(name, language):
        last = max(int(path.name) for path in (runs / name / "predictions").iterdir())
        return (
            np.load(runs / name / "predictions" / str(last) / f"test.{language}.npy").argmax(1)
            == truth[language]
        )

    expected = {
        l: (right("wf-seed0", l).mean() + right("wf-seed1", l).mean()) / 2
        - right("baseline", l).mean()
        for l in LANGUAGES
    }
    baseline, wf = results["systems"]
    assert results["baseline"] == "baseline" and "difference" not in baseline
    for language in LANGUAGES:
        entry = wf["difference"][language]
        assert (
            entry["difference"] == pytest.approx(expected[language])
            and entry["low"] <= entry["difference"] <= entry["high"]
        )
        assert entry["p_holm"] >= entry["p"] and "p_mcnemar" not in entry  # there are two seeds
        assert (
            f"{100 * expected[language]:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"
            in text
        )
    assert wf["difference"]["others"]["difference"] == pytest.approx(
        (expected["de"] + expected["zh"]) / 2
    )
    single, _ = tabulate(
        tmp_path / "single", data_folder, runs / "baseline", runs / "wf-seed0", "--resamples", 50
    )
    assert {"p_mcnemar"} <= set(single["systems"][1]["difference"]["de"])


def test_each_seeds_difference_stands_beside_the_interval(runs, data_folder, tmp_path):
    """Two systems with seeds 0 and 1, in whatever order; another system without the same seeds has none."""
    tabulate(tmp_path / "first", data_folder, runs / "wf-seed0", runs / "wf-seed1")
    for seed in (0, 1):
        folder = shutil.copytree(runs / f"wf-seed{seed}", tmp_path / f"other-seed{seed}")
        run = json.loads((folder / "run.json").read_text())
        run["arguments"]["dropout"] = 0.2
        (folder / "run.json").write_text(json.dumps(run))
        for language in ("zh", "de"):  # seed + 1 rows that were right are wrong
            path = next(folder.glob(f"predictions/*/test.{language}.npy"))
            logits, truth = (
                np.load(path),
                [label for _, label in read_rows(Path(data_folder) / f"test.{language}.tsv")],
            )
            for i in np.flatnonzero(logits.argmax(1) == truth)[: seed + 1]:
                logits[i] = -logits[i]
            np.save(path, logits)
    results, text = tabulate(
        tmp_path / "out",
        data_folder,
        runs / "wf-seed0",
        runs / "wf-seed1",
        tmp_path / "other-seed1",
        tmp_path / "other-seed0",
        runs / "baseline",
        "--resamples",
        50,
    )
    _, other, baseline = (system.get("difference") for system in results["systems"])
    rows = results["rows"]["de"]
    assert other["others"]["by_seed"] == pytest.approx([-1 / rows, -2 / rows]) and other["en"][
        "by_seed"
    ] == [0, 0]
    assert other["others"]["difference"] == pytest.approx(-1.5 / rows)
    assert "others, each seed" in text and f" {-100 / rows:+.1f} {-200 / rows:+.1f} |" in text
    assert "by_seed" not in baseline["others"]


def test_differences_need_no_model_once_logits_are_saved(runs, data_folder, tmp_path, monkeypatch):
    names = [runs / "baseline", runs / "wf-seed0"]
    tabulate(tmp_path / "one", data_folder, *names)
    monkeypatch.setattr(evaluate, "load_model", None)
    results, _ = tabulate(tmp_path / "two", data_folder, *names, "--baseline", "wf-seed0")
    assert "difference" in results["systems"][0] and "difference" not in results["systems"][1]


def test_an_unknown_baseline_names_the_systems(runs, data_folder, tmp_path, script):
    status, _, error = script(
        "evaluate",
        runs / "baseline",
        runs / "wf-seed0",
        "--data",
        data_folder,
        "--out",
        tmp_path,
        "--baseline",
        "x",
    )
    assert status == 2 and "--baseline x: the systems are baseline wf-seed0" in error


def test_rows_of_one_premise_are_one_cluster(tmp_path, monkeypatch):
    """Pairs are clustered by the source's premise, whatever the translations repeat; where the languages are no
    translations, each by its own."""
    seen = []
    monkeypatch.setattr(
        significance,
        "bootstrap_difference",
        lambda differences, clusters, resamples: (
            seen.append(clusters.tolist()) or [np.zeros(differences.shape[1])] * 4
        ),
    )
    sets = {
        language: Rows(list(premises), list("hijkl"), [0] * 5)
        for language, premises in {"en": "aabbc", "de": "vwxyz"}.items()
    }
    right = [{language: np.ones(5, dtype=bool) for language in sets}]
    assert list(significance.difference(right, right, sets, ["en"], 10)) == [
        "en",
        "de",
    ] and seen == [[0, 0, 1, 1, 2]]
    significance.difference(right, right, sets, ["de"], 10)
    assert seen.pop() == [0, 1, 2, 3, 4]
    sets["de"].labels[3] = 1
    significance.difference(right, right, sets, ["en"], 10)
    assert seen[1:] == [[0, 0, 1, 1, 2], [0, 1, 2, 3, 4]]


def test_languages_that_are_no_translations_are_compared_one_by_one(run, runs, data, tmp_path):
    """German has other rows, and fewer: each language's difference stands as if it were alone, and there is no mean."""
    rows = toy_rows("de", 11, 5)
    (data / "test.de.tsv").write_text(
        "text\tlabel\n" + "".join(f"{text}\t{LABELS[label]}\n" for text, label in rows)
    )
    baseline = shutil.copytree(
        runs / "baseline", tmp_path / "baseline", ignore=shutil.ignore_patterns("predictions")
    )
    results, text = tabulate(tmp_path / "out", data, baseline, run, "--resamples", 300)
    _, system = results["systems"]
    assert list(system["difference"]) == LANGUAGES and "rows: en 17, zh 17, de 11." in text
    assert (
        "the languages' rows are no translations: no mean over them" in text
        and "others" not in text
    )
    truth = [label for _, label in rows]
    right = [
        np.load(folder / "predictions" / "3" / "test.de.npy").argmax(1) == truth
        for folder in (run, baseline)
    ]
    alone = bootstrap_difference((right[0] * 1.0 - right[1])[:, None], np.arange(11), 300)
    assert [system["difference"]["de"][key] for key in ("difference", "low", "high", "p")] == [
        value.item() for value in alone
    ]


def test_two_languages_have_no_mean_of_the_others_yet_are_translations(runs, data, tmp_path):
    (data / "test.zh.tsv").unlink()
    results, text = tabulate(
        tmp_path / "out", data, runs / "baseline", runs / "wf-seed0", "--resamples", 50
    )
    assert (
        list(results["systems"][1]["difference"]) == ["en", "de"] and "no translations" not in text
    )


def test_the_protocols_that_are_asked_for_stand_side_by_side(runs, data_folder, tmp_path):
    names = ["joint", "mean", "en", "oracle"]
    results, text = tabulate(tmp_path / "out", data_folder, runs / "wf-seed0", "--epoch", *names)
    (run,) = results["systems"][0]["runs"]
    assert (
        list(run["protocols"]) == names and run["accuracy"] == run["protocols"]["joint"]["accuracy"]
    )
    assert "`en`: best on the source language's own dev set (en), true zero-shot" in text
    for name in names:
        shown, _ = tabulate(tmp_path / name, data_folder, runs / "wf-seed0", "--epoch", name)
        assert shown["systems"][0]["mean"] == results["systems"][0]["protocols"][name]
        english, others = (
            shown["systems"][0]["mean"]["en"],
            np.mean([shown["systems"][0]["mean"][l] for l in ("de", "zh")]),
        )
        assert f"{100 * english:.1f} / {100 * others:.1f}" in text
        if name != "joint":
            gaps = results["systems"][0]["protocol_differences"][name]
            assert gaps["others"]["low"] <= gaps["others"]["difference"] <= gaps["others"]["high"]
            for language, gap in gaps.items():
                if language != "others":
                    assert gap["difference"] == pytest.approx(
                        shown["systems"][0]["mean"][language] - run["accuracy"][language]
                    )
    assert "Difference to the same runs at `joint`" in text and "| wf-seed0, oracle |" in text


# --- the source language -----------------------------------------------------------------------------------------


def test_a_run_is_evaluated_in_every_language_whatever_its_source(sources, tmp_path):
    results, text = tabulate(
        tmp_path / "out", sources / "data", sources / "from-de", "--epoch", "en", "joint"
    )
    (system,) = results["systems"]
    assert (
        list(system["mean"]) == LANGUAGES
        and system["train_language"] == "de"
        and "trained on de" in text
    )
    assert "epoch: en (best on the source language's own dev set (de), true zero-shot)" in text
    de, others = system["mean"]["de"], (system["mean"]["en"] + system["mean"]["zh"]) / 2
    assert f"{100 * de:.1f} / {100 * others:.1f}" in text


def test_two_sources_are_two_systems(sources, tmp_path):
    results, text = tabulate(
        tmp_path / "out",
        sources / "data",
        sources / "from-de",
        sources / "from-zh",
        "--resamples",
        50,
        "--epoch",
        "last",
        "en",
    )
    assert [(system["name"], system["train_language"]) for system in results["systems"]] == [
        ("from-de", "de"),
        ("from-zh", "zh"),
    ]
    assert list(columns(text)) == ["system", "from-de (from de)", "from-zh (from zh)"]
    assert all(set(system["mean"]) == set(LANGUAGES) for system in results["systems"])
    assert "`en`: best on the source language's own dev set (of each system)" in text
    for system in results[
        "systems"
    ]:  # a system against itself: the others are all but its own source
        last, en = (system["protocols"][name] for name in ("last", "en"))
        assert system["protocol_differences"]["en"]["others"]["difference"] == pytest.approx(
            np.mean(
                [
                    en[language] - last[language]
                    for language in LANGUAGES
                    if language != system["train_language"]
                ]
            )
        )
    from_de, from_zh = (system["protocols"]["en"] for system in results["systems"])
    assert f"{100 * from_de['de']:.1f} / {50 * (from_de['en'] + from_de['zh']):.1f}" in text
    assert f"{100 * from_zh['zh']:.1f} / {50 * (from_zh['en'] + from_zh['de']):.1f}" in text


def test_translate_train_is_one_row_of_models_each_in_its_own_language(
    runs, sources, tmp_path, script
):
    models = ["--translate-train", sources / "from-de", sources / "from-zh"]
    results, text = tabulate(
        tmp_path / "out", sources / "data", runs / "baseline", *models, "--resamples", 50
    )
    baseline, system = results["systems"]
    assert system["name"] == "Translate-Train" and [
        list(run["accuracy"]) for run in system["runs"]
    ] == [["de"], ["zh"]]
    assert list(system["mean"]) == ["zh", "de"] and list(baseline["mean"]) == LANGUAGES
    alone, _ = tabulate(tmp_path / "alone", sources / "data", sources / "from-zh")
    assert system["mean"]["zh"] == alone["systems"][0]["mean"]["zh"]
    row = next(cells for name, cells in columns(text).items() if name.startswith("Translate-Train"))
    assert (
        row[0] == "" and row[1] == f"{100 * system['mean']['zh']:.1f}"
    )  # nothing was trained on English
    assert list(system["difference"]) == ["zh", "de", "others"]
    expected = [system["mean"][language] - baseline["mean"][language] for language in ("de", "zh")]
    assert system["difference"]["others"]["difference"] == pytest.approx(np.mean(expected))
    only, _ = tabulate(tmp_path / "only", sources / "data", *models)
    assert [found["name"] for found in only["systems"]] == ["Translate-Train"] and only["systems"][
        0
    ]["mean"] == system["mean"]
    less = shutil.copytree(
        sources / "data", tmp_path / "less", ignore=shutil.ignore_patterns("test.zh.tsv")
    )
    status, _, error = script("evaluate", *models, "--data", less, "--out", tmp_path / "less-out")
    assert (
        status == 2
        and f"{sources / 'from-zh'}: {less} has no test file in its language, zh" in error
    )


# --- differences between systems: against exact enumeration, SciPy, and simulations in which the truth is known --


def test_the_bootstrap_draws_from_the_exact_distribution_of_a_small_case():
    differences = np.array([[1.0, 0.0], [1.0, -1.0], [0.0, 1.0], [-1.0, 0.5], [1.0, 0.0]])
    clusters = np.array([0, 0, 1, 2, 2])
    members = [np.flatnonzero(clusters == c) for c in range(3)]
    exact = np.array(
        [
            differences[np.concatenate([members[c] for c in draw])].mean(0)
            for draw in itertools.product(range(3), repeat=3)
        ]
    )  # all 27 resamples
    mean, low, high, p = bootstrap_difference(differences, clusters, resamples=40_000, seed=3)
    assert mean == pytest.approx(differences.mean(0))
    np.testing.assert_allclose(
        low, np.percentile(exact, 2.5, axis=0, method="inverted_cdf"), atol=1e-9
    )
    np.testing.assert_allclose(
        high, np.percentile(exact, 97.5, axis=0, method="inverted_cdf"), atol=1e-9
    )
    expected = 2 * np.minimum((exact <= 1e-12).mean(0), (exact >= -1e-12).mean(0))
    np.testing.assert_allclose(p, np.minimum(1, expected), atol=0.01)


def rejections(cluster_effect, as_clusters, shift=0.0, trials=400):
    """How often a 5 % test rejects when A and B answer alike but for `shift`, on 120 clusters of 3 rows."""
    random, found = np.random.default_rng(7), 0
    groups = np.repeat(np.arange(120), 3)
    for trial in range(trials):
        lean = cluster_effect * random.normal(size=(120, 1))[groups]
        right = random.random((360, 2)) < 0.6 + lean * [1, -1] + np.array([shift, 0])
        differences = right[:, :1].astype(float) - right[:, 1:]
        clusters = groups if as_clusters else np.arange(360)
        found += bootstrap_difference(differences, clusters, resamples=400, seed=trial)[3][0] < 0.05
    return found / trials


def test_a_five_percent_test_rejects_about_five_percent_when_nothing_differs():
    assert 0.025 <= rejections(0.0, True) <= 0.085


def test_rows_that_lean_together_need_clusters():
    assert 0.025 <= rejections(0.25, True) <= 0.085
    assert rejections(0.25, False) > 0.12  # the same data, taken as independent rows, cries wolf


def test_a_true_difference_is_found():
    assert rejections(0.0, True, shift=0.15, trials=60) > 0.8


def test_systems_that_answer_alike_do_not_differ():
    mean, low, high, p = bootstrap_difference(np.zeros((9, 2)), np.arange(9), resamples=99)
    assert (mean == 0).all() and (low == 0).all() and (high == 0).all() and (p == 1).all()


def test_more_seeds_of_the_bootstrap_agree():
    differences = np.random.default_rng(0).integers(-1, 2, size=(301, 1)).astype(float) + 0.08
    first, second = (
        bootstrap_difference(differences, np.arange(301), seed=seed) for seed in (0, 1)
    )
    np.testing.assert_allclose(np.ravel(first), np.ravel(second), atol=0.02)
    again = bootstrap_difference(differences, np.arange(301), seed=0)
    assert np.array_equal(np.ravel(first), np.ravel(again))


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.9]), [1, 1])


@pytest.mark.parametrize(
    "only_a, only_b, both", [(3, 9, 20), (0, 0, 5), (7, 7, 0), (0, 6, 1), (400, 460, 100)]
)
def test_mcnemar_is_scipys_binomial_test(only_a, only_b, both):
    right_a = np.array([True] * only_a + [False] * only_b + [True] * both)
    right_b = np.array([False] * only_a + [True] * only_b + [True] * both)
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(right_a, right_b) == pytest.approx(expected)


def test_clusters_are_premises_numbered_by_first_appearance():
    assert premise_clusters(Rows(["b", "a", "b", "c"], list("wxyz"), None)).tolist() == [0, 1, 0, 2]
    assert premise_clusters(Rows(["b", "a", "b"], None, None)).tolist() == [0, 1, 2]
