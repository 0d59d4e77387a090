"""Running a script in a test, and comparing what two runs left."""

import csv
import subprocess
import sys
from pathlib import Path

import torch

import cifar100

SCRIPT = Path(cifar100.__file__)
SMALL = ["--dataset", "synthetic", "--subset", "120", "--test-subset", "60", "--batch-size", "32", "--device", "cpu"]
PAIR = ["--teacher", "resnet14", "--student", "resnet8", *SMALL]


def script(cwd, *args, code=0):
    """Run the script in a process of its own, in the folder `cwd`; its output."""
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def call(capsys, *args, code=0):
    """The same in this process, which is quicker."""
    assert cifar100.main([str(a) for a in args]) == code
    output = capsys.readouterr()
    return output.out if code == 0 else output.err


def tensors(value, path=""):
    """Every tensor in a nested state, by its place."""
    if torch.is_tensor(value):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, child in items for k, v in tensors(child, f"{path}/{key}").items()}


def assert_bit_for_bit(a, b):
    a, b = (tensors(torch.load(Path(folder) / "last.pt", weights_only=True)) for folder in (a, b))
    assert a.keys() == b.keys()
    assert len(a) > 100
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


def read_log(run):
    """The rows of a run's log.csv, every value as text."""
    with (Path(run) / "log.csv").open() as file:
        return list(csv.DictReader(file))
