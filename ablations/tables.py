"""Tables whose rows are trainings: pairs of networks, each trained by several methods, with several seeds.

A script of such a table says which rows it has (`Row`) and how it looks; here are the options, the runs, and the files.
The same training has the same folder whatever table asks for it, so tables share their runs.
"""

import csv
import io
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import cifar100
import online_kd
from ablations.cells import Cell, markdown, mean_and_deviation, run_cells, with_needed
from common.fcfd import TERMS, VARIANTS
from common.models import build
from common.run.checkpoint import write_atomically
from common.run.device import check_device
from common.run.errors import UserError, exit_code
from common.run.folder import locked
from common.run.options import Parser

OF_TERMS = {f"w_{term}": term for term in (*TERMS, *VARIANTS)}
OF_PATHS = {"num_paths", "positions"}  # no use where no path is mixed
SMOKE = ["--dataset", "synthetic", "--subset", "40", "--test-subset", "40", "--batch-size", "20", "--epochs", "1"]
SMOKE_PAIR = "resnet14-resnet8"
MOST_JOBS = 1000
SAME_TEACHER = 0.2  # percentage points between measurements of one teacher, which another device may round otherwise
NOTE = """
Top-1 test accuracy in percent after the last epoch: mean ± sample standard deviation over n seeds; n = {n}{unless}.
"""
NOTE_PATHS = """The paths of a step are drawn from those that a row has a use for: where it leaves out a direction or a
stage, the others come up more often.
"""


@dataclass(frozen=True)
class Row:
    """How a student is trained: settings of a script beside its teacher's, none for one that is trained alone.

    Attributes:
        settings: by the names of common/published.yaml.
        script: the module of the script that trains it.
    """

    settings: dict[str, Any]
    script: ModuleType = cifar100

    @property
    def name(self) -> str:
        """What tells the runs of this row from others': fcfd, fcfd-w_app=0, kd-dkd, online-dml."""
        words = ["online"] if self.script is online_kd else []
        words.append(self.settings.get("method", "alone"))
        for key, value in sorted(self.settings.items()):
            if key == "kd_loss":
                words.append(value)
            elif key == "simkd":
                words.append(key)
            elif value == PAIRS_L2:
                words.append(key.removeprefix("w_"))
            elif key != "method":
                words.append(_assignment(key, value))
        return "-".join(words)


def _assignment(key: str, value: Any) -> str:
    return f"{key}={'+'.join(map(str, value)) if isinstance(value, list) else value}"


ALONE = Row({})
PAIRS_L2 = "l2"  # as a weight in a row's settings: that of L_func's L2 part


def parse_args(
    argv: list[str] | None,
    description: str,
    table: str,
    pairs: Iterable[str],
    more_options: Callable[[Parser], None] = lambda parser: None,
    smoke: Iterable[str] = SMOKE,
) -> tuple[Namespace, dict[str, Any]]:
    """The options of a table's script, and the settings of cifar100.py that were given.

    Args:
        description: the script's docstring.
        table: its name, under which its results lie.
        pairs: the default of --pairs.
        more_options: adds those that the script alone has.
        smoke: the options of cifar100.py that --smoke stands for.
    """
    parser = Parser(description)
    add = parser.add_argument
    add("--pairs", nargs="+", metavar="TEACHER-STUDENT", default=list(pairs), help=f"default: {' '.join(pairs)}")
    add("--seeds", nargs="+", type=int, metavar="SEED", default=[1], help="default: 1")
    add("--teacher-ckpt", nargs="+", metavar="NAME=FILE", default=[], help="teachers that need not be trained")
    add("--teacher-epochs", type=int, metavar="N", default=None, help="default: --epochs")
    add("--jobs", type=int, metavar="N", default=1, help="runs at once on each device (default: 1)")
    add("--devices", nargs="+", metavar="DEVICE", default=[], help="default: one, as cifar100.py chooses it")
    add("--out", metavar="DIR", default=None, help=f"default: results/{table}/<dataset>-<epochs>ep")
    add("--runs", metavar="DIR", default=None, help="default: --out, without it results/runs/<dataset>-<epochs>ep")
    parser.epilog = "Any other option is one of cifar100.py: --dataset, --data-dir, --subset, --epochs, --lr, ..."
    add("--smoke", action="store_true", default=False, help="the whole way with two small networks, in seconds")
    more_options(parser)
    args, words = parser.parse_known_args(argv)
    for option in ("out", "runs"):
        if getattr(args, option) == "":
            parser.error(f"--{option} is empty")
    for device in args.devices:
        check_device(device)
    if not 1 <= args.jobs <= MOST_JOBS:
        parser.error(f"--jobs {args.jobs}: it must lie between 1 and {MOST_JOBS}")
    args.pairs = list(dict.fromkeys(args.pairs))
    if args.smoke:
        args.pairs, args.jobs = [SMOKE_PAIR], max(2, args.jobs)
        args.runs = args.runs or args.out or "results/runs/smoke"
        args.out = args.out or f"results/{table}/smoke"
        words = [*smoke, *words]
    for option in ("--teacher", "--student", "--method", "--seed", "--device", "--resume", "--evaluate"):
        if any(word.split("=")[0] == option for word in words):
            parser.error(f"{option} is for one run: here there are --pairs, --seeds and --devices")
    given = cifar100.parse_args([*words, "--student", "resnet8"])
    del given["student"]
    given = {"epochs": cifar100.DEFAULTS["epochs"]} | given
    args.runs = Path(args.runs or args.out or f"results/runs/{data_name(given)}")
    args.out = Path(args.out or f"results/{table}/{data_name(given)}")
    return args, given


def data_name(given: dict[str, Any]) -> str:
    """The name of a folder for runs with these settings: the data, the epochs, and whatever else was given."""
    dataset = given.get("dataset", cifar100.DEFAULTS["dataset"])
    name = Path(given.get("data_dir", "data")).resolve().name if dataset == "folder" else dataset
    words = [name, *(["subset" + str(given["subset"])] if "subset" in given else []), f"{given['epochs']}ep"]
    told = ("dataset", "data_dir", "subset", "epochs", "test_subset", "max_minutes", "amp")
    words += [_assignment(key, value) for key, value in given.items() if key not in told]
    return "-".join(words)


def grid(args: Namespace, given: dict[str, Any], rows: Iterable[Row]) -> dict[tuple[str, str, int], Cell]:
    """The run of each (pair, name of a row, seed); one that needs a teacher's run has that as its `after`.

    Raises:
        UserError: a pair or a teacher's file is not written as it should be; `given` has what makes the rows differ.
    """
    rows = list(rows)
    check_given(given, rows)
    if wrong := [word for word in args.teacher_ckpt if not all(word.partition("="))]:
        raise UserError(f"--teacher-ckpt {wrong[0]}: write NAME=FILE, as in resnet32x4=ckpt_epoch_240.pth")
    files = dict(word.split("=", 1) for word in args.teacher_ckpt)
    for name, file in files.items():
        if not any(pair.startswith(f"{name}-") for pair in args.pairs):
            raise UserError(f"--teacher-ckpt {name}={file}: {name} is the teacher of none of the --pairs")
        if not Path(file).is_file():
            raise UserError(f"--teacher-ckpt {name}={file}: there is no such file")
    epochs_teacher = given["epochs"] if args.teacher_epochs is None else args.teacher_epochs

    @cache  # a network that is the teacher of several pairs, or a student and a teacher, is trained once
    def alone(network: str, seed: int, epochs: int) -> Cell:
        own = {key: value for key, value in given.items() if key not in cifar100.DISTILLATION}
        duration = f"-{epochs}ep" if epochs != given["epochs"] else ""
        own |= {"student": network, "seed": seed, "epochs": epochs}
        return Cell(args.runs / f"{network}-alone{duration}-seed{seed}", own)

    def cell(pair: str, row: Row, seed: int) -> Cell:
        teacher, _, student = pair.partition("-")
        if not (teacher and student):
            raise UserError(f"--pairs {pair}: write teacher and student with a hyphen, as resnet32x4-resnet8x4")
        if row == ALONE:
            return alone(student, seed, given["epochs"])
        own = settings_of(row, given, pair) | {"teacher": teacher, "student": student, "seed": seed}
        after = None
        if row.script is not online_kd:  # there the teacher is trained in the same run
            after = None if teacher in files else alone(teacher, args.seeds[0], epochs_teacher)
            own["teacher_ckpt"] = str(after.network) if after else files[teacher]
        return Cell(args.runs / f"{pair}-{row.name}-seed{seed}", own, after, row.script)

    cells = {(pair, row.name, seed): cell(pair, row, seed) for pair, row, seed in product(args.pairs, rows, args.seeds)}
    taken = {key for each in cells.values() for of in (each, each.after) if of for key in of.given}
    if unused := [key for key in given if key not in taken]:
        raise UserError(f"{_option(unused[0])} is of no use to any row: leave it out")
    return cells


def check_given(given: dict[str, Any], rows: list[Row]) -> None:
    """Raise a UserError for a setting in `given` that is the rows' own to set.

    The weight of a term that some rows leave out may be given for the others.
    """
    for key, value in given.items():
        own = [row.settings[key] for row in rows if key in row.settings and row.settings[key] != PAIRS_L2]
        if any(own) or (own and not value):
            raise UserError(f"{_option(key)} is what the rows of this table set themselves: leave it out")


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def settings_of(row: Row, given: dict[str, Any], pair: str) -> dict[str, Any]:
    """The row's settings for a pair, and those of `given` for which it has a use."""
    l2 = cifar100.SETTINGS["pairs"].get(pair, cifar100.SETTINGS["other"])["w_l2"]
    l2 = given.get("w_func_l2", l2)
    settings = {key: given.get(key, l2) if value == PAIRS_L2 else value for key, value in row.settings.items()}
    known = set(row.script.DEFAULTS)
    if row.script in (cifar100, online_kd):
        chosen = row.script.METHODS[settings["method"]]
        weighed = {term for key, term in OF_TERMS.items() if settings.get(key, term in chosen)}
        known -= {key for key, term in OF_TERMS.items() if term not in weighed}
        if not any(term.startswith("func") for term in weighed):
            known -= OF_PATHS
        if (given | settings).get("kd_loss") != "dkd":
            known -= {"tckd", "nckd"}
    return {key: value for key, value in given.items() if key in known} | settings


def numbers(cells: dict[tuple[str, str, int], Cell]) -> list[dict[str, Any]]:
    """What each finished run came to, as it is written to cells.csv.

    "teacher" is the accuracy of the one that taught; one that was trained in the same run has a last and a best epoch
    itself.

    Raises:
        UserError: the students of a pair had teachers of other accuracies, so not the same.
    """
    rows = []
    teachers: dict[str, tuple[Path, float]] = {}
    for (pair, name, seed), cell in cells.items():
        if result := cell.result():
            row = {"pair": pair, "method": name, "seed": seed, "epochs": result["epochs"]}
            row |= {"last": result["last"]["top1"], "best": result["best"]["top1"]}
            row |= {"best_epoch": result["best"]["epoch"]}
            row["teacher"] = result["teacher"]["top1"] if result["teacher"] else ""
            if result["teacher"]:
                first, top1 = teachers.setdefault(pair, (cell.folder, row["teacher"]))
                if abs(top1 - row["teacher"]) > SAME_TEACHER:
                    raise UserError(
                        f"the students in {first} and {cell.folder} had different teachers, of {top1:.2f} and "
                        f"{row['teacher']:.2f} %: remove one of the runs, or choose another --runs"
                    )
            row |= {key: result[key]["top1"] if key in result else "" for key in ("teacher_last", "teacher_best")}
            rows.append(row | {key: result.get(key, "") for key in ("seconds", "commit", "torch", "device")})
    return rows


def layout(
    header: list[str], rows: list[tuple[tuple[str, ...], Row]], pairs: list[str], found: list[dict[str, Any]], n: int
) -> str:
    """A line for each row and a column for each pair, as the paper's tables have it.

    Args:
        header: over the first columns.
        rows: what stands in the first columns, and the row.
        found: as from `numbers`.
        n: how many seeds there are to be; where fewer are finished the cell says so.
    """
    lines = []
    for start, row in rows:
        values = [[run["last"] for run in found if (run["pair"], run["method"]) == (pair, row.name)] for pair in pairs]
        few = ["" if len(each) == n else f" (n = {len(each)})" for each in values]
        means = [mean_and_deviation(each) + n if each else "" for each, n in zip(values, few, strict=True)]
        lines.append([*start, *means])
    taught = [{run["teacher"] for run in found if run["pair"] == pair and run["teacher"] != ""} for pair in pairs]
    titles = [f"{pair} (teacher {min(t):.2f})" if t else pair for pair, t in zip(pairs, taught, strict=True)]
    return markdown([*header, *titles], lines)


def note(args: Namespace, found: list[dict[str, Any]], cells: dict[tuple[str, str, int], Cell]) -> str:
    """What stands under a table of `layout`."""
    unless = "" if len(found) == len(cells) else ", as far as runs are finished"
    return NOTE.format(n=len(set(args.seeds)), unless=unless)


def write(out: Path, text: str, found: list[dict[str, Any]]) -> None:
    """Print the table; write it to table.md, and the numbers behind it to cells.csv."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, found[0])
    writer.writeheader()
    writer.writerows(found)
    write_atomically(out / "cells.csv", lambda file: file.write(lines.getvalue().encode()))
    write_atomically(out / "table.md", lambda file: file.write(text.encode()))
    print(f"\n{text}\nwritten to {out}/table.md, the numbers to cells.csv")


def run(args: Namespace, cells: dict[tuple[str, str, int], Cell], finish: Callable[[list[dict]], None]) -> None:
    """Do what is left of the runs; then, whatever came of it, `finish` with the `numbers` of those that are done.

    Raises:
        UserError: as `with_needed`, `numbers` and `run_cells`; a folder cannot be made, or written into.
    """
    runs = with_needed(cells.values())
    numbers(cells)  # complains now
    for folder in (args.runs, args.out):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    with locked(args.runs):
        try:
            run_cells(runs, args.jobs, args.devices)
        finally:
            if found := numbers(cells):
                finish(found)


def main(
    argv: list[str] | None,
    description: str,
    table: str,
    header: list[str],
    rows: list[tuple[tuple[str, ...], Row]],
    pairs: list[str],
    num_stages: int | None = None,
) -> int:
    """A script that is such a table and nothing else; arguments as in `parse_args` and `layout`. Its exit code.

    --smoke makes the first and the last four rows.

    Args:
        num_stages: what the networks must have for the rows to be what they are called.
    """

    def script() -> None:
        args, given = parse_args(argv, description, table, pairs)
        for key, value in given.items():
            if key in OF_TERMS and not value:
                raise UserError(f"{_option(key)} 0: the rows say which terms there are, leave it out")
        shown = [rows[0], *rows[-4:]] if args.smoke else rows
        cells = grid(args, given, [row for _, row in shown])
        for pair in args.pairs if num_stages else []:
            with torch.device("meta"):
                n = build(pair.split("-")[1], num_classes=2).num_stages
            if n != num_stages:
                raise UserError(f"--pairs {pair}: networks of {n} stages, and the rows are of those with {num_stages}")

        def finish(found: list[dict[str, Any]]) -> None:
            text = layout(header, shown, args.pairs, found, len(set(args.seeds)))
            write(args.out, text + note(args, found, cells) + NOTE_PATHS, found)

        run(args, cells, finish)

    return exit_code(script, "what is finished is kept, repeat the command to go on")
