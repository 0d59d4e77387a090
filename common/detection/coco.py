"""Datasets in COCO format.

    DIR/train2017/*.jpg                            file names as in the annotations
    DIR/val2017/*.jpg
    DIR/annotations/instances_train2017.json       images, annotations, categories
    DIR/annotations/instances_val2017.json

Any folder with an instances_train*.json and an instances_val*.json works; the text after "instances_" names the folder
of its images. The categories, sorted by id, are classes 1..K.

As in torchvision's reference training on COCO, training skips crowd boxes, images without annotations, and images
whose boxes are all at most one pixel wide or high; an image with only crowds is kept, without boxes. Testing uses every
image; a crowd need not be detected, and detections inside it do not count as errors.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..run.errors import UserError
from .annotations import Annotations, read_annotations
from .detectors import MAX_SIZE


@dataclass
class Split:
    """Images and their boxes without crowds, in a few arrays whose memory worker processes share."""

    files: np.ndarray  # [n], paths as bytes
    sizes: np.ndarray  # [n, 2], width and height in pixels
    first: np.ndarray  # [n + 1]: image i has boxes first[i]:first[i + 1]
    boxes: np.ndarray  # [m, 4], float32: x1, y1, x2, y2 in pixels, inside the image
    labels: np.ndarray  # [m], int64: 1..K

    def __len__(self) -> int:
        return len(self.files)


@dataclass
class CocoData:
    """A dataset: its splits, its categories (id -> name, in the order of labels 1..K) and a hash of the training data.

    Attributes:
        truth: the test split in the format of pycocotools, including crowds. Boxes are as in the file, without those
            that have no area or are outside their image. An image's id is its index in `test`, a category's its label.
        notes: one line per split on dropped boxes, and one on clipped boxes.
    """

    train: Split
    test: Split
    truth: dict[str, list[dict[str, Any]]]
    categories: dict[int, str]
    fingerprint: str
    notes: list[str]

    def __str__(self) -> str:
        return f"{len(self.train)} training and {len(self.test)} test images in {len(self.categories)} classes"


def load_coco(directory: str | Path, subset: int | None = None, test_subset: int | None = None) -> CocoData:
    """Read both splits, or `subset` and `test_subset` images of them, evenly spaced over the file.

    Raises:
        UserError: the folder, the annotations or a subset size is invalid.
    """
    train, test = (_read(Path(directory), split) for split in ("train", "val"))
    if train.categories != test.categories:
        raise UserError(f"{train.file} and {test.file} must have the same categories, with the same ids and names")
    trainable = set(train.label[train.usable & ~train.crowd].tolist())
    if missing := [name for label, name in enumerate(train.categories.values(), 1) if label not in trainable]:
        raise UserError(
            f"{train.file}: the category {missing[0]!r} has no box to train on: add one, or remove it from "
            "'categories' in both files"
        )
    with_boxes = np.unique(train.image[(train.box[:, 2:] > 1).all(1)])
    if not len(with_boxes):
        raise UserError(f"{train.file}: every box is at most a pixel wide or high: there is nothing to train on")

    kept = _spread(with_boxes, subset, "subset")
    trained = _pack(train, kept)
    digest = hashlib.sha256(json.dumps([list(train.categories.items()), [train.names[i] for i in kept]]).encode())
    for array in (trained.first, trained.boxes, trained.labels):
        digest.update(np.ascontiguousarray(array))
    notes = _note(train, "boxes dropped (no area, or outside their image)", ~train.usable)
    notes += _note(train, "boxes clipped to their image", train.extends_beyond_image)
    tested = _test_data(test, test_subset)
    return replace(tested, train=trained, fingerprint=digest.hexdigest(), notes=notes + tested.notes)


def load_coco_test(directory: str | Path, test_subset: int | None = None) -> CocoData:
    """The same without the training split, which need not exist: `train` is empty and `fingerprint` is "".

    Raises:
        UserError: as `load_coco`.
    """
    return _test_data(_read(Path(directory), "val"), test_subset)


def _read(directory: Path, split: str) -> Annotations:
    source = read_annotations(_find(directory, split))
    too_long = source.sizes.max(1) / source.sizes.min(1) > MAX_SIZE / 2  # would be resized to a pixel
    if too_long.any():
        name = source.names[too_long.argmax()]
        raise UserError(f"{source.file}: the aspect ratio of image {name} is too extreme: remove or crop it")
    return source


def _test_data(test: Annotations, subset: int | None) -> CocoData:
    kept = _spread(np.arange(len(test.names)), subset, "test-subset")
    tested = _pack(test, kept)
    if not len(tested.boxes):
        raise UserError(f"{test.file}: none of the test images has a usable box: test on more of them")
    notes = _note(test, "boxes dropped (no area, or outside their image)", ~test.usable)
    return CocoData(_pack(test, kept[:0]), tested, _truth(test, kept), test.categories, "", notes)


def _find(directory: Path, split: str) -> Path:
    files = sorted((directory / "annotations").glob(f"instances_{split}*.json"))
    if not files:
        raise UserError(
            f"there is no {directory}/annotations/instances_{split}*.json: --data-dir needs train2017/, val2017/ and "
            "annotations/ in COCO format"
        )
    if len(files) > 1:
        files = [file for file in files if file.stem == f"instances_{split}2017"] or files
    if len(files) > 1:
        raise UserError(f"found both {files[0]} and {files[1]}: keep only one of them")
    return files[0]


def _spread(indices: np.ndarray, count: int | None, option: str) -> np.ndarray:
    if count is None:
        return indices
    if not 1 <= count <= len(indices):
        raise UserError(f"--{option} {count}: must be between 1 and {len(indices)}, the number of images")
    return indices[evenly_spaced(len(indices), count)]


def evenly_spaced(n: int, count: int) -> np.ndarray:
    """`count` evenly spaced numbers from 0..n - 1."""
    return np.linspace(0, n - 1, count).astype(int)


def _of_images(source: Annotations, kept: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the `wanted` annotations of images `kept`, in the order of `kept`, and their image's index in it."""
    new = np.full(len(source.names), -1)
    new[kept] = np.arange(len(kept))
    rows = np.flatnonzero(wanted & (new[source.image] >= 0))
    rows = rows[np.argsort(new[source.image[rows]], kind="stable")]
    return rows, new[source.image[rows]]


def _pack(source: Annotations, kept: np.ndarray) -> Split:
    rows, image = _of_images(source, kept, source.usable & ~source.crowd)
    files = np.array([os.fsencode(source.folder / source.names[i]) for i in kept])
    first = np.searchsorted(image, np.arange(len(kept) + 1))
    return Split(files, source.sizes[kept], first, source.clipped[rows], source.label[rows])


def _truth(source: Annotations, kept: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    rows, image = _of_images(source, kept, source.usable)
    columns = {
        "id": np.arange(1, len(rows) + 1),  # never 0: pycocotools treats it as no match
        "image_id": image,
        "category_id": source.label[rows],
        "bbox": source.box[rows],
        "area": source.area[rows],
        "iscrowd": source.crowd[rows].astype(int),
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return {
        "images": [{"id": i} for i in range(len(kept))],
        "categories": [{"id": i, "name": name} for i, name in enumerate(source.categories.values(), 1)],
        "annotations": [dict(zip(columns, row, strict=True)) for row in values],
    }


def _note(source: Annotations, text: str, boxes: np.ndarray) -> list[str]:
    return [f"{source.file.name}: {text}: {boxes.sum()}"] if boxes.any() else []
