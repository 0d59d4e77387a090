"""Tab. 12 (H.2): how many mixed paths a step draws, |S| = 0, 1, ...: accuracy, and what a step costs.

    python ablations/num_paths.py                                                     resnet32x4-resnet8x4, 240 epochs
    python ablations/num_paths.py --pairs resnet32x4-resnet8x4 --seeds 1 2 3 --jobs 3
    python ablations/num_paths.py --pairs resnet20-resnet8 --epochs 30 --dataset folder --data-dir DIR

|S| = 0 is L_app without paths. Networks of four stages have four candidates, those of five have six; with several
pairs |S| goes as far as all of them do. Every other option is one of cifar100.py, but for those that change the paths
or what a step consists of.

Time and peak memory are measured as in ablations/complexity.py, of the steps that are trained, on the first of
--devices and before any run is started; FLOPs are of its formula. They are kept in cost.json, and measured again where
the batch size, --amp, --repeats, the device, PyTorch or the number of threads is another. --smoke has |S| = 0, 1, 2.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import cifar100
from ablations import complexity, tables
from ablations.cells import markdown, mean_and_deviation, with_needed
from ablations.tables import Row
from common.models import build
from common.paths import candidate_paths
from common.run.errors import UserError, exit_code
from common.run.folder import locked
from common.run.options import Parser

PAIRS = ["resnet32x4-resnet8x4"]
MEASURED_WITHOUT = ("num_paths", "positions", "teacher_bn", "kd_loss", "simkd", "w_func_partial", "w_func_prime_l2")


def row_of(num_paths: int) -> Row:
    """How a student is trained with |S| = `num_paths`; 0 and 2 are rows of other tables, too, and share their runs."""
    if num_paths == 0:
        return Row({"method": "app"})
    return Row({"method": "fcfd"} | ({} if num_paths == 2 else {"num_paths": num_paths}))


def sizes_of_s(pairs: list[str]) -> list[int]:
    """|S| from 0 to the number of candidates, to the smallest one of several pairs."""
    with torch.device("meta"):
        students = [build(pair.split("-")[1], num_classes=2) for pair in pairs]
    return list(range(1 + min(len(candidate_paths(student.num_stages)) for student in students)))


def check_settings(given: dict[str, Any]) -> None:
    """Raise a UserError for a setting of cifar100.py with which the cost of a step would be another than measured."""
    for key, value in given.items():
        if key in MEASURED_WITHOUT or (key in tables.OF_TERMS and not value):
            option = f"--{key.replace('_', '-')}"
            raise UserError(f"{option} changes the paths or the steps that are compared here: leave it out")


def cost_settings(pairs: list[str], given: dict[str, Any], repeats: int | None, device: str | None) -> Namespace:
    """The settings of complexity.py with which a step costs what one of these trainings costs."""
    words = ["--pairs", *pairs, "--batch-size", given.get("batch_size", cifar100.DEFAULTS["batch_size"])]
    for option, value in (("--amp", given.get("amp")), ("--repeats", repeats), ("--device", device)):
        words += [] if value is None else [option, value]
    return complexity.parse_args([str(word) for word in words])


def steps(pairs: list[str], sizes: list[int]) -> list[list[complexity.Row]]:
    """What is to be measured: for each pair a step with |S| of each of `sizes`; with 0 there are no t2s bridges."""
    return [[complexity.Row(pair, "fcfd" if n else "app", n) for n in sizes] for pair in pairs]


def table(found: list[dict[str, Any]], cost: dict[str, Any], pairs: list[str], sizes: list[int]) -> str:
    """The Markdown table; `found` as from `tables.numbers`, `cost` as from `complexity.measured`."""
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
    """Check, measure, run what is left of the table and write it; the exit code is that of `exit_code`."""

    def more_options(parser: Parser) -> None:
        parser.add_argument(
            "--repeats", type=int, metavar="N", default=None, help="steps behind each time (default: 11)"
        )

    def script() -> None:
        args, given = tables.parse_args(argv, __doc__, "num_paths", PAIRS, more_options)
        check_settings(given)
        repeats = 2 if args.smoke and args.repeats is None else args.repeats
        c = cost_settings(args.pairs, given, repeats, args.devices[0] if args.devices else None)
        sizes = sizes_of_s(c.pairs)[: 3 if args.smoke else None]
        cells = tables.grid(args, given, [row_of(n) for n in sizes])
        with_needed(cells.values())  # complains now, before anything is measured
        for folder in (args.out, args.runs):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(args.runs):  # with runs beside it a step takes longer
            cost = complexity.measured(steps(c.pairs, sizes), c, args.out / "cost.json")

        def finish(found: list[dict[str, Any]]) -> None:
            tables.write(args.out, table(found, cost, args.pairs, sizes), found)

        tables.run(args, cells, finish)

    return exit_code(script, "what is finished is kept, repeat the command to go on")


if __name__ == "__main__":
    sys.exit(main())
