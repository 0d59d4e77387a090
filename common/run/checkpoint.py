"""Files that are whole or absent: atomic writes, loads that execute nothing, and the field's shared format.

The shared format is a dictionary whose "model" is the state dict of a plain network; anything may stand beside it.
"""

import argparse
import contextlib
import http.client
import io
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn
from torchvision import models

from .errors import OtherNetworkError, UserError

# Harmless things that stand in shared checkpoints beside the weights, and that PyTorch's safe loader must be told of.
SAFE = [
    argparse.Namespace,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np._core.multiarray.scalar,
    np.dtype,
    *(type(np.dtype(t)) for t in (np.float32, np.float64, np.int64)),
]


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Replace `path` by what `write` puts into an open file; killed at any moment, the old or the new is whole.

    Raises:
        UserError: the file cannot be written (folder missing, not writable, disk full); the old one stays.
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
            raise UserError(f"cannot write {path} ({error}): make room or choose another --out") from error
        raise


def save(obj: Any, path: Path) -> None:
    """torch.save, atomically. Through memory, since torch.save into a file disguises a full disk and Ctrl-C."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load(path: str | Path) -> Any:
    """torch.load to the CPU without executing anything that is in the file.

    Raises:
        UserError: missing, a directory, unreadable, damaged, or in need of unpickling arbitrary objects.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE):
            warnings.simplefilter("ignore")  # about formats of other times, which load all the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}: check the path") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a directory: name the checkpoint file in it") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error}): check its permissions") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or holds objects that only running code from it could restore (nothing was run): "
            "use another copy, or one saved as a plain state dict"
        ) from error
    except Exception as error:  # a damaged file can make the loader stumble over anything
        raise UserError(f"{path} cannot be read as a checkpoint, it may be cut short: use another copy") from error


def torchvision_weights(name: str, version: str, option: str = "--teacher-ckpt") -> Path:
    """The file of torchvision's weights for the network `name`, downloaded into PyTorch's cache if it is not there.

    Args:
        option: what takes a file of the user's instead.

    Raises:
        UserError: it cannot be downloaded, or what came is damaged.
    """
    url = models.get_model_weights(name)[version].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        digest = path.stem.rpartition("-")[2]  # its name ends with the start of its SHA-256
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(
                f"could not download torchvision's {name} ({error}): check the network, or put {url} at {path}, or "
                f"give {option}"
            ) from error
    return path


def load_network(net: nn.Module, path: str | Path, name: str) -> None:
    """Load a network in the shared format, a bare state dict, or either of them saved from DataParallel, strictly.

    Raises:
        UserError: as `read_weights` and `load_weights`.
    """
    load_weights(net, read_weights(path), path, name)


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of the shared format, a bare one, or either of them saved from DataParallel.

    Raises:
        UserError: as `load` and `weights_of`.
    """
    return weights_of(load(path), path)


def weights_of(content: Any, path: str | Path) -> dict[str, torch.Tensor]:
    """The same of what `load` gave for the file `path`.

    Raises:
        UserError: no state dict; non-finite weights.
    """
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(map(_is_weight, content.items())):
        hint = (
            "name the run's student.pth" if isinstance(content, dict) and "student" in content else "use another file"
        )
        raise UserError(f"{path} holds no state dict of a network, bare or under 'model': {hint}")
    weights = {key.removeprefix("module."): value for key, value in content.items()}
    if bad := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise UserError(f"{path} has values in {bad[0]} that are not finite: use another checkpoint")
    return weights


def load_weights(net: nn.Module, weights: dict[str, torch.Tensor], path: str | Path, name: str) -> None:
    """Load what `read_weights` gave for the file `path` into the network `name`, strictly.

    Raises:
        UserError: a SimKD student (common/simkd.py) where a plain network is wanted.
        OtherNetworkError: weights of another network or number of classes.
    """
    if any(key.startswith("projector.") for key in weights) and not hasattr(net, "projector"):
        raise UserError(f"{path} is a SimKD student, no plain network: --evaluate it with --simkd and its --teacher")
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise OtherNetworkError(
            f"{path} is no {name} of this many classes: {_first_difference(net, weights)}"
        ) from error


def _is_weight(item: tuple[Any, Any]) -> bool:
    """Whether a key and value can be a network's: ordinary real numbers, or a count of batches."""
    key, value = item
    if not isinstance(key, str) or not torch.is_tensor(value) or value.layout != torch.strided or value.is_meta:
        return False
    return value.is_floating_point() or (key.endswith("num_batches_tracked") and value.dtype == torch.int64)


def _first_difference(net: nn.Module, weights: dict) -> str:
    own = net.state_dict()
    for key, value in own.items():
        if key not in weights:
            return f"it lacks {key}"
        if weights[key].shape != value.shape:
            return f"{key} is {list(weights[key].shape)} there and {list(value.shape)} in the network"
    unknown = [key for key in weights if key not in own and not key.endswith("num_batches_tracked")]
    return f"{(unknown or list(weights))[0]} is unknown to the network"
