"""FCFD on ImageNet (Sec. 3.1, Tab. 2), or on any folder of images: distil a teacher, or train one network alone.

    python imagenet.py --data-dir DIR --teacher resnet34 --student resnet18     torchvision's weights teach
    python imagenet.py --data-dir DIR --student resnet34                        train a network alone
    python imagenet.py --data-dir DIR --student resnet18 --evaluate FILE        test a checkpoint
    torchrun --nproc_per_node=8 imagenet.py ...                                 on eight GPUs

DIR holds train/<class>/*.JPEG and val/<class>/*.JPEG. The method itself is in common/fcfd.py. Here, from top to bottom:
the settings, the networks, one step, the training loop, and what a call of the script does with them. With several
processes (ranks) each reads its share of every batch and DistributedDataParallel averages the gradients; rank 0 alone
writes.
"""

import math
import os
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.bridges import Bridges, connect
from common.data.image_files import DeviceBatches, FileData, ImageFiles, Shard, eval_loader, list_files, train_loader
from common.fcfd import TERMS, fcfd_terms, forward_paths
from common.models import IMAGENET_NETWORKS, StagedNet, build_imagenet, check_name
from common.multipath_bn import plain_state_dict, track_paths
from common.paths import MixedPath, sample_paths
from common.run import folder as run_folder
from common.run.checkpoint import load_network, torchvision_weights
from common.run.device import AMP, num_cores, open_device
from common.run.distributed import all_reduce, broadcast, broadcast_buffers, distribute, process_group, rank, world_size
from common.run.errors import LossNotFiniteError, OtherNetworkError, UserError, exit_code
from common.run.evaluation import accuracy, count_hits
from common.run.optimizer import sgd
from common.run.options import ALL_SETTINGS, Parser, check_ranges, fill, term_weights

SETTINGS = ALL_SETTINGS["imagenet"]
METHODS = {"kd": ("task", "kd"), "app": ("task", "kd", "app"), "fcfd": TERMS}  # the terms that each one weighs
DISTILLATION = ("method", "teacher_ckpt", "teacher_bn", "temperature", "num_paths", "positions")
DISTILLATION += tuple(f"w_{term}" for term in TERMS)  # the settings without a meaning for a network alone


# --------------------------------------------------------------------------------------------------- settings


def parse_args(argv: list[str] | None) -> dict:
    """The options that were given, and no others."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data-dir", metavar="DIR", help="holds train/ and val/ or test/ (default: data/imagenet)")
    add("--teacher", metavar="NAME", help="without it --student is trained alone")
    add("--student", metavar="NAME", required=True)
    add("--method", choices=METHODS, help="fcfd (default), kd: L_task + L_kd, app: adds L_app")
    add("--teacher-ckpt", metavar="FILE", help="default: torchvision's IMAGENET1K_V1")
    add("--teacher-bn", choices=("batch", "running"), help="statistics behind p_t and F_t (default: batch)")
    for term in TERMS:
        add(f"--w-{term.replace('_', '-')}", type=float, metavar="W", help=f"weight of {term}; 0 leaves it out")
    add("--temperature", type=float, metavar="T", help="of every KL term (default: 1)")
    add("--num-paths", type=int, metavar="N", help="|S|, the mixed paths drawn in a step (default: 2)")
    add("--positions", type=int, nargs="+", metavar="K", help="stages that mixed paths leave (default: 2..N-1)")
    add("--image-size", type=int, metavar="PIXELS", help="default: 224")
    add("--subset", type=int, metavar="N", help="train on N images, spread evenly over the classes")
    add("--test-subset", type=int, metavar="N", help="test on N images, spread evenly over the classes")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read images, for each rank (default: its cores, 16 at most)",
    )
    add("--epochs", type=int, metavar="N", help="default: 100; the milestones scale with it")
    add("--batch-size", type=int, metavar="N", help="of all ranks together (default: 256)")
    add("--lr", type=float, help="default: 0.1")
    add("--sync-bn", action="store_true", help="BatchNorm sees the images of all ranks, not of its own (CUDA alone)")
    parser.add_run_options()
    add("--evaluate", metavar="CKPT", help="only test this checkpoint of --student")
    return parser.given(argv)


def settle(given: dict, stored: dict) -> Namespace:
    """All settings of a run: as given, else as stored by the run that is resumed, else the paper's.

    Raises:
        UserError: one is out of range, or contradicts the others.
    """
    c = Namespace(**{**SETTINGS["defaults"], **stored, **given})
    for name in filter(None, (c.student, c.teacher)):
        check_name(name, IMAGENET_NETWORKS)
    if c.teacher:
        pair = SETTINGS["pairs"].get(f"{c.teacher}-{c.student}", SETTINGS["other"])
        c.method = c.method or SETTINGS["defaults"]["method"]
        weights, chosen = term_weights(pair), METHODS[c.method]
    else:
        if misplaced := [key for key in DISTILLATION if key in given]:
            raise UserError(f"--{misplaced[0].replace('_', '-')} is about distillation: name the --teacher too")
        c.method, c.teacher_bn, pair = None, None, {"temperature": None}
        weights, chosen = {"task": 1}, ("task",)

    c.positions = c.positions and sorted(set(c.positions))
    fill(c, {f"w_{term}": weights[term] if term in chosen else 0 for term in TERMS})
    fill(c, {"temperature": pair["temperature"], "device": "cuda" if torch.cuda.is_available() else "cpu"})
    c.amp = c.amp or ("fp16" if c.device.startswith("cuda") else "off")
    c.out = c.out or f"runs/{run_name(c)}"
    fill(c, {"workers": min(16, max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))})
    check_ranges(c)
    if c.batch_size < 2 * world_size():
        raise UserError(
            f"--batch-size {c.batch_size}: it must leave each of the {world_size()} ranks at least two images"
        )
    if c.sync_bn and not c.device.startswith("cuda"):
        raise UserError("--sync-bn works on CUDA alone: leave it out")
    return c


def run_name(c: Namespace) -> str:
    """The name of a run's folder where none is given."""
    data = Path(c.data_dir).resolve().name + (f"-subset{c.subset}" if c.subset else "")
    size = "" if c.image_size == SETTINGS["defaults"]["image_size"] else f"-{c.image_size}px"
    networks = f"{c.teacher}-{c.student}-{c.method or 'fcfd'}" if c.teacher else f"{c.student}-alone"
    return f"{data}{size}-{networks}-{c.epochs}ep-seed{c.seed}"


def learning_rate(c: Namespace, epoch: int) -> float:
    """lr, times 0.1 at each milestone; the milestones 30, 60, 90 of 100 epochs scale with the epochs."""
    return c.lr / 10 ** sum(epoch >= round(milestone / 100 * c.epochs) for milestone in SETTINGS["milestones"])


def l2_warmup(c: Namespace, epoch: int) -> float:
    """The factor on the weight of every L2 term: linear over 5 epochs, or a twentieth of a shorter run."""
    return min(1.0, (epoch + 1) / (SETTINGS["warmup_epochs"] * min(1, c.epochs / 100)))


# --------------------------------------------------------------------------------------------------- networks


def build_networks(c: Namespace, num_classes: int):
    """(student, teacher, bridges, candidate paths), None where not wanted; settles c.num_paths and c.positions."""
    torch.manual_seed(c.seed)  # the same seed starts every method from the same student
    student = build_imagenet(c.student, num_classes)
    if not c.teacher:
        return student, None, None, []
    teacher = build_imagenet(c.teacher, num_classes).requires_grad_(False)
    return student, teacher, *connect(c, teacher, student, c.image_size)


def load_teacher(teacher: StagedNet, c: Namespace, num_classes: int) -> None:
    """Load --teacher-ckpt, or torchvision's weights.

    Raises:
        UserError: what is wrong with the file or the download; it is of other classes.
    """
    remedy = f"train one on these images by: python imagenet.py --data-dir {c.data_dir} --student {c.teacher}"
    if not c.teacher_ckpt and (num_classes != 1000 or c.teacher == "MobileNetV1"):
        raise UserError(f"torchvision has no {c.teacher} of {num_classes} classes: give --teacher-ckpt, or {remedy}")
    file = c.teacher_ckpt or torchvision_weights(c.teacher, "IMAGENET1K_V1")
    try:
        load_network(teacher, file, c.teacher)
    except OtherNetworkError as error:
        raise UserError(f"{error}; {remedy}") from error
    except UserError as error:
        raise UserError(f"{error}" if c.teacher_ckpt else f"{error}; deleted, it is downloaded again") from error
    print(f"teacher: {file}")


# --------------------------------------------------------------------------------------------------- one step


class Step(nn.Module):
    """From images to terms, in one forward: DistributedDataParallel sees to the gradients of what goes through it."""

    def __init__(self, c: Namespace, student: StagedNet, teacher: StagedNet | None, bridges: Bridges | None):
        super().__init__()
        self.student, self.teacher, self.bridges = student, teacher, bridges
        self.amp, self.temperature = AMP[c.amp], c.temperature
        self.terms = tuple(term for term in TERMS if getattr(c, f"w_{term}"))

    def forward(self, images: Tensor, labels: Tensor, paths: list[MixedPath]) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of Eq. 9 before weighting, as means over these images, and how many the student has right."""
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            if self.teacher:
                app = "app" in self.terms
                flow = forward_paths(self.teacher, self.student, self.bridges, images, paths, app)
                logits = flow.student_logits
            else:
                logits = self.student(images)
        if self.teacher:
            terms = fcfd_terms(flow, labels, self.temperature, self.terms)
        else:
            terms = {"task": F.cross_entropy(logits.float(), labels)}
        return terms, (logits.detach().argmax(1) == labels).sum()


# --------------------------------------------------------------------------------------------------- training


def train(
    c: Namespace, step: Step, candidates: list[MixedPath], data: FileData, state: dict | None, deadline: float
) -> bool:
    """Train from `state` (None: from the start) to the last epoch; False if `deadline` passed before that."""
    device, out, cuda = next(step.parameters()).device, Path(c.out), c.device.startswith("cuda")
    student, teacher = step.student, step.teacher
    nets = {"student": student, "teacher": teacher, "bridges": step.bridges}
    nets = {name: net for name, net in nets.items() if net is not None}
    shard = Shard(len(data.train), c.batch_size, c.seed, rank(), world_size())
    batches = train_loader(ImageFiles(data.train, c.image_size, c.seed), shard, c.workers, device)
    tests = eval_loader(ImageFiles(data.test, c.image_size), c.workers, device, rank(), world_size())

    parameters = [p for p in step.parameters() if p.requires_grad]
    optimizer = sgd(parameters, c.lr, momentum=0.9, weight_decay=1e-4, nesterov=True, fused=cuda)
    scaler = torch.amp.GradScaler(device.type, enabled=c.amp == "fp16")
    if state:
        run_folder.restore(out, state, {**nets, "optimizer": optimizer, "scaler": scaler})
        optimizer.param_groups[0]["fused"] = cuda  # the device may be another one
        if rank() == 0:
            run_folder.publish(out, state, {"student": plain_state_dict(student)})
    else:
        state = {"config": vars(c), "epoch": 0, "log": [], "best": {"top1": -1.0}, "teacher_accuracy": None}
    all_used = not step.bridges or (c.w_app and (c.w_task or c.w_kd) and c.num_paths == len(candidates))
    distributed = distribute(step, some_unused=not all_used)
    if teacher:
        if not state["epoch"]:
            state["teacher_accuracy"] = evaluate_by_all(teacher, tests, device)
        print(f"teacher: {state['teacher_accuracy']['top1']:.2f} % top-1 before distillation", flush=True)

    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    weights = {term: getattr(c, f"w_{term}") for term in step.terms}
    sizes = shard.sizes
    steps, seen = len(sizes), sum(sizes)
    for epoch in range(state["epoch"], c.epochs):
        began = time.monotonic()
        lr = optimizer.param_groups[0]["lr"] = learning_rate(c, epoch)
        warmed = {term: w * l2_warmup(c, epoch) if term in ("app", "func_l2") else w for term, w in weights.items()}
        paths = sample_paths(candidates, c.num_paths or 0, steps, c.seed, epoch)  # the same on every rank
        for name, net in nets.items():
            net.train(name != "teacher" or c.teacher_bn == "batch")

        # What is to be known of a step is summed on the device until the end, for the host does not wait there for it.
        sums = dict.fromkeys(("loss", *weights, "correct", "bad_steps"), torch.zeros((), device=device))
        shard.epoch = epoch
        bar = tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, disable=None if rank() == 0 else True)
        for i, (images, labels) in enumerate(bar):
            terms, correct = distributed(images, labels, paths[i])
            # A term is the mean over this rank's images. DDP averages over ranks, one of which may have an image less.
            share = len(labels) / sizes[i]
            loss = share * sum(warmed[term] * value for term, value in terms.items())  # Eq. 9

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss * world_size()).backward()
            scaler.step(optimizer)
            scaler.update()

            with torch.no_grad():
                sums["loss"] = sums["loss"] + loss
                sums["correct"] = sums["correct"] + correct
                sums["bad_steps"] = sums["bad_steps"] + ~loss.isfinite()
                for term, value in terms.items():
                    sums[term] = sums[term] + share * value

        totals = all_reduce(torch.stack([value.float() for value in sums.values()])).tolist()
        waited = all_reduce(
            torch.tensor(batches.waited, device=device), largest=True
        ).item()  # they wait for each other
        sums = dict(zip(sums, totals, strict=True))
        broadcast_buffers(nets.values())
        if sums["bad_steps"]:
            raise LossNotFiniteError(
                f"in epoch {epoch + 1}, in {sums['bad_steps']:.0f} of {steps * world_size()} steps"
            )
        if not all(tensor.isfinite().all() for net in nets.values() for tensor in net.state_dict().values()):
            raise LossNotFiniteError(f"in the last step of epoch {epoch + 1}")
        training_seconds = time.monotonic() - began
        tested = evaluate_by_all(student, tests, device)
        row = {
            "epoch": epoch + 1,
            "lr": lr,
            "loss": sums["loss"] / steps,
            **{term: sums[term] / steps if term in sums else "" for term in TERMS},
            "train_top1": 100 * sums["correct"] / seen,
            "test_top1": tested["top1"],
            "test_top5": tested["top5"],
            "seconds": time.monotonic() - began,
            "images_per_s": seen / training_seconds,
            "waiting_percent": 100 * waited / training_seconds,
            "peak_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20 if cuda else "",
        }
        state["log"].append(row)
        state["epoch"] = epoch + 1
        if tested["top1"] > state["best"]["top1"]:
            state["best"] = {"epoch": epoch + 1, **tested}
        if rank() == 0:
            state |= {name: net.state_dict() for name, net in nets.items()}
            state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            state["made_with"] = run_folder.made_with(device) | {"ranks": world_size()}
            run_folder.save_run(out, state, {"student": plain_state_dict(student)})
            run_folder.print_epoch(state)
        if broadcast(time.monotonic() > deadline, device) and epoch + 1 < c.epochs:
            print(f"stopped after {epoch + 1} of {c.epochs} epochs (--max-minutes): repeat the command with --resume")
            return False
    if rank() == 0:
        run_folder.report(state)
    return True


def evaluate_by_all(net: StagedNet, batches: DeviceBatches, device: torch.device) -> dict[str, float]:
    """Accuracies on the test images, of which each rank counts its own."""
    return accuracy(all_reduce(count_hits(net, batches).to(device)))


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
        device = open_device(name)
        with run_folder.open_run(out, resume, c.script) if rank() == 0 else nullcontext() as state:
            state = broadcast(state, device)
            stored = state["config"] if state else {}
            c = settle(given | {"out": str(out), "device": c.device, "workers": c.workers}, stored)
            run_folder.check_settings(stored, vars(c))
            data = list_files(c.data_dir, c.subset, c.test_subset)
            if broadcast(data.fingerprint, device) != data.fingerprint:
                raise UserError(f"{c.data_dir} holds other images here than where rank 0 runs: copy the same set there")
            if c.batch_size > len(data.train):
                raise UserError(f"--batch-size {c.batch_size}: there are only {len(data.train)} training images")
            c.fingerprint = data.fingerprint
            student, teacher, bridges, candidates = build_networks(c, len(data.classes))
            run_folder.check_settings(stored, vars(c))  # now with what follows from data and networks

            task = f"{c.student} from {c.teacher} by {c.method}" if c.teacher else f"{c.student} alone"
            size = f"{len(data.train)} training and {len(data.test)} test images in {len(data.classes)} classes"
            ranks = (
                f"{world_size()} ranks, {c.batch_size / world_size():g} images each" if world_size() > 1 else c.device
            )
            print(f"{task}, {c.epochs} epochs on {c.data_dir}: {size}; {ranks}, amp {c.amp}; {c.out}")
            if c.teacher:
                if f"{c.teacher}-{c.student}" not in SETTINGS["pairs"]:
                    print(f"{c.teacher}-{c.student} is no published pair: settings not given may not suit it")
                weights = ", ".join(f"{term} {getattr(c, f'w_{term}'):g}" for term in TERMS)
                print(f"temperature {c.temperature:g}, weights: {weights}; {c.num_paths} of {len(candidates)} paths")
            if state:
                state["config"] = vars(c)
            elif teacher and rank() == 0:  # the others get it with everything else
                load_teacher(teacher, c, len(data.classes))
            step = Step(c, student, teacher, bridges)
            if c.sync_bn and world_size() > 1:
                step = nn.SyncBatchNorm.convert_sync_batchnorm(step)
            if teacher:
                for net in (student, teacher):
                    track_paths(net, sorted({path.k for path in candidates}))
            step.to(device, memory_format=torch.channels_last)
            return train(c, step, candidates, data, state, deadline)


def evaluate_checkpoint(given: dict) -> None:
    """--evaluate: print the accuracy of a checkpoint on the test images."""
    if world_size() > 1:
        raise UserError("--evaluate takes one process: start it without torchrun")
    c = settle(given, {})
    data, device = list_files(c.data_dir, None, c.test_subset), open_device(c.device)
    net = build_imagenet(c.student, len(data.classes))
    load_network(net, given["evaluate"], c.student)
    net.to(device, memory_format=torch.channels_last)
    tested = evaluate_by_all(net, eval_loader(ImageFiles(data.test, c.image_size), c.workers, device), device)
    print(f"{c.student} {tested['top1']:.2f} % top-1, {tested['top5']:.2f} % top-5 on {len(data.test)} test images")


def main(argv: list[str] | None = None) -> int:
    """Parse, then evaluate or run; the exit code is that of `exit_code`."""

    def script() -> None:
        given = parse_args(argv)
        resume = given.pop("resume", False)
        if "evaluate" in given:
            evaluate_checkpoint(given)
        else:
            run(given, resume, deadline=time.monotonic() + 60 * given.get("max_minutes", math.inf))

    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  rank 0 speaks for all
    return exit_code(script, rank=rank())


if __name__ == "__main__":
    sys.exit(main())
