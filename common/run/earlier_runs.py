"""Earlier runs: finding a trained network, and reading the files of a run."""

import glob
from argparse import Namespace
from pathlib import Path

import yaml

from .device import AMP


def default_out(name: str, args: Namespace) -> str:
    """The folder of the run `name`, which ends with the precision: runs/<name>.

    With --resume, falls back to an existing run with another precision, the default of the device that it began on, and
    then to one without a precision in its name, from an earlier version.
    """
    folders, earlier = [f"runs/{name}"], name.removesuffix(f"-{args.amp}")
    if args.resume:
        folders += [f"runs/{earlier}-{amp}" for amp in AMP if "amp" not in args.given] + [f"runs/{earlier}"]
    return next((folder for folder in folders if (Path(folder) / "last.pt").exists()), folders[0])


def find_network(
    parent: Path, network: str, fingerprint: str, length: int, unit: str = "epoch", metric: str = "top1"
) -> Path | None:
    """The student.pth of a finished run that trained `network` alone on the same data, in a subfolder of `parent`.

    Prints why a run of that network cannot be used.

    Args:
        length: the number of `unit`s that it must have been trained for.
        metric: a key of the accuracies in its result.json.
    """
    for folder in sorted(path.parent for path in parent.glob("*/config.yaml")):
        config, result = read_config(folder), read_result(folder, unit, metric)
        if not config or not result or config.get("teacher") or config.get("student") != network:
            continue
        if config.get("script") == "baseline_cifar100":  # trained by another recipe
            continue
        if config.get("fingerprint") != fingerprint:
            reason = "it was trained on different data"
        elif config.get(f"{unit}s") != length:
            reason = f"it was trained for {config.get(f'{unit}s')} {unit}s, not {length}"
        elif result[unit] != length:
            reason = f"it stopped after {result[unit]} of {length} {unit}s"
        elif not (folder / "student.pth").exists():
            reason = "its student.pth is missing"
        else:
            return folder / "student.pth"
        print(f"teacher: cannot use {folder}: {reason}")
    return None


def stopped_during_teacher(out: Path, folder: Path) -> bool:
    """Whether the run in `out` stopped while training its teacher in `folder` or `folder`-<hash>."""
    folders = [folder, *folder.parent.glob(f"{glob.escape(folder.name)}-*")]
    return not (out / "last.pt").exists() and any(map(is_unfinished, folders))


def is_unfinished(folder: Path) -> bool:
    """Whether a run in `folder` stopped before its last epoch."""
    result = read_result(folder)  # missing if the run was killed between writing last.pt and the other files
    return (folder / "last.pt").exists() and (result is None or result.get("epoch") != result.get("epochs"))


def read_config(folder: Path) -> dict | None:
    """The config.yaml of a run; None if it cannot be read."""
    return _read(folder / "config.yaml")


def read_result(folder: Path, unit: str = "epoch", metric: str = "top1") -> dict | None:
    """The result.json of a run; None if it cannot be read."""
    result = _read(folder / "result.json") or {}
    accuracies = [result.get(key) for key in ("last", "best", "teacher")]
    accuracies = accuracies if result.get("teacher") else accuracies[:2]  # None without a teacher
    whole = all(isinstance(each, dict) and isinstance(each.get(metric), float | int) for each in accuracies)
    return result if whole and {unit, f"{unit}s", "teacher", "seconds"} <= result.keys() else None


def _read(path: Path) -> dict | None:
    try:
        content = yaml.safe_load(path.read_text())  # JSON is YAML too
    except Exception:  # damaged files raise many kinds of exceptions
        return None
    return content if isinstance(content, dict) else None
