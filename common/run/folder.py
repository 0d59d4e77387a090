"""A run's output folder: its lock and its files.

last.pt is the source of truth and is replaced atomically. All other files are derived from it and can be rewritten:

config.yaml     every setting, resolved           student.pth, student_best.pth   plain networks
log.csv         one row per epoch                 best.pt                         last.pt of the best epoch
result.json     best and last accuracy

If the teacher is trained too, there are also teacher.pth and teacher_best.pth, and the names of its values in the log
and the result start with "teacher_".
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

PREFIX = {"student": "", "teacher": "teacher_"}  # of a trained network's values in the log and the result


@contextlib.contextmanager
def open_folder(out: Path, resume: bool) -> Iterator[None]:
    """Create the folder if needed and lock it. On exit, remove folders created here that are still empty.

    Raises:
        UserError: it holds a run and `resume` is off, another process uses it, or it cannot be created or written to.
    """
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the folder {out} ({error}): choose another --out") from error
    try:
        with locked(out):
            if (out / "last.pt").exists() and not resume:
                raise UserError(f"{out} already holds a run: continue it with --resume, or choose another --out")
            yield
    finally:
        with contextlib.suppress(OSError):  # until one is not empty
            for folder in created:
                folder.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder` until the context or this process ends.

    The lock is on the folder itself, without a lock file. There is no lock on Windows and file systems without flock.

    Raises:
        UserError: another process holds the lock.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is using {folder}: wait for it, or choose another --out") from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def read_state(out: Path, script: str, unit: str) -> dict[str, Any]:
    """The content of last.pt.

    Args:
        unit: of the run's progress, "epoch" or "iteration".

    Raises:
        UserError: it is missing or damaged, or belongs to another script.
    """
    last = out / "last.pt"
    if not last.exists():
        raise UserError(f"there is nothing to resume in {out}: start without --resume")
    state = load(last)
    config = state.get("config") if isinstance(state, dict) else None
    if isinstance(config, dict) and (other := config.get("script", "cifar100")) != script:
        name = f"ablations/{other}.py" if str(other).startswith("baseline") else f"{other}.py"
        name = {"baselines": "an earlier version of ablations/baseline_cifar100.py"}.get(other, name)
        raise UserError(f"{out} holds a run of {name}: resume it with that script, or choose another --out")
    kinds = {"config": dict, unit: int, "log": list, "best": dict, "student": dict, "made_with": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{last} was not written by a run: choose another --out")
    score, columns = {"epoch": ("top1", ("test_top1", "test_top5")), "iteration": ("AP", ("AP",))}[unit]
    try:
        rows, best = state["log"], state["best"]
        scores = [best] * bool(best or unit == "epoch") + [state.get("teacher_best"), state["teacher_accuracy"]]
        scores = [each for each in scores if each is not None]
        numbers = [value for each in (*rows, *scores, state.get("sums", {})) for value in each.values()]
        whole = all(isinstance(value, int | float) for value in numbers if value not in ("", None))
        whole &= all(row.keys() == rows[0].keys() >= {unit, "seconds", *columns} for row in rows)
        whole &= all(each[score] is not None for each in scores) and not (best and best[unit] is None)
        whole &= state[unit] > 0 and len(rows) == state.get("epoch", len(rows))
        whole &= unit == "epoch" or isinstance(state["classes"], list)
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{last} is damaged: choose another --out")
    return state


def check_structure(stored: Any, own: Any) -> None:
    """Raise a ValueError unless `stored` has the structure of `own`, with tensors of the same shapes and types."""
    if isinstance(own, dict):
        # Other versions of PyTorch may lack a flag that is off by default.
        if not isinstance(stored, dict) or any(own[key] for key in own.keys() - stored.keys()):
            raise ValueError
        for key in own.keys() & stored.keys():
            check_structure(stored[key], own[key])
            if key == "params" and stored[key] != own[key]:  # the optimizer's parameters, by index
                raise ValueError
    elif isinstance(own, list):
        if not isinstance(stored, list) or len(stored) != len(own):
            raise ValueError
        for theirs, ours in zip(stored, own, strict=True):
            check_structure(theirs, ours)
    elif torch.is_tensor(own):
        if not torch.is_tensor(stored) or (stored.shape, stored.dtype) != (own.shape, own.dtype):
            raise ValueError
    elif isinstance(own, int | float) and not isinstance(stored, int | float):
        raise ValueError


def publish(out: Path, state: dict[str, Any], networks: dict[str, dict[str, torch.Tensor]]) -> None:
    """Write every file but last.pt.

    `best.pt` and the networks' `*_best.pth` are written only if the last epoch is the best one. Otherwise those of the
    best epoch are still there.

    Args:
        networks: plain state dicts by role, "student" and optionally "teacher".
    """
    log = state["log"]
    for role, model in networks.items():
        best = state[f"{PREFIX[role]}best"]
        accuracy = log[-1][f"{PREFIX[role]}test_top1"]
        shared = {"model": model, "epoch": state["epoch"], "accuracy": accuracy, "best_acc": best["top1"]}
        save(shared, out / f"{role}.pth")
        if best["epoch"] == state["epoch"]:
            save(shared, out / f"{role}_best.pth")
    if state["best"]["epoch"] == state["epoch"]:
        copy_to_best(out)
    write_tables(out, log, state["config"], result_of(state))


def copy_to_best(out: Path) -> None:
    """Copy last.pt to best.pt."""
    with open(out / "last.pt", "rb") as last:
        write_atomically(out / "best.pt", lambda file: shutil.copyfileobj(last, file))


def write_tables(out: Path, log: list[dict], config: dict, result: dict) -> None:
    """Write log.csv, config.yaml and result.json. All rows of the log must have the same keys."""
    table = io.StringIO()
    writer = csv.DictWriter(table, log[0] if log else [])
    writer.writeheader()
    writer.writerows(log)
    texts = {
        "log.csv": table.getvalue(),
        "config.yaml": yaml.safe_dump(config, sort_keys=False),
        "result.json": json.dumps(result, indent=2) + "\n",
    }
    for name, text in texts.items():
        write_atomically(out / name, lambda file, text=text: file.write(text.encode()))


def result_of(state: dict[str, Any]) -> dict[str, Any]:
    """The content of result.json: test accuracies in percent, seconds, commit, PyTorch version, device, ranks."""
    log = state["log"]
    accuracies = {}
    for prefix in PREFIX.values():
        if f"{prefix}best" in state:
            last = {top: log[-1][f"{prefix}test_{top}"] for top in ("top1", "top5")}
            accuracies[f"{prefix}best"] = state[f"{prefix}best"]
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
    """The commit ("+": with uncommitted changes; "unknown": not in git), the PyTorch version and the device."""
    describe = ["describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        command = ["git", "-C", str(Path(__file__).parent), *describe]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"commit": commit, "torch": str(torch.__version__), "device": name}


def print_epoch(state: dict[str, Any]) -> None:
    """Print one line about the epoch that just finished."""
    row, epochs = state["log"][-1], state["config"]["epochs"]
    teacher = f"teacher {row['teacher_test_top1']:.2f} %  " if "teacher_test_top1" in row else ""
    waiting = f", {row['waiting_percent']:.0f} % of the time waiting for data" if "waiting_percent" in row else ""
    print(
        f"epoch {row['epoch']:3}/{epochs}  loss {row['loss']:.4f}  train {row['train_top1']:.2f} %  "
        f"test {row['test_top1']:.2f} %  best {state['best']['top1']:.2f} %  {teacher}"
        f"{row['seconds']:.1f} s, {row['images_per_s']:.0f} images/s{waiting}",
        flush=True,
    )


def report(state: dict[str, Any]) -> None:
    """Print the closing lines of a finished run."""
    result, config = result_of(state), state["config"]
    for name in ("best", "last", "teacher", "teacher_best", "teacher_last"):
        if accuracy := result.get(name):
            when = f"epoch {accuracy['epoch']}" if name != "teacher" else "before distillation"
            title = name.replace("_", " ")
            print(f"{title:8} {accuracy['top1']:.2f} % top-1, {accuracy['top5']:.2f} % top-5 on the test set, {when}")
    print(f"time     {result['seconds'] / 60:.1f} minutes on {result['device']}")
    for role, prefix in PREFIX.items():
        if f"{prefix}best" in result:
            print(f"{config[role]} saved to {config['out']}/{role}.pth (last) and {role}_best.pth", flush=True)
