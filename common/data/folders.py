"""Image folders, <split>/<class>/*, and reading image files."""

import warnings
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets

from ..run.errors import UserError
from .batches import SIZE


class ImageFolder(datasets.ImageFolder):
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


def image_folders(
    directory: Path, splits: Collection[str], test_names: tuple[str, ...] = ("test", "val")
) -> list[ImageFolder]:
    """List <split>/<class>/* for each split; the test split is the first of `test_names` that exists.

    Raises:
        UserError: a split is missing or empty, or the splits have different classes.
    """
    folders = []
    for split in splits:
        names = test_names if split == "test" else (split,)
        root = next((directory / name for name in names if (directory / name).is_dir()), directory / names[0])
        try:
            folders.append(ImageFolder(root))
        except OSError as error:
            text = str(error).splitlines()[0]
            needed = " and ".join("test/ or val/" if split == "test" else f"{split}/" for split in splits)
            raise UserError(f"{root} is not an image folder ({text}): --data-dir must contain {needed}") from error
    if odd := set(folders[0].classes) ^ set(folders[-1].classes):
        raise UserError(f"{directory}: train and test must have the same classes, but only one has {min(odd)!r}")
    return folders


def read_resized(samples: list[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Read (path, label) samples into uint8 [n, 32, 32, 3] and int64 [n]; other sizes are resized bilinearly."""
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
    except Exception as error:  # decoders raise many kinds of exceptions on damaged files
        name = path.replace("\n", "\\n")
        raise UserError(f"cannot read the image {name} ({error}): remove or replace it") from error
