"""Processes started by torchrun, with NCCL on CUDA and gloo on the CPU."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .device import check_device
from .distributed import world_size
from .errors import UserError


@contextlib.contextmanager
def process_group(device: str) -> Iterator[str]:
    """Context manager that joins the process group and yields this process's device: under torchrun, its own GPU.

    Raises:
        UserError: there is no GPU, there are more local processes than GPUs, or `device` names a specific GPU.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: under torchrun use cpu, or cuda to give each process its own GPU")
    if device == "cuda":
        check_device(device)
        local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
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
    distributed.broadcast_buffers = False  # equal now; later synchronized by broadcast_buffers(), not in every step
    return distributed


def default_workers() -> int:
    """This rank's share of the cores available to the process, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
