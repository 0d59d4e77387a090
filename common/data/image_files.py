"""Datasets too large for memory: DataLoader workers read the image files in every epoch.

Augmentation depends only on (seed, epoch, index) and the order only on (seed, epoch), so neither the number of workers
nor resuming changes the batches. Each rank reads its shard of every global batch.
"""

import hashlib
import os
import random
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

from ..randomness import generator
from ..run.errors import UserError, raise_if_signaled
from .batches import normalize
from .folders import image_folders, open_rgb
from .pixels import augment, read_jpeg, read_pixels
from .sources import SUBSET_OPTIONS, balanced_subset

MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)
EVAL_BATCH = 256  # images per rank


@dataclass
class FileData:
    """A dataset: (path, label) of both splits, class names, and a hash of the class names and training paths."""

    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: list[str]
    fingerprint: str

    def __str__(self) -> str:
        return f"{len(self.train)} training and {len(self.test)} test images in {len(self.classes)} classes"


def list_files(directory: str | Path, subset: int | None = None, test_subset: int | None = None) -> FileData:
    """List the files of train/<class>/* and val/<class>/* (or test/), optionally a balanced subset of each split.

    Raises:
        UserError: the directory or a subset size is invalid.
    """
    (train, test), classes = _list_splits(directory, {"train": subset, "test": test_subset})
    # Hashes file names, since hashing pixels would mean reading every image.
    names = [*classes, *(path.removeprefix(f"{Path(directory)}{os.sep}") for path, _ in train)]
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape"))
    return FileData(train, test, classes, fingerprint=digest.hexdigest())


def list_test_files(directory: str | Path, test_subset: int | None = None) -> tuple[list[tuple[str, int]], list[str]]:
    """List only the (path, label) pairs of the test split and the class names. No train/ is needed.

    Raises:
        UserError: the directory or the subset size is invalid.
    """
    [test], classes = _list_splits(directory, {"test": test_subset})
    return test, classes


def _list_splits(directory: str | Path, counts: dict[str, int | None]) -> tuple[list[list[tuple[str, int]]], list[str]]:
    folders = image_folders(Path(directory), counts, test_names=("val", "test"))
    samples = []
    for folder, (split, count) in zip(folders, counts.items(), strict=True):
        keep = balanced_subset(np.array(folder.targets), count, len(folder.classes), SUBSET_OPTIONS[split])
        samples.append([folder.samples[i] for i in keep])
    return samples, folders[0].classes


class ImageFiles(Dataset):
    """Maps (epoch, index) to an image uint8 [size, size, 3] and its label.

    With a `seed` the image is augmented (RandomResizedCrop, horizontal flip); otherwise its shorter side is resized to
    256/224 * `size` and the center is cropped.
    """

    def __init__(self, samples: list[tuple[str, int]], size: int, seed: int | None = None):
        # Not a list: updating the reference counts of a million strings would copy their memory pages in every worker.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = np.array([label for _, label in samples])
        self.size, self.seed = size, seed
        # PIL, as for the published accuracies: torchvision resizes faster, but some pixels are rounded differently.
        self.center = transforms.Compose([transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        """A batch, which DataLoader requests as a whole.

        All files are read before the first is decoded. Decoding evicts the interpreter from the CPU caches, so Python
        code between two images runs several times slower.
        """
        paths = [os.fsdecode(self.paths[index]) for _, index in keys]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about unusual but readable files, PyTorch about read-only bytes
            if self.seed is None:
                images = [self._center_crop(path) for path in paths]
            else:
                jpegs = [read_jpeg(path) for path in paths]
                rngs = [random.Random(f"{self.seed} {epoch} {index}") for epoch, index in keys]
                images = [
                    augment(read_pixels(*file), self.size, rng) for *file, rng in zip(paths, jpegs, rngs, strict=True)
                ]
        return list(zip(images, self.labels[[index for _, index in keys]].tolist(), strict=True))

    def _center_crop(self, path: str) -> Tensor:
        image = open_rgb(path)
        try:
            return torch.from_numpy(np.array(self.center(image)))
        except MemoryError as error:
            raise UserError(f"the image {path} is too large to resize: remove or replace it") from error


@dataclass
class Shard:
    """Batch sampler of one rank: lists of (epoch, index), every `world_size`-th image of each global batch.

    The last batch is dropped if a rank would get fewer than two images: BatchNorm cannot normalize a single value per
    channel, and the last feature maps of 32-pixel images are 1x1.
    """

    n: int
    batch_size: int  # global
    seed: int
    rank: int = 0
    world_size: int = 1
    epoch: int = 0

    @property
    def sizes(self) -> list[int]:
        """Sizes of an epoch's global batches."""
        sizes = [min(self.batch_size, self.n - i) for i in range(0, self.n, self.batch_size)]
        return [size for size in sizes if size >= 2 * self.world_size]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.n, generator=generator(self.seed, self.epoch, "data"))
        for batch, _ in zip(order.split(self.batch_size), self.sizes, strict=False):
            yield [(self.epoch, i) for i in batch[self.rank :: self.world_size].tolist()]


def train_loader(files: ImageFiles, shard: Shard, workers: int, device: torch.device) -> "DeviceBatches":
    """The batches of `shard`; set `shard.epoch` before each epoch."""
    return DeviceBatches(_loader(files, shard, workers, device), device)


def eval_loader(
    files: ImageFiles, workers: int, device: torch.device, rank: int = 0, world_size: int = 1
) -> "DeviceBatches":
    """Every `world_size`-th image, in order. No image is duplicated, so some ranks may have one fewer."""
    shard = [(0, i) for i in range(rank, len(files), world_size)]
    batches = [shard[i : i + EVAL_BATCH] for i in range(0, len(shard), EVAL_BATCH)]
    return DeviceBatches(_loader(files, batches, workers, device), device)


def _loader(
    files: ImageFiles, batches: Iterable[list[tuple[int, int]]], workers: int, device: torch.device
) -> DataLoader:
    return DataLoader(
        files,
        batch_sampler=batches,
        num_workers=workers,  # each prefetches two batches
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=ignore_interrupts,
    )


class DeviceBatches:
    """Batches (images float32 [B, 3, H, W] in channels_last format, labels [B]), moved to the device and normalized.

    Attributes:
        waited: seconds of the last epoch spent waiting for data with at most one step queued on the device.
    """

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, self.device, self.waited = loader, device, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.waited = 0.0
        batches, events = iter(self.loader), []
        while True:
            if self.device.type == "cuda":  # if the host ran ahead, `waited` would count busy device time
                events.append(torch.cuda.Event(blocking=True))  # sleeps instead of spinning: workers need the cores
                events[-1].record()
                if len(events) > 1:
                    events.pop(0).synchronize()
            start = time.monotonic()
            batch = next_batch(batches)
            self.waited += time.monotonic() - start
            if batch is None:
                return
            images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            yield normalize(images, MEAN, STD), labels


def ignore_interrupts(_worker: int) -> None:
    """worker_init_fn: ignore Ctrl-C, which the terminal sends to every process; the main process ends its workers.

    A worker that handled it would wait for its batches to be fetched, and PyTorch would wait five seconds per worker.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def next_batch(batches: Iterator) -> Any:
    """The next batch of a DataLoader iterator, or None at the end.

    Raises:
        UserError: an image could not be read.
        Terminated: a signal arrived while the workers were starting.
    """
    raise_if_signaled()
    try:
        return next(batches, None)
    except UserError as error:  # a worker's error message includes its traceback
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.removeprefix(f"{UserError.__module__}.UserError: ")) from None
