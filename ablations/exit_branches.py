"""Exit branches (Tab. 6; Sec. 3.4, A.2): do the student's features work in a network that it was not trained with?

    python ablations/exit_branches.py                                        three pairs, 240 epochs
    python ablations/exit_branches.py --pairs resnet32x4-resnet8x4 --seeds 1 2 3 --jobs 3
    python ablations/exit_branches.py --pairs resnet20-resnet8 --branch-depth 20 --branch-widths 16 16 32 64

Exit branches are the later parts of a ResNet50x4, each with its own classifier, trained to classify the frozen
teacher's features F_t^k, k = 2..N-1. A student's F_s^k then passes through its bridge B_st^k into the branch on F_t^k.
The branch's BatchNorm statistics are first recalibrated on the student's features of the training images; no weights
change. Since recalibration alone can help, one row applies it to the teacher's own features. Students are trained by
app (KD with L_app) and fcfd.

All other options are those of cifar100.py and go to the runs they apply to; --batch-size also sets the branches'.
Branches and the accuracies of each student are saved next to the runs, in <teacher>-branches-seed<first of --seeds>.
Rerunning an interrupted command resumes it after the last finished epoch.
"""

import hashlib
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
from ablations.components import PAIRS
from ablations.rows import Cells, Row, grid
from common.data.batches import Data
from common.data.sources import load_data
from common.models import StagedNet, build
from common.run.checkpoint import load_network
from common.run.device import default_device, open_device
from common.run.errors import UserError, exit_code
from common.run.folder import locked, made_with
from common.run.options import Parser
from common.run.types import count

ROWS = [Row({"method": "app"}), Row({"method": "fcfd"})]
SHAPE = {"branch_depth": 50, "branch_widths": [32, 64, 128, 256]}  # ResNet50x4
SMOKE_SHAPE = {"branch_depth": 8, "branch_widths": [8, 16, 32, 64]}
TEACHER = {"teacher": "top1", "teacher, recalibrated": "top1_recalibrated"}  # row name -> key in branches.json
NOTE = """
Top-1 test accuracy in percent of the exit branch after F^k on these features: mean ± sample standard deviation over n
seeds. In all rows but the first, BatchNorm statistics are recalibrated on these features of the training images,
without augmentation. A branch is the later part of a ResNet of depth {depth} and widths {widths}, trained for {epochs}
epochs on the teacher's features. Students and branches are those of the last epoch. The accuracies of the teacher and
the students themselves are in cells.csv (plain).
"""


def branch_depth(text: str) -> int:
    """A type for add_argument: the depth of a CIFAR ResNet."""
    depth = count(text)
    if depth < 8 or depth % 6 != 2:
        raise ArgumentTypeError(f"{text} must be 8, 14, 20, ...")
    return depth


def parse_args(
    argv: list[str] | None, description: str, table: str, pairs: list[str]
) -> tuple[Namespace, dict[str, Any], Namespace]:
    """The options from `tables.parse_args`, and the settings of the branches."""

    def more_options(parser: Parser) -> None:
        add = parser.add_argument
        add("--branch-depth", type=branch_depth, metavar="N", help="depth of the branches' ResNet (default: 50)")
        add("--branch-widths", type=count, nargs=4, metavar="C", help="its widths (default: 32 64 128 256)")
        add("--branch-epochs", type=count, metavar="N", help="default: --epochs")

    args, given = tables.parse_args(argv, description, table, pairs, more_options)
    if given.get("w_app") == 0:
        raise UserError("--w-app 0: without L_app, app has no bridges for the student's features")
    shape = (SMOKE_SHAPE if args.smoke else SHAPE) | {"branch_epochs": given["epochs"]}
    c = {key: given.get(key) for key in ("dataset", "data_dir", "subset", "test_subset", "amp")}
    c |= {"batch_size": given.get("batch_size", cifar100.SETTINGS["batch_size"])}
    c |= {"seed": args.seeds[0], "device": (args.devices or [default_device()])[0]}
    c |= {key: getattr(args, key) or value for key, value in shape.items()}
    return args, given, Namespace(**c)


@dataclass
class TrainedBranches:
    """A teacher, its trained exit branches and the data to evaluate them on, all on one device."""

    teacher: StagedNet
    branches: nn.ModuleDict
    data: Data

    def teacher_features(self, images: Tensor) -> dict[str, Tensor]:
        """The teacher's own features: see `branches.teacher_features`."""
        return teacher_features(self.teacher, images)

    def for_student(self, cell: Cell) -> tuple[nn.ModuleDict, Features]:
        """The branches recalibrated for the student of a run, and the student's features."""
        features = student_features(cell, self.data, self.teacher, self.data.train.labels.device)
        return recalibrated(self.branches, features, self.data.train), features


def by_teacher(args: Namespace, cells: Cells) -> Iterator[tuple[Path, Cells]]:
    """For each teacher, the folder of its branches and the finished runs of its students."""
    for name in dict.fromkeys(cell.given["teacher"] for cell in cells.values()):
        own = {key: cell for key, cell in cells.items() if cell.given["teacher"] == name and cell.result()}
        if own:
            yield args.runs / f"{name}-branches-seed{args.seeds[0]}", own


def check_files(cells: Iterable[Cell], teacher_pending: bool = False) -> None:
    """Raise a UserError if a checkpoint of finished runs is missing: a student's or, unless pending, its teacher's."""
    cells = list(cells)
    networks = [] if teacher_pending else dict.fromkeys(Path(cell.given["teacher_ckpt"]) for cell in cells)
    files = [*networks, *(cell.folder / "last.pt" for cell in cells)]
    if missing := [file for file in files if not file.exists()]:
        results = " ".join(str(file.with_name("result.json")) for file in missing)
        raise UserError(
            f"{missing[0]} is missing, only the run's results are there: restore it, or delete the results to train "
            f"again: rm {results}"
        )


@contextmanager
def open_branches(c: Namespace, folder: Path, cells: Iterable[Cell]) -> Iterator[TrainedBranches]:
    """The exit branches in `folder` on the teacher of `cells`, trained if necessary; locks the folder.

    Raises:
        UserError: another process uses the folder, or a checkpoint of a finished run is missing.
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
        yield TrainedBranches(teacher, branches, data)


def measure(c: Namespace, folder: Path, cells: Cells) -> dict[tuple | str, dict[str, Any]]:
    """Accuracies of the branches in `folder` on each student and, under the keys of TEACHER, on their teacher.

    A student's are stored in <folder>/<name of its run>.json and reused while neither its result.json nor branches.json
    changes.
    """
    record = folder / "branches.json"
    settings = read_json(record).get("settings")
    check_branch_settings(folder, settings if isinstance(settings, dict) else {}, c)
    if todo := unmeasured(folder, cells.values()):
        with open_branches(c, folder, todo) as trained:
            for cell in (cell for cell in todo if not stored_row(folder, cell)):
                found = accuracies(*trained.for_student(cell), trained.data.test)
                row = {
                    "of": source_digests(folder, cell),
                    "top1": found,
                    "made_with": made_with(trained.data.train.labels.device),
                }
                write_json(folder / f"{cell.folder.name}.json", row)
                print(f"{cell.folder}: " + ", ".join(f"{top1:.2f} % after F^{k}" for k, top1 in found.items()))
    own = read_json(record)
    teacher = {name: {"top1": own[key], "made_with": own["made_with"]} for name, key in TEACHER.items()}
    return teacher | {key: stored_row(folder, cell) for key, cell in cells.items()}


def unmeasured(folder: Path, cells: Iterable[Cell], more: bool = False) -> list[Cell]:
    """The runs whose students still have to be measured; `more`: students of other runs will be measured too."""
    todo = [cell for cell in cells if not stored_row(folder, cell)]
    if (todo or more) and not (folder / "branches.pt").exists():
        return list(cells)  # the branches will be trained again, which changes all results
    return todo


def stored_row(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """What was measured of a run's student in `folder`, unless the run or the branches have changed since."""
    row = read_json(folder / f"{cell.folder.name}.json")
    return row if row.get("of") == source_digests(folder, cell) else None


def source_digests(folder: Path, cell: Cell) -> list[str]:
    """Digests of the files that a student's row depends on; "" for a missing file."""
    files = (folder / "branches.json", cell.folder / "result.json")
    return [hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "" for file in files]


def numbers(
    found: dict[tuple | str, dict[str, Any]], runs: dict[tuple[str, str, int], dict[str, Any]], seed: int
) -> list[dict[str, Any]]:
    """The rows of cells.csv: one per pair, features (the teacher's own or a student's), seed and branch.

    Args:
        found: from `measure`.
        runs: from `tables.numbers`, by (pair, method, seed).
        seed: of the branches.
    """
    keys, rows = [key for key in found if key not in TEACHER], []
    for pair in dict.fromkeys(pair for pair, _, _ in keys):
        own = [key for key in keys if key[0] == pair]
        of_teacher = runs[own[0]]["teacher"]
        lines = [(pair, name, seed, of_teacher, found[name]) for name in TEACHER]
        lines += [(*key, runs[key]["last"], found[key]) for key in own]
        for *start, plain, row in lines:
            start = dict(zip(("pair", "features", "seed"), start, strict=True))
            rows += [start | {"after": k, "top1": v, "plain": plain} | row["made_with"] for k, v in row["top1"].items()]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One row per network whose features are used and one column per branch, as in the paper; `rows` from `numbers`."""
    columns = sorted({row["after"] for row in rows})
    lines = []
    for pair, features in dict.fromkeys((row["pair"], row["features"]) for row in rows):
        own = [row for row in rows if (row["pair"], row["features"]) == (pair, features)]
        values = [[row["top1"] for row in own if row["after"] == k] for k in columns]
        count = len({row["seed"] for row in own})
        lines.append([pair, features, count, *(mean_and_deviation(each) if each else "" for each in values)])
    return markdown(["pair", "features of", "n", *(f"after F^{k}" for k in columns)], lines)


def main(argv: list[str] | None = None) -> int:
    """Complete the runs and branches, and write the table. Returns the exit code (see `exit_code`)."""

    def script() -> None:
        args, given, c = parse_args(argv, __doc__, "exit_branches", PAIRS)
        cells, rows, found = grid(args, given, ROWS), [], []
        for folder, own in by_teacher(args, cells):  # before anything is trained
            more = not all(cell.result() for cell in cells.values())
            check_files(unmeasured(folder, own.values(), more), teacher_pending=more)
        tables.run(args, cells, found.extend)
        runs = {(run["pair"], run["method"], run["seed"]): run for run in found}
        for folder, own in by_teacher(args, cells):
            rows += numbers(measure(c, folder, own), runs, c.seed)
        if rows:
            shape = {"depth": c.branch_depth, "widths": ", ".join(map(str, c.branch_widths))}
            tables.write(args.out, table(rows) + NOTE.format(**shape, epochs=c.branch_epochs), rows)

    return exit_code(script, tables.AFTER_INTERRUPT)


if __name__ == "__main__":
    sys.exit(main())
