"""Time and peak memory of training steps. FLOPs are in flops.py."""

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch


@dataclass(frozen=True)
class Step:
    """A training step: `run(i)` does step i = 0, 1, ...

    Attributes:
        distinct: numbers of steps with distinct sets of paths; every other step repeats one of these.
    """

    run: Callable[[int], None]
    distinct: Sequence[int] = (0,)

    def run_distinct(self) -> None:
        """Do each distinct step once. In the first ones, cuDNN benchmarks algorithms and SGD allocates momentum."""
        for i in self.distinct:
            self.run(i)


def peak_memory(build: Callable[[], Step], device: str) -> float:
    """The most MiB that PyTorch has allocated at any time during the distinct steps, after a warm-up; 0 if unknown.

    On CUDA this is the allocator's count, on the CPU the profiler's record of every allocation, warm-up included.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        step = build()
        step.run_distinct()
        torch.cuda.reset_peak_memory_stats(device)  # forgets the workspaces of cuDNN's search
        step.run_distinct()
        return torch.cuda.max_memory_allocated(device) / 2**20
    if not device.startswith("cpu"):
        return 0.0
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step = build()
        step.run_distinct()
        step.run_distinct()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate(size for _, size in changes)) / 2**20


def median_seconds(steps: list[Step], repeats: int, device: str) -> list[float]:
    """The median seconds of each step over `repeats` rounds, after a warm-up with its distinct steps.

    The steps take turns, in alternating order, so a slowdown of the machine affects all of them.
    """
    synchronize = partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None
    for step in steps:
        step.run_distinct()
    seconds = [[] for _ in steps]
    for i in range(repeats):
        pairs = list(zip(steps, seconds, strict=True))
        for step, of_step in pairs if i % 2 else reversed(pairs):
            synchronize()
            began = time.perf_counter()
            step.run(i)
            synchronize()
            of_step.append(time.perf_counter() - began)
    return [statistics.median(of_step) for of_step in seconds]
