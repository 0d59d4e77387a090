"""Compare methods: Tab. 1, 4 and 9, and any other grid of pairs, methods and seeds.

    python ablations/compare.py                               ten pairs, 240 epochs: alone, KD, KD with L_app, FCFD
    python ablations/compare.py --table 1                     Tab. 1: with CRD, ReviewKD and DKD
    python ablations/compare.py --table 4                     Tab. 4: DKD and SimKD, with and without FCFD
    python ablations/compare.py --table 9                     Tab. 9: online distillation
    python ablations/compare.py --pairs resnet32x4-resnet8x4 --methods kd fcfd --seeds 1 2 3 --jobs 4
    python ablations/compare.py --pairs resnet20-resnet8 --epochs 30 --dataset folder --data-dir DIR

All other options are those of cifar100.py and go to the runs they apply to. A teacher is trained once, with the first
seed, for all its students. Rerunning a command keeps finished runs and resumes interrupted ones. To add runs, append
seeds to --seeds. Each run has a folder in --runs; table.md and cells.csv in --out contain the runs of the last command.

crd, reviewkd and simkd are trained by ablations/train_baseline.py, online-* by online_kd.py, the others by cifar100.py;
kd-dkd is DKD with L_task.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

import online_kd
from ablations import tables, train_baseline
from ablations.cells import Cell, markdown, mean_and_deviation
from ablations.rows import ALONE, Cells, Row, check_given, grid
from common.run.errors import UserError, exit_code
from common.run.options import Parser

PUBLISHED = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())
ROWS = [
    ALONE,
    *(Row({"method": method}) for method in ("kd", "app", "fcfd")),
    Row({"method": "kd", "kd_loss": "dkd"}),
    Row({"method": "fcfd", "kd_loss": "dkd"}),
    Row({"method": "fcfd", "simkd": True}),
    Row({"method": "fcfd", "kd_loss": "dkd", "simkd": True}),
    *(Row({"method": method}, train_baseline) for method in train_baseline.METHODS),
    *(Row({"method": method}, online_kd) for method in online_kd.METHODS),
]
METHODS = {row.name: row for row in ROWS}
TABLES = {
    "1": ["alone", "kd", "crd", "kd-dkd", "reviewkd", "app", "fcfd"],
    "4": ["kd-dkd", "fcfd-dkd", "simkd", "fcfd-simkd", "fcfd-dkd-simkd"],
    "9": ["online-kd", "online-dml", "online-fcfd"],
}
COLUMNS = {"reviewkd": "review"}  # of PUBLISHED, if their names differ
# Settings that may differ from those of a published run.
NOT_DEFINING = ("seed", "device", "amp", "out", "data_dir", "max_minutes", "teacher_ckpt")
NOTE = """
Top-1 test accuracy in percent: mean ± sample standard deviation over n seeds. The teacher is the network that taught
the students. The best epoch is chosen on the test set, so its accuracy is optimistic.
"""
NOTE_BASELINES = """
crd, reviewkd and simkd are trained with their own settings: no Nesterov momentum, the teacher in evaluation mode.
"""
NOTE_PUBLISHED = """
Published accuracies are shown for runs with published settings. Those without a mark were obtained with the same
settings, but in float32. Those marked * were obtained with other settings and are for orientation only: no Nesterov
momentum (unknown for Review), and KD as 0.1 L_task + 0.9 L_kd at T = 4.
"""


def table(rows: list[dict[str, Any]], published: dict[str, dict[str, float]]) -> str:
    """The Markdown table of `rows` from `tables.numbers`; `published` is from `published_figures`."""
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
            if runs[0]["teacher_last"] != "":  # trained in the same run
                last, best = (mean_and_deviation([run[f"teacher_{key}"] for run in runs]) for key in ("last", "best"))
                lines.append([pair, f"{method}: its teacher", len(runs), last, best, ""])
    own_settings = any(row["method"] in train_baseline.METHODS for row in rows)
    return (
        markdown(["pair", "method", "n", "last epoch", "best", "published"], lines)
        + NOTE
        + (NOTE_BASELINES if own_settings else "")
        + (NOTE_PUBLISHED if published else "")
    )


def published_figures(cells: Cells) -> dict[str, dict[str, str]]:
    """The published accuracies of runs with published settings, by pair and method."""
    figures: dict[str, dict[str, str]] = {}
    for (pair, method, _), cell in cells.items():
        column = COLUMNS.get(method, method)
        if pair in PUBLISHED["pairs"] and column in PUBLISHED["columns"] and has_published_settings(cell):
            row = dict(zip(PUBLISHED["columns"], PUBLISHED["pairs"][pair], strict=True))
            figures.setdefault(pair, {})[method] = f"{row[column]:.2f}" + ("" if method == "fcfd" else " *")
            if cell.after:
                figures[pair]["teacher"] = f"{row['teacher']:.2f} *"
    return figures


def has_published_settings(cell: Cell) -> bool:
    """Whether all settings of a run and its teacher's run are the published ones, except for NOT_DEFINING."""
    plain = {key: cell.given[key] for key in ("teacher", "student", "method") if key in cell.given}
    none = cell.folder / "none"  # without a run
    ours, theirs = (Cell(none, given, script=cell.script).settings() for given in (cell.given, plain))
    same = all(ours[key] == theirs[key] for key in ours if key not in NOT_DEFINING)
    return same and (cell.after is None or has_published_settings(cell.after))


def main(argv: list[str] | None = None) -> int:
    """Complete the runs and write the table. Returns the exit code (see `exit_code`)."""

    def more_options(parser: Parser) -> None:
        parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: alone kd app fcfd")
        parser.add_argument("--table", choices=TABLES, help="the methods of this table of the paper")

    def script() -> None:
        args, given = tables.parse_args(argv, __doc__, "compare", PUBLISHED["pairs"], more_options)
        if args.table and args.methods:
            raise UserError("--table and --methods both select methods: give one of them")
        methods = args.methods or TABLES.get(args.table, ["alone", "kd", "app", "fcfd"])
        if args.table:
            args.out /= f"table{args.table}"
        check_given(given, ROWS)
        rows = [METHODS[method] for method in methods]
        cells = grid(args, given, rows)

        def finish(found: list[dict[str, Any]]) -> None:
            text = table(found, published_figures(cells))
            if args.table:  # first as in the paper
                text = tables.layout(["method"], [((row.name,), row) for row in rows], args, found) + "\n" + text
            tables.write(args.out, text, found)

        tables.run(args, cells, finish)

    return exit_code(script, tables.AFTER_INTERRUPT)


if __name__ == "__main__":
    sys.exit(main())
