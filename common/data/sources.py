"""Loading CIFAR, an image folder or the synthetic dataset into host memory as 32x32 RGB images."""

import hashlib
import http.client
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets

from ..run.errors import UserError
from .batches import SIZE, Data, ImageSet
from .synthetic import CLASSES, synthetic_images

SYNTHETIC_TRAIN, SYNTHETIC_TEST = 5000, 2000  # images


def load_data(name: str, directory: str | Path, subset: int | None = None, test_subset: int | None = None) -> Data:
    """Load "cifar100", "cifar10", "folder" or "synthetic" into host memory.

    Args:
        directory: torchvision's root for CIFAR, or the folder that contains train/ and test/ or val/.
        subset, test_subset: number of training and test images to keep, balanced over the classes.

    Raises:
        UserError: the directory or a subset size is invalid.
    """
    if name == "folder":
        train, test, classes = _folder(Path(directory))
    elif name == "synthetic":
        # Renders only the requested images: balanced_subset would select the same prefix.
        sizes = ((subset, SYNTHETIC_TRAIN), (test_subset, SYNTHETIC_TEST))
        train, test = (
            synthetic_images(n if n and len(CLASSES) <= n <= most else most, split)
            for split, (n, most) in zip(("train", "test"), sizes, strict=True)
        )
        classes = CLASSES
    else:
        train, test, classes = _cifar(name, Path(directory))
    kept = []
    for (images, labels), count, option in ((train, subset, "subset"), (test, test_subset, "test-subset")):
        keep = balanced_subset(labels, count, len(classes), option)
        kept.append((images[keep], labels[keep]))
    train, test = kept
    digest = hashlib.sha256("\n".join(classes).encode(errors="surrogateescape"))
    for array in train:
        digest.update(np.ascontiguousarray(array))
    splits = [ImageSet(*map(torch.from_numpy, split)) for split in (train, test)]
    return Data(*splits, classes=list(classes), fingerprint=digest.hexdigest())


def _cifar(name: str, directory: Path):
    cls = {"cifar100": datasets.CIFAR100, "cifar10": datasets.CIFAR10}[name]
    try:
        # torchvision verifies the MD5 of the files before reading them.
        splits = [cls(directory, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(
            f"{name} is missing or damaged in {directory} and could not be downloaded ({error}): check the network, "
            f"put {cls.filename} there (--data-dir), or try --dataset synthetic"
        ) from error
    return *((s.data, np.array(s.targets, np.int64)) for s in splits), splits[0].classes


class _Folder(datasets.ImageFolder):
    """torchvision's ImageFolder, ignoring hidden files and folders."""

    def __init__(self, root: Path):
        super().__init__(root, is_valid_file=self.is_image)

    @staticmethod
    def is_image(path: str) -> bool:
        return not Path(path).name.startswith(".") and path.lower().endswith(datasets.folder.IMG_EXTENSIONS)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = sorted(p.name for p in Path(directory).iterdir() if p.is_dir() and not p.name.startswith("."))
        if not classes:
            raise FileNotFoundError(f"no class folder in {directory}")
        return classes, {name: i for i, name in enumerate(classes)}


def _folder(directory: Path):
    """An image folder, with images resized to 32x32."""
    train, test = image_folder(directory)
    return *(_read_all(split.samples) for split in (train, test)), train.classes


def image_folder(directory: Path, test_names: tuple[str, str] = ("test", "val")) -> list[datasets.ImageFolder]:
    """torchvision's ImageFolder of train/<class>/* and of the test split, the first of `test_names` that exists.

    Raises:
        UserError: a split is missing or empty, or their classes differ.
    """
    splits = []
    for names in (("train",), test_names):
        split = next((directory / name for name in names if (directory / name).is_dir()), directory / names[0])
        try:
            splits.append(_Folder(split))
        except OSError as error:
            text = str(error).splitlines()[0]
            raise UserError(
                f"{split} is not an image folder ({text}): --data-dir must contain train/ and test/ or val/"
            ) from error
    train, test = splits
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise UserError(f"{directory}: train and test must have the same classes, but only one of them has {odd!r}")
    return splits


def _read_all(samples: list[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    paths, labels = zip(*samples, strict=True)
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # PIL warns about unusual but readable files
        images = list(pool.map(_read, paths))
    return np.stack(images), np.array(labels, np.int64)


def _read(path: str) -> np.ndarray:
    image = open_rgb(path)
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image)


def open_rgb(path: str) -> Image.Image:
    """Read an image and convert it to 8-bit RGB.

    Raises:
        UserError: the image cannot be read; the message names it.
    """
    try:
        image = Image.open(path)
        if image.mode.startswith("I;16"):  # 16-bit grayscale, which PIL would clip at 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("its 32-bit pixels have an unknown range")
        return image.convert("RGB")
    except Exception as error:  # decoders raise all kinds of exceptions on damaged files
        name = path.replace("\n", "\\n")
        raise UserError(f"cannot read the image {name} ({error}): remove or replace it") from error


def balanced_subset(labels: np.ndarray, count: int | None, num_classes: int, option: str) -> np.ndarray:
    """Sorted indices of `count` images (None: all), the first of each class and as balanced as possible.

    Raises:
        UserError: `count` is less than the number of classes or more than that of images; the message names `option`.
    """
    if count is None:
        return np.arange(len(labels))
    if not num_classes <= count <= len(labels):
        raise UserError(f"--{option} {count}: it must be between {num_classes} (classes) and {len(labels)} (images)")
    index_in_class = np.empty(len(labels), np.int64)
    for c in range(num_classes):
        index_in_class[labels == c] = np.arange((labels == c).sum())
    return np.sort(np.lexsort((labels, index_in_class))[:count])
