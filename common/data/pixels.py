"""Reads and augments training images.

Decoding takes about three quarters of the time that a JPEG needs. docs/cost.md compares it with PIL.
"""

import contextlib
import math
import random
import struct

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode  # also registers decode_jpeg

from .folders import open_rgb

try:
    # The operator behind torchvision.io.decode_jpeg, which adds 0.03 ms of Python to 1.3 ms of decoding.
    decode_jpeg = torch.ops.image.decode_jpeg
except AttributeError:  # deprecated since torchvision 0.29; PIL is slower
    decode_jpeg = None

JPEG_SEGMENTS = {0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}  # markers of tables, application data and comments
JPEG_FRAMES = {0xFFC0, 0xFFC1, 0xFFC2}  # baseline, extended sequential, progressive


def read_jpeg(path: str) -> Tensor | None:
    """The bytes of a gray or RGB JPEG; None if the file is anything else or cannot be read."""
    with contextlib.suppress(Exception):  # open_rgb reports it
        with open(path, "rb", buffering=0) as file:
            data = file.read()
        height, width, channels = jpeg_shape(data)
        if height * width <= Image.MAX_IMAGE_PIXELS and channels in (1, 3):  # CMYK may be converted differently
            return torch.frombuffer(data, dtype=torch.uint8)
    return None


def jpeg_shape(data: bytes) -> tuple[int, int, int]:
    """(height, width, channels) of a JPEG; PIL takes ten times as long to read the header.

    Raises:
        ValueError, IndexError or struct.error: the data is not a JPEG, or its header is unusual.
    """
    if not data.startswith(b"\xff\xd8"):
        raise ValueError("not a JPEG")
    at = 2
    while data[at] == 0xFF and data[at + 1] in JPEG_SEGMENTS:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    frame, _, precision, height, width, channels = struct.unpack_from(">HHBHHB", data, at)
    if frame not in JPEG_FRAMES or precision != 8:
        raise ValueError("not a baseline, extended sequential or progressive JPEG of 8 bits")
    return height, width, channels


def read_pixels(path: str, jpeg: Tensor | None) -> Tensor:
    """An image as uint8 [H, W, 3]; equal to `open_rgb` up to rounding, and faster if its bytes `jpeg` are given.

    Raises:
        UserError: the image cannot be read; the message names it.
    """
    if decode_jpeg and jpeg is not None:
        with contextlib.suppress(Exception):  # open_rgb can read some files that fail here, and reports the others
            return decode_jpeg(jpeg, ImageReadMode.RGB.value).permute(1, 2, 0)
    return torch.from_numpy(np.array(open_rgb(path)))


def augment(image: Tensor, size: int, rng: random.Random) -> Tensor:
    """RandomResizedCrop(size) and RandomHorizontalFlip of an image uint8 [H, W, 3]; returns uint8 [size, size, 3].

    Distributed as in torchvision. Tensors are resized faster than PIL images; pixels differ by rounding.
    """
    top, left, height, width = draw_crop(*image.shape[:2], rng)
    crop = image[top : top + height, left : left + width].contiguous()  # a view would be resized more slowly
    batch = crop[None].permute(0, 3, 1, 2)
    crop = F.interpolate(batch, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    return crop.flip(1) if rng.random() < 0.5 else crop


def draw_crop(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a RandomResizedCrop."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))  # the largest allowed, in the center
    return (height - h) // 2, (width - w) // 2, h, w
