"""Published methods to compare FCFD with, trained with the field's usual settings.

    python ablations/train_baseline.py --method reviewkd --teacher resnet32x4 --student resnet8x4   or crd, or simkd
    python ablations/train_baseline.py --smoke                                  all three, on small networks, in seconds

reviewkd  Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021
crd       Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020
simkd     Chen, Mei, Zhang, Wang, Feng, Chen: Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022

SGD has momentum 0.9, without Nesterov, and weight decay 5e-4. The teacher is frozen and in evaluation mode. The loss is
cross entropy + weight * the method's loss, without a KD term; SimKD has no cross entropy.

The teacher is found, or trained first by cifar100.py. To test a student, use `cifar100.py --student NAME --evaluate
FILE`, with --simkd and --teacher NAME if it is SimKD's. The methods are in ablations/baselines/.
"""

import math
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cifar100
from ablations.baselines.crd import CRD
from ablations.baselines.reviewkd import ReviewKD
from ablations.baselines.simkd import SimKD
from common.bridges import feature_shapes
from common.data.batches import SIZE, Data, ImageSet, eval_batches, train_batches
from common.data.sources import load_data
from common.models import NETWORKS, StagedNet, build
from common.randomness import derive_seed
from common.run import earlier_runs
from common.run.checkpoint import load_network
from common.run.cost import cost_line
from common.run.device import AMP, describe_device, open_device
from common.run.errors import UserError, exit_code, user_errors
from common.run.evaluation import evaluate
from common.run.optimizer import sgd
from common.run.options import PUBLISHED, Parser, set_defaults
from common.run.run import Meter, Run, stored_options
from common.run.types import count, name_in, positive, weight
from common.simkd import build_simkd

SETTINGS = PUBLISHED["cifar100"]
METHODS = tuple(PUBLISHED["baselines"])
SMOKE = ["--teacher", "resnet14", "--student", "resnet8", "--dataset", "synthetic", "--subset", "40", "--epochs", "1"]
SMOKE += ["--test-subset", "40", "--batch-size", "20", "--out", "results/baselines/smoke"]


def parse_args(argv: list[str] | None = None, stored: dict | None = None) -> Namespace:
    """Parse the options; defaults are those `stored` by the run being resumed, then the published settings.

    With --smoke, --method may be missing, so `smoke_runs` sets the defaults.
    """
    argv = sys.argv[1:] if argv is None else argv
    smoke = "--smoke" in argv
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", type=name_in(NETWORKS), required=True, metavar="NAME", help=", ".join(NETWORKS))
    add("--student", type=name_in(NETWORKS), required=True, metavar="NAME", help="as for --teacher")
    add("--method", choices=METHODS, required=not smoke, help="required without --smoke")
    add("--weight", type=weight, metavar="W", help="of the method's loss (default: the pair's)")
    add("--teacher-ckpt", metavar="FILE", help="default: an earlier run's next to --out, else it is trained first")
    add("--teacher-epochs", type=count, metavar="N", help="of a teacher that is trained first (default: --epochs)")
    add("--epochs", type=count, default=SETTINGS["epochs"], metavar="N", help="the schedule scales with it")
    add("--batch-size", type=count, default=SETTINGS["batch_size"], metavar="N", help="images per step")
    add("--lr", type=positive, help="default: the student's")
    add("--smoke", action="store_true", help="train two small networks with every method, or with --method")
    parser.add_data_options()
    parser.add_run_options()
    args = parser.parse([*SMOKE, *argv] if smoke else argv, stored)
    if smoke:
        return args

    name = cifar100.run_name(Namespace(**vars(args), kd_loss="kl", simkd=False))
    args.out = args.out or earlier_runs.default_out(name, args)
    if args.resume and stored is None:
        # If the run stopped while training its teacher, start the run and resume the teacher's training.
        if not earlier_runs.stopped_during_teacher(Path(args.out), cifar100.teacher_folder(args)):
            return parse_args(argv, stored_options(args, "baselines"))
        args.resume = False

    weights = PUBLISHED["baselines"][args.method]
    set_defaults(args, weight=weights.get(f"{args.teacher}-{args.student}", weights["other"]))
    set_defaults(args, lr=SETTINGS["lr"].get(args.student, SETTINGS["lr"]["other"]), teacher_epochs=args.epochs)
    if {"teacher_ckpt", "teacher_epochs"} <= args.given:
        parser.error("--teacher-epochs is for a teacher that is trained first: omit it, or --teacher-ckpt")
    if args.method == "simkd" and not args.weight:
        parser.error("--weight 0: SimKD has no other loss to train on, so it must be above 0")
    return args


def smoke_runs(args: Namespace, argv: list[str] | None) -> list[Namespace]:
    """The options of each run of --smoke. A run that is finished is only reported again."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("--smoke", "--resume")]
    runs = []
    for method in [args.method] if args.method else METHODS:
        out = Path(args.out) / method
        resume = ["--resume"] if (out / "last.pt").exists() else []
        runs.append(parse_args([*SMOKE, *words, f"--method={method}", f"--out={out}", *resume]))
    return runs


def warmup(args: Namespace, epoch: int) -> float:
    """The factor of the method's weight. ReviewKD's ramps up linearly during the warm-up, shorter in short runs."""
    if args.method != "reviewkd":
        return 1.0
    return min(1.0, (epoch + 1) / (SETTINGS["warmup_epochs"] * min(1, args.epochs / SETTINGS["epochs"])))


def build_networks(args: Namespace, num_classes: int) -> tuple[StagedNet, StagedNet]:
    """(student, teacher). The teacher is frozen. SimKD's student has its projector and the teacher's classifier.

    Raises:
        ValueError: the networks do not fit the method.
    """
    torch.manual_seed(args.seed)  # the same initial student for every method and in cifar100.py
    student, teacher = build(args.student, num_classes), build(args.teacher, num_classes).requires_grad_(False)
    if args.method == "simkd":
        student = build_simkd(student, teacher, SIZE)
    if args.method == "reviewkd":
        ReviewKD(feature_shapes(student, SIZE), feature_shapes(teacher, SIZE))  # raises if they do not fit
    return student, teacher


def build_method(name: str, teacher: StagedNet, student: StagedNet, labels: Tensor) -> ReviewKD | CRD | SimKD:
    """The method's module, initialized from PyTorch's global generator, on the CPU.

    Args:
        student, teacher: from `build_networks`.
        labels: [n], of all training images.

    Raises:
        ValueError: the networks or the labels do not fit the method.
    """
    if name == "simkd":
        return SimKD()
    shapes_s, shapes_t = feature_shapes(student, SIZE), feature_shapes(teacher, SIZE)
    if name == "reviewkd":
        return ReviewKD(shapes_s, shapes_t)
    return CRD(shapes_s[student.num_stages][0], shapes_t[teacher.num_stages][0], labels)


def terms(
    method: ReviewKD | CRD | SimKD,
    teacher: StagedNet,
    student: StagedNet,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor]:
    """The unweighted loss terms of a step, "task" (not with SimKD) and "distill", and the student's logits [B, K].

    Args:
        images, labels: [B, 3, H, W] and [B].
        index: [B], indices of these training images. CRD updates their rows in its banks.
        generator: samples CRD's negatives; on the images' device.
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


def train(args: Namespace, data: Data | None = None) -> bool:
    """Train until the last epoch or the time limit, and return whether training finished."""
    with Run(args, "baselines", columns=("task", "distill")) as run:
        device = open_device(args.device)
        data = data or load_data(args.dataset, args.data_dir, args.subset, args.test_subset).to(device)
        n, batch_size = len(data.train), args.batch_size
        run.check_data(data.fingerprint, n)
        if args.method == "reviewkd" and (batch_size == 1 or n % batch_size == 1):
            raise UserError(f"--batch-size {batch_size}: {n} images leave a batch of one for ReviewKD's BatchNorm")
        with user_errors():
            student, teacher = build_networks(args, len(data.classes))
            method = build_method(args.method, teacher, student, data.train.labels)
        task = f"{args.student} from {args.teacher} by {args.method}"
        print(f"{task}, {args.epochs} epochs on {args.dataset}: {data}; {describe_device(args)}; {args.out}")
        if f"{args.teacher}-{args.student}" not in SETTINGS["pairs"]:
            print(f"{args.teacher}-{args.student} is not a published pair; using the default settings")
        print(f"lr {args.lr:g}, weight {args.weight:g}")
        if args.method == "simkd":
            print(cost_line(args.student, args.teacher, len(data.classes), SIZE))
        if not run.resumed:
            args.teacher_ckpt = cifar100.find_teacher(args, data)
            if not args.teacher_ckpt:
                return False
            load_network(teacher, args.teacher_ckpt, args.teacher)

        networks = [student, teacher, method]
        for net in networks:
            net.to(device, memory_format=torch.channels_last)
        parameters = [p for net in networks for p in net.parameters() if p.requires_grad]
        optimizer = sgd(parameters, args.lr, momentum=0.9, weight_decay=5e-4)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        run.track(student=student, teacher=teacher, method=method, optimizer=optimizer, scaler=scaler)
        tested = run.state["teacher_accuracy"] or evaluate(teacher, eval_batches(data.test))
        run.state["teacher_accuracy"] = tested
        print(f"teacher: {tested['top1']:.2f} % top-1 before distillation", flush=True)

        indices = ImageSet(data.train.images, torch.arange(n, device=device))  # CRD needs them; they yield the labels
        generator = torch.Generator(device)
        steps = math.ceil(n / batch_size)
        for epoch in run.epochs():
            lr = optimizer.param_groups[0]["lr"] = cifar100.learning_rate(args, epoch)
            weights = {"task": 1, "distill": args.weight * warmup(args, epoch)}
            generator.manual_seed(derive_seed(args.seed, epoch, "negatives"))
            for net in networks:
                net.train(net is not teacher)
            batches = train_batches(indices, batch_size, args.seed, epoch)
            meter = Meter(device)
            for images, index in tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, disable=None):
                labels = data.train.labels[index]
                with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
                    losses, logits = terms(method, teacher, student, images, labels, index, generator)
                loss = sum(weights[name] * value for name, value in losses.items())

                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                meter.add(len(labels), loss, **losses, correct=(logits.argmax(1) == labels).sum())
            run.finish_steps(meter)
            run.end_epoch(meter, lr, student=evaluate(student, eval_batches(data.test)))
    return run.finished


def main(argv: list[str] | None = None) -> int:
    """Train, and return the exit code."""

    def script() -> None:
        args = parse_args(argv)
        for each in smoke_runs(args, argv) if args.smoke else [args]:
            train(each)

    return exit_code(script)


if __name__ == "__main__":
    sys.exit(main())
