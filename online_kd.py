"""Online distillation (App. F): train teacher and student together, both from scratch.

    python online_kd.py --teacher resnet32x4 --student resnet8x4                  FCFD, online
    python online_kd.py --teacher resnet32x4 --student resnet8x4 --method dml     mutual KL on the logits only
    python online_kd.py --teacher resnet32x4 --student resnet8x4 --method kd      the teacher learns on its own

The student's losses are those of Eq. 9 (common/fcfd.py). The teacher has two more: its cross entropy and a KL to the
student. Nothing is frozen. Targets are detached, but a mixed path trains every module it passes through: <k, 1> the
teacher's later stages, <k, 0> its early ones.

cifar100.py can --evaluate both saved networks, and use them as --teacher-ckpt.
"""

import math
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.bridges import build_bridges
from common.data.batches import SIZE, eval_batches, train_batches
from common.data.sources import load_data
from common.fcfd import EQ_9, KL, TERMS, Flow, Term, fcfd_terms, forward_paths
from common.models import NETWORKS, build
from common.multipath_bn import track_paths
from common.paths import sample_paths
from common.plan import needs_all_bridges, plan_paths, term_weights
from common.run.device import AMP, describe_device, open_device
from common.run.earlier_runs import default_out
from common.run.errors import exit_code, user_errors
from common.run.evaluation import evaluate
from common.run.optimizer import sgd
from common.run.options import PUBLISHED, Parser, option, set_defaults
from common.run.run import Meter, Run, stored_options
from common.run.types import count, count_or_zero, name_in, positive, weight

SETTINGS = PUBLISHED["cifar100"]


def l_teacher_task(flow: Flow, labels: Tensor, kl: KL) -> Tensor:
    """Cross entropy of the teacher's logits with the labels."""
    return F.cross_entropy(flow.teacher_logits.float(), labels)


def l_teacher_kd(flow: Flow, labels: Tensor, kl: KL) -> Tensor:
    """T^2 KL(p_s || p_t): the student is the target."""
    return kl(flow.teacher_logits, flow.student_logits)


ONLINE = TERMS | {"teacher_task": Term(l_teacher_task), "teacher_kd": Term(l_teacher_kd)}
METHODS = {  # the terms of each method
    "fcfd": (*EQ_9, "teacher_task", "teacher_kd"),
    "dml": ("task", "kd", "teacher_task", "teacher_kd"),
    "kd": ("task", "kd", "teacher_task"),
}


def parse_args(argv: list[str] | None = None, stored: dict | None = None) -> Namespace:
    """Parse the options; defaults are those `stored` by the run being resumed, then the published settings."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", type=name_in(NETWORKS), required=True, metavar="NAME", help=", ".join(NETWORKS))
    add("--student", type=name_in(NETWORKS), required=True, metavar="NAME", help="as for --teacher")
    add("--method", choices=METHODS, default="fcfd", help="dml: mutual KL; kd: only the student learns from the other")
    add("--epochs", type=count, default=SETTINGS["epochs"], metavar="N", help="the schedule scales with it")
    add("--batch-size", type=count, default=SETTINGS["batch_size"], metavar="N", help="images per step")
    add("--lr", type=positive, help="of both networks (default: the pair's)")
    add("--temperature", type=positive, metavar="T", help="of every KL (default: the pair's)")
    for name in ONLINE:
        add(option(f"w_{name}"), type=weight, metavar="W", help=f"weight of {name} (default: the method's and pair's)")
    add("--num-paths", type=count_or_zero, metavar="N", help="|S|, mixed paths sampled per step (default: 2)")
    add("--positions", type=int, nargs="+", metavar="K", help="where mixed paths switch networks (default: 2..N-1)")
    parser.add_data_options()
    parser.add_run_options()
    args = parser.parse(argv, stored)

    args.out = args.out or default_out(run_name(args), args)
    if args.resume and stored is None:
        return parse_args(argv, stored_options(args, "online_kd"))
    lr = SETTINGS["lr"].get(args.student, SETTINGS["lr"]["other"])
    pair = SETTINGS["pairs"].get(f"{args.teacher}-{args.student}", {"lr": lr, **SETTINGS["other"]})
    weights = term_weights(METHODS[args.method], pair["w_l2"], pair["w_kl"], ONLINE)
    set_defaults(args, lr=pair["lr"], temperature=pair["temperature"])
    set_defaults(args, **{f"w_{name}": value for name, value in weights.items()})
    return args


def run_name(args: Namespace) -> str:
    """The name of the default output folder."""
    data = f"folder-{Path(args.data_dir).resolve().name}" if args.dataset == "folder" else args.dataset
    data += f"-subset{args.subset}" if args.subset else ""
    return f"{data}-{args.teacher}-{args.student}-online-{args.method}-{args.epochs}ep-seed{args.seed}-{args.amp}"


def learning_rate(args: Namespace, epoch: int) -> float:
    """--lr, divided by 10 at each milestone of the published schedule, scaled to --epochs."""
    passed = sum(epoch >= round(m / SETTINGS["epochs"] * args.epochs) for m in SETTINGS["milestones"])
    return args.lr / 10**passed


def warmed_up(weights: dict[str, float], args: Namespace, epoch: int) -> dict[str, float]:
    """This epoch's weights. Those of L2 terms ramp up linearly during the warm-up, which is shorter in short runs."""
    warmup = SETTINGS["warmup_epochs"] * min(1, args.epochs / SETTINGS["epochs"])
    factor = min(1.0, (epoch + 1) / warmup)
    return {name: value * factor if ONLINE[name].compares_features else value for name, value in weights.items()}


def build_networks(args: Namespace, num_classes: int):
    """(student, teacher, bridges or None, candidate paths, weights by term).

    Without bridges (dml, kd) the networks may have different numbers of stages.

    Raises:
        ValueError: the networks do not match, or an option is out of range.
    """
    torch.manual_seed(args.seed)  # the same initial student for every method and in cifar100.py
    student, teacher = build(args.student, num_classes), build(args.teacher, num_classes)
    weights = {name: getattr(args, f"w_{name}") for name in ONLINE}
    args.positions = sorted(set(args.positions or range(2, student.num_stages)))
    given = [name for name in ONLINE if f"w_{name}" in args.given]
    weights, candidates, args.num_paths = plan_paths(
        weights, student.num_stages, args.positions, args.num_paths, required=given, table=ONLINE
    )
    bridges = None
    if args.num_paths or needs_all_bridges(weights, ONLINE):
        bridges = build_bridges(teacher, student, SIZE, [path.k for path in candidates if path.delta == 0])
    return student, teacher, bridges, candidates, weights


def train(args: Namespace) -> None:
    """Train until the last epoch or the time limit."""
    with Run(args, "online_kd", columns=METHODS["fcfd"]) as run:
        device = open_device(args.device)
        data = load_data(args.dataset, args.data_dir, args.subset, args.test_subset).to(device)
        run.check_data(data.fingerprint, len(data.train))
        with user_errors():
            student, teacher, bridges, candidates, weights = build_networks(args, len(data.classes))
        print(f"{run_name(args)}: {data}; {describe_device(args)}; {args.out}")
        if f"{args.teacher}-{args.student}" not in SETTINGS["pairs"]:
            print(f"{args.teacher}-{args.student} is not a published pair; using the default settings")
        print(f"weights {weights}, temperature {args.temperature:g}, {args.num_paths} of {len(candidates)} paths")

        for net in (student, teacher):
            track_paths(net, sorted({path.k for path in candidates}))
        networks = nn.ModuleList(filter(None, (student, teacher, bridges)))
        networks.to(device, memory_format=torch.channels_last)  # faster than NCHW: docs/cost.md
        optimizer = sgd(networks.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        # What last.pt holds; it is restored here if the run is resumed.
        run.track(student=student, teacher=teacher, bridges=bridges, optimizer=optimizer, scaler=scaler)

        steps = math.ceil(len(data.train) / args.batch_size)
        for epoch in run.epochs():
            lr = optimizer.param_groups[0]["lr"] = learning_rate(args, epoch)
            warmed = warmed_up(weights, args, epoch)
            networks.train()
            batches = train_batches(data.train, args.batch_size, args.seed, epoch)
            paths = sample_paths(candidates, args.num_paths, steps, args.seed, epoch)
            meter = Meter(device)
            progress = tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, disable=None)
            for (images, labels), S in zip(progress, paths, strict=True):
                with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
                    flow = forward_paths(teacher, student, bridges, images, S, needs_all_bridges(weights, ONLINE))
                terms = fcfd_terms(flow, labels, args.temperature, weights, table=ONLINE)
                loss = sum(warmed[name] * term for name, term in terms.items())  # Eq. 9 and the teacher's losses

                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                correct = (flow.student_logits.argmax(1) == labels).sum()
                teacher_correct = (flow.teacher_logits.argmax(1) == labels).sum()
                meter.add(len(labels), loss, **terms, correct=correct, teacher_correct=teacher_correct)
            run.finish_steps(meter)  # raises if a loss or a weight is not finite
            tests = {"student": student, "teacher": teacher}  # each with the BatchNorm statistics of its pure path
            tests = {k: evaluate(net, eval_batches(data.test)) for k, net in tests.items()}
            run.end_epoch(meter, lr, **tests)


def main(argv: list[str] | None = None) -> int:
    """Train, and return the exit code."""
    return exit_code(lambda: train(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
