"""The images of a set in COCO's format with their boxes, read by worker processes, in batches of like shape.

The order is drawn from (seed, epoch) and the flips from (seed, iteration, place in the batch), so neither the number of
workers nor a resume in the middle of an epoch changes anything: no image is skipped, and none comes twice in an epoch.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.image_files import ignore_interrupts, next_batch
from ..data.sources import open_rgb
from ..randomness import generator, seed_of
from ..run.errors import UserError
from .coco import Split

# An image, its "boxes" [n, 4] (x1, y1, x2, y2 in pixels) and "labels" [n] (1..K). Read, these are arrays, the image
# uint8 [H, W, 3]; loaded, they are tensors, the image float32 [3, H, W] in 0..1.
Sample = tuple[Any, dict[str, Any]]
# Iteration, place in the batch of all ranks together (from these two the flip is drawn), and the image's index.
Key = tuple[int, int, int]


class BoxedImages(Dataset):
    """Key -> a sample of arrays, the image uint8 as it is in its file, flipped by chance if `seed` is given.

    Arrays, since a tensor on its way from a worker needs a file descriptor, and these are soon too many.
    """

    def __init__(self, split: Split, seed: int | None = None):
        self.split, self.seed = split, seed

    def __getitem__(self, key: Key) -> Sample:
        iteration, place, i = key
        path = os.fsdecode(self.split.files[i])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, on odd but readable files
            image = np.array(open_rgb(path))
        width, height = self.split.sizes[i].tolist()
        if image.shape[:2] != (height, width):
            name, there = path.replace("\n", "\\n"), f"{image.shape[1]}x{image.shape[0]}"
            raise UserError(
                f"the image {name} is of {there} pixels, and its annotation says {width}x{height}: mend one of them"
            )
        mine = slice(self.split.first[i], self.split.first[i + 1])
        boxes, labels = self.split.boxes[mine], self.split.labels[mine]
        if self.seed is not None and seed_of(self.seed, iteration, "flip", place) % 2:
            image = image[:, ::-1]
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        return np.ascontiguousarray(image), {"boxes": boxes, "labels": labels}


def batches(
    split: Split, batch_size: int, seed: int, first: int, last: int, rank: int = 0, world: int = 1
) -> Iterator[list[Key]]:
    """The part of one rank, of `world`, in the batches of iterations first..last - 1.

    A batch is of images that are all higher than wide, or none of them: padded to one size, these waste little. Each
    epoch has its own order. What does not fill a batch at the end of an epoch waits there for its like of the next one.

    Args:
        batch_size: of all ranks together.
    """
    high = split.sizes[:, 1] > split.sizes[:, 0]

    def endless() -> Iterator[list[int]]:
        waiting: dict[bool, list[int]] = {False: [], True: []}
        for epoch in count():
            for i in torch.randperm(len(split), generator=generator(seed, epoch, "data")).tolist():
                group = waiting[bool(high[i])]
                group.append(i)
                if len(group) == batch_size:
                    yield list(group)
                    group.clear()

    for iteration, batch in enumerate(islice(endless(), first, last), first):
        yield [(iteration, place, i) for place, i in enumerate(batch)][rank::world]


def load(
    images: BoxedImages, batches: Iterable[list[Key]], workers: int, device: torch.device
) -> Iterator[list[Sample]]:
    """One pass over `batches`, on the device, where pixels become float32 in 0..1.

    Raises:
        UserError: an image cannot be read, or is of another size than its annotation says; it is named.
    """
    loader = DataLoader(
        images, batch_sampler=batches, num_workers=workers, collate_fn=list, worker_init_fn=ignore_interrupts
    )
    samples = iter(loader)
    while (batch := next_batch(samples)) is not None:
        yield [
            (
                torch.from_numpy(image).to(device).permute(2, 0, 1).float() / 255,
                {key: torch.from_numpy(value).to(device) for key, value in target.items()},
            )
            for image, target in batch
        ]
