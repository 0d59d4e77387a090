"""The device to train on, and the precision."""

import os
from argparse import Namespace
from pathlib import Path

import torch

from .errors import UserError

AMP = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}  # autocast dtype
DEVICE_FILE = Path("/dev/nvidiactl")  # of NVIDIA's driver


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_amp(device: str) -> tuple[str, str]:
    """The precision to train in on `device`, a key of AMP, and the reason."""
    if device.startswith("cuda"):
        return "fp16", "the default on CUDA"
    if not device.startswith("cpu"):
        return "off", "the default on this device"
    if torch.cpu._is_avx512_bf16_supported():  # CPUs with AMX have it too
        return "bf16", "this CPU has AVX512-BF16"
    return "off", "this CPU lacks AVX512-BF16"


def describe_device(args: Namespace) -> str:
    """The device and the precision of a run, with the reason for a default."""
    device, amp = args.device, f"amp {args.amp}"
    has_gpu = DEVICE_FILE.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ
    if device == "cpu" and "device" not in args.given and has_gpu and not torch.cuda.is_available():
        reason = "its driver may be too old" if torch.version.cuda else "this build has no CUDA"
        device += f" (PyTorch {torch.__version__} cannot use the NVIDIA GPU: {reason})"
    if "amp" not in args.given and not args.resume:
        amp += f" ({default_amp(args.device)[1]})"
    if args.amp == "fp16" and device.startswith("cpu"):
        amp += " (very slow on a CPU: use bf16 or off)"
    return f"{device}, {amp}"


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
    if device.type == "cpu":
        # Freeing a block of just under 32 MiB, its maximum, raises the size below which glibc keeps freed memory.
        # Otherwise, every step would get its memory from the system, with page faults.
        torch.empty(2**25 - 2**12, dtype=torch.uint8)
    torch.backends.cudnn.benchmark = fixed_size
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # PyTorch's default for convolutions is TF32
    return device


def _no_device(name: str, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(f"there is no device {name!r} here ({reason}): try --device cpu")
