"""The cells of a table: runs of cifar100.py, each a process of its own, several at once; finished ones are kept."""

import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar100
from common import earlier_runs, run_folder
from common.errors import UserError

SCRIPT = Path(cifar100.__file__)


@dataclass(eq=False)
class Cell:
    """One run of cifar100.py.

    Attributes:
        folder: its --out.
        given: the other options, by the names of common/settings.yaml.
        after: the run whose network this one needs first, None where there is none.
    """

    folder: Path
    given: dict[str, Any]
    after: "Cell | None" = None

    @property
    def network(self) -> Path:
        """The trained network, in the shared format."""
        return self.folder / "student.pth"

    def result(self) -> dict | None:
        """The result.json of the run, None while it is not finished."""
        result = earlier_runs.read_result(self.folder)
        return result if result and result.get("epoch") == result.get("epochs") else None

    def settings(self) -> Namespace:
        """All settings, resolved as cifar100.py does it, for the device of the run that is there already.

        Raises:
            UserError: what cifar100.py would say of the options, as far as it can without the data; the folder holds
                a run with other settings.
        """
        stored = earlier_runs.read_config(self.folder) or {}
        of_the_machine = {key: stored[key] for key in ("device", "amp") if key in stored}
        settings = cifar100.settle(self.given | {"out": str(self.folder)}, of_the_machine)
        cifar100.build_networks(settings, num_classes=10)
        try:
            run_folder.check_settings(stored, vars(settings))
        except UserError as error:
            raise UserError(f"(in {self.folder}) {error}") from error
        return settings

    def command(self, device: str | None) -> list[str]:
        """The command of the run, or of the rest of it."""
        given = self.given | {"out": self.folder} | ({"device": device} if device else {})
        words = [sys.executable, str(SCRIPT)]
        for key, value in given.items():
            words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
        return words + (["--resume"] if (self.folder / "last.pt").exists() else [])


def run_cells(cells: Iterable[Cell], jobs: int = 1, devices: Iterable[str] = ()) -> None:
    """Run `cells`, and those they need, as far as they are not finished; `jobs` at once on each of `devices`.

    Without `devices` a run chooses its own, as cifar100.py does. It prints to <its folder>.log. One that was broken off
    is resumed. When one fails, those that need it are left out and the others go on.

    Raises:
        UserError: before anything is run, as `Cell.settings`; after all that can be run: some failed.
    """
    cells = list(dict.fromkeys(each for cell in cells for each in (cell.after, cell) if each))
    for cell in cells:
        cell.settings()
    waiting = [cell for cell in cells if not cell.result()]
    needed = {cell.after for cell in waiting}  # results may have been kept without the networks they are of
    waiting = [cell for cell in cells if cell in waiting or (cell in needed and not cell.network.exists())]
    print(f"{len(cells)} runs, of which {len(cells) - len(waiting)} are done", flush=True)

    free = [device for device in (list(devices) or [None]) for _ in range(jobs)]
    environment = dict(os.environ)
    if jobs > 1:  # processes that each start a thread a core wait for one another most of the time
        environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // jobs)))
    running, failed = {}, []
    try:
        while waiting or running:
            for cell in [cell for cell in waiting if cell.after not in (*waiting, *running)]:
                if cell.after in failed:
                    waiting.remove(cell)
                    failed.append(cell)
                elif free:
                    waiting.remove(cell)
                    device = free.pop(0)
                    running[cell] = (_start(cell, device, environment), device)
            time.sleep(0.1)
            for cell, (process, device) in list(running.items()):
                if process.poll() is not None:
                    del running[cell]
                    free.append(device)
                    if result := cell.result():
                        print(f"{cell.folder}: {result['last']['top1']:.2f} % after the last epoch", flush=True)
                    else:
                        failed.append(cell)
                        print(f"{cell.folder}: {_last_line(cell)}", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    if failed:
        raise UserError(f"{len(failed)} of the runs are not finished ({failed[0].folder}.log): repeat the command")


def _start(cell: Cell, device: str | None, environment: dict[str, str]) -> subprocess.Popen:
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{cell.folder}: started, prints to {cell.folder}.log", flush=True)
    with open(f"{cell.folder}.log", "a") as log:
        return subprocess.Popen(cell.command(device), stdout=log, stderr=subprocess.STDOUT, env=environment)


def _last_line(cell: Cell) -> str:
    lines = Path(f"{cell.folder}.log").read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it ended without a word"


def mean_and_deviation(values: list[float]) -> str:
    """ "76.62", or "76.62 ± 0.21" with the sample standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
