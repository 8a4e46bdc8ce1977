import contextlib
import csv
import io
import json
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LABELS, make_data, make_pairs, table, toy_rows
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score
from transformers import AutoModel, AutoTokenizer

import evaluate
import train
from lib import scores
from lib.messages import UserError
from lib.significance import Interval, intervals
from lib.tables import difference_table

LANGUAGES = ["en", "zh", "de"]  # the paper's order
ROWS = 17


@pytest.fixture(scope="module")
def runs(model_folder, data_folder, tmp_path_factory):
    """Two seeds of a run over layers 1 and 3, and one with BERT's own head; three epochs each."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        flags = ["--epochs", 3, "--layers", 1, 3, "--seed", seed]
        fine_tune(model_folder, data_folder, folder / f"wf-seed{seed}", *flags)
    fine_tune(model_folder, data_folder, folder / "baseline", "--epochs", 3, "--head", "pooler")
    return folder


@pytest.fixture(scope="module")
def pair_run(model_folder, tmp_path_factory):
    """A run of one epoch on pairs, beside its data."""
    folder = tmp_path_factory.mktemp("pairs")
    data = make_pairs(make_data(folder / "single", train=30), folder / "data")
    return fine_tune(model_folder, data, folder / "run", "--layers", 1, 3)


@pytest.fixture(scope="module")
def sources(model_folder, tmp_path_factory):
    """Two runs of two epochs, from German and from Chinese, beside their data."""
    folder = tmp_path_factory.mktemp("sources")
    data = Path(make_data(folder / "data"))
    for language in ("de", "zh"):
        shutil.copy(data / f"dev.{language}.tsv", data / f"train.{language}.tsv")
        flags = ["--train-language", language, "--layers", 3, "--epochs", 2]
        fine_tune(model_folder, data, folder / f"from-{language}", *flags)
    return folder


def fine_tune(model, data, out, *flags):
    """A run folder of train.py, of one epoch unless `flags` say more."""
    command = f"--model {model} --data {data} --out {out} --epochs 1 --batch-size 13 --lr 3e-3"
    command += " --precision fp32 --max-length 32"
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*command.split(), *map(str, flags)])
    return out


@pytest.fixture
def run(runs, tmp_path):
    """A run of one's own, that nobody evaluated yet."""
    return copied(runs / "wf-seed0", tmp_path / "run")


@pytest.fixture
def data(data_folder, tmp_path):
    return shutil.copytree(data_folder, tmp_path / "data")


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def write_test(data, language, rows):
    """A test file of (text, class) rows."""
    lines = [f"{text}\t{LABELS[label]}" for text, label in rows]
    write_lines(data / f"test.{language}.tsv", ["text\tlabel", *lines])


@pytest.fixture
def tabulate(tmp_path):
    """tabulate(data, run, ...) runs evaluate.py in this process: results.json and results.md."""

    def call(*arguments):
        flags = ["--out", str(tmp_path / "out"), "--data", *map(str, arguments)]
        with contextlib.redirect_stdout(io.StringIO()) as text:
            evaluate.main(flags)
        written = (tmp_path / "out/results.md").read_text()
        assert written in text.getvalue()
        return json.loads((tmp_path / "out/results.json").read_text()), written

    return call


def kept(run, language, epoch=3):
    return run / "predictions" / str(epoch) / f"test.{language}.npz"


def keep(path, logits):
    """Other logits in a file that a run keeps."""
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "logits": logits.astype(np.float32)})


def classes(data, language="de"):
    rows = table(Path(data) / f"test.{language}.tsv")
    return np.array([LABELS.index(row[-1]) for row in rows])


def right(run, data, language, epoch=3):
    return np.load(kept(run, language, epoch))["logits"].argmax(1) == classes(data, language)


def logits_by_hand(folder, texts):
    """Logits of a kept epoch by plain transformers, one text at a time, so without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder).eval()
    linear = load_file(folder / "classifier.safetensors")
    settings = json.loads((folder / "classifier.json").read_text())
    logits = []
    for text in texts:
        with torch.no_grad():
            output = encoder(**tokenizer(*text, return_tensors="pt"), output_hidden_states=True)
        if settings["head"] == "pooler":
            features = output.pooler_output
        else:
            features = torch.cat([output.hidden_states[k].amax(1) for k in settings["layers"]], 1)
        row = features @ linear["classifier.1.weight"].T + linear["classifier.1.bias"]
        logits.append(row[0].numpy())
    return np.array(logits)


def logits_of_file(run, data, language="de"):
    texts = [row[:-1] for row in table(Path(data) / f"test.{language}.tsv")]
    return logits_by_hand(run / "epochs/3", texts)


def copied(run, out):
    """A run without what evaluate.py has kept in it."""
    return shutil.copytree(run, out, ignore=shutil.ignore_patterns("predictions"))


def columns(markdown):
    """The first table of results.md: {first cell: the other cells}; its lines are aligned."""
    lines = markdown[markdown.index("|") :].split("\n\n")[0].splitlines()
    assert len({len(line) for line in lines}) == 1
    rows = {}
    for line in lines[:1] + lines[2:]:
        first, *others = [cell.strip() for cell in line.strip("|").split("|")]
        rows[first] = others
    return rows


@pytest.fixture
def no_models(monkeypatch):
    """Call it, and from then on no model is loaded."""
    return lambda: monkeypatch.setattr(evaluate, "load_model", None)


@pytest.fixture
def refused(script, tmp_path):
    """refused(message, flags...): evaluate.py says that, and writes nothing."""

    def call(message, *arguments):
        before = sorted(tmp_path.rglob("*"))
        status, _, error = script("evaluate", *arguments)
        assert status == 2 and message in error, error
        assert sorted(tmp_path.rglob("*")) == before

    return call


# --- logits and accuracies ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wf-seed1", "baseline"])
def test_kept_logits_are_those_of_plain_transformers(name, runs, data_folder, tabulate):
    results, _ = tabulate(data_folder, runs / name)
    for language in LANGUAGES:
        logits = np.load(kept(runs / name, language))["logits"]
        expected = logits_of_file(runs / name, data_folder, language)
        assert logits.dtype == np.float32 and logits.shape == (ROWS, 4)
        assert np.abs(logits - expected).max() < 1e-5
        accuracy = accuracy_score(classes(data_folder, language), logits.argmax(1))
        assert results["systems"][0]["runs"][0]["accuracy"][language] == accuracy


def test_dev_accuracies_are_those_of_the_metrics(runs, data_folder, tabulate):
    results, _ = tabulate(data_folder, runs / "wf-seed0", "--split", "dev")
    expected = {}
    for line in (runs / "wf-seed0" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "dev" and row["epoch"] == 3:
            expected[row["language"]] = row["accuracy"]
    assert results["systems"][0]["mean"] == expected
    assert results["split"] == "dev" and results["rows"] == dict.fromkeys(LANGUAGES, 13)


def test_a_second_call_reads_the_logits_and_no_model(run, data, tmp_path, no_models, tabulate):
    """Also where the weights were deleted since."""
    first, _ = tabulate(data, run)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "results.md"}
    names = {path.name for path in (run / "predictions/3").iterdir()}
    assert names == {f"test.{language}.npz" for language in LANGUAGES}
    no_models()
    assert tabulate(data, run)[0] == first
    shutil.rmtree(run / "epochs")
    assert tabulate(data, run)[0] == first


@pytest.mark.parametrize("changed", ["test.de.tsv", "model.safetensors", "classifier.safetensors"])
def test_logits_of_other_data_or_weights_are_computed_again(
    changed, run, runs, data, no_models, tabulate
):
    """A run that was made anew is copied over an old one, whose logits are still there."""
    tabulate(data, run)
    keep(kept(run, "de"), np.zeros((ROWS, 4)))  # which nothing else would find out
    if changed == "test.de.tsv":
        write_test(data, "de", toy_rows("de", ROWS, 5))
    else:
        shutil.copy(runs / "wf-seed1/epochs/3" / changed, run / "epochs/3" / changed)
    results, _ = tabulate(data, run)
    expected = accuracy_score(classes(data), logits_of_file(run, data).argmax(1))
    assert results["systems"][0]["mean"]["de"] == expected
    no_models()
    tabulate(data, run)


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_damaged_logits_are_computed_again(content, run, data, tabulate):
    first, _ = tabulate(data, run)
    path = kept(run, "zh")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] if content is None else content)
    assert tabulate(data, run)[0] == first
    assert path.read_bytes() == whole


def test_a_run_that_cannot_be_written_is_evaluated(run, data, tmp_path, script):
    (run / "predictions").write_text("a file where a folder should be")
    status, text, error = script("evaluate", run, "--data", data, "--out", tmp_path / "out")
    assert status == 0 and "| run " in text
    assert f"{run}/predictions/3 cannot be written (" in error and "no logits are kept" in error
    assert error.count("cannot be written") == 1


def test_max_rows_are_spread_evenly(run, data, tabulate):
    tabulate(data, run)
    chosen = [0, 3, 6, 10, 13]  # of 17
    expected = {language: right(run, data, language)[chosen].mean() for language in LANGUAGES}
    results, _ = tabulate(data, run, "--max-rows", 5)
    assert results["systems"][0]["mean"] == expected
    assert results["rows"] == dict.fromkeys(LANGUAGES, 5)
    assert tabulate(data, run)[0]["rows"] == dict.fromkeys(LANGUAGES, ROWS)


# --- the epoch to report --------------------------------------------------------------------------


@pytest.fixture
def four_epochs(run):
    """A run that kept four epochs, whose best are by hand: en 2 (tied with 3), de 4, zh 1, their
    mean 1."""
    by_hand = {"en": [0.5, 0.7, 0.7, 0.6], "de": [0.3, 0.3, 0.2, 0.5], "zh": [0.6, 0.2, 0.4, 0.3]}
    lines = []
    for language, values in by_hand.items():
        for epoch, accuracy in enumerate(values, 1):
            row = {"epoch": epoch, "split": "dev", "language": language, "accuracy": accuracy}
            lines.append(json.dumps(row | {"frozen_layers": []}))
    write_lines(run / "metrics.jsonl", lines)
    for epoch in "124":
        shutil.copytree(run / "epochs/3", run / "epochs" / epoch, dirs_exist_ok=True)
    return run


def test_only_what_is_asked_for_is_computed(four_epochs, data, monkeypatch, tabulate):
    """Each file is predicted once by each epoch that a protocol names, and no other."""
    loaded, load = [], evaluate.load_model
    monkeypatch.setattr(evaluate, "load_model", lambda path: loaded.append(path.name) or load(path))
    results, text = tabulate(data, four_epochs)
    assert loaded == ["4"] and "each protocol" not in text
    assert list(results["systems"][0]["protocols"]) == ["last"]
    names = ["oracle", "joint", "last", "mean"]
    results, text = tabulate(data, four_epochs, "--epoch", *names)
    (run,) = results["systems"][0]["runs"]
    for name, epochs in zip(names, ([2, 1, 4], [1] * 3, [4] * 3, ["mean"] * 3)):
        assert run["protocols"][name]["epochs"] == dict(zip(LANGUAGES, epochs))
    assert results["epoch"] == "oracle" and "epoch: oracle" in text
    assert loaded[1:] == ["2", "1", "1", "mean"]  # once for each protocol at most
    files = [str(path.relative_to(four_epochs)) for path in four_epochs.rglob("*.npz")]
    expected = [(1, "zh"), (1, "en"), (1, "de"), (2, "en")]
    expected += [(epoch, language) for epoch in (4, "mean") for language in LANGUAGES]
    names = [f"predictions/{epoch}/test.{language}.npz" for epoch, language in expected]
    assert sorted(files) == sorted(names)


def test_an_epoch_that_was_not_kept(four_epochs, data, refused, tmp_path):
    shutil.rmtree(four_epochs / "epochs/3")
    message = f"{four_epochs} did not keep epoch 3, but 1 2 4"
    refused(message, four_epochs, "--data", data, "--out", tmp_path / "out", "--epoch", 3)


def test_a_protocol_without_its_sets(four_epochs, data, refused, tmp_path):
    metrics = four_epochs / "metrics.jsonl"
    write_lines(metrics, [l for l in metrics.read_text().splitlines() if '"zh"' not in l])
    arguments = four_epochs, "--data", data, "--out", tmp_path / "out", "--epoch"
    for protocol, name in (("oracle", "zh"), ("test", "test")):
        message = f"{four_epochs} was not evaluated after each epoch on the sets of {name} (of dev"
        refused(message, *arguments, protocol)


# --- the table ------------------------------------------------------------------------------------


def test_a_run_and_its_copy_are_not_two_seeds(runs, run, data_folder, tmp_path, refused):
    files = "--data", data_folder, "--out", tmp_path / "out"
    refused("are the same run (seed 0), which would count twice", runs / "wf-seed0", run, *files)


def test_seeds_are_averaged_in_fractions_and_shown_in_percent(runs, data_folder, tabulate):
    names = ["wf-seed0", "baseline", "wf-seed1"]
    results, text = tabulate(data_folder, *(runs / name for name in names))
    seeds, baseline = results["systems"]
    assert (seeds["name"], baseline["name"]) == ("wf", "baseline")
    rows = columns(text)
    assert list(rows) == ["system", "wf (2 seeds)", "baseline"]
    assert rows["system"] == [*LANGUAGES, "mean"]
    for i, language in enumerate(LANGUAGES):
        values = [entry["accuracy"][language] for entry in seeds["runs"]]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        assert seeds["mean"][language] == pytest.approx(mean)
        assert seeds["std"][language] == pytest.approx(deviation)
        assert rows["wf (2 seeds)"][i] == f"{100 * mean:.1f} ±{100 * deviation:.1f}"
        assert rows["baseline"][i] == f"{100 * baseline['mean'][language]:.1f}"
    assert rows["baseline"][3] == f"{100 * statistics.mean(baseline['mean'].values()):.1f}"
    assert "standard deviation over seeds" in text and "17 rows a language" in text


def some_run(seed, lr=1e-3, data="aa", path="data"):
    return {
        "arguments": {"lr": lr, "seed": seed},
        "labels": LABELS,
        "data": {"train.en.tsv": data},
        "data_folder": path,
        "model": path,
        "command": f"train.py --data {path}",
    }


@pytest.mark.parametrize(
    "folders, settings, expected",
    [
        ("a/wf-seed0 a/wf_s1 a/wf-seed10", [(0,), (1,), (10,)], {"wf": [0, 1, 2]}),
        ("w-6-8 w-6-11", [(0, 1e-3), (0, 2e-3)], {"w-6-8": [0], "w-6-11": [1]}),
        ("a/wf b/wf", [(0, 1e-3), (0, 2e-3)], {"wf": [0], "wf'": [1]}),
        # the data, not its path
        (
            "wf-0 base wf-1",
            [(0,), (0, 1.0), (1, 1e-3, "aa", "../data/")],
            {"wf": [0, 2], "base": [1]},
        ),
        ("wf-0 wf-1", [(0, 1.0, "aa"), (1, 1.0, "bb")], {"wf-0": [0], "wf-1": [1]}),
    ],
)
def test_runs_that_differ_in_the_seed_alone_are_one_system(folders, settings, expected):
    runs = [some_run(*setting) for setting in settings]
    assert scores.group_runs(folders.split(), runs) == expected


PAPER = """BERT, Translate-Train, cased         81.9 76.6 77.8 75.9 70.7 61.6
           BERT, Zero-Shot, uncased (baseline)  81.4 63.8 74.3 70.5 62.1 58.3
           MC-BERT, Zero-Shot, uncased          81.8 65.3 74.7 70.6 62.4 57.8
           MC-BERT-WF, Zero-Shot, uncased       82.1 66.6 74.4 71.8 64.3 59.0"""


def test_the_paper_stands_beside_xnli(run, data, tabulate):
    source = {"archive": "XNLI-1.0.zip", "member": "XNLI-1.0/xnli.test.tsv"}
    (data / "sources.json").write_text(json.dumps({"test.en.tsv": source}))
    results, text = tabulate(data, run)
    rows = columns(text)
    assert len(results["paper"]) == 4
    for line in PAPER.splitlines():
        name, numbers = line[:-29].strip(), line[-29:]
        en, zh, _, de, _, ur = numbers.split()
        mean = (float(en) + float(zh) + float(de)) / 3  # of the languages there are
        assert rows[f"paper: {name}"] == [en, zh, de, f"{mean:.1f}"]
        assert results["paper"][name]["ur"] == pytest.approx(float(ur) / 100)
    published = rows["published: XLM-R base (He et al. 2021)"]
    assert list(rows)[-1] == "run" and published == ["85.8", "76.7", "78.7", "80.4"]


def test_the_paper_does_not_stand_beside_other_data(run, data, tabulate):
    source = {"archive": "amazon-massive-dataset-1.0.tar.gz"}
    (data / "sources.json").write_text(json.dumps({"test.en.tsv": source}))
    results, text = tabulate(data, run)
    assert "paper" not in results and list(columns(text)) == ["system", "run"]


def test_a_run_that_is_not_finished_is_called_out(run, data, tabulate, capsys):
    description = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**description, "complete": False}))
    tabulate(data, run)
    assert capsys.readouterr().err == f"warning: {run} is not finished\n"


# --- bad input ------------------------------------------------------------------------------------


def test_labels_that_disagree(run, data, refused, tmp_path):
    write_lines(data / "labels.txt", reversed(LABELS))
    message = f"{run} was trained for the labels refund agent delivery cancel, {data}/labels.txt "
    message += "says cancel delivery agent refund"
    refused(message, run, "--data", data, "--out", tmp_path / "out")


EARLY = b'{"split": "dev", "epoch": 0.5, "language": "en", "accuracy": 1, "frozen_layers": []}\n'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("run.json", b"{}", "run.json lacks 'arguments': not made by this version of train.py?"),
        ("metrics.jsonl", EARLY, "metrics.jsonl holds no evaluation: has the run finished an ep"),
    ],
)
def test_a_run_that_lacks_something(name, content, message, run, data, refused, tmp_path):
    (run / name).write_bytes(content)
    refused(f"{run}/{message}", run, "--data", data, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("run --input x --predictions y --data d", "labels your own text: leave out the flags"),
        ("run --input i --predictions p --translate-train r", "leave out the flags of a table"),
        ("run", "give --data and --out for a table"),
        ("run --data d --out o --text body", "--input labels your own text: leave out"),
        ("run --text body", "needs --input, --predictions"),
        ("run --input x.csv --predictions x.csv", "--predictions would be written over --input"),
        ("--data d --out o", "name a run folder"),
        ("run --data d --out o --epoch last best", "--epoch best: expected last, mean, en, joint,"),
        ("run --input i", "needs --input, --predictions"),
        ("a b --input i --predictions p", "exactly one run"),
        ("run --input i --predictions p --epoch en", "leave out the flags of a table"),
    ],
)
def test_bad_flags(flags, message, refused):
    refused(message, *flags.split())


# --- a user's own text ----------------------------------------------------------------------------


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def own_text(folder, *lines):
    """Flags of evaluate.py that label a file of these lines."""
    write_lines(folder / "my.tsv", lines)
    return "--input", folder / "my.tsv", "--predictions", folder / "out.tsv"


@pytest.mark.parametrize("pairs", [False, True])
def test_predictions_for_ones_own_text(pairs, runs, pair_run, script, tmp_path):
    """Columns and rows stay as they are; the answers are those of plain transformers."""
    run, epoch, header, second = runs / "wf-seed0", "3", "text\tlabel", []
    if pairs:
        run, epoch, header, second = pair_run, "1", "text_a\ttext_b\tlabel", ['the "parcel']
    rows = toy_rows("en", 11, 9)
    texts, truth = [[text, *second] for text, _ in rows], [label for _, label in rows]
    lines = ["\t".join([*cells, LABELS[label]]) for cells, label in zip(texts, truth)]
    status, text, _ = script(
        "evaluate", run, *own_text(tmp_path, header, *lines), "--batch-size", 3
    )
    written = (tmp_path / "out.tsv").read_text().splitlines()
    first, *answers = [line.rsplit("\t", 5) for line in written]
    assert first == [header, "prediction", *(f"p_{name}" for name in LABELS)]
    assert [cells[0] for cells in answers] == lines
    expected = softmax(logits_by_hand(run / "epochs" / epoch, texts))
    probabilities = np.array([cells[2:] for cells in answers], float)
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-5)
    assert [cells[1] for cells in answers] == [LABELS[i] for i in expected.argmax(1)]
    accuracy = 100 * accuracy_score(truth, expected.argmax(1))
    assert status == 0 and f"11 rows, by {run}/epochs/{epoch}; accuracy {accuracy:.1f}" in text


def test_classify_labels_texts_from_python(runs, pair_run, capsys):
    """By a run, which counts at its last epoch, and by a folder that is no run's."""
    texts, run = ["my money", "please cancel", "the late parcel now"], runs / "baseline"
    expected = softmax(logits_by_hand(run / "epochs" / "3", [[text] for text in texts]))
    grid = run.parent / "grid"  # as the search leaves it
    shutil.copytree(run / "epochs" / "3", grid / "model")
    for folder in (str(run), run / "epochs" / "3", grid):
        labels, probabilities = evaluate.classify(folder, iter(texts))
        assert labels == [LABELS[i] for i in expected.argmax(1)]
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    none = run / "epochs"
    for folder, wrong in ((pair_run, texts), (run, [("my", "money")]), (run, []), (none, texts)):
        with pytest.raises(UserError, match="was trained on|no texts|no run of train.py and no"):
            evaluate.classify(folder, wrong)
    assert capsys.readouterr() == ("", "")


def test_a_spreadsheet_in_and_json_lines_out(runs, script, refused, tmp_path):
    """Named columns, a semicolon, a line break in a cell; rows whose label is not known."""
    texts = ["my money; now", "please\ncancel", "the parcel", "person"]
    with open(tmp_path / "my.csv", "w", newline="", encoding="utf-8-sig") as file:
        rows = zip("1234", texts, ["refund", "", "", "agent"])
        csv.writer(file, delimiter=";").writerows([["id", "body", "label"], *rows])
    model, out = runs / "wf-seed0/epochs/mean", tmp_path / "new/out.jsonl"
    files = "--input", tmp_path / "my.csv", "--predictions", out
    status, text, _ = script("evaluate", model, *files, "--text", "body")
    predicted = logits_by_hand(model, [[text] for text in texts]).argmax(1)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = [(row["id"], row["body"], row["prediction"]) for row in rows]
    assert isinstance(rows[0]["p_refund"], float)
    assert found == list(zip("1234", texts, [LABELS[i] for i in predicted]))
    accuracy = 100 * np.mean([predicted[0] == 0, predicted[3] == 1])
    assert status == 0 and f"accuracy {accuracy:.1f} on the 2 whose label is known" in text
    again = model, "--input", out, "--predictions", tmp_path / "again.csv", "--text"
    refused("has a column 'prediction', which would be lost: rename it", *again, "body")
    message = f"has no column 'x' but {', '.join(rows[0])}; {model} was trained on single texts"
    refused(message, *again, "x")


def test_standard_input_and_output(runs, script, tmp_path, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"text\tid\nmy money\t7\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    files = "--input", "-", "--predictions", "-"
    status, text, error = script("evaluate", runs / "baseline", *files)
    header, row = text.splitlines()
    assert status == 0 and header.startswith("text\tid\tprediction\tp_refund")
    assert row.startswith("my money\t7\t") and "1 rows, by" in error


def test_pairs_and_single_texts_are_told_apart(runs, pair_run, data_folder, refused, tmp_path):
    """By --input and by --data, both ways."""
    single, pair, pairs = "single texts (text)", "pairs (text_a, text_b)", pair_run.parent / "data"
    for run, kind, lines, data, other in (
        (runs / "wf-seed0", single, ["text_a\ttext_b", "my money\tmy parcel"], pairs, pair),
        (pair_run, pair, ["text", "my money"], data_folder, single),
    ):
        was = f"{run} was trained on {kind}"
        refused(was, run, *own_text(tmp_path, *lines))
        refused(f"{data} holds {other}, {was}", run, "--data", data, "--out", tmp_path / "out")


def test_a_label_that_the_model_does_not_know(runs, refused, tmp_path):
    files = own_text(tmp_path, "text\tlabel", "my money\trefund", "my parcel\tdelivry")
    message = "my.tsv, line 3: unknown label 'delivry', expected one of"
    refused(message, runs / "baseline", *files)


# --- differences, protocols, Translate-Train ------------------------------------------------------


def test_differences_are_those_of_the_kept_logits(runs, data_folder, tabulate):
    """One seed against two: on the one that both have, of the rows alone, every row its own group,
    marked, without a star."""
    names = ["baseline", "wf-seed0", "wf-seed1"]
    results, text = tabulate(data_folder, *(runs / name for name in names))
    baseline, wf = results["systems"]
    assert results["baseline"] == "baseline" and "difference" not in baseline
    for language in LANGUAGES:
        rows = [right(runs / name, data_folder, language) * 1.0 for name in names]
        difference = rows[1] - rows[0]
        expected = intervals(difference[None, :, None], np.arange(ROWS))[0]._asdict()
        entry = wf["difference"][language]
        assert list(entry) == ["difference", "low", "high", "p", "by_seed", "seeds", "p_holm"]
        assert entry.pop("p_holm") >= entry["p"]
        assert entry.pop("by_seed") == pytest.approx(expected.pop("by_seed"))
        assert entry == pytest.approx(expected)
        low, high = 100 * entry["low"], 100 * entry["high"]
        assert f"{100 * entry['difference']:+.1f} [{low:+.1f}, {high:+.1f}]†" in text
    assert "| wf (1 of 2 seeds) |" in text
    others = np.mean([wf["difference"][language]["difference"] for language in ("de", "zh")])
    assert wf["difference"]["others"]["difference"] == pytest.approx(others)
    assert "† One seed: the rows' interval" in text and "]*" not in text
    _, text = tabulate(data_folder, *(runs / name for name in names[::2]))
    assert "for want of a seed in common: wf-seed1." in text


def test_a_star_needs_holms_p_and_two_seeds():
    entry = Interval(0.021, 0.01, 0.03, 0.01, [0.02, 0.022], 2)._asdict()
    table = difference_table(
        {
            "a": {"de": {**entry, "p_holm": 0.04}, "others": entry},
            "b": {"de": {**entry, "p_holm": 0.06}, "others": {**entry, "p": 0.06}},
            "c": {"de": {**entry, "p_holm": 0.04, "seeds": 1}},
        },
        ["en", "de", "others"],
    )
    cell = "+2.1 [+1.0, +3.0]"
    assert columns(table) == {
        "system": ["de", "others", "others, each seed"],
        "a": [cell + "*", cell + "*", "+2.0 +2.2"],
        "b": [cell, cell, "+2.0 +2.2"],
        "c": [cell + "†", "", ""],
    }


def test_rows_of_a_group_are_drawn_together(runs, run, data, tmp_path, tabulate):
    """All rows are one group, so that each resample holds all rows."""
    for path in data.glob("test.*.tsv"):
        header, *lines = path.read_text().splitlines()
        write_lines(path, [f"{header}\tgroup", *(f"{line}\tframe" for line in lines)])
    baseline = copied(runs / "baseline", tmp_path / "baseline")
    results, _ = tabulate(data, baseline, run)
    for entry in results["systems"][1]["difference"].values():
        assert entry["low"] == pytest.approx(entry["difference"]) == entry["high"]


def test_an_unknown_baseline_names_the_systems(runs, data_folder, tmp_path, refused, tabulate):
    folders = runs / "baseline", runs / "wf-seed0"
    flags = *folders, "--data", data_folder, "--out", tmp_path / "out", "--baseline"
    refused("--baseline x: the systems are baseline wf-seed0", *flags, "x")
    results, _ = tabulate(data_folder, *folders, "--baseline", "wf-seed0")
    assert "difference" in results["systems"][0] and "difference" not in results["systems"][1]


def test_languages_that_are_no_translations_have_no_mean(run, runs, data, tmp_path, tabulate):
    """German has other rows, and fewer; where it is gone, one language is no mean either."""
    write_test(data, "de", toy_rows("de", 11, 5))
    baseline = copied(runs / "baseline", tmp_path / "baseline")
    results, text = tabulate(data, baseline, run)
    assert list(results["systems"][1]["difference"]) == LANGUAGES
    assert "rows: en 17, zh 17, de 11." in text and "others" not in text
    assert "rows are no translations: no mean over them" in text and not results["parallel"]
    (data / "test.de.tsv").unlink()
    results, text = tabulate(data, baseline, run)
    assert list(results["systems"][1]["difference"]) == ["en", "zh"]
    assert "no translations" not in text


def test_the_protocols_that_are_asked_for_stand_side_by_side(runs, data_folder, tabulate):
    names = ["joint", "mean", "en", "oracle"]
    results, text = tabulate(data_folder, runs / "wf-seed0", "--epoch", *names)
    (system,) = results["systems"]
    assert list(system["protocols"]) == names and list(system["protocol_differences"]) == names[1:]
    for name in names:
        alone, _ = tabulate(data_folder, runs / "wf-seed0", "--epoch", name)
        mean = alone["systems"][0]["mean"]
        assert mean == system["protocols"][name]
        for language in LANGUAGES if name != "joint" else ():
            difference = system["protocol_differences"][name][language]["difference"]
            assert difference == pytest.approx(mean[language] - system["mean"][language])
    assert "Difference to the same runs at `joint`" in text and "| wf-seed0, oracle |" in text


# --- the source language --------------------------------------------------------------------------


def test_two_sources_are_two_systems(sources, tabulate):
    folders = sources / "from-de", sources / "from-zh"
    flags = ["--epoch", "last", "mean", "en"]
    results, text = tabulate(sources / "data", *folders, *flags)
    names = [(system["name"], system["train_language"]) for system in results["systems"]]
    assert names == [("from-de", "de"), ("from-zh", "zh")]
    assert list(columns(text)) == ["system", "from-de (from de)", "from-zh (from zh)"]
    assert "`en`: best on the source language's own dev set (of each system)" in text
    for system in results["systems"]:  # `others`: all but its own source
        last, mean, _ = system["protocols"].values()
        source = system["train_language"]
        others = [language for language in LANGUAGES if language != source]
        expected = np.mean([mean[language] - last[language] for language in others])
        difference = system["protocol_differences"]["mean"]["others"]["difference"]
        assert difference == pytest.approx(expected)
        assert f"{100 * mean[source]:.1f} / {50 * sum(mean[l] for l in others):.1f}" in text
    alone, text = tabulate(sources / "data", folders[0], "--epoch", "en")
    assert list(alone["systems"][0]["mean"]) == LANGUAGES and "trained on de" in text
    assert "epoch: en (best on the source language's own dev set (de), true zero-shot)" in text


def test_translate_train_is_one_row_of_models_each_in_its_own_language(
    runs, sources, tmp_path, refused, tabulate
):
    data, baseline = sources / "data", runs / "baseline"
    models = ["--translate-train", sources / "from-de", sources / "from-zh"]
    results, text = tabulate(data, baseline, *models)
    first, system = results["systems"]
    assert system["name"] == "Translate-Train" and system["train_language"] is None
    assert [list(entry["accuracy"]) for entry in system["runs"]] == [["de"], ["zh"]]
    zh, de = (right(sources / f"from-{l}", data, l, epoch=2).mean() for l in ("zh", "de"))
    assert system["mean"] == {"zh": zh, "de": de} and list(first["mean"]) == LANGUAGES
    cells = columns(text)["Translate-Train (from each language)"]
    assert cells[:2] == ["", f"{100 * zh:.1f}"]  # nothing was trained on English
    assert list(system["difference"]) == ["zh", "de", "others"]
    expected = (zh - first["mean"]["zh"] + de - first["mean"]["de"]) / 2
    assert system["difference"]["others"]["difference"] == pytest.approx(expected)
    less = shutil.copytree(data, tmp_path / "less", ignore=shutil.ignore_patterns("test.zh.tsv"))
    message = f"{sources / 'from-zh'}: {less} has no test file in its language, zh"
    refused(message, *models, "--data", less, "--out", tmp_path / "less-out")
