"""FCFD on CIFAR-100 (Sec. 3.1 and 3.2): distil a teacher into a student, or train one network alone.

    python cifar100.py --teacher resnet32x4 --student resnet8x4     distil; the teacher is found, or trained first
    python cifar100.py --student resnet8x4                          train a network alone: a teacher, a baseline
    python cifar100.py --student resnet8x4 --evaluate FILE          test any checkpoint in the field's format

The method itself is in common/fcfd.py. Here, from top to bottom: the settings, the networks, the teacher, the
training loop, and what a call of the script does with them.
"""

import glob
import math
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.bridges import Bridges, connect
from common.data.batches import SIZE, Data, eval_batches, train_batches
from common.data.sources import load_data
from common.fcfd import L2_TERMS, TERMS, VARIANTS, fcfd_terms, forward_paths
from common.losses import dkd, kl
from common.models import StagedNet, build, check_name
from common.multipath_bn import plain_state_dict, track_paths
from common.paths import MixedPath, sample_paths
from common.run import earlier_runs
from common.run import folder as run_folder
from common.run.checkpoint import load_network
from common.run.device import AMP, open_device
from common.run.errors import LossNotFiniteError, UserError, exit_code
from common.run.evaluation import evaluate
from common.run.optimizer import sgd
from common.run.options import ALL_SETTINGS, Parser, check_ranges, fill, term_weights
from common.simkd import build_simkd, cost_line

SETTINGS = ALL_SETTINGS["cifar100"]
DEFAULTS = SETTINGS["defaults"]
METHODS = {"kd": ("task", "kd"), "app": ("task", "kd", "app"), "fcfd": TERMS}  # the terms that each one weighs
LATER = ("kd_loss", "tckd", "nckd", "simkd", "w_func_partial", "w_func_prime_l2")
ADDED = {key: DEFAULTS[key] for key in LATER}  # what runs of earlier versions lack
DISTILLATION = ("method", "teacher_ckpt", "teacher_epochs", "teacher_bn", "temperature", "num_paths", "positions")
DISTILLATION += (*ADDED, *(f"w_{term}" for term in TERMS))  # the settings without a meaning for a network alone


# --------------------------------------------------------------------------------------------------- settings


def parse_args(argv: list[str] | None) -> dict:
    """The options that were given, and no others."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", metavar="NAME", help="without it --student is trained alone")
    add("--student", metavar="NAME", required=True)
    add("--method", choices=METHODS, help="fcfd (default), kd: L_task + L_kd, app: adds L_app")
    add("--teacher-ckpt", metavar="FILE", help="default: an earlier run's beside --out, else it is trained first")
    add("--teacher-epochs", type=int, metavar="N", help="of a teacher that is trained first (default: --epochs)")
    add("--teacher-bn", choices=("batch", "running"), help="statistics behind p_t and F_t (default: batch)")
    for term in TERMS:
        add(f"--w-{term.replace('_', '-')}", type=float, metavar="W", help=f"weight of {term}; 0 leaves it out")
    add("--w-func-partial", type=float, metavar="W", help="weight of L_func-partial of App. H.4 (default: 0)")
    add("--w-func-prime-l2", type=float, metavar="W", help="weight of L_func'-L2 of App. G (default: 0)")
    add("--kd-loss", choices=("kl", "dkd"), help="what compares logits with the teacher's (default: kl)")
    add("--tckd", type=float, metavar="W", help="weight of DKD's part on the label (default: 1)")
    add("--nckd", type=float, metavar="W", help="weight of DKD's part on the other classes (default: 2)")
    add("--simkd", action="store_true", help="SimKD's projector and the teacher's classifier end the student")
    add("--temperature", type=float, metavar="T", help="of every KL term")
    add("--num-paths", type=int, metavar="N", help="|S|, the mixed paths drawn in a step (default: 2)")
    add("--positions", type=int, nargs="+", metavar="K", help="stages that mixed paths leave (default: 2..N-1)")
    parser.add_image_set_options()
    add("--epochs", type=int, metavar="N", help="default: 240; the milestones scale with it")
    add("--batch-size", type=int, metavar="N", help="default: 64")
    add("--lr", type=float, help="default: the pair's in common/published.yaml")
    parser.add_run_options()
    add("--evaluate", metavar="CKPT", help="only test this checkpoint of --student (--simkd: and --teacher)")
    return parser.given(argv)


def settle(given: dict, stored: dict) -> Namespace:
    """All settings of a run: as given, else as stored by the run that is resumed, else the paper's.

    Raises:
        UserError: one is out of range, or contradicts the others.
    """
    c = Namespace(**{**DEFAULTS, **stored, **given})
    for name in filter(None, (c.student, c.teacher)):
        check_name(name)
    lr = SETTINGS["lr"].get(c.student, SETTINGS["lr"]["other"])
    if "teacher_ckpt" in given and "teacher_epochs" in given:
        raise UserError("--teacher-epochs is of a teacher trained first, not of --teacher-ckpt: give one of them")
    if c.teacher:
        pair = SETTINGS["pairs"].get(f"{c.teacher}-{c.student}", SETTINGS["other"] | {"lr": lr})
        c.method = c.method or DEFAULTS["method"]
        weights, chosen = term_weights(pair), METHODS[c.method]
    else:
        if misplaced := [key for key in DISTILLATION if key in given]:
            raise UserError(f"--{misplaced[0].replace('_', '-')} is about distillation: name the --teacher too")
        c.method, c.teacher_bn, pair = None, None, {"lr": lr, "temperature": None}
        weights, chosen = {"task": 1}, ("task",)

    if c.kd_loss != "dkd" and (misplaced := [key for key in ("tckd", "nckd") if key in given]):
        raise UserError(f"--{misplaced[0]} is a weight inside DKD: give --kd-loss dkd too")
    c.positions = c.positions and sorted(set(c.positions))
    follows = {f"w_{term}": weights[term] if term in chosen else 0 for term in TERMS}
    follows |= {"lr": pair["lr"], "temperature": pair["temperature"], "teacher_epochs": c.teacher and c.epochs}
    follows |= {"device": "cuda" if torch.cuda.is_available() else "cpu", "out": f"runs/{run_name(c)}"}
    fill(c, follows)
    c.amp = c.amp or ("fp16" if c.device.startswith("cuda") else "off")
    check_ranges(c)
    return c


def run_name(c: Namespace) -> str:
    """The name of a run's folder where none is given."""
    data = f"folder-{Path(c.data_dir).resolve().name}" if c.dataset == "folder" else c.dataset
    subset = f"-subset{c.subset}" if c.subset else ""
    networks = f"{c.teacher}-{c.student}-{method_name(c)}" if c.teacher else f"{c.student}-alone"
    return f"{data}{subset}-{networks}-{c.epochs}ep-seed{c.seed}"


def method_name(c: Namespace) -> str:
    """The method with what it is combined with: fcfd, kd-dkd, fcfd-dkd-simkd."""
    return f"{c.method}{'-dkd' * (c.kd_loss == 'dkd')}{'-simkd' * c.simkd}"


def learning_rate(c: Namespace, epoch: int) -> float:
    """lr, times 0.1 at each milestone; the milestones 150, 180, 210 of 240 epochs scale with the epochs."""
    return c.lr / 10 ** sum(epoch >= round(milestone / 240 * c.epochs) for milestone in SETTINGS["milestones"])


def l2_warmup(c: Namespace, epoch: int) -> float:
    """The factor on the weight of every L2 term: linear over 20 epochs, or a twelfth of a shorter run."""
    return min(1.0, (epoch + 1) / (SETTINGS["warmup_epochs"] * min(1, c.epochs / 240)))


# --------------------------------------------------------------------------------------------------- networks


def build_networks(c: Namespace, num_classes: int):
    """(student, teacher, bridges, candidate paths), None where not wanted; settles c.num_paths and c.positions."""
    torch.manual_seed(c.seed)  # the same seed starts every method from the same student
    student = build(c.student, num_classes)
    if not c.teacher:
        return student, None, None, []
    teacher = build(c.teacher, num_classes).requires_grad_(False)
    if c.simkd:
        student, last = build_simkd(student, teacher, SIZE), student.num_stages
        if last in (c.positions or []):
            raise UserError(f"--positions {last}: with --simkd no path changes there, choose from 2..{last - 1}")
    return student, teacher, *connect(c, teacher, student, SIZE)


# ---------------------------------------------------------------------------------------------------- teacher


def teacher_name(c: Namespace) -> str:
    """The folder in which the teacher is trained first, beside this run's: the one that its own run would have."""
    alone = {"teacher": None, "student": c.teacher, "epochs": c.teacher_epochs or c.epochs}
    return run_name(Namespace(**vars(c) | alone))


def train_teacher(c: Namespace, data: Data, deadline: float) -> Path | None:
    """Train the teacher alone by the published schedule, or go on where that stopped; None if time ran out."""
    folder = Path(c.out).parent / teacher_name(c)
    if (config := earlier_runs.read_config(folder)) and config.get("fingerprint") != c.fingerprint:
        folder = folder.with_name(f"{folder.name}-{c.fingerprint[:8]}")  # the same name, but other data
    if folder.resolve() == Path(c.out).resolve():
        raise UserError(f"{folder} is where the teacher is trained first: choose another --out")
    given = {"student": c.teacher, "epochs": c.teacher_epochs, "out": str(folder)}
    given["batch_size"] = min(DEFAULTS["batch_size"], len(data.train))
    given |= {key: getattr(c, key) for key in ("dataset", "data_dir", "subset", "test_subset", "seed", "device", "amp")}
    print(f"teacher: training {c.teacher} for {c.teacher_epochs} epochs in {folder}", flush=True)
    try:
        finished = run(given, resume=(folder / "last.pt").exists(), deadline=deadline, data=data)
    except (UserError, LossNotFiniteError) as error:
        raise type(error)(f"(the teacher in {folder}) {error}") from error
    return folder / "student.pth" if finished else None


# --------------------------------------------------------------------------------------------------- training


def train(
    c: Namespace,
    data: Data,
    student: StagedNet,
    teacher: StagedNet | None,
    bridges: Bridges | None,
    candidates: list[MixedPath],
    state: dict | None,
    deadline: float,
) -> bool:
    """Train from `state` (None: from the start) to the last epoch; False if `deadline` passed before that."""
    device, out = torch.device(c.device), Path(c.out)
    nets = {"student": student, "teacher": teacher, "bridges": bridges}
    nets = {name: net for name, net in nets.items() if net is not None}
    channels_last = student.channels_last and (teacher is None or teacher.channels_last)
    if teacher:
        for net in (student, teacher):
            track_paths(net, sorted({path.k for path in candidates}))
    for net in nets.values():
        net.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)

    cuda = device.type == "cuda"
    parameters = [p for net in nets.values() for p in net.parameters() if p.requires_grad]
    optimizer = sgd(parameters, c.lr, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=cuda)
    amp = AMP[c.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=c.amp == "fp16")

    if state:
        run_folder.restore(out, state, {**nets, "optimizer": optimizer, "scaler": scaler})
        optimizer.param_groups[0]["fused"] = cuda  # the device may be another one
        run_folder.publish(out, state, {"student": plain_state_dict(student)})
    else:
        teacher_accuracy = evaluate(teacher, eval_batches(data.test, channels_last=channels_last)) if teacher else None
        state = {"config": vars(c), "epoch": 0, "log": [], "best": {"top1": -1.0}, "teacher_accuracy": teacher_accuracy}
    if teacher:
        print(f"teacher: {state['teacher_accuracy']['top1']:.2f} % top-1 before distillation")

    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    weights = {term: getattr(c, f"w_{term}") for term in (*TERMS, *VARIANTS) if getattr(c, f"w_{term}")}
    steps = math.ceil(len(data.train) / c.batch_size)
    for epoch in range(state["epoch"], c.epochs):
        began = time.monotonic()
        lr = optimizer.param_groups[0]["lr"] = learning_rate(c, epoch)
        warmed = {term: w * l2_warmup(c, epoch) if term in L2_TERMS else w for term, w in weights.items()}
        paths = sample_paths(candidates, c.num_paths or 0, steps, c.seed, epoch)
        for name, net in nets.items():
            net.train(name != "teacher" or c.teacher_bn == "batch")

        # Nothing in a step makes the host wait for the device: what is to be known is summed there until the end.
        sums = dict.fromkeys(("loss", *weights, "correct"), torch.zeros((), device=device))
        bad_step = torch.full((), -1, device=device)
        batches = train_batches(data.train, c.batch_size, c.seed, epoch, channels_last)
        for step, (images, labels) in enumerate(tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, disable=None)):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                if teacher:
                    flow = forward_paths(teacher, student, bridges, images, paths[step], app="app" in weights)
                    logits = flow.student_logits
                else:
                    logits = student(images)
            if teacher:
                kd_loss = partial(dkd, labels=labels, tckd=c.tckd, nckd=c.nckd) if c.kd_loss == "dkd" else kl
                terms = fcfd_terms(flow, labels, c.temperature, weights, kd_loss)
            else:
                terms = {"task": F.cross_entropy(logits.float(), labels)}
            loss = sum(warmed[term] * value for term, value in terms.items())  # Eq. 9

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            with torch.no_grad():
                for name, value in (("loss", loss), *terms.items(), ("correct", (logits.argmax(1) == labels).sum())):
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
            **{term: sums[term].item() / steps if term in sums else "" for term in dict.fromkeys((*TERMS, *weights))},
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
        run_folder.save_run(out, state, {"student": plain_state_dict(student)})
        run_folder.print_epoch(state)
        if time.monotonic() > deadline and epoch + 1 < c.epochs:
            print(f"stopped after {epoch + 1} of {c.epochs} epochs (--max-minutes): repeat the command with --resume")
            return False
    run_folder.report(state)
    return True


# -------------------------------------------------------------------------------------------------------- run


def run(given: dict, resume: bool, deadline: float, data: Data | None = None) -> bool:
    """One run from its settings to its files; False if `deadline` (of time.monotonic) came first.

    Raises:
        UserError: anything that is wrong with the input. All that can be checked is, before a teacher is trained.
        LossNotFiniteError: training diverged.
    """
    c = Namespace(**DEFAULTS | given)
    out = Path(c.out or f"runs/{run_name(c)}")
    if resume and c.teacher and not (out / "last.pt").exists():
        # Where only the teacher was begun, this run is a fresh one, and train_teacher resumes the teacher by itself.
        folders = [out.parent / teacher_name(c), *out.parent.glob(f"{glob.escape(teacher_name(c))}-*")]
        resume = not any(map(earlier_runs.is_unfinished, folders))
    with run_folder.open_run(out, resume) as state:
        stored = ADDED | state["config"] if state else {}
        c = settle(given | {"out": str(out)}, stored)
        run_folder.check_settings(stored, vars(c))
        device = open_device(c.device)
        if data is None:
            data = load_data(c.dataset, c.data_dir, c.subset, c.test_subset)
            data.train, data.test = data.train.to(device), data.test.to(device)
        if c.batch_size > len(data.train):
            raise UserError(f"--batch-size {c.batch_size}: there are only {len(data.train)} training images")
        c.fingerprint = data.fingerprint
        student, teacher, bridges, candidates = build_networks(c, len(data.classes))

        task = f"{c.student} from {c.teacher} by {method_name(c)}" if c.teacher else f"{c.student} alone"
        size = f"{len(data.train)} training and {len(data.test)} test images in {len(data.classes)} classes"
        print(f"{task}, {c.epochs} epochs on {c.dataset}: {size}; {c.device}, amp {c.amp}; {c.out}")
        if c.teacher and f"{c.teacher}-{c.student}" not in SETTINGS["pairs"]:
            print(f"{c.teacher}-{c.student} is no published pair: settings not given are those of most pairs")
        if c.teacher:
            shown = (*TERMS, *(term for term in VARIANTS if getattr(c, f"w_{term}")))
            weights = ", ".join(f"{term} {getattr(c, f'w_{term}'):g}" for term in shown)
            paths = f"{c.num_paths} of {len(candidates)} paths"
            print(f"lr {c.lr:g}, temperature {c.temperature:g}, weights: {weights}; {paths}")
        if c.simkd:
            print(cost_line(c.student, c.teacher, len(data.classes), SIZE))
        run_folder.check_settings(stored, vars(c))  # now with what follows from data and networks
        if state:
            state["config"] = vars(c)
        elif teacher:
            if c.teacher_ckpt:
                print(f"teacher: {c.teacher_ckpt}, as told")
            elif found := earlier_runs.find_network(Path(c.out).parent, c.teacher, c.fingerprint, c.teacher_epochs):
                print(f"teacher: {found}, from an earlier run")
                c.teacher_ckpt = str(found)
            elif trained := train_teacher(c, data, deadline):
                c.teacher_ckpt = str(trained)
            else:
                return False
            load_network(teacher, c.teacher_ckpt, c.teacher)
        return train(c, data, student, teacher, bridges, candidates, state, deadline)


def evaluate_checkpoint(given: dict) -> None:
    """--evaluate: print the accuracy of a checkpoint on the test set."""
    c = settle(given, {})
    data, device = load_data(c.dataset, c.data_dir, c.subset, c.test_subset), open_device(c.device)
    net, name = build(c.student, len(data.classes)), c.student
    if c.simkd:
        net, name = build_simkd(net, build(c.teacher, len(data.classes)), SIZE), f"{name} by SimKD from {c.teacher}"
        print(cost_line(c.student, c.teacher, len(data.classes), SIZE))
    load_network(net, given["evaluate"], name)
    accuracy = evaluate(net.to(device), eval_batches(data.test.to(device)))
    print(f"{c.student} {accuracy['top1']:.2f} % top-1, {accuracy['top5']:.2f} % top-5 on {len(data.test)} test images")


def main(argv: list[str] | None = None) -> int:
    """Parse, then evaluate or run; the exit code is that of `exit_code`."""

    def script() -> None:
        given = parse_args(argv)
        resume = given.pop("resume", False)
        if "evaluate" in given:
            evaluate_checkpoint(given)
        else:
            run(given, resume, deadline=time.monotonic() + 60 * given.get("max_minutes", math.inf))

    return exit_code(script)


if __name__ == "__main__":
    sys.exit(main())
