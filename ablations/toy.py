"""Equal in L2, unequal in function (Fig. 1): a ring of features around a target, and the output for each of them.

    python ablations/toy.py

The example is small enough to check by hand. A feature has two components f = (f1, f2); the later part of the network
is a linear layer to three classes and a softmax:

    z1 =  2 f1 -   f2 + 1        the target (4, 4) gives z = (5, 4, 4),
    z2 =   -f1 + 2 f2            so p = softmax(z) = (0.576, 0.212, 0.212)
    z3 = f1/2 +   f2 - 2

All points on the ring are equidistant from the target, so an L2 loss such as L_app cannot tell them apart. How much
their outputs deviate from the target's, KL(p_target || p_point) in nats, varies widely.
"""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from ablations.cells import markdown
from ablations.figures import COLORS, load_pyplot, save_figure
from common.run.checkpoint import write_atomically
from common.run.errors import exit_code
from common.run.options import Parser
from common.run.types import number

TARGET = torch.tensor([4.0, 4.0], dtype=torch.float64)
WEIGHT = torch.tensor([[2.0, -1.0], [-1.0, 2.0], [0.5, 1.0]], dtype=torch.float64)
BIAS = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)


def later_part(features: Tensor) -> Tensor:
    """Map features [..., 2] to logits [..., 3]."""
    return features @ WEIGHT.T + BIAS


def kl_nats(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) in nats over the last dimension of logits [..., K]; temperature 1."""
    log_p, log_q = target.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def ring(radius: float, count: int = 360) -> list[dict[str, Any]]:
    """`count` evenly spaced points on the circle around the target, counterclockwise from angle 0 (along f1).

    Each has: angle (degrees), point (f1, f2), l2 (distance from the target), output (3 probabilities), kl (nats).
    """
    angles = torch.arange(count, dtype=torch.float64) * 360 / count
    offsets = radius * torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], 1)
    logits = later_part(TARGET + offsets)
    columns = {
        "angle": angles,
        "point": TARGET + offsets,
        "l2": offsets.norm(dim=1),
        "output": logits.softmax(1),
        "kl": kl_nats(later_part(TARGET), logits),
    }
    return [{key: values[i].tolist() for key, values in columns.items()} for i in range(count)]


def rounded(value: Any) -> Any:
    """The numbers in nested lists and dicts, to six digits: the same on every machine."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else float(f"{value:.6g}")


def extremes(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows with the smallest and the largest KL."""
    return min(rows, key=lambda row: row["kl"]), max(rows, key=lambda row: row["kl"])


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of eight directions, 45 degrees apart, and the two extremes."""

    def vector(values: list[float], digits: int) -> str:
        return f"({', '.join(f'{value:.{digits}f}' for value in values)})"

    smallest, largest = extremes(rows)
    named = [("", row) for row in rows[:: len(rows) // 8]] + [("smallest KL", smallest), ("largest KL", largest)]
    lines = [
        [name, f"{r['angle']:g}", vector(r["point"], 2), f"{r['l2']:.2f}", vector(r["output"], 3), f"{r['kl']:.3g}"]
        for name, r in named
    ]
    p = vector(later_part(TARGET).softmax(0).tolist(), 3)
    return (
        markdown(["", "direction (degrees)", "point", "L2", "output p", "KL (nats)"], lines)
        + f"\nThe target {vector(TARGET.tolist(), 0)} has p = {p}; KL is KL(p_target || p_point). Over all {len(rows)} "
        + f"points, the largest KL is {largest['kl'] / smallest['kl']:.0f} times the smallest.\n"
    )


def draw(rows: list[dict[str, Any]], out: Path, cells: int = 300) -> None:
    """Plot the ring on KL contours (from a grid of `cells` x `cells`), and KL against direction; save to `out`.

    Raises:
        UserError: matplotlib is missing; the figure cannot be written.
    """
    pyplot = load_pyplot()
    smallest, largest = extremes(rows)
    angles, kl = [row["angle"] for row in rows], [row["kl"] for row in rows]
    (xs, ys), radius = zip(*(row["point"] for row in rows), strict=True), rows[0]["l2"]
    color_scale = {"cmap": "viridis", "norm": pyplot.matplotlib.colors.LogNorm(smallest["kl"], largest["kl"])}
    figure, (plane, profile) = pyplot.subplots(
        1, 2, figsize=(8, 3.9), layout="constrained", gridspec_kw={"width_ratios": [1.25, 1]}
    )

    axes = [torch.linspace(c - 1.4 * radius, c + 1.4 * radius, cells, dtype=torch.float64) for c in TARGET.tolist()]
    grid = torch.stack(torch.meshgrid(*axes, indexing="xy"), -1)
    heights = kl_nats(later_part(TARGET), later_part(grid))
    exponents = range(math.floor(math.log10(smallest["kl"])), math.ceil(math.log10(largest["kl"])) + 1)
    levels = [digit * 10.0**exponent for exponent in exponents for digit in (1, 3)]
    plane.contourf(*axes, heights, levels, alpha=0.35, extend="both", **color_scale)
    lines = plane.contour(*axes, heights, levels, linewidths=0.5, colors="dimgrey")
    plane.scatter(xs, ys, s=56, c="black", zorder=3)
    points = plane.scatter(xs, ys, s=36, c=kl, zorder=4, **color_scale)
    for row in rows[:: len(rows) // 4]:
        at = [c + 1.22 * (x - c) for c, x in zip(TARGET.tolist(), row["point"], strict=True)]
        plane.text(*at, f"{row['angle']:g}°", ha="center", va="center")
    plane.plot(*TARGET.tolist(), "*", color=COLORS[3], markersize=15, markeredgecolor="black")
    plane.annotate("target", TARGET.tolist(), (10, -13), textcoords="offset points")
    plane.set(xlabel="feature $f_1$", ylabel="feature $f_2$", aspect="equal")
    plane.set_title(f"on the ring L2 = {radius:g} everywhere ...", fontsize=11)
    bar = figure.colorbar(points, ax=plane, label="KL from the target's output (nats)", pad=0.02, format="%g")
    bar.add_lines(lines)

    profile.scatter(angles, kl, s=20, c=kl, **color_scale)
    profile.plot(angles, kl, color="black", linewidth=0.8)
    for name, row, side in (("smallest", smallest, -1), ("largest", largest, 1)):
        at = (row["angle"], row["kl"])
        profile.annotate(f"{name} {row['kl']:.3g}", at, (0, 9 * side), textcoords="offset points", ha="center",
                         va="bottom" if side > 0 else "top")  # fmt: skip
    profile.set(yscale="log", xlim=(0, 360), xticks=range(0, 361, 90), xlabel="direction (degrees)", ylabel="KL (nats)")
    profile.margins(y=0.15)
    profile.set_title(f"... and KL differs by a factor of {largest['kl'] / smallest['kl']:.0f}", fontsize=11)
    profile.yaxis.set_major_formatter("{x:g}")
    profile.grid(alpha=0.3)
    profile.spines[["top", "right"]].set_visible(False)
    save_figure(figure, out)


def parse_args(argv: list[str] | None) -> Namespace:
    """The options."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--radius", type=number(float, 0.01, 10), metavar="R", default=1.0, help="radius of the ring, in L2")
    add("--out", metavar="DIR", help="default: results/toy")
    add("--smoke", action="store_true", help="same computation, written to results/toy/smoke (takes seconds)")
    args = parser.parse(argv)
    args.out = Path(args.out or ("results/toy/smoke" if args.smoke else "results/toy"))
    return args


def main(argv: list[str] | None = None) -> int:
    """Print the table; write it, the numbers and the figure. Returns the exit code (see `exit_code`)."""

    def script() -> None:
        args = parse_args(argv)
        load_pyplot()
        rows = ring(args.radius)
        text, numbers = table(rows), rounded({"radius": args.radius, "target": TARGET.tolist(), "ring": rows})
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out / "table.md", lambda file: file.write(text.encode()))
        write_atomically(args.out / "numbers.json", lambda file: file.write(json.dumps(numbers).encode()))
        draw(rows, args.out / "toy.png")
        print(f"{text}\nwritten to {args.out}/table.md, numbers.json and toy.png")

    return exit_code(script, "rerun the command")


if __name__ == "__main__":
    sys.exit(main())
