"""Helpers that run scripts and compare the results of two runs."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import cifar100

SMALL = ["--dataset", "synthetic", "--subset", "120", "--test-subset", "60", "--batch-size", "32", "--device", "cpu"]
SMALL += ["--amp", "off"]  # the same on every CPU
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
PAIR = ["--teacher", "resnet14", "--student", "resnet8", *SMALL]
FEW_IMAGES = ["--subset", 40, "--test-subset", 20]  # two steps; overrides SMALL and must follow it


def run_script(cwd, *args, code=0, module=cifar100):
    """Run a script in a subprocess in `cwd`; returns stdout, or stderr if `code` is not 0."""
    command = [sys.executable, module.__file__, *map(str, args)]
    completed = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert completed.returncode == code, completed.stderr
    return completed.stdout if code == 0 else completed.stderr


@contextlib.contextmanager
def background_script(*options, module=cifar100, wait_for="epoch   1/"):
    """Run a script in its own process group; yields once it prints a line that starts with `wait_for`."""
    command = [str(word) for word in (sys.executable, module.__file__, *options)]
    # SIGINT is ignored if pytest runs in the background.
    handle_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=handle_ctrl_c, start_new_session=True) as process:
        try:
            assert any(line.startswith(wait_for) for line in process.stdout)
            yield process
        finally:
            process.kill()


def call(capsys, *args, code=0, module=cifar100):
    """Like `run_script`, but faster: runs in this process."""
    assert module.main([str(a) for a in args]) == code
    output = capsys.readouterr()
    return output.out if code == 0 else output.err


def assert_invalid(capsys, defaults, options, expected, module=cifar100):
    """The error is one line that contains `expected`, and nothing is written to the current folder.

    `defaults` are pairs of an option and its value; those in `options` are left out.
    """
    pairs = zip(defaults[::2], defaults[1::2], strict=True)
    kept = [word for pair in pairs if pair[0] not in options for word in pair]
    message = call(capsys, *kept, *options, code=2, module=module)
    assert message.startswith("error: ")
    assert expected in message
    assert message.count("\n") == 1
    assert not os.listdir()


@contextlib.contextmanager
def background_torchrun(*args):
    """Start a job of two ranks, with one thread per rank."""
    command = [*TORCHRUN, *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def torchrun(*args, code=0):
    """Run a job of two ranks; returns its output."""
    with background_torchrun(*args) as process:
        output = process.communicate(timeout=240)[0]
    assert (process.returncode == 0) == (code == 0), output
    assert code == 0 or f"exitcode  : {code} " in output
    return output


def kill_one_rank(process, name):
    """Kill one of the two ranks, whose command lines contain `name`; the job must end and report it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [int(child) for child in children if name in Path(f"/proc/{child}/cmdline").read_text()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "Traceback" not in output.split("torch/distributed/elastic")[0]
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def flatten_tensors(value, path=""):
    """All tensors in a nested state, keyed by path."""
    if torch.is_tensor(value):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, child in items for k, v in flatten_tensors(child, f"{path}/{key}").items()}


def assert_bitwise_equal(a, b):
    a, b = (flatten_tensors(torch.load(Path(folder) / "last.pt", weights_only=True)) for folder in (a, b))
    assert a.keys() == b.keys()
    assert len(a) > 100
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


def write_images(folder, sizes, classes=("n1", "n2", "n3"), image_size=(40, 36)):
    """Write JPEGs of seeded noise; `sizes` maps each split to its images per class."""
    rng = np.random.default_rng(0)
    for split, n in sizes.items():
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (*image_size, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.JPEG")
    return folder


def read_log(run):
    """Rows of a run's log.csv; all values are strings."""
    with (Path(run) / "log.csv").open() as file:
        return list(csv.DictReader(file))
