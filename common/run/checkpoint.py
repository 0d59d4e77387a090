"""Checkpoints: atomic writes, safe loading, and the formats of published checkpoints."""

import argparse
import contextlib
import io
import os
import pickle
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from .errors import NetworkMismatchError, UserError

STATE_DICT_KEYS = ("model", "state_dict", "net", "model_state_dict")  # in order of preference
# Harmless types in published checkpoints, besides the weights, that weights_only loading must allow.
SAFE_GLOBALS = [
    argparse.Namespace,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np._core.multiarray.scalar,
    np.dtype,
    *(type(np.dtype(t)) for t in (np.float32, np.float64, np.int64)),
]


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Replace `path` by calling `write` on an open file. A kill at any time leaves either the old or the new file.

    Raises:
        UserError: the file cannot be written (missing folder, no permission, full disk); the old file is kept.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path} ({error}): free some space or choose another --out") from error
        raise


def save(obj: Any, path: Path) -> None:
    """Atomic torch.save, through memory: torch.save to a file masks errors such as a full disk or Ctrl-C."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load(path: str | Path) -> Any:
    """torch.load to the CPU without executing code from the file.

    Raises:
        UserError: the file is missing, a directory, unreadable or damaged, or needs unpickling of arbitrary objects.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE_GLOBALS):
            warnings.simplefilter("ignore")  # about old formats, which still load
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}: check the path") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error}): give a readable checkpoint file") from error
    except pickle.UnpicklingError as error:
        reason = "is damaged or contains objects that would execute code when unpickled (nothing was run)"
        raise UserError(f"{path} {reason}: use another copy, or one saved as a plain state dict") from error
    except Exception as error:  # torch.load raises many kinds of exceptions on damaged files
        raise UserError(f"{path} is not a valid checkpoint (it may be truncated): use another copy") from error


def load_network(net: nn.Module, path: str | Path, name: str) -> None:
    """Load a checkpoint file strictly into the network `name`. Raises as `read_weights` and `load_weights`."""
    load_weights(net, read_weights(path), path, name)


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Load a checkpoint file and return its state dict. Raises as `load` and `weights_of`."""
    return weights_of(load(path), path)


def weights_of(content: Any, path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint's content, bare or under one of STATE_DICT_KEYS, without DataParallel's "module.".

    Raises:
        UserError: there is no state dict, or it has non-finite values.
    """
    content = content if isinstance(content, dict) else {}
    nested = [content[key] for key in STATE_DICT_KEYS if isinstance(content.get(key), dict)]
    weights = nested[0] if nested else content
    if not weights or not all(map(_is_weight, weights.items())):
        hint = "use the run's student.pth" if "student" in weights else "use another file"
        raise UserError(f"{path} contains no state dict, bare or under {', '.join(STATE_DICT_KEYS)}: {hint}")
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    if bad := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise UserError(f"{path} has non-finite values in {bad[0]}: use another checkpoint")
    return weights


def load_weights(net: nn.Module, weights: dict[str, torch.Tensor], path: str | Path, name: str) -> None:
    """Load the weights read from the file `path` strictly into the network `name`.

    Raises:
        UserError: the weights are those of a SimKD student, but `net` is a plain network.
        NetworkMismatchError: the weights are for another network or number of classes.
    """
    if any(key.startswith("projector.") for key in weights) and not hasattr(net, "projector"):
        raise UserError(
            f"{path} is a SimKD student, not a plain network: only --evaluate can read it, with cifar100.py --simkd or "
            "ablations/baseline_cifar100.py --method simkd"
        )
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        difference = textwrap.shorten(str(error).partition("\n")[2], 200)
        raise NetworkMismatchError(f"{path} does not match {name} with this number of classes: {difference}") from error


def _is_weight(item: tuple[Any, Any]) -> bool:
    """Whether a key and value can belong to a network: a dense float tensor or a batch count."""
    key, value = item
    if not isinstance(key, str) or not torch.is_tensor(value) or value.layout != torch.strided or value.is_meta:
        return False
    return value.is_floating_point() or (key.endswith("num_batches_tracked") and value.dtype == torch.int64)
