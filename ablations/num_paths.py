"""Tab. 12 (H.2): the number of mixed paths sampled per step, |S| = 0, 1, ...: accuracy and cost of a step.

    python ablations/num_paths.py                                                     resnet32x4-resnet8x4, 240 epochs
    python ablations/num_paths.py --pairs resnet32x4-resnet8x4 --seeds 1 2 3 --jobs 3
    python ablations/num_paths.py --pairs resnet20-resnet8 --epochs 30 --dataset folder --data-dir DIR

|S| = 0 is L_app without mixed paths. Networks of four stages have four candidate paths, those of five stages six. With
several pairs, |S| ends at the smallest number of candidates. All other options are those of cifar100.py, except those
that change the paths or the terms of a step.

Time and peak memory are measured as in ablations/complexity.py, for the steps of these runs, on the first of --devices
and before any run starts; FLOPs follow its formula. They are saved to cost.json and measured again if the batch size,
--amp, --repeats, the device, PyTorch or the number of threads differs. --smoke has |S| = 0, 1, 2.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import cifar100
from ablations import complexity, tables
from ablations.cells import markdown, mean_and_deviation, to_argv, with_dependencies
from ablations.rows import Row, grid
from common.models import build
from common.paths import candidate_paths
from common.run.errors import UserError, exit_code
from common.run.folder import locked
from common.run.options import Parser, option
from common.run.types import count

PAIRS = ["resnet32x4-resnet8x4"]
MEASURED_WITHOUT = ("num_paths", "positions", "teacher_bn", "kd_loss", "simkd", "w_func_partial", "w_func_prime_l2")


def row_of(num_paths: int) -> Row:
    """The row with |S| = `num_paths`; 0 and 2 are also rows of other tables and share their runs."""
    if num_paths == 0:
        return Row({"method": "app"})
    return Row({"method": "fcfd"} | ({} if num_paths == 2 else {"num_paths": num_paths}))


def path_counts(pairs: list[str]) -> list[int]:
    """|S| from 0 to the number of candidate paths, the smallest one of all pairs."""
    with torch.device("meta"):
        students = [build(pair.split("-")[1], num_classes=2) for pair in pairs]
    return list(range(1 + min(len(candidate_paths(student.num_stages)) for student in students)))


def check_settings(given: dict[str, Any]) -> None:
    """Raise a UserError for an option of cifar100.py that changes the cost of a step."""
    for key, value in given.items():
        if key in MEASURED_WITHOUT or (key.startswith("w_") and not value):
            raise UserError(f"{option(key)} changes the paths or the steps that are compared here: omit it")


def cost_settings(pairs: list[str], given: dict[str, Any], repeats: int | None, device: str | None) -> Namespace:
    """The options of complexity.py that measure the steps of these runs."""
    options = {"pairs": pairs, "batch_size": given.get("batch_size", cifar100.SETTINGS["batch_size"])}
    options |= {"amp": given.get("amp"), "repeats": repeats, "device": device}
    return complexity.parse_args(to_argv({key: value for key, value in options.items() if value is not None}))


def steps(pairs: list[str], sizes: list[int]) -> list[list[complexity.Row]]:
    """The steps to measure: for each pair, one for each |S| in `sizes`; |S| = 0 has no t2s bridges."""
    return [[complexity.Row(pair, "fcfd" if n else "app", n) for n in sizes] for pair in pairs]


def table(found: list[dict[str, Any]], cost: dict[str, Any], pairs: list[str], sizes: list[int]) -> str:
    """The Markdown table; `found` is from `tables.numbers`, `cost` from `complexity.measured`."""
    header = ["pair", "paths", "n", "top-1", "ms", "images/s", "peak memory (MiB)", "GFLOPs"]
    step_of = {(step["pair"], step["num_paths"]): step for step in cost["rows"]}
    lines = []
    for pair in pairs:
        for n in sizes:
            values = [run["last"] for run in found if (run["pair"], run["method"]) == (pair, row_of(n).name)]
            step = step_of[pair, n]
            lines.append(
                [
                    pair,
                    n,
                    len(values),
                    mean_and_deviation(values) if values else "",
                    f"{1000 * step['seconds']:.1f}",
                    f"{cost['settings']['batch_size'] / step['seconds']:.0f}",
                    f"{step['megabytes']:.0f}" if step["megabytes"] else "",
                    f"{step['flops'] / 1e9:.2f}",
                ]
            )
    conditions = complexity.conditions(Namespace(**cost["settings"]), cost["machine"])
    note = "Top-1 test accuracy in percent after the last epoch: mean ± sample standard deviation over n seeds."
    return markdown(header, lines) + f"\n{note}\n{complexity.LEGEND}A step: {conditions}.\n"


def main(argv: list[str] | None = None) -> int:
    """Measure, complete the runs and write the table. Returns the exit code (see `exit_code`)."""

    def more_options(parser: Parser) -> None:
        parser.add_argument("--repeats", type=count, metavar="N", help="steps behind each time (default: 11)")

    def script() -> None:
        args, given = tables.parse_args(argv, __doc__, "num_paths", PAIRS, more_options)
        check_settings(given)
        repeats = args.repeats or (2 if args.smoke else None)
        c = cost_settings(args.pairs, given, repeats, args.devices[0] if args.devices else None)
        sizes = path_counts(c.pairs)[: 3 if args.smoke else None]
        cells = grid(args, given, [row_of(n) for n in sizes])
        with_dependencies(cells.values())  # raises before anything is measured
        for folder in (args.out, args.runs):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(args.runs):  # concurrent runs would slow down the steps
            cost = complexity.measured(steps(c.pairs, sizes), c, args.out / "cost.json")

        def finish(found: list[dict[str, Any]]) -> None:
            tables.write(args.out, table(found, cost, args.pairs, sizes), found)

        tables.run(args, cells, finish)

    return exit_code(script, tables.AFTER_INTERRUPT)


if __name__ == "__main__":
    sys.exit(main())
