"""What the folders of earlier runs tell: whether a teacher is there already, and how far it came."""

import re
from collections.abc import Iterable
from pathlib import Path

import yaml


def find_network(
    parent: Path, network: str, fingerprint: str, length: int, unit: str = "epoch", metric: str = "top1"
) -> Path | None:
    """The student.pth of a finished run of `network` alone in a folder of `parent`, on the same data and as long.

    Prints why a run of that network does not serve.

    Args:
        length: of the run, in `unit`s.
        metric: what its result.json says how good it is by.
    """
    for folder in sorted(path.parent for path in parent.glob("*/config.yaml")):
        config, result = read_config(folder), read_result(folder, unit, metric)
        if not config or not result or config.get("teacher") or config.get("student") != network:
            continue
        if config.get("fingerprint") != fingerprint:
            reason = "it saw other data"
        elif config.get(f"{unit}s") != length:
            reason = f"it was trained for {config.get(f'{unit}s')} {unit}s, not {length}"
        elif result[unit] != length:
            reason = f"it stopped after {result[unit]} of {length} {unit}s"
        elif not (folder / "student.pth").exists():
            reason = "its student.pth is missing"
        else:
            return folder / "student.pth"
        print(f"teacher: not the one in {folder}: {reason}")
    return None


def is_unfinished(folder: Path) -> bool:
    """Whether a run in `folder` stopped before its last epoch."""
    result = read_result(folder)  # missing where the run was killed between last.pt and the rest
    return (folder / "last.pt").exists() and (result is None or result.get("epoch") != result.get("epochs"))


def series(runs: Iterable[Path]) -> dict[str, list[Path]]:
    """Runs whose folders differ in the seed alone, under their common name; a run named twice counts once."""
    runs = list(dict.fromkeys(run.resolve() for run in runs))
    several = len({run.parent for run in runs}) > 1
    groups: dict[str, list[Path]] = {}
    for run in runs:
        name = re.sub(r"-seed\d+$", "", run.name)
        groups.setdefault(f"{run.parent.name}/{name}" if several else name, []).append(run)
    return groups


def read_config(folder: Path) -> dict | None:
    """The config.yaml of a run, None where there is none that can be read."""
    return _read(folder / "config.yaml")


def read_result(folder: Path, unit: str = "epoch", metric: str = "top1") -> dict | None:
    """The result.json of a run, None where there is none that can be read."""
    result = _read(folder / "result.json") or {}
    accuracies = [result.get(key) for key in ("last", "best", "teacher")]
    accuracies = accuracies if result.get("teacher") else accuracies[:2]  # None: there is none
    whole = all(isinstance(each, dict) and isinstance(each.get(metric), float | int) for each in accuracies)
    return result if whole and {unit, f"{unit}s", "teacher", "seconds"} <= result.keys() else None


def _read(path: Path) -> dict | None:
    try:
        content = yaml.safe_load(path.read_text())  # JSON is YAML too
    except Exception:  # a damaged file can make the reader stumble over anything
        return None
    return content if isinstance(content, dict) else None
