"""The published methods that FCFD is compared with, by the settings of their own field.

    python ablations/train_baseline.py --method reviewkd --teacher resnet32x4 --student resnet8x4     or crd, or simkd
    python ablations/train_baseline.py --smoke                       all three, the whole way with two small networks

ReviewKD  Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021
CRD       Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020
SimKD     Chen, Mei, Zhang, Wang, Feng, Chen: Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022

All are trained as the field's benchmarks do it: SGD with momentum 0.9, without Nesterov; weight decay 5e-4; the teacher
frozen and in evaluation mode; cross entropy + weight * the method's loss, no KD term, and SimKD's loss alone.

The teacher is found, or trained first by cifar100.py, whose options and files these are. `cifar100.py --student NAME
--evaluate FILE` tests a student, with --simkd and --teacher NAME if it is SimKD's.

ReviewKD and CRD are in ablations/baselines/, SimKD's projector in common/simkd.py: each can be taken out by
itself. Here, from top to bottom: a step of any of them, the settings, the networks, the training loop.
"""

import glob
import math
import sys
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import cifar100
from ablations.baselines.crd import CRD
from ablations.baselines.reviewkd import ReviewKD
from common.bridges import feature_shapes
from common.data.batches import SIZE, Data, ImageSet, eval_batches, train_batches
from common.data.sources import load_data
from common.losses import l2
from common.models import StagedNet, build, check_name
from common.randomness import seed_of
from common.run import earlier_runs
from common.run import folder as run_folder
from common.run.checkpoint import load_network
from common.run.device import AMP, open_device
from common.run.errors import LossNotFiniteError, UserError, exit_code
from common.run.evaluation import evaluate
from common.run.optimizer import sgd
from common.run.options import ALL_SETTINGS, Parser, check_ranges, fill
from common.simkd import SimKDStudent, build_simkd, cost_line

SETTINGS = ALL_SETTINGS["baselines"]
DEFAULTS = SETTINGS["defaults"]
PUBLISHED = ALL_SETTINGS["cifar100"]  # the pairs, and the learning rates
METHODS = tuple(SETTINGS["weights"])
TERMS = ("task", "distill")
SMOKE = ["--teacher", "resnet14", "--student", "resnet8", "--dataset", "synthetic", "--epochs", "1"]
SMOKE += ["--subset", "40", "--test-subset", "40", "--batch-size", "20", "--out", "results/baselines/smoke"]


# ----------------------------------------------------------------------------------------------------- a step


class SimKD(nn.Module):
    """L2 between the student's projected last feature and the teacher's; the projector is the student's own."""

    def forward(self, student: SimKDStudent, projected: Tensor, feature_t: Tensor) -> Tensor:
        """The mean over all elements; F_s^N as projected, and F_t^N, which is detached, [B, C, H, W] each."""
        return l2(projected, student.last_target(feature_t, projected))


def build_method(
    name: str, teacher: StagedNet, student: StagedNet, labels: Tensor, image_size: int
) -> ReviewKD | CRD | SimKD:
    """The module of a method, with fresh weights from PyTorch's global generator, on the CPU.

    Args:
        student: as `build_networks` gives it; for "simkd" it has its projector already.
        labels: [n], of all training images.

    Raises:
        UserError: as the method's class.
    """
    shapes_s, shapes_t = (feature_shapes(net, image_size) for net in (student, teacher))
    if name == "reviewkd":
        return ReviewKD(shapes_s, shapes_t)
    if name == "crd":
        return CRD(shapes_s[student.num_stages][0], shapes_t[teacher.num_stages][0], labels)
    return SimKD()


def terms(
    method: ReviewKD | CRD | SimKD,
    teacher: StagedNet,
    student: StagedNet,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor]:
    """The unweighted terms of a step, "task" (SimKD has none) and "distill", and the student's logits [B, classes].

    May run under autocast. With CRD it moves the banks, as a step does.

    Args:
        images, labels: [B, 3, H, W] and [B].
        index: [B], which training images these are.
        generator: for CRD's negatives, on the images' device.
    """
    with torch.no_grad():
        features_t = teacher.features(images)
    features_s = student.features(images)
    logits = student.classify(features_s[-1])
    if isinstance(method, SimKD):
        return {"distill": method(student, features_s[-1], features_t[-1])}, logits
    if isinstance(method, CRD):
        distill = method(features_s[-1], features_t[-1], index, method.draw(index, generator))
    else:
        distill = method(features_s, features_t)
    return {"task": F.cross_entropy(logits.float(), labels), "distill": distill}, logits


# --------------------------------------------------------------------------------------------------- settings


def parse_args(argv: list[str] | None) -> dict:
    """The options that were given, and no others; --smoke gives some itself, before those."""
    argv = sys.argv[1:] if argv is None else argv
    smoke = "--smoke" in argv
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", metavar="NAME", required=True)
    add("--student", metavar="NAME", required=True)
    add("--method", choices=METHODS, required=not smoke)
    add("--weight", type=float, metavar="W", help="of the method's loss (default: as published for the pair)")
    add("--teacher-ckpt", metavar="FILE", help="default: an earlier run's beside --out, else it is trained first")
    add("--teacher-epochs", type=int, metavar="N", help="of a teacher that is trained first (default: --epochs)")
    parser.add_image_set_options()
    add("--epochs", type=int, metavar="N", help="default: 240; the milestones scale with it")
    add("--batch-size", type=int, metavar="N", help="default: 64")
    add("--lr", type=float, help="default: the student's in common/published.yaml")
    parser.add_run_options()
    add(
        "--smoke", action="store_true", help="the whole way with two small networks, in seconds; by default each method"
    )
    return parser.given([*SMOKE, *argv] if smoke else argv)


def settle(given: dict, stored: dict) -> Namespace:
    """All settings of a run: as given, else as stored by the run that is resumed, else as published.

    Raises:
        UserError: one is out of range, or contradicts the others.
    """
    c = Namespace(**{**DEFAULTS, **stored, **given})
    for name in (c.student, c.teacher):
        check_name(name)
    if "teacher_ckpt" in given and "teacher_epochs" in given:
        raise UserError("--teacher-epochs is of a teacher trained first, not of --teacher-ckpt: give one of them")
    weights = SETTINGS["weights"][c.method]
    follows = {"weight": weights.get(f"{c.teacher}-{c.student}", weights["other"]), "teacher_epochs": c.epochs}
    follows["lr"] = PUBLISHED["lr"].get(c.student, PUBLISHED["lr"]["other"])
    follows |= {"device": "cuda" if torch.cuda.is_available() else "cpu", "out": f"runs/{run_name(c)}"}
    fill(c, follows)
    c.amp = c.amp or ("fp16" if c.device.startswith("cuda") else "off")
    check_ranges(c)
    if c.method == "simkd" and not c.weight:
        raise UserError("--weight 0: SimKD has no other term to train on, it must be above 0")
    return c


def run_name(c: Namespace) -> str:
    """The name of a run's folder where none is given."""
    return cifar100.run_name(Namespace(**vars(c), kd_loss="kl", simkd=False))


# --------------------------------------------------------------------------------------------------- networks


def build_networks(c: Namespace, num_classes: int) -> tuple[StagedNet, StagedNet]:
    """(student, teacher); the teacher is frozen, and SimKD's student has its projector and the teacher's classifier.

    Raises:
        UserError: ReviewKD is wanted, and the networks have different numbers of stages.
    """
    torch.manual_seed(c.seed)  # the same seed starts the same student, here by every method and in cifar100.py
    student, teacher = build(c.student, num_classes), build(c.teacher, num_classes).requires_grad_(False)
    if c.method == "simkd":
        student = build_simkd(student, teacher, SIZE)
    if c.method == "reviewkd":
        ReviewKD(*(feature_shapes(net, SIZE) for net in (student, teacher)))  # complains now
    return student, teacher


def find_teacher(c: Namespace, data: Data, deadline: float) -> Path | None:
    """The teacher's file: as told, of an earlier run, or trained now by cifar100.py; None if time ran out."""
    if c.teacher_ckpt:
        print(f"teacher: {c.teacher_ckpt}, as told")
        return Path(c.teacher_ckpt)
    if found := earlier_runs.find_network(Path(c.out).parent, c.teacher, c.fingerprint, c.teacher_epochs):
        print(f"teacher: {found}, from an earlier run")
        return found
    return cifar100.train_teacher(c, data, deadline)


# --------------------------------------------------------------------------------------------------- training


def train(
    c: Namespace,
    data: Data,
    student: StagedNet,
    teacher: StagedNet,
    method: ReviewKD | CRD | SimKD,
    state: dict | None,
    deadline: float,
) -> bool:
    """Train from `state` (None: from the start) to the last epoch; False if `deadline` passed before that."""
    device, out = torch.device(c.device), Path(c.out)
    nets = {"student": student, "teacher": teacher, "method": method}
    channels_last = student.channels_last and teacher.channels_last
    for net in nets.values():
        net.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)

    cuda = device.type == "cuda"
    parameters = [p for net in nets.values() for p in net.parameters() if p.requires_grad]
    optimizer = sgd(parameters, c.lr, momentum=0.9, weight_decay=5e-4, fused=cuda)
    amp = AMP[c.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=c.amp == "fp16")

    if state:
        run_folder.restore(out, state, {**nets, "optimizer": optimizer, "scaler": scaler})
        optimizer.param_groups[0]["fused"] = cuda  # the device may be another one
        run_folder.publish(out, state, {"student": student.state_dict()})
    else:
        teacher_accuracy = evaluate(teacher, eval_batches(data.test, channels_last=channels_last))
        state = {"config": vars(c), "epoch": 0, "log": [], "best": {"top1": -1.0}, "teacher_accuracy": teacher_accuracy}
    print(f"teacher: {state['teacher_accuracy']['top1']:.2f} % top-1 before distillation")

    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    numbered = ImageSet(data.train.images, torch.arange(len(data.train), device=device))  # its labels are indices
    generator = torch.Generator(device)
    steps = math.ceil(len(data.train) / c.batch_size)
    for epoch in range(state["epoch"], c.epochs):
        began = time.monotonic()
        lr = optimizer.param_groups[0]["lr"] = cifar100.learning_rate(c, epoch)
        weights = {} if c.method == "simkd" else {"task": 1}
        weights["distill"] = c.weight * (cifar100.l2_warmup(c, epoch) if c.method == "reviewkd" else 1)
        generator.manual_seed(seed_of(c.seed, epoch, "negatives"))
        for name, net in nets.items():
            net.train(name != "teacher")

        # Nothing in a step makes the host wait for the device: what is to be known is summed there until the end.
        sums = dict.fromkeys(("loss", *weights, "correct"), torch.zeros((), device=device))
        bad_step = torch.full((), -1, device=device)
        batches = train_batches(numbered, c.batch_size, c.seed, epoch, channels_last)
        for step, (images, index) in enumerate(tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, disable=None)):
            labels = data.train.labels[index]
            with torch.autocast(device.type, amp, enabled=amp is not None):
                losses, logits = terms(method, teacher, student, images, labels, index, generator)
            loss = sum(weights[term] * value for term, value in losses.items())

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            with torch.no_grad():
                for name, value in (("loss", loss), *losses.items(), ("correct", (logits.argmax(1) == labels).sum())):
                    sums[name] = sums[name] + value
                bad_step = torch.where((bad_step < 0) & ~loss.isfinite(), step, bad_step)

        if (bad := bad_step.item()) >= 0:
            raise LossNotFiniteError(f"in epoch {epoch + 1}, step {bad + 1}")
        if not all(tensor.isfinite().all() for net in nets.values() for tensor in net.state_dict().values()):
            raise LossNotFiniteError(f"in the last step of epoch {epoch + 1}")
        training_seconds = time.monotonic() - began
        accuracy = evaluate(student, eval_batches(data.test, channels_last=channels_last))
        row = {
            "epoch": epoch + 1,
            "lr": lr,
            "loss": sums["loss"].item() / steps,
            **{term: sums[term].item() / steps if term in sums else "" for term in TERMS},
            "train_top1": 100 * sums["correct"].item() / len(data.train),
            "test_top1": accuracy["top1"],
            "test_top5": accuracy["top5"],
            "seconds": time.monotonic() - began,
            "images_per_s": len(data.train) / training_seconds,
            "peak_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20 if cuda else "",
        }
        state["log"].append(row)
        state["epoch"] = epoch + 1
        if accuracy["top1"] > state["best"]["top1"]:
            state["best"] = {"epoch": epoch + 1, **accuracy}
        state |= {name: net.state_dict() for name, net in nets.items()}
        state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        state["made_with"] = run_folder.made_with(device)
        run_folder.save_run(out, state, {"student": student.state_dict()})
        run_folder.print_epoch(state)
        if time.monotonic() > deadline and epoch + 1 < c.epochs:
            print(f"stopped after {epoch + 1} of {c.epochs} epochs (--max-minutes): repeat the command with --resume")
            return False
    run_folder.report(state)
    return True


# -------------------------------------------------------------------------------------------------------- run


def run(given: dict, resume: bool, deadline: float) -> bool:
    """One run from its settings to its files; False if `deadline` (of time.monotonic) came first.

    Raises:
        UserError: anything that is wrong with the input. All that can be checked is, before a teacher is trained.
        LossNotFiniteError: training diverged.
    """
    c = Namespace(**DEFAULTS | given)
    out = Path(c.out or f"runs/{run_name(c)}")
    if resume and not (out / "last.pt").exists():
        # Where only the teacher was begun, this run is a fresh one, and train_teacher resumes the teacher by itself.
        name = cifar100.teacher_name(c)
        folders = [out.parent / name, *out.parent.glob(f"{glob.escape(name)}-*")]
        resume = not any(map(earlier_runs.is_unfinished, folders))
    with run_folder.open_run(out, resume, c.script) as state:
        stored = state["config"] if state else {}
        c = settle(given | {"out": str(out)}, stored)
        run_folder.check_settings(stored, vars(c))
        device = open_device(c.device)
        data = load_data(c.dataset, c.data_dir, c.subset, c.test_subset)
        data.train, data.test = data.train.to(device), data.test.to(device)
        n = len(data.train)
        if c.batch_size > n:
            raise UserError(f"--batch-size {c.batch_size}: there are only {n} training images")
        if c.method == "reviewkd" and (c.batch_size == 1 or n % c.batch_size == 1):
            raise UserError(
                f"--batch-size {c.batch_size}: of {n} images it leaves a batch of one, which ReviewKD cannot normalise"
            )
        c.fingerprint = data.fingerprint
        student, teacher = build_networks(c, len(data.classes))
        method = build_method(c.method, teacher, student, data.train.labels, SIZE)

        size = f"{n} training and {len(data.test)} test images in {len(data.classes)} classes"
        print(
            f"{c.student} from {c.teacher} by {c.method}, {c.epochs} epochs on {c.dataset}: {size}; "
            f"{c.device}, amp {c.amp}; {c.out}"
        )
        if f"{c.teacher}-{c.student}" not in PUBLISHED["pairs"]:
            print(f"{c.teacher}-{c.student} is no published pair: settings not given are those of most pairs")
        print(f"lr {c.lr:g}, weight {c.weight:g}")
        if c.method == "simkd":
            print(cost_line(c.student, c.teacher, len(data.classes), SIZE))
        run_folder.check_settings(stored, vars(c))  # now with what follows from data and networks
        if state:
            state["config"] = vars(c)
        else:
            if not (file := find_teacher(c, data, deadline)):
                return False
            c.teacher_ckpt = str(file)
            load_network(teacher, c.teacher_ckpt, c.teacher)
        return train(c, data, student, teacher, method, state, deadline)


def main(argv: list[str] | None = None) -> int:
    """Parse and run; the exit code is that of `exit_code`."""

    def script() -> None:
        given = parse_args(argv)
        resume, smoke = (given.pop(option, False) for option in ("resume", "smoke"))
        deadline = time.monotonic() + 60 * given.get("max_minutes", math.inf)
        runs = [given]
        if smoke:
            methods = [given["method"]] if "method" in given else METHODS
            runs = [given | {"method": method, "out": str(Path(given["out"]) / method)} for method in methods]
        for options in runs:
            # What --smoke has done before is loaded and reported once more.
            run(options, (Path(options["out"]) / "last.pt").exists() if smoke else resume, deadline)

    return exit_code(script)


if __name__ == "__main__":
    sys.exit(main())
