"""Compare methods: Tab. 1, 2, 3, 4, 7 and 9, and any other grid of pairs, methods and seeds on CIFAR-100.

    python ablations/compare.py                               ten pairs, 240 epochs: FCFD, with fewer terms, alone
    python ablations/compare.py --table 1                     CIFAR-100: FCFD and the published methods
    python ablations/compare.py --table 2 --data-dir DIR      ImageNet
    python ablations/compare.py --table 3 --data-dir COCO     detection
    python ablations/compare.py --table 4                     DKD and SimKD, with and without FCFD
    python ablations/compare.py --table 7 --data-dir COCO     detection: the inheriting strategy
    python ablations/compare.py --table 9                     online distillation
    python ablations/compare.py --pairs resnet32x4-resnet8x4 --methods kd fcfd --seeds 1 2 3 --jobs 4
    python ablations/compare.py --pairs resnet20-resnet8 --epochs 30 --dataset folder --data-dir DIR

All other options are those of cifar100.py (Tab. 2: imagenet.py; Tab. 3 and 7: detection.py) and go to the runs they
apply to. A teacher is given, downloaded, or trained once, with the first seed, for all its students. Rerunning a
command keeps finished runs and resumes interrupted ones. To add runs, append seeds to --seeds. Each run has a folder in
--runs; table.md and cells.csv in --out, or a subfolder for each --table, contain the runs of the last command.

baseline-* are the published methods with their own settings (docs/baselines.md), online-* those of online_kd.py. The
others have FCFD's settings.
"""

import sys
from argparse import Namespace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import detection
import imagenet
import online_kd
from ablations import baseline_cifar100, baseline_detection, baseline_imagenet, tables
from ablations.benchmarks import CIFAR, DETECTION, IMAGENET, Benchmark
from ablations.cells import Cell, markdown, mean_and_deviation
from ablations.rows import ALONE, Cells, Row, check_given, grid
from ablations.tables import PUBLISHED
from common.data.image_files import list_files
from common.run.errors import UserError, exit_code
from common.run.options import Parser

FCFD = {"method": "fcfd"}
ROWS = [  # on CIFAR-100
    ALONE,
    *(Row({"method": method}) for method in ("kd", "app", "fcfd")),
    Row({"method": "kd", "kd_loss": "dkd"}),
    Row(FCFD | {"kd_loss": "dkd"}),
    Row(FCFD | {"simkd": True}),
    Row(FCFD | {"kd_loss": "dkd", "simkd": True}),
    *(Row({"method": method}, baseline_cifar100) for method in baseline_cifar100.METHODS),
    *(Row({"method": method}, online_kd) for method in online_kd.METHODS),
]
METHODS = {row.name: row for row in ROWS}
TAB_1 = ("baseline-alone", *(f"baseline-{name}" for name in ("kd", "fitnet", "vid", "crd", "dkd", "reviewkd")), "fcfd")
TAB_4 = ("fcfd", "baseline-dkd", "fcfd-dkd", "baseline-simkd", "fcfd-simkd", "fcfd-dkd-simkd")
TABLES = {
    "1": [METHODS[name] for name in TAB_1],
    "2": [
        Row({}, imagenet),
        *(
            Row({"method": method}, baseline_imagenet)
            for method in ("kd", "at", "ofd", "srrl", "crd", "dkd", "reviewkd")
        ),
        Row(FCFD, imagenet),
    ],
    "3": [
        Row({}, detection),
        Row({"method": "kd"}, detection),
        *(Row({"method": method}, baseline_detection) for method in ("fgfi", "reviewkd")),
        Row(FCFD, detection),
    ],
    "4": [METHODS[name] for name in TAB_4],
    "7": [Row({}, detection), Row(FCFD, detection), Row(FCFD | {"inherit": True}, detection)],
    "9": [METHODS[f"online-{name}"] for name in ("kd", "dml", "fcfd")],
}
TITLES = {
    "alone": "alone, FCFD's settings",
    "kd": "L_task + L_kd of FCFD",
    "app": "L_task + L_kd + L_app of FCFD",
    "fcfd": "FCFD",
    "kd-dkd": "L_task + L_kd of FCFD with DKD",
    "fcfd-dkd": "FCFD with DKD",
    "fcfd-simkd": "FCFD with SimKD",
    "fcfd-dkd-simkd": "FCFD with DKD and SimKD",
    "fcfd-inherit": "FCFD, inheriting",
    "baseline-alone": "alone",
    "baseline-kd": "KD",
    "baseline-dkd": "DKD",
    "baseline-fitnet": "FitNet",
    "baseline-at": "AT",
    "baseline-vid": "VID",
    "baseline-ofd": "OFD",
    "baseline-srrl": "SRRL",
    "baseline-crd": "CRD",
    "baseline-reviewkd": "ReviewKD",
    "baseline-simkd": "SimKD",
    "baseline-fgfi": "FGFI",
}
PAIRS = {  # on other data than CIFAR-100
    "2": list(PUBLISHED["imagenet"]["pairs"]),
    "3": ["resnet101-resnet18", "resnet101-resnet50", "resnet50-mobilenet_v2"],
    "7": ["resnet101-resnet50"],  # whose FPNs have the same shape
}
# Settings that may differ from a published run's.
NOT_DEFINING = ("seed", "device", "amp", "out", "data_dir", "max_minutes", "teacher_ckpt", "workers")
IMAGENET_IMAGES = 1_281_167
NOTE = """
Accuracy on the test set in percent: mean ± sample standard deviation over n seeds. The teacher is the network that
taught the students. The best {unit} is the one with the highest {metric} on the test set, so it is optimistic.
"""
NOTE_PUBLISHED = """
Published accuracies are shown only for runs with the published settings. (best) and (last) name their epoch, and so the
column to compare them with; (?): unknown. """
NOTE_RUNS = {
    "cifar100": """The published runs used float32 and RepDistiller's
teachers (ReviewKD: its own). *: RepDistiller's teachers were trained without Nesterov momentum, the one here with it. A
given teacher is assumed to be RepDistiller's: compare its accuracy with the published one.
""",
    "imagenet": """The baselines' published runs used
float32.
""",
}
NOTE_DETECTION = """
No accuracy with known settings is published for these detectors. The paper states that FCFD gains 4.03 AP over the
students alone, on average over the pairs of Tab. 3.
"""
UNPUBLISHED = "setting not published"


def table(rows: list[dict[str, Any]], published: dict[str, dict[str, str]], benchmark: Benchmark = CIFAR) -> str:
    """The Markdown table of `rows` from `tables.numbers`; `published` is from `published_figures`."""
    metrics, column, lines = benchmark.metrics, benchmark.column, []

    def accuracies(runs: list[dict[str, Any]], prefix: str = "") -> list[str]:
        keys = [column(f"{prefix}{which}", metric) for metric in metrics for which in ("last", "best")]
        return [mean_and_deviation([run[key] for run in runs]) for key in keys]

    for pair in dict.fromkeys(row["pair"] for row in rows):
        of_pair = [row for row in rows if row["pair"] == pair]
        figures = published.get(pair, {})
        teachers = [row for row in of_pair if row["teacher"] != ""]
        if teachers:
            tested = [text for metric in metrics for text in (f"{teachers[0][column('teacher', metric)]:.2f}", "")]
            lines.append([pair, "teacher", 1, *tested, figures.get("teacher", "")])
        for method in dict.fromkeys(row["method"] for row in of_pair):
            runs = [row for row in of_pair if row["method"] == method]
            lines.append([pair, title(method, benchmark), len(runs), *accuracies(runs), figures.get(method, "")])
            if runs[0]["teacher_last"] != "":  # trained in the same run
                lines.append([pair, f"{method}: its teacher", len(runs), *accuracies(runs, "teacher_"), ""])
    columns = [f"{metric}, {which}" for metric in metrics.values() for which in ("last", "best")]
    text = markdown(["pair", "method", "n", *columns, "published"], lines)
    text += NOTE.format(unit=benchmark.unit, metric=next(iter(metrics.values())))
    text += NOTE_DETECTION if benchmark is DETECTION else ""
    return text + (NOTE_PUBLISHED + NOTE_RUNS[benchmark.name] if published else "")


def title(method: str, benchmark: Benchmark) -> str:
    if method == "alone" and benchmark is not CIFAR:  # where baseline-alone has other settings
        return method
    return TITLES.get(method, method)


def published_figures(cells: Cells) -> dict[str, dict[str, str]]:
    """The published accuracies of runs with published settings, by pair and method, or UNPUBLISHED."""
    figures: dict[str, dict[str, str]] = {}
    for (pair, method), cell in {(pair, method): cell for (pair, method, _), cell in cells.items()}.items():
        known = PUBLISHED.get(cell.benchmark.name)
        if not known or pair not in known["pairs"] or not has_default_settings(cell):
            continue
        if cell.benchmark is IMAGENET and ("teacher_ckpt" in cell.given or not all_of_imagenet(cell.given["data_dir"])):
            continue  # the published teachers are torchvision's
        if not cell.settings().get("published", True):
            figures.setdefault(pair, {})[method] = UNPUBLISHED
        elif text := published_figure(cell.benchmark, pair, method):
            figures.setdefault(pair, {})[method] = text
            if teacher := published_figure(cell.benchmark, pair, "teacher"):
                figures[pair]["teacher"] = teacher + " *" * bool(cell.after)
    return figures


def published_figure(benchmark: Benchmark, pair: str, method: str) -> str | None:
    """The published accuracy of a method or the teacher, and its epoch: "76.62 (best)"."""
    known, name = PUBLISHED[benchmark.name], method.removeprefix("baseline-")
    if benchmark is CIFAR and not method.startswith(("baseline-", "fcfd", "teacher")):
        return None  # alone, kd, and app have FCFD's settings, and were not published
    figures = dict(zip(known["columns"], known["pairs"][pair], strict=True))
    figures |= {key: of_pair[pair] for key, of_pair in known["more"].items() if pair in of_pair}
    if not (figure := figures.get(name)):
        return None
    values = figure if isinstance(figure, list) else [figure]
    texts = [value if isinstance(value, str) else f"{value:.2f}" for value in values]
    return f"{' / '.join(texts)} ({known['epoch'][name]})"


@cache
def all_of_imagenet(data_dir: str) -> bool:
    """Whether these are as many images as ImageNet's training split. Raises as `list_files`."""
    return len(list_files(data_dir).train) == IMAGENET_IMAGES


def has_default_settings(cell: Cell) -> bool:
    """Whether a run and its teacher's have the default settings of their rows, except for NOT_DEFINING."""
    of_row = ("teacher", "student", "method", "kd_loss", "simkd")
    plain = {key: cell.given[key] for key in of_row if key in cell.given}
    none = cell.folder / "none"  # without a run
    ours, theirs = (Cell(none, given, script=cell.script).settings() for given in (cell.given, plain))
    same = all(ours[key] == theirs[key] for key in ours if key not in NOT_DEFINING)
    return same and (cell.after is None or has_default_settings(cell.after))


def chosen_rows(args: Namespace) -> list[Row]:
    """The rows of --table or --methods; with both, those of the table that --methods names.

    Raises:
        UserError: --methods names another row.
    """
    rows = {row.name: row for row in TABLES[args.table]} if args.table else METHODS
    for name in args.methods or []:
        if name not in rows:
            where = f"--table {args.table}" if args.table else "a comparison on CIFAR-100"
            raise UserError(f"--methods {name}: the rows of {where} are {', '.join(rows)}")
    return [rows[name] for name in args.methods or (rows if args.table else ("alone", "kd", "app", "fcfd"))]


def main(argv: list[str] | None = None) -> int:
    """Complete the runs and write the table. Returns the exit code (see `exit_code`)."""
    cifar_pairs = list(PUBLISHED["cifar100"]["pairs"])

    def more_options(parser: Parser) -> None:
        parser.add_argument("--table", choices=TABLES, help="the methods and the data of this table of the paper")
        names = f"rows of --table, or of {', '.join(METHODS)} (default: alone kd app fcfd)"
        parser.add_argument("--methods", nargs="+", metavar="NAME", help=names)

    def choose(args: Namespace) -> tuple[Benchmark, list[str]]:
        return chosen_rows(args)[0].benchmark, PAIRS.get(args.table, cifar_pairs)

    def script() -> None:
        args, given = tables.parse_args(argv, __doc__, "compare", cifar_pairs, more_options, choose)
        rows = chosen_rows(args)
        benchmark = rows[0].benchmark
        if args.table:
            args.out /= f"table{args.table}"
        # Also those of other tables, which share runs with the same names.
        check_given(given, [row for row in chain(ROWS, *TABLES.values()) if row.benchmark is benchmark])
        cells = grid(args, given, rows)
        published = published_figures(cells)

        def finish(found: list[dict[str, Any]]) -> None:
            text = table(found, published, benchmark)
            if args.table:  # first as in the paper
                lines = [((title(row.name, benchmark),), row) for row in rows]
                text = tables.layout(["method"], lines, args, found) + "\n" + text
            tables.write(args.out, text, found)

        tables.run(args, cells, finish)

    return exit_code(script, tables.AFTER_INTERRUPT)


if __name__ == "__main__":
    sys.exit(main())
