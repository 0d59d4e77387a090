"""A synthetic dataset in COCO format, for quick checks and tests: python -m common.detection.synthetic DIR

Cluttered images of 96 to 256 pixels with up to six objects of four classes, which overlap and vary in size, pose,
texture and color. The clutter consists of small shapes with other outlines, which are not annotated. Some images are
empty, and some have a crowd: many small objects of one class in one box. Results on it do not transfer to photos.
"""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.synthetic import SHAPES, TEXTURES, paste
from ..run.errors import UserError, exit_code
from ..run.options import Parser
from ..run.types import count

CLASSES = ("star", "cross", "ring", "triangle")
CLUTTER = ("disc", "hexagon", "trefoil", "square")
SPLITS = {"train": 600, "val": 150}  # images


def draw(split: str, number: int) -> tuple[Image.Image, list[dict]]:
    """Image `number` of split "train" or "val", and its annotations: category_id 1..4, bbox, area, iscrowd.

    Boxes and areas cover the visible part of an object; later objects occlude part of some earlier ones.
    """
    rng = np.random.default_rng([list(SPLITS).index(split), number])
    width, height = rng.integers(96, 257, 2).tolist()
    background = Image.fromarray((255 * (0.25 + 0.5 * rng.random((5, 5, 3)))).astype(np.uint8))
    image = np.array(background.resize((width, height), Image.Resampling.BICUBIC), np.float32)[None] / 255
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    owner = np.full((height, width), -1)  # index of the annotation that a pixel belongs to

    def paint(name: str, center: Sequence[float], radius: float, index: int = -1) -> None:
        scale = np.float32(max(1.0, radius / 12))  # the textures are designed for radii of about 12
        u, v = (x - np.float32(center[0])) / scale, (y - np.float32(center[1])) / scale
        shape, texture = np.array([SHAPES.index(name)]), rng.integers(0, len(TEXTURES), 1)
        owner[paste(image, u, v, shape, texture, np.array([radius / scale]), rng)[0, ..., 0] > 0.5] = index

    def random_point(margin: float) -> np.ndarray:
        sides = np.array([width, height])
        return rng.uniform(np.minimum(margin, sides / 2), np.maximum(sides - margin, sides / 2))

    for _ in range(rng.integers(6, 15)):
        paint(rng.choice(CLUTTER), random_point(0), rng.uniform(3, 9))
    kind = rng.choice(["objects", "crowd", "empty"], p=[0.88, 0.07, 0.05])
    annotations, placed = [], []  # placed: (center, radius) of objects and crowds
    if kind == "crowd":
        name, middle = rng.choice(CLASSES), random_point(30)
        for _ in range(rng.integers(9, 15)):
            paint(name, middle + rng.uniform(-24, 24, 2), rng.uniform(5, 8), index=0)
        annotations.append({"category_id": CLASSES.index(name) + 1, "iscrowd": 1})
        placed.append((middle, 24))
    largest = min(56, 0.42 * min(width, height))
    for radius in sorted(np.exp(rng.uniform(np.log(9), np.log(largest), rng.integers(1, 7))), reverse=True):
        for _ in range(20 if kind != "empty" else 0):
            center = random_point(0.8 * radius)  # some extend beyond the image
            if all(np.hypot(*(center - other)) > 0.75 * (radius + r) for other, r in placed):
                break
        else:
            continue  # no space for it
        name = rng.choice(CLASSES)
        paint(name, center, radius, index=len(annotations))
        annotations.append({"category_id": CLASSES.index(name) + 1, "iscrowd": 0})
        placed.append((center, radius))

    for i, annotation in enumerate(annotations):
        rows, columns = np.nonzero(owner == i)
        left, top = columns.min().item(), rows.min().item()
        annotation["bbox"] = [left, top, columns.max().item() + 1 - left, rows.max().item() + 1 - top]
        annotation["area"] = len(rows)
    image += 0.04 * rng.standard_normal(image.shape, np.float32)
    return Image.fromarray((np.clip(image[0], 0, 1) * 255).astype(np.uint8)), annotations


def write(directory: Path, images: dict[str, int]) -> None:
    """Write `images[split]` images as DIR/<split>/*.jpg and DIR/annotations/instances_<split>.json.

    Raises:
        UserError: the folder already exists.
    """
    if directory.exists():
        raise UserError(f"{directory} already exists: choose a new folder, or remove it")
    for split, n in images.items():
        content = {"images": [], "annotations": []}
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
        (directory / split).mkdir(parents=True)
        for i in range(n):
            image, annotations = draw(split, i)
            name = f"{i:012}.jpg"
            image.save(jpeg := io.BytesIO(), "JPEG", quality=92)  # writing to a file, PIL does not report a full disk
            (directory / split / name).write_bytes(jpeg.getvalue())
            content["images"].append({"id": i, "file_name": name, "width": image.width, "height": image.height})
            for annotation in annotations:
                content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": i, **annotation})
        (directory / "annotations").mkdir(exist_ok=True)
        (directory / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    counts = ", ".join(f"{n} images in {split}" for split, n in images.items())
    print(f"{directory}: {counts}; classes: {', '.join(CLASSES)}")


def main(argv: list[str] | None = None) -> int:
    """Write the dataset. Returns the exit code (see `exit_code`)."""

    def script() -> None:
        parser = Parser(__doc__)
        parser.prog = "python -m common.detection.synthetic"
        parser.add_argument("directory", type=Path, metavar="DIR")
        for split, n in SPLITS.items():
            parser.add_argument(f"--{split}", type=count, default=n, metavar="N", help="number of images")
        args = parser.parse(argv)
        write(args.directory, {split: getattr(args, split) for split in SPLITS})

    return exit_code(script, interrupted="the dataset is incomplete; remove its folder")


if __name__ == "__main__":
    sys.exit(main())
