"""Reading options and checking the ranges of settings, for every script."""

import argparse

from .errors import UserError

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

    def given(self, argv: list[str] | None) -> dict:
        """The options that were given, by name, and no others."""
        options = vars(self.parse_args(argv))
        for key, value in options.items():
            if value == "":
                self.error(f"--{key.replace('_', '-')} is empty")
        return options

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def check_ranges(c: argparse.Namespace) -> None:
    """Raise a UserError for a setting that is out of range; None is not checked."""
    for key, value in vars(c).items():
        option = f"--{key.replace('_', '-')} {value}"
        if value is None:
            continue
        if key in ("epochs", "teacher_epochs", "batch_size") and not 1 <= value <= LARGEST:
            raise UserError(f"{option}: it must lie between 1 and {LARGEST}")
        if key == "seed" and not 0 <= value <= LARGEST:
            raise UserError(f"{option}: it must lie between 0 and {LARGEST}")
        if key in ("lr", "temperature", "max_minutes") and not 0 < value <= LARGEST:
            raise UserError(f"{option}: it must be a number above 0, at most {LARGEST}")
        if key.startswith("w_") and not 0 <= value <= LARGEST:
            raise UserError(f"{option}: it must be a number from 0 to {LARGEST}")
