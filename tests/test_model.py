"""model.py: pooling, heads, saving and predicting, against NumPy and plain transformers."""

import json

import numpy as np
import pytest
import torch
from families import (
    BLOCKS,
    FAMILIES,
    HIDDEN,
    batch_of,
    eval_classifier,
    eval_encoder,
    fails,
    make_family,
    plain_states,
    token_rows,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertForSequenceClassification

from data import Encoded, eval_batches, load_tokenizer
from lib.encoders import cut_after, drop_pooler, hidden_states
from model import POOLINGS, load_model, pool, predict, save_model

LABELS = ["refund", "agent", "delivery"]
ROWS = token_rows()
PLAIN = {
    "max": lambda tokens: np.maximum.reduce(tokens),
    "mean": lambda tokens: sum(tokens) / len(tokens),
    "cls": lambda tokens: tokens[0],
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved encoder of each family: {family: folder}."""
    return {family: make_family(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def close(value, expected, atol=1e-5):
    np.testing.assert_allclose(np.asarray(value), np.asarray(expected), rtol=0, atol=atol)


# --- pooling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_is_a_loop_over_the_tokens_that_are_there(pooling, dtype):
    random, lengths = np.random.default_rng(1), [7, 1, 4, 2, 6]
    # below 0: a padding's 0 would win the max
    states = torch.from_numpy(random.normal(size=(5, 7, 9)) - 3).to(dtype)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    values = states.float().numpy()
    expected = [PLAIN[pooling](list(row[:length])) for row, length in zip(values, lengths)]
    pooled = pool(states, mask.long(), pooling)
    assert pooled.dtype == torch.float32
    close(pooled, expected, 1e-6)


@every_family
@torch.no_grad()
def test_padding_changes_no_pooled_vector(folders, family):
    encoder = eval_encoder(folders[family])

    def pooled(rows, width=0):
        """(L * P, B, D)"""
        batch, vectors = batch_of(rows, width, family), []
        for layer in hidden_states(encoder, batch)[0]:
            vectors += [pool(layer, batch["attention_mask"], pooling) for pooling in POOLINGS]
        return torch.stack(vectors)

    alone = torch.cat([pooled([row]) for row in ROWS], dim=1)
    close(pooled(ROWS), alone)
    close(torch.cat([pooled(ROWS[:3], 17), pooled(ROWS[3:], 29)], dim=1), alone)


# --- the heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, pooling, hidden",
    [
        *((family, "max", 0) for family in FAMILIES),
        ("bert", "mean", 0),
        ("bert", "cls", 0),
        ("bert", "max", 11),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_a_layer_or_two_on_the_concatenated_pooled_states(
    folders, family, pooling, hidden
):
    layers = [4, 1, 3]  # in the order given
    model = eval_classifier(folders[family], pooling=pooling, layers=layers, hidden=hidden)
    batch = batch_of(ROWS, family=family)
    states = plain_states(folders[family], batch)
    first, bias, *last = [parameter.numpy() for parameter in model.classifier.parameters()]
    assert first.shape == (hidden or len(LABELS), 3 * HIDDEN)
    for row, (logits, (ids, _)) in enumerate(zip(model(batch), ROWS)):
        features = [PLAIN[pooling](list(states[k][row, : len(ids)].numpy())) for k in layers]
        expected = first @ np.concatenate(features) + bias
        if hidden:
            expected = last[0] @ np.maximum(expected, 0) + last[1]
        close(logits, expected)


@torch.no_grad()
def test_a_mix_is_the_softmax_weighted_sum_of_the_layers(folders):
    model, batch = eval_classifier(folders["bert"], combine="mix"), batch_of(ROWS)
    states = plain_states(folders["bert"], batch)
    assert model.mix.tolist() == [0.0, 0.0, 0.0]  # it begins as the plain mean
    for weights in ([0.0, 0.0, 0.0], [0.5, -1.0, 2.0]):
        model.mix.copy_(torch.tensor(weights))
        shares = np.exp(weights) / np.exp(weights).sum()
        for row, (logits, (ids, _)) in enumerate(zip(model(batch), ROWS)):
            features = 0
            for share, k in zip(shares, (1, 3, 4)):
                features = features + share * states[k][row, : len(ids)].numpy().max(0)
            close(logits, model.classifier[-1](torch.from_numpy(features).float()))


@torch.no_grad()
def test_dropout_works_on_the_concatenation_in_train_mode_alone(folders):
    model, seen = eval_classifier(folders["bert"], layers=[2], dropout=0.5), []
    model.classifier[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(batch_of(ROWS))
    model.classifier.train()
    torch.manual_seed(3)
    model(batch_of(ROWS))
    kept = seen[1] != 0
    assert seen[0].all() and 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(seen[1][kept], 2 * seen[0][kept])


@torch.no_grad()
def test_the_pooler_head_is_bert_for_sequence_classification(folders):
    theirs = BertForSequenceClassification.from_pretrained(folders["bert"], num_labels=3).eval()
    model = eval_classifier(folders["bert"], head="pooler")
    model.classifier[-1].load_state_dict(theirs.classifier.state_dict())
    assert (model.settings.layers, model.settings.pooling) == ([BLOCKS], "cls")
    close(model(batch_of(ROWS)), theirs(**batch_of(ROWS)).logits, 1e-6)


@pytest.mark.parametrize("family", ["distilbert", "deberta-v2", "electra", "modernbert"])
@torch.no_grad()
def test_the_pooler_head_brings_its_own_dense_layer_where_the_model_has_none(folders, family):
    model = eval_classifier(folders[family], head="pooler")
    first = plain_states(folders[family], batch_of(ROWS))[-1][:, 0]
    pooled = torch.tanh(first @ model.dense.weight.T + model.dense.bias)
    expected = pooled @ model.classifier[-1].weight.T + model.classifier[-1].bias
    close(model(batch_of(ROWS)), expected, 1e-6)


# --- saving and loading ---------------------------------------------------------------------------

SAVED = {
    "layers": dict(layers=[1, 3], pooling="mean", max_length=9, precision="fp32"),
    "hidden": dict(layers=[3], hidden=7, pairs=True),
    "mix": dict(layers=[2, 3], combine="mix"),
    "pooler": dict(head="pooler"),
}


@pytest.mark.parametrize(
    "family, kind",
    [*((family, "layers") for family in FAMILIES), *(("bert", kind) for kind in SAVED)],
)
@torch.no_grad()
def test_a_saved_model_comes_back_bit_for_bit(folders, tmp_path, family, kind):
    model = eval_classifier(folders[family], dropout=0.3, **SAVED[kind])
    if kind != "pooler":
        drop_pooler(model.encoder)
        cut_after(model.encoder, 3)
    tokenizer, folder = load_tokenizer(folders[family]), tmp_path / "epochs" / "1"
    save_model(model, tokenizer, folder)
    again, batch = load_model(folder).eval(), batch_of(ROWS, family=family)
    assert torch.equal(again(batch), model(batch)) and again.settings == model.settings
    assert json.loads((folder / "classifier.json").read_text()) == model.settings._asdict()
    assert load_tokenizer(folder)("money refund") == tokenizer("money refund")

    plain = AutoModel.from_pretrained(folder).state_dict()
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(plain.pop(name), weight)
    assert set(plain) <= {"pooler.dense.weight", "pooler.dense.bias"}


@torch.no_grad()
def test_a_saved_folder_replaces_what_was_there_unless_saving_fails(folders, tmp_path, monkeypatch):
    model, tokenizer = eval_classifier(folders["bert"]), load_tokenizer(folders["bert"])
    folder = tmp_path / "1"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    save_model(model, tokenizer, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = "classifier.json classifier.safetensors config.json model.safetensors tokenizer.json"
    assert {*names.split()} <= before.keys() and "old.txt" not in before
    for path in folder.iterdir():  # nothing is pickled
        load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())

    def full(*_):
        raise OSError(28, "No space left on device")

    model.classifier[-1].bias += 1
    monkeypatch.setattr("model.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_model(model, tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_part_that_is_missing_is_said_and_nothing_starts_at_random(folders, tmp_path):
    model = eval_classifier(folders["bert"], head="pooler")
    save_model(model, load_tokenizer(folders["bert"]), tmp_path / "1")
    weights = load_file(tmp_path / "1/model.safetensors")
    del weights["pooler.dense.weight"]
    save_file(weights, tmp_path / "1/model.safetensors", {"format": "pt"})
    fails("model.safetensors lacks the pooler that its head reads", load_model, tmp_path / "1")


# --- prediction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 64])
def test_predictions_are_in_the_rows_own_order_whatever_the_batch_size(folders, size):
    model = eval_classifier(folders["bert"]).train()
    encoded = Encoded(
        np.concatenate([ids for ids, _ in ROWS]).astype(np.int32),
        np.cumsum([0] + [len(ids) for ids, _ in ROWS]),
        np.array([second for _, second in ROWS], np.int32),
        np.arange(len(ROWS)) % 3,
    )
    logits = predict(model, eval_batches(encoded, 0, 13, size), len(ROWS), torch.float32)
    assert logits.dtype == np.float32 and not model.training
    with torch.no_grad():
        close(logits, torch.cat([model(batch_of([row])) for row in ROWS]))
        model.classifier[-1].bias[1] = torch.inf
    batches = list(eval_batches(encoded, 0, 13))
    words = "dev de: the model gives logits that are not finite; try --precision fp32"
    fails(words, predict, model, batches, len(ROWS), torch.float32, "dev de")
