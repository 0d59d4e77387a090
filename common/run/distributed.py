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
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError


def rank() -> int:
    """The number of this process among all, from 0."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


@contextlib.contextmanager
def process_group(device: str) -> Iterator[str]:
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
    dist.destroy_process_group()  # not after an error: it could hang behind what others have not finished


def distribute(step: nn.Module, some_unused: bool) -> nn.Module:
    """`step` such that its backward averages the gradients over all ranks; all start from rank 0's state.

    Args:
        some_unused: whether some parameters go without gradient in some steps, as those of a bridge whose path is not
            drawn. They must be looked for, or the ranks would wait for them; the search makes the host wait for the
            device once in a step. Their gradient stays None, so the optimizer leaves them alone.
    """
    if not dist.is_initialized() or world_size() == 1:
        return step
    distributed = DistributedDataParallel(step, find_unused_parameters=some_unused)
    distributed.broadcast_buffers = False  # now they are equal; later share_buffers sees to it, not every step
    return distributed


def broadcast(value: Any, device: torch.device | None = None) -> Any:
    """What rank 0 has for `value`, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]


def all_gather(value: Any) -> list[Any]:
    """What each rank has for `value`, on every rank."""
    if not dist.is_initialized():
        return [value]
    box = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def all_reduce(values: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """The sum of a tensor over all ranks, or its largest values, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values, op)
    return values


def all_reduce_mean(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each number over all ranks, on every rank."""
    if not dist.is_initialized():
        return values
    total = all_reduce(torch.tensor(list(values.values()), dtype=torch.float64, device=device))
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


def broadcast_buffers(nets: Iterable[nn.Module]) -> None:
    """Give every rank rank 0's buffers: each rank's BatchNorm statistics are of its own images."""
    if dist.is_initialized():
        for net in nets:
            for buffer in net.buffers():
                dist.broadcast(buffer, src=0)
