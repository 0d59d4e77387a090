"""Images of a COCO-format dataset with their boxes, read by worker processes in batches of similar shape.

The order is seeded by (seed, epoch) and the flips by (seed, iteration, position in the batch), so neither the number of
workers nor resuming in the middle of an epoch changes the batches.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.folders import open_rgb
from ..data.image_files import ignore_interrupts, next_batch
from ..randomness import derive_seed, generator
from ..run.errors import UserError
from .coco import Split

# An image, and its "boxes" [n, 4] (x1, y1, x2, y2 in pixels) and "labels" [n] (1..K). BoxedImages returns arrays, the
# image uint8 [H, W, 3]; `load` returns tensors, the image float32 [3, H, W] in 0..1.
Sample = tuple[Any, dict[str, Any]]
# Iteration and position in the global batch, which seed the flip, and the image's index.
Key = tuple[int, int, int]


class BoxedImages(Dataset):
    """Maps a Key to a sample of NumPy arrays, the image uint8 as in its file, randomly flipped if `seed` is given.

    Not tensors: each tensor that a worker sends takes a file descriptor, and these can run out.
    """

    def __init__(self, split: Split, seed: int | None = None):
        self.split, self.seed = split, seed

    def __getitem__(self, key: Key) -> Sample:
        iteration, position, i = key
        path = os.fsdecode(self.split.files[i])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about unusual but readable files
            image = np.array(open_rgb(path))
        width, height = self.split.sizes[i].tolist()
        if image.shape[:2] != (height, width):
            name, size = path.replace("\n", "\\n"), f"{image.shape[1]}x{image.shape[0]}"
            raise UserError(
                f"the image {name} has {size} pixels, but its annotation says {width}x{height}: correct one of them"
            )
        rows = slice(self.split.first[i], self.split.first[i + 1])
        boxes, labels = self.split.boxes[rows], self.split.labels[rows]
        if self.seed is not None and derive_seed(self.seed, iteration, "flip", position) % 2:
            image = image[:, ::-1]
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        return np.ascontiguousarray(image), {"boxes": boxes, "labels": labels}


def batches(
    split: Split, batch_size: int, seed: int, first: int, last: int, rank: int = 0, world: int = 1
) -> Iterator[list[Key]]:
    """One rank's share, of `world`, of the batches of iterations first..last - 1.

    A batch has only portrait images or none, which keeps the padding small. Each epoch has its own order. Images that
    do not fill a batch at the end of an epoch are carried over to the next one.

    Args:
        batch_size: total over all ranks.
    """
    tall = split.sizes[:, 1] > split.sizes[:, 0]

    def infinite_batches() -> Iterator[list[int]]:
        pending: dict[bool, list[int]] = {False: [], True: []}
        for epoch in count():
            for i in torch.randperm(len(split), generator=generator(seed, epoch, "data")).tolist():
                group = pending[bool(tall[i])]
                group.append(i)
                if len(group) == batch_size:
                    yield list(group)
                    group.clear()

    for iteration, batch in enumerate(islice(infinite_batches(), first, last), first):
        yield [(iteration, position, i) for position, i in enumerate(batch)][rank::world]


@dataclass
class Batch:
    """Samples as BoxedImages returns them, or pinned."""

    samples: list[Sample]

    def pin_memory(self) -> "Batch":
        """Copy the arrays to tensors in pinned memory; DataLoader calls it in its own thread."""

        def pin(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).pin_memory()

        return Batch([(pin(image), {key: pin(x) for key, x in target.items()}) for image, target in self.samples])


def load(
    images: BoxedImages, batches: Iterable[list[Key]], workers: int, device: torch.device
) -> Iterator[list[Sample]]:
    """One pass over `batches`, as tensors on the device.

    Raises:
        UserError: an image cannot be read, or its size differs from its annotation; the message names it.
    """
    cuda = device.type == "cuda"  # then a thread unpickles and pins batches, and no copy waits for the GPU
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=Batch,
        pin_memory=cuda,
        worker_init_fn=ignore_interrupts,
    )

    def to_device(value: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(value).to(device, non_blocking=cuda)

    samples = iter(loader)
    while (batch := next_batch(samples)) is not None:
        yield [
            (
                to_device(image).permute(2, 0, 1).float() / 255,
                {key: to_device(value) for key, value in target.items()},
            )
            for image, target in batch.samples
        ]
