"""What a run of detection.py leaves in its --out beside last.pt, and what it prints; compare common/run/folder.py.

Its state counts iterations. The log has a row at each checkpoint that is due, with METRICS where there was a test.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..run import folder as run_folder
from ..run.checkpoint import save
from .evaluation import METRICS
from .fcfd import TASK_LOSSES, TERMS


def publish(out: Path, state: dict[str, Any]) -> None:
    """Write every file but last.pt; the best ones are only due when the last iteration is the best one.

    Args:
        state: as in last.pt: "config", "iteration" (how many are done), "log", "best" (an iteration and its METRICS, {}
            before the first test), "teacher_accuracy", "student" (a state dict), "classes" and "made_with".
    """
    last, best = last_tested(state), state["best"]
    tested_now = last.get("iteration") == state["iteration"]
    shared = {
        "model": state["student"],
        "iteration": state["iteration"],
        "accuracy": last["AP"] if tested_now else None,
        "best_acc": best.get("AP"),
        "classes": state["classes"],
        "min_size": state["config"]["min_size"],
    }
    save(shared, out / "student.pth")
    if best.get("iteration") == state["iteration"]:
        save(shared, out / "student_best.pth")
        run_folder.keep_as_best(out)
    result = {
        "iteration": state["iteration"],
        "iterations": state["config"]["iterations"],
        "best": best or None,
        "last": last or None,
        "teacher": state["teacher_accuracy"],
        "seconds": seconds(state),
        **state["made_with"],
    }
    run_folder.write_tables(out, state["log"], state["config"], result)


def add_row(state: dict[str, Any], lr: float, accuracy: dict[str, float | None], seconds: float) -> None:
    """Make of the state's "sums" a row of its log, and of `accuracy`, METRICS or {}, its "best" if it is better.

    Args:
        lr: of the last iteration.
        seconds: that the test took.
    """
    sums, done, device = state["sums"], state["iteration"], state["config"]["device"]
    row = {
        "iteration": done,
        "lr": lr,
        **{name: sums[name] / sums["steps"] if name in sums else "" for name in ("loss", *TERMS, *TASK_LOSSES)},
        **{name: accuracy.get(name) for name in METRICS},
        "seconds": sums["seconds"] + seconds,
        "images_per_s": state["config"]["batch_size"] * sums["steps"] / sums["seconds"],
        "waiting_percent": 100 * sums["waited"] / sums["seconds"],
        "peak_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20 if device.startswith("cuda") else "",
    }
    state["log"].append(row)
    state["sums"] = {}
    if accuracy and accuracy["AP"] > state["best"].get("AP", -1):
        state["best"] = {"iteration": done, **accuracy}


def last_tested(state: dict[str, Any]) -> dict[str, Any]:
    """The iteration and the METRICS of the last test, {} before the first one."""
    rows = [row for row in state["log"] if row["AP"] is not None]
    return {key: rows[-1][key] for key in ("iteration", *METRICS)} if rows else {}


def seconds(state: dict[str, Any]) -> float:
    """How long the run took so far, tests included."""
    return sum(row["seconds"] for row in state["log"]) + state["sums"].get("seconds", 0.0)


def print_row(state: dict[str, Any]) -> None:
    """One line on the iterations since the last one."""
    row, total = state["log"][-1], state["config"]["iterations"]
    tested = "" if row["AP"] is None else f"AP {row['AP']:.2f}  best {state['best']['AP']:.2f}  "
    tqdm.write(
        f"iteration {row['iteration']:6}/{total}  loss {row['loss']:.4f}  {tested}{row['seconds']:.1f} s, "
        f"{row['images_per_s']:.1f} images/s, {row['waiting_percent']:.0f} % of it waiting for data"
    )
    sys.stdout.flush()


def report(state: dict[str, Any]) -> None:
    """Print the closing lines of a finished run."""
    config = state["config"]
    for name, tested in (("best", state["best"]), ("last", last_tested(state)), ("teacher", state["teacher_accuracy"])):
        if tested:
            when = f"iteration {tested['iteration']}" if name != "teacher" else "before distillation"
            print(f"{name:8} {in_words(tested)}, {when}")
    print(f"time     {seconds(state) / 60:.1f} minutes on {state['made_with']['device']}")
    print(f"{config['student']} lies in {config['out']}/student.pth (last) and student_best.pth", flush=True)


def in_words(tested: dict[str, Any]) -> str:
    """METRICS, with a dash for what the test images have no object of."""
    return ", ".join(f"{name} {'-' if tested[name] is None else f'{tested[name]:.2f}'}" for name in METRICS)
