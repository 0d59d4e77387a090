"""One epoch of every training loop on a fake CUDA device: no device mismatch, no synchronization before its end."""

import contextlib
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import BlockingCopyError, backward, fake_cuda, real
from running import write_images
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils.data import DataLoader

import cifar100
import imagenet
import online_kd
from ablations import baseline_cifar100, baseline_imagenet
from ablations.baselines import settings
from common.data import batches
from common.models import build
from common.run.run import Run

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory'")  # there is no device to pin for

DEVICE = torch.device("cuda:0")
IMAGES, BATCH = 20, 16  # two steps, the last one partial
PAIR = ["--teacher", "resnet14", "--student", "resnet8"]
CKPT = ["--teacher-ckpt", "not read"]
IMAGENET_PAIR = ["--teacher", "resnet18", "--student", "MobileNetV1"]
LOOPS = {
    "fcfd-off": (cifar100, *PAIR, *CKPT, "--amp", "off"),
    "fcfd-fp16": (cifar100, *PAIR, *CKPT, "--amp", "fp16"),
    "fcfd-bf16": (cifar100, *PAIR, *CKPT, "--amp", "bf16"),
    "fcfd-dkd": (cifar100, *PAIR, *CKPT, "--amp", "fp16", "--kd-loss", "dkd"),
    "fcfd-simkd": (cifar100, *PAIR, *CKPT, "--amp", "fp16", "--simkd"),
    "alone": (cifar100, "--student", "resnet8", "--amp", "fp16"),
    "online-fcfd": (online_kd, *PAIR, "--amp", "fp16"),
    "online-dml": (online_kd, *PAIR, "--amp", "fp16", "--method", "dml"),
    "imagenet-fcfd": (imagenet, *IMAGENET_PAIR, *CKPT, "--amp", "fp16"),
    "imagenet-alone": (imagenet, "--student", "resnet18", "--amp", "off"),
    "baseline-alone": (baseline_cifar100, "--student", "resnet8", "--amp", "fp16", "--method", "alone"),
    **{
        name: (baseline_cifar100, *PAIR, *CKPT, "--amp", "fp16", "--method", name)
        for name in baseline_cifar100.METHODS
        if name != "alone"
    },
    **{
        f"imagenet-{name}": (baseline_imagenet, *IMAGENET_PAIR, *CKPT, "--amp", "fp16", "--method", name)
        for name in settings.METHODS["imagenet"]
    },
}
EACH_SCRIPT = ["fcfd-fp16", "online-dml", "imagenet-alone", "crd", "imagenet-crd"]
# Errors of the fake device, and their messages.
VALUE_NEEDED = (DataDependentOutputException, "_local_scalar_dense")
SHAPE_NEEDED = (DynamicOutputShapeException, "nonzero")
MISMATCH = (RuntimeError, "two (different )?devices")
BLOCKING_COPY = (BlockingCopyError, "copies between")

ON_CPU = ("load_data", "build_networks", "build_method", "sample_paths", "indices", "Step.__init__")
STUBS = {
    "open_device": torch.device,
    "load_network": lambda *_: None,
    "load_teacher": lambda *_: None,
    "evaluate": lambda *_: {"top1": 0.0},  # of the teacher, before the loop
    "evaluate_distributed": lambda *_: {"top1": 0.0},
}


class EndOfEpoch(Exception):
    """Raised with the epoch's meter where the loop would read it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), {"train": IMAGES // 2, "val": 1}, ["n1", "n2"])


@pytest.fixture
def train_epoch(tmp_path, folder, monkeypatch):
    """A function that runs the train() of LOOPS[name] up to the end of the first epoch's steps; returns the meter."""

    def train(name):
        module, *options = LOOPS[name]
        data = ["--dataset", "synthetic", "--subset", IMAGES, "--test-subset", IMAGES]
        on_imagenet = module in (imagenet, baseline_imagenet)
        if on_imagenet:
            data = ["--data-dir", folder, "--image-size", 32, "--workers", 0]
        options += [*data, "--batch-size", BATCH, "--device", DEVICE, "--out", tmp_path / "run"]
        args = module.parse_args([str(option) for option in options])
        for script in {module, imagenet}:
            for stub in STUBS.keys() & vars(script).keys():
                monkeypatch.setattr(script, stub, STUBS[stub])
        functions = ((script, name) for script in {module, imagenet} for name in ON_CPU)
        on_cpu = [f"{script.__name__}.{name}" for script, name in functions if hasattr(script, name.partition(".")[0])]
        with fake_cuda(*on_cpu), pytest.raises(EndOfEpoch) as end:
            module.train(args, *[DEVICE] * on_imagenet)
        return end.value.args[0]

    def end_epoch(run, meter, *_):
        raise EndOfEpoch(meter)

    monkeypatch.setattr(Run, "finish_steps", end_epoch)
    iterate = DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", real(lambda loader: iter(list(iterate(loader)))))
    # CRD sorts by label on the CPU, and the labels on the device have no values.
    method = baseline_cifar100.build_method
    labels = torch.arange(IMAGES)
    monkeypatch.setattr(baseline_cifar100, "build_method", lambda *args: method(*args[:4], labels))
    # Later tests must not find fake tensors in the cache.
    monkeypatch.setattr(batches, "_moments", cache(batches._moments.__wrapped__))
    return train


@pytest.mark.parametrize("name", LOOPS)
def test_no_mismatch_or_synchronization_in_an_epoch(train_epoch, name):
    meter = train_epoch(name)
    assert (meter.steps, meter.images) == (2, IMAGES)
    assert {total.device for total in meter.sums.values()} == {DEVICE}


cross_entropy = F.cross_entropy
BUGS = {
    "value": (lambda logits, labels: cross_entropy(logits, labels) / labels[0].item(), *VALUE_NEEDED),
    "mismatch": (lambda logits, labels: cross_entropy(logits, labels.cpu()), *MISMATCH),
    "copy": (lambda logits, labels: cross_entropy(logits, labels[torch.arange(len(labels))]), *BLOCKING_COPY),
}


@pytest.mark.parametrize("name", EACH_SCRIPT)
@pytest.mark.parametrize(("function", "error", "message"), BUGS.values(), ids=BUGS)
def test_bug_in_a_step_is_found(train_epoch, monkeypatch, name, function, error, message):
    monkeypatch.setattr(F, "cross_entropy", function)
    with pytest.raises(error, match=message):
        train_epoch(name)


OPERATIONS = {
    "item": (lambda x: x[0].item(), *VALUE_NEEDED),
    "branch": (lambda x: 1 if x.max() > 3 else 2, *VALUE_NEEDED),
    "shape": (lambda x: x.nonzero(), *SHAPE_NEEDED),
    "mask": (lambda x: x[x > 0], *SHAPE_NEEDED),
    "mismatch": (lambda x: x + torch.zeros(4), *MISMATCH),
    "scalar to device": (lambda x: torch.tensor(1.0, device=DEVICE), *BLOCKING_COPY),
    "to device": (lambda x: torch.zeros(4).to(DEVICE), *BLOCKING_COPY),
    "to host": (lambda x: x.cpu(), *BLOCKING_COPY),
    "scalar to host": (lambda x: x[0].cpu(), *BLOCKING_COPY),
    "into tensor": (lambda x: x.copy_(torch.zeros(4)), *BLOCKING_COPY),
    "index": (lambda x: x[torch.arange(2)], *BLOCKING_COPY),
}


@contextlib.contextmanager
def after_backward():
    """A tensor [4] on the fake device, after a backward pass."""
    with fake_cuda():
        torch.ones(4, device=DEVICE, requires_grad=True).sum().backward()
        yield torch.ones(4, device=DEVICE)


@pytest.mark.parametrize(("operation", "error", "message"), OPERATIONS.values(), ids=OPERATIONS)
def test_fake_device_raises(operation, error, message):
    with after_backward() as x, pytest.raises(error, match=message):
        operation(x)


def test_fake_device_allows_what_does_not_wait():
    with fake_cuda():
        assert torch.zeros(4).to(DEVICE).device == DEVICE  # before a backward pass
    with after_backward() as x:
        x[0] = 1.0
        assert (x + torch.tensor(1.0)).device == DEVICE
        assert torch.zeros(4).to(DEVICE, non_blocking=True).device == DEVICE
        x.copy_(torch.zeros(4), non_blocking=True)
        assert x.half()[torch.arange(2, device=DEVICE)].device == DEVICE
        with torch.autocast("cuda", torch.float16):
            assert F.linear(x, x[None]).dtype == torch.float16


def test_backward_matches_autograd():
    net = build("resnet8", 3)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    expected = torch.autograd.grad(F.cross_entropy(net(images), labels), [*net.parameters()])
    backward(F.cross_entropy(net(images), labels))
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
