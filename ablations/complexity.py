"""What an FCFD step costs (App. H): time, images/s and peak memory by |S|, beside a step of the student alone.

    python ablations/complexity.py                                       resnet32x4-resnet8x4, every |S|
    python ablations/complexity.py --pairs all --num-paths 2             the ten published pairs

A step is what cifar100.py does with a batch: forward along all paths, the terms, backward, SGD. The unit is one
forward and backward of the student alone, plain eager NCHW float32. Every figure is the median of --repeats steps; the
rows take turns, so that a machine that slows down slows all of them. "plain" is the step in eager NCHW float32; the
form that is used (channels_last where both families gain by it, AMP on CUDA) must not be slower. Where the two are one
and the same, the row is left out. Float32 is PyTorch's, which on CUDA convolves in TF32. Every step draws its paths
anew, and paths differ in cost: a figure is the median over draws, too.

Peak memory is what PyTorch held at most while networks were built and two steps done: on CUDA by the allocator's own
count, on the CPU by the profiler's record of every allocation.
"""

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import cifar100
from ablations.cells import markdown
from common.bridges import build_bridges
from common.checkpoint import write_atomically
from common.data import SIZE
from common.device import open_device
from common.errors import UserError, exit_code
from common.fcfd import fcfd_terms, forward_paths
from common.models import build, check_name
from common.multipath_bn import track_paths
from common.optimizer import sgd
from common.paths import candidate_paths, sample_paths
from common.run_folder import made_with
from common.settings import Parser, check_ranges

CLASSES = 100
KINDS = {"alone": "the unit: the student alone", "fcfd": "FCFD", "plain": "FCFD, plain"}


@dataclass
class Row:
    """One line of the table: a step of a pair, of one of KINDS."""

    pair: str
    kind: str
    num_paths: int | None = None  # |S|
    seconds: float = 0.0  # the median
    megabytes: float = 0.0  # the peak


def student_alone(pair: str, c: Namespace) -> Callable[[], None]:
    """The unit: a function that does one forward and backward of the student in its plainest form."""
    student = build(pair.split("-")[1], CLASSES).to(c.device)
    images, labels = random_batch(c, channels_last=False)

    def step() -> None:
        student.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(student(images), labels).backward()

    return step


def fcfd_steps(pair: str, c: Namespace, plain: bool) -> Callable[[int, int], None]:
    """A function (|S|, i) that does a training step with the i-th draw of |S| paths."""
    teacher, student = (build(name, CLASSES) for name in pair.split("-"))
    bridges = build_bridges(teacher, student, SIZE)
    candidates = candidate_paths(student.num_stages)
    channels_last = uses_channels_last(pair) and not plain
    for net in (teacher, student):
        track_paths(net, {path.k for path in candidates})
    for net in (teacher, student, bridges):
        net.to(c.device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    teacher.requires_grad_(False)
    device, amp = torch.device(c.device), None if plain else cifar100.AMP[c.amp]
    parameters = [*student.parameters(), *bridges.parameters()]
    optimizer = sgd(parameters, 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    images, labels = random_batch(c, channels_last)
    draws = [sample_paths(candidates, n, 1 + c.repeats, seed=0, epoch=0) for n in range(len(candidates) + 1)]

    def step(num_paths: int, i: int) -> None:
        with torch.autocast(device.type, amp, enabled=amp is not None):
            flow = forward_paths(teacher, student, bridges, images, draws[num_paths][i])
        loss = sum(fcfd_terms(flow, labels, temperature=4.0).values())
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def uses_channels_last(pair: str) -> bool:
    """Whether cifar100.py trains the pair in the channels_last memory format."""
    return all(build(name, CLASSES).channels_last for name in pair.split("-"))


def random_batch(c: Namespace, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Images [B, 3, 32, 32] of noise, and labels [B]."""
    images = torch.randn(c.batch_size, 3, SIZE, SIZE, device=c.device)
    labels = torch.randint(CLASSES, (c.batch_size,), device=c.device)
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images, labels


def steps_of(rows: list[Row], c: Namespace) -> Iterator[tuple[Row, Callable[[int], None]]]:
    """For each row, all of one pair, a function that does its i-th step; rows of a kind share their networks."""
    pair, kinds = rows[0].pair, {row.kind for row in rows}
    many = {kind: fcfd_steps(pair, c, plain=kind == "plain") for kind in sorted(kinds - {"alone"})}
    alone = student_alone(pair, c) if "alone" in kinds else None
    for row in rows:
        if row.kind == "alone":
            yield row, lambda i: alone()
        else:
            yield row, lambda i, row=row: many[row.kind](row.num_paths, i)


def measure_memory(row: Row, c: Namespace) -> None:
    """Fill in the row's peak memory."""

    def two_steps() -> None:
        ((_, step),) = steps_of([row], c)
        step(0)
        step(1)

    gc.collect()
    if c.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(c.device)
        two_steps()
        row.megabytes = torch.cuda.max_memory_allocated(c.device) / 2**20
    elif c.device.startswith("cpu"):
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler talks
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            two_steps()
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            profile.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_text())["traceEvents"]
        changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
        row.megabytes = max(accumulate(size for _, size in changes)) / 2**20


def measure_time(rows: list[Row], c: Namespace) -> None:
    """Fill in the seconds of all rows of a pair: in turns, one round to warm up and `repeats` that count."""
    steps, seconds = list(steps_of(rows, c)), {id(row): [] for row in rows}
    wait = torch.cuda.synchronize if c.device.startswith("cuda") else lambda: None
    for i in range(1 + c.repeats):
        for row, step in steps if i % 2 else reversed(steps):
            wait()
            began = time.perf_counter()
            step(i)
            wait()
            seconds[id(row)].append(time.perf_counter() - began)
    for row in rows:
        row.seconds = statistics.median(seconds[id(row)][1:])


def table(rows: list[Row], batch_size: int) -> str:
    """The rows as Markdown, in units, seconds and images/s."""
    units = {row.pair: row.seconds for row in rows if row.kind == "alone"}
    header = ["pair", "step", "paths", "units", "ms", "images/s", "peak memory (MB)"]
    lines = [
        [
            row.pair,
            KINDS[row.kind],
            "" if row.num_paths is None else row.num_paths,
            f"{row.seconds / units[row.pair]:.2f}",
            f"{1000 * row.seconds:.1f}",
            f"{batch_size / row.seconds:.0f}",
            f"{row.megabytes:.0f}" if row.megabytes else "",
        ]
        for row in rows
    ]
    return markdown(header, lines)


def parse_args(argv: list[str] | None) -> Namespace:
    """The options, checked and complete."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pairs", nargs="+", metavar="TEACHER-STUDENT", help="default: resnet32x4-resnet8x4; all: the published ones")
    add("--num-paths", nargs="+", type=int, metavar="N", help="|S| (default: from 0 to the number of candidates)")
    add("--batch-size", type=int, metavar="N", help="default: 64")
    add("--repeats", type=int, metavar="N", help="steps behind each figure (default: 11)")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--amp", choices=cifar100.AMP, help="default: fp16 on CUDA, else off")
    add("--out", metavar="DIR", help="default: results/complexity")
    add("--smoke", action="store_true", help="the whole way with two small networks, in seconds")
    given = parser.given(argv)
    if given.pop("smoke", False):
        small = {"pairs": ["resnet14-resnet8"], "batch_size": 4, "repeats": 2, "num_paths": [0, 2]}
        given = small | {"out": "results/complexity/smoke"} | given
    defaults = {"pairs": ["resnet32x4-resnet8x4"], "num_paths": None, "batch_size": 64, "repeats": 11}
    c = Namespace(**defaults | {"device": None, "amp": None, "out": "results/complexity"} | given)
    c.device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    c.amp = c.amp or ("fp16" if c.device.startswith("cuda") else "off")
    c.pairs = list(cifar100.SETTINGS["pairs"]) if c.pairs == ["all"] else c.pairs
    check_ranges(c)
    if c.repeats < 1:
        raise UserError(f"--repeats {c.repeats}: it must be at least 1")
    for pair in c.pairs:
        if len(pair.split("-")) != 2:
            raise UserError(f"--pairs {pair}: write teacher and student with a hyphen, as resnet32x4-resnet8x4")
        for name in pair.split("-"):
            check_name(name)
    return c


def rows_of(pair: str, c: Namespace) -> list[Row]:
    """The rows of a pair: the unit, every |S|, and one of them in the plain form if that is another.

    Raises:
        UserError: the networks' stages do not correspond, or an |S| is out of range.
    """
    teacher, student = (build(name, CLASSES) for name in pair.split("-"))
    build_bridges(teacher, student, SIZE)
    candidates = candidate_paths(student.num_stages)
    num_paths = c.num_paths or list(range(len(candidates) + 1))
    for n in num_paths:
        sample_paths(candidates, n, steps=1, seed=0, epoch=0)
    rows = [Row(pair, "alone"), *(Row(pair, "fcfd", n) for n in num_paths)]
    if uses_channels_last(pair) or c.amp != "off":
        rows.append(Row(pair, "plain", 2 if 2 in num_paths else num_paths[-1]))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and write the table; the exit code is that of `exit_code`."""

    def script() -> None:
        c = parse_args(argv)
        device, out = open_device(c.device), Path(c.out)
        of_pairs = [rows_of(pair, c) for pair in c.pairs]
        out.mkdir(parents=True, exist_ok=True)
        for rows in of_pairs:
            for row in rows:
                measure_memory(row, c)
            measure_time(rows, c)
            print(table(rows, c.batch_size), flush=True)
        rows = [row for rows in of_pairs for row in rows]
        machine = made_with(device) | {"threads": torch.get_num_threads()}
        note = (
            f"batch {c.batch_size}, amp {c.amp}, medians of {c.repeats}; {machine['device']}, torch {machine['torch']}"
        )
        text = f"{table(rows, c.batch_size)}\n{note}, {machine['threads']} threads\n"
        numbers = {"settings": vars(c), "machine": machine, "rows": [vars(row) for row in rows]}
        write_atomically(out / "table.md", lambda file: file.write(text.encode()))
        write_atomically(out / "rows.json", lambda file: file.write(json.dumps(numbers, indent=1).encode()))
        print(f"written to {out}/table.md and rows.json")

    return exit_code(script, "repeat the command")


if __name__ == "__main__":
    sys.exit(main())
