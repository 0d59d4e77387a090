"""Time and peak memory of training steps. A step is a function of its number i = 0, 1, ...

FLOPs are in flops.py.
"""

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch

Step = Callable[[int], None]


def peak_memory(build: Callable[[], Step], device: str) -> float:
    """The most MiB that PyTorch allocates while `build` builds a step and two of them are done; 0 if unknown.

    On CUDA this is the allocator's count, on the CPU the profiler's record of every allocation.
    """

    def two_steps() -> None:
        step = build()
        step(0)
        step(1)

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        two_steps()
        return torch.cuda.max_memory_allocated(device) / 2**20
    if not device.startswith("cpu"):
        return 0.0
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        two_steps()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate(size for _, size in changes)) / 2**20


def median_seconds(steps: list[Step], repeats: int, device: str) -> list[float]:
    """The median seconds of each step over `repeats` rounds, after one round to warm up.

    The steps take turns, in alternating order, so a slowdown of the machine affects all of them.
    """
    synchronize = partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None
    seconds = [[] for _ in steps]
    for i in range(1 + repeats):
        pairs = list(zip(steps, seconds, strict=True))
        for step, of_step in pairs if i % 2 else reversed(pairs):
            synchronize()
            began = time.perf_counter()
            step(i)
            synchronize()
            of_step.append(time.perf_counter() - began)
    return [statistics.median(of_step[1:]) for of_step in seconds]
