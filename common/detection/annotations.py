"""Reads and checks an annotation file in COCO format (instances_*.json), and packs it into arrays."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..run.errors import UserError

LARGEST = 10**5  # pixels; pycocotools handles areas up to its square


@dataclass
class Annotations:
    """Contents of a file with n images and m boxes, including crowds and unusable boxes."""

    file: Path
    categories: dict[int, str]  # id -> name, sorted by id
    names: list[str]  # [n], image files, relative to `folder`
    sizes: np.ndarray  # [n, 2], width and height in pixels
    image: np.ndarray  # [m], index of the image
    label: np.ndarray  # [m], 1..K: the category's position in `categories`
    box: np.ndarray  # [m, 4], float64: x, y, width, height in pixels
    area: np.ndarray  # [m], float64, square pixels: of the object's mask if given, else of the box
    crowd: np.ndarray  # [m], bool: it covers many objects

    @property
    def folder(self) -> Path:
        """Where the images are: DIR/train2017 for DIR/annotations/instances_train2017.json."""
        return self.file.parent.parent / self.file.stem.removeprefix("instances_")

    @cached_property
    def edges(self) -> np.ndarray:
        """[m, 4], float64: x1, y1, x2, y2 in pixels."""
        return np.concatenate([self.box[:, :2], self.box[:, :2] + self.box[:, 2:]], 1)

    @cached_property
    def clipped(self) -> np.ndarray:
        """[m, 4], float32: x1, y1, x2, y2 of the part inside the image."""
        return np.clip(self.edges, 0, np.tile(self.sizes[self.image], 2)).astype(np.float32)

    @cached_property
    def usable(self) -> np.ndarray:
        """[m], bool: more than a hundredth of a pixel of the box's width and height is inside the image."""
        return (self.clipped[:, 2:] - self.clipped[:, :2] > 0.01).all(1)

    @property
    def extends_beyond_image(self) -> np.ndarray:
        """[m], bool: usable, but part of the box is outside the image by more than rounding error."""
        return self.usable & (np.abs(self.edges - self.clipped) > 0.5).any(1)


def read_annotations(file: Path) -> Annotations:
    """Read a file and check that its images exist.

    Raises:
        UserError: the file cannot be read or is not in COCO format, or an image is missing; the message says which.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {file} ({error}): check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON, or is truncated ({error}): use another copy") from error
    try:
        rows = [_objects(content, key) for key in ("categories", "images", "annotations")]
        categories = _categories(rows[0])
        index, names, sizes = _images(rows[1])
        annotations = Annotations(file, categories, names, sizes, *_boxes(rows[2], index, list(categories)))
    except ValueError as error:
        raise UserError(f"{file} is not in COCO format: {error}") from error
    _check_files(annotations)
    return annotations


def _objects(content: Any, key: str) -> list[dict[str, Any]]:
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{key!r} is missing, or not a list of objects")
    if not rows and key != "annotations":
        raise ValueError(f"{key!r} is empty")
    return rows


def _categories(rows: list[dict[str, Any]]) -> dict[int, str]:
    categories = {}
    for i, row in enumerate(rows):
        key, name = row.get("id"), row.get("name")
        if type(key) is not int or not isinstance(name, str) or key in categories or name in categories.values():
            raise ValueError(f"'categories' [{i}] lacks a unique id or a unique name")
        categories[key] = name
    return dict(sorted(categories.items()))


def _images(rows: list[dict[str, Any]]) -> tuple[dict[Any, int], list[str], np.ndarray]:
    index, names, sizes = {}, [], []
    for i, row in enumerate(rows):
        try:
            key, name, size = row["id"], row["file_name"], (row["width"], row["height"])
            if key in index or not isinstance(name, str) or not all(1 <= s < LARGEST and s == int(s) for s in size):
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(f"'images' [{i}] lacks a unique id, a file_name, a width or a height") from None
        index[key] = i
        names.append(name)
        sizes.append(size)
    return index, names, np.array(sizes).astype(int)


def _boxes(rows: list[dict[str, Any]], index: dict[Any, int], ids: list[int]) -> tuple[np.ndarray, ...]:
    """The fields of Annotations from `image` on."""
    labels = {key: label for label, key in enumerate(ids, 1)}
    table = np.empty((len(rows), 8))
    for i, row in enumerate(rows):
        try:
            _, _, width, height = box = row["bbox"]
            if not all(type(value) in (int, float) and abs(value) < 1e9 for value in box):  # NaN fails too
                raise ValueError
            area = row.get("area")
            if not isinstance(area, int | float) or not 0 <= area <= LARGEST**2:
                area = min(width * height, LARGEST**2)
            if row.get("iscrowd") not in (0, 1, None):
                raise ValueError
            key = index[row["image_id"]], labels[row["category_id"]]
            table[i] = (*key, row.get("iscrowd") == 1, area, *box)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(
                f"'annotations' [{i}] lacks a known image_id or category_id, a bbox of four numbers, or an iscrowd of "
                "0 or 1"
            ) from None
    return table[:, 0].astype(int), table[:, 1].astype(int), table[:, 4:], table[:, 3], table[:, 2] > 0


def _check_files(annotations: Annotations) -> None:
    folder = annotations.folder
    try:
        files = set(os.listdir(folder))
    except OSError as error:
        raise UserError(f"cannot read the image folder {folder} ({error}): put the images there") from error
    for name in annotations.names:
        if name not in files and not (folder / name).is_file():  # it may be in a subfolder
            path = str(folder / name).replace("\n", "\\n")
            raise UserError(f"the image {path} of {annotations.file} is missing: put it there")
