"""Shared by the scripts that plot figures: loading matplotlib, colors, saving."""

import warnings
from pathlib import Path
from typing import Any

from common.run.errors import UserError

# Colorblind-safe (Okabe and Ito).
COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]
FORMATS = (".png", ".svg", ".pdf")


def load_pyplot() -> Any:
    """matplotlib.pyplot with the non-interactive Agg backend.

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
    """Raise a UserError if `out` does not end in one of FORMATS."""
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out}: must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def save_figure(figure: Any, out: Path) -> None:
    """Write a matplotlib figure, creating its folder if necessary.

    Raises:
        UserError: it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing glyphs
            figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out} ({error}): choose another --out") from error
