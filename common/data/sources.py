"""Loads CIFAR, an image folder or the synthetic dataset into host memory as 32x32 RGB images."""

import hashlib
import http.client
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

from ..run.errors import UserError
from .batches import Data, ImageSet

SYNTHETIC_SIZES = {"train": 5000, "test": 2000}  # images
SUBSET_OPTIONS = {"train": "subset", "test": "test-subset"}


def load_data(name: str, directory: str | Path, subset: int | None = None, test_subset: int | None = None) -> Data:
    """Load "cifar100", "cifar10", "folder" or "synthetic" into host memory.

    Args:
        directory: torchvision's root for CIFAR, or the folder that contains train/ and test/ or val/.
        subset, test_subset: number of training and test images to keep, balanced over the classes.

    Raises:
        UserError: the data is missing or invalid, or a subset size is out of range.
    """
    (train, test), classes = _load(name, directory, {"train": subset, "test": test_subset})
    digest = hashlib.sha256("\n".join(classes).encode(errors="surrogateescape"))
    for tensor in (train.images, train.labels):
        digest.update(tensor.contiguous().numpy())
    return Data(train, test, classes, fingerprint=digest.hexdigest())


def load_test(name: str, directory: str | Path, test_subset: int | None = None) -> tuple[ImageSet, list[str]]:
    """Load only the test split and the class names. A "folder" does not need train/.

    Raises:
        UserError: the data is missing or invalid, or the subset size is out of range.
    """
    [test], classes = _load(name, directory, {"test": test_subset})
    return test, classes


def _load(name: str, directory: str | Path, counts: dict[str, int | None]) -> tuple[list[ImageSet], list[str]]:
    """Load the splits in `counts`, which maps "train" and "test" to a number of images (None: all)."""
    if name == "folder":
        from .folders import image_folders, read_resized

        folders = image_folders(Path(directory), counts)
        arrays, classes = [read_resized(folder.samples) for folder in folders], folders[0].classes
    elif name == "synthetic":
        arrays, classes = _synthetic(counts)
    else:
        arrays, classes = _cifar(name, Path(directory), counts)
    splits = []
    for (images, labels), (split, count) in zip(arrays, counts.items(), strict=True):
        keep = balanced_subset(labels, count, len(classes), SUBSET_OPTIONS[split])
        splits.append(ImageSet(torch.from_numpy(images[keep]), torch.from_numpy(labels[keep])))
    return splits, list(classes)


def _synthetic(counts: dict[str, int | None]) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[str]]:
    from .synthetic import CLASSES, synthetic_images

    # Renders only the requested images: balanced_subset would select the same prefix.
    sizes = {split: n if n in range(len(CLASSES), SYNTHETIC_SIZES[split] + 1) else None for split, n in counts.items()}
    return [synthetic_images(n or SYNTHETIC_SIZES[split], split) for split, n in sizes.items()], CLASSES


def _cifar(name: str, directory: Path, splits: Iterable[str]) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[str]]:
    cls = {"cifar100": datasets.CIFAR100, "cifar10": datasets.CIFAR10}[name]
    try:
        # torchvision verifies the MD5 of the files before reading them.
        loaded = [cls(directory, train=split == "train", download=True) for split in splits]
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(
            f"{name} is missing or damaged in {directory} and could not be downloaded ({error}): check the network, "
            f"put {cls.filename} there (--data-dir), or try --dataset synthetic"
        ) from error
    return [(dataset.data, np.array(dataset.targets, np.int64)) for dataset in loaded], loaded[0].classes


def balanced_subset(labels: np.ndarray, count: int | None, num_classes: int, option: str) -> np.ndarray:
    """Sorted indices of `count` images (None: all): the first ones of each class, as balanced as possible.

    Raises:
        UserError: `count` is below the number of classes or above the number of images; the message names `option`.
    """
    if count is None:
        return np.arange(len(labels))
    if not num_classes <= count <= len(labels):
        raise UserError(f"--{option} {count}: it must be between {num_classes} (classes) and {len(labels)} (images)")
    index_in_class = np.empty(len(labels), np.int64)
    for c in range(num_classes):
        index_in_class[labels == c] = np.arange((labels == c).sum())
    return np.sort(np.lexsort((labels, index_in_class))[:count])
