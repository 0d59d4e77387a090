"""The options of the methods, and their published settings (settings.yaml)."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from common.run.errors import UserError
from common.run.options import PUBLISHED, Parser, option
from common.run.types import count, count_or_zero, name_in, positive, weight

SETTINGS: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "settings.yaml").read_text())
METHODS = {dataset: [name for name in methods if name != "recipe"] for dataset, methods in SETTINGS.items()}


def add_options(parser: Parser, dataset: str, networks: dict) -> argparse._ArgumentGroup:
    """Add the networks, the method and its settings; `resolve` sets the defaults. Returns the group of distillation."""
    add = parser.add_argument
    add("--student", type=name_in(networks), required=True, metavar="NAME", help=", ".join(networks))
    unless = ", except for alone" if "alone" in METHODS[dataset] else ""
    add("--teacher", type=name_in(networks), metavar="NAME", help=f"required{unless}")
    add("--method", choices=METHODS[dataset], required=True, help="see docs/baselines.md")
    add = parser.add_argument_group("settings (default: those published for the method and the pair)").add_argument
    add("--epochs", type=count, metavar="N", help="the schedule scales with it")
    add("--batch-size", type=count, metavar="N", help="images per step")
    add("--lr", type=positive, help="at the start")
    add("--optimizer", choices=("sgd", "nesterov"), help="SGD with momentum 0.9, without or with Nesterov")
    add("--w-task", type=weight, metavar="W", help="weight of the cross entropy")
    distillation = parser.add_argument_group("distillation")
    add = distillation.add_argument
    add("--weight", type=weight, metavar="W", help="of the method's loss")
    add("--warmup", type=count_or_zero, metavar="N", help="epochs over which --weight rises; fewer in short runs")
    add("--temperature", type=positive, metavar="T", help="of KD and DKD")
    add("--tckd", type=weight, metavar="W", help="of DKD: weight of the part on the target class")
    add("--nckd", type=weight, metavar="W", help="of DKD: weight of the part on the other classes")
    add("--teacher-bn", choices=("batch", "running"), help="BatchNorm statistics of the teacher")
    return distillation


def published(dataset: str, method: str, teacher: str | None, student: str) -> dict[str, Any]:
    """The settings of a method for a pair. "published": whether all of them are published for this pair."""
    pair = f"{teacher}-{student}" if teacher else student
    found = SETTINGS[dataset]["recipe"] | SETTINGS[dataset][method]
    known = found.pop("published", None)
    found = {name: of_pair(value, pair, student) for name, value in found.items()}
    return found | {"published": not teacher or pair in (PUBLISHED[dataset]["pairs"] if known is None else known)}


def of_pair(value: Any, pair: str, student: str) -> Any:
    """A value of settings.yaml: the pair's, the student's, or that of all others."""
    return value.get(pair, value.get(student, value["other"])) if isinstance(value, dict) else value


def resolve(
    args: Namespace, dataset: str, parser: Parser, distillation: argparse._ArgumentGroup, stored: dict[str, Any] | None
) -> None:
    """Set the options that were not given, and all other settings, as attributes of `args`.

    Args:
        distillation: from `add_options`.
        stored: the settings of the run being resumed.

    Raises:
        UserError: an option does not apply to the method, nothing is left to train on, or settings.yaml has changed
            since the run began.
    """
    if args.method == "alone":
        if args.teacher:
            parser.error("--method alone has no teacher: omit --teacher")
        parser.refuse(args, distillation, "has no effect with --method alone: omit it")
    elif not args.teacher:
        parser.error(f"--method {args.method} also needs --teacher")
    found = published(dataset, args.method, args.teacher, args.student)
    for name in ("temperature", "tckd", "nckd"):
        if name in args.given and name not in found:
            parser.error(f"{option(name)} is not an option of {args.method}: omit it")
    for name, value in found.items():
        if not hasattr(args, name) and stored and stored.get(name, value) != value:
            raise UserError(
                f"cannot resume: settings.yaml has {name} {value}, and the run began with {stored[name]}; restore the "
                "file, or choose another --out"
            )
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.method == "simkd" and args.w_task:
        parser.error("--w-task does not apply to simkd, which has no cross entropy: omit it")
    if not (args.w_task or args.weight):
        parser.error(f"{'--w-task' if args.method == 'alone' else '--weight'} 0: no loss remains to train on")


def summary(args: Namespace) -> str:
    """The settings in one line."""
    names = ["lr", "batch_size", "optimizer", "w_task"]
    names += ["weight", "warmup", "teacher_bn"] if args.teacher else []
    names += [name for name in ("temperature", "tckd", "nckd") if getattr(args, name) is not None]
    return ", ".join(f"{name} {getattr(args, name)}" for name in names)


def notice(args: Namespace, dataset: str) -> str | None:
    """What to print if the settings of this pair are not published."""
    pair = f"{args.teacher}-{args.student}"
    if args.published:
        return None
    if pair in PUBLISHED[dataset]["pairs"]:
        return f"setting not published: some of {args.method}'s for {pair}; using those of other pairs"
    return f"{pair} is not a published pair; using the default settings"


def ramp(args: Namespace, dataset: str, epoch: int) -> float:
    """The factor of --weight in this epoch. The warm-up is shorter in short runs."""
    epochs = round(args.warmup * min(1, args.epochs / SETTINGS[dataset]["recipe"]["epochs"]))
    return min(1.0, (epoch + args.warmup_from) / epochs) if epochs else 1.0


def learning_rate(args: Namespace, dataset: str, epoch: int) -> float:
    """--lr, divided by 10 at each milestone of the published schedule, scaled to --epochs."""
    part = args.epochs / SETTINGS[dataset]["recipe"]["epochs"]
    return args.lr / 10 ** sum(epoch >= round(milestone * part) for milestone in args.milestones)
