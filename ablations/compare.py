"""Methods beside one another: Tab. 1, 4 and 9, and any other grid of pairs, methods and seeds.

    python ablations/compare.py                               ten pairs, 240 epochs: alone, KD, KD with L_app, FCFD
    python ablations/compare.py --table 1                     Tab. 1: with the other methods of this project
    python ablations/compare.py --table 4                     Tab. 4: DKD and SimKD, each alone and with FCFD
    python ablations/compare.py --table 9                     Tab. 9: online distillation
    python ablations/compare.py --pairs resnet32x4-resnet8x4 --methods kd fcfd --seeds 1 2 3 --jobs 4
    python ablations/compare.py --pairs resnet20-resnet8 --epochs 30 --dataset folder --data-dir DIR

Every other option is one of cifar100.py and goes to those of the runs that have a use for it. A teacher is trained
once, with the first of the seeds, and serves all its students. Runs that are finished are kept and those broken off are
resumed: the same command goes on with what is left, and a command with more seeds at the end of --seeds adds to it. A
folder for each run comes to lie in --runs, and in --out, of the runs of the last command, table.md and the numbers in
cells.csv.

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
from ablations.tables import ALONE, Row
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
COLUMNS = {"reviewkd": "review"}  # of PUBLISHED, where they have another name
# What may differ from a published run while its figure still means the same.
NOT_DEFINING = ("seed", "device", "amp", "out", "data_dir", "max_minutes", "teacher_ckpt")
NOTE = """
Top-1 test accuracy in percent: mean ± sample standard deviation over n seeds; a teacher's is of the one that taught.
The best epoch is chosen on the test set, which flatters it.
"""
NOTE_BASELINES = """
crd, reviewkd and simkd are trained with settings of their own: no Nesterov momentum, the teacher in evaluation mode.
"""
NOTE_PUBLISHED = """
Published figures stand beside runs of full length in which no setting was changed. One without a mark is of the same
settings, but for its float32; those marked * are of others, for orientation alone: no Nesterov momentum (for Review not
known), and KD as 0.1 L_task + 0.9 L_kd at T = 4.
"""


def table(rows: list[dict[str, Any]], published: dict[str, dict[str, float]]) -> str:
    """The Markdown table of `rows` as from `tables.numbers`; `published` holds figures by pair and method."""
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
            if runs[0]["teacher_last"] != "":  # it was trained in the same run
                last, best = (mean_and_deviation([run[f"teacher_{key}"] for run in runs]) for key in ("last", "best"))
                lines.append([pair, f"{method}: its teacher", len(runs), last, best, ""])
    own_settings = any(row["method"] in train_baseline.METHODS for row in rows)
    return (
        markdown(["pair", "method", "n", "last epoch", "best", "published"], lines)
        + NOTE
        + (NOTE_BASELINES if own_settings else "")
        + (NOTE_PUBLISHED if published else "")
    )


def published_figures(cells: dict[tuple[str, str, int], Cell]) -> dict[str, dict[str, str]]:
    """The published figures that may stand beside these runs, by pair and method."""
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
    """Whether a run, and that of its teacher, differ from the published one in nothing but what is NOT_DEFINING."""
    plain = {key: cell.given[key] for key in ("teacher", "student", "method") if key in cell.given}
    none = cell.folder / "none"
    ours, theirs = (vars(Cell(none, given, script=cell.script).settings()) for given in (cell.given, plain))
    same = all(ours[key] == theirs[key] for key in ours if key not in NOT_DEFINING)
    return same and (cell.after is None or has_published_settings(cell.after))


def main(argv: list[str] | None = None) -> int:
    """Check the grid, run it and write its table; the exit code is that of `exit_code`."""

    def more_options(parser: Parser) -> None:
        add = parser.add_argument
        add("--methods", nargs="+", choices=METHODS, default=None, help="default: alone kd app fcfd")
        add("--table", choices=TABLES, default=None, help="the methods of this table of the paper")

    def script() -> None:
        args, given = tables.parse_args(argv, __doc__, "compare", PUBLISHED["pairs"], more_options)
        if args.table and args.methods:
            raise UserError("--table and --methods both choose the methods: give one of them")
        methods = args.methods or TABLES.get(args.table, ["alone", "kd", "app", "fcfd"])
        if args.table:
            args.out /= f"table{args.table}"
        tables.check_given(given, ROWS)
        rows = [METHODS[method] for method in methods]
        cells = tables.grid(args, given, rows)

        def finish(found: list[dict[str, Any]]) -> None:
            text = table(found, published_figures(cells))
            if args.table:  # first as in the paper
                lines = [((row.name,), row) for row in rows]
                as_published = tables.layout(["method"], lines, args.pairs, found, len(set(args.seeds)))
                text = f"{as_published}{tables.note(args, found, cells)}\n{text}"
            tables.write(args.out, text, found)

        tables.run(args, cells, finish)

    return exit_code(script, "what is finished is kept, repeat the command to go on")


if __name__ == "__main__":
    sys.exit(main())
