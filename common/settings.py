"""Reading options and checking the ranges of settings, for every script."""

import argparse
import math

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that returns only the options that were given, and raises UserError instead of exiting."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def check_ranges(c: argparse.Namespace) -> None:
    """Raise a UserError for a setting that is out of range; None is not checked."""
    for key, value in vars(c).items():
        option = f"--{key.replace('_', '-')} {value}"
        if value is None:
            continue
        if key in ("epochs", "teacher_epochs", "batch_size") and value < 1:
            raise UserError(f"{option}: it must be 1 or more")
        if key == "seed" and value < 0:
            raise UserError(f"{option}: it must be 0 or more")
        if key in ("lr", "temperature", "max_minutes") and not 0 < value < math.inf:
            raise UserError(f"{option}: it must be a finite number above 0")
        if key.startswith("w_") and not 0 <= value < math.inf:
            raise UserError(f"{option}: it must be a finite number, 0 or more")
