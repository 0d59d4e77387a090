"""The cells of a table: runs of a training script, each a process of its own; finished ones are kept."""

import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cifar100
from common.data.sources import load_data
from common.run.earlier_runs import read_config, read_result
from common.run.errors import UserError
from common.run.folder import check_settings


@dataclass(eq=False)
class Cell:
    """One run of a script.

    Attributes:
        folder: its --out.
        given: the other options, by the names of common/published.yaml.
        after: the run whose network teaches this one and must be there first, None where there is none.
        script: the module of the script that is run, if that is not cifar100.py.
    """

    folder: Path
    given: dict[str, Any]
    after: "Cell | None" = None
    script: ModuleType = cifar100

    @property
    def network(self) -> Path:
        """The trained network, in the shared format."""
        return self.folder / "student.pth"

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.folder / "output.log"

    def result(self) -> dict | None:
        """The result.json of the run, None while it is not finished or where it is not known with what settings."""
        result = read_result(self.folder)
        finished = result and result["epoch"] == result["epochs"] and read_config(self.folder) is not None
        return result if finished else None

    def settings(self) -> Namespace:
        """All settings, resolved as the script does it, for the device of the run that is there already.

        Raises:
            UserError: what the script would say of the options, as far as it can without the data; the folder holds
                a run with other settings, or with settings that are lost.
        """
        config = read_config(self.folder)
        if config is None and read_result(self.folder) and not (self.folder / "last.pt").exists():
            raise UserError(f"{self.folder / 'config.yaml'} is missing or damaged: put it back, or remove the folder")
        stored = getattr(self.script, "ADDED", {}) | config if config else {}
        of_the_machine = {key: stored[key] for key in ("device", "amp") if isinstance(stored.get(key), str)}
        settings = self.script.settle(self.given | {"out": str(self.folder)}, of_the_machine)
        self.script.build_networks(settings, num_classes=10)
        wanted, teacher = dict(vars(settings)), stored.get("teacher_ckpt")
        if self.after:
            del wanted["teacher_ckpt"]  # a path, which changes with the place from which a table is made
            if teacher and Path(teacher).parent.name != self.after.folder.name:
                raise UserError(
                    f"the teacher of {self.folder} was {teacher} and would be {self.after.network}: keep the first of "
                    "--seeds (further ones go to the end), or choose another --out"
                )
        try:
            check_settings(stored, wanted)
        except UserError as error:
            raise UserError(f"(in {self.folder}) {error}") from error
        return settings

    def command(self, device: str | None) -> list[str]:
        """The command of the run, or of the rest of it."""
        given = self.given | {"out": self.folder} | ({"device": device} if device else {})
        words = [sys.executable, str(self.script.__file__)]
        if (self.folder / "last.pt").exists():
            words.append("--resume")
            given.pop("teacher_ckpt", None)  # last.pt has the teacher
        for key, value in given.items():
            option = f"--{key.replace('_', '-')}"
            if value is True:
                words.append(option)
            else:
                words += [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]
        return words


def with_needed(cells: Iterable[Cell]) -> list[Cell]:
    """The cells and those they need, each once, all checked, and the data, which must be the same for all of them.

    Raises:
        UserError: as `Cell.settings`; the data cannot be loaded, are less than a batch, or a run that is there saw
            others.
    """
    cells = list(dict.fromkeys(each for cell in cells for each in (cell.after, cell) if each))
    c, *others = [cell.settings() for cell in cells]
    stored = {cell.folder: config for cell in cells if (config := read_config(cell.folder))}
    moved = [s for s in stored.values() if Path(s.get("data_dir", "")).resolve() != Path(c.data_dir).resolve()]
    fingerprints = {}
    if moved or not all(cell.result() for cell in cells):
        # Here and once, so that runs that start together find the data downloaded.
        data = load_data(c.dataset, c.data_dir, c.subset, c.test_subset)
        fingerprints[Path(c.data_dir)] = data.fingerprint
        if (batch_size := max(each.batch_size for each in (c, *others))) > len(data.train):
            raise UserError(f"--batch-size {batch_size}: there are only {len(data.train)} training images")
    fingerprints |= {folder: config.get("fingerprint") for folder, config in stored.items()}
    (first, expected), *more = fingerprints.items()
    for folder, fingerprint in more:
        if fingerprint != expected:
            raise UserError(f"the run in {folder} saw other images than {first}: choose another --out or --data-dir")
    return cells


def run_cells(cells: list[Cell], jobs: int = 1, devices: Iterable[str] = (), networks_of: Iterable[Cell] = ()) -> None:
    """Run those of `cells` (from `with_needed`) that are not finished, `jobs` at once on each of `devices`.

    Without `devices` a run chooses its own, as cifar100.py does. It prints to output.log in its folder. One that was
    broken off is resumed. When one fails, those that need it are left out and the others go on.

    Args:
        networks_of: those of which not the numbers alone are wanted.

    Raises:
        UserError: at the end: some failed.
    """
    waiting = [cell for cell in cells if not cell.result()]
    needed = {
        *networks_of,
        *(cell.after for cell in waiting),
    }  # a clone has results without networks
    waiting = [cell for cell in cells if cell in waiting or (cell in needed and not cell.network.exists())]
    print(f"{len(cells)} runs, of which {len(cells) - len(waiting)} are done", flush=True)

    free = [device for device in (list(devices) or [None]) for _ in range(jobs)]
    environment = dict(os.environ)
    if len(free) > 1:  # processes that each start a thread a core wait for one another most of the time
        environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // len(free))))
    running: dict[Cell, tuple[subprocess.Popen, str | None]] = {}
    failed, stopped = [], []  # stopped: by --max-minutes
    try:
        while waiting or running:
            for cell in [cell for cell in waiting if cell.after not in (*waiting, *running)]:
                if lost := [cells for cells in (failed, stopped) if cell.after in cells]:
                    waiting.remove(cell)
                    lost[0].append(cell)
                elif free:
                    waiting.remove(cell)
                    device = free.pop(0)
                    running[cell] = (_start(cell, device, environment), device)
            time.sleep(0.1)
            for cell, (process, device) in list(running.items()):
                if process.poll() is not None:
                    del running[cell]
                    free.append(device)
                    result = cell.result() if process.returncode == 0 else None
                    if result is None:
                        (failed if process.returncode else stopped).append(cell)
                    text = f"{result['last']['top1']:.2f} % after the last epoch" if result else _last_word(cell)
                    print(f"{cell.folder}: {text}", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    if failed:
        raise UserError(f"{len(failed)} of the runs failed (look at {failed[0].log}): what is finished is kept")
    if stopped:
        print(f"{len(stopped)} of the runs are not finished: repeat the command to go on")


def _start(cell: Cell, device: str | None, environment: dict[str, str]) -> subprocess.Popen:
    cell.folder.mkdir(parents=True, exist_ok=True)
    print(f"{cell.folder}: started", flush=True)
    with cell.log.open("a") as log:
        return subprocess.Popen(cell.command(device), stdout=log, stderr=subprocess.STDOUT, env=environment)


def _last_word(cell: Cell) -> str:
    """The last error that a run printed, else its last line."""
    lines = cell.log.read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no word")


def mean_and_deviation(values: list[float], digits: int = 2) -> str:
    """ "76.62", or "76.62 ± 0.21" with the sample standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
