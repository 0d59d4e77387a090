from pathlib import Path

import pytest
import torch
from running import SMALL

import cifar100

DATA = Path(__file__).parent / "data"


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def short_worker_timeout():
    """Wait less than 5 s for DataLoader workers that do not exit on their own after an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
        yield


@pytest.fixture(scope="session")
def parity():
    """A training step of the published implementation: batch, networks, bridges, and expected values."""
    return torch.load(DATA / "parity_resnet14_resnet8.pt", weights_only=True)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Output folder of a resnet14 that cifar100.py trained for two epochs."""
    folder = tmp_path_factory.mktemp("teacher") / "alone"
    assert cifar100.main(["--student", "resnet14", *SMALL, "--epochs", "2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def branch_runs(tmp_path_factory):
    """Output folder of ablations/exit_branches.py --smoke: results, runs, and exit branches."""
    from ablations import exit_branches

    folder = tmp_path_factory.mktemp("branches") / "smoke"
    assert exit_branches.main(["--smoke", "--devices", "cpu", "--amp", "off", "--out", str(folder)]) == 0
    return folder
