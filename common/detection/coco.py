"""Sets in COCO's format.

    DIR/train2017/*.jpg                            any names that the annotations give
    DIR/val2017/*.jpg
    DIR/annotations/instances_train2017.json       images, annotations, categories
    DIR/annotations/instances_val2017.json

Any folder works that has an instances_train*.json and an instances_val*.json, with the images of each in the folder
named after what follows "instances_". Its categories, in the order of their ids, are the classes 1..K.

What torchvision's reference training does with COCO is done here too: training leaves out crowd boxes, images without
annotation, and those whose boxes are all at most a pixel wide or high; an image of crowds alone stays, without boxes.
The test takes every image; a crowd need not be found, and nothing that is found in it is wrong.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..run.errors import UserError
from .annotations import Annotations, read_annotations
from .detectors import MAX_SIZE


@dataclass
class Split:
    """Images and their boxes without crowds, in few arrays, whose memory worker processes share."""

    files: np.ndarray  # [n], paths as bytes
    sizes: np.ndarray  # [n, 2], width and height in pixels
    first: np.ndarray  # [n + 1]: image i has the boxes first[i]:first[i + 1]
    boxes: np.ndarray  # [m, 4], float32: x1, y1, x2, y2 in pixels, inside the image
    labels: np.ndarray  # [m], int64: 1..K

    def __len__(self) -> int:
        return len(self.files)


@dataclass
class CocoData:
    """A set: its splits, its categories (id -> name, in the order of the labels 1..K), a hash of what is trained on.

    Attributes:
        truth: the test split as pycocotools takes it, crowds included, with boxes as they are in the file, but those
            of no area or outside their image; an image's id is its index in `test`, a category's id its label.
        notes: a line on each split in which boxes were dropped or clipped.
    """

    train: Split
    test: Split
    truth: dict[str, list[dict[str, Any]]]
    categories: dict[int, str]
    fingerprint: str
    notes: list[str]


def load_coco(directory: str | Path, subset: int | None = None, test_subset: int | None = None) -> CocoData:
    """Read both splits; a `subset` is that many images, spread evenly over the file.

    Raises:
        UserError: what is wrong with the folder, the annotations or the numbers.
    """
    train, test = (read_annotations(_find(Path(directory), split)) for split in ("train", "val"))
    if train.categories != test.categories:
        raise UserError(f"{train.file} and {test.file} must have the same categories, with the same ids and names")
    there = set(train.label[train.usable & ~train.crowd].tolist())
    if missing := [name for label, name in enumerate(train.categories.values(), 1) if label not in there]:
        raise UserError(
            f"{train.file}: the category {missing[0]!r} has no box to train on: give it some, or remove it from "
            "'categories' in both files"
        )
    with_boxes = np.unique(train.image[(train.box[:, 2:] > 1).all(1)])
    if not len(with_boxes):
        raise UserError(f"{train.file}: every box is at most a pixel wide or high: there is nothing to train on")
    for source in (train, test):
        too_long = source.sizes.max(1) / source.sizes.min(1) > MAX_SIZE / 2  # resized, it would be a pixel wide or high
        if too_long.any():
            name = source.names[too_long.argmax()]
            raise UserError(f"{source.file}: the image {name} is too long for its other side: remove or crop it")

    kept = _spread(with_boxes, subset, "subset")
    kept_test = _spread(np.arange(len(test.names)), test_subset, "test-subset")
    trained, tested = _pack(train, kept), _pack(test, kept_test)
    if not len(tested.boxes):
        raise UserError(f"{test.file}: none of these images has a box that can be found: test on more of them")
    digest = hashlib.sha256(json.dumps([list(train.categories.items()), [train.names[i] for i in kept]]).encode())
    for array in (trained.first, trained.boxes, trained.labels):
        digest.update(np.ascontiguousarray(array))
    notes = _note(train, "{} of no area or outside their image are left out", ~train.usable)
    notes += _note(train, "{} that reach out of their image are clipped", train.reaching_out)
    notes += _note(test, "{} of no area or outside their image are left out", ~test.usable)
    return CocoData(trained, tested, _truth(test, kept_test), train.categories, digest.hexdigest(), notes)


def _find(directory: Path, split: str) -> Path:
    files = sorted((directory / "annotations").glob(f"instances_{split}*.json"))
    if not files:
        raise UserError(
            f"there is no {directory}/annotations/instances_{split}*.json: --data-dir needs train2017/, val2017/ and "
            "annotations/ in COCO's format"
        )
    if len(files) > 1:
        files = [file for file in files if file.stem == f"instances_{split}2017"] or files
    if len(files) > 1:
        raise UserError(f"{files[0]} and {files[1]}: which one is meant? move the other away")
    return files[0]


def _spread(indices: np.ndarray, count: int | None, option: str) -> np.ndarray:
    if count is None:
        return indices
    if not 1 <= count <= len(indices):
        raise UserError(f"--{option} {count}: it must lie between 1 and {len(indices)} (the images)")
    return indices[evenly(len(indices), count)]


def evenly(n: int, count: int) -> np.ndarray:
    """`count` of the numbers 0..n - 1, spread evenly."""
    return np.linspace(0, n - 1, count).astype(int)


def _of_images(source: Annotations, kept: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The wanted annotations of the images `kept`, in the order of these; and of each its image's index in `kept`."""
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
        "id": np.arange(1, len(rows) + 1),  # never 0, which pycocotools takes for none
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
    return [f"{source.file.name}: of the boxes {text.format(boxes.sum())}"] if boxes.any() else []
