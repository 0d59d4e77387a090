"""FCFD on CIFAR-100 (Sec. 3.1, 3.2): distill a teacher into a student, or train one network alone.

    python cifar100.py --teacher resnet32x4 --student resnet8x4     distill; trains the teacher first if needed
    python cifar100.py --student resnet8x4                          train a network alone: a teacher, a baseline
    python cifar100.py --student resnet8x4 --evaluate FILE          test a checkpoint

The data paths and loss terms of the method are in common/fcfd.py.
"""

import math
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from common.bridges import build_bridges
from common.data.batches import SIZE, Data, eval_batches, train_batches
from common.data.sources import load_data, load_test
from common.fcfd import EQ_9, TERMS, fcfd_terms, forward_paths
from common.losses import dkd, kl
from common.models import NETWORKS, build
from common.multipath_bn import track_paths
from common.paths import sample_paths
from common.plan import needs_all_bridges, plan_paths, term_weights
from common.run import earlier_runs
from common.run.checkpoint import load_network
from common.run.device import AMP, describe_device, open_device
from common.run.errors import NonFiniteLossError, UserError, exit_code, user_errors
from common.run.evaluation import evaluate
from common.run.optimizer import sgd
from common.run.options import PUBLISHED, Parser, option, set_defaults
from common.run.run import Meter, Run, stored_options
from common.run.types import count, count_or_zero, name_in, positive, weight
from common.simkd import build_simkd

SETTINGS = PUBLISHED["cifar100"]
METHODS = {"kd": ("task", "kd"), "app": ("task", "kd", "app"), "fcfd": EQ_9}  # the terms of each method


def parse_args(argv: list[str] | None = None, stored: dict | None = None) -> Namespace:
    """Parse the options; defaults are those `stored` by the run being resumed, then the published settings."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--student", type=name_in(NETWORKS), required=True, metavar="NAME", help=", ".join(NETWORKS))
    add("--teacher", type=name_in(NETWORKS), metavar="NAME", help="omit to train --student alone")
    add("--epochs", type=count, default=SETTINGS["epochs"], metavar="N", help="the schedule scales with it")
    add("--batch-size", type=count, default=SETTINGS["batch_size"], metavar="N", help="images per step")
    add("--lr", type=positive, help="default: the pair's or network's")
    add("--evaluate", metavar="FILE", help="only test this checkpoint of --student (with --simkd also give --teacher)")
    distillation = parser.add_argument_group("distillation")
    add = distillation.add_argument
    add("--method", choices=METHODS, default="fcfd", help="kd: L_task + L_kd; app: adds L_app; fcfd: all of Eq. 9")
    add("--teacher-ckpt", metavar="FILE", help="default: an earlier run's next to --out, else it is trained first")
    add("--teacher-epochs", type=count, metavar="N", help="of a teacher that is trained first (default: --epochs)")
    add("--teacher-bn", choices=("batch", "running"), default="batch", help="BatchNorm statistics on its pure path")
    add("--temperature", type=positive, metavar="T", help="of every KL (default: the pair's)")
    for name in TERMS:
        add(option(f"w_{name}"), type=weight, metavar="W", help=f"weight of {name} (default: the method's and pair's)")
    add("--num-paths", type=count_or_zero, metavar="N", help="|S|, mixed paths sampled per step (default: 2)")
    add("--positions", type=int, nargs="+", metavar="K", help="where mixed paths switch networks (default: 2..N-1)")
    add("--kd-loss", choices=("kl", "dkd"), default="kl", help="in L_kd, L_func and L_func'")
    add("--tckd", type=weight, default=1, metavar="W", help="weight of TCKD, the part on the target class")
    add("--nckd", type=weight, default=2, metavar="W", help="weight of NCKD, the part on the other classes")
    add("--simkd", action="store_true", help="SimKD's projector and the teacher's classifier replace the student's")
    parser.add_data_options()
    parser.add_run_options()
    args = parser.parse(argv, stored)

    args.out = args.out or earlier_runs.default_out(run_name(args), args)
    if args.resume and stored is None:
        # If the run stopped while training its teacher, start the run and resume the teacher's training.
        if not (args.teacher and earlier_runs.stopped_during_teacher(Path(args.out), teacher_folder(args))):
            return parse_args(argv, stored_options(args))
        args.resume = False

    lr = SETTINGS["lr"].get(args.student, SETTINGS["lr"]["other"])
    if args.teacher:
        pair = SETTINGS["pairs"].get(f"{args.teacher}-{args.student}", {"lr": lr, **SETTINGS["other"]})
        weights = term_weights(METHODS[args.method], pair["w_l2"], pair["w_kl"])
        set_defaults(args, lr=pair["lr"], temperature=pair["temperature"], teacher_epochs=args.epochs)
    else:
        parser.refuse(args, distillation, "requires --teacher")
        weights = term_weights(("task",), 0, 0)
        set_defaults(args, lr=lr)
        args.method = args.teacher_bn = None
    set_defaults(args, **{f"w_{name}": value for name, value in weights.items()})
    if {"teacher_ckpt", "teacher_epochs"} <= args.given:
        parser.error("--teacher-epochs and --teacher-ckpt exclude each other: omit one")
    if args.kd_loss != "dkd" and args.given & {"tckd", "nckd"}:
        parser.error("--tckd and --nckd are weights inside DKD: also give --kd-loss dkd")
    return args


def run_name(args: Namespace) -> str:
    """The name of the default output folder."""
    data = f"folder-{Path(args.data_dir).resolve().name}" if args.dataset == "folder" else args.dataset
    subset = f"-subset{args.subset}" if args.subset else ""
    networks = f"{args.student}-alone"
    if args.teacher:
        networks = f"{args.teacher}-{args.student}-{args.method}"
        networks += "-dkd" * (args.kd_loss == "dkd") + "-simkd" * args.simkd
    return f"{data}{subset}-{networks}-{args.epochs}ep-seed{args.seed}-{args.amp}"


def learning_rate(args: Namespace, epoch: int) -> float:
    """--lr, divided by 10 at each milestone of the published schedule, scaled to --epochs."""
    passed = sum(epoch >= round(m / SETTINGS["epochs"] * args.epochs) for m in SETTINGS["milestones"])
    return args.lr / 10**passed


def warmed_up(weights: dict[str, float], args: Namespace, epoch: int) -> dict[str, float]:
    """This epoch's weights. Those of L2 terms ramp up linearly during the warm-up, which is shorter in short runs."""
    warmup = SETTINGS["warmup_epochs"] * min(1, args.epochs / SETTINGS["epochs"])
    factor = min(1.0, (epoch + 1) / warmup)
    return {name: value * factor if TERMS[name].compares_features else value for name, value in weights.items()}


def build_networks(args: Namespace, num_classes: int):
    """(student, teacher, bridges, candidate paths, weights by term). Teacher and bridges are None if not needed.

    Sets args.positions and args.num_paths.

    Raises:
        ValueError: the networks do not match, or an option is out of range.
    """
    torch.manual_seed(args.seed)  # the same initial student for every method
    student, teacher = build(args.student, num_classes), None
    weights = {name: getattr(args, f"w_{name}") for name in TERMS}
    if not args.teacher:
        return student, None, None, [], {"task": args.w_task}
    teacher = build(args.teacher, num_classes).requires_grad_(False)
    if args.simkd:
        student = build_simkd(student, teacher, SIZE)
        if student.num_stages in (args.positions or []):
            raise ValueError(f"--positions {student.num_stages}: with --simkd, mixed paths cannot leave the last stage")
    args.positions = sorted(set(args.positions or range(2, student.num_stages)))
    given = [name for name in TERMS if f"w_{name}" in args.given]
    weights, candidates, args.num_paths = plan_paths(weights, student.num_stages, args.positions, args.num_paths, given)
    if args.kd_loss == "dkd" and num_classes < 2:
        raise ValueError("--kd-loss dkd needs at least two classes")
    bridges = None
    if args.num_paths or needs_all_bridges(weights):
        bridges = build_bridges(teacher, student, SIZE, [path.k for path in candidates if path.delta == 0])
    return student, teacher, bridges, candidates, weights


def train(args: Namespace, data: Data | None = None) -> bool:
    """Train until the last epoch or the time limit, and return whether training finished."""
    with Run(args, columns=EQ_9) as run:
        device = open_device(args.device)
        data = data or load_data(args.dataset, args.data_dir, args.subset, args.test_subset).to(device)
        run.check_data(data.fingerprint, len(data.train))
        with user_errors():
            student, teacher, bridges, candidates, weights = build_networks(args, len(data.classes))
        print(f"{run_name(args)}: {data}; {describe_device(args)}; {args.out}")
        if teacher:
            if f"{args.teacher}-{args.student}" not in SETTINGS["pairs"]:
                print(f"{args.teacher}-{args.student} is not a published pair; using the default settings")
            print(f"weights {weights}, temperature {args.temperature:g}, {args.num_paths} of {len(candidates)} paths")
        if args.simkd:
            from common.run.cost import cost_line

            print(cost_line(args.student, args.teacher, len(data.classes), SIZE))
        if teacher and not run.resumed:  # a resumed run restores the teacher from last.pt
            args.teacher_ckpt = find_teacher(args, data)
            if not args.teacher_ckpt:
                return False
            load_network(teacher, args.teacher_ckpt, args.teacher)

        for net in filter(None, (student, teacher)):  # separate BatchNorm statistics for each mixed path
            track_paths(net, sorted({path.k for path in candidates}))
        networks = nn.ModuleList(filter(None, (student, teacher, bridges)))
        networks.to(device, memory_format=torch.channels_last)  # faster than NCHW: docs/cost.md
        parameters = [p for p in networks.parameters() if p.requires_grad]
        optimizer = sgd(parameters, args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        # What last.pt holds; it is restored here if the run is resumed.
        run.track(student=student, teacher=teacher, bridges=bridges, optimizer=optimizer, scaler=scaler)
        if teacher:
            tested = run.state["teacher_accuracy"] or evaluate(teacher, eval_batches(data.test))
            run.state["teacher_accuracy"] = tested
            print(f"teacher: {tested['top1']:.2f} % top-1 before distillation", flush=True)

        steps = math.ceil(len(data.train) / args.batch_size)
        for epoch in run.epochs():
            lr = optimizer.param_groups[0]["lr"] = learning_rate(args, epoch)
            warmed = warmed_up(weights, args, epoch)
            for net in networks:
                net.train(net is not teacher or args.teacher_bn == "batch")
            batches = train_batches(data.train, args.batch_size, args.seed, epoch)
            paths = sample_paths(candidates, args.num_paths or 0, steps, args.seed, epoch)
            meter = Meter(device)
            progress = tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, disable=None)
            for (images, labels), S in zip(progress, paths, strict=True):
                with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
                    flow = forward_paths(teacher, student, bridges, images, S, needs_all_bridges(weights))
                kd_loss = partial(dkd, labels=labels, tckd=args.tckd, nckd=args.nckd) if args.kd_loss == "dkd" else kl
                terms = fcfd_terms(flow, labels, args.temperature, weights, kd_loss)
                loss = sum(warmed[name] * term for name, term in terms.items())  # Eq. 9

                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                meter.add(len(labels), loss, **terms, correct=(flow.student_logits.argmax(1) == labels).sum())
            run.finish_steps(meter)  # raises if a loss or a weight is not finite
            run.end_epoch(meter, lr, student=evaluate(student, eval_batches(data.test)))
    return run.finished


def find_teacher(args: Namespace, data: Data) -> str | None:
    """The teacher's checkpoint: --teacher-ckpt, an earlier run's, or one trained now; None if --max-minutes passed."""
    if args.teacher_ckpt:
        print(f"teacher: {args.teacher_ckpt}")
        return args.teacher_ckpt
    if found := earlier_runs.find_network(Path(args.out).parent, args.teacher, data.fingerprint, args.teacher_epochs):
        print(f"teacher: {found}, from an earlier run")
        return str(found)

    folder = teacher_folder(args)
    if (config := earlier_runs.read_config(folder)) and config.get("fingerprint") != data.fingerprint:
        folder = folder.with_name(f"{folder.name}-{data.fingerprint[:8]}")  # same name, other data
    if folder.resolve() == Path(args.out).resolve():
        raise UserError(f"the teacher is trained first in {folder}: choose another --out")
    shared = ("dataset", "data_dir", "subset", "test_subset", "seed", "device", "amp")
    options = {"student": args.teacher, "epochs": args.teacher_epochs, "out": folder}
    options["batch_size"] = min(SETTINGS["batch_size"], len(data.train))
    options |= {key: getattr(args, key) for key in shared}
    teacher_argv = [f"{option(key)}={value}" for key, value in options.items() if value is not None]
    print(f"teacher: training {args.teacher} for {args.teacher_epochs} epochs in {folder}", flush=True)
    try:
        teacher_args = parse_args([*teacher_argv, *["--resume"] * (folder / "last.pt").exists()])
        teacher_args.deadline = args.deadline
        return str(folder / "student.pth") if train(teacher_args, data) else None
    except (UserError, NonFiniteLossError) as error:
        raise type(error)(f"(the teacher in {folder}) {error}") from error


def teacher_folder(args: Namespace) -> Path:
    """Where to train the teacher first: the default folder of that run, next to --out."""
    alone = {"teacher": None, "student": args.teacher, "epochs": args.teacher_epochs or args.epochs}
    return Path(args.out).parent / run_name(Namespace(**vars(args) | alone))


def evaluate_checkpoint(args: Namespace) -> None:
    """--evaluate: print the accuracy of a checkpoint on the test set."""
    device = open_device(args.device)
    test, classes = load_test(args.dataset, args.data_dir, args.test_subset)
    with user_errors():
        student, *_ = build_networks(args, len(classes))
    name = f"{args.student} by SimKD from {args.teacher}" if args.simkd else args.student
    load_network(student, args.evaluate, name)
    accuracy = evaluate(student.to(device), eval_batches(test.to(device)))
    print(f"{args.student} {accuracy['top1']:.2f} % top-1, {accuracy['top5']:.2f} % top-5 on {len(test)} test images")


def main(argv: list[str] | None = None) -> int:
    """Train or evaluate, and return the exit code."""

    def script() -> None:
        args = parse_args(argv)
        evaluate_checkpoint(args) if args.evaluate else train(args)

    return exit_code(script)


if __name__ == "__main__":
    sys.exit(main())
