"""cpu.py against PyTorch's dropout and transformers' attention."""

import pytest
import torch
from lib.cpu import Dropout, attention, make_fast, random_bits
from transformers import AutoConfig, AutoModel
from transformers.models.bert import modeling_bert

from lib import cpu

SIZES = dict(
    vocab_size=60,
    hidden_size=36,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=52,
    pad_token_id=0,
)
FAMILIES = {  # {type: (settings, whether it takes cpu's attention)}
    "bert": ({}, True),
    "xlm-roberta": ({}, True),
    "distilbert": (dict(dim=36, n_layers=3, n_heads=3, hidden_dim=52), True),
    "electra": (dict(embedding_size=20), True),
    "modernbert": (
        dict(global_attn_every_n_layers=2, local_attention=6),
        True,
    ),  # a window of 3 to each side
    "eurobert": (
        dict(num_attention_heads=6, num_key_value_heads=2, head_dim=6),
        True,
    ),  # heads that share keys
    "mpnet": ({}, False),  # with an attention of its own, as DeBERTa
    "deberta-v2": (dict(relative_attention=True, pos_att_type=["p2c", "c2p"]), False),
    "nomic_bert": (dict(head_dim=12), True),
}


def states(encoder, **padded):
    ids = torch.randint(5, 60, (4, 23), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(23) < torch.tensor([23, 9, 1, 16])[:, None]).long()
    with torch.no_grad():
        hidden = encoder.eval()(
            input_ids=ids * mask, attention_mask=mask, output_hidden_states=True
        ).hidden_states
    return torch.stack(hidden)[:, mask.bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fast_encoder_gives_the_same_states_and_all_its_dropout_is_the_fast_kind(family):
    settings, takes = FAMILIES[family]
    names = {
        key: value
        for key, value in SIZES.items()
        if family != "distilbert" or key.endswith(("_size", "_id"))
    }
    torch.manual_seed(0)
    encoder = AutoModel.from_config(AutoConfig.for_model(family, **{**names, **settings}))
    expected, model = states(encoder), torch.nn.Sequential(encoder, torch.nn.Dropout(0.2))
    make_fast(model)
    torch.testing.assert_close(states(encoder), expected, rtol=0, atol=1e-5)
    assert (encoder.config._attn_implementation == "cpu.py") == takes
    kinds = {type(module) for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert kinds == {Dropout} and model[1].p == 0.2
    encoder.train()(input_ids=torch.full((2, 7), 9)).last_hidden_state.sum().backward()


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_attention_and_its_gradient_are_those_of_transformers(dropout, dtype, atol, monkeypatch):
    random = torch.Generator().manual_seed(0)
    query, key, value, factor = (
        torch.randn(2, 3, 7, 5, generator=random).to(dtype) for _ in range(4)
    )
    padding = torch.arange(7)[None, None, None] >= torch.tensor([7, 4])[:, None, None, None]
    mask = torch.zeros(2, 1, 7, 7).masked_fill(padding, torch.finfo(torch.float32).min)
    kept = {}

    def keep_mask(*_):
        return kept.setdefault("mask", torch.rand(2, 3, 7, 7, generator=random) >= 0.25)

    def same_dropout(weights, p=0.0, training=True):  # transformers' dropout, with our mask
        return weights * kept["mask"] / (1 - p) if p else weights

    def results(function):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output, _ = function(torch.nn.Module(), *inputs, mask, scaling=0.3, dropout=dropout)
        (output.transpose(1, 2) * factor).float().sum().backward()
        return [output, *(x.grad for x in inputs)]

    monkeypatch.setattr(cpu, "keep_mask", keep_mask)
    mine = results(attention)
    monkeypatch.setattr(modeling_bert.nn.functional, "dropout", same_dropout)
    for a, b in zip(mine, results(modeling_bert.eager_attention_forward)):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_random_bits_are_fair_independent_and_the_generators_own():
    count = 200_003
    torch.manual_seed(5)
    first, second = (random_bits(count, torch.device("cpu")) for _ in range(2))
    torch.manual_seed(5)
    assert (
        torch.equal(first, random_bits(count, torch.device("cpu"))) and len(first.unique()) == count
    )
    signs = torch.stack(
        [((bits >> place) & 1) * 2.0 - 1 for bits in (first, second) for place in range(64)]
    )
    limit = 6 / count**0.5  # six standard deviations
    assert signs.mean(1).abs().max() < limit
    for lag in (
        0,
        1,
        2,
        7,
        96,
        192,
    ):  # between places, neighbours, rows of a small and of a large encoder, and calls
        shared = signs[:, lag:] @ signs[:, : count - lag].T / count
        assert (shared - torch.eye(128) * (lag == 0)).abs().max() < limit


def test_dropout_scales_what_it_keeps_and_its_gradient_alike():
    layer, x = Dropout(0.3), torch.ones(37, 53, requires_grad=True)
    torch.manual_seed(0)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, x.grad) and set(y.unique().tolist()) == {0.0, y.max().item()}
    assert y.max().item() == pytest.approx(1 / 0.7, rel=1e-4) and y.mean().item() == pytest.approx(
        1, abs=0.06
    )
    assert torch.equal(layer.eval()(x), x) and torch.equal(Dropout(0.0)(x), x)
