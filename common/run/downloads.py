"""Pretrained weights that torchvision publishes."""

import http.client
from pathlib import Path

import torch
from torchvision import models

from .errors import UserError


def torchvision_weights(name: str, version: str, option: str = "--teacher-ckpt") -> Path:
    """Path of torchvision's weights for the network `name`, downloaded into PyTorch's cache if needed.

    Args:
        option: the command-line option for a local file, named in the error message.

    Raises:
        UserError: the download failed or the file is damaged.
    """
    url = models.get_model_weights(name)[version].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        digest = path.stem.rpartition("-")[2]  # the file name ends with a prefix of its SHA-256
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = f"could not download torchvision's {name} ({error})"
            raise UserError(f"{reason}: check the network, save {url} as {path}, or use {option}") from error
    return path
