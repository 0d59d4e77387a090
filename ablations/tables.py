"""Tables of trained networks: the options of their scripts, and the files they write.

A script calls `main` with its rows (rows.py). If it has more to do, it calls `parse_args`, `grid` and `run`.
"""

import csv
import io
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import cifar100
from ablations import complexity
from ablations.benchmarks import CIFAR, Benchmark
from ablations.cells import markdown, mean_and_deviation, run_cells, to_argv, with_dependencies
from ablations.rows import Cells, Row, assignment, grid
from common.models import build
from common.run.checkpoint import write_atomically
from common.run.device import check_device, default_device, open_device
from common.run.errors import UserError, exit_code
from common.run.folder import locked
from common.run.options import Parser, option
from common.run.types import count, count_or_zero, number

PUBLISHED = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())
OF_ONE_RUN = ("--teacher", "--student", "--method", "--seed", "--device", "--resume", "--evaluate")
UNNAMED = (
    "dataset",
    "data_dir",
    "subset",
    "epochs",
    "iterations",
    "test_subset",
    "max_minutes",
    "amp",
    "workers",
    "save_every",
    "eval_every",
    "visualize",
)  # see `data_name`
NOT_OF_STEP = (*UNNAMED, "teacher", "student", "teacher_ckpt", "seed", "lr", "batch_size")  # see `measure_steps`
SAME_TEACHER = 0.2  # percentage points: one teacher's accuracy may differ by rounding between devices
AFTER_INTERRUPT = "finished work is kept; rerun the command to continue"
NOTE = """
{metrics} on the test set in percent, last / best {unit}: mean ± sample standard deviation over n seeds;
n = {n}{unless}. The best {unit} is chosen on the test set.
"""
NOTE_PATHS = """The paper's figures are those of the best epoch. Paths are sampled from those that the row's terms
read: if a row omits a direction or a stage, the others are sampled more often.
"""


def parse_args(
    argv: list[str] | None,
    description: str,
    table: str,
    pairs: list[str],
    more_options: Callable[[Parser], None] = lambda parser: None,
    choose: Callable[[Namespace], tuple[Benchmark, list[str]]] | None = None,
) -> tuple[Namespace, dict[str, Any]]:
    """The options of a table's script, and by name those of the benchmark's script (cifar100.py) that were given.

    The latter always include the data, the length of a run, and "amp". The default precision is that of the first of
    --devices, for all runs.

    Args:
        description: the script's docstring.
        table: name of the folder of its results.
        pairs: the default of --pairs.
        more_options: adds the script's own options to the parser.
        choose: the benchmark and the default of --pairs, if they depend on the options.
    """
    parser = Parser(description)
    parser.epilog = "All other options are those of the training script: --data-dir, --subset, --epochs, --lr, ..."
    add = parser.add_argument
    add("--pairs", nargs="+", metavar="TEACHER-STUDENT", help=f"default: {' '.join(pairs)}")
    add("--seeds", type=count_or_zero, nargs="+", metavar="SEED", default=[1], help="teachers have the first one")
    add("--teachers", metavar="DIR", help="CIFAR-100: with DIR/NAME_vanilla/ckpt_epoch_240.pth (default: train them)")
    add("--teacher-ckpt", nargs="+", metavar="NAME=FILE", help="a trained teacher; overrides --teachers")
    add("--teacher-epochs", type=count, metavar="N", help="of the teachers (default: --epochs, or --iterations)")
    add("--jobs", type=number(int, 1, 1000), metavar="N", default=1, help="runs at a time on each device")
    add("--devices", nargs="+", metavar="DEVICE", help="default: the one that the training script chooses")
    add("--out", metavar="DIR", help=f"default: results/{table}/<dataset>-<length>-<precision>")
    add("--runs", metavar="DIR", help="default: --out if given, else results/runs/<dataset>-<length>-<precision>")
    add("--smoke", action="store_true", help="end-to-end check with small networks and data, in about a minute")
    more_options(parser)
    args, words = parser.parse_known_args(argv)
    for name in ("out", "runs", "teachers"):
        if getattr(args, name) == "":
            parser.error(f"--{name} is empty")
    benchmark, pairs = choose(args) if choose else (CIFAR, pairs)
    if args.teachers and benchmark is not CIFAR:
        parser.error("--teachers holds networks for CIFAR-100: use --teacher-ckpt")
    if args.smoke and args.pairs:
        parser.error("--smoke has its own pair: omit --pairs")
    args.pairs, args.devices = list(dict.fromkeys(args.pairs or pairs)), args.devices or []
    for device in args.devices:
        check_device(device)
    smoke = "smoke" if benchmark is CIFAR else f"smoke-{benchmark.name}"
    smoke_data = Path(args.runs or args.out or f"results/runs/{smoke}") / f"{benchmark.name}-data"
    if args.smoke:
        args.pairs, args.jobs = [benchmark.smoke_pair], max(2, args.jobs)
        words = [*benchmark.smoke, *([] if benchmark is CIFAR else [f"--data-dir={smoke_data}"]), *words]

    names = {word.split("=")[0] for word in words}
    for name in OF_ONE_RUN:
        if name in names:
            parser.error(f"{name} is for a single run: use --pairs, --seeds or --devices")
    device = [f"--device={args.devices[0]}"] if args.devices else []
    options = vars(benchmark.script.parse_args([*benchmark.any_run, *device, *words]))
    names |= {"--dataset", "--data-dir", f"--{benchmark.unit}s", "--amp"}
    given = {key: value for key, value in options.items() if option(key) in names}

    data = smoke if args.smoke else data_name(given)
    args.runs = Path(args.runs or args.out or f"results/runs/{data}")
    args.out = Path(args.out or f"results/{table}/{data}")
    if args.smoke and given["data_dir"] == str(smoke_data) and not smoke_data.exists():
        partial = smoke_data.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        benchmark.write_smoke_data(partial)
        partial.rename(smoke_data)
    return args, given


def data_name(given: dict[str, Any]) -> str:
    """The name of a folder for runs with these options of their script: "tiny-subset50-30ep-bf16-lr=0.1"."""
    dataset = given.get("dataset", "folder")
    name = Path(given["data_dir"]).resolve().name if dataset == "folder" else dataset
    subset = [f"subset{given['subset']}"] if "subset" in given else []
    length = f"{given['iterations']}it" if "iterations" in given else f"{given['epochs']}ep"
    others = [assignment(key, value) for key, value in given.items() if key not in UNNAMED]
    return "-".join([name, *subset, length, given["amp"], *others])


@dataclass
class Costs:
    """What a step of each row costs.

    Attributes:
        steps: by pair and name of the row.
        settings: the options of complexity.py.
    """

    steps: dict[tuple[str, str], complexity.Row]
    settings: Namespace

    def cells(self, pair: str, name: str) -> list[str]:
        """The time in ms and the peak memory in MiB, as in a table."""
        step = self.steps[pair, name]
        return [f"{1000 * step.seconds:.1f}", f"{step.megabytes:.0f}" if step.megabytes else ""]


def add_repeats(parser: Parser) -> None:
    """The option of a table with costs; see `parse_args`."""
    parser.add_argument("--repeats", type=count, metavar="N", help="timed steps, for the median (default: 11)")


def cost_settings(args: Namespace, given: dict[str, Any]) -> Namespace:
    """The options of complexity.py that measure the steps of these runs."""
    options = {"pairs": args.pairs, "batch_size": given.get("batch_size", cifar100.SETTINGS["batch_size"])}
    options |= {"amp": given.get("amp"), "repeats": args.repeats or (2 if args.smoke else None)}
    options |= {"device": args.devices[0] if args.devices else None}
    return complexity.parse_args(to_argv({key: value for key, value in options.items() if value is not None}))


def measure_steps(args: Namespace, given: dict[str, Any], cells: Cells) -> Costs:
    """Measure a step of each row, on the first of --devices, or read it from cost.json in --out.

    It is measured again if the machine, `cost_settings`, or an option of the run outside NOT_OF_STEP differs.

    Raises:
        UserError: as `with_dependencies`; raised before anything is measured.
    """
    settings, steps = cost_settings(args, given), {}
    for (pair, name, _), cell in cells.items():
        options = {key: value for key, value in cell.given.items() if key not in NOT_OF_STEP}
        steps[pair, name] = complexity.Row(pair, name, options)
    with_dependencies(cells.values())
    for folder in (args.out, args.runs):
        folder.mkdir(parents=True, exist_ok=True)
    open_device(settings.device)
    with locked(args.runs):  # concurrent runs would slow down the steps
        by_pair = [[step for step in steps.values() if step.pair == pair] for pair in args.pairs]
        complexity.measure(by_pair, settings, args.out / "cost.json")
    return Costs(steps, settings)


def run(args: Namespace, cells: Cells, finish: Callable[[list[dict]], None]) -> None:
    """Complete the runs. Then, even if some failed, call `finish` with the `numbers` of the finished ones.

    Raises:
        UserError: as `with_dependencies`, `numbers`, `load_teachers` and `run_cells`.
        OSError: a folder cannot be created or written to.
    """
    runs = with_dependencies(cells.values())
    numbers(cells)  # raises before anything is trained
    load_teachers(args, cells)
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


def load_teachers(args: Namespace, cells: Cells) -> None:
    """Load the teachers of unfinished runs that are given or downloaded, and print the accuracies of those tested.

    Raises:
        UserError: as `Benchmark.load_teacher`.
    """
    teachers, device = {}, (args.devices or [default_device()])[0]
    for cell in cells.values():
        if cell.after or cell.result():
            continue
        settings = cell.settings()
        if settings.get("teacher") and "teacher_ckpt" in settings:  # online, the teacher is trained too
            teachers[settings["teacher"], settings["teacher_ckpt"]] = (cell.benchmark, settings)
    published = {pair.partition("-")[0]: figures[0] for pair, figures in PUBLISHED["cifar100"]["pairs"].items()}
    for (network, file), (benchmark, settings) in teachers.items():
        accuracy = benchmark.load_teacher(network, file, settings, device)
        if accuracy is not None:
            known = f" (published on CIFAR-100: {published[network]:.2f})" if network in published else ""
            print(f"teacher {network}: {accuracy:.2f} % top-1{known}, {file}", flush=True)


def numbers(cells: Cells) -> list[dict[str, Any]]:
    """The rows of cells.csv, one per finished run.

    "last" and "best" are the first of the benchmark's metrics, "last_top5" and "best_top5" another one. "teacher" is
    the accuracy of a teacher that was trained before; "teacher_last" and "teacher_best" are those of a teacher that was
    trained in the same run.

    Raises:
        UserError: the accuracies of the teachers of a pair differ, so they are not the same network.
    """
    rows, teachers = [], {}
    for (pair, name, seed), cell in cells.items():
        if not (result := cell.result()):
            continue
        (metric, *more), unit, column = cell.benchmark.metrics, cell.benchmark.unit, cell.benchmark.column
        accuracies = ("last", "best", "teacher", "teacher_last", "teacher_best")
        accuracies = {key: result.get(key) or {} for key in accuracies}
        first = {key: accuracy.get(metric, "") for key, accuracy in accuracies.items()}
        others = {column(key, name): accuracy.get(name, "") for name in more for key, accuracy in accuracies.items()}
        if result["teacher"]:
            folder, other = teachers.setdefault(pair, (cell.folder, first["teacher"]))
            if abs(other - first["teacher"]) > SAME_TEACHER:
                raise UserError(
                    f"the students in {folder} and {cell.folder} had different teachers, of {other:.2f} and "
                    f"{first['teacher']:.2f} %: remove one of the runs, or choose another --runs"
                )
        row = {"pair": pair, "method": name, "seed": seed, f"{unit}s": result[f"{unit}s"]}
        row |= {"last": first.pop("last"), "best": first.pop("best"), f"best_{unit}": result["best"][unit]}
        row |= first | others
        rows.append(row | {key: result.get(key, "") for key in ("seconds", "commit", "torch", "device")})
    return rows


def last_and_best(found: list[dict[str, Any]], columns: tuple[str, str] = ("last", "best")) -> str:
    """Two columns of `numbers` as in a table: "76.31 ± 0.20 / 76.62 ± 0.21"."""
    return " / ".join(mean_and_deviation([run[column] for run in found]) for column in columns) if found else ""


def layout(
    header: list[str],
    rows: list[tuple[tuple[str, ...], Row]],
    args: Namespace,
    found: list[dict[str, Any]],
    costs: Costs | None = None,
) -> str:
    """The Markdown table with a line for each row and a column for each pair and metric, as in the paper, and a note.

    Args:
        header: of the first columns.
        rows: the texts in the first columns, and the row.
        found: from `numbers`.
        costs: adds two columns for each pair.
    """
    benchmark = rows[0][1].benchmark
    n, lines, titles, (metric, *more) = len(set(args.seeds)), [], [], benchmark.metrics
    for texts, row in rows:
        line = list(texts)
        for pair in args.pairs:
            runs = [run for run in found if (run["pair"], run["method"]) == (pair, row.name)]
            few = "" if len(runs) in (0, n) else f" (n = {len(runs)})"
            for name in benchmark.metrics:
                columns = (benchmark.column("last", name), benchmark.column("best", name))
                line.append(last_and_best(runs, columns) + few)
            line += costs.cells(pair, row.name) if costs else []
        lines.append(line)
    for pair in args.pairs:
        teacher = [run["teacher"] for run in found if run["pair"] == pair and run["teacher"] != ""]
        title = f"{pair} (teacher {min(teacher):.2f})" if teacher else pair
        titles += [f"{title}, {benchmark.metrics[metric]}" if more else title]
        titles += [f"{pair}, {benchmark.metrics[name]}" for name in more]
        titles += ["ms", "peak memory (MiB)"] if costs else []
    unless = "" if len(found) == n * len(rows) * len(args.pairs) else ", as far as runs are finished"
    metrics = ", ".join(benchmark.metrics.values())
    note = NOTE.format(metrics=metrics[0].upper() + metrics[1:], unit=benchmark.unit, n=n, unless=unless)
    note += complexity.conditions(costs.settings) if costs else ""
    return markdown([*header, *titles], lines) + note


def write(out: Path, text: str, found: list[dict[str, Any]]) -> None:
    """Print a table, and write it to table.md and its numbers to cells.csv."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, found[0])
    writer.writeheader()
    writer.writerows(found)
    write_atomically(out / "cells.csv", lambda file: file.write(lines.getvalue().encode()))
    write_atomically(out / "table.md", lambda file: file.write(text.encode()))
    print(f"\n{text}\nwritten to {out}/table.md, the numbers to cells.csv")


def main(
    argv: list[str] | None,
    description: str,
    table: str,
    header: list[str],
    rows: list[tuple[tuple[str, ...], Row]],
    pairs: list[str],
    num_stages: int | None = None,
    with_costs: bool = False,
) -> int:
    """Train and write a table; arguments as in `parse_args` and `layout`. Returns the exit code (see `exit_code`).

    --smoke trains the first row and the last four.

    Args:
        num_stages: refuse networks with another number of stages, for which titles of rows would be wrong.
        with_costs: first measure a step of each row.
    """

    def script() -> None:
        more_options = add_repeats if with_costs else lambda parser: None
        args, given = parse_args(argv, description, table, pairs, more_options)
        shown = [rows[0], *rows[-4:]] if args.smoke else rows
        cells = grid(args, given, [row for _, row in shown])
        for pair in args.pairs if num_stages else []:
            with torch.device("meta"):
                n = build(pair.split("-")[1], num_classes=2).num_stages
            if n != num_stages:
                raise UserError(f"--pairs {pair}: networks of {n} stages, but the rows are for {num_stages}")
        costs = measure_steps(args, given, cells) if with_costs else None
        run(args, cells, lambda found: write(args.out, layout(header, shown, args, found, costs) + NOTE_PATHS, found))

    return exit_code(script, AFTER_INTERRUPT)
