"""FCFD for object detection (App. D, E; Tab. 3, 7): Faster R-CNN with FPN on COCO, or on any set in its format.

    python detection.py --data-dir COCO --student resnet101                              train a detector alone
    python detection.py --data-dir COCO --teacher resnet101 --student resnet18           distil it
    python detection.py --data-dir COCO --teacher resnet101 --student resnet50 --inherit
    python detection.py --data-dir COCO --student resnet18 --evaluate FILE               test a checkpoint
    torchrun --nproc_per_node=8 detection.py ...                                         on eight GPUs

COCO holds train2017/, val2017/ and annotations/. The detectors are torchvision's; the method itself is in
common/detection/fcfd.py. Here, from top to bottom: the settings, the detectors, one step, the training loop, and what a
call of the script does with them. With several processes (ranks) each reads its share of every batch,
DistributedDataParallel averages the gradients, and rank 0 alone writes.
"""

import math
import os
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from tqdm import tqdm

from common.bridges import Bridges
from common.detection.boxes import draw_found
from common.detection.coco import CocoData, load_coco
from common.detection.detectors import (
    DETECTORS,
    build_detector,
    inherit,
    load_backbone,
    load_coco_v1,
    load_detector,
    trained_size,
)
from common.detection.evaluation import evaluate, require_pycocotools
from common.detection.fcfd import TERMS, detection_terms, forward_detectors, level_bridges
from common.detection.images import BoxedImages, batches, load
from common.detection.records import add_row, in_words, print_row, publish, report
from common.models import check_name
from common.randomness import seed_of
from common.run import folder as run_folder
from common.run.checkpoint import save
from common.run.device import AMP, num_cores, open_device
from common.run.distributed import (
    all_reduce_mean,
    broadcast,
    broadcast_buffers,
    distribute,
    process_group,
    rank,
    world_size,
)
from common.run.earlier_runs import find_network
from common.run.errors import LossNotFiniteError, OtherNetworkError, UserError, exit_code
from common.run.optimizer import decay_all_but_norms, sgd
from common.run.options import ALL_SETTINGS, Parser, check_ranges, fill

SETTINGS = ALL_SETTINGS["detection"]
METHODS = {"kd": ("task", "kd"), "app": ("task", "kd", "app"), "fcfd": TERMS}  # the terms that each one weighs
DISTILLATION = ("method", "teacher_ckpt", "inherit", "temperature", *(f"w_{term}" for term in TERMS))
INTERRUPTED = "what was saved is kept, go on with --resume (without it if nothing was)"


# --------------------------------------------------------------------------------------------------- settings


def parse_args(argv: list[str] | None) -> dict:
    """The options that were given, and no others."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data-dir", metavar="DIR", help="a set in COCO's format (default: data/coco)")
    add("--teacher", metavar="NAME", help="without it --student is trained alone")
    add("--student", metavar="NAME", required=True, help=", ".join(DETECTORS))
    add("--method", choices=METHODS, help="fcfd (default), kd: L_task + L_kd, app: adds L_app")
    add("--teacher-ckpt", metavar="FILE", help="default: an earlier run's, else torchvision's for resnet50")
    add("--backbone-ckpt", metavar="FILE", help="classifier that the student's backbone is of (default: torchvision's)")
    add("--inherit", action="store_true", help="start with the teacher's FPN, RPN and ROI head")
    add("--scratch", action="store_true", help="random weights, ordinary BatchNorm, nothing frozen")
    for term in TERMS:
        add(f"--w-{term.replace('_', '-')}", type=float, metavar="W", help=f"weight of {term}; 0 leaves it out")
    add("--temperature", type=float, metavar="T", help="of every KL (default: 1)")
    add("--subset", type=int, metavar="N", help="train on N images, spread evenly over the set")
    add("--test-subset", type=int, metavar="N", help="test on N images, spread evenly over the set")
    add("--min-size", type=int, nargs="+", metavar="N", help="pixels of shorter sides; the largest serves the test")
    add("--rois", type=int, metavar="N", help="proposals an image that ROI heads are trained on (default: 512)")
    add("--workers", type=int, metavar="N", help="processes that read images, for each rank (default: its cores)")
    add("--iterations", type=int, metavar="N", help="default: 180000; the schedule scales with it")
    add("--batch-size", type=int, metavar="N", help="of all ranks together (default: 8)")
    add("--lr", type=float, help="default: 0.01")
    add("--save-every", type=int, metavar="N", help="iterations (default: 1000)")
    add("--eval-every", type=int, metavar="N", help="iterations (default: 5000); the last one always")
    parser.add_run_options(unit="iteration")
    add("--evaluate", metavar="CKPT", help="only test this checkpoint of --student")
    add("--visualize", type=int, metavar="N", help="draw what is found in N test images, into boxes/")
    return parser.given(argv)


def settle(given: dict, stored: dict) -> Namespace:
    """All settings of a run: as given, else as stored by the run that is resumed, else the paper's.

    Raises:
        UserError: one is out of range, or contradicts the others.
    """
    c = Namespace(**{**SETTINGS["defaults"], **stored, **given})
    for name in filter(None, (c.student, c.teacher)):
        check_name(name, DETECTORS)
    if c.scratch and c.backbone_ckpt:
        raise UserError("--scratch starts from random weights: leave out either it or --backbone-ckpt")
    if c.teacher:
        fill(c, {key: SETTINGS["defaults"][key] for key in ("method", "temperature")})
    else:
        if misplaced := [key for key in DISTILLATION if key in given]:
            raise UserError(f"--{misplaced[0].replace('_', '-')} is about distillation: name the --teacher too")
        c.method, c.temperature = None, None
    chosen = METHODS[c.method] if c.teacher else ("task",)
    fill(c, {f"w_{term}": 1 if term in chosen else 0 for term in TERMS})
    fill(c, {"device": "cuda" if torch.cuda.is_available() else "cpu"})
    c.amp = c.amp or ("fp16" if c.device.startswith("cuda") else "off")
    c.out = c.out or f"runs/{run_name(c)}"
    c.min_size = sorted(set(c.min_size))
    fill(c, {"workers": min(16, max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))})
    check_ranges(c)
    if not any(getattr(c, f"w_{term}") for term in TERMS):
        raise UserError("no term is left to train on: give one of them a weight")
    if c.batch_size % world_size():
        raise UserError(f"--batch-size {c.batch_size}: it must be a multiple of the {world_size()} ranks")
    return c


def run_name(c: Namespace) -> str:
    """The name of a run's folder where none is given."""
    data = Path(c.data_dir).resolve().name + (f"-subset{c.subset}" if c.subset else "")
    networks = f"{c.teacher}-{c.student}-{c.method or 'fcfd'}" if c.teacher else f"{c.student}-alone"
    start = "-inherit" * c.inherit + "-scratch" * c.scratch
    return f"{data}-{networks}{start}-{c.iterations}it-seed{c.seed}"


def learning_rate(c: Namespace, iteration: int) -> float:
    """1x: linear from a thousandth over 1,000 iterations, times 0.1 at 120,000 and 160,000 of 180,000."""
    part = c.iterations / 180_000
    warmed = min(1.0, iteration / (SETTINGS["warmup_iterations"] * min(1.0, part)))
    falls = sum(iteration >= round(milestone * part) for milestone in SETTINGS["milestones"])
    return c.lr * (0.001 + 0.999 * warmed) / 10**falls


# -------------------------------------------------------------------------------------------------- detectors


def build_networks(c: Namespace, data: CocoData, with_weights: bool) -> tuple[FasterRCNN, FasterRCNN | None]:
    """The student and the frozen teacher, None without one; `with_weights` as they begin, else fresh.

    Raises:
        UserError: what is wrong with a file or a download; the student cannot inherit.
    """
    torch.manual_seed(c.seed)  # the same seed starts every method from the same student
    student = build_detector(c.student, len(data.categories), c.min_size, c.rois, c.scratch)
    teacher = build_detector(c.teacher, len(data.categories), c.min_size).requires_grad_(False) if c.teacher else None
    if with_weights:
        if not c.scratch:
            load_backbone(student, c.student, c.backbone_ckpt)
        if teacher:
            load_teacher(teacher, c, data)
        if c.inherit:
            inherit(student, teacher)
    return student, teacher


def load_teacher(teacher: FasterRCNN, c: Namespace, data: CocoData) -> None:
    """Load --teacher-ckpt, else what an earlier run beside this one left, else torchvision's COCO_V1 for resnet50.

    Raises:
        UserError: what is wrong with the file or the download; there is none of these classes.
    """
    beside = Path(c.out).parent
    file = c.teacher_ckpt or find_network(beside, c.teacher, data.fingerprint, c.iterations, "iteration", "AP")
    try:
        if file:
            load_detector(teacher, file, c.teacher, data.categories)
        elif c.teacher == "resnet50":
            file = load_coco_v1(teacher, data.categories)
        else:
            raise OtherNetworkError(f"there is no trained {c.teacher} in {beside}")
    except OtherNetworkError as error:
        command = f"python detection.py --data-dir {c.data_dir} --student {c.teacher} --iterations {c.iterations}"
        command += f" --subset {c.subset}" * bool(c.subset) + " --scratch" * c.scratch
        command += f" --out {beside / c.teacher}" * (beside != Path("runs"))
        raise UserError(f"{error}; give a --teacher-ckpt of these classes, or train one by: {command}") from error
    print(f"teacher: {file}")


# --------------------------------------------------------------------------------------------------- one step


class Step(nn.Module):
    """From images to terms, in one forward: DistributedDataParallel sees to the gradients of what goes through it."""

    def __init__(self, c: Namespace, student: FasterRCNN, teacher: FasterRCNN | None):
        super().__init__()
        self.terms = tuple(term for term in TERMS if getattr(c, f"w_{term}"))
        self.student, self.teacher = student, teacher
        self.bridges: Bridges | None = level_bridges(self.terms) if teacher else None
        self.amp, self.temperature = AMP[c.amp], c.temperature

    def train(self, mode: bool = True) -> "Step":
        super().train(mode)
        if self.teacher:
            self.teacher.eval()
        return self

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The terms before weighting, and the four losses that the task's consists of."""
        with torch.autocast(images[0].device.type, self.amp, enabled=self.amp is not None):
            flow = forward_detectors(self.teacher, self.student, self.bridges, images, targets, self.terms)
        parts = {name: loss.detach() for name, loss in flow.task.items()}
        return detection_terms(flow, self.temperature, self.terms) | parts


# --------------------------------------------------------------------------------------------------- training


def train(c: Namespace, step: Step, data: CocoData, state: dict | None, deadline: float) -> bool:
    """Train from `state` (None: from the start) to the last iteration; False if `deadline` passed before that."""
    device, out, cuda = next(step.parameters()).device, Path(c.out), c.device.startswith("cuda")
    nets = dict(step.named_children())  # the student, and with a teacher this and the bridges
    optimizer = sgd(decay_all_but_norms(step), c.lr, momentum=0.9, weight_decay=1e-4, fused=cuda)
    scaler = torch.amp.GradScaler(device.type, enabled=c.amp == "fp16")
    if state:
        run_folder.restore(out, state, {**nets, "optimizer": optimizer, "scaler": scaler})
        for group in optimizer.param_groups:
            group["fused"] = cuda  # the device may be another one
        if rank() == 0:
            publish(out, state)
    else:
        state = {"config": vars(c), "iteration": 0, "log": [], "sums": {}, "best": {}, "teacher_accuracy": None}
        state["classes"] = list(data.categories.values())  # and sums are over what has no row in the log yet
    distributed = distribute(step, some_unused=not c.w_task)
    if step.teacher:
        if not state["iteration"]:
            state["teacher_accuracy"] = evaluate_by_all(step.teacher, c, data, device)
        print(f"teacher: AP {state['teacher_accuracy']['AP']:.2f}", flush=True)

    def keep() -> None:  # everything, from which the other files are written
        broadcast_buffers(nets.values())
        state["sums"] = all_reduce_mean(state["sums"], device)
        if not all(tensor.isfinite().all() for net in nets.values() for tensor in net.state_dict().values()):
            raise LossNotFiniteError(f"in iteration {state['iteration']}")
        if rank() == 0:
            state.update({name: net.state_dict() for name, net in nets.items()})
            state.update(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            state["made_with"] = run_folder.made_with(device) | {"ranks": world_size()}
            save(state, out / "last.pt")

    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    weights = {term: getattr(c, f"w_{term}") for term in step.terms}
    first, last = state["iteration"], c.iterations
    order = batches(data.train, c.batch_size, c.seed, first, last, rank(), world_size())
    samples = load(BoxedImages(data.train, c.seed), order, c.workers, device)
    stopped, silent = False, None if rank() == 0 else True  # None: on a terminal alone
    for iteration in tqdm(range(first, last + 1), "training", last, initial=first, leave=False, disable=silent):
        # What the last iteration made due comes first: after it was saved, so a resume goes on with a test that failed.
        tested = iteration % c.eval_every == 0 or iteration == last
        if state["sums"] and (tested or iteration % c.save_every == 0):
            began = time.monotonic()
            accuracy = evaluate_by_all(step.student, c, data, device) if tested else {}
            state["sums"] = all_reduce_mean(state["sums"], device)
            add_row(state, learning_rate(c, iteration - 1), accuracy, time.monotonic() - began)
            keep()
            if rank() == 0:
                publish(out, state)
                print_row(state)
        if iteration == last or stopped:
            break

        began = time.monotonic()
        images, targets = map(list, zip(*next(samples), strict=True))
        waited = time.monotonic() - began
        # What torchvision draws: each image's size, and which boxes the RPN and the ROI head are trained on.
        torch.manual_seed(seed_of(c.seed, iteration, "step", rank()))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(c, iteration)
        step.train()
        terms = distributed(images, targets)
        loss = sum(weight * terms[term] for term, weight in weights.items())

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # The host waits for the device here, as it does in every RPN.
        values = {"loss": loss, **terms}
        numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
        if not math.isfinite(numbers[0]):
            raise LossNotFiniteError(f"in iteration {iteration + 1}")
        numbers = dict(zip(values, numbers, strict=True))
        numbers |= {"steps": 1, "seconds": time.monotonic() - began, "waited": waited}
        state["sums"] = {name: state["sums"].get(name, 0.0) + number for name, number in numbers.items()}
        done = state["iteration"] = iteration + 1
        stopped = done < last and math.isfinite(deadline) and broadcast(time.monotonic() > deadline, device)
        if stopped or done % c.eval_every == 0 or done == last:
            keep()

    if stopped:
        if rank() == 0:
            publish(out, state)
        print(f"stopped after {state['iteration']} of {last} iterations: repeat the command with --resume")
    elif rank() == 0:
        report(state)
        shown = {role: nets[role] for role in ("teacher", "student") if role in nets}
        draw_found(out / "boxes", shown, data.test, state["classes"], c.visualize or 0)
    return not stopped


def evaluate_by_all(net: FasterRCNN, c: Namespace, data: CocoData, device: torch.device) -> dict[str, float | None]:
    """Average precision on the test images, which the ranks share out among themselves."""
    mine = range(rank(), len(data.test), world_size())
    one_by_one = load(BoxedImages(data.test), [[(0, 0, i)] for i in mine], c.workers, device)
    return evaluate(net, one_by_one, mine, data.truth)


# -------------------------------------------------------------------------------------------------------- run


def run(given: dict, resume: bool, deadline: float) -> bool:
    """One run from its settings to its files; False if `deadline` (of time.monotonic) came first.

    Raises:
        UserError: anything that is wrong with the input.
        LossNotFiniteError: training diverged.
    """
    c = Namespace(**SETTINGS["defaults"] | given)
    c.device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(c.out or f"runs/{run_name(c)}")
    with process_group(c.device) as name:
        device = open_device(name, one_size=False)
        opened = run_folder.open_run(out, resume, c.script, "iteration") if rank() == 0 else nullcontext()
        with opened as state:
            state = broadcast(state, device)
            stored = state["config"] if state else {}
            c = settle(given | {"out": str(out), "device": c.device, "workers": c.workers}, stored)
            run_folder.check_settings(stored, vars(c))
            data = load_coco(c.data_dir, c.subset, c.test_subset)
            if broadcast(data.fingerprint, device) != data.fingerprint:
                raise UserError(f"{c.data_dir} holds other images here than where rank 0 runs: copy the same set there")
            if c.batch_size > len(data.train):
                raise UserError(f"--batch-size {c.batch_size}: there are only {len(data.train)} training images")
            c.fingerprint = data.fingerprint
            run_folder.check_settings(stored, vars(c))  # now with the data's

            weights = ", ".join(f"{term} {getattr(c, f'w_{term}'):g}" for term in TERMS)
            task = f"{c.student} from {c.teacher} by {c.method} ({weights})" if c.teacher else f"{c.student} alone"
            size = f"{len(data.train)} training and {len(data.test)} test images in {len(data.categories)} classes"
            ranks = (
                f"{world_size()} ranks, {c.batch_size // world_size()} images each" if world_size() > 1 else c.device
            )
            print(f"{task}, {c.iterations} iterations on {c.data_dir}: {size}; {ranks}, amp {c.amp}; {c.out}")
            print(*data.notes, sep="\n", end="\n" * bool(data.notes))
            student, teacher = build_networks(c, data, with_weights=not state and rank() == 0)
            if state:
                state["config"] = vars(c)
            step = Step(c, student, teacher).to(device, memory_format=torch.channels_last)
            return train(c, step, data, state, deadline)


def evaluate_checkpoint(given: dict) -> None:
    """--evaluate: print the average precision of a checkpoint on the test images; with --visualize draw some."""
    if world_size() > 1:
        raise UserError("--evaluate takes one process: start it without torchrun")
    c = settle(given, {"min_size": size} if (size := trained_size(given["evaluate"])) else {})
    data, device = load_coco(c.data_dir, None, c.test_subset), open_device(c.device, one_size=False)
    nets = {"student": build_detector(c.student, len(data.categories), c.min_size)}
    load_detector(nets["student"], given["evaluate"], c.student, data.categories)
    if c.teacher and c.visualize:
        nets = {"teacher": build_detector(c.teacher, len(data.categories), c.min_size), **nets}
        load_teacher(nets["teacher"], c, data)
    nets = {role: net.to(device, memory_format=torch.channels_last) for role, net in nets.items()}
    tested = evaluate_by_all(nets["student"], c, data, device)
    print(f"{c.student}: {in_words(tested)} on {len(data.test)} test images of {c.min_size[-1]} pixels")
    if c.visualize:
        folder = Path(given.get("out", Path(given["evaluate"]).parent)) / "boxes"
        draw_found(folder, nets, data.test, list(data.categories.values()), c.visualize)


def main(argv: list[str] | None = None) -> int:
    """Parse, then evaluate or run; the exit code is that of `exit_code`."""

    def script() -> None:
        given = parse_args(argv)
        resume = given.pop("resume", False)
        require_pycocotools()
        if "evaluate" in given:
            evaluate_checkpoint(given)
        else:
            run(given, resume, deadline=time.monotonic() + 60 * given.get("max_minutes", math.inf))

    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  rank 0 speaks for all
    return exit_code(script, INTERRUPTED, rank(), smaller="smaller images (--min-size)")


if __name__ == "__main__":
    sys.exit(main())
