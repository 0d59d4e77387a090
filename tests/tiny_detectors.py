"""Small Faster R-CNN detectors with narrow ROI heads, and small COCO-format datasets."""

import json

import numpy as np
from PIL import Image
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from common.detection import detectors

UNITS = 16


def faster_rcnn(backbone, num_classes, **options):
    heads = {"box_head": TwoMLPHead(256 * 49, UNITS), "box_predictor": FastRCNNPredictor(UNITS, num_classes)}
    return FasterRCNN(backbone, **heads, **options)


def shrink(monkeypatch):
    """Make `build_detector` use the narrow ROI head."""
    monkeypatch.setattr(detectors, "FasterRCNN", faster_rcnn)


def write_coco(folder, images, annotations, categories=((1, "cat"), (2, "dog")), split="train", pixels=True):
    """Write a split in COCO's format; returns the annotation file.

    Args:
        images: tuples (id, file_name, width, height).
        annotations: tuples (image_id, category_id, bbox) or (image_id, category_id, bbox, iscrowd).
        pixels: whether to write real images instead of empty files.
    """
    rng = np.random.default_rng(0)
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for _, name, width, height in images:
        if pixels:
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / split / name)
        else:
            (folder / split / name).touch()
    keys = ("image_id", "category_id", "bbox", "iscrowd")
    content = {
        "images": [dict(zip(("id", "file_name", "width", "height"), row, strict=True)) for row in images],
        "annotations": [dict(zip(keys, row, strict=False)) for row in annotations],
        "categories": [{"id": i, "name": name} for i, name in categories],
    }
    path = folder / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content))
    return path
