"""Cost of a training step (Tab. 11, H.1; App. H): time, images/s, peak memory and FLOPs.

    python ablations/complexity.py                                           FCFD on resnet32x4-resnet8x4, every |S|
    python ablations/complexity.py --pairs all --num-paths 2                 the ten published pairs
    python ablations/complexity.py --methods kd dkd app reviewkd crd fcfd    Tab. 11: several methods

The steps are in ablations/steps.py. Costs are relative to one forward and backward of the student alone, in plain NCHW
float32. "plain" is FCFD's step in that form. Each step samples its own paths, so its median is also over paths of
different cost, and its peak memory is the maximum over them. All of them are run once before anything is measured.

FLOPs are of convolutions and linear layers; a multiply-add is two. They follow App. H's formula (ablations/flops.py) in
expectation over S. Those of ReviewKD and CRD are counted in a step, CRD's with the products of the embeddings and the
rows of the banks.

Writes table.md and rows.json to --out. Pairs that rows.json has with the same settings and machine are kept.
"""

import argparse
import json
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ablations import flops
from ablations.cells import markdown
from ablations.measure import Step, median_seconds, peak_memory
from ablations.steps import BASELINES, CLASSES, IMAGES, build_step
from common.bridges import build_bridges
from common.data.batches import SIZE
from common.models import NETWORKS, build
from common.paths import candidate_paths, sample_paths
from common.run.checkpoint import write_atomically
from common.run.device import AMP, default_device, open_device
from common.run.errors import exit_code, user_errors
from common.run.folder import made_with
from common.run.options import PUBLISHED, Parser, set_defaults
from common.run.types import count, count_or_zero, name_in

METHODS = {  # their titles in the table, and the options of their runs
    "kd": ("KD", {"method": "kd"}),
    "dkd": ("DKD", {"method": "kd", "kd_loss": "dkd"}),
    "app": ("KD, L_app", {"method": "app"}),
    "reviewkd": ("ReviewKD", {"method": "reviewkd"}),
    "crd": ("CRD", {"method": "crd"}),
    "fcfd": ("FCFD", {"method": "fcfd"}),
    "plain": ("FCFD, plain", {"method": "fcfd"}),
}
WITH_PATHS = ("fcfd", "plain")
FLOPS = "FLOPs are of convolutions and linear layers; a multiply-add is two."
LEGEND = f"""
Relative time and FLOPs: divided by those of one forward and backward of the student alone, without SGD.
{FLOPS} Paths: |S|.
"""
SMOKE = ["--pairs", "resnet14-resnet8", "--methods", *METHODS, "--num-paths", "0", "2", "--batch-size", "4"]
SMOKE += ["--repeats", "2", "--out", "results/complexity/smoke"]


@dataclass
class Row:
    """A row of a table: a step of a pair."""

    pair: str
    name: str  # "alone", one of METHODS, or that of another table's row
    options: dict[str, Any]  # as in `build_step`
    seconds: float = 0.0  # median
    megabytes: float = 0.0  # peak, MiB; 0 if unknown
    flops: float | None = None  # for the whole batch; None if not counted

    def build(self, args: Namespace) -> Step:
        return build_step(self.pair, self.options, args, plain=self.name == "plain")


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The options, resolved."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pairs", type=pair, nargs="+", metavar="PAIR", help="or all: published (default: resnet32x4-resnet8x4)")
    add("--methods", choices=METHODS, nargs="+", help="besides the student alone (default: fcfd plain)")
    add("--num-paths", type=count_or_zero, nargs="+", metavar="N", help="|S| of FCFD (default: each; with --methods 2)")
    add("--batch-size", type=count, default=64, metavar="N", help="images per step")
    add("--repeats", type=count, default=11, metavar="N", help="timed steps, for the median")
    add("--device", default=default_device(), help="cpu, cuda, cuda:N or mps")
    add("--amp", choices=AMP, help="precision of autocast (default: as in cifar100.py)")
    add("--out", metavar="DIR", help="default: results/complexity, or results/complexity/methods with --methods")
    add("--smoke", action="store_true", help="measure every method on two small networks, in seconds")
    args = parser.parse([*SMOKE, *argv] if "--smoke" in argv else argv)
    if args.methods:
        set_defaults(args, num_paths=[2], out="results/complexity/methods")
    set_defaults(args, pairs=["resnet32x4-resnet8x4"], methods=["fcfd", "plain"], out="results/complexity")
    if "all" in args.pairs:
        args.pairs = list(PUBLISHED["cifar100"]["pairs"])
    if "num_paths" in args.given and not args.smoke and not set(args.methods) & set(WITH_PATHS):
        parser.error("--num-paths is for FCFD: add fcfd to --methods, or omit it")
    if args.batch_size == 1 and "reviewkd" in args.methods:
        parser.error("--batch-size 1: ReviewKD needs at least 2 images for its BatchNorm")
    if args.batch_size > IMAGES and "crd" in args.methods:
        parser.error(f"--batch-size {args.batch_size}: CRD's banks have {IMAGES} images")
    return args


def pair(text: str) -> str:
    """A type for add_argument: TEACHER-STUDENT, or "all"."""
    if text != "all" and text.count("-") != 1:
        raise argparse.ArgumentTypeError(f"{text} is not two networks with a hyphen, such as resnet32x4-resnet8x4")
    return text if text == "all" else "-".join(map(name_in(NETWORKS), text.split("-")))


def rows_of(pair: str, args: Namespace) -> list[Row]:
    """The rows of a pair: student alone, then --methods; FCFD has one for each |S|, its plain form only one.

    Raises:
        ValueError: the networks do not match, or an |S| is out of range.
    """
    with torch.device("meta"):
        teacher, student = (build(name, CLASSES) for name in pair.split("-"))
        build_bridges(teacher, student, SIZE)
    candidates = candidate_paths(student.num_stages)
    sizes = args.num_paths or list(range(len(candidates) + 1))
    for n in sizes:
        sample_paths(candidates, n, steps=1, seed=0, epoch=0)  # raises if n is out of range
    rows = [Row(pair, "alone", {})]
    for method in args.methods:
        options = METHODS[method][1]
        if method == "fcfd":
            rows += [Row(pair, method, options | {"num_paths": n}) for n in sizes]
        elif method != "plain":
            rows.append(Row(pair, method, options))
        else:
            rows.append(Row(pair, method, options | {"num_paths": 2 if 2 in sizes else sizes[-1]}))
    return rows


def measure(rows_by_pair: list[list[Row]], args: Namespace, file: Path, with_flops: bool = False) -> None:
    """Set the numbers of the rows of each pair. Those that `file` has with the same settings and machine are kept.

    `file` is replaced after each pair: {"settings", "machine", "rows": [a Row's values and the commit]}.
    """
    machine = machine_of(torch.device(args.device))
    commit = machine.pop("commit")
    found = {"settings": {key: getattr(args, key) for key in ("batch_size", "amp", "repeats")}, "machine": machine}
    found["rows"] = read_rows(file, found)
    for rows in rows_by_pair:
        pair = rows[0].pair
        if all(keep(row, found["rows"]) for row in rows):
            print(f"{pair}: kept, from {file}", flush=True)
            continue
        print(f"{pair}: measuring {len(rows)} steps", flush=True)
        for row in rows:
            measure_memory(row, args)
        measure_time(rows, args)
        for row in rows if with_flops else []:
            row.flops = flops_of(row, args)
        others = [row for row in found["rows"] if row["pair"] != pair]
        found["rows"] = others + [vars(row) | {"commit": commit} for row in rows]
        write_atomically(file, lambda stream: stream.write(json.dumps(found, indent=1).encode()))


def read_rows(file: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in `file` if it has the settings and the machine of `found`, else []."""
    try:
        stored = json.loads(file.read_text())
        rows = stored["rows"] if all(stored[key] == found[key] for key in ("settings", "machine")) else []
        return rows if all({*vars(Row("", "", {})), "commit"} <= row.keys() for row in rows) else []
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # if damaged, measure again
        return []


def keep(row: Row, stored: list[dict[str, Any]]) -> bool:
    """Copy the stored measurements of the same step to `row`. Returns whether there are any."""
    for values in stored:
        if all(values[key] == getattr(row, key) for key in ("pair", "name", "options")):
            row.seconds, row.megabytes, row.flops = (values[key] for key in ("seconds", "megabytes", "flops"))
            return True
    return False


def measure_memory(row: Row, args: Namespace) -> None:
    row.megabytes = peak_memory(lambda: row.build(args), args.device)


def measure_time(rows: list[Row], args: Namespace) -> None:
    steps = [row.build(args) for row in rows]
    for row, seconds in zip(rows, median_seconds(steps, args.repeats, args.device), strict=True):
        row.seconds = seconds


def flops_of(row: Row, args: Namespace) -> float:
    """FLOPs of a batch, by App. H's formula or, for ReviewKD and CRD, counted in a step."""
    if row.options.get("method") in BASELINES:
        step = row.build(args)
        with flops.counter() as counter:
            step.run(0)
        return counter.get_total_flops()
    return args.batch_size * formula(row.pair, row.options)


def formula(pair: str, options: dict[str, Any]) -> float:
    """FLOPs for one image by App. H's formula: student alone, KD, DKD, KD with L_app, or FCFD with "num_paths"."""
    with torch.device("meta"):
        teacher, student = (build(name, CLASSES) for name in pair.split("-"))
        forward = flops.forward_flops(teacher, student, build_bridges(teacher, student, SIZE), SIZE)
    kd, method = flops.kd_step(forward), options.get("method", "alone")
    if method == "fcfd":
        return kd + flops.fcfd_extra(forward, candidate_paths(student.num_stages), options["num_paths"])
    return {"alone": flops.alone_step(forward), "kd": kd, "app": kd + flops.app_extra(forward)}[method]


def table(rows: list[Row], batch_size: int) -> str:
    """The rows as Markdown."""
    header = ["pair", "step", "paths", "relative time", "ms", "images/s", "peak memory (MiB)", "GFLOPs"]
    header += ["relative FLOPs"]
    students = {row.pair: row for row in rows if row.name == "alone"}
    lines = []
    for row in rows:
        alone = students[row.pair]
        title = METHODS[row.name][0] if row.options else "student alone"
        line = [row.pair, title, row.options.get("num_paths", "")]
        line += [f"{row.seconds / alone.seconds:.2f}", f"{1000 * row.seconds:.1f}", f"{batch_size / row.seconds:.0f}"]
        line += [f"{row.megabytes:.0f}" if row.megabytes else ""]
        line += [f"{row.flops / 1e9:.2f}", f"{row.flops / alone.flops:.2f}"]
        lines.append(line)
    return markdown(header, lines)


def machine_of(device: torch.device) -> dict[str, Any]:
    """What times depend on besides the settings, and the commit."""
    return made_with(device) | {"threads": torch.get_num_threads()}


def conditions(args: Namespace) -> str:
    """What is measured, the settings and the machine, for a table."""
    machine = machine_of(torch.device(args.device))
    return (
        f"A step is forward, backward and SGD; its time is the median of {args.repeats}, its memory the peak.\n"
        f"Batch {args.batch_size}, amp {args.amp}; {machine['device']}, torch {machine['torch']}, "
        f"{machine['threads']} threads.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Measure, write the table, and return the exit code."""

    def script() -> None:
        args = parse_args(argv)
        open_device(args.device)
        with user_errors():
            rows_by_pair = [rows_of(pair, args) for pair in args.pairs]
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        measure(rows_by_pair, args, out / "rows.json", with_flops=True)
        rows = [row for rows in rows_by_pair for row in rows]
        text = f"{table(rows, args.batch_size)}{LEGEND}{conditions(args)}"
        write_atomically(out / "table.md", lambda file: file.write(text.encode()))
        print(f"\n{text}\nsaved to {out}/table.md and rows.json")

    return exit_code(script, "finished pairs are kept; repeat the command to continue")


if __name__ == "__main__":
    sys.exit(main())
