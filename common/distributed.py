"""Several processes on one training job, started by torchrun: on NCCL with CUDA, on gloo without.

Without torchrun there is one process, of rank 0, and nothing here does anything.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError


def rank() -> int:
    """The number of this process among all, from 0."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def world() -> int:
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


@contextlib.contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the others, and leave them at the end; gives the device of this process: under torchrun each has a GPU.

    Raises:
        UserError: there are more processes than GPUs here, or `device` is a certain one.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: under torchrun it is cpu, or cuda, and each process takes its own GPU")
    if device == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if not there:
            raise UserError("there is no device 'cuda' here: try --device cpu")
        if local >= there:
            raise UserError(f"there are only {there} GPUs here: start torchrun with --nproc_per_node={there}")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    yield device
    dist.destroy_process_group()  # not after an error: others may be waiting for this process


def from_rank_0(value: Any, device: torch.device) -> Any:
    """What rank 0 has for `value`, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def share_buffers(nets: Iterable[nn.Module]) -> None:
    """Give every rank rank 0's buffers: each rank's BatchNorm statistics are of its own images."""
    if dist.is_initialized():
        for net in nets:
            for buffer in net.buffers():
                dist.broadcast(buffer, src=0)
