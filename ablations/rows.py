"""The rows of a table, and the runs behind them: one for each pair of networks, row and seed.

A run's folder is named after its settings, so tables share their runs.
"""

import contextlib
from argparse import Namespace
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import cifar100
import online_kd
from ablations.benchmarks import BENCHMARKS, Benchmark
from ablations.cells import Cell, to_argv
from common.fcfd import TERMS
from common.run.errors import UserError
from common.run.options import option

PAIRS_L2 = "l2"  # as a weight in a row's settings: the weight that L_func's L2 part has for the pair
Cells = dict[tuple[str, str, int], Cell]  # by pair, name of the row, seed


@dataclass(frozen=True)
class Row:
    """How a student is trained.

    Attributes:
        settings: the options by name ("kd_loss"), besides its networks; empty for a student without a teacher.
        script: the module of the training script.
    """

    settings: dict[str, Any]
    script: ModuleType = cifar100

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.script]

    @property
    def name(self) -> str:
        """The row in the names of folders: fcfd, fcfd-w_app=0, kd-dkd, online-dml, baseline-kd."""
        words = [prefix for prefix, script in self.benchmark.others.items() if script is self.script]
        words.append(self.settings.get("method", "alone"))
        for key, value in sorted(self.settings.items()):
            if value == PAIRS_L2:
                words.append(key.removeprefix("w_"))
            elif key != "method":
                words.append({"kd_loss": value, "simkd": key, "inherit": key}.get(key) or assignment(key, value))
        return "-".join(words)

    @property
    def has_teacher(self) -> bool:
        return self.settings.get("method", "alone") != "alone"


ALONE = Row({})


def assignment(key: str, value: Any) -> str:
    """An option in the name of a folder: "lr=0.1", "positions=2+3"."""
    return f"{key}={'+'.join(map(str, value)) if isinstance(value, list) else value}"


def grid(args: Namespace, given: dict[str, Any], rows: list[Row]) -> Cells:
    """The runs of a table. A run that needs the network of another one has it as its `after`.

    Args:
        args, given: from `tables.parse_args`.

    Raises:
        UserError: an option is invalid or does not affect any row; the data, which decides whether a teacher must be
            trained, is missing.
    """
    check_given(given, rows)
    benchmark, files = rows[0].benchmark, teacher_files(args)
    teachers = [pair.partition("-")[0] for pair in args.pairs]
    downloaded = [] if files.keys() >= set(teachers) else benchmark.downloads(given)
    length = f"{benchmark.unit}s"
    teacher_length = args.teacher_epochs or given[length]

    @cache  # a network that is the teacher of several pairs, or a teacher and a student, is trained once
    def alone(network: str, seed: int, total: int, script: ModuleType) -> Cell:
        row = Row({} if script is benchmark.script else {"method": "alone"}, script)
        duration = f"-{total}{benchmark.unit[:2]}" if total != given[length] else ""
        options = options_of(row, given, None, network) | {"seed": seed, length: total}
        return Cell(args.runs / f"{network}-{row.name}{duration}-seed{seed}", options, script=script)

    def cell(pair: str, row: Row, seed: int) -> Cell:
        teacher, _, student = pair.partition("-")
        if not (teacher and student):
            raise UserError(f"--pairs {pair}: join teacher and student by a hyphen, as in resnet32x4-resnet8x4")
        if not row.has_teacher:
            return alone(student, seed, given[length], row.script)
        options, after = options_of(row, given, teacher, student) | {"seed": seed}, None
        if row.script is not online_kd:  # which trains the teacher as well
            if teacher not in files and teacher not in downloaded:
                after = alone(teacher, args.seeds[0], teacher_length, benchmark.script)
            if file := after.network if after else files.get(teacher):
                options["teacher_ckpt"] = str(file)
        return Cell(args.runs / f"{pair}-{row.name}-seed{seed}", options, after, row.script)

    cells = {(pair, row.name, seed): cell(pair, row, seed) for pair, row, seed in product(args.pairs, rows, args.seeds)}
    used = {key for cell in cells.values() for each in (cell, cell.after) if each for key in each.given}
    if unused := [key for key in given if key not in used]:
        raise UserError(f"{option(unused[0])} does not affect any row: omit it")
    distilled = [cell for cell in cells.values() if "teacher" in cell.given]
    if files and not any("teacher_ckpt" in cell.given and not cell.after for cell in distilled):
        raise UserError("no row needs a trained teacher: omit --teachers and --teacher-ckpt")
    if args.teacher_epochs and not any(cell.after for cell in distilled):
        raise UserError("--teacher-epochs: no teacher has to be trained: omit it")
    return cells


def teacher_files(args: Namespace) -> dict[str, Path]:
    """The checkpoints of --teacher-ckpt and --teachers, by network.

    Raises:
        UserError: one is not given as NAME=FILE, is missing, or is of a network that is no teacher.
    """
    named = dict(word.partition("=")[::2] for word in args.teacher_ckpt or [])
    for name, file in named.items():
        if not (name and file):
            raise UserError(f"--teacher-ckpt {name}{file}: write NAME=FILE, as in resnet32x4=ckpt_epoch_240.pth")
        if not any(pair.startswith(f"{name}-") for pair in args.pairs):
            raise UserError(f"--teacher-ckpt {name}={file}: {name} is the teacher of none of the --pairs")
        if not Path(file).is_file():
            raise UserError(f"--teacher-ckpt {name}={file}: no such file")
    files = {}
    for name in dict.fromkeys(pair.partition("-")[0] for pair in args.pairs) if args.teachers else []:
        files[name] = Path(args.teachers) / f"{name}_vanilla" / "ckpt_epoch_240.pth"
        if name not in named and not files[name].is_file():
            raise UserError(
                f"--teachers {args.teachers}: there is no {files[name]}; add it, or --teacher-ckpt {name}=FILE"
            )
    files |= {name: Path(file) for name, file in named.items()}
    return {name: file.absolute() for name, file in files.items()}  # the run may be continued from another directory


def check_given(given: dict[str, Any], rows: list[Row]) -> None:
    """Raise a UserError for an option that would contradict the name of a row.

    The weight of a term that some rows omit may be given for the others.
    """
    weighted = any(key.startswith("w_") for row in rows for key in row.settings)
    for key, value in given.items():
        if any(row.settings.get(key) not in (None, 0, PAIRS_L2) for row in rows):
            raise UserError(f"{option(key)} is set by the rows of a table: omit it")
        if weighted and key.startswith("w_") and not value:
            raise UserError(f"{option(key)} 0: the rows choose the terms, omit it")


def options_of(row: Row, given: dict[str, Any], teacher: str | None, student: str) -> dict[str, Any]:
    """The options of a run by name: its networks, the row's settings, and those in `given` that affect it."""
    published = row.benchmark.script.SETTINGS
    published = published.get("pairs", {}).get(f"{teacher}-{student}", published.get("other", {}))
    l2 = given.get("w_func_l2", published.get("w_l2"))
    options = {"teacher": teacher, "student": student} if teacher else {"student": student}
    options |= {key: given.get(key, l2) if value == PAIRS_L2 else value for key, value in row.settings.items()}
    weights = vars(row.script.parse_args(to_argv(options)))
    mixed = any(weights.get(f"w_{name}") for name, term in TERMS.items() if term.delta is not None)
    for key, value in given.items():
        in_use = bool(weights.get(key)) if key.startswith("w_") else mixed or key not in ("num_paths", "positions")
        if in_use and key not in options:
            with contextlib.suppress(UserError):  # the script does not accept the option for this row
                args = row.script.parse_args(to_argv(options | {key: value}))
                if key.startswith("w_"):  # nor a weight of a term that reads none of the row's paths
                    row.benchmark.check(row.script, args)
                options[key] = value
    return options
