"""Tab. 12 (H.2): the number of mixed paths sampled per step, |S| = 0, 1, ...: accuracy and cost of a step.

    python ablations/num_paths.py                                                     resnet32x4-resnet8x4, 240 epochs
    python ablations/num_paths.py --pairs resnet32x4-resnet8x4 --seeds 1 2 3 --jobs 3
    python ablations/num_paths.py --pairs resnet20-resnet8 --epochs 30 --dataset folder --data-dir DIR

|S| = 0 is L_app without mixed paths. Networks of four stages have four candidate paths, those of five stages six. With
several pairs, |S| ends at the smallest number of candidates. --num-paths 0 2 selects rows. All other options are those
of cifar100.py, except those that change the candidates, omit a term, or replace the student's classifier.

Before any run starts, the time and the peak memory of a step of each run are measured on the first of --devices, as in
ablations/complexity.py, and saved to cost.json. FLOPs follow its formula. --smoke has |S| = 0, 1, 2.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ablations import complexity, tables
from ablations.cells import markdown
from ablations.rows import Row, grid
from common.models import build
from common.paths import candidate_paths
from common.run.errors import UserError, exit_code
from common.run.options import Parser, option
from common.run.types import count_or_zero

PAIRS = ["resnet32x4-resnet8x4"]


def row_of(num_paths: int) -> Row:
    """The row with |S| = `num_paths`; 0 and 2 are also rows of other tables and share their runs."""
    if num_paths == 0:
        return Row({"method": "app"})
    return Row({"method": "fcfd"} | ({} if num_paths == 2 else {"num_paths": num_paths}))


def path_counts(args: Namespace) -> list[int]:
    """|S| of each row: from 0 to the number of candidate paths, the smallest one of all pairs, or --num-paths.

    Raises:
        UserError: --num-paths has a larger number.
    """
    with torch.device("meta"):
        students = [build(pair.split("-")[1], num_classes=2) for pair in args.pairs]
    most = min(len(candidate_paths(student.num_stages)) for student in students)
    if args.num_paths and (n := max(args.num_paths)) > most:
        raise UserError(f"--num-paths {n}: there are {most} candidate paths")
    return sorted({*args.num_paths}) if args.num_paths else list(range(3 if args.smoke else 1 + most))


def check_settings(given: dict[str, Any]) -> None:
    """Raise a UserError for an option of cifar100.py that would make |S| or the FLOPs in the table wrong."""
    for key, value in given.items():
        if key in ("positions", "simkd") or (key.startswith("w_") and not value):
            raise UserError(f"{option(key)} changes the paths or the steps that are compared here: omit it")


def table(found: list[dict[str, Any]], costs: tables.Costs, pairs: list[str], sizes: list[int]) -> str:
    """The Markdown table; `found` is from `tables.numbers`."""
    header = ["pair", "paths", "n", "top-1", "ms", "images/s", "peak memory (MiB)", "GFLOPs"]
    batch_size, lines = costs.settings.batch_size, []
    for pair in pairs:
        for n in sizes:
            name = row_of(n).name
            runs = [run for run in found if (run["pair"], run["method"]) == (pair, name)]
            ms, memory = costs.cells(pair, name)
            images = f"{batch_size / costs.steps[pair, name].seconds:.0f}"
            flops = batch_size * complexity.formula(pair, {"method": "fcfd", "num_paths": n})
            lines.append([pair, n, len(runs), tables.last_and_best(runs), ms, images, memory, f"{flops / 1e9:.2f}"])
    note = "Top-1 on the test set in percent, last / best epoch: mean ± sample standard deviation over n seeds.\n"
    note += "The paper's accuracies are those of the best epoch."
    return markdown(header, lines) + f"\n{note}\n{complexity.conditions(costs.settings)}{complexity.FLOPS}\n"


def main(argv: list[str] | None = None) -> int:
    """Measure, complete the runs and write the table. Returns the exit code (see `exit_code`)."""

    def more_options(parser: Parser) -> None:
        tables.add_repeats(parser)
        parser.add_argument("--num-paths", type=count_or_zero, nargs="+", metavar="N", help="|S| (default: all)")

    def script() -> None:
        args, given = tables.parse_args(argv, __doc__, "num_paths", PAIRS, more_options)
        check_settings(given)
        tables.cost_settings(args, given)  # raises for an unknown pair
        sizes = path_counts(args)
        cells = grid(args, given, [row_of(n) for n in sizes])
        costs = tables.measure_steps(args, given, cells)

        def finish(found: list[dict[str, Any]]) -> None:
            tables.write(args.out, table(found, costs, args.pairs, sizes), found)

        tables.run(args, cells, finish)

    return exit_code(script, tables.AFTER_INTERRUPT)


if __name__ == "__main__":
    sys.exit(main())
