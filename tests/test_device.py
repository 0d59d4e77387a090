"""The device to train on."""

import pytest
import torch

from common.run.device import check_device, open_device
from common.run.errors import UserError


def test_missing_gpu_is_reported_with_the_reason(monkeypatch):
    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too old\nsecond line")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "init", fail)
    with pytest.raises(UserError, match=r"^there is no device 'cuda' here \(The NVIDIA .* too old\): try"):
        check_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda:1")
    with pytest.raises(UserError, match="PyTorch finds 2 GPUs"):
        check_device("cuda:2")


def test_opened_gpu_becomes_the_current_one_and_computes_in_float32(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # PyTorch's default
    assert open_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
