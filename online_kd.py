"""Online distillation (App. F): a teacher and a student learn from each other, both from scratch, in one loop.

    python online_kd.py --teacher resnet32x4 --student resnet8x4                  FCFD, online
    python online_kd.py --teacher resnet32x4 --student resnet8x4 --method dml     mutual KL on the logits alone
    python online_kd.py --teacher resnet32x4 --student resnet8x4 --method kd      the teacher learns by itself

The student's losses are those of Eq. 9 (common/fcfd.py). The teacher has two of its own beside them: its cross entropy
and a KL towards the student. Nothing is frozen. A target is detached, but a mixed path trains every module that it
passes: <k, 1> the teacher's later stages, <k, 0> its early ones.

Both networks are left as files that `cifar100.py --student NAME --evaluate FILE` tests and that can teach there
(`cifar100.py --teacher-ckpt`). Here, from top to bottom: the settings, the networks, the losses, the training loop.
"""

import math
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common.bridges import Bridges, connect
from common.data.batches import SIZE, Data, eval_batches, train_batches
from common.data.sources import load_data
from common.fcfd import TERMS, Flow, fcfd_terms, forward_paths
from common.losses import kl
from common.models import StagedNet, build, check_name
from common.multipath_bn import plain_state_dict, track_paths
from common.paths import MixedPath, sample_paths
from common.run import folder as run_folder
from common.run.device import AMP, open_device
from common.run.errors import LossNotFiniteError, UserError, exit_code
from common.run.evaluation import evaluate
from common.run.folder import PREFIX
from common.run.optimizer import sgd
from common.run.options import ALL_SETTINGS, Parser, check_ranges, fill, term_weights

DEFAULTS = ALL_SETTINGS["online_kd"]["defaults"]
PUBLISHED = ALL_SETTINGS["cifar100"]  # the pairs' settings, and the schedules
ALL_TERMS = (*TERMS, "teacher_task", "teacher_kd")
METHODS = {  # the terms that each one weighs
    "fcfd": ALL_TERMS,
    "dml": ("task", "kd", "teacher_task", "teacher_kd"),
    "kd": ("task", "kd", "teacher_task"),
}


# --------------------------------------------------------------------------------------------------- settings


def parse_args(argv: list[str] | None) -> dict:
    """The options that were given, and no others."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", metavar="NAME", required=True)
    add("--student", metavar="NAME", required=True)
    add("--method", choices=METHODS, help="fcfd (default), dml: mutual KL, kd: only the student learns from the other")
    for term in ALL_TERMS:
        add(f"--w-{term.replace('_', '-')}", type=float, metavar="W", help=f"weight of {term}; 0 leaves it out")
    add("--temperature", type=float, metavar="T", help="of every KL term")
    add("--num-paths", type=int, metavar="N", help="|S|, the mixed paths drawn in a step (default: 2)")
    add("--positions", type=int, nargs="+", metavar="K", help="stages that mixed paths leave (default: 2..N-1)")
    parser.add_image_set_options()
    add("--epochs", type=int, metavar="N", help="default: 240; the milestones scale with it")
    add("--batch-size", type=int, metavar="N", help="default: 64")
    add("--lr", type=float, help="of both networks (default: the pair's in common/published.yaml)")
    parser.add_run_options()
    return parser.given(argv)


def settle(given: dict, stored: dict) -> Namespace:
    """All settings of a run: as given, else as stored by the run that is resumed, else the pair's.

    Raises:
        UserError: one is out of range.
    """
    c = Namespace(**{**DEFAULTS, **stored, **given})
    for name in (c.student, c.teacher):
        check_name(name)
    lr = PUBLISHED["lr"].get(c.student, PUBLISHED["lr"]["other"])
    pair = PUBLISHED["pairs"].get(f"{c.teacher}-{c.student}", PUBLISHED["other"] | {"lr": lr})
    weights = {"teacher_task": 1, "teacher_kd": 1, **term_weights(pair)}
    c.positions = c.positions and sorted(set(c.positions))
    follows = {f"w_{term}": weights[term] if term in METHODS[c.method] else 0 for term in ALL_TERMS}
    follows |= {"lr": pair["lr"], "temperature": pair["temperature"]}
    follows |= {"device": "cuda" if torch.cuda.is_available() else "cpu", "out": f"runs/{run_name(c)}"}
    fill(c, follows)
    c.amp = c.amp or ("fp16" if c.device.startswith("cuda") else "off")
    check_ranges(c)
    return c


def run_name(c: Namespace) -> str:
    """The name of a run's folder where none is given."""
    data = f"folder-{Path(c.data_dir).resolve().name}" if c.dataset == "folder" else c.dataset
    subset = f"-subset{c.subset}" if c.subset else ""
    return f"{data}{subset}-{c.teacher}-{c.student}-online-{c.method}-{c.epochs}ep-seed{c.seed}"


def learning_rate(c: Namespace, epoch: int) -> float:
    """lr, times 0.1 at each milestone; the milestones 150, 180, 210 of 240 epochs scale with the epochs."""
    return c.lr / 10 ** sum(epoch >= round(milestone / 240 * c.epochs) for milestone in PUBLISHED["milestones"])


def l2_warmup(c: Namespace, epoch: int) -> float:
    """The factor on the weight of every L2 term: linear over 20 epochs, or a twelfth of a shorter run."""
    return min(1.0, (epoch + 1) / (PUBLISHED["warmup_epochs"] * min(1, c.epochs / 240)))


# --------------------------------------------------------------------------------------------------- networks


def build_networks(c: Namespace, num_classes: int) -> tuple[StagedNet, StagedNet, Bridges | None, list[MixedPath]]:
    """(student, teacher, bridges, candidate paths); bridges None where none is used; settles num_paths and positions.

    Networks between which there are no bridges may have different numbers of stages.
    """
    torch.manual_seed(c.seed)  # the same seed starts the same student, here by every method and in cifar100.py
    student, teacher = build(c.student, num_classes), build(c.teacher, num_classes)
    return student, teacher, *connect(c, teacher, student, SIZE)


# ----------------------------------------------------------------------------------------------------- losses


def online_terms(flow: Flow, labels: Tensor, temperature: float, terms: list[str]) -> dict[str, Tensor]:
    """The terms of Eq. 9 and the teacher's two (App. F) before weighting; arguments and result as of `fcfd_terms`."""
    losses = fcfd_terms(flow, labels, temperature, [term for term in terms if term in TERMS])
    if "teacher_task" in terms:
        losses["teacher_task"] = F.cross_entropy(flow.teacher_logits.float(), labels)
    if "teacher_kd" in terms:
        losses["teacher_kd"] = kl(flow.teacher_logits, flow.student_logits, temperature)
    return losses


# --------------------------------------------------------------------------------------------------- training


def train(
    c: Namespace,
    data: Data,
    student: StagedNet,
    teacher: StagedNet,
    bridges: Bridges | None,
    candidates: list[MixedPath],
    state: dict | None,
    deadline: float,
) -> bool:
    """Train from `state` (None: from the start) to the last epoch; False if `deadline` passed before that."""
    device, out = torch.device(c.device), Path(c.out)
    pair = {"student": student, "teacher": teacher}
    nets = pair | ({"bridges": bridges} if bridges else {})
    channels_last = student.channels_last and teacher.channels_last
    for net in pair.values():
        track_paths(net, sorted({path.k for path in candidates}))
    for net in nets.values():
        net.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)

    cuda = device.type == "cuda"
    parameters = [p for net in nets.values() for p in net.parameters()]
    optimizer = sgd(parameters, c.lr, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=cuda)
    amp = AMP[c.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=c.amp == "fp16")

    if state:
        run_folder.restore(out, state, {**nets, "optimizer": optimizer, "scaler": scaler})
        optimizer.param_groups[0]["fused"] = cuda  # the device may be another one
        run_folder.publish(out, state, {role: plain_state_dict(net) for role, net in pair.items()})
    else:
        state = {"config": vars(c), "epoch": 0, "log": [], "teacher_accuracy": None}  # it knows nothing before
        state |= {f"{prefix}best": {"top1": -1.0} for prefix in PREFIX.values()}

    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    weights = {term: getattr(c, f"w_{term}") for term in ALL_TERMS if getattr(c, f"w_{term}")}
    steps = math.ceil(len(data.train) / c.batch_size)
    for epoch in range(state["epoch"], c.epochs):
        began = time.monotonic()
        lr = optimizer.param_groups[0]["lr"] = learning_rate(c, epoch)
        warmed = {term: w * l2_warmup(c, epoch) if term in ("app", "func_l2") else w for term, w in weights.items()}
        paths = sample_paths(candidates, c.num_paths, steps, c.seed, epoch)
        for net in nets.values():
            net.train()

        # Nothing in a step makes the host wait for the device: what is to be known is summed there until the end.
        sums = dict.fromkeys(("loss", *weights, "correct", "teacher_correct"), torch.zeros((), device=device))
        bad_step = torch.full((), -1, device=device)
        batches = train_batches(data.train, c.batch_size, c.seed, epoch, channels_last)
        for step, (images, labels) in enumerate(tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, disable=None)):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                flow = forward_paths(teacher, student, bridges, images, paths[step], app="app" in weights)
            terms = online_terms(flow, labels, c.temperature, list(weights))
            loss = sum(warmed[term] * value for term, value in terms.items())

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            with torch.no_grad():
                terms |= {"loss": loss, "correct": (flow.student_logits.argmax(1) == labels).sum()}
                terms |= {"teacher_correct": (flow.teacher_logits.argmax(1) == labels).sum()}
                for name, value in terms.items():
                    sums[name] = sums[name] + value
                bad_step = torch.where((bad_step < 0) & ~loss.isfinite(), step, bad_step)

        if (bad := bad_step.item()) >= 0:
            raise LossNotFiniteError(f"in epoch {epoch + 1}, step {bad + 1}")
        if not all(tensor.isfinite().all() for net in nets.values() for tensor in net.state_dict().values()):
            raise LossNotFiniteError(f"in the last step of epoch {epoch + 1}")
        training_seconds = time.monotonic() - began
        accuracies = {}
        for role, prefix in PREFIX.items():  # each by the statistics of its own pure path
            accuracy = evaluate(pair[role], eval_batches(data.test, channels_last=channels_last))
            accuracies[f"{prefix}train_top1"] = 100 * sums[f"{prefix}correct"].item() / len(data.train)
            accuracies |= {f"{prefix}test_{top}": accuracy[top] for top in ("top1", "top5")}
            if accuracy["top1"] > state[f"{prefix}best"]["top1"]:
                state[f"{prefix}best"] = {"epoch": epoch + 1, **accuracy}
        row = {
            "epoch": epoch + 1,
            "lr": lr,
            "loss": sums["loss"].item() / steps,
            **{term: sums[term].item() / steps if term in sums else "" for term in ALL_TERMS},
            **accuracies,
            "seconds": time.monotonic() - began,
            "images_per_s": len(data.train) / training_seconds,
            "peak_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20 if cuda else "",
        }
        state["log"].append(row)
        state["epoch"] = epoch + 1
        state |= {name: net.state_dict() for name, net in nets.items()}
        state |= {
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "made_with": run_folder.made_with(device),
        }
        run_folder.save_run(out, state, {role: plain_state_dict(net) for role, net in pair.items()})
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
        UserError: anything that is wrong with the input.
        LossNotFiniteError: training diverged.
    """
    c = Namespace(**DEFAULTS | given)
    out = Path(c.out or f"runs/{run_name(c)}")
    with run_folder.open_run(out, resume, c.script) as state:
        stored = state["config"] if state else {}
        c = settle(given | {"out": str(out)}, stored)
        run_folder.check_settings(stored, vars(c))
        device = open_device(c.device)
        data = load_data(c.dataset, c.data_dir, c.subset, c.test_subset)
        data.train, data.test = data.train.to(device), data.test.to(device)
        if c.batch_size > len(data.train):
            raise UserError(f"--batch-size {c.batch_size}: there are only {len(data.train)} training images")
        c.fingerprint = data.fingerprint
        student, teacher, bridges, candidates = build_networks(c, len(data.classes))

        size = f"{len(data.train)} training and {len(data.test)} test images in {len(data.classes)} classes"
        print(
            f"{c.student} and {c.teacher} from scratch by online {c.method}, {c.epochs} epochs on {c.dataset}: {size}; "
            f"{c.device}, amp {c.amp}; {c.out}"
        )
        if f"{c.teacher}-{c.student}" not in PUBLISHED["pairs"]:
            print(f"{c.teacher}-{c.student} is no published pair: settings not given are those of most pairs")
        weights = ", ".join(f"{term} {getattr(c, f'w_{term}'):g}" for term in ALL_TERMS)
        paths = f"{c.num_paths} of {len(candidates)} paths"
        print(f"lr {c.lr:g}, temperature {c.temperature:g}, weights: {weights}; {paths}")
        run_folder.check_settings(stored, vars(c))  # now with what follows from data and networks
        if state:
            state["config"] = vars(c)
        return train(c, data, student, teacher, bridges, candidates, state, deadline)


def main(argv: list[str] | None = None) -> int:
    """Parse and run; the exit code is that of `exit_code`."""

    def script() -> None:
        given = parse_args(argv)
        resume = given.pop("resume", False)
        run(given, resume, deadline=time.monotonic() + 60 * given.get("max_minutes", math.inf))

    return exit_code(script)


if __name__ == "__main__":
    sys.exit(main())
