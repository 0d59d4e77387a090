"""Types of command-line options, for argparse: numbers in a range, and known names."""

import argparse
import difflib
from collections.abc import Callable, Iterable
from typing import Any

LARGEST = 10**9


def number(cast: type, low: float, high: float = LARGEST, exclusive: bool = False) -> Callable[[str], Any]:
    """A type for add_argument: a number in low..high, without `low` itself if `exclusive`."""

    def convert(text: str) -> Any:
        try:
            value = cast(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text} is not {'a whole' if cast is int else 'a'} number") from error
        if not low <= value <= high or (exclusive and value == low):
            limit = f"above {low:g}, at most {high}" if exclusive else f"between {low:g} and {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {limit}")
        return value

    return convert


count = number(int, 1)
count_or_zero = number(int, 0)
positive = number(float, 0, exclusive=True)
weight = number(float, 0)


def name_in(known: Iterable[str]) -> Callable[[str], str]:
    """A type for add_argument: one of the `known` names; the error for another one suggests similar names."""

    def convert(text: str) -> str:
        if text not in known:
            spelled = {name.lower(): name for name in known}
            near = [spelled[name] for name in difflib.get_close_matches(text.lower(), spelled, cutoff=0.5)]
            hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
            raise argparse.ArgumentTypeError(f"unknown network {text!r}: {hint}")
        return text

    return convert
