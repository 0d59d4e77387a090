"""FCFD on ImageNet (Sec. 3.1, Tab. 2), or on any folder of images: distill a teacher, or train one network alone.

    python imagenet.py --data-dir DIR --teacher resnet34 --student resnet18     torchvision's weights as teacher
    python imagenet.py --data-dir DIR --student resnet34                        train a network alone
    python imagenet.py --data-dir DIR --student resnet18 --evaluate FILE        test a checkpoint
    torchrun --nproc_per_node=8 imagenet.py ...                                 on eight GPUs

DIR holds train/<class>/*.JPEG and val/<class>/*.JPEG. The data paths and loss terms of the method are in
common/fcfd.py. With several processes (ranks), each reads its share of every batch, DistributedDataParallel averages
the gradients, and only rank 0 prints and writes files.
"""

import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.bridges import build_bridges
from common.data.image_files import FileData, ImageFiles, Shard, eval_loader, list_files, list_test_files, train_loader
from common.fcfd import EQ_9, TERMS, fcfd_terms, forward_paths
from common.models import IMAGENET_NETWORKS, StagedNet, build_imagenet
from common.multipath_bn import track_paths
from common.paths import MixedPath, sample_paths
from common.plan import needs_all_bridges, plan_paths, term_weights
from common.run.checkpoint import load_network
from common.run.device import AMP, describe_device, open_device
from common.run.distributed import all_reduce, rank, world_size
from common.run.downloads import torchvision_weights
from common.run.earlier_runs import default_out
from common.run.errors import NetworkMismatchError, UserError, exit_code, user_errors
from common.run.evaluation import accuracy, count_hits
from common.run.optimizer import sgd
from common.run.options import PUBLISHED, Parser, option, set_defaults
from common.run.run import Meter, Run, stored_options
from common.run.torchrun import default_workers, distribute, process_group
from common.run.types import count, count_or_zero, name_in, number, positive, weight

SETTINGS = PUBLISHED["imagenet"]
METHODS = {"kd": ("task", "kd"), "app": ("task", "kd", "app"), "fcfd": EQ_9}  # the terms of each method
IMAGE_SIZE = 224


def parse_args(argv: list[str] | None = None, stored: dict | None = None) -> Namespace:
    """Parse the options; defaults are those `stored` by the run being resumed, then the published settings."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--student", type=name_in(IMAGENET_NETWORKS), required=True, metavar="NAME", help=", ".join(IMAGENET_NETWORKS))
    add("--teacher", type=name_in(IMAGENET_NETWORKS), metavar="NAME", help="omit to train --student alone")
    add("--epochs", type=count, default=SETTINGS["epochs"], metavar="N", help="the schedule scales with it")
    add("--batch-size", type=count, default=SETTINGS["batch_size"], metavar="N", help="of all ranks together")
    add("--lr", type=positive, default=SETTINGS["lr"], help="at the start")
    add("--evaluate", metavar="FILE", help="only test this checkpoint of --student")
    distillation = parser.add_argument_group("distillation")
    add = distillation.add_argument
    add("--method", choices=METHODS, default="fcfd", help="kd: L_task + L_kd; app: adds L_app; fcfd: all of Eq. 9")
    add("--teacher-ckpt", metavar="FILE", help="default: torchvision's IMAGENET1K_V1")
    add("--teacher-bn", choices=("batch", "running"), default="batch", help="BatchNorm statistics on its pure path")
    add("--temperature", type=positive, metavar="T", help="of every KL (default: the pair's)")
    for name in TERMS:
        add(option(f"w_{name}"), type=weight, metavar="W", help=f"weight of {name} (default: the method's and pair's)")
    add("--num-paths", type=count_or_zero, metavar="N", help="|S|, mixed paths sampled per step (default: 2)")
    add("--positions", type=int, nargs="+", metavar="K", help="where mixed paths switch networks (default: 2..N-1)")
    add_shared_options(parser)
    args = parser.parse(argv, stored)

    args.out = args.out or default_out(run_name(args), args)
    if args.resume and stored is None:
        return args  # main() reads the stored options once the ranks can communicate
    if args.teacher:
        pair = SETTINGS["pairs"].get(f"{args.teacher}-{args.student}", SETTINGS["other"])
        weights = term_weights(METHODS[args.method], pair["w_l2"], pair["w_kl"])
        set_defaults(args, temperature=pair["temperature"])
    else:
        parser.refuse(args, distillation, "requires --teacher")
        weights = term_weights(("task",), 0, 0)
        args.method = args.teacher_bn = None
    set_defaults(args, **{f"w_{name}": value for name, value in weights.items()})
    return args


def add_shared_options(parser: Parser) -> None:
    """The options that ablations/baseline_imagenet.py has too."""
    add = parser.add_argument
    add("--data-dir", default="data/imagenet", metavar="DIR", help="holds train/ and val/ or test/")
    add("--image-size", type=number(int, 32, 4096), default=IMAGE_SIZE, metavar="PIXELS", help="after cropping")
    add("--subset", type=count, metavar="N", help="train on N images, balanced over the classes")
    add("--test-subset", type=count, metavar="N", help="test on N images, balanced over the classes")
    add("--workers", type=number(int, 0, 1000), default=default_workers(), metavar="N", help="image readers per rank")
    add("--sync-bn", action="store_true", help="BatchNorm sees the images of all ranks, not only its own (CUDA only)")
    parser.add_run_options()


def run_name(args: Namespace) -> str:
    """The name of the default output folder."""
    data = Path(args.data_dir).resolve().name + (f"-subset{args.subset}" if args.subset else "")
    size = "" if args.image_size == IMAGE_SIZE else f"-{args.image_size}px"
    networks = f"{args.teacher}-{args.student}-{args.method}" if args.teacher else f"{args.student}-alone"
    return f"{data}{size}-{networks}-{args.epochs}ep-seed{args.seed}-{args.amp}"


def learning_rate(args: Namespace, epoch: int) -> float:
    """--lr, divided by 10 at each milestone of the published schedule, scaled to --epochs."""
    passed = sum(epoch >= round(m / SETTINGS["epochs"] * args.epochs) for m in SETTINGS["milestones"])
    return args.lr / 10**passed


def warmed_up(weights: dict[str, float], args: Namespace, epoch: int) -> dict[str, float]:
    """This epoch's weights. Those of L2 terms ramp up linearly during the warm-up, which is shorter in short runs."""
    warmup = SETTINGS["warmup_epochs"] * min(1, args.epochs / SETTINGS["epochs"])
    factor = min(1.0, (epoch + 1) / warmup)
    return {name: value * factor if TERMS[name].compares_features else value for name, value in weights.items()}


def load_teacher(teacher: StagedNet, args: Namespace, num_classes: int) -> None:
    """Load --teacher-ckpt, or torchvision's weights.

    Raises:
        UserError: the file is invalid or has other classes, or the download failed.
    """
    remedy = f"train one on these images: python imagenet.py --data-dir {args.data_dir} --student {args.teacher}"
    if not args.teacher_ckpt and (num_classes != 1000 or args.teacher == "MobileNetV1"):
        raise UserError(
            f"torchvision has no {args.teacher} for {num_classes} classes: give --teacher-ckpt, or {remedy}"
        )
    file = args.teacher_ckpt or torchvision_weights(args.teacher, "IMAGENET1K_V1")
    try:
        load_network(teacher, file, args.teacher)
    except NetworkMismatchError as error:
        raise UserError(f"{error}; {remedy}") from error
    except UserError as error:
        raise UserError(f"{error}" if args.teacher_ckpt else f"{error}; delete it to download it again") from error
    print(f"teacher: {file}")


class Step(nn.Module):
    """The networks and the loss; ablations/baseline_imagenet.py has another Step. last.pt holds all child modules.

    Attributes:
        name, notes: of the run, and lines to print before training.
        candidates: the mixed paths, for BatchNorm statistics.
        some_unused: whether parameters may get no gradient in a step.

    Raises:
        ValueError: the networks do not match, or an option is out of range.
    """

    columns = EQ_9  # the terms in the log

    def __init__(self, args: Namespace, data: FileData):
        super().__init__()
        self.args, self.amp, self.name, self.notes = args, AMP[args.amp], run_name(args), []
        self.sgd_options = {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
        torch.manual_seed(args.seed)  # the same initial student for every method
        self.student, self.teacher, self.bridges = build_imagenet(args.student, len(data.classes)), None, None
        self.weights, self.candidates, self.some_unused = {"task": args.w_task}, [], False
        if args.teacher:
            self.teacher = build_imagenet(args.teacher, len(data.classes)).requires_grad_(False)
            self.plan(args)

    def plan(self, args: Namespace) -> None:
        """Choose the terms and the mixed paths to sample from, and build the bridges that they use."""
        weights, n = {name: getattr(args, f"w_{name}") for name in TERMS}, self.student.num_stages
        args.positions = sorted(set(args.positions or range(2, n)))
        given = [name for name in TERMS if f"w_{name}" in args.given]
        self.weights, self.candidates, args.num_paths = plan_paths(weights, n, args.positions, args.num_paths, given)
        if args.num_paths or needs_all_bridges(self.weights):
            into_student = [path.k for path in self.candidates if path.delta == 0]
            self.bridges = build_bridges(self.teacher, self.student, args.image_size, into_student)
            # Bridges of paths that are not sampled get no gradient, and without the task or KD the classifier may not.
            every_bridge = needs_all_bridges(self.weights) and args.num_paths == len(self.candidates)
            self.some_unused = not (every_bridge and {"task", "kd"} & self.weights.keys())
        if f"{args.teacher}-{args.student}" not in SETTINGS["pairs"]:
            self.notes.append(f"{args.teacher}-{args.student} is not a published pair; using the default settings")
        paths = f"{args.num_paths} of {len(self.candidates)} paths"
        self.notes.append(f"weights {self.weights}, temperature {args.temperature:g}, {paths}")

    def epoch(self, shard: Shard) -> tuple[float, dict[str, float], list[list[MixedPath]]]:
        """The learning rate and the weights of the terms, and for each step its mixed paths, the same on every rank."""
        paths = sample_paths(self.candidates, self.args.num_paths or 0, len(shard), self.args.seed, shard.epoch)
        return learning_rate(self.args, shard.epoch), warmed_up(self.weights, self.args, shard.epoch), paths

    def forward(self, images: Tensor, labels: Tensor, paths: list[MixedPath]) -> tuple[dict[str, Tensor], Tensor]:
        """The unweighted terms of Eq. 9, means over these images, and the number of correct predictions."""
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            all_bridges = needs_all_bridges(self.weights)
            flow = forward_paths(self.teacher, self.student, self.bridges, images, paths, all_bridges)
        terms = fcfd_terms(flow, labels, self.args.temperature, self.weights)
        return terms, (flow.student_logits.detach().argmax(1) == labels).sum()


def train(args: Namespace, device: torch.device, make_step: type[nn.Module] = Step, script: str = "imagenet") -> None:
    """Train until the last epoch or the time limit. Only `script` can resume the run."""
    if args.batch_size < 2 * world_size():
        raise UserError(f"--batch-size {args.batch_size}: each of the {world_size()} ranks needs at least two images")
    if args.sync_bn and device.type != "cuda":
        raise UserError("--sync-bn works on CUDA only: omit it")
    with Run(args, script, make_step.columns) as run:
        data = list_files(args.data_dir, args.subset, args.test_subset)
        run.check_data(data.fingerprint, len(data.train))
        with user_errors():
            step = make_step(args, data)
        student, teacher = step.student, step.teacher
        ranks = f"{world_size()} rank{'s' * (world_size() > 1)}"
        print(f"{step.name}: {data}; {describe_device(args)}; {ranks}; {args.out}", *step.notes, sep="\n")
        if teacher and not run.resumed and rank() == 0:  # distribute() copies it to the other ranks
            load_teacher(teacher, args, len(data.classes))

        if args.sync_bn and world_size() > 1:
            step = nn.SyncBatchNorm.convert_sync_batchnorm(step)
        for net in filter(None, (student, teacher)):
            track_paths(net, sorted({path.k for path in step.candidates}))
        step.to(device, memory_format=torch.channels_last)
        parameters = [p for p in step.parameters() if p.requires_grad]
        optimizer = sgd(parameters, args.lr, **step.sgd_options)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        # What last.pt holds; it is restored here if the run is resumed.
        run.track(**dict(step.named_children()), optimizer=optimizer, scaler=scaler)
        distributed = distribute(step, some_unused=step.some_unused)

        shard = Shard(len(data.train), args.batch_size, args.seed, rank(), world_size())
        batches = train_loader(ImageFiles(data.train, args.image_size, args.seed), shard, args.workers, device)
        tests = eval_loader(ImageFiles(data.test, args.image_size), args.workers, device, rank(), world_size())
        if teacher:
            tested = run.state["teacher_accuracy"] or evaluate_distributed(teacher, tests, device)
            run.state["teacher_accuracy"] = tested
            print(f"teacher: {tested['top1']:.2f} % top-1 before distillation", flush=True)

        silent = None if rank() == 0 else True  # None: show the bar only in a terminal
        for epoch in run.epochs():
            shard.epoch = epoch
            lr, weights, extras = step.epoch(shard)
            optimizer.param_groups[0]["lr"] = lr
            for name, net in run.networks.items():
                net.train(name != "teacher" or args.teacher_bn == "batch")
            meter = Meter(device)
            progress = tqdm(batches, f"epoch {epoch + 1}", len(shard), leave=False, disable=silent)
            for (images, labels), extra, size in zip(progress, extras, shard.sizes, strict=True):
                terms, correct = distributed(images, labels, extra)  # for FCFD, the sampled paths S
                # Terms are means over this rank's images. DDP averages over ranks, one of which may have fewer images.
                share = len(labels) / size
                loss = share * sum(weights[name] * term for name, term in terms.items())  # Eq. 9

                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss * world_size()).backward()
                scaler.step(optimizer)
                scaler.update()
                meter.add(len(labels), loss, **{name: share * term for name, term in terms.items()}, correct=correct)
            run.finish_steps(meter, batches.waited)
            run.end_epoch(meter, lr, student=evaluate_distributed(student, tests, device))


def evaluate_distributed(net: StagedNet, batches: Iterable, device: torch.device) -> dict[str, float]:
    """Accuracy on the test images, which are split among the ranks."""
    return accuracy(all_reduce(count_hits(net, batches).to(device)))


def evaluate_checkpoint(args: Namespace) -> None:
    """--evaluate: print the accuracy of a checkpoint on the test images."""
    if world_size() > 1:
        raise UserError("--evaluate runs in one process: start it without torchrun")
    device = open_device(args.device)
    samples, classes = list_test_files(args.data_dir, args.test_subset)
    net = build_imagenet(args.student, len(classes))
    load_network(net, args.evaluate, args.student)
    net.to(device, memory_format=torch.channels_last)
    tested = evaluate_distributed(net, eval_loader(ImageFiles(samples, args.image_size), args.workers, device), device)
    print(f"{args.student} {tested['top1']:.2f} % top-1, {tested['top5']:.2f} % top-5 on {len(samples)} test images")


def main(argv: list[str] | None = None) -> int:
    """Train or evaluate, and return the exit code."""

    def script() -> None:
        args = parse_args(argv)
        if args.evaluate:
            return evaluate_checkpoint(args)
        with process_group(args.device) as name:
            device = open_device(name)
            if args.resume:
                args = parse_args(argv, stored_options(args, "imagenet") | {"device": args.device})
            train(args, device)

    return exit_code(script, rank=rank())


if __name__ == "__main__":
    sys.exit(main())
