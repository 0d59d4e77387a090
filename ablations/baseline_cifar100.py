"""The methods that FCFD is compared with on CIFAR-100 (Tab. 1, 4), each with its published settings.

    python ablations/baseline_cifar100.py --method reviewkd --teacher resnet32x4 --student resnet8x4
    python ablations/baseline_cifar100.py --method alone --student resnet8x4
    python ablations/baseline_cifar100.py --method simkd --teacher resnet32x4 --student resnet8x4 --evaluate FILE
    python ablations/baseline_cifar100.py --smoke              every method on two small networks, in seconds

Each method is one file in ablations/baselines/, and settings.yaml there holds the settings. The loss is --w-task *
cross entropy + --weight * the method's loss. See docs/baselines.md.

Without --teacher-ckpt, the teacher of an earlier run is used, or cifar100.py trains one first. Students other than
SimKD's are tested by cifar100.py --student NAME --evaluate FILE.
"""

import math
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import cifar100
from ablations.baselines import settings
from ablations.baselines.batch import Batch
from ablations.baselines.build import build_method, build_student
from common.data.batches import SIZE, Data, ImageSet, eval_batches, train_batches
from common.data.sources import load_data, load_test
from common.models import NETWORKS, StagedNet, build
from common.randomness import derive_seed
from common.run import earlier_runs
from common.run.checkpoint import load_network
from common.run.device import AMP, default_device, describe_device, open_device
from common.run.errors import UserError, exit_code, user_errors
from common.run.evaluation import evaluate
from common.run.optimizer import sgd
from common.run.options import Parser, set_defaults
from common.run.run import Meter, Run, stored_options
from common.run.types import count

METHODS = settings.METHODS["cifar100"]
SMOKE = ["--student", "resnet8", "--dataset", "synthetic", "--subset", "40", "--test-subset", "40"]
SMOKE += ["--batch-size", "20"]


def parse_args(argv: list[str] | None = None, stored: dict | None = None) -> Namespace:
    """Parse the options; defaults are those `stored` by the run being resumed, then the published settings."""
    parser = Parser(__doc__)
    distillation = settings.add_options(parser, "cifar100", NETWORKS)
    add = distillation.add_argument
    add("--teacher-ckpt", metavar="FILE", help="default: an earlier run's next to --out, else it is trained first")
    add("--teacher-epochs", type=count, metavar="N", help="of a teacher that is trained first (default: --epochs)")
    add = parser.add_argument
    add("--evaluate", metavar="FILE", help="only test this student of --method simkd")
    add("--smoke", action="store_true", help="train two small networks with every method")
    parser.add_data_options()
    parser.add_run_options()
    args = parser.parse(argv, stored)

    set_defaults(args, epochs=settings.SETTINGS["cifar100"]["recipe"]["epochs"])  # for the name of the folder
    args.out = args.out or earlier_runs.default_out(run_name(args), args)
    if args.resume and stored is None:
        # If the run stopped while training its teacher, start the run and resume the teacher's training.
        if not (args.teacher and earlier_runs.stopped_during_teacher(Path(args.out), cifar100.teacher_folder(args))):
            return parse_args(argv, stored_options(args, "baseline_cifar100"))
        args.resume = False

    settings.resolve(args, "cifar100", parser, distillation, stored)
    if args.evaluate and args.method != "simkd":
        parser.error("--evaluate is only for simkd: test others by cifar100.py --student NAME --evaluate FILE")
    if args.teacher:
        set_defaults(args, teacher_epochs=args.epochs)
    if {"teacher_ckpt", "teacher_epochs"} <= args.given:
        parser.error("--teacher-epochs and --teacher-ckpt exclude each other: omit one")
    return args


def run_name(args: Namespace) -> str:
    """The name of the default output folder."""
    if args.teacher:
        names = {"method": f"baseline-{args.method}", "kd_loss": "kl", "simkd": False}
    else:
        names = {"student": f"{args.student}-baseline"}
    return cifar100.run_name(Namespace(**vars(args) | names))


def build_networks(args: Namespace, num_classes: int) -> tuple[nn.Module, StagedNet | None]:
    """(student, frozen teacher or None). SimKD's student has its projector and the teacher's classifier.

    Raises:
        ValueError: the networks do not fit the method.
    """
    torch.manual_seed(args.seed)  # the same initial student for every method and in cifar100.py
    student, teacher = build(args.student, num_classes), None
    if args.teacher:
        teacher = build(args.teacher, num_classes).requires_grad_(False)
    return build_student(student, teacher, args.method, SIZE), teacher


def loss_terms(
    method: nn.Module | None,
    student: nn.Module,
    teacher: StagedNet | None,
    images: Tensor,
    batch: Batch,
    args: Namespace,
) -> tuple[dict[str, Tensor], Tensor]:
    """The unweighted loss terms of a step, and the student's logits.

    "task" is omitted if --w-task is 0, and "distill" without a method. images: [B, 3, H, W].
    """
    own = student.taps(images, args.student_pre_relu)
    terms = {"task": F.cross_entropy(own.logits.float(), batch.labels)} if args.w_task else {}
    if method:
        with torch.no_grad():
            target = teacher.taps(images, args.teacher_pre_relu)
        terms["distill"] = method(own, target, batch)
    return terms, own.logits


def train(args: Namespace, data: Data | None = None) -> bool:
    """Train until the last epoch or the time limit, and return whether training finished."""
    with Run(args, "baseline_cifar100", columns=("task", "distill")) as run:
        device = open_device(args.device)
        data = data or load_data(args.dataset, args.data_dir, args.subset, args.test_subset).to(device)
        n, batch_size = len(data.train), args.batch_size
        run.check_data(data.fingerprint, n)
        if args.method == "reviewkd" and (batch_size == 1 or n % batch_size == 1):
            raise UserError(
                f"--batch-size {batch_size}: {n} images leave a batch of one for ReviewKD's BatchNorm; choose another"
            )
        with user_errors():
            student, teacher = build_networks(args, len(data.classes))
            method = build_method(args, student, teacher, SIZE, data.train.labels) if teacher else None
        print(f"{run_name(args)}: {data}; {describe_device(args)}; {args.out}")
        print(settings.summary(args))
        if notice := settings.notice(args, "cifar100"):
            print(notice)
        if teacher and not run.resumed:
            args.teacher_ckpt = cifar100.find_teacher(args, data)
            if not args.teacher_ckpt:
                return False
            load_network(teacher, args.teacher_ckpt, args.teacher)

        networks = nn.ModuleList(net for net in (student, teacher, method) if net is not None)
        networks.to(device, memory_format=torch.channels_last)
        parameters = [p for p in networks.parameters() if p.requires_grad]
        nesterov = args.optimizer == "nesterov"
        optimizer = sgd(parameters, args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=nesterov)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        run.track(student=student, teacher=teacher, method=method, optimizer=optimizer, scaler=scaler)
        if teacher:
            tested = run.state["teacher_accuracy"] or evaluate(teacher, eval_batches(data.test))
            run.state["teacher_accuracy"] = tested
            print(f"teacher: {tested['top1']:.2f} % top-1 before distillation", flush=True)

        indices = ImageSet(data.train.images, torch.arange(n, device=device))  # to select labels, and CRD's rows
        generator = torch.Generator(device)
        steps = math.ceil(n / batch_size)
        for epoch in run.epochs():
            lr = optimizer.param_groups[0]["lr"] = settings.learning_rate(args, "cifar100", epoch)
            weights = {"task": args.w_task, "distill": args.weight * settings.ramp(args, "cifar100", epoch)}
            generator.manual_seed(derive_seed(args.seed, epoch, "negatives"))
            for net in networks:
                net.train(net is not teacher or args.teacher_bn == "batch")
            batches = train_batches(indices, batch_size, args.seed, epoch)
            meter = Meter(device)
            for images, index in tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, disable=None):
                batch = Batch(data.train.labels[index], index, generator)
                with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
                    terms, logits = loss_terms(method, student, teacher, images, batch, args)
                loss = sum(weights[name] * term for name, term in terms.items())

                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                meter.add(len(index), loss, **terms, correct=(logits.argmax(1) == batch.labels).sum())
            run.finish_steps(meter)
            run.end_epoch(meter, lr, student=evaluate(student, eval_batches(data.test)))
    return run.finished


def evaluate_checkpoint(args: Namespace) -> None:
    """--evaluate: print the accuracy of a student on the test set."""
    device = open_device(args.device)
    test, classes = load_test(args.dataset, args.data_dir, args.test_subset)
    with user_errors():
        student, _ = build_networks(args, len(classes))
    load_network(student, args.evaluate, f"{args.student} by {args.method}")
    tested = evaluate(student.to(device, memory_format=torch.channels_last), eval_batches(test.to(device)))
    print(f"{args.student} {tested['top1']:.2f} % top-1, {tested['top5']:.2f} % top-5 on {len(test)} test images")


def smoke(argv: list[str]) -> None:
    """--smoke: train two small networks with every method. Finished runs are not repeated."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--smoke", action="store_true")
    add("--out", default="results/baselines/smoke", metavar="DIR")
    add("--epochs", type=count, default=1, metavar="N")
    add("--device", default=default_device())
    add("--amp", choices=AMP)
    args = parser.parse(argv)
    words = [f"--epochs={args.epochs}", f"--device={args.device}", f"--amp={args.amp}"]
    for method in METHODS:
        out = Path(args.out) / method
        networks = [] if method == "alone" else ["--teacher=resnet14"]
        resume = ["--resume"] if (out / "last.pt").exists() else []
        train(parse_args([*SMOKE, *networks, f"--method={method}", f"--out={out}", *resume, *words]))


def main(argv: list[str] | None = None) -> int:
    """Train or evaluate, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv

    def script() -> None:
        if "--smoke" in argv:
            return smoke(argv)
        args = parse_args(argv)
        return evaluate_checkpoint(args) if args.evaluate else train(args)

    return exit_code(script)


if __name__ == "__main__":
    sys.exit(main())
