"""What a step costs (Tab. 11, H.1; App. H): time, images/s, peak memory and FLOPs, beside those of the student alone.

    python ablations/complexity.py                                       FCFD on resnet32x4-resnet8x4, every |S|
    python ablations/complexity.py --pairs all --num-paths 2             the ten published pairs
    python ablations/complexity.py --methods kd dkd reviewkd crd fcfd    Tab. 11: the methods side by side

A step is what cifar100.py, for ReviewKD and CRD baselines.py, does with a batch: forward along all paths, the terms,
backward, SGD. The unit is one forward and backward of the student alone, plain eager NCHW float32. Every figure is the
median of --repeats steps; the rows take turns, so that a machine that slows down slows all of them. "plain" is the step
in eager NCHW float32, to be held against the form that is used (channels_last where both families gain by it, AMP on
CUDA). Where the two are one and the same, the row is left out. Float32 is PyTorch's, which on CUDA convolves in TF32.
Every step draws its paths anew, and paths differ in cost: a figure is the median over draws, too.

Peak memory is what PyTorch held at most while networks were built and two steps done: on CUDA by the allocator's own
count, on the CPU by the profiler's record of every allocation. CRD's banks are those of CIFAR-100's 50,000 images.

FLOPs are of convolutions and linear layers, a multiply-add is two. They are those of App. H's formula
(ablations/flops.py), expected over the draws of S; those of ReviewKD and CRD are counted while a step is done, CRD's
with the products of each embedding with the whole bank, which is how it is done here.

A pair that rows.json in --out has from the same settings and machine is kept.
"""

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import cifar100
from ablations import flops, train_baseline
from ablations.cells import markdown
from common.bridges import build_bridges
from common.data.batches import SIZE
from common.fcfd import fcfd_terms, forward_paths
from common.losses import dkd, kl
from common.models import build, check_name
from common.multipath_bn import track_paths
from common.paths import candidate_paths, sample_paths
from common.run.checkpoint import write_atomically
from common.run.device import open_device
from common.run.errors import UserError, exit_code
from common.run.folder import made_with
from common.run.optimizer import sgd
from common.run.options import Parser, check_ranges

CLASSES = 100
IMAGES = 50_000  # of CIFAR-100, for CRD's banks
KINDS = {
    "alone": "the unit: the student alone",
    "kd": "KD",
    "dkd": "DKD",
    "app": "KD, L_app",
    "reviewkd": "ReviewKD",
    "crd": "CRD",
    "fcfd": "FCFD",
    "plain": "FCFD, plain",
}
LEGEND = """
A step is forward, backward and SGD; its time is the median. Units are those of one forward and backward of the student
alone, without SGD, by time and by FLOPs (of convolutions and linear layers, a multiply-add is two). Paths: |S|.
"""
OF_PATHS = ("fcfd", "plain")  # there is a row for each |S|
Step = Callable[[int], None]  # does the i-th step, i = 0, 1, ..., --repeats


@dataclass
class Row:
    """One line of the table: a step of a pair, of one of KINDS."""

    pair: str
    kind: str
    num_paths: int | None = None  # |S|
    seconds: float = 0.0  # the median
    megabytes: float = 0.0  # the peak
    flops: float = 0.0  # of the whole batch


def student_alone(row: Row, c: Namespace) -> Step:
    """The unit: one forward and backward of the student in its plainest form."""
    student = build(row.pair.split("-")[1], CLASSES).to(c.device)
    images, labels = random_batch(c, channels_last=False)

    def step(i: int) -> None:
        student.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(student(images), labels).backward()

    return step


def distillation(row: Row, c: Namespace, method: str = "fcfd", kd_loss: Callable = kl, plain: bool = False) -> Step:
    """A step of cifar100.py by one of its methods; `kd_loss` is kl or dkd."""
    teacher, student = row.pair.split("-")
    given = {"teacher": teacher, "student": student, "method": method, "num_paths": row.num_paths}
    student, teacher, bridges, candidates = cifar100.build_networks(cifar100.settle(given, {}), CLASSES)
    terms = cifar100.METHODS[method]
    for net in (teacher, student):
        track_paths(net, {path.k for path in candidates})
    images, labels = random_batch(c, channels_last=uses_channels_last(row.pair) and not plain)
    if kd_loss is dkd:
        kd_loss = partial(dkd, labels=labels)
    draws = sample_paths(candidates, row.num_paths or 0, 1 + c.repeats, seed=0, epoch=0)

    def loss(i: int) -> Tensor:
        flow = forward_paths(teacher, student, bridges, images, draws[i], app="app" in terms)
        return sum(fcfd_terms(flow, labels, temperature=4.0, terms=terms, kd_loss=kd_loss).values())

    return with_sgd(loss, [net for net in (teacher, student, bridges) if net is not None], row, c, plain, nesterov=True)


def baseline(row: Row, c: Namespace) -> Step:
    """A step of baselines.py by the method `row.kind`."""
    teacher, student = row.pair.split("-")
    own = Namespace(teacher=teacher, student=student, method=row.kind, seed=1)
    student, teacher = train_baseline.build_networks(own, CLASSES)
    method = train_baseline.build_method(row.kind, teacher, student, torch.randint(CLASSES, (IMAGES,)), SIZE)
    teacher.eval()
    images, labels = random_batch(c, channels_last=uses_channels_last(row.pair))
    index, generator = torch.arange(c.batch_size, device=c.device), torch.Generator(c.device)

    def loss(i: int) -> Tensor:
        return sum(train_baseline.terms(method, teacher, student, images, labels, index, generator)[0].values())

    return with_sgd(loss, [teacher, student, method], row, c)


STEPS: dict[str, Callable[[Row, Namespace], Step]] = {
    "alone": student_alone,
    "kd": partial(distillation, method="kd"),
    "dkd": partial(distillation, method="kd", kd_loss=dkd),
    "app": partial(distillation, method="app"),
    "reviewkd": baseline,
    "crd": baseline,
    "fcfd": distillation,
    "plain": partial(distillation, plain=True),
}


def with_sgd(
    loss: Callable[[int], Tensor], nets: list[nn.Module], row: Row, c: Namespace, plain: bool = False, **options
) -> Step:
    """A training step on `loss`, with `nets` brought to the device and the form that is used; `options` are SGD's."""
    device, amp = torch.device(c.device), None if plain else cifar100.AMP[c.amp]
    channels_last = uses_channels_last(row.pair) and not plain
    for net in nets:
        net.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    parameters = [p for net in nets for p in net.parameters() if p.requires_grad]
    optimizer = sgd(parameters, 0.01, momentum=0.9, weight_decay=5e-4, fused=device.type == "cuda", **options)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    def step(i: int) -> None:
        with torch.autocast(device.type, amp, enabled=amp is not None):
            value = loss(i)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(value).backward()
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


def measure_memory(row: Row, c: Namespace) -> None:
    """Fill in the row's peak memory."""

    def two_steps() -> None:
        step = STEPS[row.kind](row, c)
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
    steps, seconds = [(row, STEPS[row.kind](row, c)) for row in rows], {id(row): [] for row in rows}
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


def count_flops(rows: list[Row], c: Namespace) -> None:
    """Fill in the FLOPs of all rows of a pair, by the formula where there is one."""
    with torch.device("meta"):
        teacher, student = (build(name, CLASSES) for name in rows[0].pair.split("-"))
        forward = flops.forward_flops(teacher, student, build_bridges(teacher, student, SIZE), SIZE)
    candidates = candidate_paths(student.num_stages)
    for row in rows:
        if row.kind in OF_PATHS:
            of_image = flops.kd_step(forward) + flops.fcfd_extra(forward, candidates, row.num_paths)
        elif row.kind == "app":
            of_image = flops.kd_step(forward) + flops.app_extra(forward)
        elif row.kind in ("kd", "dkd"):
            of_image = flops.kd_step(forward)
        elif row.kind == "alone":
            of_image = flops.alone_step(forward)
        else:
            step = STEPS[row.kind](row, c)
            with flops.counter() as counter:
                step(0)
            of_image = counter.get_total_flops() / c.batch_size
        row.flops = c.batch_size * of_image


def table(rows: list[Row], batch_size: int) -> str:
    """The rows as Markdown, in units, seconds and images/s."""
    units = {row.pair: row for row in rows if row.kind == "alone"}
    header = ["pair", "step", "paths", "units", "ms", "images/s", "peak memory (MiB)", "GFLOPs", "units by FLOPs"]
    lines = [
        [
            row.pair,
            KINDS[row.kind],
            "" if row.num_paths is None else row.num_paths,
            f"{row.seconds / units[row.pair].seconds:.2f}",
            f"{1000 * row.seconds:.1f}",
            f"{batch_size / row.seconds:.0f}",
            f"{row.megabytes:.0f}" if row.megabytes else "",
            f"{row.flops / 1e9:.2f}",
            f"{row.flops / units[row.pair].flops:.2f}",
        ]
        for row in rows
    ]
    return markdown(header, lines)


def machine_of(device: torch.device) -> dict[str, Any]:
    """What figures of time depend on beside the settings; and the commit."""
    return made_with(device) | {"threads": torch.get_num_threads()}


def conditions(c: Namespace, machine: dict[str, Any]) -> str:
    """The same in words, with the settings."""
    return (
        f"batch {c.batch_size}, amp {c.amp}, medians of {c.repeats}; "
        f"{machine['device']}, torch {machine['torch']}, {machine['threads']} threads"
    )


def parse_args(argv: list[str] | None) -> Namespace:
    """The options, checked and complete."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pairs", nargs="+", metavar="TEACHER-STUDENT", help="default: resnet32x4-resnet8x4; all: the published ones")
    methods = [kind for kind in KINDS if kind != "alone"]
    add("--methods", nargs="+", choices=methods, help="beside the unit (default: fcfd plain)")
    add("--num-paths", nargs="+", type=int, metavar="N", help="|S| of FCFD (default: with --methods 2, else each)")
    add("--batch-size", type=int, metavar="N", help="default: 64")
    add("--repeats", type=int, metavar="N", help="steps behind each figure (default: 11)")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--amp", choices=cifar100.AMP, help="default: fp16 on CUDA, else off")
    add("--out", metavar="DIR", help="default: results/complexity, with --methods results/complexity/methods")
    add("--smoke", action="store_true", help="the whole way with two small networks, in seconds")
    given = parser.given(argv)
    if given.pop("smoke", False):
        small = {"pairs": ["resnet14-resnet8"], "methods": methods, "num_paths": [0, 2], "batch_size": 4, "repeats": 2}
        given = small | {"out": "results/complexity/smoke"} | given
    defaults = {"pairs": ["resnet32x4-resnet8x4"], "num_paths": None, "batch_size": 64, "repeats": 11}
    if "methods" in given:
        defaults |= {"num_paths": [2], "out": "results/complexity/methods"}
    else:
        defaults |= {"methods": ["fcfd", "plain"], "out": "results/complexity"}
    c = Namespace(**defaults | {"device": None, "amp": None} | given)
    c.device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    c.amp = c.amp or ("fp16" if c.device.startswith("cuda") else "off")
    c.pairs = list(cifar100.SETTINGS["pairs"]) if c.pairs == ["all"] else c.pairs
    check_ranges(c)
    if c.repeats < 1:
        raise UserError(f"--repeats {c.repeats}: it must be at least 1")
    if "num_paths" in given and not set(c.methods) & set(OF_PATHS):
        raise UserError("--num-paths is of FCFD: add fcfd to --methods, or leave it out")
    if c.batch_size == 1 and "reviewkd" in c.methods:
        raise UserError("--batch-size 1: ReviewKD cannot normalise it, it must be at least 2")
    if c.batch_size > IMAGES and "crd" in c.methods:
        raise UserError(f"--batch-size {c.batch_size}: CRD knows {IMAGES} images, it must be at most that")
    for pair in c.pairs:
        if len(pair.split("-")) != 2:
            raise UserError(f"--pairs {pair}: write teacher and student with a hyphen, as resnet32x4-resnet8x4")
        for name in pair.split("-"):
            check_name(name)
    return c


def rows_of(pair: str, c: Namespace) -> list[Row]:
    """The rows of a pair: the unit, the methods, FCFD with every |S|, its plain form with one if that is another form.

    Raises:
        UserError: the networks' stages do not correspond, or an |S| is out of range.
    """
    teacher, student = (build(name, CLASSES) for name in pair.split("-"))
    build_bridges(teacher, student, SIZE)
    candidates = candidate_paths(student.num_stages)
    num_paths = c.num_paths or list(range(len(candidates) + 1))
    for n in num_paths:
        sample_paths(candidates, n, steps=1, seed=0, epoch=0)
    rows = [Row(pair, "alone")]
    for kind in c.methods:
        if kind == "fcfd":
            rows += [Row(pair, kind, n) for n in num_paths]
        elif kind != "plain":
            rows.append(Row(pair, kind))
        elif uses_channels_last(pair) or c.amp != "off":
            rows.append(Row(pair, kind, 2 if 2 in num_paths else num_paths[-1]))
    return rows


def measured(of_pairs: list[list[Row]], c: Namespace, file: Path) -> dict[str, Any]:
    """What the rows of some pairs cost: {"settings", "machine", "rows"}, where a row is a Row's and the commit.

    Pairs that `file` has with these rows, from the same settings and machine, are kept; all others are measured and
    written to it.
    """
    machine = machine_of(torch.device(c.device))
    commit = machine.pop("commit")
    found = {"settings": {key: getattr(c, key) for key in ("batch_size", "amp", "repeats")}, "machine": machine}
    found["rows"] = read_rows(file, found)
    for rows in of_pairs:
        pair = rows[0].pair
        known = {(row["kind"], row["num_paths"]) for row in found["rows"] if row["pair"] == pair}
        if {(row.kind, row.num_paths) for row in rows} <= known:
            print(f"{pair}: kept, from {file}", flush=True)
            continue
        print(f"{pair}: measuring {len(rows)} steps", flush=True)
        for row in rows:
            measure_memory(row, c)
        measure_time(rows, c)
        count_flops(rows, c)
        others = [row for row in found["rows"] if row["pair"] != pair]
        found["rows"] = others + [vars(row) | {"commit": commit} for row in rows]
        write_atomically(file, lambda stream: stream.write(json.dumps(found, indent=1).encode()))
    return found


def read_rows(file: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file of `measured` from the same settings and machine as in `found`, none where there are none."""
    try:
        stored = json.loads(file.read_text())
        rows = stored["rows"] if all(stored[key] == found[key] for key in ("settings", "machine")) else []
        return rows if all({*vars(Row("", "")), "commit"} <= row.keys() for row in rows) else []
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # a damaged one is measured again
        return []


def main(argv: list[str] | None = None) -> int:
    """Measure and write the table; the exit code is that of `exit_code`."""

    def script() -> None:
        c = parse_args(argv)
        open_device(c.device)
        out, of_pairs = Path(c.out), [rows_of(pair, c) for pair in c.pairs]
        out.mkdir(parents=True, exist_ok=True)
        found = measured(of_pairs, c, out / "rows.json")
        known = {(row["pair"], row["kind"], row["num_paths"]): row for row in found["rows"]}
        rows = [known[row.pair, row.kind, row.num_paths] for rows in of_pairs for row in rows]
        rows = [Row(**{key: row[key] for key in vars(Row("", ""))}) for row in rows]
        text = f"{table(rows, c.batch_size)}{LEGEND}{conditions(c, found['machine'])}\n"
        write_atomically(out / "table.md", lambda file: file.write(text.encode()))
        print(f"\n{text}\nwritten to {out}/table.md and rows.json")

    return exit_code(script, "pairs that were finished are kept, repeat the command to go on")


if __name__ == "__main__":
    sys.exit(main())
