"""train.py: against a plain loop, weights that are frozen, runs that are stopped and started again,
what a run writes, and what a user is told."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import LABELS, make_data, make_model, make_pairs, refused, table
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, log_loss
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import AtomicCounter
from test_evaluate import logits_by_hand
from transformers import AutoModel, AutoTokenizer

import train
from data import train_batches
from lib import folders, run_log

BASE = "--epochs 3 --batch-size 13 --lr 1e-3 --precision fp32 --max-length 32"
STEPS = 5  # an epoch: 60 rows, 13 at once
FROZEN = "--layers 1 3 --freeze-layers 5 2 0 --freeze-epoch 1 --weight-decay 0.1"
QUICK = "--layers 1 --epochs 1 --max-train-rows 13 --max-eval-rows 3"


@pytest.fixture(scope="module", autouse=True)
def log_each_step():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOG_STEPS", 1)
        yield


@pytest.fixture(scope="module")
def pair_data(data_folder, tmp_path_factory):
    return make_pairs(data_folder, tmp_path_factory.mktemp("pairs") / "data")


def command(out, model, data, *flags):
    start = ["--model", str(model), "--data", str(data), "--out", str(out)]
    return start + " ".join((BASE, *flags)).split()


def fine_tune(*arguments):
    """train.py on (out, model, data, flags ...) in this process: what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        train.main(command(*arguments))
    return text.getvalue()


@pytest.fixture
def tune(model_folder, data_folder, tmp_path):
    """tune("--flag value", ...) is fine_tune() to tmp_path, of the toy model on the toy data."""

    def call(*flags, out=tmp_path, model=model_folder, data=data_folder):
        return fine_tune(out, model, data, *flags)

    return call


@pytest.fixture
def run(script, model_folder, data_folder, tmp_path):
    """tune() as a user calls it: (exit status, stdout, stderr)."""

    def call(*flags, out=tmp_path, model=model_folder, data=data_folder):
        return script("train", *command(out, model, data, *flags))

    return call


def metrics(out):
    """metrics.jsonl without the one column that differs from call to call."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.pop("examples_per_second") > 0
    return rows


def kept(out):
    return sorted(path.name for path in (Path(out) / "epochs").iterdir())


def weights(folder):
    """All tensors of a kept epoch, those of the encoder under encoder.NAME."""
    tensors = load_file(Path(folder) / "classifier.safetensors")
    for name, tensor in load_file(Path(folder) / "model.safetensors").items():
        tensors[f"encoder.{name}"] = tensor
    return tensors


def assert_close_weights(one, other, atol=1e-6):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=atol, msg=name)


def assert_same_run(one, other):
    """Two complete runs with the same metrics, the same epochs, and weights equal bit for bit."""
    assert metrics(one) == metrics(other) and kept(one) == kept(other)
    for epoch in kept(one):
        first, second = (weights(Path(out) / "epochs" / epoch) for out in (one, other))
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []


# --- the pieces of a step -------------------------------------------------------------------------


@contextlib.contextmanager
def watching(look):
    """Call look(model, optimizer, batches) after each optimizer step, gradients still in place."""
    make_optimizer, micro_batches, seen = train.make_optimizer, train.micro_batches, {}

    def made(model, *others):
        seen["model"], seen["optimizer"] = model, make_optimizer(model, *others)
        seen["optimizer"].register_step_post_hook(lambda *_: look(**seen))
        return seen["optimizer"]

    def batches(*arguments):
        seen["batches"] = []
        for batch, last in micro_batches(*arguments):
            seen["batches"].append(batch)
            yield batch, last

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_optimizer", made)
        patch.setattr(train, "micro_batches", batches)
        yield


def plain_fine_tuning(model, data, head, epochs, peak):
    """The independent loop: the encoder, the linear layer, mean loss and accuracy of each epoch,
    the largest gradient norm."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model)
    torch.manual_seed(0)
    linear = torch.nn.Linear(72 if head == "layers" else 36, 4)
    cells = table(f"{data}/train.en.tsv")
    rows = [tokenizer(*texts) for *texts, _ in cells]
    classes = torch.tensor([LABELS.index(label) for *_, label in cells])
    lengths = np.array([len(row["input_ids"]) for row in rows])
    parameters = [*encoder.parameters(), *linear.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=peak)
    steps = epochs * STEPS
    warm = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (steps - i) / (steps - warm))
    )
    history, norms = [], []
    for epoch in range(epochs):
        losses, right = [], 0
        for chosen in train_batches(lengths, 13, 0, epoch):
            batch = [rows[i] for i in chosen]
            batch = tokenizer.pad(batch, pad_to_multiple_of=8, return_tensors="pt")
            output = encoder(**batch, output_hidden_states=True)
            padding = (batch["attention_mask"] == 0)[:, :, None]
            features = output.pooler_output
            if head == "layers":
                states = [output.hidden_states[k] for k in (1, 3)]
                features = [s.masked_fill(padding, -torch.inf).max(1).values for s in states]
                features = torch.cat(features, 1)
            logits = linear(features)
            loss = F.cross_entropy(logits, classes[chosen])
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
            optimizer.step()
            schedule.step()
            losses += [loss.item()] * len(chosen)
            right += int((logits.argmax(1) == classes[chosen]).sum())
        history.append((np.mean(losses), right / len(rows)))
    return encoder, linear, history, max(norms)


@pytest.mark.parametrize("head", ["layers", "pooler"])
def test_weights_are_those_of_a_plain_loop(
    head, tune, still_model, data_folder, pair_data, tmp_path
):
    data, epochs, flags = data_folder, 4, "--layers 1 3"
    if head == "pooler":
        data, epochs, flags = pair_data, 2, "--head pooler"
    tune(f"{flags} --lr 1e-4 --dropout 0 --epochs {epochs}", model=still_model, data=data)
    encoder, linear, history, norm = plain_fine_tuning(still_model, data, head, epochs, 1e-4)
    assert norm > 1.1  # else nothing was clipped
    trained = weights(tmp_path / "epochs" / str(epochs))
    plain = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    plain |= {f"classifier.1.{name}": tensor for name, tensor in linear.state_dict().items()}
    if head == "layers":
        cut = ("encoder.pooler.", "encoder.encoder.layer.3.", "encoder.encoder.layer.4.")
        plain = {name: tensor for name, tensor in plain.items() if not name.startswith(cut)}
    assert_close_weights(trained, plain)
    start = AutoModel.from_pretrained(still_model).state_dict()
    for name in ("embeddings.word_embeddings.weight", "encoder.layer.2.output.dense.weight"):
        moved = (trained[f"encoder.{name}"] - start[name]).abs().max()
        assert moved > 1e-4  # a hundred times the tolerance
    rows = [row for row in metrics(tmp_path) if row["split"] == "train"]
    assert [row["accuracy"] for row in rows] == [accuracy for _, accuracy in history]
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in history], abs=1e-6)


@pytest.mark.parametrize("parts, sizes", [(5, [3, 3, 3, 2, 2]), (99, [1] * 13)])
def test_accumulating_gives_the_same_weights(parts, sizes, tune, still_model, tmp_path):
    flags, seen = "--layers 1 3 --dropout 0 --lr 1e-4 --epochs 1", []
    tune(flags, model=still_model, out=tmp_path / "whole")
    with watching(lambda batches, **_: seen.append([len(part["labels"]) for part in batches])):
        tune(flags, f"--accumulate {parts}", model=still_model, out=tmp_path / "parts")
    assert seen.count(sizes) == 4 and sum(map(sum, seen)) == 60
    whole, split = (weights(tmp_path / name / "epochs/1") for name in ("whole", "parts"))
    assert_close_weights(split, whole)


def test_weight_decay_is_decoupled_and_on_matrices_alone():
    parts = torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Embedding(3, 5)
    model = torch.nn.Sequential(*parts)
    optimizer = train.make_optimizer(model, 0.3)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    values = [parameter.unique().item() for parameter in model.parameters()]
    assert values == pytest.approx([1 - 0.1 * 0.3, 1, 1, 1, 1])


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_learning_rate_is_that_of_transformers(schedule):
    """In warm-up one step ahead of theirs, which begins with a rate of 0; after it the same."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.03)
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    scheduler, theirs = transformers.get_scheduler(name, optimizer, 4, 37), []
    for _ in range(37):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    rates = [train.learning_rate(step, 37, 0.03, schedule) for step in range(37)]
    assert rates[:4] == pytest.approx(theirs[1:5]) and rates[4:] == pytest.approx(theirs[4:])
    assert train.learning_rate(0, 1, 0.03, schedule) == 0.03


# --- freezing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen_run(model_folder, data_folder, tmp_path_factory):
    """Layers 0, 2 and the absent 5 frozen after one epoch of three; what was seen after each of the
    15 steps."""
    out, seen = tmp_path_factory.mktemp("frozen") / "run", []

    def look(model, optimizer, batches):
        with torch.random.fork_rng():
            states = [model.encoder.embeddings(batches[0]["input_ids"]) for _ in range(2)]
        named = dict(model.named_parameters())
        seen.append(
            SimpleNamespace(
                weights={name: weight.detach().clone() for name, weight in named.items()},
                gradients={name for name, weight in named.items() if weight.grad is not None},
                moments={name for name, weight in named.items() if weight in optimizer.state},
                states=len(optimizer.state),
                dropout=model.training and not torch.equal(*states),
                random=torch.get_rng_state().numpy().tobytes(),
            )
        )

    with watching(look):
        text = fine_tune(out, model_folder, data_folder, FROZEN)
    return SimpleNamespace(out=out, seen=seen, text=text)


def is_frozen(name):
    return name.startswith(("encoder.embeddings.", "encoder.encoder.layer.1."))


def test_frozen_weights_do_not_move_by_one_bit(frozen_run):
    first, *_ = frozen_run.seen
    for name, after in frozen_run.seen[STEPS - 1].weights.items():
        assert not torch.equal(after, first.weights[name]), f"{name} did not move before"
        for before, now in zip(frozen_run.seen[STEPS - 1 :], frozen_run.seen[STEPS:]):
            assert torch.equal(before.weights[name], now.weights[name]) == is_frozen(name), name


def test_frozen_weights_have_no_gradient_and_no_moments_and_dropout_stays_on(frozen_run):
    for step, seen in enumerate(frozen_run.seen):
        expected = {name for name in seen.weights if step < STEPS or not is_frozen(name)}
        assert seen.gradients == seen.moments == expected and seen.states == len(expected)
        assert seen.dropout
    assert len({seen.random for seen in frozen_run.seen}) == 3 * STEPS  # drawn anew at each step


def test_a_pooler_that_no_layer_reads_does_not_freeze_with_layer_0(tune, model_folder, tmp_path):
    tune("--head pooler --freeze-layers 0 1 2 3 4 5 --freeze-epoch 0 --epochs 1")
    before = load_file(Path(model_folder) / "model.safetensors")
    after = load_file(tmp_path / "epochs/1/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"pooler.dense.weight", "pooler.dense.bias"}


def test_start_says_layers_used_cut_and_frozen_and_what_is_trained(frozen_run, model_folder):
    text = frozen_run.text
    assert text.startswith("BertModel, 5 blocks: max pooling of layers 1 3, the 2 above cut off\n")
    assert "freezing layer 5 is a no-op: it is above the highest layer pooled" in text
    used, whole = map(int, re.search(r"(\d+) of (\d+) word pieces are in the data", text).groups())
    assert used < whole == AutoTokenizer.from_pretrained(model_folder).vocab_size
    # a block, 36 wide and 52 in the middle: query, key, value, output, two norms, two matrices
    block = 4 * (36 * 36 + 36) + 2 * (2 * 36) + (36 * 52 + 52) + (52 * 36 + 36)
    classifier = 72 * 4 + 4
    trained = (used + 64 + 2) * 36 + 2 * 36 + 3 * block + classifier
    assert f"\n{trained:,} parameters to train\n" in text
    assert "\ncpu, float32 products (as asked)\n" in text
    left = 2 * block + classifier
    assert f"layers 0 2 5 are frozen from here on, {left:,} parameters to train\n" in text
    assert [row["frozen_layers"] for row in metrics(frozen_run.out)] == [[]] * 4 + [[0, 2, 5]] * 8


@pytest.mark.skipif("PROVE" not in os.environ, reason="half a minute: make prove")
def test_compiled_is_the_same_run_before_and_after_freezing(tune, tmp_path, monkeypatch):
    """With PyTorch's own dropout in both: a compiled model does without lib/cpu.py."""
    compile_, asked = torch.nn.Module.compile, []

    def compile_quickly(self, **settings):  # the kernels alone would take a minute
        asked.append(settings)
        compile_(self, backend="eager", **settings)

    monkeypatch.setattr(train.Classifier, "compile", compile_quickly)
    flags = "--layers 0 1 --freeze-layers 0 --freeze-epoch 1 --epochs 2 --max-train-rows 26"
    tune(flags, "--compile", out=tmp_path / "compiled")
    monkeypatch.setattr(train, "make_fast", lambda model: None)
    tune(flags, out=tmp_path / "plain")
    assert asked == [{"dynamic": True}]
    compiled, plain = (weights(tmp_path / name / "epochs/2") for name in ("compiled", "plain"))
    assert_close_weights(compiled, plain, 1e-5)


@pytest.mark.parametrize(
    "en, de, zh, due",
    [
        ([9, 9, 9, 9], [2, 4, 5, 4], [4, 6, 5, 4], [0, 0, 0, 1]),  # a tie is no fall
        ([9, 8, 7, 6], [2, 4, 5, 6], [4, 6, 5, 4], [0, 0, 0, 0]),  # English alone
        ([1, 2, 3, 9], [6, 5, 4, 9], [4, 4, 4, 9], [0, 1, 1, 1]),  # never thawed
        # the mean of these two is not the same float
        ([9, 9, 9, 9], [1, 2, 4, 4], [2, 1, 4, 3], [0, 0, 0, 1]),
    ],
)
def test_automatic_freezing_at_the_first_fall_of_the_others_mean(en, de, zh, due):
    rows, found = [], []
    for step in range(4):
        for language, tenths in (("en", en), ("de", de), ("zh", zh)):
            accuracy = tenths[step] / 10
            rows.append({"step": step, "split": "dev", "language": language, "accuracy": accuracy})
        found.append(train.layers_due([3, 1], "auto", step, rows, "en"))
    assert found == [[[], [1, 3]][yes] for yes in due]


@pytest.fixture(scope="module")
def auto_run(model_folder, data_folder, tmp_path_factory):
    """A run that freezes by itself, evaluated every second step and after each epoch."""
    out = tmp_path_factory.mktemp("auto") / "run"
    flags = "--layers 1 3 --freeze-layers 1 2 --freeze-epoch auto --eval-steps 2 --lr 5e-3"
    text = fine_tune(out, model_folder, data_folder, flags)
    return SimpleNamespace(out=out, text=text)


def test_automatic_freezing_agrees_with_the_metrics(auto_run):
    evaluations, frozen = {}, {}
    for row in metrics(auto_run.out):
        evaluations.setdefault(row["step"], {})[row["language"]] = row["accuracy"]
        frozen.setdefault(row["step"], row["frozen_layers"])
    assert list(evaluations) == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    best, expected = -1, []
    for step, accuracies in evaluations.items():
        assert frozen[step] == expected
        mean = (accuracies["de"] + accuracies["zh"]) / 2
        if mean < best:
            expected = [1, 2]
        best = max(best, mean)
    assert expected, "the data of this test should make the accuracy fall"
    assert auto_run.text.count("layers 1 2 are frozen from here on") == 1


# --- stopped and started again --------------------------------------------------------------------

SETTINGS = {
    "epoch": "--layers 1 3 --freeze-layers 0 2 --freeze-epoch 1 --save-steps 3",
    "auto": "--layers 1 3 --freeze-layers 1 2 --freeze-epoch auto --eval-steps 2 --save-steps 3 "
    "--lr 5e-3",
    "pooler": "--head pooler --freeze-layers 5 --freeze-epoch 2 --precision bf16 --accumulate 2 "
    "--hidden 7 --weight-decay 0.1",
}


@pytest.fixture(scope="module")
def unstopped(model_folder, data_folder, tmp_path_factory):
    outs = {}

    def get(name):
        if name not in outs:
            outs[name] = tmp_path_factory.mktemp("unstopped") / "run"
            fine_tune(outs[name], model_folder, data_folder, SETTINGS[name])
        return outs[name]

    return get


def saved_state(out):
    return torch.load(Path(out) / "resume" / "state.pt", weights_only=True)


@contextlib.contextmanager
def interrupted(owner, name, calls, error=KeyboardInterrupt):
    """The end, as of SIGKILL, in place of the call of owner.name after `calls` ones."""
    original, left = getattr(owner, name), [calls]

    def stop(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(error):
            yield


@pytest.mark.parametrize(
    "settings, stops",
    [
        ("epoch", [2]),
        ("epoch", [5]),
        ("epoch", [4, 3, 4, 2, 2]),
        ("auto", [5, 4, 4]),
        ("pooler", [9]),
    ],
)
def test_killed_and_started_again_is_as_never_stopped(
    settings, stops, tune, unstopped, tmp_path, monkeypatch
):
    # TensorBoard orders the files of one second by a number's text, "9" after "10": begin at 0
    uid = "tensorboard.summary.writer.event_file_writer._global_uid"
    monkeypatch.setattr(uid, AtomicCounter(0))
    for steps in stops:
        with interrupted(train, "learning_rate", steps):
            tune(SETTINGS[settings])
    assert ("going on after step" in tune(SETTINGS[settings])) == (sum(stops) > 2)
    assert_same_run(tmp_path, unstopped(settings))
    assert json.loads((tmp_path / "run.json").read_text())["complete"] is True
    steps = [event.step for event in events(tmp_path).Scalars("train/loss")]
    assert steps == list(range(1, 3 * STEPS + 1))


@pytest.mark.parametrize(
    "owner, name, calls",
    [
        (torch, "save", 2),
        (train, "save_model", 3),  # the mean
        (run_log.Log, "evaluation", 1),
        (train, "finish_folder", 0),
        (folders.os, "replace", 5),
    ],
)
def test_killed_while_saving_is_as_never_stopped(owner, name, calls, tune, unstopped, tmp_path):
    with interrupted(owner, name, calls):
        tune(SETTINGS["epoch"])
    tune(SETTINGS["epoch"])
    assert_same_run(tmp_path, unstopped("epoch"))
    assert [path.name for path in tmp_path.rglob(".*")] == [".lock"]


def test_running_out_of_memory_while_the_state_is_loaded_is_no_damage(
    run, tune, tmp_path, monkeypatch
):
    with interrupted(train, "learning_rate", 7):
        tune(SETTINGS["epoch"])
    full = MemoryError("Unable to allocate 9 GiB")
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(full))
    refused(
        run(SETTINGS["epoch"]),
        ": error: out of memory (Unable to allocate 9 GiB): with --accumulate",
    )
    monkeypatch.undo()
    assert saved_state(tmp_path)["step"] == 6


def test_the_same_run_is_complete_from_another_path_too(
    frozen_run, tune, model_folder, data_folder, tmp_path
):
    before = (frozen_run.out / "metrics.jsonl").stat().st_mtime_ns
    model = shutil.copytree(model_folder, tmp_path / "model")
    data = shutil.copytree(data_folder, tmp_path / "data")
    text = tune(FROZEN, out=frozen_run.out, model=model, data=data)
    assert text == f"{frozen_run.out} is complete already: nothing to do\n"
    assert before == (frozen_run.out / "metrics.jsonl").stat().st_mtime_ns


def test_other_arguments_are_refused_by_name_and_new_flags_were_at_their_default(
    frozen_run, run, tmp_path
):
    old = json.loads((frozen_run.out / "run.json").read_text())
    del old["arguments"]["combine"]  # as of a run that did not know it
    (tmp_path / "run.json").write_text(json.dumps(old))
    status, out, _ = run(FROZEN, "--save-steps 7")
    assert status == 0 and "complete already" in out
    result = run("--layers 1 2 --save-steps 7 --combine mix")
    refused(
        result,
        "arguments.layers was [1, 3], is now [1, 2]",
        "arguments.freeze_epoch was 1, is now None",
        "arguments.combine was 'concat', is now 'mix'",
        "arguments.weight_decay was 0.1, is now 0.0. Give another --out, or --overwrite",
    )
    assert "save_steps" not in result[2]


def test_a_run_goes_on_where_auto_means_another_precision(frozen_run, run, monkeypatch):
    for has, expected in (False, 0), (True, 2):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})  # noqa: B023
        status, _, error = run(FROZEN, "--precision auto", out=frozen_run.out)
        assert status == expected
    assert "precision was 'float32', is now 'bfloat16'. --precision fp32 is what it" in error


def test_changed_data_and_changed_weights_are_refused(frozen_run, run, tmp_path):
    data = make_data(tmp_path / "data", train=61)
    refused(run(FROZEN, data=data, out=frozen_run.out), "settings: data.train.en.tsv was")
    model = make_model(tmp_path / "model", seed=1)
    refused(run(FROZEN, model=model, out=frozen_run.out), "settings: revision was")


# --- what a run writes ----------------------------------------------------------------------------


def events(out):
    return EventAccumulator(str(out), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_columns_of_the_metrics(auto_run):
    rows = metrics(auto_run.out)
    columns = "epoch step split language accuracy loss lr frozen_layers".split()
    assert all(list(row) == columns for row in rows)
    sets = [("train", ""), ("dev", "en"), ("dev", "de"), ("dev", "zh")]
    assert [(row["split"], row["language"]) for row in rows] == sets * 9
    assert repr([row["epoch"] for row in rows[::4]]) == "[0.4, 0.8, 1, 1.2, 1.6, 2, 2.4, 2.8, 3]"
    for row in rows:  # by hand: 2 steps of warm-up of 15
        rate = 1.0 if row["step"] == 2 else (15 - row["step"] + 1) / 13
        assert row["lr"] == pytest.approx(5e-3 * rate)


def test_the_speed_counts_rows_and_not_full_batches(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with contextlib.closing(run_log.Log(tmp_path)) as log:
        log.start(0, 9)
        now[0] += 7  # an evaluation, which does not count
        log.restart_clock()
        for rows in (32, 5):
            log.step(rows)
        now[0] += 2
        assert log.train(2, 1.0, 0.5, 1e-3) == 37 / 2


def test_dev_accuracy_and_loss_are_those_of_the_kept_model(frozen_run, data_folder):
    folder = frozen_run.out / "epochs" / "3"
    for row in metrics(frozen_run.out)[-3:]:
        rows = table(f"{data_folder}/dev.{row['language']}.tsv")
        logits = torch.from_numpy(logits_by_hand(folder, [[text] for text, _ in rows])).double()
        truth = [LABELS.index(label) for _, label in rows]
        assert row["accuracy"] == accuracy_score(truth, logits.argmax(1))
        loss = log_loss(truth, logits.softmax(1), labels=range(4))
        assert row["loss"] == pytest.approx(loss, abs=1e-5)


def test_tensorboard_holds_the_metrics(auto_run):
    board, rows = events(auto_run.out), metrics(auto_run.out)
    tags = {"lr", "examples per second", "frozen layers"}
    for language in ("", "de", "en", "zh"):
        for kind in ("accuracy", "loss"):
            tag = f"{kind}/dev/{language}" if language else f"train/{kind}"
            values = {scalar.step: scalar.value for scalar in board.Scalars(tag)}
            assert len(values) == (9 if language else 15)
            for row in rows:
                if row["language"] == language:
                    assert values[row["step"]] == pytest.approx(row[kind])
            tags.add(tag)
    assert set(board.Tags()["scalars"]) == tags
    counts = [scalar.value for scalar in board.Scalars("frozen layers")]
    assert counts == [len(row["frozen_layers"]) for row in rows if row["split"] == "train"]


def scripted(monkeypatch, **accuracies):
    """Replace evaluation: the i-th one finds these accuracies, dev's by language or test_LANG's."""
    calls = iter(range(99))

    def score_sets(*_):
        i, scores = next(calls), {}
        for name, values in accuracies.items():
            split, _, language = name.rpartition("_")
            scores[split or "dev", language] = values[i], 1.0
        return scores

    monkeypatch.setattr(train, "score_sets", score_sets)


def test_the_last_epoch_and_the_best_by_each_protocol_are_kept(tune, tmp_path, monkeypatch):
    """Best by hand: en 2 (tied with 3), de 4 (tied with 5), zh 1, joint 1, test 3; before epoch 4:
    de 1."""
    scripted(
        monkeypatch,
        en=[0.5, 0.7, 0.7, 0.6, 0.1, 0.2],
        de=[0.3, 0.2, 0.3, 0.5, 0.5, 0.4],
        zh=[0.6, 0.2, 0.4, 0.1, 0.2, 0.3],
        test_en=[0.1, 0.1, 0.1, 0.1, 0.1, 0.9],
        test_de=[0.1, 0.1, 0.8, 0.1, 0.8, 0.1],
    )
    after = []
    monkeypatch.setattr(train, "save_state", lambda *_: after.append(kept(tmp_path)))
    text = tune(QUICK, "--epochs 6 --track-test")
    assert list(map("".join, after)) == ["1", "12", "123", "1234", "12345", "12346"]
    assert "protocol: de 4, en 2, joint 1, test 3, zh 1\n" in text


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_all_files_of_a_run_are_as_the_umask_wants_them(mask, tune, tmp_path):
    before = os.umask(mask)
    try:
        tune(QUICK, out=tmp_path / "run")
    finally:
        os.umask(before)
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        full = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == full & ~mask, path


def test_a_file_system_without_modes_will_do(tune, monkeypatch):
    error = OSError(95, "Operation not supported")
    monkeypatch.setattr(os, "chmod", lambda *_, **__: (_ for _ in ()).throw(error))
    assert ": done" in tune(QUICK)


def test_test_files_are_opened_with_track_test_alone_and_change_nothing(
    data_folder, frozen_run, tune, run, tmp_path
):
    out = tmp_path / "run"
    tune(FROZEN, "--track-test", out=out)
    rows = metrics(out)
    assert [row["language"] for row in rows if row["split"] == "test"] == ["en", "de", "zh"] * 3
    assert "accuracy/test/zh" in events(out).Tags()["scalars"]
    assert [row for row in rows if row["split"] != "test"] == metrics(frozen_run.out)

    data = shutil.copytree(data_folder, tmp_path / "data")
    for path in data.glob("test.*.tsv"):
        path.write_bytes(b"\xff\xfe not a table")
    refused(run(QUICK, "--track-test", data=data), "test.en.tsv, line 1")
    assert run(QUICK, data=data, out=tmp_path / "unread")[0] == 0


def test_word_pieces_that_are_not_trained_on_stay_as_they_are_under_weight_decay_too(
    frozen_run, model_folder, data_folder
):
    tokenizer, ids = AutoTokenizer.from_pretrained(model_folder), set()
    for text, _ in table(f"{data_folder}/train.en.tsv"):
        ids.update(tokenizer(text)["input_ids"])
    start, end = (
        load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
        for folder in (Path(model_folder), frozen_run.out / "epochs/3")
    )
    assert set((start != end).any(1).nonzero().flatten().tolist()) == ids


def test_max_rows(tune, tmp_path):
    tune(QUICK.replace("13", "17"))
    train_row, *others = metrics(tmp_path)
    assert train_row["step"] == 2 and len(others) == 3
    for row, count in [(train_row, 17), *((row, 3) for row in others)]:
        assert row["accuracy"] * count == pytest.approx(round(row["accuracy"] * count))


def test_layers_from_a_search(tune, tmp_path):
    best = tmp_path / "best.json"
    best.write_text('{"layers": [2, 3], "pooling": "mean", "select": "joint"}')
    tune(QUICK.replace("--layers 1", f"--layers-from {best}"), out=tmp_path / "run")
    saved = json.loads((tmp_path / "run/epochs/1/classifier.json").read_text())
    assert saved["layers"] == [2, 3] and saved["pooling"] == "mean"


def test_the_mean_is_that_of_the_weights_after_each_epoch(tune, tmp_path):
    tune(FROZEN, "--keep-all")
    assert kept(tmp_path) == ["1", "2", "3", "mean"]
    *epochs, mean = (weights(tmp_path / "epochs" / name) for name in kept(tmp_path))
    for name, tensor in mean.items():
        expected = torch.stack([epoch[name].double() for epoch in epochs]).mean(0)
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-7)
    assert mean.keys() == epochs[0].keys()
    assert any(not torch.equal(mean[name], epochs[2][name]) for name in mean)


def test_the_weights_of_a_mix_are_trained_at_each_step(tune, still_model, tmp_path):
    seen = [torch.zeros(3)]
    with watching(lambda model, **_: seen.append(model.mix.detach().clone())):
        tune("--layers 0 2 3 --combine mix --epochs 1", model=still_model)
    assert all((before != now).all() for before, now in zip(seen, seen[1:])) and len(seen) == 6
    assert torch.equal(weights(tmp_path / "epochs/1")["mix"], seen[-1])


@pytest.mark.parametrize("flag, expected", [("--encoder-dropout 0", 0.0), ("", 0.1)])
def test_encoder_dropout_reaches_every_dropout_of_the_encoder(flag, expected, tune):
    seen = []
    with watching(lambda model, **_: seen.append(model)):
        tune(QUICK, "--dropout 0.3", flag)
    modules = list(seen[0].encoder.modules())
    assert {m.p for m in modules if isinstance(m, torch.nn.Dropout)} == {expected}
    assert seen[0].classifier[0].p == 0.3


# --- the source language --------------------------------------------------------------------------


def test_the_others_are_all_but_the_source(tune, data_folder, tmp_path, monkeypatch):
    """Trained on German. Best by hand: de 3; joint, of en and zh, 2, where zh and en alone are best
    at 1 and 2; --freeze-epoch auto sees the fall of that mean at 3 though German rises."""
    scripted(monkeypatch, de=[0.5, 0.6, 0.9, 0.9], en=[0.1, 0.8, 0.2, 0.3], zh=[0.6, 0.5, 0.3, 0.3])
    data = shutil.copytree(data_folder, tmp_path / "data")
    shutil.copy(data / "dev.de.tsv", data / "train.de.tsv")
    flags = "--epochs 4 --freeze-layers 1 --freeze-epoch auto --train-language de"
    out = tmp_path / "run"
    text = tune(QUICK, flags, data=data, out=out)
    assert kept(out) == ["1", "2", "3", "4", "mean"]
    assert "best epochs by language and protocol: de 3, en 2, joint 2, zh 1" in text
    assert {row["epoch"] for row in metrics(out) if row["frozen_layers"]} == {4}
    run = json.loads((out / "run.json").read_text())
    assert run["arguments"]["train_language"] == "de" and "train.de.tsv" in run["data"]


# --- what is not finite, and bad input ------------------------------------------------------------


@pytest.mark.parametrize("log_steps", [1, 99])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(
    log_steps, run, tmp_path, monkeypatch
):
    """NaN from step 8 on; the state is saved every third step."""
    steps = iter(range(99))

    def cross_entropy(logits, labels, **named):
        loss = F.cross_entropy(logits, labels, **named)
        spoilt = named.get("reduction") == "sum" and next(steps) >= 7
        return loss * torch.nan if spoilt else loss

    monkeypatch.setattr(train, "LOG_STEPS", log_steps)
    monkeypatch.setattr(train, "F", SimpleNamespace(cross_entropy=cross_entropy))
    step = 8 if log_steps == 1 else 9
    words = f"error: the loss is nan at step {step}: lower --lr (now 0.001)"
    result = run(SETTINGS["epoch"])
    refused(result, words)
    assert f"\ntrain.py: {words}" in result[2]  # below the progress bar
    assert events(tmp_path).Scalars("train/loss")[-1].step >= 5  # written, though it ended so
    assert saved_state(tmp_path)["step"] == 6 and kept(tmp_path) == ["1"]


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path):
    """A gradient of NaN in step 3 under a loss that is still finite."""
    steps = iter(range(99))

    def look(model, **_):
        if next(steps) == 2:
            model.classifier[1].bias.data[1] = torch.nan

    with watching(look):
        result = run("--layers 1 --save-steps 1")
    refused(result, "a weight is not finite at step 3: lower --lr")
    assert saved_state(tmp_path)["step"] == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--freeze-layers 1 2", "--freeze-layers K ... and --freeze-epoch N|auto need each other"),
        (
            "--freeze-layers 1 --freeze-epoch 5",
            "--freeze-epoch 5: expected 0 to 4 (of --epochs 5), or auto",
        ),
        ("--head pooler --layers 1", "--head pooler reads [CLS] of the last layer: leave out"),
        ("--head pooler --combine mix", "--head pooler reads [CLS]"),
        ("--freeze-layer 1", "unrecognized arguments: --freeze-layer 1"),
        ("--layers-from x --layers 1", "--layers-from gives the layers and the pooling: leave"),
        ("--layers-from {old}", "old.json lacks 'pooling': not made by this version of grid_sea"),
    ],
)
def test_bad_flags(flags, message, script, tmp_path):
    (tmp_path / "old.json").write_text('{"layers": [1]}')
    flags = flags.format(old=tmp_path / "old.json").split()
    paths = "--model", "none", "--data", "none", "--out", tmp_path / "run"
    refused(script("train", *paths, *flags), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "--layers 6: the model has layers 0 (embeddings) to 5"),
        ("--layers 1 --freeze-layers 6 --freeze-epoch 1", "--freeze-layers 6: the model has"),
        ("--layers 1 --max-length 65", "--max-length 65: expected 3 to 64"),
        pytest.param(
            "--layers 1 --precision fp16",
            "--precision fp16 needs a GPU; on a CPU use bf16 or fp32",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_flags_that_do_not_fit_the_model(flags, message, run, tmp_path):
    refused(run(flags, out=tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_automatic_freezing_needs_another_language(run, tmp_path):
    data = make_data(tmp_path / "data", languages=("en",))
    words = "no dev file in another language than en, which --freeze-epoch auto needs"
    refused(run(QUICK, "--freeze-layers 1 --freeze-epoch auto", data=data), words)


# --- signals and threads --------------------------------------------------------------------------


def signalled(patch, step, *numbers, wait=0.0):
    """These signals, `wait` seconds between them, during a step (from 1)."""
    learning_rate, left = train.learning_rate, [step]

    def rate(*arguments):
        left[0] -= 1
        if left[0] == 0:
            for i, number in enumerate(numbers):
                time.sleep(wait if i else 0)
                os.kill(os.getpid(), number)
        return learning_rate(*arguments)

    patch.setattr(train, "learning_rate", rate)


@pytest.mark.parametrize(
    "numbers, status",
    [([signal.SIGTERM] * 3, 143), ([signal.SIGINT, signal.SIGTERM], 130)],
)
def test_signals_save_once_and_stop_and_the_command_goes_on(
    numbers, status, run, unstopped, tmp_path
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOG_STEPS", 99)  # one process need not wait for the sum
        signalled(patch, 8, *numbers)
        code, out, _ = run(SETTINGS["epoch"], "--overwrite")
    assert code == status and saved_state(tmp_path)["step"] == 8
    assert out.endswith(
        f"stopped by {numbers[0].name} after step 8, the state is saved\n"
        "the same command, without --overwrite, goes on\n"
    )
    code, out, _ = run(SETTINGS["epoch"])
    assert code == 0 and "going on after step 8\n" in out
    assert_same_run(tmp_path, unstopped("epoch"))


def test_a_second_ctrl_c_a_second_later_stops_at_once(run, tmp_path, monkeypatch):
    signalled(monkeypatch, 3, signal.SIGINT, signal.SIGINT, wait=1.05)
    code, out, _ = run("--layers 1")
    assert code == 130 and "saved" not in out and not (tmp_path / "resume").exists()


def test_a_signal_during_the_last_step_ends_the_run_as_it_would_have(run, tmp_path, monkeypatch):
    signalled(monkeypatch, STEPS, signal.SIGTERM)
    code, out, _ = run("--layers 1 --epochs 1")
    assert code == 0 and ": done" in out and (tmp_path / "epochs/mean").exists()


def test_main_runs_in_a_thread(tune, tmp_path):
    """As agents of sweeps call it; a signal's handler can be set in the main thread alone."""
    thread = threading.Thread(target=tune, args=[QUICK])
    thread.start()
    thread.join()
    assert kept(tmp_path) == ["1", "mean"]
