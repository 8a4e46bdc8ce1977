"""The device, the precision of matrix products, and the processes of torchrun."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from lib.messages import UserError


def pick_device():
    """The GPU of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return torch.device("cpu")


def pick_precision(name, device):
    """The dtype of matrix products.

    "auto" is bf16 where the hardware multiplies it, fp16 on older GPUs, else fp32.
    """
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        name = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device, dtype):
    """Matrix products in `dtype`, weights and sums in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def to_device(batch, device):
    """A batch of data.collate() as tensors on `device`, copied while the device computes."""
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    if device.type == "cuda":
        for key, value in tensors.items():
            tensors[key] = value.pin_memory().to(device, non_blocking=True)
    return tensors


def start_processes():
    """Join the processes of torchrun, when there are several. Returns (rank, how many)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise UserError(
                f"WORLD_SIZE is {world} and RANK is not set: start with torchrun, or unset it"
            )
        if torch.cuda.is_available():
            if pick_device().index >= torch.cuda.device_count():
                raise UserError(
                    "torchrun started more processes than there are GPUs, "
                    f"{torch.cuda.device_count()}: lower --nproc-per-node"
                )
            torch.cuda.set_device(pick_device())
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # one process may evaluate or search for long while the others wait
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return dist.get_rank(), world


def describe_device():
    """Where the work is done, in words."""
    world = start_processes()[1]
    if world > 1:
        return f"{world} processes on {pick_device().type}"
    return str(pick_device())


def wait_for_all():
    """No process goes on before all are here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value):
    """The first process's `value`, a number, in every process; all wait for each other here."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(float(value), device=pick_device())
    wait_for_all()  # a broadcast alone does not hold the first process
    dist.broadcast(shared, 0)
    return type(value)(shared.item())
