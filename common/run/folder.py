"""What a run leaves in its --out: last.pt is the one truth, replaced atomically; all else is written again from it.

config.yaml     every setting, resolved          student.pth, student_best.pth   plain networks to share
log.csv         a row an epoch                   last.pt, best.pt                everything, to go on or analyse
result.json     best and last accuracy

Where the teacher is trained too there are teacher.pth and teacher_best.pth, and what is said of it in the state, the
log and the result has names that start with "teacher_".
"""

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from .checkpoint import load, save, write_atomically
from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PREFIX = {"student": "", "teacher": "teacher_"}  # of what is said of a network that is trained
MAY_CHANGE = ("device", "data_dir", "out", "max_minutes", "workers", "visualize")  # between a run and its resumption


@contextlib.contextmanager
def open_run(out: Path, resume: bool, script: str = "cifar100", unit: str = "epoch") -> Iterator[dict[str, Any] | None]:
    """Make the folder if need be and keep it to this process; gives the state to resume from, None for a fresh run.

    Folders that were made here and into which nothing was saved are removed again at the end.

    Args:
        unit: in what the run's state counts how far it has come. The log has a row for each epoch.

    Raises:
        UserError: it holds a run and `resume` is off; it holds none, or one of another script than `script`, and
            `resume` is on; another process is at work in it; it cannot be made, or written into.
    """
    last = out / "last.pt"
    if resume and not last.exists():
        raise UserError(f"there is nothing to resume in {out}: start without --resume")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"cannot write into the folder {out} ({error}): choose another --out") from error
    try:
        with locked(out):
            if last.exists() and not resume:
                raise UserError(f"{out} holds a run already: go on with --resume, or choose another --out")
            yield _read_state(last, script, unit) if resume else None
    finally:
        with contextlib.suppress(OSError):  # until one is not empty
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder` until the end of the context, or of this process, however that ends.

    The lock is on the folder itself, so no file is left behind. On Windows, and on file systems without such locks,
    there is none.

    Raises:
        UserError: another process has it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is at work in {folder}: wait until it has ended, or choose another --out"
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def _read_state(last: Path, script: str, unit: str) -> dict[str, Any]:
    state = load(last)
    config = state.get("config") if isinstance(state, dict) else None
    if isinstance(config, dict) and (other := config.get("script", "cifar100")) != script:
        raise UserError(f"{last.parent} holds a run of {other}.py: resume it with that script, or choose another --out")
    keys = {"config": dict, unit: int, "log": list, "best": dict, "student": dict, "made_with": dict}
    whole = isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in keys.items())
    if not whole or len(state["log"]) != state.get("epoch", len(state["log"])):
        raise UserError(f"{last} is not what a run leaves: choose another --out")
    return state


def restore(out: Path, state: dict[str, Any], parts: dict[str, Any]) -> None:
    """Load what `state` has under the name of each part into it: networks, optimizer, scaler.

    Raises:
        UserError: it is of other parts.
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{out / 'last.pt'} does not fit this run: choose another --out") from error


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
    if key in ("teacher_ckpt", "backbone_ckpt") and a and b:
        return Path(a).resolve() == Path(b).resolve()
    return a == b


def save_run(out: Path, state: dict[str, Any], networks: dict[str, dict[str, torch.Tensor]]) -> None:
    """Replace last.pt by `state`, then the files that follow from it; arguments as in `publish`."""
    save(state, out / "last.pt")
    publish(out, state, networks)


def publish(out: Path, state: dict[str, Any], networks: dict[str, dict[str, torch.Tensor]]) -> None:
    """Write every file but last.pt.

    `best.pt` and a network's file of the best epoch are only due when the last epoch is the best one: before a later
    epoch became the last, they were written.

    Args:
        state: as in last.pt: "config", "epoch" (how many are done), "log" (a row each), "best" and
            "teacher_accuracy" and "made_with" (see `made_with`), and whatever else a script needs to go on.
        networks: the plain state dicts after the last epoch of the "student" and, where it is trained too, the
            "teacher".
    """
    log = state["log"]
    for role, model in networks.items():
        prefix = PREFIX[role]
        best = state[f"{prefix}best"]
        shared = {
            "model": model,
            "epoch": state["epoch"],
            "accuracy": log[-1][f"{prefix}test_top1"],
            "best_acc": best["top1"],
        }
        save(shared, out / f"{role}.pth")
        if best["epoch"] == state["epoch"]:
            save(shared, out / f"{role}_best.pth")
    if state["best"]["epoch"] == state["epoch"]:
        keep_as_best(out)
    write_tables(out, log, state["config"], result_of(state))


def keep_as_best(out: Path) -> None:
    """Copy last.pt to best.pt."""
    with open(out / "last.pt", "rb") as whole:
        write_atomically(out / "best.pt", lambda file: shutil.copyfileobj(whole, file))


def write_tables(out: Path, log: list[dict], config: dict, result: dict) -> None:
    """Write log.csv, config.yaml and result.json; rows of the log all have the same keys."""
    table = io.StringIO()
    writer = csv.DictWriter(table, log[0] if log else [])
    writer.writeheader()
    writer.writerows(log)
    _write_text(out / "log.csv", table.getvalue())
    _write_text(out / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    _write_text(out / "result.json", json.dumps(result, indent=2) + "\n")


def result_of(state: dict[str, Any]) -> dict[str, Any]:
    """What result.json says of a run: accuracies in percent on the test set, seconds, commit, torch, device."""
    log = state["log"]
    accuracies = {}
    for prefix in PREFIX.values():
        if f"{prefix}best" in state:
            accuracies[f"{prefix}best"] = state[f"{prefix}best"]
            last = {top: log[-1][f"{prefix}test_{top}"] for top in ("top1", "top5")}
            accuracies[f"{prefix}last"] = {"epoch": state["epoch"], **last}
    return {
        "epoch": state["epoch"],
        "epochs": state["config"]["epochs"],
        **accuracies,
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
    teacher = f"teacher {row['teacher_test_top1']:.2f} %  " if "teacher_test_top1" in row else ""
    waiting = f", {row['waiting_percent']:.0f} % of it waiting for data" if "waiting_percent" in row else ""
    print(
        f"epoch {row['epoch']:3}/{epochs}  loss {row['loss']:.4f}  train {row['train_top1']:.2f} %  "
        f"test {row['test_top1']:.2f} %  best {state['best']['top1']:.2f} %  {teacher}"
        f"{row['seconds']:.1f} s, {row['images_per_s']:.0f} images/s{waiting}",
        flush=True,
    )


def report(state: dict[str, Any]) -> None:
    """Print the closing lines of a finished run."""
    result, config = result_of(state), state["config"]
    names = ("best", "last", "teacher", "teacher_best", "teacher_last")
    for name, accuracy in ((name, result[name]) for name in names if result.get(name)):
        when = f"epoch {accuracy['epoch']}" if name != "teacher" else "before distillation"
        title = name.replace("_", " ")
        print(f"{title:8} {accuracy['top1']:.2f} % top-1, {accuracy['top5']:.2f} % top-5 on the test set, {when}")
    print(f"time     {result['seconds'] / 60:.1f} minutes on {result['device']}")
    for role, prefix in PREFIX.items():
        if f"{prefix}best" in result:
            print(f"{config[role]} lies in {config['out']}/{role}.pth (last) and {role}_best.pth", flush=True)


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
