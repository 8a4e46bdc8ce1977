"""model.py against plain transformers: states by layer, pooling, the heads, freezing, saving, loading, broken folders."""
import json
import pickle
import platform
import resource
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertForSequenceClassification, DebertaV2Config, DebertaV2Model
from transformers.models.bert import modeling_bert

import device
from conftest import make_model, make_tokenizer
from data import Encoded
from device import Dropout, attention, out_of_memory, pick_precision, random_bits
from files import UserError
from model import (POOLINGS, Classifier, blocks, check_layers, cut_after, drop_pooler, freeze_layers, hidden_states,
                   keep_tokens, load_encoder, load_model, load_tokenizer, model_identity, pool, predict, save_model,
                   token_limit, whole_state)

FAMILIES = ["bert", "xlm-roberta", "distilbert", "deberta"]
BLOCKS, HIDDEN = 5, 36
LABELS = ["refund", "agent", "delivery"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved encoder of each family: {family: folder}."""
    made = {family: make_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES[:3]}
    folder = tmp_path_factory.mktemp("deberta")
    torch.manual_seed(0)
    DebertaV2Model(DebertaV2Config(  # mDeBERTa's settings: relative positions alone, shared projections
        vocab_size=make_tokenizer(folder), hidden_size=HIDDEN, num_hidden_layers=BLOCKS, num_attention_heads=3,
        intermediate_size=52, max_position_embeddings=64, relative_attention=True, position_buckets=8, type_vocab_size=0,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
    )).save_pretrained(folder)
    return made | {"deberta": str(folder)}


@pytest.fixture(scope="module")
def rows():
    """Seven token rows of 3 to 13 tokens, and where the second text of each begins: [(ids, second)]."""
    random = np.random.default_rng(0)
    return [([2, *random.integers(5, 60, length - 2).tolist(), 3], length // 2) for length in (7, 3, 13, 5, 8, 4, 11)]


def batch_of(rows, width=0):
    """A batch as collate() makes it, padded by hand to the longest row, or to `width` tokens."""
    width = max(width, *(len(ids) for ids, _ in rows))
    batch = {key: torch.zeros(len(rows), width, dtype=torch.int64) for key in ("input_ids", "attention_mask", "token_type_ids")}
    for i, (ids, second) in enumerate(rows):
        batch["input_ids"][i, :len(ids)] = torch.tensor(ids)
        batch["attention_mask"][i, :len(ids)] = 1
        batch["token_type_ids"][i, second:len(ids)] = 1
    return batch


def plain_states(folder, family, batch):
    """hidden_states of plain transformers: a tuple of (B, T, D)."""
    inputs = dict(batch) if family == "bert" else {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(**inputs, output_hidden_states=True).hidden_states


def eval_classifier(folder, seed=0, **settings):
    """A Classifier over the encoder of a folder, in eval mode."""
    torch.manual_seed(seed)
    return Classifier(load_encoder(folder)[0], LABELS, **{"layers": [1, 3, 4], **settings}).eval()


def fails(match, call, *arguments):
    """The message of the UserError that call(*arguments) raises: one line that holds `match`."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    message = str(error.value)
    assert match in message and "\n" not in message, message
    return message


# --- states and pooling ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_by_layer_are_those_of_transformers_before_and_after_any_cut(folders, rows, family):
    batch = batch_of(rows)
    expected = plain_states(folders[family], family, batch)
    assert len(expected) == BLOCKS + 1
    encoder = load_encoder(folders[family])[0].eval()
    for top in [BLOCKS + 1, *range(BLOCKS, 0 if family == "deberta" else -1, -1)]:  # whole, then shorter and shorter
        if top <= BLOCKS:
            cut_after(encoder, top)
            assert (len(blocks(encoder)), encoder.config.num_hidden_layers) == (top, top)
        states, _ = hidden_states(encoder, batch)
        assert len(states) == min(top, BLOCKS) + 1
        for mine, theirs in zip(states, expected):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@torch.no_grad()
def test_second_texts_change_the_states_of_bert(folders, rows):
    batch = batch_of(rows)
    encoder = load_encoder(folders["bert"])[0].eval()
    one, two = hidden_states(encoder, {**batch, "token_type_ids": 0 * batch["token_type_ids"]})[0], hidden_states(encoder, batch)[0]
    assert (one[-1] - two[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("family, kind", [(family, kind) for family in FAMILIES for kind in ("cpu", "sdpa")][:-1])
@torch.no_grad()
def test_padding_changes_no_pooled_vector(folders, rows, family, kind):  # DeBERTa has an attention of its own
    encoder = load_encoder(folders[family])[0].eval()
    assert encoder.config._attn_implementation == ("eager" if family == "deberta" else "cpu")
    encoder.set_attn_implementation(kind)

    def pooled(part, width=0):
        batch = batch_of(part, width)
        return torch.stack([torch.stack([pool(layer, batch["attention_mask"], pooling) for pooling in POOLINGS])
                            for layer in hidden_states(encoder, batch)[0]])                          # (L, P, B, D)

    alone = torch.cat([pooled([row]) for row in rows], dim=2)
    torch.testing.assert_close(pooled(rows), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled(rows, 29), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([pooled(rows[:3], 17), pooled(rows[3:])], dim=2), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_attention_and_its_gradient_are_those_of_transformers(dropout, dtype, atol, monkeypatch):
    random = torch.Generator().manual_seed(0)
    query, key, value, factor = (torch.randn(2, 3, 7, 5, generator=random).to(dtype) for _ in range(4))
    mask = torch.zeros(2, 1, 7, 7).masked_fill(torch.arange(7)[None, None, None] >= torch.tensor([7, 4])[:, None, None, None],
                                               torch.finfo(torch.float32).min)
    kept = {}

    def same_dropout(weights, p=0.0, training=True):  # transformers' dropout, with our mask
        return weights * kept["mask"] / (1 - p) if p else weights

    def results(function):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output, _ = function(None if function is attention else torch.nn.Module(), *inputs, mask, scaling=0.3, dropout=dropout)
        (output.transpose(1, 2) * factor).float().sum().backward()
        return [output, *(x.grad for x in inputs)]

    monkeypatch.setattr(device, "keep_mask", lambda *a: kept.setdefault("mask", torch.rand(2, 3, 7, 7, generator=random) >= 0.25))
    mine = results(attention)
    monkeypatch.setattr(modeling_bert.nn.functional, "dropout", same_dropout)
    for a, b in zip(mine, results(modeling_bert.eager_attention_forward)):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_kept_for_the_next_step():
    def faults_of_a_step():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        parts = [torch.ones(5_000_000) for _ in range(3)]  # 19 MiB each, 4,883 pages
        del parts
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults_of_a_step() for _ in range(5)) < 500


def test_random_bits_are_fair_independent_and_the_generators_own():
    count = 200_003
    generator = torch.Generator().manual_seed(5)
    first, second = (random_bits(count, torch.device("cpu"), generator) for _ in range(2))
    again = random_bits(count, torch.device("cpu"), torch.Generator().manual_seed(5))
    assert torch.equal(first, again) and len(first.unique()) == count
    signs = torch.stack([((bits >> place) & 1) * 2.0 - 1 for bits in (first, second) for place in range(64)])  # (128, N)
    limit = 6 / count ** 0.5  # six standard deviations
    assert signs.mean(1).abs().max() < limit
    for lag in (0, 1, 2, 7, 96, 192):  # between places, neighbours, rows of a small and of a large encoder, and calls
        shared = signs[:, lag:] @ signs[:, :count - lag].T / count
        assert (shared - torch.eye(128) * (lag == 0)).abs().max() < limit


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_is_a_loop_over_the_tokens_that_are_there(pooling, dtype):
    random = np.random.default_rng(1)
    states = torch.from_numpy(random.normal(size=(5, 7, 9)) - 3).to(dtype)  # below 0, so that a padding's 0 would win the max
    lengths = [7, 1, 4, 2, 6]
    mask = torch.tensor([[int(t < length) for t in range(7)] for length in lengths])
    values, expected = states.float().numpy(), np.zeros((5, 9), np.float32)
    for b, length in enumerate(lengths):
        tokens = [values[b, t] for t in range(length)]
        expected[b] = {"max": np.maximum.reduce(tokens), "mean": sum(tokens) / length, "cls": tokens[0]}[pooling]
    pooled = pool(states, mask, pooling)
    assert pooled.dtype == torch.float32
    np.testing.assert_allclose(pooled.numpy(), expected, rtol=0, atol=1e-6)


def test_check_layers_says_how_many_the_model_has():
    check_layers([0, 3, 5], 5, "--layers")
    assert fails("--layers 6", check_layers, [3, 6], 5, "--layers") == "--layers 6: the model has layers 0 (embeddings) to 5"
    fails("--freeze-layers -1: the model has layers 0 (embeddings) to 5", check_layers, [-1], 5, "--freeze-layers")
    fails("--layers 3 1 3: a layer is named twice", check_layers, [3, 1, 3], 5, "--layers")


def test_an_encoder_is_cut_but_not_below_what_it_needs(folders):
    encoder = load_encoder(folders["bert"])[0]
    cut_after(encoder, 3)
    assert len(blocks(encoder)) == 3
    fails("layer 0: DebertaV2Model gives no states without a block", cut_after, load_encoder(folders["deberta"])[0], 0)


# --- the heads ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_logits_are_a_linear_map_of_the_concatenated_pooled_states(folders, rows, family, pooling):
    model = eval_classifier(folders[family], pooling=pooling, layers=[4, 1, 3])  # in the order given
    states = plain_states(folders[family], family, batch_of(rows))
    weight, bias = model.classifier[-1].weight.numpy(), model.classifier[-1].bias.numpy()
    assert weight.shape == (len(LABELS), 3 * HIDDEN)
    for row, (logits, (ids, _)) in enumerate(zip(model(batch_of(rows)), rows)):
        tokens = [states[layer][row, :len(ids)].numpy() for layer in (4, 1, 3)]
        features = np.concatenate([{"max": t.max(0), "mean": t.mean(0), "cls": t[0]}[pooling] for t in tokens])
        np.testing.assert_allclose(logits.numpy(), weight @ features + bias, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_hidden_layer_is_a_relu_layer_before_the_linear_one(folders, rows):
    model = eval_classifier(folders["bert"], hidden=11)
    states = plain_states(folders["bert"], "bert", batch_of(rows[:1]))
    features = np.concatenate([states[layer][0].numpy().max(0) for layer in (1, 3, 4)])
    own = {name: value.numpy() for name, value in model.state_dict().items() if name.startswith("classifier.")}
    assert [value.shape for value in own.values()] == [(11, 3 * HIDDEN), (11,), (len(LABELS), 11), (len(LABELS),)]
    first_weight, first_bias, last_weight, last_bias = own.values()
    expected = last_weight @ np.maximum(first_weight @ features + first_bias, 0) + last_bias
    np.testing.assert_allclose(model(batch_of(rows[:1]))[0].numpy(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_dropout_works_on_the_concatenation_in_train_mode_alone(folders, rows):
    encoder = load_encoder(folders["bert"])[0].eval()
    model = Classifier(encoder, LABELS, layers=[2], dropout=0.5)
    seen = []
    model.classifier[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.eval()(batch_of(rows))
    model.classifier.train()
    torch.manual_seed(3)
    model(batch_of(rows))
    kept = seen[1] != 0
    assert seen[0].all() and 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(seen[1][kept], 2 * seen[0][kept])


@torch.no_grad()
def test_the_pooler_head_is_bert_for_sequence_classification(folders, rows):
    theirs = BertForSequenceClassification.from_pretrained(folders["bert"], num_labels=len(LABELS)).eval()
    model = eval_classifier(folders["bert"], head="pooler")
    model.classifier[-1].load_state_dict(theirs.classifier.state_dict())
    assert (model.layers, model.pooling, model.dense) == ([BLOCKS], "cls", None)
    torch.testing.assert_close(model(batch_of(rows)), theirs(**batch_of(rows)).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["distilbert", "deberta"])
@torch.no_grad()
def test_the_pooler_head_brings_its_own_dense_layer_where_the_model_has_none(folders, rows, family):
    model = eval_classifier(folders[family], head="pooler")
    first = plain_states(folders[family], family, batch_of(rows))[-1][:, 0]
    pooled = torch.tanh(first @ model.dense.weight.T + model.dense.bias)
    expected = pooled @ model.classifier[-1].weight.T + model.classifier[-1].bias
    torch.testing.assert_close(model(batch_of(rows)), expected, rtol=0, atol=1e-6)


# --- freezing ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [[], [0], [2, 4], [0, 1, 5]])
def test_exactly_the_listed_layers_freeze(folders, rows, family, layers):
    model = eval_classifier(folders[family])
    cut_after(model.encoder, 4)
    model(batch_of(rows)).sum().backward()
    frozen = freeze_layers(model.encoder, layers)
    names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    inner = "transformer" if family == "distilbert" else "encoder"
    prefixes = tuple("encoder.embeddings." if layer == 0 else f"encoder.{inner}.layer.{layer - 1}." for layer in layers)
    assert set(names) == {name for name, _ in model.named_parameters() if name.startswith(prefixes or "none")}
    assert {id(parameter) for parameter in frozen} == {id(parameter) for name, parameter in model.named_parameters() if name in names}
    assert all(parameter.grad is None for parameter in frozen) and bool(frozen) == bool(layers)
    assert freeze_layers(model.encoder, layers) == []  # frozen already


def test_freezing_above_the_cut_is_a_no_op(folders):
    encoder = load_encoder(folders["bert"])[0]
    cut_after(encoder, 3)
    assert freeze_layers(encoder, [4, 5]) == [] and all(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_weights_do_not_move_and_the_others_do(folders, rows, family):
    model = eval_classifier(folders[family])
    cut_after(model.encoder, 4)
    drop_pooler(model.encoder)
    freeze_layers(model.encoder, [2])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        model.train()(batch_of(rows)).square().sum().backward()
        optimizer.step()
    still = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert still == {name for name in before if ".layer.1." in name}


# --- saving and loading ------------------------------------------------------------------------------------------

SAVED = [dict(head="layers", layers=[1, 3], pooling="mean"), dict(head="layers", layers=[3], pooling="max", hidden=7),
         dict(head="pooler")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", SAVED, ids=["layers", "hidden", "pooler"])
@torch.no_grad()
def test_a_saved_model_comes_back_bit_for_bit(folders, rows, tmp_path, family, settings):
    encoder = load_encoder(folders[family])[0]
    if settings["head"] == "layers":
        cut_after(encoder, 3)
    model = Classifier(encoder, LABELS, dropout=0.3, **settings).eval()
    if model.head == "layers":
        drop_pooler(encoder)
    save_model(model, load_tokenizer(folders[family]), tmp_path / "epochs" / "1")
    again, tokenizer = load_model(tmp_path / "epochs" / "1")
    assert torch.equal(again.eval()(batch_of(rows)), model(batch_of(rows)))
    for key in ("head", "layers", "pooling", "dropout", "hidden", "labels"):
        assert getattr(again, key) == getattr(model, key)
    assert tokenizer("money refund")["input_ids"] == load_tokenizer(folders[family])("money refund")["input_ids"]

    plain, own = AutoModel.from_pretrained(tmp_path / "epochs" / "1").state_dict(), encoder.state_dict()
    assert all(torch.equal(plain[name], weight) for name, weight in own.items())
    assert {name for name in plain if name not in own} <= {"pooler.dense.weight", "pooler.dense.bias"}
    config = json.loads((tmp_path / "epochs/1/config.json").read_text())
    assert config.get("num_hidden_layers", config.get("n_layers")) == (5 if model.head == "pooler" else 3)


@torch.no_grad()
def test_a_saved_folder_holds_safetensors_and_json_and_replaces_what_was_there(folders, rows, tmp_path):
    tokenizer = load_tokenizer(folders["bert"])
    model = eval_classifier(folders["bert"])
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "old.txt").write_text("old")
    save_model(model, tokenizer, tmp_path / "1")
    assert [path.name for path in tmp_path.iterdir()] == ["1"] and tmp_path.joinpath("1").stat().st_mode & 0o055 == 0o055
    names = {path.name for path in (tmp_path / "1").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "classifier.json", "classifier.safetensors"} <= names
    assert "old.txt" not in names
    for path in (tmp_path / "1").iterdir():
        if path.suffix == ".safetensors":
            load_file(path)
        else:
            path.read_bytes().decode("utf-8")
        with pytest.raises(Exception), open(path, "rb") as file:
            pickle.load(file)
        assert not zipfile.is_zipfile(path)  # as torch.save writes


def test_a_failed_save_leaves_what_was_there(folders, tmp_path, monkeypatch):
    tokenizer, model = load_tokenizer(folders["bert"]), eval_classifier(folders["bert"])
    save_model(model, tokenizer, tmp_path / "1")
    before = {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()}
    with torch.no_grad():
        model.classifier[-1].bias += 1
    monkeypatch.setattr("model.save_file", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError):
        save_model(model, tokenizer, tmp_path / "1")
    assert {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_loaded_as_float32(folders, tmp_path, dtype):
    shutil.copytree(folders["bert"], tmp_path / "half")
    half = AutoModel.from_pretrained(folders["bert"]).to(dtype)
    half.save_pretrained(tmp_path / "half")
    assert {weight.dtype for weight in load_file(tmp_path / "half/model.safetensors").values()} == {dtype}
    encoder, pretrained = load_encoder(tmp_path / "half")
    assert pretrained and {weight.dtype for weight in encoder.state_dict().values() if weight.is_floating_point()} == {torch.float32}
    assert all(torch.equal(weight.float(), encoder.state_dict()[name]) for name, weight in half.state_dict().items())


def test_a_missing_pooler_is_told_apart_from_missing_weights(folders, tmp_path):
    assert [load_encoder(folders[family])[1] for family in FAMILIES] == [True, True, False, False]
    shutil.copytree(folders["bert"], tmp_path / "headless")
    weights = {name: weight for name, weight in load_file(tmp_path / "headless/model.safetensors").items() if "pooler" not in name}
    save_file(weights, tmp_path / "headless/model.safetensors", {"format": "pt"})
    assert load_encoder(tmp_path / "headless")[1] is False


def test_the_identity_changes_with_the_weights_and_with_the_tokenizer(folders, tmp_path):
    def identity(folder):
        return model_identity(load_encoder(folder)[0], load_tokenizer(folder), folder)

    first = identity(folders["bert"])
    assert first["model"] == folders["bert"] and len(first["revision"]) == len(first["tokenizer"]) == 64
    other = identity(make_model(tmp_path / "other", seed=1))
    assert other["revision"] != first["revision"] and other["tokenizer"] == first["tokenizer"]
    vocabulary = tmp_path / "other/tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"money"', '"honey"'))
    assert identity(str(tmp_path / "other"))["tokenizer"] != first["tokenizer"]


# --- broken and hostile folders ----------------------------------------------------------------------------------

def change_weights(folder, change):
    """Rewrite model.safetensors with `change` applied to its {name: tensor}."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


BROKEN_ENCODERS = {
    "no folder": lambda folder: shutil.rmtree(folder),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config is no JSON": lambda folder: (folder / "config.json").write_text('{"model_type": "bert"'),
    "config is no object": lambda folder: (folder / "config.json").write_text("[1, 2]"),
    "unknown model": lambda folder: change_json(folder / "config.json", model_type="no-such-model"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "weights cut short": lambda folder: cut(folder / "model.safetensors"),
    "weights of another shape": lambda folder: change_json(folder / "config.json", intermediate_size=53),
    "more blocks than weights": lambda folder: change_json(folder / "config.json", num_hidden_layers=6),
    "one weight is missing": lambda folder: change_weights(folder, lambda weights: weights.pop("encoder.layer.2.output.dense.bias")),
}


@pytest.mark.parametrize("kind", BROKEN_ENCODERS)
def test_a_broken_encoder_folder_is_one_sentence(folders, tmp_path, kind):
    folder = tmp_path / "broken"
    shutil.copytree(folders["bert"], folder)
    BROKEN_ENCODERS[kind](folder)
    message = fails(str(folder), load_encoder, folder)
    if kind == "one weight is missing":
        assert "lacks weights of BertModel: encoder.layer.2.output.dense.bias" in message


@pytest.mark.parametrize("kind", ["no folder", "no tokenizer", "garbage"])
def test_a_broken_tokenizer_is_one_sentence(folders, tmp_path, kind):
    folder = tmp_path / "broken"
    if kind != "no folder":
        shutil.copytree(folders["bert"], folder)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    if kind == "garbage":
        (folder / "tokenizer.json").write_text("{}")
    fails(str(folder), load_tokenizer, folder)


BROKEN_MODELS = {
    "no folder": lambda folder: shutil.rmtree(folder),
    "no classifier.json": lambda folder: (folder / "classifier.json").unlink(),
    "classifier.json is no JSON": lambda folder: (folder / "classifier.json").write_text("{head"),
    "classifier.json is no UTF-8": lambda folder: (folder / "classifier.json").write_bytes(b"\xff\xfe"),
    "classifier.json is no object": lambda folder: (folder / "classifier.json").write_text("[]"),
    "a key is missing": lambda folder: (folder / "classifier.json").write_text('{"head": "layers"}'),
    "a key too many": lambda folder: change_json(folder / "classifier.json", more=1),
    "more layers": lambda folder: change_json(folder / "classifier.json", layers=[1, 2, 3, 4]),
    "a layer the encoder lacks": lambda folder: change_json(folder / "classifier.json", layers=[1, 3, 9]),
    "layers of no sense": lambda folder: change_json(folder / "classifier.json", layers=["1", "3", "4"]),
    "layers is a number": lambda folder: change_json(folder / "classifier.json", layers=3),
    "unknown pooling": lambda folder: change_json(folder / "classifier.json", pooling="median"),
    "unknown head": lambda folder: change_json(folder / "classifier.json", head="tail"),
    "another head": lambda folder: change_json(folder / "classifier.json", head="pooler"),
    "fewer labels": lambda folder: change_json(folder / "classifier.json", labels=LABELS[:2]),
    "hidden is no number": lambda folder: change_json(folder / "classifier.json", hidden="many"),
    "another hidden": lambda folder: change_json(folder / "classifier.json", hidden=7),
    "dropout above 1": lambda folder: change_json(folder / "classifier.json", dropout=2),
    "no classifier weights": lambda folder: (folder / "classifier.safetensors").unlink(),
    "classifier weights cut short": lambda folder: cut(folder / "classifier.safetensors"),
    "other classifier weights": lambda folder: save_file({"bias": torch.zeros(3)}, folder / "classifier.safetensors"),
    "encoder weights cut short": lambda folder: cut(folder / "model.safetensors"),
    "no tokenizer": lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
}


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    """A folder of save_model(): layers 1, 3, 4 of the BERT encoder."""
    folder = tmp_path_factory.mktemp("saved") / "1"
    save_model(eval_classifier(folders["bert"]), load_tokenizer(folders["bert"]), folder)
    return folder


@pytest.mark.parametrize("kind", BROKEN_MODELS)
def test_a_broken_model_folder_is_one_sentence(saved, tmp_path, kind):
    shutil.copytree(saved, tmp_path / "broken")
    BROKEN_MODELS[kind](tmp_path / "broken")
    message = fails(str(tmp_path / "broken"), load_model, tmp_path / "broken")
    assert {"fewer labels": "size mismatch for classifier.1.weight", "unknown pooling": "'median'", "unknown head": "'tail'",
            "a layer the encoder lacks": "layers 9: the model has layers 0 (embeddings) to 5"}.get(kind, "") in message


def test_a_baseline_without_its_pooler_is_refused_not_started_at_random(folders, tmp_path):
    save_model(eval_classifier(folders["bert"], head="pooler"), load_tokenizer(folders["bert"]), tmp_path / "1")
    change_weights(tmp_path / "1", lambda weights: weights.pop("pooler.dense.weight"))
    fails("pooler", load_model, tmp_path / "1")


@pytest.mark.parametrize("model_type", ["bert", "no-such-model"])
def test_python_files_in_a_model_folder_never_run(folders, tmp_path, model_type):
    folder, marker = tmp_path / "hostile", tmp_path / "marker"
    shutil.copytree(folders["bert"], folder)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    change_json(folder / "config.json", model_type=model_type, auto_map={
        "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    if model_type == "bert":
        assert type(load_encoder(folder)[0]).__module__.startswith("transformers.")
    else:
        fails(str(folder), load_encoder, folder)
    try:
        load_tokenizer(folder)
    except UserError:
        pass  # refused or loaded without it: the code has not run either way
    assert not marker.exists()


@pytest.mark.parametrize("hostile", [False, True])
def test_a_folder_with_pickled_weights_alone_is_refused_unread(folders, tmp_path, hostile):
    folder, marker = tmp_path / "pickled", tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return open, (str(marker), "w")

    shutil.copytree(folders["bert"], folder)
    (folder / "model.safetensors").unlink()
    weights = AutoModel.from_pretrained(folders["bert"]).state_dict()
    torch.save({**weights, "embeddings.word_embeddings.weight": Evil()} if hostile else weights, folder / "pytorch_model.bin")
    fails(str(folder), load_encoder, folder)
    assert not marker.exists()


# --- precision, length, prediction -------------------------------------------------------------------------------

def test_auto_precision_is_bf16_where_the_cpu_multiplies_it(monkeypatch):
    cpu = torch.device("cpu")
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
        assert pick_precision("auto", cpu) == expected
    assert (pick_precision("fp32", cpu), pick_precision("bf16", cpu)) == (torch.float32, torch.bfloat16)
    fails("--precision fp16 needs a GPU", pick_precision, "fp16", cpu)


@pytest.mark.parametrize("has, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_precision_is_fp16_on_a_gpu_without_bf16(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert pick_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_longest_length_allowed_runs_and_one_more_is_refused(folders, family):
    encoder = load_encoder(folders[family])[0].eval()
    limit = {"xlm-roberta": 65}.get(family, 64)  # positions begin after the padding's own: 66 - 0 - 1
    token_limit(encoder, limit)
    hidden_states(encoder, batch_of([([2] + [9] * (limit - 2) + [3], 5)]))
    fails(f"--max-length {limit + 1}: expected 3 to {limit}", token_limit, encoder, limit + 1)
    fails(f"--max-length 2: expected 3 to {limit}", token_limit, encoder, 2)


@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_predictions_are_in_the_rows_own_order_whatever_the_batch_size(folders, rows, size):
    model = eval_classifier(folders["bert"]).train()
    encoded = Encoded(np.concatenate([ids for ids, _ in rows]).astype(np.int32),
                      np.cumsum([0] + [len(ids) for ids, _ in rows]),
                      np.array([second for _, second in rows], np.int32), np.arange(len(rows)) % 3)
    logits = predict(model, encoded, 0, torch.float32, max_length=13, batch_size=size)
    assert logits.dtype == np.float32 and not model.training
    with torch.no_grad():
        alone = torch.cat([model(batch_of([row])) for row in rows]).numpy()
    np.testing.assert_allclose(logits, alone, rtol=0, atol=1e-5)


# --- fast paths against the plain ones ---------------------------------------------------------------------------

def test_dropout_scales_what_it_keeps_and_its_gradient_alike():
    layer, x = Dropout(0.3), torch.ones(37, 53, requires_grad=True)
    torch.manual_seed(0)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, x.grad) and set(y.unique().tolist()) == {0.0, y.max().item()}
    assert y.max().item() == pytest.approx(1 / 0.7, rel=1e-4) and y.mean().item() == pytest.approx(1, abs=0.06)
    assert torch.equal(layer.eval()(x), x) and torch.equal(Dropout(0.0)(x), x)


def test_the_classifier_drops_out_with_the_fast_kind(folders):
    model = eval_classifier(folders["bert"])
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {Dropout}


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_word_pieces_give_the_same_states_and_the_whole_table_is_saved(family, folders, tmp_path):
    encoder = load_encoder(folders[family])[0].eval()
    plain = AutoModel.from_pretrained(folders[family]).eval()
    size = encoder.get_input_embeddings().num_embeddings
    ids, pad = np.array([9, 3, 17, 40, 2]), 0
    new = keep_tokens(encoder, ids, pad)
    assert encoder.get_input_embeddings().num_embeddings == 6 and new[pad] == pad
    batch = {"input_ids": torch.tensor([[2, 9, 40, 3], [2, 17, 3, pad]]), "attention_mask": torch.tensor([[1] * 4, [1] * 3 + [0]])}
    small = encoder(**{**batch, "input_ids": torch.from_numpy(new)[batch["input_ids"]].long()}).last_hidden_state
    torch.testing.assert_close(small[0], plain(**batch).last_hidden_state[0], atol=1e-5, rtol=0)
    with torch.no_grad():
        encoder.get_input_embeddings().weight[new[17]] += 1.0
    table = next(weight for name, weight in whole_state(encoder, 0.5).items() if name.endswith("word_embeddings.weight"))
    expected = plain.get_input_embeddings().weight.detach() * 0.5
    for i in [pad, *ids]:
        expected[i] = plain.get_input_embeddings().weight[i] + (i == 17)
    assert table.shape == (size, 36) and torch.equal(table, expected.detach())
    with pytest.raises(UserError, match="the tokenizer gives token 999, the encoder knows"):
        keep_tokens(load_encoder(folders[family])[0], [999], pad)


def test_out_of_memory_says_what_to_try():
    with pytest.raises(UserError, match=r"out of memory on cpu \(CUDA out of memory\): try 16"), out_of_memory("try 16"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(UserError, match=r"out of memory on cpu \(.*can't allocate memory.*\): try 8"), out_of_memory("try 8"):
        torch.empty(2 ** 55)
    with pytest.raises(RuntimeError, match="must match"), out_of_memory("try 4"):  # our own mistakes keep their traceback
        torch.zeros(2) + torch.zeros(3)
