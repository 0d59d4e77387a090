"""Tab. 6 (Sec. 3.4, A.2): do the student's features work for a judge with which neither network was trained?

    python ablations/exit_branches.py                                        resnet32x4-resnet8x4, 240 epochs
    python ablations/exit_branches.py --seeds 1 2 3 --jobs 3
    python ablations/exit_branches.py --pairs resnet20-resnet8 --branch-depth 20 --branch-widths 16 16 32 64

The judges are exit branches: the later parts of a ResNet50x4, each with a classifier of its own, trained on the frozen
teacher's features F_t^k of k = 2..N-1 to tell the classes. Then a student's F_s^k goes through its own bridge B_st^k
into the branch on F_t^k, whose BatchNorm statistics are first taken anew from such features of the training images; no
weight is changed. Since that alone can help, a row has the teacher's own features after the same. Students are those of
app (KD with L_app) and fcfd.

Every other option is one of cifar100.py and goes to the runs that have a use for it; --batch-size is the branches' too.
Branches lie beside the runs, in <teacher>-branches-seed<first of --seeds>, with what was measured of each student: the
same command goes on where it stopped, at any epoch.
"""

import hashlib
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import cifar100
from ablations import tables
from ablations.branches import (
    Features,
    accuracies,
    check_branch_settings,
    read_json,
    recalibrated,
    student_features,
    teacher_features,
    train_branches,
    write_json,
)
from ablations.cells import Cell, markdown, mean_and_deviation
from ablations.tables import Row
from common.data.batches import Data
from common.data.sources import load_data
from common.models import StagedNet, build
from common.run.checkpoint import load_network
from common.run.device import open_device
from common.run.errors import UserError, exit_code
from common.run.folder import locked, made_with
from common.run.options import LARGEST, Parser

PAIRS = ["resnet32x4-resnet8x4"]
ROWS = [Row({"method": "app"}), Row({"method": "fcfd"})]
SHAPE = {"branch_depth": 50, "branch_widths": [32, 64, 128, 256]}  # ResNet50x4
SMOKE_SHAPE = {"branch_depth": 8, "branch_widths": [8, 16, 32, 64]}
TEACHER = {"teacher": "top1", "teacher, recalibrated": "top1_recalibrated"}  # name of the row: in branches.json
NOTE = """
Top-1 test accuracy in percent of the exit branch after F^k on those features: mean ± sample standard deviation over n
seeds; in all rows but the first with BatchNorm statistics of such features of the training images, not augmented. A
branch is the later part of a ResNet of depth {depth} and widths {widths}; epochs on the teacher's features: {epochs}.
The accuracy of teacher and students themselves is in cells.csv (plain).
"""


def parse_args(argv: list[str] | None, description: str, table: str) -> tuple[Namespace, dict[str, Any], Namespace]:
    """Options and given settings as from `tables.parse_args`, and the settings of the branches.

    Raises:
        UserError: one is out of range.
    """

    def more_options(parser: Parser) -> None:
        add = parser.add_argument
        add("--branch-depth", type=int, metavar="N", default=None, help="of the ResNet they are part of (default: 50)")
        add(
            "--branch-widths", type=int, nargs=4, metavar="C", default=None, help="stem, groups; default: 32 64 128 256"
        )
        add("--branch-epochs", type=int, metavar="N", default=None, help="default: --epochs")

    args, given = tables.parse_args(argv, description, table, PAIRS, more_options)
    if given.get("w_app") == 0:
        raise UserError("--w-app 0: app has no bridges then, through which the student's features would go")
    defaults = {
        key: cifar100.DEFAULTS[key] for key in ("dataset", "data_dir", "subset", "test_subset", "batch_size", "amp")
    }
    c = {key: given.get(key, value) for key, value in defaults.items()}
    c |= {"seed": args.seeds[0], "device": args.devices[0] if args.devices else None}
    c["device"] = c["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = (SMOKE_SHAPE if args.smoke else SHAPE) | {"branch_epochs": given["epochs"]}
    c |= {key: value if getattr(args, key) is None else getattr(args, key) for key, value in shape.items()}
    c = Namespace(**c)
    if c.branch_depth < 8 or c.branch_depth % 6 != 2:
        raise UserError(f"--branch-depth {c.branch_depth}: such a ResNet has a depth of 8, 14, 20, ...")
    for option, values in (("widths", c.branch_widths), ("epochs", [c.branch_epochs])):
        for value in values:
            if not 1 <= value <= LARGEST:
                raise UserError(f"--branch-{option} {value}: it must lie between 1 and {LARGEST}")
    return args, given, c


@dataclass
class Judges:
    """A teacher with its trained branches, on their device, and the data that they are tried on."""

    teacher: StagedNet
    branches: nn.ModuleDict
    data: Data

    def on_teacher(self, images: Tensor) -> dict[str, Tensor]:
        """The teacher's own features."""
        return teacher_features(self.teacher, images)

    def on_student(self, cell: Cell) -> tuple[nn.ModuleDict, Features]:
        """The branches recalibrated for the student of a run, and its features."""
        features = student_features(cell, self.data, self.teacher, self.data.train.labels.device)
        return recalibrated(self.branches, features, self.data.train), features


def by_teacher(args: Namespace, cells: dict[tuple, Cell]) -> Iterator[tuple[Path, dict[tuple, Cell]]]:
    """For each teacher the folder of its branches and the finished runs of its students."""
    for name in dict.fromkeys(cell.given["teacher"] for cell in cells.values()):
        own = {key: cell for key, cell in cells.items() if cell.given["teacher"] == name and cell.result()}
        if own:
            yield args.runs / f"{name}-branches-seed{args.seeds[0]}", own


def check_files(cells: Iterable[Cell], teacher_follows: bool = False) -> None:
    """Raise a UserError if a file of finished runs is missing: a student's, or, unless it follows, its teacher's."""
    cells = list(cells)
    networks = [] if teacher_follows else dict.fromkeys(Path(cell.given["teacher_ckpt"]) for cell in cells)
    files = [*networks, *(cell.folder / "last.pt" for cell in cells)]
    if missing := [file for file in files if not file.exists()]:
        results = " ".join(str(file.with_name("result.json")) for file in missing)
        raise UserError(
            f"{missing[0]} is missing: of a run whose numbers alone were kept there are no weights; put it there, or "
            f"have the run made again by: rm {results}"
        )


@contextmanager
def open_judges(c: Namespace, folder: Path, cells: Iterable[Cell]) -> Iterator[Judges]:
    """The branches in `folder` on the teacher of `cells`, trained if they are not there; keeps others out of it.

    Raises:
        UserError: another process is there, or a file of a finished run is missing.
    """
    cells = list(cells)
    name, network = cells[0].given["teacher"], Path(cells[0].given["teacher_ckpt"])
    check_files(cells)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        data, device = load_data(c.dataset, c.data_dir, c.subset, c.test_subset), open_device(c.device)
        data.train, data.test = data.train.to(device), data.test.to(device)
        teacher = build(name, len(data.classes))
        load_network(teacher, network, name)
        branches, state = train_branches(Namespace(**vars(c)), folder, teacher, data)
        record = {key: state[key] for key in ("settings", "epoch", "top1", "top1_recalibrated", "log", "made_with")}
        write_json(folder / "branches.json", record)
        yield Judges(teacher, branches, data)


def measure(c: Namespace, folder: Path, cells: dict[tuple, Cell]) -> dict[tuple, dict[str, Any]]:
    """What the branches in `folder` make of each student, and under TEACHER of their teacher; what is known is kept.

    A student's numbers lie in <folder>/<its run>.json, and are kept while neither its result.json nor branches.json
    changes.
    """
    record = folder / "branches.json"
    settings = read_json(record).get("settings")
    check_branch_settings(folder, settings if isinstance(settings, dict) else {}, c)
    if todo := left_of(folder, cells.values()):
        with open_judges(c, folder, todo) as judges:
            for cell in (cell for cell in todo if not known(folder, cell)):
                found = accuracies(*judges.on_student(cell), judges.data.test)
                row = {
                    "of": sources(folder, cell),
                    "top1": found,
                    "made_with": made_with(judges.data.train.labels.device),
                }
                write_json(folder / f"{cell.folder.name}.json", row)
                print(f"{cell.folder}: " + ", ".join(f"{top1:.2f} % after F^{k}" for k, top1 in found.items()))
    own = read_json(record)
    teacher = {name: {"top1": own[key], "made_with": own["made_with"]} for name, key in TEACHER.items()}
    return teacher | {key: known(folder, cell) for key, cell in cells.items()}


def left_of(folder: Path, cells: Iterable[Cell], more: bool = False) -> list[Cell]:
    """The runs whose students are to be measured; `more`: others will be, too."""
    todo = [cell for cell in cells if not known(folder, cell)]
    if (todo or more) and not (folder / "branches.pt").exists():
        return list(cells)  # with branches that are made again all changes
    return todo


def known(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """What the branches in `folder` made of a run's student, if neither has changed since."""
    row = read_json(folder / f"{cell.folder.name}.json")
    return row if row.get("of") == sources(folder, cell) else None


def sources(folder: Path, cell: Cell) -> list[str]:
    """What that follows from: digests of files."""
    files = (folder / "branches.json", cell.folder / "result.json")
    return [hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "" for file in files]


def numbers(
    found: dict[tuple | str, dict[str, Any]], runs: dict[tuple[str, str, int], dict[str, Any]], seed: int
) -> list[dict[str, Any]]:
    """What is written to cells.csv: a row for each pair, features (the teacher's own or a student's), seed and branch.

    Args:
        found: from `measure`.
        runs: those of `tables.numbers` by (pair, method, seed).
        seed: the branches'.
    """
    keys, rows = [key for key in found if key not in TEACHER], []
    for pair in dict.fromkeys(pair for pair, _, _ in keys):
        own = [key for key in keys if key[0] == pair]
        taught = runs[own[0]]["teacher"]
        lines = [(pair, name, seed, taught, found[name]) for name in TEACHER]
        lines += [(*key, runs[key]["last"], found[key]) for key in own]
        for *start, plain, row in lines:
            start = dict(zip(("pair", "features", "seed"), start, strict=True))
            rows += [start | {"after": k, "top1": v, "plain": plain} | row["made_with"] for k, v in row["top1"].items()]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line for the features of each network, a column for each branch, as the paper has it; `rows` of `numbers`."""
    columns = sorted({row["after"] for row in rows})
    lines = []
    for pair, features in dict.fromkeys((row["pair"], row["features"]) for row in rows):
        own = [row for row in rows if (row["pair"], row["features"]) == (pair, features)]
        values = [[row["top1"] for row in own if row["after"] == k] for k in columns]
        count = len({row["seed"] for row in own})
        lines.append([pair, features, count, *(mean_and_deviation(each) if each else "" for each in values)])
    return markdown(["pair", "features of", "n", *(f"after F^{k}" for k in columns)], lines)


def main(argv: list[str] | None = None) -> int:
    """Do what is left of the runs and branches and write the table; the exit code is that of `exit_code`."""

    def script() -> None:
        args, given, c = parse_args(argv, __doc__, "exit_branches")
        cells, rows, found = tables.grid(args, given, ROWS), [], []
        for folder, own in by_teacher(args, cells):  # before anything is trained
            more = not all(cell.result() for cell in cells.values())
            check_files(left_of(folder, own.values(), more), teacher_follows=more)
        tables.run(args, cells, found.extend)
        runs = {(run["pair"], run["method"], run["seed"]): run for run in found}
        for folder, own in by_teacher(args, cells):
            rows += numbers(measure(c, folder, own), runs, c.seed)
        if rows:
            shape = {"depth": c.branch_depth, "widths": ", ".join(map(str, c.branch_widths))}
            tables.write(args.out, table(rows) + NOTE.format(**shape, epochs=c.branch_epochs), rows)

    return exit_code(script, "what is finished is kept, repeat the command to go on")


if __name__ == "__main__":
    sys.exit(main())
