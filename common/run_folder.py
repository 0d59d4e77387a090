"""What a run leaves in its --out: last.pt is the one truth, replaced atomically; all else is written again from it.

config.yaml     every setting, resolved          student.pth, student_best.pth   plain networks to share
log.csv         a row an epoch                   last.pt, best.pt                everything, to go on or analyse
result.json     best and last accuracy
"""

import csv
import io
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from .checkpoint import load, save, write_atomically
from .errors import UserError

MAY_CHANGE = ("device", "data_dir", "out", "max_minutes")  # between a run and its resumption


def open_run(out: Path, resume: bool) -> dict[str, Any] | None:
    """Make the folder if need be and return the state to resume from, None for a fresh run.

    Raises:
        UserError: it holds a run and `resume` is off; it holds none and `resume` is on; it cannot be made.
    """
    last = out / "last.pt"
    if last.exists() and not resume:
        raise UserError(f"{out} holds a run already: go on with --resume, or choose another --out")
    if resume and not last.exists():
        raise UserError(f"there is nothing to resume in {out}: start without --resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"cannot write into the folder {out} ({error}): choose another --out") from error
    if not resume:
        return None
    state = load(last)
    if not isinstance(state, dict) or not {"config", "epoch", "log", "best", "student"} <= state.keys():
        raise UserError(f"{last} is not what a run leaves: choose another --out")
    return state


def check_settings(stored: dict, config: dict) -> None:
    """Raise a UserError that names the first setting, of those in both, that differs from the stored run's."""
    for key, value in stored.items():
        if key not in MAY_CHANGE and key in config and not _same(key, config[key], value):
            name = "the data's fingerprint" if key == "fingerprint" else f"--{key.replace('_', '-')}"
            raise UserError(
                f"cannot resume with other settings: {name} is {config[key]} and was {value}; use what the run "
                "began with, or another --out"
            )


def _same(key: str, a: Any, b: Any) -> bool:
    if key == "teacher_ckpt" and a and b:
        return Path(a).resolve() == Path(b).resolve()
    return a == b


def save_run(out: Path, state: dict[str, Any], student: dict[str, torch.Tensor]) -> None:
    """Replace last.pt by `state`, then the files that follow from it; arguments as in `publish`."""
    save(state, out / "last.pt")
    publish(out, state, student)


def publish(out: Path, state: dict[str, Any], student: dict[str, torch.Tensor]) -> None:
    """Write every file but last.pt.

    `best.pt` and `student_best.pth` are only due when the last epoch is the best one: before a later epoch became the
    last, they were written.

    Args:
        state: as in last.pt: "config", "epoch" (how many are done), "log" (a row each), "best" and
            "teacher_accuracy" and "made_with" (see `made_with`), and whatever else a script needs to go on.
        student: the plain state dict after the last epoch.
    """
    log = state["log"]
    shared = {
        "model": student,
        "epoch": state["epoch"],
        "accuracy": log[-1]["test_top1"],
        "best_acc": state["best"]["top1"],
    }
    save(shared, out / "student.pth")
    if state["best"]["epoch"] == state["epoch"]:
        save(shared, out / "student_best.pth")
        with open(out / "last.pt", "rb") as whole:
            write_atomically(out / "best.pt", lambda file: shutil.copyfileobj(whole, file))
    table = io.StringIO()
    writer = csv.DictWriter(table, log[0])
    writer.writeheader()
    writer.writerows(log)
    _write_text(out / "log.csv", table.getvalue())
    _write_text(out / "config.yaml", yaml.safe_dump(state["config"], sort_keys=False))
    _write_text(out / "result.json", json.dumps(result_of(state), indent=2) + "\n")


def result_of(state: dict[str, Any]) -> dict[str, Any]:
    """What result.json says of a run: accuracies in percent on the test set, seconds, commit, torch, device."""
    log = state["log"]
    return {
        "epoch": state["epoch"],
        "epochs": state["config"]["epochs"],
        "best": state["best"],
        "last": {"epoch": state["epoch"], "top1": log[-1]["test_top1"], "top5": log[-1]["test_top5"]},
        "teacher": state["teacher_accuracy"],
        "seconds": sum(row["seconds"] for row in log),
        **state["made_with"],
    }


def made_with(device: torch.device) -> dict[str, str]:
    """The commit of this source tree ("+": and uncommitted changes; "unknown" outside git), torch and the device."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"commit": commit, "torch": str(torch.__version__), "device": name}


def print_epoch(state: dict[str, Any]) -> None:
    """One line on the epoch that was just finished."""
    row, epochs = state["log"][-1], state["config"]["epochs"]
    print(
        f"epoch {row['epoch']:3}/{epochs}  loss {row['loss']:.4f}  train {row['train_top1']:.2f} %  "
        f"test {row['test_top1']:.2f} %  best {state['best']['top1']:.2f} %  "
        f"{row['seconds']:.1f} s, {row['images_per_s']:.0f} images/s",
        flush=True,
    )


def report(state: dict[str, Any]) -> None:
    """Print the closing lines of a finished run."""
    result, config = result_of(state), state["config"]
    rows = {name: result[name] for name in ("best", "last", "teacher") if result[name]}
    for name, accuracy in rows.items():
        when = f"epoch {accuracy['epoch']}" if name != "teacher" else "before distillation"
        print(f"{name:8} {accuracy['top1']:.2f} % top-1, {accuracy['top5']:.2f} % top-5 on the test set, {when}")
    print(f"time     {result['seconds'] / 60:.1f} minutes on {result['device']}")
    print(f"{config['student']} lies in {config['out']}/student.pth (last) and student_best.pth", flush=True)


def find_network(parent: Path, network: str, fingerprint: str, epochs: int) -> Path | None:
    """The student.pth of a finished run of `network` alone in a folder of `parent`, on the same data and as long.

    Prints why a run of that network does not serve.
    """
    for folder in sorted(path.parent for path in parent.glob("*/config.yaml")):
        config, result = read_config(folder), _read(folder / "result.json")
        if not config or not result or config.get("teacher") or config.get("student") != network:
            continue
        if config.get("fingerprint") != fingerprint:
            reason = "it saw other data"
        elif config.get("epochs") != epochs:
            reason = f"it was trained for {config.get('epochs')} epochs, not {epochs}"
        elif result.get("epoch") != epochs:
            reason = f"it stopped after {result.get('epoch')} of {epochs} epochs"
        elif not (folder / "student.pth").exists():
            reason = "its student.pth is missing"
        else:
            return folder / "student.pth"
        print(f"teacher: not the one in {folder}: {reason}")
    return None


def is_unfinished(folder: Path) -> bool:
    """Whether a run in `folder` stopped before its last epoch."""
    result = _read(folder / "result.json")  # missing where the run was killed between last.pt and the rest
    return (folder / "last.pt").exists() and (result is None or result.get("epoch") != result.get("epochs"))


def read_config(folder: Path) -> dict | None:
    """The config.yaml of a run, None where there is none that can be read."""
    return _read(folder / "config.yaml")


def _read(path: Path) -> dict | None:
    try:
        content = yaml.safe_load(path.read_text())  # JSON is YAML too
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
