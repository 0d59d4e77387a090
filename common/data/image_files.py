"""Images that are read from their files in every epoch, by worker processes: sets too large for memory.

Each image's augmentation is drawn from (seed, epoch, index) and the order from (seed, epoch), so the number of workers
and a resume change nothing. With several ranks each reads its part of every global batch.
"""

import hashlib
import os
import signal
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ..randomness import generator, seed_of
from ..run.errors import UserError, heed_signals
from .batches import normalise
from .sources import image_folder, open_rgb, spread

MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)
EVAL_BATCH = 256  # images a rank


@dataclass
class FileData:
    """A data set: paths and labels of both splits, the names of its classes, a hash of these and the training paths."""

    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: list[str]
    fingerprint: str


def list_files(directory: str | Path, subset: int | None = None, test_subset: int | None = None) -> FileData:
    """The files of train/<class>/* and val/<class>/* (or test/); `subset`s are spread evenly over the classes.

    Raises:
        UserError: what is wrong with the directory or the numbers.
    """
    directory = Path(directory)
    train, test = image_folder(directory, test_names=("val", "test"))
    splits = []
    for folder, count, option in ((train, subset, "subset"), (test, test_subset, "test-subset")):
        keep = spread(np.array(folder.targets), count, len(folder.classes), option)
        splits.append([folder.samples[i] for i in keep])
    # File names and not pixels, which would all have to be read.
    names = [*train.classes, *(path.removeprefix(f"{directory}{os.sep}") for path, _ in splits[0])]
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape"))
    return FileData(*splits, classes=train.classes, fingerprint=digest.hexdigest())


class ImageFiles(Dataset):
    """(epoch, index) -> image uint8 [size, size, 3] and its label; augmented if `seed` is given.

    Augmentation is RandomResizedCrop and a flip; else the shorter side becomes 256/224 of `size` and the centre is cut.
    """

    def __init__(self, samples: list[tuple[str, int]], size: int, seed: int | None = None):
        # Not a list: the reference counts of a million strings would make every worker copy them in time.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = np.array([label for _, label in samples])
        self.seed = seed
        if seed is None:
            steps = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
        else:
            steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        path, label = os.fsdecode(self.paths[index]), int(self.labels[index])
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # PIL's, on odd but readable files
            image = open_rgb(path)
            if self.seed is not None:  # torchvision's transforms draw from PyTorch's global generator
                torch.default_generator.manual_seed(seed_of(self.seed, epoch, "augmentation", index))
            try:
                image = self.transform(image)
            except MemoryError as error:
                raise UserError(f"the image {path} is too large to be resized: remove or replace it") from error
        return torch.from_numpy(np.array(image)), label


@dataclass
class Shard:
    """The batches of one rank in `epoch`, as lists of (epoch, index): every `world`-th image of each global batch.

    A last batch that would leave a rank with a single image is left out: where the last maps have one pixel, as at 32
    pixels, BatchNorm can make nothing of it.
    """

    n: int
    batch_size: int  # of all ranks together
    seed: int
    rank: int = 0
    world: int = 1
    epoch: int = 0

    @property
    def sizes(self) -> list[int]:
        """Of the global batches of an epoch."""
        sizes = [min(self.batch_size, self.n - i) for i in range(0, self.n, self.batch_size)]
        return [size for size in sizes if size >= 2 * self.world]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.n, generator=generator(self.seed, self.epoch, "data"))
        for batch, _ in zip(order.split(self.batch_size), self.sizes, strict=False):
            yield [(self.epoch, i) for i in batch[self.rank :: self.world].tolist()]


def train_loader(files: ImageFiles, shard: Shard, workers: int, device: torch.device) -> "DeviceBatches":
    """The batches of `shard`, whose `epoch` is to be set before each pass."""
    return DeviceBatches(_loader(files, shard, workers, device), device)


def eval_loader(
    files: ImageFiles, workers: int, device: torch.device, rank: int = 0, world: int = 1
) -> "DeviceBatches":
    """Every `world`-th image, in order: no image falls to two ranks, and some ranks may have one less."""
    mine = [(0, i) for i in range(rank, len(files), world)]
    batches = [mine[i : i + EVAL_BATCH] for i in range(0, len(mine), EVAL_BATCH)]
    return DeviceBatches(_loader(files, batches, workers, device), device)


def _loader(
    files: ImageFiles, batches: Iterable[list[tuple[int, int]]], workers: int, device: torch.device
) -> DataLoader:
    pinned = device.type == "cuda"
    return DataLoader(
        files,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pinned,
        persistent_workers=workers > 0,
        worker_init_fn=ignore_interrupts,
    )


class DeviceBatches:
    """Batches (images float32 [B, 3, H, W] in channels_last order, labels [B]) on the device, normalised there.

    Attributes:
        waited: seconds that the last pass spent waiting for data while the device had at most one step left to do.
    """

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, self.device, self.waited = loader, device, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.waited = 0.0
        batches, steps_before = iter(self.loader), []
        while True:
            if self.device.type == "cuda":  # else the host would run ahead, and wait while the device does not
                steps_before.append(torch.cuda.Event(blocking=True))  # sleeping: readers need the cores
                steps_before[-1].record()
                if len(steps_before) > 1:
                    steps_before.pop(0).synchronize()
            began = time.monotonic()
            batch = next_batch(batches)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            images, labels = (part.to(self.device, non_blocking=True) for part in batch)
            yield normalise(images, channels_last=True, mean=MEAN, std=STD), labels


def ignore_interrupts(_worker: int) -> None:
    """A DataLoader's worker_init_fn. Ctrl-C reaches every process of a terminal; the main one ends its workers itself.

    One that met it would wait until all that it has read was fetched, and PyTorch five seconds for each.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def next_batch(batches: Iterator) -> Any:
    """The next batch of a DataLoader's iterator, None at its end.

    Raises:
        UserError: reading an image ended in one.
        Terminated: a signal came while the readers were being started.
    """
    heed_signals()
    try:
        return next(batches, None)
    except UserError as error:  # from a worker it comes with that one's traceback before it
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.removeprefix(f"{UserError.__module__}.UserError: ")) from None
