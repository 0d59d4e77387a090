"""Atomic writes, and loading checkpoints from this and other projects."""

import argparse
import os
import pickle

import numpy as np
import pytest
import torch

from common.models import build
from common.run import checkpoint
from common.run.checkpoint import load, load_network, save
from common.run.errors import UserError


@pytest.fixture
def net():
    torch.manual_seed(0)
    return build("resnet8", 10)


def same_weights(net, other):
    return all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "form",
    ["shared", "bare", "parallel", "net", "parallel_net", "model_state_dict", "first_of_two", "namespace", "numpy"],
)
def test_checkpoint_formats(tmp_path, net, form):
    weights = net.state_dict()
    content = {
        "shared": {"model": weights, "epoch": 240, "accuracy": torch.tensor(72.5), "optimizer": {"state": {}}},
        "bare": weights,
        "parallel": {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
        "net": {"net": weights, "acc": 72.5, "epoch": 240},
        "parallel_net": {"net": {f"module.{key}": value for key, value in weights.items()}},
        "model_state_dict": {"epoch": 240, "model_state_dict": weights, "optimizer_state_dict": {"state": {}}},
        "first_of_two": {"model_state_dict": build("vgg8", 10).state_dict(), "state_dict": weights},
        "namespace": {"model": weights, "opt": argparse.Namespace(lr=0.05, steps=[150, 180], model="resnet8")},
        "numpy": {"model": weights, "best_acc": np.float64(72.5), "accuracy": np.float32(72.0), "epoch": np.int64(240)},
    }[form]
    torch.save(content, tmp_path / "ckpt_epoch_240.pth")
    other = build("resnet8", 10)
    assert not same_weights(net, other)
    load_network(other, tmp_path / "ckpt_epoch_240.pth", "resnet8")
    assert same_weights(net, other)


def test_legacy_non_zip_format_loads(tmp_path, net):
    torch.save({"model": net.state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    other = build("resnet8", 10)
    load_network(other, tmp_path / "old.pth", "resnet8")
    assert same_weights(net, other)


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, protocol=2))])
def test_pickled_code_is_not_executed(tmp_path, net, write):
    write({"model": net.state_dict(), "opt": Malicious(tmp_path / "harm")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth .*nothing was run"):
        load_network(net, tmp_path / "evil.pth", "resnet8")
    assert not (tmp_path / "harm").exists()


def damaged_files(tmp_path, net):
    intact = tmp_path / "intact.pth"
    torch.save({"model": net.state_dict()}, intact)
    content = intact.read_bytes()
    for name, part in {
        "cut": content[: len(content) // 2],
        "start": content[:10],
        "empty": b"",
        "noise": np.random.default_rng(0).bytes(5000),
        "text": b"<html>404</html>",
    }.items():
        (tmp_path / name).write_bytes(part)
        yield tmp_path / name
    yield tmp_path
    yield tmp_path / "missing.pth"


def test_unreadable_files_raise_a_one_line_error(tmp_path, net):
    for path in damaged_files(tmp_path, net):
        with pytest.raises(UserError) as error:
            load(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value), path


@pytest.mark.parametrize("key", ["model", "state_dict", "net", "model_state_dict"])
def test_nested_state_dicts_are_checked_strictly(tmp_path, net, key):
    path = tmp_path / "x.pth"
    for change, message in (
        (lambda weights: weights.pop("fc.bias"), r"Missing key.*fc\.bias"),
        (lambda weights: weights.update({"fc.scale": torch.ones(1)}), r"Unexpected key.*fc\.scale"),
        (lambda weights: weights.update({"epoch": 3}), "no state dict"),
        (lambda weights: weights["fc.bias"].fill_(torch.inf), r"non-finite values in fc\.bias"),
    ):
        weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        change(weights)
        torch.save({key: weights}, path)
        with pytest.raises(UserError, match=message):
            load_network(build("resnet8", 10), path, "resnet8")


def test_error_names_the_mismatch(tmp_path, net):
    def error_message(content):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError) as error:
            load_network(net, tmp_path / "x.pth", "resnet8")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "torch.Size([10, 64])" in error_message({"model": build("resnet8", 100).state_dict()})
    assert "Missing key" in error_message({"model": build("vgg8", 10).state_dict()})
    assert "layer1.1.conv1.weight" in error_message({"model": build("resnet14", 10).state_dict()})
    assert "no state dict" in error_message({"epoch": 3})
    assert "no state dict" in error_message([1, 2])
    assert "student.pth" in error_message({"student": net.state_dict(), "epoch": 3})
    weights = net.state_dict()
    assert "no state dict" in error_message({**weights, "bn1.bias": weights["bn1.bias"].to(torch.int8)})
    weights["bn1.bias"] = torch.full_like(weights["bn1.bias"], float("nan"))
    assert "bn1.bias" in error_message(weights)


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    save({"a": 1}, tmp_path / "f.pt")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"f\.pt .*No space left"):
        save({"a": 2}, tmp_path / "f.pt")
    assert torch.load(tmp_path / "f.pt", weights_only=True) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f.pt"]
