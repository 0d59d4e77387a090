"""Image sets that live on the training device as uint8; all that happens to a batch is tensor operations there.

Per image, equal in distribution to torchvision's RandomCrop(32, padding=4) and RandomHorizontalFlip. The order of
the images and their augmentation are drawn from (seed, epoch), so a resumed run sees what an unbroken one sees.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets

from .errors import UserError
from .randomness import generator
from .synthetic import CLASSES, synthetic_images

SIZE = 32
PAD = 4
MEAN = (0.5071, 0.4867, 0.4408)  # of CIFAR-100; used for every set
STD = (0.2675, 0.2565, 0.2761)
SYNTHETIC_TRAIN, SYNTHETIC_TEST = 5000, 2000


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


def normalise(images: Tensor, channels_last: bool = False) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] of mean 0 and deviation 1 over CIFAR-100."""
    mean, std = _moments(images.device)
    images = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    return images if channels_last else images.contiguous()


@cache
def _moments(device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept on the device: to send them there for each batch would make the host wait."""
    return torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)


def load_data(name: str, directory: str | Path, subset: int | None = None, test_subset: int | None = None) -> Data:
    """Load "cifar100", "cifar10", "folder" or "synthetic" into host memory.

    Args:
        directory: where torchvision keeps or puts CIFAR; for "folder", what holds train/ and test/ or val/.
        subset, test_subset: how many images of a split to keep, spread evenly over the classes.

    Raises:
        UserError: what is wrong with the directory or the numbers.
    """
    if name == "folder":
        train, test, classes = _folder(Path(directory))
    elif name == "synthetic":
        # Only as many as are wanted are drawn: the first ones are spread over the classes as `_spread` does it.
        sizes = ((subset, SYNTHETIC_TRAIN), (test_subset, SYNTHETIC_TEST))
        train, test = (
            synthetic_images(n if n and len(CLASSES) <= n <= most else most, split)
            for split, (n, most) in zip(("train", "test"), sizes, strict=True)
        )
        classes = CLASSES
    else:
        train, test, classes = _cifar(name, Path(directory))
    train = _spread(*train, subset, len(classes), "subset")
    test = _spread(*test, test_subset, len(classes), "test-subset")
    digest = hashlib.sha256("\n".join(classes).encode())
    for array in train:
        digest.update(np.ascontiguousarray(array))
    splits = [ImageSet(*map(torch.from_numpy, split)) for split in (train, test)]
    return Data(*splits, classes=list(classes), fingerprint=digest.hexdigest())


def _cifar(name: str, directory: Path):
    cls = {"cifar100": datasets.CIFAR100, "cifar10": datasets.CIFAR10}[name]
    try:
        # The files are checked against their published MD5 before they are read.
        splits = [cls(directory, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {directory} and could not be downloaded ({error}): check the network, or put "
            f"{cls.filename} there (--data-dir), or try --dataset synthetic"
        ) from error
    return *((s.data, np.array(s.targets, np.int64)) for s in splits), splits[0].classes


def _folder(directory: Path):
    """An image folder: train/<class>/* and test/<class>/* or val/<class>/*, resized to 32x32 where needed."""
    test = next((directory / split for split in ("test", "val") if (directory / split).is_dir()), directory / "test")
    splits = []
    for split in (directory / "train", test):
        try:
            splits.append(datasets.ImageFolder(split))
        except OSError as error:
            raise UserError(
                f"{split} is no image folder ({error}): --data-dir needs train/ and test/ or val/"
            ) from error
    train, test = splits
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise UserError(f"{directory}: train and test must have the same classes, but {odd!r} is only in one of them")
    return *(_read_all(split.samples) for split in splits), train.classes


def _read_all(samples: list[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    paths, labels = zip(*samples, strict=True)
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(_read, paths))
    return np.stack(images), np.array(labels, np.int64)


def _read(path: str) -> np.ndarray:
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot read the image {path} ({error}): remove or replace it") from error
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _spread(images, labels, count: int | None, num_classes: int, option: str):
    """The first images of every class, `count` in all, as evenly as it goes, in their order."""
    if count is None:
        return images, labels
    if not num_classes <= count <= len(labels):
        raise UserError(
            f"--{option} {count} must lie between {num_classes} (the classes) and {len(labels)} (the images)"
        )
    by_rank = np.empty(len(labels), np.int64)  # the how-maniest image of its class each one is
    for c in range(num_classes):
        by_rank[labels == c] = np.arange((labels == c).sum())
    keep = np.sort(np.lexsort((labels, by_rank))[:count])
    return images[keep], labels[keep]
