"""The device to train on."""

import torch

from .errors import UserError

AMP = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}  # autocast dtype


def check_device(name: str) -> None:
    """Raise a UserError if the device does not exist, without initializing it."""
    try:
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError("no GPU with this index")
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"training on {device.type} is not supported")
    except RuntimeError as error:
        raise UserError(f"there is no device {name!r} here: try --device cpu") from error


def open_device(name: str, fixed_size: bool = True) -> torch.device:
    """Initialize the device "cpu", "cuda", "cuda:N" or "mps".

    Args:
        fixed_size: whether all batches except an epoch's last have the same size. If so, cuDNN benchmarks its
            algorithms, which it would have to repeat for every new size.

    Raises:
        UserError: the device does not exist.
    """
    check_device(name)
    device = torch.device(name)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r} here: try --device cpu") from error
    torch.backends.cudnn.benchmark = fixed_size
    return device
