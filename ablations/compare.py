"""Compare methods: Tab. 1, 4 and 9, and any other grid of pairs, methods and seeds.

    python ablations/compare.py                               ten pairs, 240 epochs: FCFD, and with fewer terms
    python ablations/compare.py --table 1                     Tab. 1: FCFD and the published methods
    python ablations/compare.py --table 4                     Tab. 4: DKD and SimKD, with and without FCFD
    python ablations/compare.py --table 9                     Tab. 9: online distillation
    python ablations/compare.py --pairs resnet32x4-resnet8x4 --methods kd fcfd --seeds 1 2 3 --jobs 4
    python ablations/compare.py --pairs resnet20-resnet8 --epochs 30 --dataset folder --data-dir DIR

All other options are those of cifar100.py and go to the runs they apply to. A teacher is trained once, with the first
seed, for all its students. Rerunning a command keeps finished runs and resumes interrupted ones. To add runs, append
seeds to --seeds. Each run has a folder in --runs; table.md and cells.csv in --out contain the runs of the last command.

baseline-* are the published methods with their own settings, trained by ablations/baseline_cifar100.py; online-* are
trained by online_kd.py, the others by cifar100.py with FCFD's settings.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

import online_kd
from ablations import baseline_cifar100, tables
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
    *(Row({"method": method}, baseline_cifar100) for method in baseline_cifar100.METHODS),
    *(Row({"method": method}, online_kd) for method in online_kd.METHODS),
]
METHODS = {row.name: row for row in ROWS}
TITLES = {
    "alone": "alone, FCFD's settings",
    "kd": "L_task + L_kd of FCFD",
    "app": "L_task + L_kd + L_app of FCFD",
    "fcfd": "FCFD",
    "kd-dkd": "L_task + L_kd of FCFD with DKD",
    "fcfd-dkd": "FCFD with DKD",
    "fcfd-simkd": "FCFD with SimKD",
    "fcfd-dkd-simkd": "FCFD with DKD and SimKD",
    "baseline-alone": "alone",
    "baseline-kd": "KD",
    "baseline-dkd": "DKD",
    "baseline-fitnet": "FitNet",
    "baseline-vid": "VID",
    "baseline-crd": "CRD",
    "baseline-reviewkd": "ReviewKD",
    "baseline-simkd": "SimKD",
}
BASELINES = ["baseline-alone", *(f"baseline-{name}" for name in ("kd", "fitnet", "vid", "crd", "dkd", "reviewkd"))]
TABLES = {
    "1": [*BASELINES, "fcfd"],
    "4": ["baseline-dkd", "fcfd-dkd", "baseline-simkd", "fcfd-simkd", "fcfd-dkd-simkd"],
    "9": ["online-kd", "online-dml", "online-fcfd"],
}
COLUMNS = {name: name.removeprefix("baseline-") for name in [*BASELINES, "baseline-simkd"]}
COLUMNS |= {"baseline-reviewkd": "review", "fcfd": "fcfd"}
# Settings that may differ from those of a published run.
NOT_DEFINING = ("seed", "device", "amp", "out", "data_dir", "max_minutes", "teacher_ckpt")
NOTE = """
Top-1 test accuracy in percent: mean ± sample standard deviation over n seeds. The teacher is the network that taught
the students. The best epoch is chosen on the test set, so its accuracy is optimistic.
"""
NOTE_PUBLISHED = """
Published accuracies are shown only for runs with the published settings. The published runs used float32 and
RepDistiller's teachers (ReviewKD: its own). Their accuracy is that of the best epoch for FCFD, DKD and SimKD, of the
last one for the student alone, KD, FitNet, VID and CRD, and unknown for ReviewKD. *: RepDistiller's teachers were
trained without Nesterov momentum, the one here with it.
"""
UNPUBLISHED = "setting not published"


def table(rows: list[dict[str, Any]], published: dict[str, dict[str, str]]) -> str:
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
            lines.append([pair, title(method), len(runs), last, best, figures.get(method, "")])
            if runs[0]["teacher_last"] != "":  # trained in the same run
                last, best = (mean_and_deviation([run[f"teacher_{key}"] for run in runs]) for key in ("last", "best"))
                lines.append([pair, f"{method}: its teacher", len(runs), last, best, ""])
    text = markdown(["pair", "method", "n", "last epoch", "best", "published"], lines) + NOTE
    return text + (NOTE_PUBLISHED if published else "")


def title(method: str) -> str:
    return TITLES.get(method, method)


def published_figures(cells: Cells) -> dict[str, dict[str, str]]:
    """The published accuracies of runs with published settings, by pair and method, or UNPUBLISHED."""
    figures: dict[str, dict[str, str]] = {}
    for (pair, method, _), cell in cells.items():
        if pair not in PUBLISHED["pairs"] or not has_default_settings(cell):
            continue
        row = dict(zip(PUBLISHED["columns"], PUBLISHED["pairs"][pair], strict=True))
        row["simkd"] = PUBLISHED["simkd"].get(pair)
        if not cell.settings().get("published", True):
            figures.setdefault(pair, {})[method] = UNPUBLISHED
        elif method in COLUMNS and row[COLUMNS[method]]:
            figures.setdefault(pair, {})[method] = f"{row[COLUMNS[method]]:.2f}"
            if cell.after:
                figures[pair]["teacher"] = f"{row['teacher']:.2f} *"
    return figures


def has_default_settings(cell: Cell) -> bool:
    """Whether all settings of a run and its teacher's run are the default ones, except for NOT_DEFINING."""
    plain = {key: cell.given[key] for key in ("teacher", "student", "method") if key in cell.given}
    none = cell.folder / "none"  # without a run
    ours, theirs = (Cell(none, given, script=cell.script).settings() for given in (cell.given, plain))
    same = all(ours[key] == theirs[key] for key in ours if key not in NOT_DEFINING)
    return same and (cell.after is None or has_default_settings(cell.after))


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
                text = tables.layout(["method"], [((title(row.name),), row) for row in rows], args, found) + "\n" + text
            tables.write(args.out, text, found)

        tables.run(args, cells, finish)

    return exit_code(script, tables.AFTER_INTERRUPT)


if __name__ == "__main__":
    sys.exit(main())
