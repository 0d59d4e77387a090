"""The cells of a table: runs of a training script, each in its own process; finished runs are kept."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cifar100
from ablations.benchmarks import BENCHMARKS, Benchmark
from common.run.earlier_runs import read_config, read_result
from common.run.errors import UserError
from common.run.options import MAY_CHANGE, option, settings_of


@dataclass(eq=False)
class Cell:
    """One run of a script.

    Attributes:
        folder: its --out.
        given: its other options, by name ("batch_size").
        after: the run that trains its teacher and must finish first, or None.
        script: the module of the training script.
    """

    folder: Path
    given: dict[str, Any]
    after: "Cell | None" = None
    script: ModuleType = cifar100

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.script]

    @property
    def network(self) -> Path:
        """File of the trained network, in the shared checkpoint format."""
        return self.folder / "student.pth"

    @property
    def log(self) -> Path:
        """File with the run's console output."""
        return self.folder / "output.log"

    def result(self) -> dict | None:
        """The run's result.json, or None if it is unfinished or its settings are unknown."""
        result, unit = self._read_result(), self.benchmark.unit
        finished = result and result[unit] == result[f"{unit}s"] and read_config(self.folder) is not None
        return result if finished else None

    def _read_result(self) -> dict | None:
        results = [read_result(self.folder, self.benchmark.unit, metric) for metric in self.benchmark.metrics]
        return results[0] if all(results) else None

    def settings(self) -> dict[str, Any]:
        """All settings, resolved as the script resolves them, for the device of the existing run if there is one.

        Raises:
            UserError: the options are invalid, as far as the script can tell without the data; the folder holds a run
                with different settings, or its settings cannot be read.
        """
        stored = read_config(self.folder)
        if stored is None and self._read_result() and not (self.folder / "last.pt").exists():
            raise UserError(f"{self.folder / 'config.yaml'} is missing or damaged: restore it, or remove the folder")
        stored = stored or {}
        device = stored.get("device")
        kept = {"device": device} if isinstance(device, str) and "device" not in self.given else {}
        args = self.script.parse_args(to_argv(kept | self.given | {"out": self.folder}))
        self.benchmark.check(self.script, args)
        settings, teacher = settings_of(args), stored.get("teacher_ckpt")
        if self.after:
            del settings["teacher_ckpt"]  # a path, which may be relative to another directory
            if teacher and Path(teacher).parent.name != self.after.folder.name:
                raise UserError(
                    f"the teacher of {self.folder} was {teacher} but would now be {self.after.network}: keep the first "
                    "of --seeds (append new ones), or choose another --out"
                )
        if difference := first_difference(stored, settings):
            raise UserError(f"{self.folder} holds a run with different settings: {difference}; choose another --runs")
        return settings

    def command(self, device: str | None) -> list[str]:
        """The command that starts the run, or resumes it."""
        given = self.given | {"out": self.folder} | ({"device": device} if device else {})
        if (self.folder / "last.pt").exists():
            given |= {"resume": True}
            given.pop("teacher_ckpt", None)  # last.pt contains the teacher
        return [sys.executable, str(self.script.__file__), *to_argv(given)]


def to_argv(given: dict[str, Any]) -> list[str]:
    """Options by name, as the words of a command line."""
    words = []
    for name, value in given.items():
        if value is True:
            words.append(option(name))
        elif isinstance(value, list):
            words += [option(name), *map(str, value)]
        else:
            words.append(f"{option(name)}={value}")
    return words


def first_difference(stored: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """The first setting in both that may not change and differs, as in "--lr is 0.1 but was 0.05"."""
    for name, was in stored.items():
        if name in settings and name not in MAY_CHANGE:
            value, same = settings[name], settings[name] == was
            if name == "teacher_ckpt" and value and was:
                same = Path(value).resolve() == Path(was).resolve()
            if not same:
                return f"{'the data' if name == 'fingerprint' else option(name)} is {value} but was {was}"
    return None


def with_dependencies(cells: Iterable[Cell]) -> list[Cell]:
    """The cells and those they depend on, without duplicates, after checking their settings and data.

    Raises:
        UserError: as `Cell.settings`; the data cannot be loaded or is smaller than a batch; an existing run used other
            data.
    """
    cells = list(dict.fromkeys(each for cell in cells for each in (cell.after, cell) if each))
    settings = [cell.settings() for cell in cells]
    data_dir = Path(settings[0]["data_dir"])
    stored = {cell.folder: config for cell in cells if (config := read_config(cell.folder))}
    moved = any(Path(config.get("data_dir", "")).resolve() != data_dir.resolve() for config in stored.values())
    fingerprints = {}
    if moved or not all(cell.result() for cell in cells):
        # Load it once before any run, so that concurrent runs find it downloaded.
        data = cells[0].benchmark.load(settings[0])
        fingerprints[data_dir] = data.fingerprint
        if (batch_size := max(each["batch_size"] for each in settings)) > len(data.train):
            raise UserError(f"--batch-size {batch_size}: there are only {len(data.train)} training images")
    fingerprints |= {folder: config.get("fingerprint") for folder, config in stored.items()}
    (first, expected), *more = fingerprints.items()
    for folder, fingerprint in more:
        if fingerprint != expected:
            raise UserError(f"{folder} and {first} used different images: choose another --out or --data-dir")
    return cells


def run_cells(cells: list[Cell], jobs: int = 1, devices: Iterable[str] = (), networks_of: Iterable[Cell] = ()) -> None:
    """Run the unfinished ones of `cells` (from `with_dependencies`), `jobs` at a time on each of `devices`.

    Without `devices`, each run chooses its own, as cifar100.py does. A run's output goes to output.log in its folder.
    Interrupted runs are resumed. If a run fails, those that depend on it are skipped and the others continue.

    Args:
        networks_of: cells whose networks are needed, not just their results.

    Raises:
        UserError: some runs failed; raised after all others have ended.
    """
    waiting = [cell for cell in cells if not cell.result()]
    needed = {*networks_of, *(cell.after for cell in waiting)}  # a fresh clone has results, but no networks
    waiting = [cell for cell in cells if cell in waiting or (cell in needed and not cell.network.exists())]
    print(f"{len(cells)} runs, {len(cells) - len(waiting)} already finished", flush=True)

    free = [device for device in (list(devices) or [None]) for _ in range(jobs)]
    environment = dict(os.environ)
    if len(free) > 1:  # one thread per core in every process would oversubscribe the CPU
        environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // len(free))))
    running: dict[Cell, tuple[subprocess.Popen, str | None]] = {}
    failed, stopped = [], []  # stopped: by --max-minutes
    try:
        while waiting or running:
            for cell in [cell for cell in waiting if cell.after not in (*waiting, *running)]:
                if blocked_by := [cells for cells in (failed, stopped) if cell.after in cells]:
                    waiting.remove(cell)
                    blocked_by[0].append(cell)
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
                    unit, (metric, title) = cell.benchmark.unit, next(iter(cell.benchmark.metrics.items()))
                    text = f"{title} {result['last'][metric]:.2f} % after the last {unit}" if result else None
                    print(f"{cell.folder}: {text or _last_message(cell)}", flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    if failed:
        raise UserError(f"{len(failed)} of the runs failed (see {failed[0].log}): finished runs are kept")
    if stopped:
        print(f"{len(stopped)} of the runs are unfinished: rerun the command to continue")


def _start(cell: Cell, device: str | None, environment: dict[str, str]) -> subprocess.Popen:
    cell.folder.mkdir(parents=True, exist_ok=True)
    print(f"{cell.folder}: started", flush=True)
    with cell.log.open("a") as log:
        return subprocess.Popen(cell.command(device), stdout=log, stderr=subprocess.STDOUT, env=environment)


def _last_message(cell: Cell) -> str:
    """The last error in a run's output, or else its last line."""
    lines = cell.log.read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no output")


def mean_and_deviation(values: list[float], digits: int = 2) -> str:
    """ "76.62", or "76.62 ± 0.21" with the sample standard deviation if there are several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
