"""Files that detection.py writes to --out besides last.pt, and its console output. See also common/run/folder.py.

Progress is counted in iterations. The log has one row per --save-every or test, with METRICS if it is a test.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm

from ..run import checkpoint
from ..run.distributed import all_reduce, broadcast_buffers, rank, world_size
from ..run.folder import copy_to_best, write_tables
from ..run.run import Run, peak_memory
from .evaluation import METRICS
from .fcfd import TASK_LOSSES, TERMS


def save(run: Run) -> None:
    """Replace last.pt, from which all other files are derived."""
    broadcast_buffers(run.networks.values())
    run.state["sums"] = all_reduce_mean(run.state["sums"], run.device)
    run.check_weights(f"in iteration {run.state['iteration']}")
    run.save()


def publish(run: Run) -> None:
    """Write every file except last.pt; those of the best iteration only if it is the last one.

    In addition to the keys of every run, run.state has "iteration" (how many are done), "best" (an iteration and its
    METRICS, {} before the first test) and "classes".
    """
    if rank() > 0:
        return
    out, state = run.out, run.state
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
    checkpoint.save(shared, out / "student.pth")
    if best.get("iteration") == state["iteration"]:
        checkpoint.save(shared, out / "student_best.pth")
        copy_to_best(out)
    result = {
        "iteration": state["iteration"],
        "iterations": state["config"]["iterations"],
        "best": best or None,
        "last": last or None,
        "teacher": state["teacher_accuracy"],
        "seconds": seconds(state),
        **state["made_with"],
    }
    write_tables(out, state["log"], state["config"], result)


def all_reduce_mean(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Average each number over all ranks."""
    if world_size() == 1:
        return values
    total = all_reduce(torch.tensor(list(values.values()), dtype=torch.float64, device=device))
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


def add_row(
    state: dict[str, Any],
    lr: float,
    accuracy: dict[str, float | None],
    seconds: float,
    terms: Iterable[str] = TERMS,
) -> None:
    """Append the state's "sums" to its log as a row, and update its "best" if `accuracy` (METRICS, or {}) is better.

    Args:
        lr: of the last iteration.
        seconds: spent on the test.
        terms: those with a column, even if they are not used.
    """
    sums, done, device = state["sums"], state["iteration"], state["config"]["device"]
    row = {
        "iteration": done,
        "lr": lr,
        **{name: sums[name] / sums["steps"] if name in sums else "" for name in ("loss", *terms, *TASK_LOSSES)},
        **{name: accuracy.get(name) for name in METRICS},
        "seconds": sums["seconds"] + seconds,
        "images_per_s": state["config"]["batch_size"] * sums["steps"] / sums["seconds"],
        "waiting_percent": 100 * sums["waited"] / sums["seconds"],
        "peak_memory_mb": peak_memory(torch.device(device)),
    }
    state["log"].append(row)
    state["sums"] = {}
    if accuracy and accuracy["AP"] > state["best"].get("AP", -1):
        state["best"] = {"iteration": done, **accuracy}


def last_tested(state: dict[str, Any]) -> dict[str, Any]:
    """The iteration and METRICS of the last test; {} before the first one."""
    rows = [row for row in state["log"] if row["AP"] is not None]
    return {key: rows[-1][key] for key in ("iteration", *METRICS)} if rows else {}


def seconds(state: dict[str, Any]) -> float:
    """Duration of the run so far, including tests."""
    return sum(row["seconds"] for row in state["log"]) + state["sums"].get("seconds", 0.0)


def print_row(state: dict[str, Any]) -> None:
    """Print one line about the iterations since the previous row."""
    row, total = state["log"][-1], state["config"]["iterations"]
    tested = "" if row["AP"] is None else f"AP {row['AP']:.2f}  best {state['best']['AP']:.2f}  "
    tqdm.write(
        f"iteration {row['iteration']:6}/{total}  loss {row['loss']:.4f}  {tested}{row['seconds']:.1f} s, "
        f"{row['images_per_s']:.1f} images/s, {row['waiting_percent']:.0f} % of the time waiting for data"
    )
    sys.stdout.flush()


def report(state: dict[str, Any]) -> None:
    """Print the closing lines of a finished run."""
    config = state["config"]
    for name, tested in (("best", state["best"]), ("last", last_tested(state)), ("teacher", state["teacher_accuracy"])):
        if tested:
            when = f"iteration {tested['iteration']}" if name != "teacher" else "before distillation"
            print(f"{name:8} {format_metrics(tested)}, {when}")
    print(f"time     {seconds(state) / 60:.1f} minutes on {state['made_with']['device']}")
    print(f"{config['student']} saved to {config['out']}/student.pth (last) and student_best.pth", flush=True)


def format_metrics(tested: dict[str, Any]) -> str:
    """METRICS as text, with a dash for None."""
    return ", ".join(f"{name} {'-' if tested[name] is None else f'{tested[name]:.2f}'}" for name in METRICS)
