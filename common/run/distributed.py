"""Distributed training under torchrun, with NCCL on CUDA and gloo on the CPU.

Without torchrun there is one process with rank 0, and the collectives are no-ops.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError


def rank() -> int:
    """The rank of this process."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def world_size() -> int:
    """The number of processes in the job."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


@contextlib.contextmanager
def process_group(device: str) -> Iterator[str]:
    """Context that joins the process group and yields this process's device: under torchrun, its own GPU.

    Raises:
        UserError: there are more local processes than GPUs, or `device` names a specific GPU.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: under torchrun use cpu, or cuda, with which each process gets its own GPU")
    if device == "cuda":
        local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if not num_gpus:
            raise UserError("there is no device 'cuda' here: try --device cpu")
        if local_rank >= num_gpus:
            raise UserError(f"there are only {num_gpus} GPUs here: start torchrun with --nproc_per_node={num_gpus}")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    yield device
    dist.destroy_process_group()  # not after an error: it could block on unfinished collectives


def distribute(step: nn.Module, some_unused: bool) -> nn.Module:
    """Wrap `step` in DistributedDataParallel: starts from rank 0's state and averages gradients over all ranks.

    Args:
        some_unused: whether some parameters get no gradient in some steps, such as a bridge whose path is not sampled.
            DDP must then search for them (find_unused_parameters), which synchronizes with the device once per step.
            Their gradient stays None, so the optimizer does not update them.
    """
    if not dist.is_initialized() or world_size() == 1:
        return step
    distributed = DistributedDataParallel(step, find_unused_parameters=some_unused)
    distributed.broadcast_buffers = False  # equal now; later broadcast_buffers() syncs them, not every step
    return distributed


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


def all_reduce_mean(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Average each number over all ranks."""
    if not dist.is_initialized():
        return values
    total = all_reduce(torch.tensor(list(values.values()), dtype=torch.float64, device=device))
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


def broadcast_buffers(nets: Iterable[nn.Module]) -> None:
    """Copy rank 0's buffers to every rank: BatchNorm statistics differ, since each rank has its own images."""
    if dist.is_initialized():
        for net in nets:
            for buffer in net.buffers():
                dist.broadcast(buffer, src=0)
