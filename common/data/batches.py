"""Datasets kept on the training device as uint8 and augmented there, one batch at a time.

The augmentation is equivalent to torchvision's RandomCrop(32, padding=4) and RandomHorizontalFlip on each image. Image
order and augmentation depend only on (seed, epoch), so a resumed run sees the same batches as an uninterrupted one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..randomness import generator

SIZE = 32
PAD = 4
MEAN = (0.5071, 0.4867, 0.4408)  # of CIFAR-100; used for every dataset
STD = (0.2675, 0.2565, 0.2761)


@dataclass
class ImageSet:
    """One split: images uint8 [n, 32, 32, 3] and labels int64 [n], both on the training device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def padded(self) -> Tensor:
        """The images padded with PAD black pixels on each side: uint8 [n, 40, 40, 3]."""
        return F.pad(self.images, (0, 0, PAD, PAD, PAD, PAD))

    def to(self, device: torch.device) -> "ImageSet":
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass
class Data:
    """A dataset: two splits, class names, and a hash of the class names and the training split."""

    train: ImageSet
    test: ImageSet
    classes: list[str]
    fingerprint: str

    def __str__(self) -> str:
        return f"{len(self.train)} training and {len(self.test)} test images in {len(self.classes)} classes"

    def to(self, device: torch.device) -> "Data":
        return Data(self.train.to(device), self.test.to(device), self.classes, self.fingerprint)


def train_batches(data: ImageSet, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, augmented, normalized batches (images float32 [B, 3, 32, 32], labels [B]); the last may be smaller."""
    n, device = len(data), data.labels.device
    rng = generator(seed, epoch, "data")
    order = torch.randperm(n, generator=rng).to(device)
    top, left = torch.randint(0, 2 * PAD + 1, (2, n, 1), generator=rng)
    flip = torch.rand(n, 1, generator=rng) < 0.5
    rows = (top + torch.arange(SIZE)).to(device)
    columns = left + torch.arange(SIZE)
    columns = torch.where(flip, columns.flip(1), columns).to(device)
    for i in range(0, n, batch_size):
        batch = slice(i, i + batch_size)
        index = order[batch]
        # One gather selects, crops and flips the images.
        images = data.padded[index[:, None, None], rows[batch, :, None], columns[batch, None, :]]
        yield normalize(images), data.labels[index]


def eval_batches(data: ImageSet, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalized batches in dataset order: (images float32 [B, 3, 32, 32], labels [B])."""
    batch_size = batch_size or (500 if data.labels.is_cuda else 100)  # faster on a CPU
    for i in range(0, len(data), batch_size):
        batch = slice(i, i + batch_size)
        yield normalize(data.images[batch]), data.labels[batch]


def normalize(images: Tensor, mean: tuple = MEAN, std: tuple = STD) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in channels_last format: (image / 255 - mean) / std per channel."""
    mean, std = _moments(images.device, mean, std)
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)  # a view, so its memory stays NHWC


@cache
def _moments(device: torch.device, mean: tuple, std: tuple) -> tuple[Tensor, Tensor]:
    """Mean and std, cached on the device: copying them for every batch would synchronize."""
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)
