"""Image sets that live on the training device as uint8; all that happens to a batch is tensor operations there.

Per image, equal in distribution to torchvision's RandomCrop(32, padding=4) and RandomHorizontalFlip. The order of
the images and their augmentation are drawn from (seed, epoch), so a resumed run sees what an unbroken one sees.
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
MEAN = (0.5071, 0.4867, 0.4408)  # of CIFAR-100; used for every set
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
        """The images with PAD black pixels around: uint8 [n, 40, 40, 3]."""
        return F.pad(self.images, (0, 0, PAD, PAD, PAD, PAD))

    def to(self, device: torch.device) -> "ImageSet":
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass
class Data:
    """A data set: its two splits, the names of its classes, and a hash of these and of the training split."""

    train: ImageSet
    test: ImageSet
    classes: list[str]
    fingerprint: str

    def to(self, device: torch.device) -> "Data":
        return Data(self.train.to(device), self.test.to(device), self.classes, self.fingerprint)


def train_batches(
    data: ImageSet, batch_size: int, seed: int, epoch: int, channels_last: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, augmented, normalised batches (images float32 [B, 3, 32, 32], labels [B]); the last may be short."""
    n, device = len(data), data.labels.device
    draw = generator(seed, epoch, "data")
    order = torch.randperm(n, generator=draw).to(device)
    top, left = torch.randint(0, 2 * PAD + 1, (2, n, 1), generator=draw)
    flip = torch.rand(n, 1, generator=draw) < 0.5
    rows = (top + torch.arange(SIZE)).to(device)
    columns = left + torch.arange(SIZE)
    columns = torch.where(flip, columns.flip(1), columns).to(device)
    for i in range(0, n, batch_size):
        chosen, part = order[i : i + batch_size], slice(i, i + batch_size)
        # One gather picks the images, crops and flips them.
        images = data.padded[chosen[:, None, None], rows[part, :, None], columns[part, None, :]]
        yield normalise(images, channels_last), data.labels[chosen]


def eval_batches(data: ImageSet, batch_size: int = 500, channels_last: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in order, normalised: (images float32 [B, 3, 32, 32], labels [B])."""
    for i in range(0, len(data), batch_size):
        part = slice(i, i + batch_size)
        yield normalise(data.images[part], channels_last), data.labels[part]


def normalise(images: Tensor, channels_last: bool = False, mean: tuple = MEAN, std: tuple = STD) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] of mean 0 and deviation 1 over the set with these moments."""
    mean, std = _moments(images.device, mean, std)
    images = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    return images if channels_last else images.contiguous()


@cache
def _moments(device: torch.device, mean: tuple, std: tuple) -> tuple[Tensor, Tensor]:
    """Kept on the device: to send them there for each batch would make the host wait."""
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)
