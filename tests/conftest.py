from pathlib import Path

import pytest
import torch
from running import SMALL

import cifar100
from ablations import exit_branches

DATA = Path(__file__).parent / "data"


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def parity():
    """One batch, two networks, their bridges, and what a step of the method as first published gives."""
    return torch.load(DATA / "parity_resnet14_resnet8.pt", weights_only=True)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A resnet14 trained alone, two epochs, by the script."""
    folder = tmp_path_factory.mktemp("teacher") / "alone"
    assert cifar100.main(["--student", "resnet14", *SMALL, "--epochs", "2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def branch_runs(tmp_path_factory):
    """What ablations/exit_branches.py --smoke leaves: its results, and the runs and branches behind them."""
    folder = tmp_path_factory.mktemp("branches") / "smoke"
    assert exit_branches.main(["--smoke", "--devices", "cpu", "--out", str(folder)]) == 0
    return folder
