"""lib/encoders.py against plain transformers: the states of every supported family, cut, frozen and
with fewer word pieces; what is refused, and what a model's folder may hold."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import (
    BLOCKS,
    FAMILIES,
    SIZES,
    XLMR,
    batch_of,
    eval_classifier,
    eval_encoder,
    fails,
    make_family,
    plain_states,
    token_rows,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from data import load_tokenizer
from lib.encoders import (
    blocks,
    check_layers,
    check_length,
    check_tokens,
    cut_after,
    drop_pooler,
    hidden_states,
    keep_tokens,
    load_encoder,
    parameter_layers,
    whole_state,
)
from model import Classifier, Settings, freeze_layers, load_model, save_model

BLOCK = re.compile(r"(?:layer|layers)\.(\d+)\.")  # the number of a parameter's block, from 0
ROWS = token_rows()
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved encoder of each family: {family: folder}."""
    return {family: make_family(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def close(states, expected):
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)


# --- every supported family -----------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_states_are_those_of_transformers_whole_after_any_cut_and_loaded_again(
    folders, family, tmp_path
):
    batch = batch_of(ROWS, family=family)
    expected = plain_states(folders[family], batch)
    assert len(expected) == BLOCKS + 1
    for top in (BLOCKS, 4, 0):
        encoder = eval_encoder(folders[family])
        drop_pooler(encoder)
        count = top
        if family in ("xlm-roberta-xl", "modernbert") and top < BLOCKS:
            count = top + 1  # a spare block keeps the last norm away from this layer
        if family == "deberta-v2":
            count = max(top, 1)
        assert cut_after(encoder, top) == len(blocks(encoder)) == count
        assert encoder.config.num_hidden_layers == count
        close(hidden_states(encoder, batch)[0][: top + 1], expected[: top + 1])
        model = Classifier(encoder, Settings(labels=["a", "b"], layers=[top]))
        save_model(model, load_tokenizer(folders[family]), tmp_path / "cut")
        close(plain_states(tmp_path / "cut", batch)[: top + 1], expected[: top + 1])
        again = load_model(tmp_path / "cut").encoder.eval()
        close(hidden_states(again, batch)[0][top], expected[top])


@pytest.mark.parametrize("top", [BLOCKS, 3])
@every_family
def test_every_parameter_has_its_layers(folders, family, top):
    encoder = eval_encoder(folders[family])
    cut_after(encoder, top)
    expected = {}
    for name, _ in encoder.named_parameters():
        if match := BLOCK.search(name):
            first = last = int(match[1]) + 1
        elif name.startswith(("encoder.LayerNorm.", "final_norm.")) and family != "deberta-v2":
            first = last = BLOCKS
        elif name.startswith("encoder."):  # DeBERTa's relative positions and their norm
            first, last = 1, top
        else:  # the embeddings, with ELECTRA's projection
            first = last = 0
        if first <= top and not name.startswith("pooler."):  # which no layer reads
            expected[name] = first, last
    assert parameter_layers(encoder, top) == expected
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def train_frozen(folder, batch, layers, top):
    """Three steps of a classifier over layers 1, 3 and `top` with frozen `layers`: the model, its
    weights before."""
    model = eval_classifier(folder, layers=[1, 3, top])
    drop_pooler(model.encoder)
    cut_after(model.encoder, top)
    model(batch).sum().backward()
    readers = parameter_layers(model.encoder, top)
    frozen = freeze_layers(model.encoder, layers, readers)
    assert all(parameter.grad is None for parameter in frozen)
    assert {id(p) for p in frozen} == {id(p) for p in model.parameters() if not p.requires_grad}
    assert freeze_layers(model.encoder, layers, readers) == []  # frozen already
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(batch).square().sum().backward()
        optimizer.step()
    return model.eval(), before


@every_family
def test_with_all_layers_frozen_the_states_are_the_same_to_the_last_bit(folders, family):
    batch = batch_of(ROWS, family=family)
    model, before = train_frozen(folders[family], batch, range(BLOCKS + 1), BLOCKS)
    assert not torch.equal(model.classifier[-1].weight, before["classifier.1.weight"])
    states = hidden_states(model.encoder, batch)[0]
    expected = hidden_states(eval_encoder(folders[family]), batch)[0]
    assert len(states) == BLOCKS + 1 and all(map(torch.equal, states, expected))


@every_family
def test_exactly_the_parameters_of_the_frozen_layers_rest(folders, family):
    layers = [0, 3, 5]  # 5 is above the cut: a no-op
    model, before = train_frozen(folders[family], batch_of(ROWS, family=family), layers, 4)
    readers = parameter_layers(model.encoder, 4)
    for name, parameter in model.encoder.named_parameters():
        first, last = readers.get(name, (None, None))  # of the spare block: never trained
        expected = first is None or (first == last and first in layers)
        assert torch.equal(parameter, before[f"encoder.{name}"]) == expected, name


@every_family
@torch.no_grad()
def test_the_longest_length_allowed_runs_and_one_more_is_refused(folders, family):
    encoder = eval_encoder(folders[family])
    limit = 64
    if FAMILIES[family] is XLMR:
        limit = 128  # 130 positions begin after the padding's own: 130 - 1 - 1
    check_length(encoder, limit)
    hidden_states(encoder, batch_of([([2] + [9] * (limit - 2) + [3], 5)]))
    for wrong in (limit + 1, 2):
        fails(f"--max-length {wrong}: expected 3 to {limit}", check_length, encoder, wrong)


def renumbered(batch, new):
    """A batch with the token ids of keep_tokens()."""
    return {**batch, "input_ids": torch.from_numpy(new)[batch["input_ids"]].long()}


@every_family
@torch.no_grad()
def test_fewer_word_pieces_give_the_same_states_and_the_whole_table_is_saved(family, folders):
    encoder, plain = eval_encoder(folders[family]), eval_encoder(folders[family])
    batch = batch_of(ROWS, 15, family)
    table, whole = encoder.get_input_embeddings(), plain.get_input_embeddings()
    ids, pad = np.unique(np.concatenate([row for row, _ in ROWS])), batch["input_ids"].min().item()
    new = keep_tokens(encoder, ids, pad)
    assert new[pad] == pad and len(table.weight) == new.max() + 1 < len(whole.weight)
    small = hidden_states(encoder, renumbered(batch, new))[0]
    assert all(map(torch.equal, small, hidden_states(plain, batch)[0]))
    table.weight[new[ids[-1]]] += 1.0
    expected = whole.weight.clone()
    expected[ids[-1]] += 1.0
    plain.load_state_dict(whole_state(encoder))
    assert torch.equal(whole.weight, expected)


REFUSED = {  # what AutoModel loads and this project cannot use: {type: (settings, what is said)}
    "xmod": (
        dict(SIZES, languages=["en_XX", "de_DE"]),
        "XmodModel {no} cannot be run on token ids and a mask alone (Input language unknown",
    ),
    "mt5": (
        dict(d_model=36, d_kv=12, d_ff=52, num_layers=2, num_heads=3),
        "MT5Model {no} has 2 lists of 2 blocks",
    ),
    "bloom": (
        dict(hidden_size=36, n_layer=2, n_head=3),
        "BloomModel {no} lets the first token not see the last",
    ),
    "albert": (dict(SIZES, embedding_size=12), "AlbertModel {no} has 0 lists of 5 blocks"),
    "fnet": (SIZES, "FNetModel {no} gives other states where a row is padded"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_encoder_of_ours_is_refused_by_its_class(tmp_path, kind):
    settings, message = REFUSED[kind]
    config = AutoConfig.for_model(kind, vocab_size=60, **settings)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    no = "is no encoder that can be used here: it"
    fails(message.format(no=no), load_encoder, tmp_path)
    if kind == "xmod":  # which can be given the language of all rows
        change_json(tmp_path / "config.json", default_language="de_DE")
        assert len(blocks(load_encoder(tmp_path)[0])) == BLOCKS


@torch.no_grad()
def test_lists_of_the_configuration_are_cut_with_the_blocks(tmp_path):
    windows = dict(attention_window=[16, 8, 16, 16, 8], pad_token_id=1)
    config = AutoConfig.for_model("longformer", vocab_size=60, **windows, **SIZES)
    AutoModel.from_config(config).save_pretrained(tmp_path / "whole")
    encoder = load_encoder(tmp_path / "whole")[0]
    assert cut_after(encoder, 3) == 3 and encoder.config.attention_window == [16, 8, 16]
    encoder.save_pretrained(tmp_path / "cut")
    assert len(blocks(load_encoder(tmp_path / "cut")[0])) == 3


def test_a_parameter_that_blocks_share_is_frozen_when_all_of_them_are(folders):
    encoder = eval_encoder(folders["bert"])
    for k in (1, 3):
        blocks(encoder)[k].intermediate = blocks(encoder)[0].intermediate
    shared = "encoder.layer.0.intermediate.dense.weight"
    readers = parameter_layers(encoder, BLOCKS)
    assert readers[shared] == (1, 4) and parameter_layers(encoder, 2)[shared] == (1, 2)
    freeze_layers(encoder, [1, 2, 4], readers)
    assert encoder.get_parameter(shared).requires_grad
    freeze_layers(encoder, [1, 2, 3, 4], readers)
    assert not encoder.get_parameter(shared).requires_grad


@torch.no_grad()
def test_a_table_that_scales_what_it_looks_up_still_does_with_fewer_word_pieces(tmp_path):
    heads = dict(num_key_value_heads=1, head_dim=12, use_bidirectional_attention=True)
    config = AutoConfig.for_model("gemma3_text", vocab_size=60, pad_token_id=0, **heads, **SIZES)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    encoder, plain = eval_encoder(tmp_path), eval_encoder(tmp_path)
    batch = batch_of([([2, 9, 40, 17, 3], 3), ([2, 17, 3], 2)])
    new = keep_tokens(encoder, np.array([2, 3, 9, 17, 40]), 0)
    close(hidden_states(encoder, renumbered(batch, new))[0], hidden_states(plain, batch)[0])


def test_layers_and_tokens_that_the_model_lacks_are_said(folders):
    check_layers([0, 3, 5], 5, "--layers")
    for layers, words in (
        ([3, 6], "--layers 6: the model has layers 0 (embeddings) to 5"),
        ([-1], "--layers -1: the model has"),
        ([3, 1, 3], "--layers 3 1 3: a layer is named twice"),
    ):
        fails(words, check_layers, layers, 5, "--layers")
    encoder = eval_encoder(folders["bert"])
    size = encoder.get_input_embeddings().num_embeddings
    check_tokens(encoder, np.array([3, size - 1]))
    words = f"the tokenizer gives token {size}, the encoder knows {size}"
    fails(words, check_tokens, encoder, np.array([3, size]))


# --- what a model's folder may hold ---------------------------------------------------------------


def test_half_precision_files_are_loaded_as_float32(folders, tmp_path):
    half = AutoModel.from_pretrained(folders["bert"]).half()
    half.save_pretrained(tmp_path)
    state = load_encoder(tmp_path)[0].state_dict()
    assert state.keys() == half.state_dict().keys()
    for name, weight in half.state_dict().items():
        assert weight.dtype == torch.float16 and state[name].dtype == torch.float32
        assert torch.equal(weight.float(), state[name])


def change_weights(folder, change):
    """Let change() work on the {name: tensor} of model.safetensors."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of BERT's folder."""
    return Path(shutil.copytree(folders["bert"], tmp_path / "copy"))


def test_a_missing_pooler_is_told_apart_from_missing_weights(folders, folder):
    have = {family for family in FAMILIES if load_encoder(folders[family])[1]}
    assert have == {"bert", "xlm-roberta", "roberta", "xlm-roberta-xl"}
    change_weights(folder, lambda weights: weights.pop("pooler.dense.bias"))
    assert load_encoder(folder)[1] is False


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def compiled(weights):
    for name in list(weights):
        weights[f"_orig_mod.{name}"] = weights.pop(name)


def move_into(inner):
    def move(folder):
        files = list(folder.iterdir())
        (folder / inner).mkdir(parents=True)
        for path in files:
            path.rename(folder / inner / path.name)

    return move


def half_the_file(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 638468\n"
LACKS = "lacks weights of BertModel: "
BROKEN = {  # {what was done: (how, what is said of {folder})}
    "cut short": (half_the_file, "no encoder can be loaded from '{folder}': "),
    "another shape": (
        lambda folder: change_json(folder / "config.json", intermediate_size=53),
        LACKS + "shapes differ, encoder.layer.0.intermediate.dense.bias",
    ),
    "prefixes": (
        lambda folder: change_weights(folder, compiled),
        LACKS + "embeddings.LayerNorm.bias; the file has names as _orig_mod.",
    ),
    "git lfs": (
        write("model.safetensors", LFS),
        "{folder}/model.safetensors is a pointer of Git LFS: run `git lfs pull` in {folder}",
    ),
    "git lfs, tokenizer": (write("tokenizer.json", LFS), "tokenizer.json is a pointer of Git LFS"),
    "sentence-transformers": (
        move_into("0_Transformer"),
        "{folder} is no model: it has no config.json; did you mean {folder}/0_Transformer?",
    ),
    "the hub's cache": (move_into("snapshots/0123"), "did you mean {folder}/snapshots/0123?"),
    "an adapter beside": (
        write("adapter_config.json", "{}"),
        "{folder} holds an adapter (adapter_config.json), which only some machines would load: "
        "merge it first (peft's merge_and_unload)",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_is_no_model_is_said_to_be_what_it_is(folder, kind):
    spoil, words = BROKEN[kind]
    spoil(folder)
    words = words.format(folder=folder)
    assert str(folder) in fails(words, load_encoder, folder)
    if not (LACKS in words or kind == "cut short"):
        fails(words, load_tokenizer, folder)


@pytest.mark.parametrize("model_type", ["bert", "no-such-model"])
def test_python_files_in_a_model_folder_never_run(folder, tmp_path, model_type):
    marker = tmp_path / "marker"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    auto = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    auto["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    for name in ("config.json", "tokenizer_config.json"):
        change_json(folder / name, model_type=model_type, auto_map=auto)
    if model_type == "bert":
        load_encoder(folder)
        load_tokenizer(folder)
    else:
        fails(str(folder), load_encoder, folder)
    assert not marker.exists()


def test_a_folder_with_pickled_weights_alone_is_refused_unread(folder, tmp_path):
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return open, (str(marker), "w")

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "more": Evil()}, folder / "pytorch_model.bin")
    fails(str(folder), load_encoder, folder)
    assert not marker.exists()
