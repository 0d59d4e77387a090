"""FCFD for object detection (App. D, E; Tab. 3, 7): Faster R-CNN with FPN on COCO, or on any dataset in its format.

    python detection.py --data-dir COCO --student resnet101                              train a detector alone
    python detection.py --data-dir COCO --teacher resnet101 --student resnet18           distill it
    python detection.py --data-dir COCO --teacher resnet101 --student resnet50 --inherit
    python detection.py --data-dir COCO --student resnet18 --evaluate FILE               test a checkpoint
    torchrun --nproc_per_node=8 detection.py ...                                         on eight GPUs

COCO holds train2017/, val2017/ and annotations/. The detectors are torchvision's. The data paths and loss terms of the
method are in common/detection/fcfd.py. With several processes (ranks), each reads its share of every batch,
DistributedDataParallel averages the gradients, and only rank 0 prints and writes files.
"""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from tqdm import tqdm

from common.detection.boxes import draw_detections
from common.detection.coco import CocoData, load_coco, load_coco_test
from common.detection.detectors import build_detector, decay_all_but_norms
from common.detection.evaluation import evaluate, require_pycocotools
from common.detection.fcfd import TERMS, detection_terms, forward_detectors, level_bridges
from common.detection.images import BoxedImages, batches, load
from common.detection.options import SETTINGS, add_options
from common.detection.records import add_row, all_reduce_mean, format_metrics, print_row, publish, report, save
from common.detection.weights import inherit, load_backbone, load_coco_v1, load_detector, trained_size
from common.randomness import derive_seed
from common.run.device import AMP, describe_device, open_device
from common.run.distributed import broadcast, rank, world_size
from common.run.earlier_runs import default_out, find_network
from common.run.errors import NetworkMismatchError, NonFiniteLossError, UserError, exit_code
from common.run.optimizer import sgd
from common.run.options import Parser, option, set_defaults
from common.run.run import Run, stored_options
from common.run.torchrun import distribute, process_group
from common.run.types import positive, weight

METHODS = {"kd": ("task", "kd"), "app": ("task", "kd", "app"), "fcfd": tuple(TERMS)}  # the terms of each method
INTERRUPTED = "saved iterations are kept; continue with --resume (without it if none were saved)"


def parse_args(argv: list[str] | None = None, stored: dict | None = None) -> Namespace:
    """Parse the options; defaults are those `stored` by the run being resumed, then the published settings."""
    parser = Parser(__doc__)
    distillation = add_options(parser)
    parser.add_argument("--evaluate", metavar="FILE", help="only test this checkpoint of --student")
    add = distillation.add_argument
    add("--method", choices=METHODS, default="fcfd", help="kd: L_task + L_kd; app: adds L_app")
    add("--temperature", type=positive, default=SETTINGS["temperature"], metavar="T", help="of every KL")
    for name in TERMS:
        add(option(f"w_{name}"), type=weight, metavar="W", help=f"weight of {name} (default: 1 if --method has it)")
    args = parser.parse(argv, stored)
    if not resolve(parser, args, stored):
        return args
    if not args.teacher:
        parser.refuse(args, distillation, "requires --teacher")
        args.method = args.temperature = None
    chosen = METHODS[args.method] if args.teacher else ("task",)
    set_defaults(args, **{f"w_{name}": 1 if name in chosen else 0 for name in TERMS})
    if not any(getattr(args, f"w_{name}") for name in TERMS):
        parser.error("every loss term has weight 0: set at least one --w-... above 0")
    return args


def resolve(parser: Parser, args: Namespace, stored: dict | None) -> bool:
    """Set and check the shared options; False if --resume has yet to read the stored ones."""
    args.min_size = sorted(set(args.min_size))
    args.out = args.out or default_out(run_name(args), args)
    if args.resume and stored is None:
        return False  # main() reads them once the ranks can communicate
    if args.scratch and "backbone_ckpt" in args.given:
        parser.error("--scratch and --backbone-ckpt exclude each other: omit one")
    if args.batch_size % world_size():
        parser.error(f"--batch-size {args.batch_size}: must be a multiple of the {world_size()} ranks")
    if "milestones" in args.given and not args.milestones[0] < args.milestones[1] < args.iterations:
        parser.error(f"--milestones must increase and be below --iterations {args.iterations}")
    part = args.iterations / SETTINGS["iterations"]
    set_defaults(args, milestones=[round(milestone * part) for milestone in SETTINGS["milestones"]])
    return True


def run_name(args: Namespace) -> str:
    """The name of the default output folder."""
    data = Path(args.data_dir).resolve().name + (f"-subset{args.subset}" if args.subset else "")
    networks = f"{args.teacher}-{args.student}-{args.method}" if args.teacher else f"{args.student}-alone"
    start = "-inherit" * args.inherit + "-scratch" * args.scratch
    return f"{data}-{networks}{start}-{args.iterations}it-seed{args.seed}-{args.amp}"


def learning_rate(args: Namespace, iteration: int) -> float:
    """Rises linearly from a thousandth of --lr during the warm-up; divided by 10 at each milestone."""
    warmup = SETTINGS["warmup_iterations"] * min(1.0, args.iterations / SETTINGS["iterations"])
    warmed = min(1.0, iteration / warmup)
    passed = sum(iteration >= milestone for milestone in args.milestones)
    return args.lr * (0.001 + 0.999 * warmed) / 10**passed


def build_networks(args: Namespace, data: CocoData, load_weights: bool) -> tuple[FasterRCNN, FasterRCNN | None]:
    """(student, frozen teacher or None), with the initial weights of training if `load_weights`, else random.

    Raises:
        UserError: a file is invalid, a download failed, or the student cannot inherit.
    """
    torch.manual_seed(args.seed)  # every method starts from the same student
    n = len(data.categories)
    student, teacher = build_detector(args.student, n, args.min_size, args.rois, args.scratch), None
    if args.teacher:
        teacher = build_detector(args.teacher, n, args.min_size).requires_grad_(False)
    if load_weights:
        if not args.scratch:
            load_backbone(student, args.student, args.backbone_ckpt)
        if teacher:
            load_teacher(teacher, args, data)
        if args.inherit:
            inherit(student, teacher)
    return student, teacher


def load_teacher(teacher: FasterRCNN, args: Namespace, data: CocoData) -> None:
    """Load --teacher-ckpt, else an earlier run's next to --out, else torchvision's COCO_V1 for resnet50.

    Raises:
        UserError: the file is invalid, the download failed, or there is no teacher for these classes.
    """
    parent = Path(args.out).parent
    file = args.teacher_ckpt
    file = file or find_network(parent, args.teacher, data.fingerprint, args.iterations, "iteration", "AP")
    try:
        if file:
            load_detector(teacher, file, args.teacher, data.categories)
        elif args.teacher == "resnet50":
            file = load_coco_v1(teacher, data.categories)
        else:
            raise NetworkMismatchError(f"there is no trained {args.teacher} in {parent}")
    except NetworkMismatchError as error:
        command = f"python detection.py --data-dir {args.data_dir} --student {args.teacher}"
        command += f" --iterations {args.iterations}" + f" --subset {args.subset}" * bool(args.subset)
        command += " --scratch" * args.scratch + f" --out {parent / args.teacher}" * (parent != Path("runs"))
        raise UserError(f"{error}; give a --teacher-ckpt for these classes, or train one: {command}") from error
    print(f"teacher: {file}")


class Step(nn.Module):
    """Computes the loss terms of a batch in one forward, as DistributedDataParallel requires.

    `columns` are the terms in the log, `parts` what last.pt holds besides the detectors.
    """

    columns = TERMS

    def __init__(self, args: Namespace, student: FasterRCNN, teacher: FasterRCNN | None):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.terms = {name: getattr(args, f"w_{name}") for name in TERMS if getattr(args, f"w_{name}")}
        self.bridges = level_bridges(self.terms) if teacher else None
        self.parts = {"bridges": self.bridges}
        self.temperature, self.amp = args.temperature, AMP[args.amp]

    def weights(self, iteration: int) -> dict[str, float]:
        return self.terms

    def train(self, mode: bool = True) -> "Step":
        super().train(mode)
        if self.teacher:
            self.teacher.eval()
        return self

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The unweighted terms, and the four losses that make up L_task."""
        with torch.autocast(images[0].device.type, self.amp, enabled=self.amp is not None):
            flow = forward_detectors(self.teacher, self.student, self.bridges, images, targets, self.terms)
        parts = {name: loss.detach() for name, loss in flow.task.items()}
        return detection_terms(flow, self.temperature, self.terms) | parts


def train(args: Namespace, device: torch.device, make_step: Callable[..., nn.Module], script: str) -> None:
    """Train the Step from `make_step` until the last iteration or the time limit; only `script` can resume the run."""
    with Run(args, script, unit="iteration") as run:
        data = load_coco(args.data_dir, args.subset, args.test_subset)
        run.check_data(data.fingerprint, len(data.train))
        ranks = f"{world_size()} rank{'s' * (world_size() > 1)}"
        print(f"{run_name(args)}: {data}; {describe_device(args)}; {ranks}; {args.out}", *data.notes, sep="\n")
        student, teacher = build_networks(args, data, load_weights=not run.resumed and rank() == 0)
        step = make_step(args, student, teacher).to(device, memory_format=torch.channels_last)
        print(f"weights {step.weights(args.iterations)}")
        optimizer = sgd(decay_all_but_norms(step), args.lr, momentum=0.9, weight_decay=1e-4)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

        state, classes = run.state, list(data.categories.values())
        run.track(student=student, teacher=teacher, **step.parts, optimizer=optimizer, scaler=scaler)
        if run.resumed:
            publish(run)
        else:
            state |= {"classes": classes, "sums": {}}  # sums over the iterations since the last row of the log
        distributed = distribute(step, some_unused="task" not in step.weights(0))  # rank 0's weights on every rank
        if teacher:
            if not state["iteration"]:
                state["teacher_accuracy"] = evaluate_distributed(teacher, args, data, device)
            print(f"teacher: AP {state['teacher_accuracy']['AP']:.2f}", flush=True)

        first, last = state["iteration"], args.iterations
        order = batches(data.train, args.batch_size, args.seed, first, last, rank(), world_size())
        samples = load(BoxedImages(data.train, args.seed), order, args.workers, device)
        stopped, silent = False, None if rank() == 0 else True  # None: show the bar only in a terminal
        for iteration in tqdm(range(first, last + 1), "training", last, initial=first, leave=False, disable=silent):
            # Test and log one iteration late: its state is already saved, so --resume repeats a failed test.
            tested = iteration % args.eval_every == 0 or iteration == last
            if state["sums"] and (tested or iteration % args.save_every == 0):
                began = time.monotonic()
                accuracy = evaluate_distributed(student, args, data, device) if tested else {}
                state["sums"] = all_reduce_mean(state["sums"], device)
                add_row(state, learning_rate(args, iteration - 1), accuracy, time.monotonic() - began, step.columns)
                save(run)
                publish(run)
                print_row(state)
            if iteration == last or stopped:
                break

            began = time.monotonic()
            images, targets = map(list, zip(*next(samples), strict=True))
            waited = time.monotonic() - began
            # torchvision samples each image's size and the boxes to train the RPN and the ROI head on.
            torch.manual_seed(derive_seed(args.seed, iteration, "step", rank()))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, iteration)
            step.train()
            terms = distributed(images, targets)
            loss = sum(value * terms[name] for name, value in step.weights(iteration).items())

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            # Metrics are read in every step: the RPN synchronizes anyway.
            values = {"loss": loss, **terms}
            numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
            if not math.isfinite(numbers[0]):
                raise NonFiniteLossError(f"in iteration {iteration + 1}")
            numbers = dict(zip(values, numbers, strict=True))
            numbers |= {"steps": 1, "seconds": time.monotonic() - began, "waited": waited}
            state["sums"] = {name: state["sums"].get(name, 0.0) + value for name, value in numbers.items()}
            done = state["iteration"] = iteration + 1
            stopped = done < last and math.isfinite(args.deadline) and broadcast(time.monotonic() > args.deadline)
            if stopped or done % args.eval_every == 0 or done == last:
                save(run)

        if stopped:
            publish(run)
            print(f"stopped after {state['iteration']} of {last} iterations: repeat the command with --resume")
        elif rank() == 0:
            report(state)
            shown = {"student": student} if teacher is None else {"teacher": teacher, "student": student}
            draw_detections(run.out / "boxes", shown, data.test, classes, args.visualize or 0)


def evaluate_distributed(
    net: FasterRCNN, args: Namespace, data: CocoData, device: torch.device
) -> dict[str, float | None]:
    """Average precision on the test images, which are split among the ranks."""
    mine = range(rank(), len(data.test), world_size())
    one_by_one = load(BoxedImages(data.test), [[(0, 0, i)] for i in mine], args.workers, device)
    return evaluate(net, one_by_one, mine, data.truth)


def evaluate_checkpoint(args: Namespace) -> None:
    """--evaluate: print the average precision of a checkpoint on the test images; with --visualize, draw some."""
    if world_size() > 1:
        raise UserError("--evaluate runs in one process: start it without torchrun")
    if "min_size" not in args.given:
        args.min_size = trained_size(args.evaluate) or args.min_size
    device = open_device(args.device, fixed_size=False)
    if args.teacher:  # to find an earlier run's teacher by its training images
        data = load_coco(args.data_dir, None, args.test_subset)
    else:
        data = load_coco_test(args.data_dir, args.test_subset)
    nets = {"student": build_detector(args.student, len(data.categories), args.min_size)}
    load_detector(nets["student"], args.evaluate, args.student, data.categories)
    if args.teacher and args.visualize:
        nets = {"teacher": build_detector(args.teacher, len(data.categories), args.min_size), **nets}
        load_teacher(nets["teacher"], args, data)
    nets = {role: net.to(device, memory_format=torch.channels_last) for role, net in nets.items()}
    tested = evaluate_distributed(nets["student"], args, data, device)
    print(f"{args.student}: {format_metrics(tested)} on {len(data.test)} test images of {args.min_size[-1]} pixels")
    if args.visualize:
        folder = Path(args.out if "out" in args.given else Path(args.evaluate).parent) / "boxes"
        draw_detections(folder, nets, data.test, list(data.categories.values()), args.visualize)


def main(argv: list[str] | None = None) -> int:
    """Train or evaluate, and return the exit code."""

    def script() -> None:
        args = parse_args(argv)
        require_pycocotools()
        if args.evaluate:
            return evaluate_checkpoint(args)
        with process_group(args.device) as name:
            device = open_device(name, fixed_size=False)
            if args.resume:
                args = parse_args(argv, stored_options(args, "detection", "iteration") | {"device": args.device})
            train(args, device, Step, "detection")

    return exit_code(script, INTERRUPTED, rank(), smaller="smaller images (--min-size)")


if __name__ == "__main__":
    sys.exit(main())
