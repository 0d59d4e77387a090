"""What the figures share: matplotlib, their colours, writing them."""

import warnings
from pathlib import Path
from typing import Any

from common.run.errors import UserError

# Told apart by the colour-blind too (Okabe and Ito).
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]
FORMATS = (".png", ".svg", ".pdf")


def load_pyplot() -> Any:
    """matplotlib.pyplot, drawing into files alone.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install -r requirements-extra.txt") from error
    return pyplot


def check_format(out: Path) -> None:
    """Raise a UserError if a figure cannot be written under this name."""
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out}: it must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def save_figure(figure: Any, out: Path) -> None:
    """Write a matplotlib figure, making its folder.

    Raises:
        UserError: it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font lacks
            figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out} ({error}): choose another --out") from error
