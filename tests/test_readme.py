"""What the README says about the code holds."""

import re
from pathlib import Path

import pytest
import torch

import cifar100
from common.bridges import build_bridges
from common.fcfd import fcfd_terms, forward_paths
from common.models import NETWORKS, build
from common.multipath_bn import track_paths
from common.paths import candidate_paths

ROOT = Path(cifar100.__file__).parent
README = (ROOT / "README.md").read_text()


def test_the_worked_network_takes_part_in_a_step(monkeypatch):
    monkeypatch.setattr("common.models.NETWORKS", NETWORKS.copy())
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], {"__name__": "tiny"})
    teacher, student = build("resnet14", 10).requires_grad_(False), build("Tiny", 10)
    bridges = build_bridges(teacher, student, 32)
    for net in (teacher, student):
        track_paths(net, [2, 3])
    flow = forward_paths(teacher, student, bridges, torch.randn(4, 3, 32, 32), candidate_paths(4))
    sum(fcfd_terms(flow, torch.randint(10, (4,)), 4.0).values()).backward()
    assert all(p.grad is not None for net in (student, bridges) for p in net.parameters())


def test_files_and_functions_it_names_are_there():
    for path in re.findall(
        r"`(common/[\w/.]+|docs/[\w.]+|cifar100\.py|requirements[\w-]*\.txt)`|\]\((docs/[\w.]+)\)", README
    ):
        assert (ROOT / (path[0] or path[1])).exists(), path
    rows = re.findall(r"\| (`\w[^|]*`) in `([\w/.]+\.py)` \|", README)
    assert len(rows) >= 9
    for names, path in rows:
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b", (ROOT / path).read_text()), (name, path)


def test_options_it_names_exist(capsys):
    with pytest.raises(SystemExit):
        cifar100.main(["--help"])
    known = capsys.readouterr().out
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)):
        assert option in known, option


def test_published_pairs_are_the_settings():
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|$", README, re.M)
    pairs = {f"{teacher}-{student}" for teacher, students in rows for student in re.findall(r"`(\w+)`", students)}
    assert pairs == set(cifar100.SETTINGS["pairs"])
