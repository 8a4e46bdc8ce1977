import contextlib
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import make_data, make_model, make_tokenizer
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, log_loss
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import AtomicCounter
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import train
from data import train_batches
from lib import encoders, folders, run_log

BASE = "--epochs 3 --batch-size 13 --lr 1e-3 --precision fp32 --max-length 32".split()
STEPS = 5  # an epoch: 60 rows, 13 at once
FROZEN = "--layers 1 3 --freeze-layers 5 2 0 --freeze-epoch 1 --weight-decay 0.1"
LABELS = ["refund", "agent", "delivery", "cancel"]


@pytest.fixture(scope="module", autouse=True)
def log_each_step():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOG_STEPS", 1)
        yield


@pytest.fixture(scope="module")
def pair_data(data_folder, tmp_path_factory):
    """The toy data with each text cut in two."""
    folder = tmp_path_factory.mktemp("pairs")
    for path in filter(Path.is_file, Path(data_folder).iterdir()):
        lines = path.read_text().splitlines()
        if path.suffix == ".tsv":
            cells = [
                (text[: len(text) // 2].strip() or "my", text[len(text) // 2 :].strip(), label)
                for text, label in (line.split("\t") for line in lines[1:])
            ]
            lines = ["text_a\ttext_b\tlabel", *map("\t".join, cells)]
        (folder / path.name).write_text("".join(f"{line}\n" for line in lines))
    return folder


def fine_tune(out, model, data, *flags):
    """train.py in this process: what it printed. Flags are strings of flags, BASE is given before them."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        train.main(
            [
                "--model",
                str(model),
                "--data",
                str(data),
                "--out",
                str(out),
                *BASE,
                *" ".join(flags).split(),
            ]
        )
    return text.getvalue()


@pytest.fixture
def run(script):
    """fine_tune() as a user calls it: (exit status, stdout, stderr)."""
    return lambda out, model, data, *flags: script(
        "train", "--model", model, "--data", data, "--out", out, *BASE, *" ".join(flags).split()
    )


def metrics(out):
    """metrics.jsonl without the one column that differs from call to call."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key != "examples_per_second"} for row in rows
    ]


def kept(out):
    return sorted(
        int(path.name) for path in (Path(out) / "epochs").iterdir() if path.name != "mean"
    )


def weights(folder):
    """All tensors of a kept epoch; the classifier's own under their names, the encoder's under encoder.NAME."""
    encoder = load_file(Path(folder) / "model.safetensors")
    own = load_file(Path(folder) / "classifier.safetensors")
    return {**{f"encoder.{name}": tensor for name, tensor in encoder.items()}, **own}


def assert_same_run(one, other, ignore=()):
    """Two complete run folders with the same metrics, the same epochs, and weights equal bit for bit."""

    def rows(out):
        return [
            {key: value for key, value in row.items() if key not in ignore} for row in metrics(out)
        ]

    assert rows(one) == rows(other)
    assert kept(one) == kept(other)
    for epoch in [*kept(one), "mean"]:
        mine, others = (weights(Path(out) / "epochs" / str(epoch)) for out in (one, other))
        assert mine.keys() == others.keys()
        assert [name for name in mine if not torch.equal(mine[name], others[name])] == []


def blocks_size(blocks):
    """Parameters of some blocks: 36 wide, 52 in the middle; query, key, value, output, two norms."""
    return blocks * (4 * (36 * 36 + 36) + 2 * (2 * 36) + (36 * 52 + 52) + (52 * 36 + 36))


def train_lengths(data):
    """Every toy word is one token."""
    return np.array(
        [
            len(line.split("\t")[0].split()) + 2
            for line in (Path(data) / "train.en.tsv").read_text().splitlines()[1:]
        ]
    )


def embeddings_size(model):
    return (len(AutoTokenizer.from_pretrained(model)) + 64 + 2) * 36 + 2 * 36


# --- the pieces of a step ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def watching(look):
    """Call look(model, optimizer, batches) after each optimizer step."""
    make_optimizer, micro_batches, asked, seen = (
        train.make_optimizer,
        train.micro_batches,
        train.Stop.asked,
        {},
    )

    def made(model, decay):
        seen["model"], seen["optimizer"] = model, make_optimizer(model, decay)
        return seen["optimizer"]

    def batches(*arguments):
        seen["batches"] = []
        for batch, last in micro_batches(*arguments):
            seen["batches"].append(batch)
            yield batch, last

    def stepped(stop):
        look(**seen)
        return asked(stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_optimizer", made)
        patch.setattr(train, "micro_batches", batches)
        patch.setattr(train.Stop, "asked", stepped)
        yield


def plain_fine_tuning(model, data, head, layers, epochs, peak):
    """The independent loop: encoder, linear, the mean loss and accuracy of each epoch, the largest gradient norm."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model)
    torch.manual_seed(0)
    linear = torch.nn.Linear(36 * len(layers) if head == "layers" else 36, 4)
    cells = [
        line.split("\t") for line in (Path(data) / "train.en.tsv").read_text().splitlines()[1:]
    ]
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
            batch = tokenizer.pad(
                [rows[i] for i in chosen], pad_to_multiple_of=8, return_tensors="pt"
            )
            output = encoder(**batch, output_hidden_states=True)
            padding = (batch["attention_mask"] == 0)[:, :, None]
            features = (
                output.pooler_output
                if head == "pooler"
                else torch.cat(
                    [
                        output.hidden_states[k].masked_fill(padding, -torch.inf).max(1).values
                        for k in layers
                    ],
                    1,
                )
            )
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


@pytest.mark.parametrize("epochs", [2, 4])
@pytest.mark.parametrize("head, pairs", [("layers", False), ("pooler", True)])
def test_weights_are_those_of_a_plain_loop(
    head, pairs, epochs, still_model, data_folder, pair_data, tmp_path
):
    data, layers = (pair_data if pairs else data_folder), [1, 3]
    fine_tune(
        tmp_path / "run",
        still_model,
        data,
        "--lr 1e-4 --dropout 0",
        f"--epochs {epochs}",
        "--head pooler" if head == "pooler" else "--layers 1 3",
    )
    encoder, linear, history, norm = plain_fine_tuning(
        still_model, data, head, layers, epochs, 1e-4
    )
    assert norm > 1.1  # else nothing was clipped
    mine = weights(tmp_path / "run" / "epochs" / str(epochs))
    plain = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    plain |= {f"classifier.1.{name}": tensor for name, tensor in linear.state_dict().items()}
    start = AutoModel.from_pretrained(still_model).state_dict()
    assert set(mine) == {
        name
        for name in plain
        if head == "pooler"
        or not name.startswith(
            ("encoder.pooler.", "encoder.encoder.layer.3.", "encoder.encoder.layer.4.")
        )
    }
    for name, tensor in mine.items():
        assert torch.allclose(tensor, plain[name], rtol=0, atol=1e-6), name
    moved = [
        (mine[f"encoder.{name}"] - start[name]).abs().max()
        for name in ("embeddings.word_embeddings.weight", "encoder.layer.2.output.dense.weight")
    ]
    assert min(moved) > 1e-4  # a hundred times the tolerance
    rows = [row for row in metrics(tmp_path / "run") if row["split"] == "train"]
    assert [row["accuracy"] for row in rows] == [accuracy for _, accuracy in history]
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in history], abs=1e-6)


@pytest.mark.parametrize("parts, sizes", [(2, [7, 6]), (5, [3, 3, 3, 2, 2]), (99, [1] * 13)])
def test_accumulating_gives_the_same_weights(parts, sizes, still_model, data_folder, tmp_path):
    flags = "--layers 1 3 --dropout 0 --lr 1e-4 --epochs 2"
    fine_tune(tmp_path / "whole", still_model, data_folder, flags)
    seen = []
    with watching(
        lambda model, optimizer, batches: seen.append([len(batch["labels"]) for batch in batches])
    ):
        fine_tune(tmp_path / "parts", still_model, data_folder, flags, f"--accumulate {parts}")
    assert seen.count(sizes) == 8 and all(sum(step) in (8, 13) for step in seen)
    whole, split = (weights(tmp_path / name / "epochs" / "2") for name in ("whole", "parts"))
    assert [n for n in whole if not torch.allclose(whole[n], split[n], rtol=0, atol=1e-6)] == []


def test_weight_decay_is_decoupled_and_on_matrices_alone():
    model = torch.nn.Sequential(
        torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Embedding(3, 5)
    )
    torch.nn.init.uniform_(model[0].bias)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = train.make_optimizer(model, 0.3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    matrix, *others = model.parameters()
    assert torch.allclose(matrix, before[0] * (1 - 0.1 * 0.3))
    assert all(torch.equal(parameter, old) for parameter, old in zip(others, before[1:]))


@pytest.mark.parametrize("steps", [1, 4, 10, 37, 200])
@pytest.mark.parametrize(
    "schedule, theirs",
    [
        ("linear", transformers.get_linear_schedule_with_warmup),
        ("constant", transformers.get_constant_schedule_with_warmup),
    ],
)
def test_learning_rate_is_that_of_transformers(steps, schedule, theirs):
    """In warm-up one step ahead of theirs, whose first step has a learning rate of 0; after it the same."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.03)
    warm = max(1, round(steps / 10))
    scheduler = theirs(optimizer, warm, *([steps] if schedule == "linear" else []))
    expected = []
    for _ in range(steps + 1):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    mine = [train.learning_rate(step, steps, 0.03, schedule) for step in range(steps)]
    assert mine[:warm] == pytest.approx(expected[1 : warm + 1] if steps > 1 else [0.03])
    assert mine[warm:] == pytest.approx(expected[warm:steps])
    assert min(mine) > 0 and max(mine) == pytest.approx(0.03)


# --- freezing ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen_run(model_folder, data_folder, tmp_path_factory):
    """Layers 0, 2 and the absent 5 frozen after one epoch of three, and what was seen after each of the 15 steps."""
    out, seen, with_gradient = tmp_path_factory.mktemp("frozen") / "run", [], []

    def look(model, optimizer, batches):
        with torch.random.fork_rng():
            states = [model.encoder.embeddings(batches[0]["input_ids"]) for _ in range(2)]
        gradients = with_gradient.pop()
        seen.append(
            SimpleNamespace(
                weights={
                    name: parameter.detach().clone() for name, parameter in model.named_parameters()
                },
                gradients={
                    name
                    for name, parameter in model.named_parameters()
                    if id(parameter) in gradients
                },
                dropout=not torch.equal(*states),
                training=all(m.training for m in model.modules()),
                state={
                    name
                    for name, parameter in model.named_parameters()
                    if parameter in optimizer.state
                },
                states=len(optimizer.state),
                random=torch.get_rng_state(),
            )
        )

    clip = torch.nn.utils.clip_grad_norm_

    def clipped(parameters, norm):
        with_gradient.append(
            {id(parameter) for parameter in parameters if parameter.grad is not None}
        )
        return clip(parameters, norm)

    with watching(look), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
        text = fine_tune(out, model_folder, data_folder, FROZEN)
    return SimpleNamespace(out=out, seen=seen, text=text)


def is_frozen(name):
    return name.startswith(("encoder.embeddings.", "encoder.encoder.layer.1."))


def test_frozen_weights_do_not_move_by_one_bit(frozen_run):
    for name, after in frozen_run.seen[STEPS - 1].weights.items():
        assert not torch.equal(after, frozen_run.seen[0].weights[name]), (
            f"{name} did not move before freezing"
        )
        for before, now in zip(frozen_run.seen[STEPS - 1 :], frozen_run.seen[STEPS:]):
            assert torch.equal(before.weights[name], now.weights[name]) == is_frozen(name), name


def test_frozen_weights_have_no_gradient_and_no_optimizer_state(frozen_run):
    names = set(frozen_run.seen[0].weights)
    for step, seen in enumerate(frozen_run.seen):
        expected = {name for name in names if step < STEPS or not is_frozen(name)}
        assert seen.gradients == seen.state == expected
        assert seen.states == len(expected)


def test_dropout_stays_on_in_frozen_layers(frozen_run):
    assert all(seen.dropout and seen.training for seen in frozen_run.seen)


def test_dropout_draws_anew_at_each_step(frozen_run):
    assert len({seen.random.numpy().tobytes() for seen in frozen_run.seen}) == 3 * STEPS


def test_frozen_layers_are_in_the_metrics_and_in_the_output(frozen_run, model_folder):
    assert [row["frozen_layers"] for row in metrics(frozen_run.out)] == [[]] * 4 + [[0, 2, 5]] * 8
    left = blocks_size(2) + 72 * 4 + 4
    assert (
        f"layers 0 2 5 are frozen from here on, {left:,} parameters to train\n" in frozen_run.text
    )


def test_start_says_layers_used_cut_and_frozen_and_what_is_trained(
    frozen_run, model_folder, data_folder
):
    lengths = train_lengths(data_folder)
    lines = frozen_run.text.splitlines()
    count = embeddings_size(model_folder) + blocks_size(3) + 72 * 4 + 4
    assert lines[0] == "BertModel, 5 blocks: max pooling of layers 1 3, the 2 above cut off"
    assert lines[1] == "layers to freeze: 5 2 0"
    assert (
        lines[2]
        == "freezing layer 5 is a no-op: it is above the highest layer pooled and was cut off"
    )
    used = int(lines[3].split(" of ")[0])
    there = AutoTokenizer.from_pretrained(model_folder).vocab_size
    assert lines[3] == f"{used} of {there} word pieces are in the data; the others stay as they are"
    count -= 36 * (there - used)
    padded = sum(
        len(rows) * -(-max(lengths[i] for i in rows) // 8) * 8
        for rows in train_batches(lengths, 13, 0, 0)
    )
    assert lines[4] == (
        f"{count:,} parameters to train, 3 epochs of 5 steps, "
        f"{1 - sum(lengths) / padded:.1%} of the tokens are padding"
    )
    assert lines[5].startswith("cpu, float32 products (as asked)")


@pytest.mark.parametrize(
    "flag, has, expected",
    [
        ("auto", True, "bfloat16 products (the hardware has it)"),
        ("auto", False, "float32 products (the hardware has no bf16)"),
        ("bf16", False, "bfloat16 products (as asked)"),
    ],
)
def test_start_says_why_the_products_are_in_this_precision(
    flag, has, expected, model_folder, data_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
    text = fine_tune(
        tmp_path,
        model_folder,
        data_folder,
        f"--layers 1 --epochs 1 --max-train-rows 13 --precision {flag}",
    )
    assert f"cpu, {expected}" in text


def test_compiled_is_the_same_run_before_and_after_freezing(
    model_folder, data_folder, tmp_path, monkeypatch
):
    """With PyTorch's own dropout in both: a compiled model does without cpu.py."""
    modes = []

    def compile_(
        self, **settings
    ):  # inductor's kernels take a minute; what is traced and differentiated is this
        modes.append(settings)
        torch.nn.Module.compile(self, dynamic=True, backend="aot_eager")

    monkeypatch.setattr(train.Classifier, "compile", compile_)
    flags = "--layers 0 1 --freeze-layers 0 --freeze-epoch 1 --epochs 2"
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    fine_tune(compiled, model_folder, data_folder, flags, "--compile default")
    monkeypatch.setattr(
        train, "make_fast", lambda model: None, raising=False
    )  # cpu.py can be deleted
    fine_tune(plain, model_folder, data_folder, flags)
    assert modes == [{"dynamic": True, "mode": "default"}]
    for mine, other in zip(metrics(compiled), metrics(plain), strict=True):
        assert mine.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-5)
        assert mine == other
    for epoch in (1, 2):
        mine, other = (weights(run / "epochs" / str(epoch)) for run in (compiled, plain))
        for name, tensor in other.items():
            torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-5)


def test_freezing_a_layer_above_the_cut_changes_nothing(model_folder, data_folder, tmp_path):
    text = fine_tune(
        tmp_path / "noop",
        model_folder,
        data_folder,
        "--layers 1 3 --freeze-layers 4 5 --freeze-epoch 1",
    )
    fine_tune(tmp_path / "plain", model_folder, data_folder, "--layers 1 3")
    assert "freezing layer 4 5 is a no-op" in text
    assert_same_run(tmp_path / "noop", tmp_path / "plain", ignore=["frozen_layers"])
    assert metrics(tmp_path / "noop")[-1]["frozen_layers"] == [4, 5]


def test_freezing_from_the_start_keeps_the_pretrained_weights(model_folder, data_folder, tmp_path):
    fine_tune(
        tmp_path / "run",
        model_folder,
        data_folder,
        "--layers 1 3 --freeze-layers 0 2 --freeze-epoch 0",
    )
    pretrained = load_file(Path(model_folder) / "model.safetensors")
    trained = load_file(tmp_path / "run" / "epochs" / "3" / "model.safetensors")
    for name, weight in trained.items():
        assert torch.equal(weight, pretrained[name]) == is_frozen(f"encoder.{name}"), name
    assert all(row["frozen_layers"] == [0, 2] for row in metrics(tmp_path / "run"))


def scripted(monkeypatch, **accuracies):
    """Replace evaluation: the i-th one finds these accuracies on dev."""
    calls = iter(range(99))

    def evaluate(model, sets, *_):
        i = next(calls)
        return {key: (accuracies[key[1]][i], 1.0) for key in sets}

    monkeypatch.setattr(train, "evaluate", evaluate)


@pytest.mark.parametrize(
    "en, de, zh, frozen_epochs",
    [
        (
            [0.9, 0.9, 0.9, 0.9, 0.9],
            [0.2, 0.4, 0.5, 0.4, 0.9],
            [0.4, 0.6, 0.5, 0.4, 0.1],
            [5],
        ),  # means .3 .5 .5 .4 .5: a tie is no fall
        (
            [0.9, 0.8, 0.7, 0.6, 0.5],
            [0.2, 0.4, 0.5, 0.6, 0.7],
            [0.4, 0.6, 0.5, 0.4, 0.3],
            [],
        ),  # English alone falls
        (
            [0.1, 0.2, 0.3, 0.4, 0.5],
            [0.6, 0.5, 0.4, 0.3, 0.9],
            [0.4, 0.4, 0.4, 0.4, 0.9],
            [3, 4, 5],
        ),  # never thawed
        (
            [0.9, 0.9, 0.9, 0.9, 0.9],
            [0.5, 0.5, 0.5, 0.5, 0.4],
            [0.5, 0.5, 0.5, 0.5, 0.5],
            [],
        ),  # too late
    ],
)
def test_automatic_freezing_at_the_first_fall(
    en, de, zh, frozen_epochs, model_folder, data_folder, tmp_path, monkeypatch
):
    scripted(monkeypatch, en=en, de=de, zh=zh)
    fine_tune(
        tmp_path / "run",
        model_folder,
        data_folder,
        "--layers 2 --freeze-layers 1 --freeze-epoch auto --max-train-rows 13 --epochs 5",
    )
    assert [
        row["epoch"]
        for row in metrics(tmp_path / "run")
        if row["split"] == "train" and row["frozen_layers"]
    ] == frozen_epochs


@pytest.fixture(scope="module")
def auto_run(model_folder, data_folder, tmp_path_factory):
    """A run that freezes by itself, evaluated every second step and after each epoch."""
    out = tmp_path_factory.mktemp("auto") / "run"
    text = fine_tune(
        out,
        model_folder,
        data_folder,
        "--layers 1 3 --freeze-layers 1 2 --freeze-epoch auto --eval-steps 2 --lr 5e-3",
    )
    return SimpleNamespace(out=out, text=text)


def test_a_tie_is_no_fall_however_its_mean_is_rounded():
    first, second = (0.1, 0.2, 0.3), (0.3, 0.2, 0.1)
    assert np.mean(second) < np.mean(first)
    rows = [
        {"step": step, "split": "dev", "language": language, "accuracy": accuracy}
        for step, accuracies in ((1, first), (2, second))
        for language, accuracy in zip(("de", "fr", "zh"), accuracies)
    ]
    assert not train.freezing_is_due("auto", 2, rows, "en")
    rows[-1]["accuracy"] -= 0.01
    assert train.freezing_is_due("auto", 2, rows, "en")


def test_automatic_freezing_agrees_with_the_metrics(auto_run):
    evaluations = {}
    for row in metrics(auto_run.out):
        evaluations.setdefault(row["step"], {})[row["split"], row["language"]] = row
    assert list(evaluations) == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    best, expected = -1, []
    for rows in evaluations.values():
        assert {json.dumps(row["frozen_layers"]) for row in rows.values()} == {json.dumps(expected)}
        mean = (rows["dev", "de"]["accuracy"] + rows["dev", "zh"]["accuracy"]) / 2
        if not expected and mean < best:
            expected = [1, 2]
        best = max(best, mean)
    assert expected, "the data of this test should make the accuracy fall"
    assert auto_run.text.count("layers 1 2 are frozen from here on") == 1


# --- stopped and started again -----------------------------------------------------------------------------------

SETTINGS = {
    "epoch": "--layers 1 3 --freeze-layers 0 2 --freeze-epoch 1 --save-steps 3",
    "auto": "--layers 1 3 --freeze-layers 1 2 --freeze-epoch auto --eval-steps 2 --save-steps 3 --lr 5e-3",
    "pooler": "--head pooler --freeze-layers 5 --freeze-epoch 2 --precision bf16 --accumulate 2 --hidden 7 "
    "--weight-decay 0.1",
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


def assert_equal_states(one, other):
    """Nested dicts and lists with equal tensors; less the speed, which is in the rows of metrics."""
    if torch.is_tensor(one):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"examples_per_second"}:
            assert_equal_states(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for mine, others in zip(one, other):
            assert_equal_states(mine, others)
    else:
        assert one == other


@contextlib.contextmanager
def interrupted(owner, name, calls):
    """Ctrl-C in place of the call of owner.name after `calls` ones; it must have come."""
    original, left = getattr(owner, name), [calls]

    def stop(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize(
    "settings, stops",
    [
        *[("epoch", [k]) for k in (0, 2, 4, 5, 6, 7, 11, 14)],
        ("epoch", [4, 3, 4, 2, 2]),
        *[("auto", [k]) for k in (3, 5, 8, 9, 13)],
        ("auto", [5, 4, 4]),
        *[("pooler", [k]) for k in (4, 9, 10, 13)],
    ],
)
def test_stopped_and_started_again_is_as_never_stopped(
    settings, stops, unstopped, model_folder, data_folder, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    # TensorBoard orders the files of one process and one second by a number's text, "9" after "10": begin at 0
    monkeypatch.setattr(
        "tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(0)
    )
    for steps in stops:
        with interrupted(train, "learning_rate", steps):
            fine_tune(out, model_folder, data_folder, SETTINGS[settings])
    text = fine_tune(out, model_folder, data_folder, SETTINGS[settings])
    assert ("going on after step" in text) == (
        sum(stops) >= (3 if "--save-steps" in SETTINGS[settings] else STEPS)
    )
    assert_same_run(out, unstopped(settings))
    assert_equal_states(saved_state(out), saved_state(unstopped(settings)))
    assert json.loads((out / "run.json").read_text())["complete"] is True
    assert [event.step for event in events(out).Scalars("train/loss")] == list(
        range(1, 3 * STEPS + 1)
    )


def test_automatic_freezing_remembers_the_best_from_before_a_stop(
    model_folder, data_folder, tmp_path, monkeypatch
):
    """Epochs of one step; after the first the mean was 0.5, the second is below it and above nothing since the stop."""
    flags = "--layers 2 --freeze-layers 1 --freeze-epoch auto --max-train-rows 13 --epochs 3"
    scripted(monkeypatch, en=[0.5], de=[0.5], zh=[0.5])
    with interrupted(train, "learning_rate", 1):
        fine_tune(tmp_path / "run", model_folder, data_folder, flags)
    scripted(monkeypatch, en=[0.5, 0.5], de=[0.4, 0.4], zh=[0.5, 0.5])
    fine_tune(tmp_path / "run", model_folder, data_folder, flags)
    assert [
        row["frozen_layers"] for row in metrics(tmp_path / "run") if row["split"] == "train"
    ] == [[], [], [1]]


@pytest.mark.parametrize(
    "owner, name, calls",
    [
        (train, "save_state", 0),
        (train, "save_state", 3),
        (torch, "save", 2),
        (train, "save_model", 0),
        (train, "save_model", 2),
        (train, "save_model", 3),
        (train, "update_mean", 1),
        (run_log.Log, "evaluation", 1),
        (train, "evaluate", 2),
        (train, "finish_folder", 0),
        (folders.os, "replace", 5),
    ],
)
def test_stopped_while_saving_is_as_never_stopped(
    owner, name, calls, unstopped, model_folder, data_folder, tmp_path
):
    out = tmp_path / "run"
    with interrupted(owner, name, calls):
        fine_tune(out, model_folder, data_folder, SETTINGS["epoch"])
    fine_tune(out, model_folder, data_folder, SETTINGS["epoch"])
    assert_same_run(out, unstopped("epoch"))
    assert_equal_states(saved_state(out), saved_state(unstopped("epoch")))
    assert [path.name for path in out.rglob(".*")] == [".lock"]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0" * len(data)],
)
def test_a_damaged_state_is_said_and_left_alone(damage, run, model_folder, data_folder, tmp_path):
    out = tmp_path / "run"
    with interrupted(train, "learning_rate", 7):
        fine_tune(out, model_folder, data_folder, "--layers 1 3")
    path = out / "resume" / "state.pt"
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    status, _, error = run(out, model_folder, data_folder, "--layers 1 3")
    assert status == 2 and "state.pt is damaged or cut short" in error and "--overwrite" in error
    assert path.read_bytes() == before


def test_a_complete_run_says_so_and_does_nothing(frozen_run, model_folder, data_folder):
    def files_there():
        return {
            path: path.stat().st_mtime_ns
            for path in frozen_run.out.rglob("*")
            if path.name != ".lock"
        }

    before = files_there()
    text = fine_tune(frozen_run.out, model_folder, data_folder, FROZEN)
    assert text == f"{frozen_run.out} is complete already: nothing to do\n"
    assert files_there() == before


def test_other_arguments_are_refused_by_name(frozen_run, run, model_folder, data_folder):
    before = (frozen_run.out / "run.json").read_bytes()
    status, _, error = run(
        frozen_run.out, model_folder, data_folder, "--layers 1 2 --lr 2e-3 --seed 5"
    )
    assert status == 2
    for phrase in (
        "arguments.lr was 0.001, is now 0.002",
        "arguments.layers was [1, 3], is now [1, 2]",
        "arguments.seed was 0, is now 5",
        "arguments.freeze_layers was [5, 2, 0], is now []",
        "arguments.freeze_epoch was 1, is now None",
        "arguments.weight_decay was 0.1, is now 0.0",
        "--overwrite",
    ):
        assert phrase in error
    assert (frozen_run.out / "run.json").read_bytes() == before


def test_changed_data_and_changed_weights_are_refused(run, tmp_path):
    model, data, out = (
        make_model(tmp_path / "model"),
        make_data(tmp_path / "data"),
        tmp_path / "run",
    )
    flags = [out, model, data, "--layers 1 --epochs 1"]
    assert run(*flags)[0] == 0
    make_data(tmp_path / "data", train=61)
    status, _, error = run(*flags)
    assert status == 2 and "data.train.en.tsv was" in error and "dev.en" not in error
    make_data(tmp_path / "data")
    make_model(tmp_path / "model", seed=1)
    status, _, error = run(*flags)
    assert status == 2 and "revision was" in error


def test_overwrite_starts_anew(model_folder, data_folder, tmp_path):
    out = tmp_path / "run"
    with interrupted(train, "learning_rate", 12):
        fine_tune(out, model_folder, data_folder, "--layers 2 --lr 5e-3")
    (out / "predictions" / "1").mkdir(parents=True)
    text = fine_tune(out, model_folder, data_folder, "--layers 1 3 --overwrite")
    fine_tune(tmp_path / "fresh", model_folder, data_folder, "--layers 1 3")
    assert "going on" not in text and not (out / "predictions").exists()
    assert_same_run(out, tmp_path / "fresh")


def test_a_folder_of_something_else_is_refused(run, model_folder, data_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    status, _, error = run(tmp_path / "run", model_folder, data_folder, "--layers 1")
    assert status == 2 and "thesis.txt but no run.json" in error
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_a_second_process_on_the_folder_is_refused(run, model_folder, data_folder, tmp_path):
    with folders.claim(tmp_path / "run"):
        status, _, error = run(tmp_path / "run", model_folder, data_folder, "--layers 1")
    assert status == 2 and "in use by another process" in error


# --- what a run writes -------------------------------------------------------------------------------------------


def events(out):
    return EventAccumulator(str(out), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_columns_of_the_metrics(auto_run):
    rows = [json.loads(line) for line in (auto_run.out / "metrics.jsonl").read_text().splitlines()]
    assert {tuple(row) for row in rows} == {
        (
            "epoch",
            "step",
            "split",
            "language",
            "accuracy",
            "loss",
            "lr",
            "frozen_layers",
            "examples_per_second",
        )
    }
    assert [(row["split"], row["language"]) for row in rows] == [
        ("train", ""),
        ("dev", "en"),
        ("dev", "de"),
        ("dev", "zh"),
    ] * 9
    assert [(row["epoch"], type(row["epoch"])) for row in rows[::4]] == [
        (0.4, float),
        (0.8, float),
        (1, int),
        (1.2, float),
        (1.6, float),
        (2, int),
        (2.4, float),
        (2.8, float),
        (3, int),
    ]
    lrs = {1: 0.5, 2: 1.0} | {
        step: (15 - step + 1) / 13 for step in range(3, 16)
    }  # by hand: 2 steps of warm-up of 15
    assert [row["lr"] for row in rows] == pytest.approx([5e-3 * lrs[row["step"]] for row in rows])
    assert all(row["examples_per_second"] > 0 for row in rows)


def test_the_speed_counts_rows_and_not_full_batches(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    with contextlib.closing(run_log.Log(tmp_path, 0, 9)) as log:
        log.step(32), log.step(5)
        now[0] += 2
        assert log.train(2, 1.0, 0.5, 1e-3) == 37 / 2
        now[0] += 7  # an evaluation, which does not count
        log.restart()
        log.step(8)
        now[0] += 1
        assert log.train(3, 1.0, 0.5, 1e-3) == 8


def test_train_rows_count_the_steps_since_the_last_evaluation(auto_run, data_folder):
    """The one batch of 8 rows of an epoch can be any of its five."""
    sizes = [
        len(rows)
        for epoch in range(3)
        for rows in train_batches(train_lengths(data_folder), 13, 0, epoch)
    ]
    scalars = {event.step: event.value for event in events(auto_run.out).Scalars("train/accuracy")}
    last = 0
    for row in metrics(auto_run.out)[::4]:
        right = row["accuracy"] * sum(sizes[last : row["step"]])
        assert right == pytest.approx(round(right), abs=1e-9) and scalars[
            row["step"]
        ] == pytest.approx(row["accuracy"])
        last = row["step"]


def test_dev_accuracy_and_loss_are_those_of_the_kept_model(frozen_run, data_folder):
    folder = frozen_run.out / "epochs" / "3"
    tokenizer, encoder = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder).eval(),
    )
    linear = load_file(folder / "classifier.safetensors")
    for row in metrics(frozen_run.out)[-3:]:
        lines = (Path(data_folder) / f"dev.{row['language']}.tsv").read_text().splitlines()[1:]
        cells = [line.split("\t") for line in lines]
        truth, logits = [LABELS.index(label) for _, label in cells], []
        for text, _ in cells:  # one at a time: no padding at all
            with torch.no_grad():
                states = encoder(
                    **tokenizer(text, return_tensors="pt"), output_hidden_states=True
                ).hidden_states
            features = torch.cat([states[1].amax(1), states[3].amax(1)], 1)
            logits.append(
                (features @ linear["classifier.1.weight"].T + linear["classifier.1.bias"])[0]
            )
        logits = torch.stack(logits).double()
        assert row["accuracy"] == accuracy_score(truth, logits.argmax(1))
        assert row["loss"] == pytest.approx(
            log_loss(truth, logits.softmax(1), labels=range(4)), abs=1e-5
        )


def test_tensorboard_holds_the_metrics(auto_run):
    board = events(auto_run.out)
    languages = ("de", "en", "zh")
    assert set(board.Tags()["scalars"]) == {
        *(f"{kind}/dev/{language}" for kind in ("accuracy", "loss") for language in languages),
        "train/loss",
        "train/accuracy",
        "lr",
        "examples per second",
        "frozen layers",
    }
    rows = metrics(auto_run.out)
    for language in languages:
        mine = [row for row in rows if (row["split"], row["language"]) == ("dev", language)]
        for kind in ("accuracy", "loss"):
            scalars = board.Scalars(f"{kind}/dev/{language}")
            assert [scalar.step for scalar in scalars] == [row["step"] for row in mine]
            assert [scalar.value for scalar in scalars] == pytest.approx(
                [row[kind] for row in mine]
            )
    assert [scalar.step for scalar in board.Scalars("lr")] == list(range(1, 16))
    frozen = [row for row in rows if row["split"] == "train"]
    assert [scalar.value for scalar in board.Scalars("frozen layers")] == [
        len(row["frozen_layers"]) for row in frozen
    ]
    texts = [
        event.tensor_proto.string_val[0].decode()
        for event in board.Tensors("frozen layers/text_summary")
    ]
    assert texts == [" ".join(map(str, row["frozen_layers"])) or "none" for row in frozen]


@pytest.mark.parametrize(
    "epochs, expected",
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (5, [1, 2, 4, 5]), (6, [1, 2, 4, 6])],
)
def test_the_last_epoch_and_the_best_by_each_protocol_are_kept(
    epochs, expected, model_folder, data_folder, tmp_path, monkeypatch
):
    """Best by hand: en 2 (tied with 3), de 4 (tied with 5), zh 1, joint 1; before epoch 4: de 1."""
    scripted(
        monkeypatch,
        en=[0.5, 0.7, 0.7, 0.6, 0.1, 0.2],
        de=[0.3, 0.2, 0.3, 0.5, 0.5, 0.4],
        zh=[0.6, 0.2, 0.4, 0.1, 0.2, 0.3],
    )
    text = fine_tune(
        tmp_path / "run",
        model_folder,
        data_folder,
        f"--layers 1 --max-train-rows 13 --epochs {epochs}",
    )
    assert kept(tmp_path / "run") == expected
    assert f"best epoch {min(epochs, 2)} by dev en, 1 by the others' dev\n" in text


def test_kept_epochs_follow_from_the_metrics(auto_run):
    """Evaluations in the midst of an epoch do not count: no model was saved there."""
    history = {}
    for row in metrics(auto_run.out):
        if row["split"] == "dev" and isinstance(row["epoch"], int):
            history.setdefault(row["epoch"], {})[row["language"]] = row["accuracy"]
    columns = {name: [scores[name] for scores in history.values()] for name in ("en", "de", "zh")}
    columns["joint"] = [(de + zh) / 2 for de, zh in zip(columns["de"], columns["zh"])]
    assert kept(auto_run.out) == sorted(
        {3} | {1 + int(np.argmax(column)) for column in columns.values()}
    )


def test_run_json_describes_the_run(frozen_run):
    run = json.loads((frozen_run.out / "run.json").read_text())
    assert run["complete"] is True and run["labels"] == LABELS and run["precision"] == "float32"
    assert run["arguments"]["layers"] == [1, 3] and run["arguments"]["freeze_epoch"] == 1
    assert sorted(run["data"]) == ["dev.de.tsv", "dev.en.tsv", "dev.zh.tsv", "train.en.tsv"]
    assert run["versions"]["torch"] == torch.__version__ and run["command"].startswith(
        "python train.py"
    )


def test_test_files_are_never_opened(model_folder, data_folder, frozen_run, run, tmp_path):
    data = shutil.copytree(data_folder, tmp_path / "data")
    for path in data.glob("test.*.tsv"):
        path.write_bytes(b"\xff\xfe not a table")
    fine_tune(tmp_path / "run", model_folder, data, FROZEN)
    assert_same_run(tmp_path / "run", frozen_run.out)
    status, _, error = run(tmp_path / "two", model_folder, data, FROZEN, "--track-test")
    assert status == 2 and "test.en.tsv, line 1" in error


def test_tracking_test_adds_rows_and_changes_nothing_else(model_folder, data_folder, tmp_path):
    out, other = tmp_path / "run", tmp_path / "other"
    fine_tune(out, model_folder, data_folder, FROZEN, "--track-test")
    fine_tune(other, model_folder, data_folder, FROZEN)
    rows = metrics(out)
    assert [row["language"] for row in rows if row["split"] == "test"] == ["en", "de", "zh"] * 3
    assert "accuracy/test/zh" in events(out).Tags()["scalars"]
    (out / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows if row["split"] != "test")
    )
    shutil.rmtree(out / "epochs/2") if 2 not in kept(other) else None  # the best on test, kept too
    assert_same_run(out, other)


def test_with_tracking_the_epoch_that_is_best_on_test_is_kept_too(
    model_folder, data_folder, tmp_path, monkeypatch
):
    test_scores = iter([0.1, 0.8, 0.3, 0.8])
    monkeypatch.setattr(
        train,
        "evaluate",
        lambda *_: {
            ("dev", "en"): (0.5, 0.0),
            ("dev", "de"): (0.5, 0.0),
            ("test", "en"): (0.9, 0.0),
            ("test", "de"): (next(test_scores), 0.0),
        },
    )
    fine_tune(
        tmp_path / "run",
        model_folder,
        data_folder,
        "--layers 1 --max-train-rows 13 --epochs 4 --track-test",
    )
    assert kept(tmp_path / "run") == [
        1,
        2,
        4,
    ]  # best by dev (a tie), by test (the earlier of two), the last


def test_leaving_out_the_word_pieces_without_a_gradient_changes_no_weight(
    model_folder, data_folder, tmp_path, monkeypatch
):
    """Adam over the whole vocabulary against Adam over the rows that the data uses."""
    fine_tune(tmp_path / "some", model_folder, data_folder, FROZEN)
    keep_tokens = encoders.keep_tokens
    monkeypatch.setattr(
        encoders,
        "keep_tokens",
        lambda encoder, ids, pad_id: keep_tokens(
            encoder, np.arange(encoder.get_input_embeddings().num_embeddings), pad_id
        ),
    )
    text = fine_tune(tmp_path / "all", model_folder, data_folder, FROZEN)
    assert "158 of 158 word pieces" in text
    for epoch in [*kept(tmp_path / "all"), "mean"]:
        some, whole = (weights(tmp_path / name / "epochs" / str(epoch)) for name in ("some", "all"))
        for name in whole:
            torch.testing.assert_close(some[name], whole[name], atol=1e-6, rtol=0)


def test_word_pieces_that_are_not_trained_on_stay_as_they_are_under_weight_decay_too(
    frozen_run, model_folder, data_folder
):
    tokenizer, data = AutoTokenizer.from_pretrained(model_folder), Path(data_folder)
    ids = {
        i
        for line in (data / "train.en.tsv").read_text().splitlines()[1:]
        for i in tokenizer(line.split("\t")[0])["input_ids"]
    }
    start, end = (
        file["embeddings.word_embeddings.weight"]
        for file in (
            load_file(Path(model_folder) / "model.safetensors"),
            load_file(frozen_run.out / "epochs/3/model.safetensors"),
        )
    )
    moved = {int(i) for i in (start != end).any(1).nonzero()}
    assert moved == ids


def test_max_rows_are_spread_evenly(model_folder, data_folder, tmp_path):
    data = shutil.copytree(data_folder, tmp_path / "data")
    for name, count in (("train.en", 17), ("dev.en", 5), ("dev.de", 5), ("dev.zh", 5)):
        header, *lines = (data / f"{name}.tsv").read_text().splitlines(keepends=True)
        (data / f"{name}.tsv").write_text(
            header + "".join(lines[int(i * len(lines) / count)] for i in range(count))
        )
    fine_tune(tmp_path / "short", model_folder, data, "--layers 1 3")
    fine_tune(
        tmp_path / "limited",
        model_folder,
        data_folder,
        "--layers 1 3 --max-train-rows 17 --max-eval-rows 5",
    )
    assert metrics(tmp_path / "limited")[-1]["step"] == 6
    assert_same_run(tmp_path / "short", tmp_path / "limited")


def test_layers_from_a_search(model_folder, data_folder, tmp_path):
    (tmp_path / "best.json").write_text(
        json.dumps({"layers": [2, 3], "pooling": "mean", "select": "joint", "per_language": {}})
    )
    fine_tune(
        tmp_path / "given", model_folder, data_folder, "--layers 2 3 --pooling mean --epochs 1"
    )
    text = fine_tune(
        tmp_path / "found",
        model_folder,
        data_folder,
        f"--layers-from {tmp_path / 'best.json'} --epochs 1",
    )
    assert "mean pooling of layers 2 3, the 2 above cut off" in text
    assert_same_run(tmp_path / "given", tmp_path / "found")
    assert json.loads((tmp_path / "found" / "epochs" / "1" / "classifier.json").read_text())[
        "layers"
    ] == [2, 3]


@pytest.mark.parametrize("family", ["bert", "bert without a pooler", "distilbert", "xlm-roberta"])
def test_a_head_without_a_pretrained_pooler_says_so(family, data_folder, tmp_path):
    if family == "bert without a pooler":
        size = make_tokenizer(tmp_path / "model")
        BertModel(
            BertConfig(
                vocab_size=size,
                hidden_size=36,
                num_hidden_layers=5,
                num_attention_heads=3,
                intermediate_size=52,
                max_position_embeddings=64,
            ),
            add_pooling_layer=False,
        ).save_pretrained(tmp_path / "model")
    else:
        make_model(tmp_path / "model", family)
    texts = [
        fine_tune(tmp_path / name, tmp_path / "model", data_folder, "--head pooler --epochs 1")
        for name in "ab"
    ]
    assert ("no pretrained pooler, it starts at random" in texts[0]) == (
        family in ("bert without a pooler", "distilbert")
    )
    assert "cut off" not in texts[0]
    assert_same_run(tmp_path / "a", tmp_path / "b")  # at random, but from the seed


def test_it_learns_the_toy_task(model_folder, tmp_path):
    data = make_data(tmp_path / "data", train=400, dev=60)
    fine_tune(tmp_path / "run", model_folder, data, "--layers 1 2 --epochs 4 --lr 4e-3")
    last = {
        row["language"]: row["accuracy"]
        for row in metrics(tmp_path / "run")
        if row["epoch"] == 4 and row["split"] == "dev"
    }
    assert last["en"] > 0.8


# --- a loss that is not finite -----------------------------------------------------------------------------------


def spoil(monkeypatch, calls):
    """The training loss is NaN from the call after `calls` on."""
    left = [calls]

    def cross_entropy(logits, labels, **named):
        loss = F.cross_entropy(logits, labels, **named)
        if named.get("reduction") != "sum":
            return loss
        left[0] -= 1
        return loss if left[0] >= 0 else loss * torch.nan

    monkeypatch.setattr(train, "F", SimpleNamespace(cross_entropy=cross_entropy))


@pytest.mark.parametrize("log_steps", [1, 99])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(
    log_steps, run, unstopped, model_folder, data_folder, tmp_path
):
    out = tmp_path / "run"
    flags = [out, model_folder, data_folder, SETTINGS["epoch"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOG_STEPS", log_steps)
        spoil(patch, 7)
        status, _, error = run(*flags)
    assert (
        status == 2
        and f"the loss is nan at step {8 if log_steps == 1 else 9}" in error
        and "--lr" in error
    )
    assert saved_state(out)["step"] == 6 and kept(out) == [1]
    assert run(*flags)[0] == 0
    assert_same_run(out, unstopped("epoch"))


def test_weights_that_are_not_finite_are_not_saved(run, model_folder, data_folder, tmp_path):
    """A gradient of NaN in step 3 under a loss that is still finite."""
    out, steps = tmp_path / "run", iter(range(99))

    def look(model, **_):
        if next(steps) == 2:
            model.classifier[1].bias.data[1] = torch.nan

    with watching(look):
        status, _, error = run(out, model_folder, data_folder, "--layers 1 3 --save-steps 1")
    assert status == 2 and "a weight is not finite at step 3: lower --lr" in error
    assert saved_state(out)["step"] == 2


def test_a_huge_learning_rate_stops_the_run(run, model_folder, data_folder, tmp_path):
    out = tmp_path / "run"
    status, _, error = run(out, model_folder, data_folder, "--layers 1 3 --lr 1e+30")
    assert status == 2 and "the loss is" in error and "lower --lr (now 1e+30)" in error


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--freeze-layers 1 2", "--freeze-layers K ... and --freeze-epoch N|auto need each other"),
        ("--freeze-epoch 2", "need each other"),
        (
            "--freeze-layers 1 --freeze-epoch soon",
            "--freeze-epoch soon: expected 0 to 4 (of --epochs 5), or auto",
        ),
        ("--freeze-layers 1 --freeze-epoch -1", "--freeze-epoch"),
        (
            "--freeze-layers 1 --freeze-epoch 5",
            "--freeze-epoch 5: expected 0 to 4 (of --epochs 5), or auto",
        ),
        (
            "--head pooler --layers 1",
            "--head pooler reads [CLS] of the last layer: leave out --layers",
        ),
        ("--head pooler --pooling mean", "--head pooler"),
        ("--head pooler --layers-from x", "--head pooler"),
        ("--head pooler --combine mix", "--head pooler"),
        ("--combine sum", "invalid choice: 'sum'"),
        ("--freeze-layer 1", "unrecognized arguments: --freeze-layer 1"),
        (
            "--layers-from x --layers 1",
            "--layers-from gives the layers and the pooling: leave out --layers",
        ),
        ("--layers-from x --pooling cls", "--layers-from gives"),
        ("--epochs 0", "--epochs: 0, expected 1 or more"),
        ("--batch-size -3", "--batch-size: -3, expected 1 or more"),
        ("--accumulate 0", "--accumulate: 0, expected 1 or more"),
        ("--hidden -1", "--hidden: -1, expected 0 or more"),
        ("--eval-steps -1", "--eval-steps: -1, expected 0 or more"),
        ("--save-steps -1", "--save-steps: -1, expected 0 or more"),
        ("--seed -1", "--seed: -1, expected 0 or more"),
        ("--seed 4294967296", "--seed: 4294967296, expected 0 or more and less than 4294967296"),
        ("--compile reduce-overhead", "--compile reduce-overhead needs a GPU"),
        ("--max-train-rows 0", "--max-train-rows: 0, expected 1 or more"),
        ("--max-eval-rows 0", "--max-eval-rows: 0, expected 1 or more"),
        ("--dropout 1", "--dropout: 1, expected 0 or more and less than 1"),
        ("--dropout nan", "--dropout: nan, expected 0 or more and less than 1"),
        ("--lr 0", "--lr: 0, expected more than 0"),
        ("--lr nan", "--lr: nan, expected"),
        ("--weight-decay -1", "--weight-decay: -1, expected 0 or more"),
        ("--epochs two", "--epochs: invalid int value: 'two'"),
        ("--pooling median", "invalid choice: 'median'"),
        ("--layers six", "invalid int value: 'six'"),
        ("--layers-from no/such/file.json", "no/such/file.json does not exist"),
    ],
)
def test_bad_flags(flags, message, script, tmp_path):
    status, _, error = script(
        "train", "--model", "none", "--data", "none", "--out", tmp_path / "run", *flags.split()
    )
    assert status == 2 and message in error.replace("\n", " ") and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "best",
    [
        {"layers": "6+8", "pooling": "max"},
        {"layers": [], "pooling": "max"},
        {"layers": [1, "2"], "pooling": "max"},
        {"layers": [1], "pooling": "median"},
        {"layers": [1]},
    ],
)
def test_a_best_json_that_is_none(best, script, model_folder, data_folder, tmp_path):
    (tmp_path / "best.json").write_text(json.dumps(best))
    status, _, error = script(
        "train",
        "--model",
        model_folder,
        "--data",
        data_folder,
        "--out",
        tmp_path / "run",
        "--layers-from",
        tmp_path / "best.json",
    )
    assert status == 2 and "best.json" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--layers 1 6", "--layers 6: the model has layers 0 (embeddings) to 5"),
        ("--layers -1", "--layers -1: the model has layers 0 (embeddings) to 5"),
        ("--layers 2 2", "--layers 2 2: a layer is named twice"),
        ("", "--layers 6: the model has layers 0 (embeddings) to 5"),
        (
            "--layers 1 --max-length 32 --freeze-layers 6 --freeze-epoch 1",
            "--freeze-layers 6: the model has layers 0 (embeddings) to 5",
        ),
        (
            "--layers 1 --max-length 32 --freeze-layers 2 2 --freeze-epoch 1",
            "--freeze-layers 2 2: a layer is named twice",
        ),
        ("--layers 1 --max-length 65", "--max-length 65: expected 3 to 64"),
        ("--layers 1 --max-length 32 --precision fp16", "--precision fp16 needs a GPU"),
    ],
)
def test_flags_that_do_not_fit_the_model(
    flags, message, script, model_folder, data_folder, tmp_path
):
    if "fp16" in flags and torch.cuda.is_available():
        pytest.skip("fp16 works on this machine's GPU")
    status, _, error = script(
        "train",
        "--model",
        model_folder,
        "--data",
        data_folder,
        "--out",
        tmp_path / "run",
        *flags.split(),
    )
    assert status == 2 and message in error
    assert not (tmp_path / "run").exists()


def test_automatic_freezing_needs_another_language(run, model_folder, tmp_path):
    data = make_data(tmp_path / "data", languages=("en",))
    status, _, error = run(
        tmp_path / "run", model_folder, data, "--layers 1 --freeze-layers 1 --freeze-epoch auto"
    )
    assert (
        status == 2
        and "no dev file in another language than en, which --freeze-epoch auto needs" in error
    )
    fine_tune(
        tmp_path / "run", model_folder, data, "--layers 1 --epochs 1"
    )  # without it, English alone will do
    for path in Path(data).glob("dev.*"):
        path.unlink()
    status, _, error = run(tmp_path / "two", model_folder, data, "--layers 1")
    assert status == 2 and "has no dev file" in error and "another language" not in error


# --- signals -----------------------------------------------------------------------------------------------------


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
    [
        ([signal.SIGTERM], 143),
        ([signal.SIGINT], 130),
        ([signal.SIGINT] * 2, 130),
        ([signal.SIGTERM] * 3, 143),
        ([signal.SIGINT, signal.SIGTERM], 130),
    ],
)
def test_signals_save_once_and_stop_and_the_command_goes_on(
    numbers, status, unstopped, model_folder, data_folder, tmp_path, run
):
    flags = [tmp_path / "run", model_folder, data_folder, SETTINGS["epoch"]]
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, 8, *numbers)
        code, out, _ = run(*flags)
    assert code == status and saved_state(tmp_path / "run")["step"] == 8
    assert out.endswith(
        f"stopped by {numbers[0].name} after step 8, the state is saved\n"
        f"to go on:\npython train.py --model {model_folder} --data {data_folder} "
        f"--out {tmp_path / 'run'} {' '.join(BASE)} {SETTINGS['epoch']}\n"
    )
    code, out, _ = run(*flags)
    assert code == 0 and "going on after step 8\n" in out
    assert_same_run(tmp_path / "run", unstopped("epoch"))


def test_a_second_ctrl_c_a_second_later_stops_at_once(
    model_folder, data_folder, tmp_path, run, monkeypatch
):
    signalled(monkeypatch, 3, signal.SIGINT, signal.SIGINT, wait=1.05)
    code, out, _ = run(tmp_path / "run", model_folder, data_folder, "--layers 1")
    assert code == 130 and "saved" not in out and not (tmp_path / "run" / "resume").exists()


def test_a_signal_during_the_last_step_ends_the_run_as_it_would_have(
    model_folder, data_folder, tmp_path, run, monkeypatch
):
    signalled(monkeypatch, STEPS, signal.SIGTERM)
    code, out, _ = run(tmp_path / "run", model_folder, data_folder, "--layers 1 --epochs 1")
    assert code == 0 and ": done" in out and (tmp_path / "run/epochs/mean").exists()


# --- the mean of the epochs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    ["--layers 1 3", FROZEN, "--head pooler --freeze-layers 0 --freeze-epoch 2 --precision bf16"],
)
def test_the_mean_is_that_of_the_weights_after_each_epoch(
    flags, model_folder, data_folder, tmp_path
):
    fine_tune(tmp_path, model_folder, data_folder, flags, "--keep-all")
    assert kept(tmp_path) == [1, 2, 3]
    epochs, mean = (
        [weights(tmp_path / f"epochs/{k}") for k in (1, 2, 3)],
        weights(tmp_path / "epochs/mean"),
    )
    assert mean.keys() == epochs[0].keys()
    for name, tensor in mean.items():
        expected = torch.stack([epoch[name].double() for epoch in epochs]).mean(0)
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-7)
    encoder, info = AutoModel.from_pretrained(tmp_path / "epochs/mean", output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} <= {"pooler"} and not info[
        "unexpected_keys"
    ]
    for name in encoder.state_dict().keys() - info["missing_keys"]:
        assert torch.equal(encoder.state_dict()[name], mean[f"encoder.{name}"])
    assert any(not torch.equal(mean[name], epochs[2][name]) for name in mean)


# --- combine mix -------------------------------------------------------------------------------------------------


def test_mixing_layers_is_one_weighted_sum_whose_weights_are_trained(
    still_model, data_folder, tmp_path
):
    after = []
    with watching(lambda model, **_: after.append(model.mix.detach().clone())):
        text = fine_tune(
            tmp_path,
            still_model,
            data_folder,
            "--layers 0 2 3 --combine mix --pooling mean --dropout 0 --epochs 2",
        )
    assert "mean pooling of layers 0 2 3 mixed, the 2 above cut off" in text
    assert all(
        not torch.equal(a, b) for a, b in zip([torch.zeros(3), *after], after)
    )  # each step reaches each weight
    folder = tmp_path / "epochs/2"
    own, tokenizer = weights(folder), AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder).eval()
    assert own["mix"].shape == (3,) and own["classifier.1.weight"].shape == (4, 36)
    share = np.exp(own["mix"].double().numpy()) / np.exp(own["mix"].double().numpy()).sum()
    truth, logits = [], []
    for line in (Path(data_folder) / "dev.de.tsv").read_text().splitlines()[1:]:
        text, label = line.split("\t")
        with torch.no_grad():
            states = encoder(
                **tokenizer(text, return_tensors="pt"), output_hidden_states=True
            ).hidden_states
        vector = sum(float(weight) * states[k][0].mean(0) for weight, k in zip(share, (0, 2, 3)))
        logits.append((own["classifier.1.weight"] @ vector + own["classifier.1.bias"]).double())
        truth.append(LABELS.index(label))
    row = next(row for row in metrics(tmp_path) if row["epoch"] == 2 and row["language"] == "de")
    assert row["loss"] == pytest.approx(
        F.cross_entropy(torch.stack(logits), torch.tensor(truth)).item(), abs=1e-5
    )


def test_encoder_dropout_reaches_every_dropout_of_the_encoder(model_folder):
    for given, expected in ((["--encoder-dropout", "0"], {0.0}), ([], {0.1})):
        args = train.parse_args(
            [
                "--model",
                model_folder,
                "--data",
                "",
                "--out",
                "",
                "--layers",
                "3",
                "--dropout",
                "0.3",
                *given,
            ]
        )
        model, *_ = train.build(args, LABELS, pairs=False)
        assert {
            module.p for module in model.encoder.modules() if isinstance(module, torch.nn.Dropout)
        } == expected
        assert model.classifier[0].p == 0.3


# --- the source language, the same data, pairs or single texts ---------------------------------------------------


@pytest.fixture(scope="module")
def german_data(data_folder, tmp_path_factory):
    """The toy data with a German train file in the place of the English one."""
    folder = shutil.copytree(data_folder, tmp_path_factory.mktemp("german") / "toy")
    (folder / "train.en.tsv").unlink()
    (folder / "train.de.tsv").write_text(
        "text\tlabel\n" + (folder / "dev.de.tsv").read_text().split("\n", 1)[1] * 3
    )
    return folder


@pytest.mark.parametrize("flags", ["", "--train-language de"])
def test_the_others_are_all_but_the_source(flags, model_folder, german_data, tmp_path, monkeypatch):
    """Trained on German, the only train file there is. Best by hand: de 3; joint, of en and zh, 2, where zh and en
    alone are best at 1 and 2; --freeze-epoch auto sees the fall of that mean at 3 though German rises."""
    scripted(monkeypatch, de=[0.5, 0.6, 0.7, 0.7], en=[0.1, 0.8, 0.2, 0.3], zh=[0.6, 0.5, 0.3, 0.3])
    text = fine_tune(
        tmp_path / "run",
        model_folder,
        german_data,
        flags,
        "--layers 1 --freeze-layers 1 --freeze-epoch auto --max-train-rows 13 --epochs 4",
    )
    rows = metrics(tmp_path / "run")
    assert [row["language"] for row in rows[:4]] == ["", "de", "en", "zh"]
    assert (
        kept(tmp_path / "run") == [1, 2, 3, 4]
        and "best epoch 3 by dev de, 2 by the others' dev" in text
    )
    assert [row["epoch"] for row in rows if row["split"] == "train" and row["frozen_layers"]] == [4]
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["arguments"]["train_language"] == "de" and "train.de.tsv" in run["data"]


def test_the_name_of_the_source_language_changes_no_weight(model_folder, german_data, tmp_path):
    """The same rows as train.en.tsv: --train-language chooses between them."""
    data = shutil.copytree(german_data, tmp_path / "data")
    shutil.copy(data / "train.de.tsv", data / "train.en.tsv")
    fine_tune(tmp_path / "en", model_folder, data, "--layers 1 3 --keep-all")
    fine_tune(tmp_path / "de", model_folder, data, "--layers 1 3 --keep-all --train-language de")
    english, german = (
        [json.dumps(row) for row in metrics(tmp_path / name)] for name in ("en", "de")
    )
    assert english != german and sorted(english) == sorted(german)  # the source comes first
    for epoch in (1, 2, 3, "mean"):
        english, german = (weights(tmp_path / name / f"epochs/{epoch}") for name in ("en", "de"))
        assert all(torch.equal(english[name], german[name]) for name in english)


def test_a_train_file_that_is_not_there_or_must_be_named(run, model_folder, german_data, tmp_path):
    data = shutil.copytree(german_data, tmp_path / "data")
    shutil.copy(data / "train.de.tsv", data / "train.zh.tsv")
    status, _, error = run(tmp_path / "run", model_folder, data, "--layers 1")
    assert status == 2 and "has train files in de zh: say which with --train-language" in error
    assert not (tmp_path / "run").exists()
    status, _, error = run(tmp_path / "run", model_folder, data, "--layers 1 --train-language en")
    assert status == 2 and "train.en.tsv does not exist; train is there in: de zh" in error
    assert not (tmp_path / "run").exists()


def test_the_same_data_under_another_path_is_the_same_run(
    unstopped, run, model_folder, data_folder, tmp_path
):
    copy, out = shutil.copytree(data_folder, tmp_path / "copy"), unstopped("epoch")
    shutil.copytree(model_folder, tmp_path / "model copy")
    for model, data in (
        (model_folder, f"{data_folder}/"),
        (model_folder, copy),
        (tmp_path / "model copy", data_folder),
    ):
        status, text, _ = run(out, model, data, SETTINGS["epoch"])
        assert (status, text) == (0, f"{out} is complete already: nothing to do\n")
    with interrupted(train, "learning_rate", 7):
        fine_tune(tmp_path / "run", model_folder, data_folder, SETTINGS["epoch"])
    assert "going on after step 6" in fine_tune(
        tmp_path / "run", model_folder, copy, SETTINGS["epoch"]
    )
    assert_same_run(tmp_path / "run", unstopped("epoch"))


def test_pairs_and_single_texts_do_not_mix(run, model_folder, data_folder, pair_data, tmp_path):
    data = shutil.copytree(data_folder, tmp_path / "data")
    shutil.copy(pair_data / "dev.de.tsv", data)
    status, _, error = run(tmp_path / "run", model_folder, data, "--layers 1")
    assert status == 2
    assert (
        "dev.de.tsv holds pairs (text_a, text_b), expected single texts (text), as in training"
        in error
    )
    assert not (tmp_path / "run").exists()
    for name, folder in (("single", data_folder), ("pairs", pair_data)):
        fine_tune(
            tmp_path / name, model_folder, folder, "--layers 1 --epochs 1 --max-train-rows 13"
        )
        assert json.loads((tmp_path / name / "epochs/1/classifier.json").read_text())["pairs"] == (
            name == "pairs"
        )
        assert json.loads((tmp_path / name / "run.json").read_text())["pairs"] == (name == "pairs")


# --- what is saved must be what was trained ----------------------------------------------------------------------


def test_logits_that_are_not_finite_are_refused(
    run, model_folder, data_folder, tmp_path, monkeypatch
):
    """Training stays finite; the evaluation does not."""
    forward = train.Classifier.forward
    monkeypatch.setattr(
        train.Classifier,
        "forward",
        lambda model, batch: forward(model, batch) * (1 if model.training else torch.inf),
    )
    status, _, error = run(tmp_path / "run", model_folder, data_folder, "--layers 1")
    assert (
        status == 2
        and "dev en: the model gives logits that are not finite; try --precision fp32" in error
    )
    assert not (tmp_path / "run/epochs").exists()


def test_a_tokenizer_that_loads_otherwise_than_it_was_saved_is_refused(
    run, model_folder, data_folder, tmp_path, monkeypatch
):
    load = train.load_tokenizer

    def other(name):
        tokenizer = load(name)
        if Path(name).name == "1":  # the first save
            tokenizer.backend_tokenizer.normalizer = (
                None  # capitals and accents are no longer folded
            )
        return tokenizer

    monkeypatch.setattr(train, "load_tokenizer", other)
    status, _, error = run(tmp_path / "run", model_folder, data_folder, "--layers 1")
    assert (
        status == 2
        and "epochs/1: the tokenizer, saved and loaded again, gives other token ids" in error
    )
    assert not (tmp_path / "run/resume").exists()
