"""lib/cpu.py against PyTorch's dropout and transformers' attention."""

import pytest
import torch
from families import SIZES
from transformers import AutoConfig, AutoModel
from transformers.models.bert import modeling_bert

from lib import cpu
from lib.cpu import Dropout, attention, make_fast, random_bits

FAMILIES = {  # {type: what tells it from BERT}
    "bert": {},
    "distilbert": dict(n_heads=3, hidden_dim=52),
    "modernbert": dict(global_attn_every_n_layers=2, local_attention=6),  # a window to each side
    "eurobert": dict(num_attention_heads=6, num_key_value_heads=2, head_dim=6),  # shared keys
    "deberta-v2": dict(relative_attention=True, pos_att_type=["p2c", "c2p"]),  # its own attention
}


def states(encoder):
    ids = torch.randint(5, 60, (4, 23), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(23) < torch.tensor([23, 9, 1, 16])[:, None]).long()
    inputs = dict(input_ids=ids * mask, attention_mask=mask, output_hidden_states=True)
    with torch.no_grad():
        return torch.stack(encoder.eval()(**inputs).hidden_states)[:, mask.bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fast_encoder_gives_the_same_states_and_all_its_dropout_is_the_fast_kind(family):
    sizes = {"vocab_size": 60, "pad_token_id": 0, **SIZES, **FAMILIES[family]}
    if family == "distilbert":
        del sizes["num_attention_heads"], sizes["intermediate_size"]
    torch.manual_seed(0)
    encoder = AutoModel.from_config(AutoConfig.for_model(family, **sizes))
    expected, model = states(encoder), torch.nn.Sequential(encoder, torch.nn.Dropout(0.2))
    make_fast(model)
    torch.testing.assert_close(states(encoder), expected, rtol=0, atol=1e-5)
    assert (encoder.config._attn_implementation == "cpu.py") == (family != "deberta-v2")
    kinds = {type(module) for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert kinds == {Dropout} and model[1].p == 0.2
    encoder.train()(input_ids=torch.full((2, 7), 9)).last_hidden_state.sum().backward()


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_attention_and_its_gradient_are_those_of_transformers(dropout, dtype, atol, monkeypatch):
    random = torch.Generator().manual_seed(0)
    *inputs, factor = torch.randn(4, 2, 3, 7, 5, generator=random).to(dtype)
    kept = torch.rand(2, 3, 7, 7, generator=random) >= 0.25
    padding = torch.arange(7)[None, None, None] >= torch.tensor([7, 4])[:, None, None, None]
    mask = torch.zeros(2, 1, 7, 7).masked_fill(padding, torch.finfo(torch.float32).min)

    def same_dropout(weights, p=0.0, training=True):  # transformers' dropout, with our mask
        return weights * kept / (1 - p) if p else weights

    def results(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output, _ = function(torch.nn.Module(), *leaves, mask, scaling=0.3, dropout=dropout)
        (output.transpose(1, 2) * factor).float().sum().backward()
        return [output, *(x.grad for x in leaves)]

    monkeypatch.setattr(cpu, "keep_mask", lambda *_: kept)
    monkeypatch.setattr(modeling_bert.nn.functional, "dropout", same_dropout)
    expected = results(modeling_bert.eager_attention_forward)
    torch.testing.assert_close(results(attention), expected, rtol=0, atol=atol)


def test_random_bits_are_fair_independent_and_the_generators_own():
    count, device = 200_003, torch.device("cpu")
    torch.manual_seed(5)
    first, second = random_bits(count, device), random_bits(count, device)
    torch.manual_seed(5)
    assert torch.equal(first, random_bits(count, device)) and len(first.unique()) == count
    signs = []
    for bits in (first, second):
        signs += [((bits >> place) & 1) * 2.0 - 1 for place in range(64)]
    signs, limit = torch.stack(signs), 6 / count**0.5  # six standard deviations
    assert signs.mean(1).abs().max() < limit
    # between places, neighbours, rows of a small and of a large encoder, and calls
    for lag in (0, 1, 2, 7, 96, 192):
        shared = signs[:, lag:] @ signs[:, : count - lag].T / count
        assert (shared - torch.eye(128) * (lag == 0)).abs().max() < limit


def test_dropout_scales_what_it_keeps_and_its_gradient_alike():
    layer, x = Dropout(0.3), torch.ones(37, 53, requires_grad=True)
    torch.manual_seed(0)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, x.grad) and set(y.unique().tolist()) == {0.0, y.max().item()}
    assert y.max().item() == pytest.approx(1 / 0.7, rel=1e-4)
    assert y.mean().item() == pytest.approx(1, abs=0.06)
    assert torch.equal(layer.eval()(x), x) and torch.equal(Dropout(0.0)(x), x)
