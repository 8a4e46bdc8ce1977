import contextlib
import io
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score
from transformers import AutoModel, AutoTokenizer

import evaluate
import train
from conftest import make_data, toy_rows

LABELS = ["refund", "agent", "delivery", "cancel"]
LANGUAGES = ["en", "zh", "de"]  # the paper's order
ROWS = 17


@pytest.fixture(scope="module")
def runs(model_folder, data_folder, tmp_path_factory):
    """Two seeds of a run over layers 1 and 3, and one with BERT's own head; three epochs each. Not to be written to."""
    folder = tmp_path_factory.mktemp("runs")
    flags = (f"--model {model_folder} --data {data_folder} --epochs 3 --batch-size 13 --lr 3e-3 --precision fp32 "
             "--max-length 32").split()
    with contextlib.redirect_stdout(io.StringIO()):
        for seed in "01":
            train.main([*flags, "--out", str(folder / f"wf-seed{seed}"), "--layers", "1", "3", "--seed", seed])
        train.main([*flags, "--out", str(folder / "baseline"), "--head", "pooler"])
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """A run of one's own, that nobody evaluated yet."""
    return shutil.copytree(runs / "wf-seed0", tmp_path / "run", ignore=shutil.ignore_patterns("predictions"))


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
    return [(cells[:-1], LABELS.index(cells[-1])) for cells in
            (line.split("\t") for line in Path(path).read_text().splitlines()[1:])]


def logits_by_hand(folder, texts):
    """Logits of a kept epoch by plain transformers, one text at a time, so without padding."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    linear, settings = load_file(folder / "classifier.safetensors"), json.loads((folder / "classifier.json").read_text())
    logits = []
    for text in texts:
        with torch.no_grad():
            output = encoder(**tokenizer(*text, return_tensors="pt"), output_hidden_states=True)
        features = output.pooler_output if settings["head"] == "pooler" else torch.cat(
            [output.hidden_states[k].amax(1) for k in settings["layers"]], 1)
        logits.append((features @ linear["classifier.1.weight"].T + linear["classifier.1.bias"])[0].numpy())
    return np.array(logits)


def columns(markdown):
    """The first table of results.md: {first cell: the other cells}; its lines are aligned."""
    lines = markdown[markdown.index("|"):].split("\n\n")[0].splitlines()
    assert len({len(line) for line in lines}) == 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|--")]
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
        assert results["systems"][0]["runs"][0]["accuracy"][language] == accuracy_score([y for _, y in rows], logits.argmax(1))


def test_dev_accuracies_are_those_of_the_metrics(runs, data_folder, tmp_path):
    results, _ = tabulate(tmp_path / "out", data_folder, runs / "wf-seed0", "--split", "dev")
    rows = [json.loads(line) for line in (runs / "wf-seed0" / "metrics.jsonl").read_text().splitlines()]
    assert results["systems"][0]["mean"] == {row["language"]: row["accuracy"]
                                             for row in rows if row["split"] == "dev" and row["epoch"] == 3}
    assert results["split"] == "dev" and results["rows"] == dict.fromkeys(LANGUAGES, 13)


def test_a_second_call_reads_the_logits_and_no_model(run, data, tmp_path, monkeypatch):
    first, _ = tabulate(tmp_path / "one", data, run)
    no_models(monkeypatch)
    second, _ = tabulate(tmp_path / "two", data, run)
    assert first == second


def test_changed_data_is_computed_again(run, data, tmp_path, monkeypatch):
    tabulate(tmp_path / "one", data, run)
    rows = toy_rows("de", 11, 5)
    (data / "test.de.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{LABELS[label]}\n" for text, label in rows))
    results, _ = tabulate(tmp_path / "two", data, run)
    expected = logits_by_hand(run / "epochs" / "3", [[text] for text, _ in rows]).argmax(1)
    assert results["systems"][0]["mean"]["de"] == accuracy_score([label for _, label in rows], expected)
    assert results["rows"] == {"en": ROWS, "zh": ROWS, "de": 11}
    no_models(monkeypatch)
    tabulate(tmp_path / "three", data, run)


def test_max_rows_are_spread_evenly(run, data, tmp_path):
    tabulate(tmp_path / "all", data, run)
    logits = {language: np.load(run / "predictions" / "3" / f"test.{language}.npy") for language in LANGUAGES}
    results, _ = tabulate(tmp_path / "some", data, run, "--max-rows", 5)
    for language in LANGUAGES:
        chosen = [0, 3, 6, 10, 13]  # of 17
        truth = [read_rows(data / f"test.{language}.tsv")[i][1] for i in chosen]
        assert results["systems"][0]["mean"][language] == accuracy_score(truth, logits[language][chosen].argmax(1))
    assert results["rows"] == dict.fromkeys(LANGUAGES, 5)
    assert tabulate(tmp_path / "again", data, run)[0]["rows"] == dict.fromkeys(LANGUAGES, ROWS)


def test_damaged_logits_are_said(run, data, script, tmp_path):
    tabulate(tmp_path / "one", data, run)
    path = run / "predictions" / "3" / "test.zh.npy"
    path.write_bytes(path.read_bytes()[:100])
    status, _, error = script("evaluate", run, "--data", data, "--out", tmp_path / "two")
    assert status == 2 and f"{path} is damaged or cut short (" in error and not (tmp_path / "two").exists()


# --- the epoch to report -----------------------------------------------------------------------------------------

@pytest.fixture
def four_epochs(run):
    """A run that kept four epochs, whose best are by hand: en 2 (tied with 3), de 4, zh 1, their mean 1."""
    rows = []
    for language, values in {"en": [.5, .7, .7, .6], "de": [.3, .3, .2, .5], "zh": [.6, .2, .4, .3]}.items():
        rows += [{"epoch": 1 + i, "split": "dev", "language": language, "accuracy": value} for i, value in enumerate(values)]
    rows += [{"epoch": 2.5, "split": "dev", "language": "en", "accuracy": 0.99},  # in the midst of an epoch: not kept
             {"epoch": 3, "split": "train", "language": "", "accuracy": 0.99},
             *({"epoch": 3, "split": "test", "language": language, "accuracy": 0.99} for language in LANGUAGES)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for epoch in "124":
        shutil.copytree(run / "epochs" / "3", run / "epochs" / epoch, dirs_exist_ok=True)
    return run


@pytest.mark.parametrize("protocol, expected", [
    ("last", [4, 4, 4]), ("en", [2, 2, 2]), ("joint", [1, 1, 1]), ("oracle", [2, 1, 4]), ("3", [3, 3, 3])])
def test_epoch_of_each_protocol(protocol, expected, four_epochs, data, tmp_path):
    results, text = tabulate(tmp_path / "out", data, four_epochs, "--epoch", protocol)
    assert results["systems"][0]["runs"][0]["epochs"] == dict(zip(LANGUAGES, expected))
    assert results["epoch"] == protocol and f"epoch: {protocol}" in text
    for language, epoch in zip(LANGUAGES, expected):
        assert (four_epochs / "predictions" / str(epoch) / f"test.{language}.npy").is_file()


def test_the_papers_own_way_is_the_epoch_best_on_test(four_epochs, data, script, tmp_path):
    arguments = four_epochs, "--data", data, "--out", tmp_path / "out", "--epoch", "test"
    status, _, error = script("evaluate", *arguments)
    assert status == 2 and "was evaluated on test in no language alone (train.py --track-test)" in error
    with open(four_epochs / "metrics.jsonl", "a") as file:
        for epoch, (en, de, zh) in enumerate([(.9, .2, .2), (.1, .3, .6), (.2, .5, .4), (.9, .4, .4)], 1):
            file.writelines(json.dumps({"epoch": epoch, "split": "test", "language": language, "accuracy": value}) + "\n"
                            for language, value in (("en", en), ("de", de), ("zh", zh)))
    results, text = tabulate(tmp_path / "out", data, four_epochs, "--epoch", "test")
    assert results["systems"][0]["runs"][0]["epochs"] == {"en": 2, "zh": 2, "de": 2}  # 45 %, as epoch 3, which is later
    assert "as the paper did: too high by the choice" in text
    results, _ = tabulate(tmp_path / "last", data, four_epochs)
    assert "test" in results["systems"][0]["protocols"]


def test_an_epoch_that_was_not_kept(four_epochs, data, script, tmp_path):
    shutil.rmtree(four_epochs / "epochs" / "3")
    status, _, error = script("evaluate", four_epochs, "--data", data, "--out", tmp_path / "out", "--epoch", 3)
    assert status == 2 and f"{four_epochs} did not keep epoch 3, but 1 2 4" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol, there", [("oracle", "en de"), ("joint", "en"), ("en", "de zh")])
def test_a_protocol_without_its_dev_sets(protocol, there, four_epochs, data, script, tmp_path):
    lines = (four_epochs / "metrics.jsonl").read_text().splitlines(keepends=True)
    (four_epochs / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["language"] in there.split()))
    status, _, error = script("evaluate", four_epochs, "--data", data, "--out", tmp_path / "out", "--epoch", protocol)
    assert status == 2 and f"--epoch {protocol}: {four_epochs} was evaluated on dev in {there} alone" in error


# --- the table ---------------------------------------------------------------------------------------------------

def test_seeds_are_averaged_in_fractions_and_shown_in_percent(runs, data_folder, tmp_path):
    names = ["wf-seed0", "baseline", "wf-seed1"]
    results, text = tabulate(tmp_path / "out", data_folder, *(runs / name for name in names))
    seeds, baseline = results["systems"]
    assert [system["name"] for system in results["systems"]] == ["wf", "baseline"]
    assert [(Path(run["run"]).name, run["seed"]) for run in seeds["runs"]] == [("wf-seed0", 0), ("wf-seed1", 1)]
    table = columns(text)
    assert list(table) == ["system", "wf (2 seeds)", "baseline"] and table["system"] == [*LANGUAGES, "mean"]
    for i, language in enumerate(LANGUAGES):
        values = [run["accuracy"][language] for run in seeds["runs"]]
        assert all(value * ROWS == pytest.approx(round(value * ROWS), abs=1e-12) for value in values)  # not rounded
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        assert seeds["mean"][language] == pytest.approx(mean, abs=1e-15)
        assert seeds["std"][language] == pytest.approx(deviation, abs=1e-15)
        assert table["wf (2 seeds)"][i] == f"{100 * mean:.1f} ±{100 * deviation:.1f}"
        assert table["baseline"][i] == f"{100 * baseline['mean'][language]:.1f}" and baseline["std"][language] == 0
    assert table["baseline"][3] == f"{100 * statistics.mean(baseline['mean'].values()):.1f}"
    assert "standard deviation over seeds" in text and "17 rows a language" in text


def some_run(seed, lr=1e-3):
    return {"arguments": {"lr": lr, "seed": seed, "train_language": "en"}, "labels": LABELS}


@pytest.mark.parametrize("folders, settings, expected", [
    (["a/wf-seed0", "a/wf-seed1", "a/wf-seed10"], [(0,), (1,), (10,)], {"wf": [0, 1, 2]}),
    (["a/wf_s3", "b/wf"], [(3,), (4,)], {"wf": [0, 1]}),
    (["a/0", "a/1"], [(0,), (1,)], {"0": [0, 1]}),
    (["layers-6-8", "layers-6-11"], [(0, 1e-3), (0, 2e-3)], {"layers-6-8": [0], "layers-6-11": [1]}),
    (["a/wf", "b/wf"], [(0, 1e-3), (0, 2e-3)], {"wf": [0], "wf'": [1]}),
    (["wf-0", "base", "wf-1"], [(0,), (0, 1.0), (1,)], {"wf": [0, 2], "base": [1]}),
])
def test_runs_that_differ_in_the_seed_alone_are_one_system(folders, settings, expected):
    assert evaluate.group_runs(folders, [some_run(*setting) for setting in settings]) == expected


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
        paper[" ".join(name)] = dict(zip("en zh es de ar ur".split(), map(float, (en, zh, es, de, ar, ur))))
        mean = (float(en) + float(zh) + float(de)) / 3  # of the languages there are
        assert table[f"paper: {' '.join(name)}"] == [en, zh, de, f"{mean:.1f}"]
    assert results["paper"] == {name: {l: pytest.approx(v / 100) for l, v in row.items()} for name, row in paper.items()}
    assert list(table)[-1] == "run" and table["published: XLM-R base (He et al. 2021)"] == ["85.8", "76.7", "78.7", "80.4"]


@pytest.mark.parametrize("sources", [None, {"test.en.tsv": {"source": "sample/make_data.py"}},
                                     {"test.en.tsv": {"archive": "amazon-massive-dataset-1.0.tar.gz"}}])
def test_the_paper_does_not_stand_beside_other_data(sources, run, data, tmp_path):
    if sources:
        (data / "sources.json").write_text(json.dumps(sources))
    results, text = tabulate(tmp_path / "out", data, run)
    assert "paper" not in results and "paper:" not in text and list(columns(text)) == ["system", "run"]


@pytest.mark.parametrize("right, warned", [(20, True), (50, True), (51, True), (52, False), (80, False)])
def test_a_run_near_chance_is_called_out(right, warned, run, data, tmp_path):
    """100 rows, the largest class has 50; `right` of them are right in German, all are in the others."""
    truth = [0] * 50 + [1] * 30 + [3] * 20
    for language in LANGUAGES:
        (data / f"test.{language}.tsv").write_text("text\tlabel\n" + "".join(f"my\t{LABELS[label]}\n" for label in truth))
    tabulate(tmp_path / "one", data, run)
    for language in LANGUAGES:
        predicted = [label if language != "de" or i < right else (label + 1) % 4 for i, label in enumerate(truth)]
        np.save(run / "predictions" / "3" / f"test.{language}.npy", np.eye(4, dtype=np.float32)[predicted])
    results, text = tabulate(tmp_path / "two", data, run)
    assert results["systems"][0]["mean"] == {"en": 1.0, "zh": 1.0, "de": right / 100}
    assert ("within 2 points of chance (50.0" in text) == warned
    assert len(results["warnings"]) == warned and all(f"has {right}.0 in de" in line for line in results["warnings"])


def test_a_run_that_is_not_finished_is_called_out(run, data, tmp_path):
    description = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**description, "complete": False}))
    results, text = tabulate(tmp_path / "out", data, run)
    assert f"warning: {run} is not finished: its last epoch so far is 3" in text
    assert any("not finished" in warning for warning in results["warnings"])


def test_only_the_results_are_written(run, data, tmp_path):
    before = sorted(run.rglob("*"))
    tabulate(tmp_path / "out", data, run)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["results.json", "results.md"]
    assert sorted(path for path in run.rglob("*") if "predictions" not in path.relative_to(run).parts) == before
    assert sorted(path.name for path in (run / "predictions" / "3").iterdir()) == [
        "origins.json", *sorted(f"test.{l}.npy" for l in LANGUAGES)]


# --- bad input ---------------------------------------------------------------------------------------------------

def test_labels_that_disagree(run, data, script, tmp_path):
    (data / "labels.txt").write_text("".join(f"{label}\n" for label in reversed(LABELS)))
    status, _, error = script("evaluate", run, "--data", data, "--out", tmp_path / "out")
    assert status == 2 and "trained for the labels refund agent delivery cancel" in error
    assert "labels.txt says cancel delivery agent refund" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content, message", [
    ("run.json", None, "run.json does not exist"),
    ("run.json", b"{", "run.json is not valid JSON"),
    ("run.json", b"[]", "run.json: expected it to be an object"),
    ("run.json", b"{}", "run.json: expected 'arguments' to be an object"),
    ("run.json", b'{"arguments": {"max_length": "many"}}', "run.json: expected 'max_length' to be a whole number"),
    ("metrics.jsonl", None, "has train.py finished an epoch?"),
    ("metrics.jsonl", b"", "holds no evaluation at the end of an epoch"),
    ("metrics.jsonl", b"garbage\n", "metrics.jsonl cannot be read"),
    ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl cannot be read"),
    ("metrics.jsonl", b"[1]\n", "metrics.jsonl cannot be read"),
    ("metrics.jsonl", b'{"split": "dev"}\n', "metrics.jsonl cannot be read"),
    ("metrics.jsonl", b'{"split": "dev", "epoch": 1, "language": "en", "accuracy": "high"}\n', "metrics.jsonl cannot be read"),
    ("metrics.jsonl", b'{"split": "dev", "epoch": 0.5, "language": "en", "accuracy": 1}\n', "holds no evaluation at the end"),
    ("epochs/3/classifier.json", b"{}", "classifier.json"),
    ("epochs/3/classifier.safetensors", b"short", "classifier.safetensors do not fit"),
    ("epochs/3/model.safetensors", b"short", "no encoder can be loaded"),
])
def test_a_broken_run(name, content, message, run, data, script, tmp_path):
    (run / name).unlink() if content is None else (run / name).write_bytes(content)
    status, _, error = script("evaluate", run, "--data", data, "--out", tmp_path / "out")
    assert status == 2 and message in error and str(run) in error
    assert not (tmp_path / "out").exists() and not list(run.rglob("*.npy"))


@pytest.mark.parametrize("spoil, message", [
    (lambda data: [path.unlink() for path in data.glob("test.*")], "has no test file"),
    (lambda data: (data / "labels.txt").unlink(), "is not a data set folder: it has no labels.txt"),
    (lambda data: (data / "test.zh.tsv").write_text("text\tlabel\nmy\trefund\nmy\tmoney\n"),
     "test.zh.tsv, line 3: unknown label 'money'"),
    (lambda data: (data / "test.de.tsv").write_text("text\nmy\n"), "test.de.tsv, line 1: no label column"),
])
def test_a_broken_data_set(spoil, message, run, data, script, tmp_path):
    spoil(data)
    status, _, error = script("evaluate", run, "--data", data, "--out", tmp_path / "out")
    assert status == 2 and message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    ("run --input x --predictions y --data d", "--input labels your own text: leave out --data"),
    ("run", "give --data and --out for a table"), ("run --data d", "give --data and --out"),
    ("run --out o", "give --data and --out"),
    ("run --data d --out o --epoch best", "--epoch best: expected last, en, joint, oracle, test or a number"),
    ("run --data d --out o --epoch -1", "--epoch"), ("run --data d --out o --max-rows 0", "--max-rows: 0, expected 1 or more"),
    ("run --data d --out o --batch-size 0", "--batch-size: 0, expected 1 or more"),
    ("run --data d --out o --split train", "invalid choice: 'train'"),
    ("run --input i", "--input needs --predictions"), ("a b --input i --predictions p", "exactly one run"),
    ("run --input i --predictions p --epoch oracle", "another --epoch than oracle"), ("--data d --out o", "runs"),
])
def test_bad_flags(flags, message, script):
    status, _, error = script("evaluate", *flags.split())
    assert status == 2 and message in error


# --- a user's own text -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_predictions_for_ones_own_text(pairs, labelled, runs, script, tmp_path):
    rows = [([text, 'the "parcel'] if pairs else [text], label) for text, label in toy_rows("en", 11, 9)]
    names = ["text_a", "text_b"] if pairs else ["text"]
    lines = ["\t".join(names + ["label"] * labelled), *("\t".join(texts + [LABELS[label]] * labelled) for texts, label in rows)]
    (tmp_path / "my.tsv").write_text("".join(f"{line}\n" for line in lines))
    run, target = runs / "wf-seed0", tmp_path / "new" / "out.tsv"
    status, text, _ = script("evaluate", run, "--input", tmp_path / "my.tsv", "--predictions", target, "--batch-size", 3)
    assert status == 0
    header, *answers = [line.split("\t") for line in target.read_text().splitlines()]
    given = len(names) + labelled
    assert header == [*names, *["label"] * labelled, "prediction", *(f"p_{label}" for label in LABELS)]
    assert ["\t".join(cells[:given]) for cells in answers] == lines[1:]  # the rows' own order
    logits = logits_by_hand(run / "epochs" / "3", [texts for texts, _ in rows])
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probabilities = np.array([[float(cell) for cell in cells[given + 1:]] for cells in answers])
    assert np.abs(probabilities - expected).max() < 1e-5
    assert probabilities.sum(1) == pytest.approx(np.ones(11), abs=3e-6)
    assert [cells[given] for cells in answers] == [LABELS[i] for i in expected.argmax(1)]
    accuracy = 100 * accuracy_score([label for _, label in rows], expected.argmax(1))
    assert ("accuracy" in text) == labelled and (not labelled or f"accuracy {accuracy:.1f}" in text)
    assert f"11 rows, by epoch 3 of {run}" in text


def test_predictions_by_a_chosen_epoch(four_epochs, script, tmp_path):
    (tmp_path / "my.tsv").write_text("text\nmy money\n")
    for protocol, epoch in (("en", 2), ("joint", 1), ("4", 4)):
        status, text, _ = script("evaluate", four_epochs, "--input", tmp_path / "my.tsv", "--predictions", tmp_path / "out.tsv",
                                 "--epoch", protocol)
        assert status == 0 and f"by epoch {epoch} of" in text


@pytest.mark.parametrize("content, message", [
    (None, "my.tsv does not exist"), (b"", "my.tsv is empty"), (b"text\n", "holds a header and no rows"),
    (b"text\tlabel\nmy money\trefund\nmy parcel\tdelivry\n",
     "line 3: unknown label 'delivry', expected one of refund, agent, delivery, cancel"),
    (b"sentence\nmy money\n", "line 1: the header is ['sentence'], expected text or text_a, text_b"),
    (b"text_a\tlabel\nmy money\trefund\n", "line 1: the header is"),
    (b"text\nmy\tmoney\n", "line 2: 2 columns, expected 1 (text)"), (b"text\nm\xff\n", "line 2: not UTF-8"),
])
def test_an_input_that_is_none(content, message, runs, script, tmp_path):
    if content is not None:
        (tmp_path / "my.tsv").write_bytes(content)
    status, _, error = script("evaluate", runs / "wf-seed0", "--input", tmp_path / "my.tsv",
                              "--predictions", tmp_path / "out.tsv")
    assert status == 2 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["my.tsv"] * (content is not None)


def test_nothing_half_written_where_a_prediction_fails(runs, script, tmp_path, monkeypatch):
    (tmp_path / "my.tsv").write_text("text\nmy money\n")
    (tmp_path / "out.tsv").write_text("what was there")

    def predict(*_):
        raise OSError("no space left on device")
    monkeypatch.setattr(evaluate, "predict", predict)
    status, _, error = script("evaluate", runs / "wf-seed0", "--input", tmp_path / "my.tsv",
                              "--predictions", tmp_path / "out.tsv")
    assert status == 2 and "no space left" in error
    assert (tmp_path / "out.tsv").read_text() == "what was there" and len(list(tmp_path.iterdir())) == 2


def test_spaces_at_the_edges_and_lone_quotes_are_kept(runs, script, tmp_path):
    texts = [' "my money', "", "my  parcel ", "现在 \u202eabc 😀", "late\r now"]
    (tmp_path / "my.tsv").write_bytes(("text\n" + "".join(f"{text}\n" for text in texts)).encode())
    status, _, _ = script("evaluate", runs / "baseline", "--input", tmp_path / "my.tsv", "--predictions", tmp_path / "out.tsv")
    lines = (tmp_path / "out.tsv").read_bytes().decode().split("\n")
    assert status == 0 and [line.split("\t")[0] for line in lines[1:-1]] == texts


# --- differences, protocols, Translate-Train ---------------------------------------------------------------------

def test_differences_are_those_of_the_saved_logits(runs, data_folder, tmp_path):
    """Correctness averaged over seeds, every row its own cluster (single texts), against the first system."""
    results, text = tabulate(tmp_path / "out", data_folder, runs / "baseline", runs / "wf-seed0", runs / "wf-seed1", "--resamples", 500)
    truth = {l: np.array([label for _, label in read_rows(Path(data_folder) / f"test.{l}.tsv")]) for l in LANGUAGES}

    def right(name, language):
        last = max(int(path.name) for path in (runs / name / "predictions").iterdir())
        return np.load(runs / name / "predictions" / str(last) / f"test.{language}.npy").argmax(1) == truth[language]

    expected = {l: (right("wf-seed0", l).mean() + right("wf-seed1", l).mean()) / 2 - right("baseline", l).mean() for l in LANGUAGES}
    baseline, wf = results["systems"]
    assert results["baseline"] == "baseline" and "difference" not in baseline
    for language in LANGUAGES:
        entry = wf["difference"][language]
        assert entry["difference"] == pytest.approx(expected[language]) and entry["low"] <= entry["difference"] <= entry["high"]
        assert entry["p_holm"] >= entry["p"] and "p_mcnemar" not in entry  # there are two seeds
        assert f"{100 * expected[language]:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]" in text
    assert wf["difference"]["others"]["difference"] == pytest.approx((expected["de"] + expected["zh"]) / 2)
    single, _ = tabulate(tmp_path / "single", data_folder, runs / "baseline", runs / "wf-seed0", "--resamples", 50)
    assert {"p_mcnemar"} <= set(single["systems"][1]["difference"]["de"])


def test_differences_need_no_model_once_logits_are_saved(runs, data_folder, tmp_path, monkeypatch):
    names = [runs / "baseline", runs / "wf-seed0"]
    tabulate(tmp_path / "one", data_folder, *names)
    monkeypatch.setattr(evaluate, "load_model", None)
    results, _ = tabulate(tmp_path / "two", data_folder, *names, "--baseline", "wf-seed0")
    assert "difference" in results["systems"][0] and "difference" not in results["systems"][1]


def test_an_unknown_baseline_names_the_systems(runs, data_folder, tmp_path, script):
    status, _, error = script("evaluate", runs / "baseline", runs / "wf-seed0", "--data", data_folder, "--out", tmp_path, "--baseline", "x")
    assert status == 2 and "--baseline x: the systems are baseline wf-seed0" in error


def test_rows_of_one_premise_are_one_cluster(tmp_path, monkeypatch):
    """Pairs are clustered by the English premise, whatever the translations repeat."""
    seen = []
    monkeypatch.setattr(evaluate, "bootstrap_difference", lambda differences, clusters, resamples: seen.append(clusters.tolist())
                        or [np.zeros(differences.shape[1])] * 4)
    premises = {"en": "aabbc", "de": "vwxyz"}
    for language, texts in premises.items():
        (tmp_path / f"test.{language}.tsv").write_text("text_a\ttext_b\tlabel\n" + "".join(f"{t}\th{i}\tyes\n" for i, t in enumerate(texts)))
    (tmp_path / "labels.txt").write_text("yes\nno\n")
    description = {"arguments": {"seed": 0}, "labels": ["yes", "no"], "complete": True, "precision": "float32"}
    monkeypatch.setattr(evaluate, "read_run", lambda folder: ({**description, "arguments": {"seed": 0, "name": str(folder), "train_language": "en"}}, {1: {"en": 1.0}}))
    monkeypatch.setattr(evaluate, "run_logits", lambda folder, run, epochs, *rest: {l: np.eye(2)[[0, 1, 0, 1, 0]] for l in epochs})
    evaluate.compare(["a", "b"], tmp_path, "test", "last", None, None, 8, 10)
    assert seen == [[0, 0, 1, 1, 2]]


def test_languages_that_are_no_translations_of_each_other_are_refused(runs, data_folder, tmp_path, script):
    data = shutil.copytree(data_folder, tmp_path / "data")
    lines = (data / "test.zh.tsv").read_text().splitlines()
    (data / "test.zh.tsv").write_text("\n".join([lines[0], *lines[:1:-1], lines[1]]) + "\n")
    code, _, error = script("evaluate", runs / "baseline", runs / "wf-seed0", "--data", data, "--out", tmp_path / "out")
    assert code == 2 and "test.zh.tsv is not row by row what test.en.tsv is" in error
    assert script("evaluate", runs / "baseline", "--data", data, "--out", tmp_path / "out")[0] == 0  # one needs no pairs


def test_every_protocol_stands_beside_the_one_that_is_shown(runs, data_folder, tmp_path):
    results, text = tabulate(tmp_path / "out", data_folder, runs / "wf-seed0", "--epoch", "joint")
    run, = results["systems"][0]["runs"]
    assert list(run["protocols"]) == ["joint", "last", "en", "oracle"] and run["accuracy"] == run["protocols"]["joint"]["accuracy"]
    for name in ("last", "en", "joint", "oracle"):
        shown, _ = tabulate(tmp_path / name, data_folder, runs / "wf-seed0", "--epoch", name)
        assert shown["systems"][0]["mean"] == results["systems"][0]["protocols"][name]
        english, others = shown["systems"][0]["mean"]["en"], np.mean([shown["systems"][0]["mean"][l] for l in ("de", "zh")])
        assert f"{100 * english:.1f} / {100 * others:.1f}" in text


def test_translate_train_is_a_model_for_each_language(model_folder, tmp_path):
    data = Path(make_data(tmp_path / "data"))
    runs = []
    for language in ("de", "zh"):
        shutil.copy(data / f"dev.{language}.tsv", data / f"train.{language}.tsv")
        runs.append(tmp_path / f"translate-train-{language}")
        train.main(["--model", model_folder, "--data", str(data), "--out", str(runs[-1]), "--train-language", language, "--layers", "3",
                    "--epochs", "1", "--max-length", "32", "--precision", "fp32"])
    results, text = tabulate(tmp_path / "out", data, *runs)
    system, = results["systems"]
    assert list(system["mean"]) == ["de", "zh"] or list(system["mean"]) == ["zh", "de"]
    assert [list(run["accuracy"]) for run in system["runs"]] == [["de"], ["zh"]]
    assert columns(text)[system["name"]][0] == ""  # nothing was trained on English
