"""model.py against plain transformers: every supported family's states, freezing, pooling, heads, files, refusals."""

import json
import pickle
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import WORDS, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from data import Encoded, eval_batches, load_tokenizer
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
    token_limit,
    whole_state,
)
from lib.hub import revision
from lib.messages import UserError
from model import POOLINGS, Classifier, freeze_layers, load_model, pool, predict, save_model

BLOCKS, HIDDEN = 5, 36
LABELS = ["refund", "agent", "delivery"]
SIZES = dict(
    hidden_size=HIDDEN, num_hidden_layers=BLOCKS, num_attention_heads=3, intermediate_size=52
)
XLMR = dict(
    max_position_embeddings=130, type_vocab_size=1, bos_token_id=0, pad_token_id=1, eos_token_id=2
)
FAMILIES = {  # the README's list: what tells each encoder from BERT
    "bert": dict(max_position_embeddings=64),
    "xlm-roberta": XLMR,
    "roberta": XLMR,
    "distilbert": dict(max_position_embeddings=64),
    "deberta-v2": dict(  # mDeBERTa's settings: relative positions alone, shared projections
        max_position_embeddings=64,
        relative_attention=True,
        position_buckets=8,
        type_vocab_size=0,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    ),
    "electra": dict(
        max_position_embeddings=64, embedding_size=20
    ),  # with a projection of the embeddings
    "xlm-roberta-xl": XLMR,  # pre-norm, with a norm after the last block
    "modernbert": dict(  # a final norm, two kinds of blocks
        max_position_embeddings=64,
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
        global_attn_every_n_layers=2,
        local_attention=6,
    ),
}
BLOCK = re.compile(r"(?:layer|layers)\.(\d+)\.")  # the number of a parameter's block, from 0


def xlmr_tokenizer(folder):
    """Save a tokenizer as XLM-R's: SentencePiece-like, <s> 0, <pad> 1, </s> 2, <unk> 3. Returns its size."""
    words = [f"▁{word}" for language in WORDS.values() for word in language]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *words, *sorted(set("".join(words))), "<mask>"]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(i % 7) - 1) for i, piece in enumerate(pieces)], unk_id=3)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    ).save_pretrained(folder)
    return len(pieces)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved encoder of each family, with a tokenizer: {family: folder}."""
    made = {}
    for family, settings in FAMILIES.items():
        made[family] = str(folder := tmp_path_factory.mktemp(family))
        size = xlmr_tokenizer(folder) if settings is XLMR else make_tokenizer(folder)
        names = (
            SIZES
            if family != "distilbert"
            else dict(dim=HIDDEN, n_layers=BLOCKS, n_heads=3, hidden_dim=52)
        )
        torch.manual_seed(0)
        encoder = AutoModel.from_config(
            AutoConfig.for_model(family, vocab_size=size, **names, **settings)
        )
        for name, parameter in encoder.named_parameters():
            if "norm" in name.lower():  # so that one norm more or less shows
                torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.3)
        encoder.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def rows():
    """Seven token rows of 3 to 13 tokens, and where the second text of each begins: [(ids, second)]."""
    random = np.random.default_rng(0)
    return [
        ([2, *random.integers(5, 60, length - 2).tolist(), 3], length // 2)
        for length in (7, 3, 13, 5, 8, 4, 11)
    ]


def batch_of(rows, width=0, pad=0):
    """A batch as collate() makes it, padded by hand to the longest row, or to `width` tokens."""
    width = max(width, *(len(ids) for ids, _ in rows))
    batch = {
        key: torch.zeros(len(rows), width, dtype=torch.int64)
        for key in ("input_ids", "attention_mask", "token_type_ids")
    }
    batch["input_ids"] += pad
    for i, (ids, second) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][i, : len(ids)] = 1
        batch["token_type_ids"][i, second : len(ids)] = 1
    return batch


def family_batch(family, rows, width=0):
    return batch_of(rows, width, FAMILIES[family].get("pad_token_id", 0))


def plain_states(folder, batch):
    """hidden_states of plain transformers: a tuple of (B, T, D)."""
    encoder = AutoModel.from_pretrained(folder).eval()
    two = encoder.config.model_type in ("bert", "electra")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", *["token_type_ids"] * two)}
    with torch.no_grad():
        output = encoder(**inputs, output_hidden_states=True)
    return output.hidden_states or (output.last_hidden_state,)  # of an encoder without a block


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


# --- every supported family --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_are_those_of_transformers_whole_after_any_cut_and_loaded_again(
    folders, rows, family, tmp_path
):
    batch = family_batch(family, rows)
    expected = plain_states(folders[family], batch)
    assert len(expected) == BLOCKS + 1
    encoder = load_encoder(folders[family])[0].eval()
    torch.testing.assert_close(hidden_states(encoder, batch)[0], expected, rtol=0, atol=1e-6)
    for top in range(BLOCKS, -1, -1):
        encoder = load_encoder(folders[family])[0].eval()
        drop_pooler(encoder)
        spare = (
            family in ("xlm-roberta-xl", "modernbert")
            and top < BLOCKS
            or family == "deberta-v2"
            and top == 0
        )
        assert (
            cut_after(encoder, top)
            == len(blocks(encoder))
            == encoder.config.num_hidden_layers
            == top + spare
        )
        torch.testing.assert_close(
            hidden_states(encoder, batch)[0][: top + 1], expected[: top + 1], rtol=0, atol=1e-6
        )
        save_model(
            Classifier(encoder, LABELS, layers=[top]),
            load_tokenizer(folders[family]),
            tmp_path / "cut",
        )
        states = plain_states(tmp_path / "cut", batch)
        torch.testing.assert_close(states[: top + 1], expected[: top + 1], rtol=0, atol=1e-6)
        again = load_model(tmp_path / "cut").eval()
        torch.testing.assert_close(
            hidden_states(again.encoder, batch)[0][top], expected[top], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("top", [BLOCKS, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_its_layers(folders, family, top):
    encoder = load_encoder(folders[family])[0]
    drop_pooler(encoder)
    cut_after(encoder, top)
    expected = {}
    for name, _ in encoder.named_parameters():
        if match := BLOCK.search(name):
            expected[name] = (int(match[1]) + 1,) * 2
        elif name.startswith(("encoder.LayerNorm.", "final_norm.")) and family != "deberta-v2":
            expected[name] = (BLOCKS, BLOCKS)
        else:  # DeBERTa's relative positions and their norm, or embeddings, with ELECTRA's projection
            expected[name] = (1, top) if name.startswith("encoder.") else (0, 0)
    assert {"deberta-v2": (1, top), "electra": (0, 0)}.get(family) == expected.get(
        {"deberta-v2": "encoder.rel_embeddings.weight", "electra": "embeddings_project.weight"}.get(
            family
        )
    )
    wanted = [parameter.requires_grad for parameter in encoder.parameters()]
    assert parameter_layers(encoder, top) == {
        name: found for name, found in expected.items() if found[0] <= top
    }
    assert [parameter.requires_grad for parameter in encoder.parameters()] == wanted


def train_frozen(folder, batch, layers, top=4):
    """Three steps of a classifier over layers 1, 3 and `top` with frozen `layers`: the model, its weights before."""
    model = eval_classifier(folder, layers=[1, 3, top])
    drop_pooler(model.encoder)
    cut_after(model.encoder, top)
    model(batch).sum().backward()
    readers = parameter_layers(model.encoder, top)
    frozen = freeze_layers(model.encoder, layers, readers)
    assert bool(frozen) == bool(layers) and all(parameter.grad is None for parameter in frozen)
    assert {id(p) for p in frozen} == {id(p) for p in model.parameters() if not p.requires_grad}
    assert freeze_layers(model.encoder, layers, readers) == []  # frozen already
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(batch).square().sum().backward()
        optimizer.step()
    return model.eval(), before


@pytest.mark.parametrize("top", [BLOCKS, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_layers_frozen_the_states_are_the_same_to_the_last_bit(folders, rows, family, top):
    batch = family_batch(family, rows)
    model, before = train_frozen(folders[family], batch, range(top + 1), top)
    assert not torch.equal(model.classifier[-1].weight, before["classifier.1.weight"])
    states = hidden_states(model.encoder, batch)[0][: top + 1]
    expected = hidden_states(load_encoder(folders[family])[0].eval(), batch)[0][: top + 1]
    assert len(states) == top + 1 and all(map(torch.equal, states, expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_parameters_of_the_frozen_layers_rest(folders, rows, family):
    for layers in [[], [0], [1], [4], [0, 2, 3], [2, 5]]:  # 5 is above the cut: a no-op
        model, before = train_frozen(folders[family], family_batch(family, rows), layers)
        read = parameter_layers(model.encoder, 4)
        names = {
            name.removeprefix("encoder."): name for name in before if name.startswith("encoder.")
        }
        still = {
            short
            for short, name in names.items()
            if torch.equal(model.get_parameter(name), before[name])
        }
        own = {short for short, (first, last) in read.items() if first == last and first in layers}
        assert still == own | (names.keys() - read.keys()), layers


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_changes_no_pooled_vector(folders, rows, family):
    encoder = load_encoder(folders[family])[0].eval()

    def pooled(part, width=0):
        batch = family_batch(family, part, width)
        return torch.stack(
            [
                torch.stack([pool(layer, batch["attention_mask"], pooling) for pooling in POOLINGS])
                for layer in hidden_states(encoder, batch)[0]
            ]
        )  # (L, P, B, D)

    alone = torch.cat([pooled([row]) for row in rows], dim=2)
    torch.testing.assert_close(pooled(rows), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled(rows, 29), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        torch.cat([pooled(rows[:3], 17), pooled(rows[3:])], dim=2), alone, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_longest_length_allowed_runs_and_one_more_is_refused(folders, family):
    encoder = load_encoder(folders[family])[0].eval()
    limit = (
        128 if FAMILIES[family] is XLMR else 64
    )  # 130 positions begin after the padding's own: 130 - 1 - 1
    assert token_limit(encoder) == limit
    check_length(encoder, limit)
    hidden_states(encoder, batch_of([([2] + [9] * (limit - 2) + [3], 5)] * 2))
    for wrong in (limit + 1, 2):
        fails(f"--max-length {wrong}: expected 3 to {limit}", check_length, encoder, wrong)
    if "roberta" in family or family == "bert":  # the others have no table that ends there
        with pytest.raises((IndexError, RuntimeError)):
            hidden_states(encoder, batch_of([([9] * (limit + 1), 5)] * 2))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fewer_word_pieces_give_the_same_states_and_the_whole_table_is_saved(family, folders, rows):
    encoder, plain = (load_encoder(folders[family])[0].eval() for _ in range(2))
    batch, size = family_batch(family, rows, 15), encoder.get_input_embeddings().num_embeddings
    ids, pad = (
        np.unique(np.concatenate([row for row, _ in rows])),
        FAMILIES[family].get("pad_token_id", 0),
    )
    new = keep_tokens(encoder, ids, pad)
    assert (
        new[pad] == pad and encoder.get_input_embeddings().weight.shape[0] == new.max() + 1 < size
    )
    small = hidden_states(
        encoder, {**batch, "input_ids": torch.from_numpy(new)[batch["input_ids"]].long()}
    )[0]
    assert all(map(torch.equal, small, hidden_states(plain, batch)[0]))
    encoder.get_input_embeddings().weight[new[ids[-1]]] += 1.0
    expected = plain.get_input_embeddings().weight.clone()
    expected[ids[-1]] += 1.0
    plain.load_state_dict(whole_state(encoder))
    assert torch.equal(plain.get_input_embeddings().weight, expected)


REFUSED = {  # what AutoModel loads and this project cannot use: {type: (settings, what is said)}
    "xmod": (
        dict(languages=["en_XX", "de_DE"]),
        "XmodModel is no encoder that can be used here: it cannot be run on "
        "token ids and a mask alone (Input language unknown",
    ),
    "mt5": (
        dict(d_model=36, d_kv=12, d_ff=52, num_layers=2, num_heads=3),
        "MT5Model is no encoder that can be used",
    ),
    "bloom": (
        dict(n_layer=2, n_head=3),
        "BloomModel is no encoder that can be used here: it lets the first token not",
    ),
    "xlm": (
        dict(emb_dim=36, n_layers=2, n_heads=3),
        "XLMModel is no encoder that can be used here: it has 4 lists",
    ),
    "albert": (
        dict(embedding_size=12),
        "AlbertModel is no encoder that can be used here: it has 0 lists of 2 blocks",
    ),
    "canine": ({}, "CanineModel is no encoder that can be used here: it"),
    "convbert": (
        dict(embedding_size=12),
        "ConvBertModel is no encoder that can be used here: it gives other states",
    ),
    "fnet": (
        {},
        "FNetModel is no encoder that can be used here: it gives other states where a row is padded",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_encoder_of_ours_is_refused_by_its_class(tmp_path, kind):
    settings, message = REFUSED[kind]
    config = AutoConfig.for_model(kind)
    sizes = {
        key: value
        for key, value in {
            **SIZES,
            "num_hidden_layers": 2,
            "vocab_size": 60,
            "num_attention_heads": 4 if kind == "convbert" else 3,
        }.items()
        if hasattr(config, key) and kind not in ("mt5", "xlm")
    }
    config = AutoConfig.for_model(kind, **{"vocab_size": 60, **sizes, **settings})
    AutoModel.from_config(config).save_pretrained(tmp_path)
    fails(message, load_encoder, tmp_path)
    if kind == "xmod":  # which can be given the language of all rows
        change_json(tmp_path / "config.json", default_language="de_DE")
        assert len(blocks(load_encoder(tmp_path)[0])) == 2


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
    encoder = load_encoder(folders["bert"])[0]
    drop_pooler(encoder)
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
    sizes = {
        **SIZES,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "vocab_size": 60,
    }
    config = AutoConfig.for_model(
        "gemma3_text", use_bidirectional_attention=True, pad_token_id=0, **sizes
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    encoder, plain = (load_encoder(tmp_path)[0].eval() for _ in range(2))
    batch = batch_of([([2, 9, 40, 17, 3], 3), ([2, 17, 3], 2)])
    new = keep_tokens(encoder, np.array([2, 3, 9, 17, 40]), 0)
    small = hidden_states(
        encoder, {**batch, "input_ids": torch.from_numpy(new)[batch["input_ids"]].long()}
    )[0]
    torch.testing.assert_close(small, hidden_states(plain, batch)[0], rtol=0, atol=1e-6)


# --- states and pooling ------------------------------------------------------------------------------------------

PLAIN = {
    "max": lambda tokens: np.maximum.reduce(tokens),
    "mean": lambda tokens: sum(tokens) / len(tokens),
    "cls": lambda tokens: tokens[0],
}


@torch.no_grad()
def test_second_texts_change_the_states_of_bert(folders, rows):
    batch = batch_of(rows)
    encoder = load_encoder(folders["bert"])[0].eval()
    one = hidden_states(encoder, {**batch, "token_type_ids": 0 * batch["token_type_ids"]})[0][-1]
    assert (one - hidden_states(encoder, batch)[0][-1]).abs().max() > 1e-3


@pytest.mark.parametrize("pooling", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_is_a_loop_over_the_tokens_that_are_there(pooling, dtype):
    random = np.random.default_rng(1)
    states = torch.from_numpy(random.normal(size=(5, 7, 9)) - 3).to(
        dtype
    )  # below 0: a padding's 0 would win the max
    lengths = [7, 1, 4, 2, 6]
    mask = torch.tensor([[int(t < length) for t in range(7)] for length in lengths])
    values, expected = states.float().numpy(), np.zeros((5, 9), np.float32)
    for b, length in enumerate(lengths):
        tokens = [values[b, t] for t in range(length)]
        expected[b] = PLAIN[pooling](tokens)
    pooled = pool(states, mask, pooling)
    assert pooled.dtype == torch.float32
    np.testing.assert_allclose(pooled.numpy(), expected, rtol=0, atol=1e-6)


def test_check_layers_says_how_many_the_model_has():
    check_layers([0, 3, 5], 5, "--layers")
    message = fails("--layers", check_layers, [3, 6], 5, "--layers")
    assert message == "--layers 6: the model has layers 0 (embeddings) to 5"
    fails(
        "--freeze-layers -1: the model has layers 0 (embeddings) to 5",
        check_layers,
        [-1],
        5,
        "--freeze-layers",
    )
    fails("--layers 3 1 3: a layer is named twice", check_layers, [3, 1, 3], 5, "--layers")


# --- the heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", PLAIN)
@torch.no_grad()
def test_logits_are_a_linear_map_of_the_concatenated_pooled_states(folders, rows, family, pooling):
    model = eval_classifier(
        folders[family], pooling=pooling, layers=[4, 1, 3]
    )  # in the order given
    batch = family_batch(family, rows)
    states = plain_states(folders[family], batch)
    weight, bias = model.classifier[-1].weight.numpy(), model.classifier[-1].bias.numpy()
    assert weight.shape == (len(LABELS), 3 * HIDDEN)
    for row, (logits, (ids, _)) in enumerate(zip(model(batch), rows)):
        features = np.concatenate(
            [PLAIN[pooling](list(states[k][row, : len(ids)].numpy())) for k in (4, 1, 3)]
        )
        np.testing.assert_allclose(logits.numpy(), weight @ features + bias, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_mix_is_the_softmax_weighted_sum_of_the_layers(folders, rows):
    model = eval_classifier(folders["bert"], combine="mix")
    states = plain_states(folders["bert"], batch_of(rows))
    for weights in ([0.0, 0.0, 0.0], [0.5, -1.0, 2.0]):  # it begins as the plain mean
        assert weights[0] or model.mix.tolist() == weights
        model.mix.copy_(torch.tensor(weights))
        shares = np.exp(weights) / np.exp(weights).sum()
        for row, (logits, (ids, _)) in enumerate(zip(model(batch_of(rows)), rows)):
            features = sum(
                share * states[k][row, : len(ids)].numpy().max(0)
                for share, k in zip(shares, (1, 3, 4))
            )
            expected = model.classifier[-1](torch.from_numpy(features.astype(np.float32)))
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_hidden_layer_is_a_relu_layer_before_the_linear_one(folders, rows):
    model = eval_classifier(folders["bert"], hidden=11)
    states = plain_states(folders["bert"], batch_of(rows[:1]))
    features = np.concatenate([states[layer][0].numpy().max(0) for layer in (1, 3, 4)])
    own = {
        name: value.numpy()
        for name, value in model.state_dict().items()
        if name.startswith("classifier.")
    }
    assert [value.shape for value in own.values()] == [
        (11, 3 * HIDDEN),
        (11,),
        (len(LABELS), 11),
        (len(LABELS),),
    ]
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
    theirs = BertForSequenceClassification.from_pretrained(
        folders["bert"], num_labels=len(LABELS)
    ).eval()
    model = eval_classifier(folders["bert"], head="pooler")
    model.classifier[-1].load_state_dict(theirs.classifier.state_dict())
    assert (model.layers, model.pooling, model.dense) == ([BLOCKS], "cls", None)
    torch.testing.assert_close(
        model(batch_of(rows)), theirs(**batch_of(rows)).logits, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("family", ["distilbert", "deberta-v2", "electra", "modernbert"])
@torch.no_grad()
def test_the_pooler_head_brings_its_own_dense_layer_where_the_model_has_none(folders, rows, family):
    model = eval_classifier(folders[family], head="pooler")
    first = plain_states(folders[family], batch_of(rows))[-1][:, 0]
    pooled = torch.tanh(first @ model.dense.weight.T + model.dense.bias)
    expected = pooled @ model.classifier[-1].weight.T + model.classifier[-1].bias
    torch.testing.assert_close(model(batch_of(rows)), expected, rtol=0, atol=1e-6)


# --- saving and loading ------------------------------------------------------------------------------------------

SAVED = [
    dict(head="layers", layers=[1, 3], pooling="mean"),
    dict(head="layers", layers=[3], pooling="max", hidden=7, pairs=True),
    dict(head="layers", layers=[2, 3], combine="mix"),
    dict(head="pooler"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", SAVED, ids=["layers", "hidden", "mix", "pooler"])
@torch.no_grad()
def test_a_saved_model_comes_back_bit_for_bit(folders, rows, tmp_path, family, settings):
    encoder = load_encoder(folders[family])[0]
    if settings["head"] == "layers":
        drop_pooler(encoder)
        cut_after(encoder, 3)
    model, tokenizer = (
        Classifier(encoder, LABELS, dropout=0.3, **settings).eval(),
        load_tokenizer(folders[family]),
    )
    save_model(model, tokenizer, tmp_path / "epochs" / "1")
    again, batch = load_model(tmp_path / "epochs" / "1").eval(), family_batch(family, rows)
    assert torch.equal(again(batch), model(batch))
    for key in ("head", "layers", "pooling", "combine", "dropout", "hidden", "labels", "pairs"):
        assert getattr(again, key) == getattr(model, key)
    assert load_tokenizer(tmp_path / "epochs" / "1")("money refund") == tokenizer("money refund")

    plain, own = (
        AutoModel.from_pretrained(tmp_path / "epochs" / "1").state_dict(),
        encoder.state_dict(),
    )
    assert all(torch.equal(plain[name], weight) for name, weight in own.items())
    assert {name for name in plain if name not in own} <= {
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    config = json.loads((tmp_path / "epochs/1/config.json").read_text())
    assert config.get("num_hidden_layers", config.get("n_layers")) == len(blocks(encoder))


@torch.no_grad()
def test_a_saved_folder_holds_safetensors_and_json_and_replaces_what_was_there(
    folders, rows, tmp_path
):
    tokenizer = load_tokenizer(folders["bert"])
    model = eval_classifier(folders["bert"])
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "old.txt").write_text("old")
    save_model(model, tokenizer, tmp_path / "1")
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert tmp_path.joinpath("1").stat().st_mode & 0o055 == 0o055
    names = {path.name for path in (tmp_path / "1").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "classifier.json",
        "classifier.safetensors",
    } <= names
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
    monkeypatch.setattr(
        "model.save_file", lambda *_: (_ for _ in ()).throw(OSError("No space left on device"))
    )
    with pytest.raises(OSError):
        save_model(model, tokenizer, tmp_path / "1")
    assert {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_loaded_as_float32(folders, tmp_path, dtype):
    shutil.copytree(folders["bert"], tmp_path / "half")
    half = AutoModel.from_pretrained(folders["bert"]).to(dtype)
    half.save_pretrained(tmp_path / "half")
    assert {weight.dtype for weight in load_file(tmp_path / "half/model.safetensors").values()} == {
        dtype
    }
    encoder, pretrained = load_encoder(tmp_path / "half")
    floats = {
        weight.dtype for weight in encoder.state_dict().values() if weight.is_floating_point()
    }
    assert pretrained and floats == {torch.float32}
    assert all(
        torch.equal(weight.float(), encoder.state_dict()[name])
        for name, weight in half.state_dict().items()
    )


def test_a_missing_pooler_is_told_apart_from_missing_weights(folders, tmp_path):
    assert {family for family in FAMILIES if load_encoder(folders[family])[1]} == {
        "bert",
        "xlm-roberta",
        "roberta",
        "xlm-roberta-xl",
    }
    shutil.copytree(folders["bert"], tmp_path / "headless")
    change_weights(
        tmp_path / "headless",
        lambda weights: [weights.pop(f"pooler.dense.{end}") for end in ("weight", "bias")],
    )
    assert load_encoder(tmp_path / "headless")[1] is False


def test_the_revision_changes_with_the_weights(folders, tmp_path):
    first, other = (
        revision(load_encoder(name)[0], name)
        for name in (folders["bert"], make_model(tmp_path, seed=1))
    )
    assert len(first) == len(other) == 64 and first != other


# --- broken and hostile folders ----------------------------------------------------------------------------------


def change_weights(folder, change):
    """Rewrite model.safetensors with `change` applied to its {name: tensor}."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN_ENCODERS = {
    "no folder": lambda folder: shutil.rmtree(folder),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config is no JSON": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "bert"'
    ),
    "config is no object": lambda folder: (folder / "config.json").write_text("[1, 2]"),
    "unknown model": lambda folder: change_json(folder / "config.json", model_type="no-such-model"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "weights cut short": lambda folder: cut(folder / "model.safetensors"),
    "weights of another shape": lambda folder: change_json(
        folder / "config.json", intermediate_size=53
    ),
    "more blocks than weights": lambda folder: change_json(
        folder / "config.json", num_hidden_layers=6
    ),
    "one weight is missing": lambda folder: change_weights(
        folder, lambda weights: weights.pop("encoder.layer.2.output.dense.bias")
    ),
}


@pytest.mark.parametrize("kind", BROKEN_ENCODERS)
def test_a_broken_encoder_folder_is_one_sentence(folders, tmp_path, kind):
    folder = tmp_path / "broken"
    shutil.copytree(folders["bert"], folder)
    BROKEN_ENCODERS[kind](folder)
    message = fails(str(folder), load_encoder, folder)
    if kind == "one weight is missing":
        assert "lacks weights of BertModel: encoder.layer.2.output.dense.bias" in message


BROKEN_MODELS = {
    "no folder": lambda folder: shutil.rmtree(folder),
    "no classifier.json": lambda folder: (folder / "classifier.json").unlink(),
    "classifier.json is no JSON": lambda folder: (folder / "classifier.json").write_text("{head"),
    "classifier.json is no UTF-8": lambda folder: (folder / "classifier.json").write_bytes(
        b"\xff\xfe"
    ),
    "classifier.json is no object": lambda folder: (folder / "classifier.json").write_text("[]"),
    "a key is missing": lambda folder: (folder / "classifier.json").write_text(
        '{"head": "layers"}'
    ),
    "a key too many": lambda folder: change_json(folder / "classifier.json", more=1),
    "more layers": lambda folder: change_json(folder / "classifier.json", layers=[1, 2, 3, 4]),
    "a layer the encoder lacks": lambda folder: change_json(
        folder / "classifier.json", layers=[1, 3, 9]
    ),
    "layers of no sense": lambda folder: change_json(
        folder / "classifier.json", layers=["1", "3", "4"]
    ),
    "layers is a number": lambda folder: change_json(folder / "classifier.json", layers=3),
    "unknown pooling": lambda folder: change_json(folder / "classifier.json", pooling="median"),
    "unknown head": lambda folder: change_json(folder / "classifier.json", head="tail"),
    "unknown way to combine": lambda folder: change_json(folder / "classifier.json", combine="sum"),
    "another head": lambda folder: change_json(folder / "classifier.json", head="pooler"),
    "fewer labels": lambda folder: change_json(folder / "classifier.json", labels=LABELS[:2]),
    "hidden is no number": lambda folder: change_json(folder / "classifier.json", hidden="many"),
    "another hidden": lambda folder: change_json(folder / "classifier.json", hidden=7),
    "dropout above 1": lambda folder: change_json(folder / "classifier.json", dropout=2),
    "no classifier weights": lambda folder: (folder / "classifier.safetensors").unlink(),
    "classifier weights cut short": lambda folder: cut(folder / "classifier.safetensors"),
    "other classifier weights": lambda folder: save_file(
        {"bias": torch.zeros(3)}, folder / "classifier.safetensors"
    ),
    "encoder weights cut short": lambda folder: cut(folder / "model.safetensors"),
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
    assert {
        "fewer labels": "size mismatch for classifier.1.weight",
        "unknown pooling": "'median'",
        "unknown head": "'tail'",
        "a layer the encoder lacks": "layers 9: the model has layers 0 (embeddings) to 5",
    }.get(kind, "") in message


def test_a_baseline_without_its_pooler_is_refused_not_started_at_random(folders, tmp_path):
    save_model(
        eval_classifier(folders["bert"], head="pooler"),
        load_tokenizer(folders["bert"]),
        tmp_path / "1",
    )
    change_weights(tmp_path / "1", lambda weights: weights.pop("pooler.dense.weight"))
    fails("pooler", load_model, tmp_path / "1")


@pytest.mark.parametrize("model_type", ["bert", "no-such-model"])
def test_python_files_in_a_model_folder_never_run(folders, tmp_path, model_type):
    folder, marker = tmp_path / "hostile", tmp_path / "marker"
    shutil.copytree(folders["bert"], folder)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    change_json(
        folder / "config.json",
        model_type=model_type,
        auto_map={
            "AutoConfig": "evil.Evil",
            "AutoModel": "evil.Evil",
            "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        },
    )
    change_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    )
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
    torch.save(
        {**weights, "embeddings.word_embeddings.weight": Evil()} if hostile else weights,
        folder / "pytorch_model.bin",
    )
    fails(str(folder), load_encoder, folder)
    assert not marker.exists()


# --- prediction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_predictions_are_in_the_rows_own_order_whatever_the_batch_size(folders, rows, size):
    model = eval_classifier(folders["bert"]).train()
    encoded = Encoded(
        np.concatenate([ids for ids, _ in rows]).astype(np.int32),
        np.cumsum([0] + [len(ids) for ids, _ in rows]),
        np.array([second for _, second in rows], np.int32),
        np.arange(len(rows)) % 3,
    )
    logits = predict(model, eval_batches(encoded, 0, 13, size), len(rows), torch.float32)
    assert logits.dtype == np.float32 and not model.training
    with torch.no_grad():
        alone = torch.cat([model(batch_of([row])) for row in rows]).numpy()
    np.testing.assert_allclose(logits, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_logits_that_are_not_finite_and_tokens_that_are_not_in_the_table_are_refused(folders, rows):
    model = eval_classifier(folders["bert"])
    encoded = Encoded(
        np.arange(5, 9, dtype=np.int32), np.array([0, 4]), np.array([4]), np.array([0])
    )
    model.classifier[-1].bias[1] = torch.inf
    fails(
        "dev de: the model gives logits that are not finite",
        predict,
        model,
        eval_batches(encoded, 0, 13),
        1,
        torch.float32,
        "dev de",
    )
    size = model.encoder.get_input_embeddings().num_embeddings
    check_tokens(model.encoder, np.array([3, size - 1]))
    for check in (check_tokens, lambda *a: keep_tokens(*a, 0)):
        fails(
            f"the tokenizer gives token {size}, the encoder knows {size}",
            check,
            model.encoder,
            np.array([3, size]),
        )
