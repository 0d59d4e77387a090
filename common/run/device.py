"""Opening the device to train on."""

import os

import torch

from .errors import UserError

AMP = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}  # the type that autocast computes in


def check_device(name: str) -> None:
    """Raise a UserError if there is no such device, without opening it."""
    try:
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError("there are fewer")
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"networks are not trained on {device.type}")
    except RuntimeError as error:
        raise UserError(f"there is no device {name!r} here: try --device cpu") from error


def open_device(name: str, one_size: bool = True) -> torch.device:
    """The device "cpu", "cuda", "cuda:N" or "mps".

    Args:
        one_size: whether batches all have one size, but for the last of an epoch. Then cuDNN looks for its fastest
            algorithms, which it would do anew for each size.

    Raises:
        UserError: it is not there.
    """
    check_device(name)
    device = torch.device(name)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r} here: try --device cpu") from error
    torch.backends.cudnn.benchmark = one_size
    return device


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
