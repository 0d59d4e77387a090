"""Command-line options: those that scripts share, and those stored by the run being resumed."""

import argparse
import math
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from .device import AMP, default_amp, default_device
from .errors import UserError
from .types import count, count_or_zero, positive

PUBLISHED: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "published.yaml").read_text())
MAY_CHANGE = ("device", "data_dir", "out", "resume", "max_minutes", "workers", "visualize")  # when a run is resumed
NOT_SETTINGS = ("resume", "evaluate", "smoke", "given", "deadline")  # not part of a run's config.yaml
UNSET = object()


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.help or ""
        return (
            shown if action.default in (None, False, argparse.SUPPRESS) else f"{shown} (default: %(default)s)".strip()
        )


class Parser(argparse.ArgumentParser):
    """An argument parser that records which options were given, and raises UserError instead of exiting."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

    def add_data_options(self) -> None:
        """The arguments of `load_data` in common/data/sources.py."""
        add = self.add_argument_group("data").add_argument
        add("--dataset", choices=("cifar100", "cifar10", "folder", "synthetic"), default="cifar100", help="dataset")
        add("--data-dir", default="data", metavar="DIR", help="for 'folder' it holds train/ and test/ or val/")
        add("--subset", type=count, metavar="N", help="train on N images, balanced over the classes")
        add("--test-subset", type=count, metavar="N", help="test on N images, balanced over the classes")

    def add_run_options(self, unit: str = "epoch") -> None:
        """Seed, device, precision, output folder and time limit; a run can stop after each `unit`."""
        add = self.add_argument_group("run").add_argument
        add("--seed", type=count_or_zero, default=1, metavar="N", help="random seed")
        add("--device", default=default_device(), help="cpu, cuda, cuda:N or mps")
        add(
            "--amp",
            choices=AMP,
            help="precision of autocast (default: fp16 on CUDA, bf16 on CPUs that support it, else off)",
        )
        add("--out", metavar="DIR", help="default: a folder under runs/ named after the settings")
        add("--resume", action="store_true", help="continue the run in --out; its options are the defaults")
        add("--max-minutes", type=positive, metavar="M", help=f"stop after the {unit} in which M minutes have passed")

    def parse(self, argv: list[str] | None, stored: dict[str, Any] | None = None) -> Namespace:
        """Parse the options; defaults are those `stored` by the run being resumed, then the parser's own.

        Adds `given`, the names of the options in `argv`, and `deadline`, on the clock of time.monotonic().

        Raises:
            UserError: a given option contradicts the stored one, or a stored one is invalid.
        """
        actions = {action.dest: action for action in self._actions if action.dest != "help"}
        parsed = vars(self.parse_args(argv, Namespace(**dict.fromkeys(actions, UNSET))))
        given = {name: value for name, value in parsed.items() if value is not UNSET}
        for name, value in given.items():
            if value == "":
                self.error(f"{option(name)} is empty")
        if stored is not None:
            # A network trained alone has no values for the options of distillation. An older run may lack an option.
            groups = [group for group in self._action_groups if group.title == "distillation"]
            optional = {action.dest for group in groups for action in group._group_actions}
            stored = {name: value for name, value in stored.items() if name in actions}
            stored = {name: _valid(actions[name], value, name in optional) for name, value in stored.items()}
            known = {name: action.default for name, action in actions.items() if name not in NOT_SETTINGS}
            stored = known | stored
        stored = stored or {}
        for name, value in given.items():
            if name in stored and name not in MAY_CHANGE and not _same(actions[name], value, stored[name]):
                raise UserError(
                    f"cannot resume with different settings: {option(name)} is {value} but was {stored[name]}; "
                    "use the original settings, or choose another --out"
                )
        args = Namespace(**{name: action.default for name, action in actions.items()} | stored | given)
        args.given = set(given)
        if "amp" in actions:
            set_defaults(args, amp=default_amp(args.device)[0])
        if "max_minutes" in actions:
            args.max_minutes = given.get("max_minutes")  # a stored limit applies only to the interrupted run
            args.deadline = time.monotonic() + 60 * (args.max_minutes or math.inf)
        return args

    def refuse(self, args: Namespace, group: Any, why: str) -> None:
        """Raise a UserError if one of a group's options was given."""
        for action in group._group_actions:
            if action.dest in args.given:
                raise UserError(f"{option(action.dest)} {why}")

    def error(self, message: str):
        raise UserError(f"{message.removeprefix('argument ')} (see --help)")


def set_defaults(args: Namespace, **defaults: Any) -> None:
    """Set those of these options that are still None."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def settings_of(args: Namespace) -> dict[str, Any]:
    """The settings stored in config.yaml: all options except those of a single call, such as --resume."""
    return {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}


def option(name: str) -> str:
    """The option that sets `name`: w_app -> --w-app."""
    return f"--{name.replace('_', '-')}"


def _valid(action: argparse.Action, value: Any, optional: bool) -> Any:
    """A stored value, checked as if it had been typed; None is valid if that is the default, or if `optional`.

    Raises:
        UserError: it is out of range or of another type.
    """
    is_flag = isinstance(action.const, bool)
    if value is None and (action.default is None or optional) and not (is_flag or action.required):
        return None
    values = value if action.nargs else [value]
    try:
        if is_flag:
            return {True: True, False: False}[value]
        if not isinstance(values, list) or (action.type is None and not isinstance(value, str)):
            raise ValueError
        converted = [action.type(str(each)) if action.type else each for each in values]
        if converted != values or (action.choices and not set(values) <= set(action.choices)):
            raise ValueError
    except (argparse.ArgumentTypeError, ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, argparse.ArgumentTypeError) else repr(value)
        raise UserError(
            f"cannot resume: {option(action.dest)} is stored as {reason}; last.pt is damaged, choose another --out"
        ) from error
    return value


def _same(action: argparse.Action, given: Any, stored: Any) -> bool:
    if isinstance(given, list) and isinstance(stored, list):
        return set(given) == set(stored)
    if action.metavar == "FILE" and stored:
        return Path(given).resolve() == Path(stored).resolve()
    return given == stored
