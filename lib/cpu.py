"""What makes a CPU fast: one function, called once. Delete this file and the lines that call it,
and everything still works.

Measured: experiments/RESULTS.md, "The CPU's own dropout and attention"."""

import math

import torch
import torch.nn as nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask


def make_fast(model):
    """Give a finished model, with weights loaded, this file's dropout and attention.

    DeBERTa, which has an attention of its own, keeps it.
    """
    AttentionInterface.register("cpu.py", attention)
    AttentionMaskInterface.register("cpu.py", eager_mask)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation("cpu.py")
        if type(module) is nn.Dropout:
            module.__class__ = Dropout


def random_bits(count, device):
    """(count,) int64 of random bits, in half the time of drawing them all.

    A counter that starts where torch's generator says, each number mixed by multiplications and
    shifts ("xmxmx", Maiga 2020).
    """
    start = torch.empty((), dtype=torch.int64, device=device).random_(-(2**63), None)
    bits = torch.arange(count, device=device).mul_(-0x61C8864680B583EB).add_(start)
    low, high = bits.view(torch.int32).view(-1, 2).unbind(1)  # of little-endian numbers
    for _ in range(2):
        low ^= high  # bits ^= bits >> 32
        bits *= 0x0E9846AF9B1A615D
    low ^= high
    return bits


def keep_mask(shape, dropout, device):
    """Dropout's mask, 1 where a value is kept, int16; 16 random bits decide each."""
    count = math.prod(shape)
    bits = random_bits(-(-count // 4), device).view(torch.int16)[:count].view(shape)
    # in place: a tensor of booleans takes four times as long
    return bits.ge_(round(dropout * 65536) - 32768)


def drop(x, dropout):
    """Dropout of a tensor, its rate rounded to 1/65536."""
    kept = 1 - round(dropout * 65536) / 65536
    return x * keep_mask(x.shape, dropout, x.device).to(x.dtype).mul_(1 / kept)


class Dropout(nn.Dropout):
    """nn.Dropout with drop()."""

    def forward(self, x):
        if self.training and self.p:
            return drop(x, self.p)
        return x


def attention(module, query, key, value, mask, scaling, dropout=0.0, **_):
    """transformers' eager attention with drop(), in the products' precision throughout.

    query, key, value: (B, heads, T, D / heads), fewer heads of the latter two where some share one;
    mask: (B, 1, T, T), added to the scores, or None.
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key = key.repeat_interleave(shared, dim=1)
        value = value.repeat_interleave(shared, dim=1)
    with torch.autocast("cpu", enabled=False):  # softmax sums in float32 whatever it is given
        scores = (query * scaling) @ key.transpose(2, 3)
        if mask is not None:
            scores = scores + mask.to(scores.dtype)
        weights = scores.softmax(-1)
        if dropout:
            weights = drop(weights, dropout)
        return (weights @ value).transpose(1, 2).contiguous(), weights
