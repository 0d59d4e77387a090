"""How many JPEGs per second one core, or --workers processes, can read and augment for imagenet.py.

    OMP_NUM_THREADS=1 python ablations/reading.py                  generated photographs of 500x375
    OMP_NUM_THREADS=1 python ablations/reading.py --data-dir DIR --workers 8

DIR holds train/<class>/* and val/<class>/*. Without it, 100 images are generated with the spectrum of photographs
(1/frequency) and saved with quality 90 to 95, about 130 KiB each. The files are in the page cache after the first pass,
which is not counted, so reading from the disk is not included. Normalization runs on the GPU and is excluded too.
"""

import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from ablations.cells import markdown
from common.data.image_files import ImageFiles, Shard, eval_loader, list_files, train_loader
from common.run.errors import exit_code
from common.run.options import Parser
from common.run.torchrun import default_workers
from common.run.types import count, number

DISTINCT = 100  # generated files, read repeatedly
BATCH = 32
CPU = torch.device("cpu")


def photograph(rng: np.random.Generator, width: int = 500, height: int = 375) -> Image.Image:
    """A random image: noise whose amplitude is 1 / frequency, strongly correlated across channels."""

    def noise() -> np.ndarray:
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        frequency[0, 0] = np.inf
        spectrum = (rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)) / frequency
        field = np.fft.irfft2(spectrum, s=(height, width))
        return field / field.std()

    gray = 50 * noise()
    pixels = np.stack([128 + gray + 15 * noise() for _ in range(3)], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path, n: int) -> list[tuple[str, int]]:
    """Write n JPEGs; returns their paths and labels."""
    rng = np.random.default_rng(0)
    samples = [(str(folder / f"{i}.jpg"), 0) for i in range(n)]
    for path, _ in samples:
        photograph(rng).save(path, quality=int(rng.integers(90, 96)))
    return samples


def images_per_second(samples: list[tuple[str, int]], args: Namespace, training: bool, workers: int) -> float:
    """The median rate over the passes, from the same loaders as in imagenet.py."""
    files = ImageFiles(samples, args.image_size, seed=0 if training else None)
    shard = Shard(len(files), BATCH, seed=0)
    batches = train_loader(files, shard, workers, CPU) if training else eval_loader(files, workers, CPU)
    rates = []
    for _ in range(args.passes + 1):
        start = time.perf_counter()
        images = sum(len(labels) for _, labels in batches.loader)  # .loader: without normalization
        rates.append(images / (time.perf_counter() - start))
    return median(rates[1:])  # the first pass starts the workers


def parse_args(argv: list[str] | None) -> Namespace:
    """The options."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data-dir", metavar="DIR", help="an image folder (default: generated images)")
    add("--images", type=count, metavar="N", default=1000, help="in each pass")
    add("--passes", type=count, metavar="N", default=5, help="the rate is their median")
    add("--image-size", type=number(int, 32, 4096), metavar="PIXELS", default=224, help="after cropping")
    add("--workers", type=count, metavar="N", default=default_workers(), help="processes")
    add("--smoke", action="store_true", help="one pass over 8 images")
    args = parser.parse(argv)
    if args.smoke:
        args.images, args.passes = 8, 1
    return args


def main(argv: list[str] | None = None) -> int:
    """Print the table. Returns the exit code (see `exit_code`)."""

    def script() -> None:
        args = parse_args(argv)
        with tempfile.TemporaryDirectory() as folder:
            if args.data_dir:
                data = list_files(args.data_dir)
                splits = {"training": data.train, "testing": data.test}
            else:
                splits = dict.fromkeys(
                    ("training", "testing"), write_photographs(Path(folder), min(DISTINCT, args.images))
                )
            rows = []
            for name, samples in splits.items():
                step = max(1, len(samples) // args.images)  # of all classes, which are listed in order
                samples = [samples[i * step % len(samples)] for i in range(args.images)]
                rates = [images_per_second(samples, args, name == "training", workers) for workers in (0, args.workers)]
                rows.append([name, *(f"{rate:.0f}" for rate in rates)])
        print(markdown(["images/s", "main process", f"{args.workers} workers"], rows))

    return exit_code(script, "rerun the command")


if __name__ == "__main__":
    sys.exit(main())
