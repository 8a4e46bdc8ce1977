"""What the scripts ask of the machine: its device, precision and processes, and what makes a CPU fast.

Read by the scripts, run by none.
"""
import contextlib
import ctypes
import math
import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.utils import logging as transformers_logging

from files import UserError, first_line

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


# --- device and precision ----------------------------------------------------------------------------------------

def pick_device():
    """The GPU of this process where there is one, else the CPU."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def pick_precision(name, device):
    """The dtype of matrix products: "auto" is bf16 where the hardware multiplies it, fp16 on older GPUs, else fp32."""
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            name = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"
    if name not in ("fp32", "bf16", "fp16"):
        raise UserError(f"precision {name!r}: expected auto, fp32, bf16 or fp16")
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device, dtype):
    """Matrix products in `dtype`, weights and sums in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def to_device(batch, device):
    """A batch of collate() as tensors on `device`, copied while the device computes."""
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    if device.type == "cuda":
        tensors = {key: value.pin_memory().to(device, non_blocking=True) for key, value in tensors.items()}
    return tensors


@contextlib.contextmanager
def out_of_memory(advice):
    """Turn running out of memory into one sentence that ends with `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        what = next(part for part in first_line(error).split(". ") if "memory" in part)
        raise UserError(f"out of memory on {pick_device()} ({what}): {advice}") from None


def versions():
    """What this runs on, for the records."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}


# --- the processes of torchrun -----------------------------------------------------------------------------------

def start_processes():
    """Join the processes of torchrun, when there are several. Returns (rank, how many there are)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(pick_device())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo",
                                timeout=timedelta(days=7))  # one may evaluate or search while the others wait
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def agree(value):
    """The first process's `value`, a number, in every process of torchrun; all wait for each other here."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(float(value), device=pick_device())
    dist.barrier()  # a broadcast alone does not hold the first process
    dist.broadcast(shared, 0)
    return type(value)(shared.item())


# --- fast on a CPU -----------------------------------------------------------------------------------------------

def keep_memory():
    """Let the process keep memory that it frees. glibc hands it back to the kernel at every step otherwise, which
    clears it anew each time: up to a tenth of the time of a search, an extraction or a training step on a CPU."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the highest that every version takes
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


keep_memory()


def random_bits(count, device, generator=None):
    """(count,) int64 of random bits: a counter that starts where torch's generator says, each number mixed by
    multiplications and shifts ("xmxmx", Maiga 2020). On a CPU in half the time of drawing them all."""
    start = torch.empty((), dtype=torch.int64, device=device).random_(-2 ** 63, None, generator=generator)
    bits = torch.arange(count, device=device).mul_(-0x61c8864680b583eb).add_(start)
    low, high = bits.view(torch.int32).view(-1, 2).unbind(1)  # of little-endian numbers; low ^= high shifts by 32
    for _ in range(2):
        low ^= high
        bits *= 0x0e9846af9b1a615d
    low ^= high
    return bits


def keep_mask(shape, dropout, device, generator=None):
    """Dropout's mask, 1 where a value is kept, int16. 16 random bits decide each (the rate is rounded to 1/65536): on a
    CPU the random numbers of nn.Dropout cost a tenth of a training step and more, these a fraction of that."""
    count = math.prod(shape)
    bits = random_bits(-(-count // 4), device, generator).view(torch.int16)[:count].view(shape)
    return bits.ge_(round(dropout * 65536) - 32768)  # in place: a tensor of booleans takes four times as long


def drop(x, dropout):
    """Dropout of a tensor with keep_mask()."""
    return x * keep_mask(x.shape, dropout, x.device).to(x.dtype).mul_(1 / (1 - round(dropout * 65536) / 65536))


class Dropout(nn.Dropout):
    """nn.Dropout with drop() on a CPU."""

    def forward(self, x):
        fast = self.training and self.p and x.device.type == "cpu"
        return drop(x, self.p) if fast else super().forward(x)


def attention(module, query, key, value, mask, scaling, dropout=0.0, **_):
    """What encoders call on a CPU: transformers' eager attention with drop(), in the products' precision throughout.

    query, key, value: (B, heads, T, D / heads); mask: (B, 1, T, T), added to the scores, or None.
    """
    with torch.autocast("cpu", enabled=False):  # softmax sums in float32 whatever it is given
        scores = (query * scaling) @ key.transpose(2, 3)
        weights = (scores if mask is None else scores + mask.to(scores.dtype)).softmax(-1)
        weights = drop(weights, dropout) if dropout else weights
        return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("cpu", attention)
AttentionMaskInterface.register("cpu", eager_mask)
