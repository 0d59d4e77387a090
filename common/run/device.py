"""The device to train on."""

import torch

from .errors import UserError

AMP = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}  # autocast dtype


def check_device(name: str) -> None:
    """Raise a UserError if the device does not exist."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"training on {device.type} is not supported")
        if device.type == "cuda" and (device.index or 0) >= (gpus := torch.cuda.device_count()):
            if not gpus:
                torch.cuda.init()  # raises the reason
            raise RuntimeError(f"PyTorch finds {gpus} GPUs")
    except (RuntimeError, AssertionError) as error:
        raise _no_device(name, error) from error


def open_device(name: str, fixed_size: bool = True) -> torch.device:
    """Initialize the device "cpu", "cuda", "cuda:N" or "mps", and make it the current one.

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
        if device.type == "cuda":
            torch.cuda.set_device(device)  # for events and pinned memory
    except (RuntimeError, AssertionError) as error:
        raise _no_device(name, error) from error
    torch.backends.cudnn.benchmark = fixed_size
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # PyTorch's default for convolutions is TF32
    return device


def _no_device(name: str, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(f"there is no device {name!r} here ({reason}): try --device cpu")
