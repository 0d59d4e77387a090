"""Methods beside one another: Tab. 1, and any other grid of pairs, methods and seeds.

    python ablations/compare.py                                                  Tab. 1: ten pairs, 240 epochs
    python ablations/compare.py --pairs resnet32x4-resnet8x4 --seeds 1 2 3 --jobs 4
    python ablations/compare.py --pairs resnet20-resnet8 --epochs 30 --dataset folder --data-dir DIR

Every other option is one of cifar100.py and goes to those of its runs that have a use for it. A teacher is trained
once, with the first of the seeds, and serves all its students. Runs that are finished are kept and those broken off are
resumed: the same command goes on with what is left, and a command with more seeds at the end of --seeds adds to it. In
--out come to lie a folder for each run, and of the runs of the last command table.md and the numbers in cells.csv.
"""

import csv
import io
import sys
from argparse import Namespace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

import cifar100
from ablations.cells import Cell, markdown, mean_and_deviation, run_cells, with_needed
from common.checkpoint import write_atomically
from common.device import check_device
from common.errors import UserError, exit_code
from common.fcfd import TERMS
from common.run_folder import locked
from common.settings import Parser

PUBLISHED = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())
METHODS = ("alone", *cifar100.METHODS)
OF_METHODS = {"num_paths", "positions", *(f"w_{term}" for term in TERMS)}  # settings that some methods have no use for
# What may differ from a published run while its figure still means the same.
NOT_DEFINING = ("seed", "device", "amp", "out", "data_dir", "max_minutes", "teacher_ckpt")
SMOKE = ["--dataset", "synthetic", "--subset", "40", "--test-subset", "40", "--batch-size", "20", "--epochs", "1"]
NOTE = """
Top-1 test accuracy in percent: mean ± sample standard deviation over n seeds; a teacher's is of the one that taught.
The best epoch is chosen on the test set, which flatters it.
"""
NOTE_PUBLISHED = """
Published figures stand beside runs of the published settings alone, precision apart: they were made in float32. Those
marked * are of other settings: the last epoch, without Nesterov momentum, and KD as 0.1 L_task + 0.9 L_kd at T = 4.
"""


def parse_args(argv: list[str] | None) -> tuple[Namespace, dict[str, Any]]:
    """The options of this script, and the settings of cifar100.py that were given."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pairs", nargs="+", metavar="TEACHER-STUDENT", default=list(PUBLISHED["pairs"]), help="default: Tab. 1's")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--seeds", nargs="+", type=int, metavar="SEED", default=[1], help="default: 1")
    add("--teacher-ckpt", nargs="+", metavar="NAME=FILE", default=[], help="teachers that need not be trained")
    add("--teacher-epochs", type=int, metavar="N", default=None, help="default: --epochs")
    add("--jobs", type=int, metavar="N", default=1, help="runs at once on each device (default: 1)")
    add("--devices", nargs="+", metavar="DEVICE", default=[], help="default: one, as cifar100.py chooses it")
    add("--out", metavar="DIR", default=None, help="default: results/compare/<dataset>-<epochs>ep")
    add("--smoke", action="store_true", default=False, help="the whole way with two small networks, in seconds")
    args, words = parser.parse_known_args(argv)
    for device in args.devices:
        check_device(device)
    if args.out == "":
        parser.error("--out is empty")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: it must be at least 1")
    if args.smoke:
        args.pairs, args.jobs, args.out = ["resnet14-resnet8"], max(2, args.jobs), args.out or "results/compare/smoke"
        words = [*SMOKE, *words]
    for option in ("--teacher", "--student", "--method", "--seed", "--device", "--resume", "--evaluate"):
        if any(word.split("=")[0] == option for word in words):
            parser.error(f"{option} is for one run: here there are --pairs, --methods, --seeds and --devices")
    given = cifar100.parse_args([*words, "--student", "resnet8"])
    del given["student"]
    return args, given


def grid(args: Namespace, given: dict[str, Any]) -> dict[tuple[str, str, int], Cell]:
    """The run of each (pair, method, seed); one that needs a teacher's run has that as its `after`.

    Raises:
        UserError: a pair or a teacher's file is not written as it should be.
    """
    given = {"epochs": cifar100.SETTINGS["defaults"]["epochs"]} | given
    if wrong := [word for word in args.teacher_ckpt if not all(word.partition("="))]:
        raise UserError(f"--teacher-ckpt {wrong[0]}: write NAME=FILE, as in resnet32x4=ckpt_epoch_240.pth")
    out, files = Path(args.out or default_out(given)), dict(word.split("=", 1) for word in args.teacher_ckpt)

    epochs_teacher = given["epochs"] if args.teacher_epochs is None else args.teacher_epochs
    for name, file in files.items():
        if not any(pair.startswith(f"{name}-") for pair in args.pairs):
            raise UserError(f"--teacher-ckpt {name}={file}: {name} is the teacher of none of the --pairs")
        if not Path(file).is_file():
            raise UserError(f"--teacher-ckpt {name}={file}: there is no such file")

    @cache  # a network that is the teacher of several pairs, or a student and a teacher, is trained once
    def alone(network: str, seed: int, epochs: int) -> Cell:
        own = {key: value for key, value in given.items() if key not in cifar100.DISTILLATION}
        duration = f"-{epochs}ep" if epochs != given["epochs"] else ""
        own |= {"student": network, "seed": seed, "epochs": epochs}
        return Cell(out / f"{network}-alone{duration}-seed{seed}", own)

    def cell(pair: str, method: str, seed: int) -> Cell:
        teacher, _, student = pair.partition("-")
        if not (teacher and student):
            raise UserError(f"--pairs {pair}: write teacher and student with a hyphen, as resnet32x4-resnet8x4")
        if method == "alone":
            return alone(student, seed, given["epochs"])
        after = None if teacher in files else alone(teacher, args.seeds[0], epochs_teacher)
        weighs = {f"w_{term}" for term in cifar100.METHODS[method]}
        paths = {"num_paths", "positions"} if method == "fcfd" else set()
        own = {key: value for key, value in given.items() if key not in OF_METHODS or key in weighs | paths}
        own |= {"teacher": teacher, "student": student, "method": method, "seed": seed}
        own["teacher_ckpt"] = str(after.network) if after else files[teacher]
        return Cell(out / f"{pair}-{method}-seed{seed}", own, after)

    return {key: cell(*key) for key in product(args.pairs, args.methods, args.seeds)}


def default_out(given: dict[str, Any]) -> str:
    """The folder for a grid's results where none is given."""
    data = given.get("dataset", cifar100.SETTINGS["defaults"]["dataset"])
    data = Path(given.get("data_dir", "data")).resolve().name if data == "folder" else data
    return f"results/compare/{data}-{given['epochs']}ep"


def numbers(cells: dict[tuple[str, str, int], Cell]) -> list[dict[str, Any]]:
    """A row for each finished run."""
    rows = []
    for (pair, method, seed), cell in cells.items():
        if result := cell.result():
            row = {"pair": pair, "method": method, "seed": seed, "epochs": result["epochs"]}
            row |= {
                "last": result["last"]["top1"],
                "best": result["best"]["top1"],
                "best_epoch": result["best"]["epoch"],
            }
            row["teacher"] = result["teacher"]["top1"] if result["teacher"] else ""
            rows.append(row | {key: result.get(key, "") for key in ("seconds", "commit", "torch", "device")})
    return rows


def table(rows: list[dict[str, Any]], published: dict[str, dict[str, float]]) -> str:
    """The Markdown table of `rows` as from `numbers`; `published` holds figures by pair and method."""
    lines = []
    for pair in dict.fromkeys(row["pair"] for row in rows):
        of_pair = [row for row in rows if row["pair"] == pair]
        figures = published.get(pair, {})
        teachers = [row["teacher"] for row in of_pair if row["teacher"] != ""]
        if teachers:
            lines.append([pair, "teacher", 1, f"{teachers[0]:.2f}", "", figures.get("teacher", "")])
        for method in dict.fromkeys(row["method"] for row in of_pair):
            runs = [row for row in of_pair if row["method"] == method]
            last, best = (mean_and_deviation([run[key] for run in runs]) for key in ("last", "best"))
            lines.append([pair, method, len(runs), last, best, figures.get(method, "")])
    return (
        markdown(["pair", "method", "n", "last epoch", "best", "published"], lines)
        + NOTE
        + (NOTE_PUBLISHED if published else "")
    )


def published_figures(cells: dict[tuple[str, str, int], Cell]) -> dict[str, dict[str, str]]:
    """The published figures that may stand beside these runs, by pair and method."""
    figures: dict[str, dict[str, str]] = {}
    for (pair, method, _), cell in cells.items():
        if pair in PUBLISHED["pairs"] and method in PUBLISHED["columns"] and has_published_settings(cell):
            row = dict(zip(PUBLISHED["columns"], PUBLISHED["pairs"][pair], strict=True))
            figures.setdefault(pair, {})[method] = f"{row[method]:.2f}" + ("" if method == "fcfd" else " *")
            if cell.after:
                figures[pair]["teacher"] = f"{row['teacher']:.2f} *"
    return figures


def has_published_settings(cell: Cell) -> bool:
    """Whether a run, and that of its teacher, differ from the published one in nothing but what is NOT_DEFINING."""
    plain = {key: cell.given[key] for key in ("teacher", "student", "method") if key in cell.given}
    ours, theirs = (vars(Cell(cell.folder / "none", given).settings()) for given in (cell.given, plain))
    same = all(ours[key] == theirs[key] for key in ours if key not in NOT_DEFINING)
    return same and (cell.after is None or has_published_settings(cell.after))


def write_table(cells: dict[tuple[str, str, int], Cell], out: Path) -> None:
    """Print the table of what is finished; write it, and the numbers behind it."""
    if rows := numbers(cells):
        text = table(rows, published_figures(cells))
        lines = io.StringIO()
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(out / "cells.csv", lambda file: file.write(lines.getvalue().encode()))
        write_atomically(out / "table.md", lambda file: file.write(text.encode()))
        print(f"\n{text}\nwritten to {out}/table.md, the numbers to cells.csv")


def main(argv: list[str] | None = None) -> int:
    """Check the grid, run it and write its table; the exit code is that of `exit_code`."""

    def script() -> None:
        args, given = parse_args(argv)
        cells = grid(args, given)
        out = next(iter(cells.values())).folder.parent
        runs = with_needed(cells.values())
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            try:
                run_cells(runs, args.jobs, args.devices)
            finally:
                write_table(cells, out)

    return exit_code(script, "what is finished is kept, repeat the command to go on")


if __name__ == "__main__":
    sys.exit(main())
