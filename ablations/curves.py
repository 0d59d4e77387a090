"""Learning curves from the log.csv files of one or more runs.

    python ablations/curves.py runs/A-seed1 runs/A-seed2 runs/B-seed1 --out curves.png

Runs are given by their folders. Runs whose names differ only in the seed share a color: a thin line for each of them, a
thick one for their mean.
"""

import csv
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablations.figures import COLORS, check_format, load_pyplot, save_figure
from common.run.errors import UserError, exit_code
from common.run.options import Parser

LABELS = {"test_top1": "test accuracy, top-1 (%)", "train_top1": "training accuracy, top-1 (%)", "loss": "loss"}
STYLES = ["-", "--", ":", "-."]  # for more curves than colors


def series(runs: Iterable[Path]) -> dict[str, list[Path]]:
    """Group runs whose folder names differ only in the seed, by their common name; duplicates are removed."""
    runs = list(dict.fromkeys(run.resolve() for run in runs))
    several = len({run.parent for run in runs}) > 1
    groups: dict[str, list[Path]] = {}
    for run in runs:
        name = re.sub(r"-seed\d+$", "", run.name)
        groups.setdefault(f"{run.parent.name}/{name}" if several else name, []).append(run)
    return groups


def read_curve(run: Path, column: str) -> dict[int, float]:
    """A column of a run's log.csv by epoch or iteration, which is the first column; empty cells are omitted.

    Raises:
        UserError: the log or the column is missing, the log is empty, or the column has no numbers.
    """
    try:
        with (run / "log.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        unit = next(iter(rows[0]), None) if rows else None
        values = {int(row[unit]): float(row[column]) for row in rows if row[column] != ""}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{run} is not a run's folder ({error}): pass folders that contain a log.csv") from error
    except KeyError as error:
        raise UserError(
            f"{run / 'log.csv'} has no column {column}: it has {', '.join(filter(None, rows[0]))}"
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{run / 'log.csv'} has no numbers in column {column}: choose other --columns") from error
    if not rows:
        raise UserError(f"{run / 'log.csv'} has no epochs: omit this run")
    if not values:
        raise UserError(f"{run / 'log.csv'} has no numbers in column {column}: choose other --columns")
    return values


def group(runs: list[Path], column: str) -> dict[str, list[dict[int, float]]]:
    """The curves of runs that differ only in the seed, by their common name."""
    return {name: [read_curve(run, column) for run in group] for name, group in series(runs).items()}


def mean_curve(curves: list[dict[int, float]]) -> dict[int, float]:
    """The mean of the curves, at every epoch or iteration that all of them have."""
    return {x: statistics.mean(curve[x] for curve in curves) for x in curves[0] if all(x in c for c in curves)}


def draw(runs: list[Path], columns: list[str], out: Path) -> None:
    """Write a figure with one panel per column.

    Raises:
        UserError: matplotlib is missing; a run cannot be read; the figure cannot be written.
    """
    pyplot = load_pyplot()
    check_format(out)
    groups = {column: group(runs, column) for column in columns}
    unit = (runs[0] / "log.csv").read_text().partition(",")[0]  # epoch or iteration
    figure, panels = pyplot.subplots(
        1, len(columns), figsize=(6.4 * len(columns), 4.4), squeeze=False, layout="constrained"
    )
    for panel, column in zip(panels[0], columns, strict=True):
        for i, (name, curves) in enumerate(groups[column].items()):
            style = {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i // len(COLORS) % len(STYLES)]}
            for curve in curves if len(curves) > 1 else []:
                panel.plot(curve.keys(), curve.values(), linewidth=0.6, alpha=0.5, **style)
            mean = mean_curve(curves)
            count = f" (mean of {len(curves)})" if len(curves) > 1 else ""
            label = name.replace("$", r"\$") + count
            marker = "o" if len(mean) == 1 else ""
            panel.plot(mean.keys(), mean.values(), linewidth=1.8, marker=marker, label=label, **style)
        panel.set(xlabel=unit, ylabel=LABELS.get(column, column))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", frameon=False, ncols=2)
    save_figure(figure, out)


def main(argv: list[str] | None = None) -> int:
    """Plot the curves. Returns the exit code (see `exit_code`)."""

    def script() -> None:
        parser = Parser(__doc__)
        parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folders that contain a log.csv")
        parser.add_argument(
            "--columns", nargs="+", metavar="NAME", default=["test_top1"], help="columns of log.csv, such as loss"
        )
        parser.add_argument("--out", metavar="FILE", default="results/curves/curves.png", help="the figure")
        args = parser.parse(argv)
        draw(args.runs, args.columns, Path(args.out))
        print(f"written to {args.out}")

    return exit_code(script, "rerun the command")


if __name__ == "__main__":
    sys.exit(main())
