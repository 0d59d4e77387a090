"""Settings and options, for every script: the published ones, reading what is given, filling in, checking ranges."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from .device import AMP
from .errors import UserError

ALL_SETTINGS: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "published.yaml").read_text())  # by script
COUNTS = ("epochs", "teacher_epochs", "batch_size", "iterations", "save_every", "eval_every", "rois", "visualize")
LARGEST = 10**9  # beyond any setting's sense, within what every computation with it can take


class Parser(argparse.ArgumentParser):
    """An argument parser whose `given` are the options that were given, and which raises UserError, not SystemExit."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )

    def add_image_set_options(self) -> None:
        """Which 32x32 images to train and test on: what `sources.load_data` takes."""
        add = self.add_argument
        add("--dataset", choices=("cifar100", "cifar10", "folder", "synthetic"), help="default: cifar100")
        add("--data-dir", metavar="DIR", help="default: data; for 'folder' it holds train/ and test/ or val/")
        add("--subset", type=int, metavar="N", help="train on N images, spread evenly over the classes")
        add("--test-subset", type=int, metavar="N", help="test on N images, spread evenly over the classes")

    def add_run_options(self, unit: str = "epoch") -> None:
        """Where and how long a run goes, and where it writes; it can be stopped after each `unit`."""
        add = self.add_argument
        add("--seed", type=int, help="default: 1")
        add("--device", help="cpu, cuda, cuda:N or mps (default: cuda if there is one, else cpu)")
        add("--amp", choices=AMP, help="default: fp16 on CUDA, else off")
        add("--out", metavar="DIR", help="default: a folder under runs/ named after the settings")
        add("--resume", action="store_true", help="go on from --out; settings that are not given are the run's")
        add("--max-minutes", type=float, metavar="M", help=f"stop after the {unit} in which they have passed")

    def given(self, argv: list[str] | None) -> dict:
        """The options that were given, by name, and no others."""
        options = vars(self.parse_args(argv))
        for key, value in options.items():
            if value == "":
                self.error(f"--{key.replace('_', '-')} is empty")
        return options

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def term_weights(pair: dict[str, float]) -> dict[str, float]:
    """The weight of each term of Eq. 9 for a pair's row in published.yaml."""
    l2, kl = pair["w_l2"], pair["w_kl"]
    return {"task": 1, "kd": 1, "app": l2, "func_l2": l2, "func_kl": kl, "func_prime": kl}


def fill(c: argparse.Namespace, follows: dict[str, Any]) -> None:
    """Set each setting in `follows` that is still None."""
    for key, value in follows.items():
        if getattr(c, key) is None:
            setattr(c, key, value)


def check_ranges(c: argparse.Namespace) -> None:
    """Raise a UserError for a setting that is out of range; None is not checked."""
    for key, value in vars(c).items():
        option = f"--{key.replace('_', '-')} {value}"
        if value is None:
            continue
        if key in COUNTS and not 1 <= value <= LARGEST:
            raise UserError(f"{option}: it must lie between 1 and {LARGEST}")
        if key == "image_size" and not 32 <= value <= 4096:
            raise UserError(f"{option}: it must lie between 32 and 4096 pixels")
        if key == "min_size" and not all(96 <= size <= 1333 for size in value):
            raise UserError(f"--min-size {' '.join(map(str, value))}: it must lie between 96 and 1333 pixels")
        if key == "workers" and not 0 <= value <= 1000:
            raise UserError(f"{option}: it must lie between 0 and 1000")
        if key == "seed" and not 0 <= value <= LARGEST:
            raise UserError(f"{option}: it must lie between 0 and {LARGEST}")
        if key in ("lr", "temperature", "max_minutes") and not 0 < value <= LARGEST:
            raise UserError(f"{option}: it must be a number above 0, at most {LARGEST}")
        if key.startswith(("w_", "weight", "tckd", "nckd")) and not 0 <= value <= LARGEST:
            raise UserError(f"{option}: it must be a number from 0 to {LARGEST}")
