"""Ranks and collectives under torchrun.

Without torchrun there is one process with rank 0, and the collectives are no-ops.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """The rank of this process."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def world_size() -> int:
    """The number of processes in the job."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def broadcast(value: Any, device: torch.device | None = None) -> Any:
    """Return rank 0's `value` on every rank."""
    if not dist.is_initialized():
        return value
    objects = [value]
    dist.broadcast_object_list(objects, src=0, device=device)
    return objects[0]


def all_gather(value: Any) -> list[Any]:
    """Return the `value` of every rank on every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    objects = [None] * world_size()
    dist.all_gather_object(objects, value)
    return objects


def all_reduce(values: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """Reduce a tensor over all ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(values, op)
    return values


def broadcast_buffers(nets: Iterable[nn.Module]) -> None:
    """Copy rank 0's buffers to every rank: BatchNorm statistics differ because each rank has its own images."""
    if dist.is_initialized():
        for net in nets:
            for buffer in net.buffers():
                dist.broadcast(buffer, src=0)
