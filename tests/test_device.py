"""The default device and precision, their messages, and the folder of a run."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from running import FEW_IMAGES, PAIR, SMALL, assert_bitwise_equal, call, flatten_tensors

import cifar100
import detection
import imagenet
import online_kd
from ablations import baseline_cifar100
from common import fcfd
from common.run import device, run
from common.run.device import AMP, check_device, default_amp, describe_device, open_device
from common.run.earlier_runs import default_out, read_config
from common.run.errors import UserError

ONE_EPOCH = [*FEW_IMAGES, "--epochs", 1]
ALONE = ["--student", "resnet8", *SMALL[:-2], *ONE_EPOCH]  # without --amp


def cpu_with_bf16(monkeypatch, supported):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)


@pytest.mark.parametrize(
    ("name", "supported", "amp"),
    [
        ("cuda", False, "fp16"),
        ("cuda:1", True, "fp16"),
        ("cpu", True, "bf16"),
        ("cpu", False, "off"),
        ("mps", True, "off"),
    ],
)
def test_default_precision_of_every_script(monkeypatch, name, supported, amp):
    cpu_with_bf16(monkeypatch, supported)
    assert default_amp(name)[0] == amp
    pair = ["--teacher", "resnet14", "--student", "resnet8", "--device", name]
    imagenet_pair = ["--teacher", "resnet50", "--student", "resnet18", "--device", name]
    for script, argv in (
        (cifar100, pair),
        (online_kd, pair),
        (baseline_cifar100, [*pair, "--method", "crd"]),
        (imagenet, imagenet_pair),
        (detection, imagenet_pair),
    ):
        args = script.parse_args(argv)
        assert (args.amp, args.out.rpartition("-")[2]) == (amp, amp)
        assert script.parse_args([*argv, "--amp", "off"]).amp == "off"


def test_script_prints_the_default_precision_and_stores_it(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for supported, amp in ((True, "bf16"), (False, "off")):
        cpu_with_bf16(monkeypatch, supported)
        printed = call(capsys, *ALONE)
        assert f"cpu, amp {amp} (this CPU {'has' if supported else 'lacks'} AVX512-BF16); runs/" in printed
        folder = Path(f"runs/synthetic-subset40-resnet8-alone-1ep-seed1-{amp}")
        assert read_config(folder)["amp"] == amp
    assert len(list(Path("runs").iterdir())) == 2
    assert "cpu, amp off; runs/given" in call(capsys, *ALONE, "--amp", "off", "--out", "runs/given")


def test_resumed_run_keeps_its_precision(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    cpu_with_bf16(monkeypatch, False)
    two_epochs = [*ALONE, "--epochs", 2]
    call(capsys, *two_epochs, "--max-minutes", 1e-9)
    Path("runs/synthetic-subset40-resnet8-alone-2ep-seed1-off").rename(
        "runs/synthetic-subset40-resnet8-alone-2ep-seed1"
    )
    cpu_with_bf16(monkeypatch, True)
    printed = call(capsys, *two_epochs, "--resume")
    assert "cpu, amp off; runs/synthetic-subset40-resnet8-alone-2ep-seed1\n" in printed
    assert "epoch   2/2" in printed


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_only_forward_passes_of_training_have_reduced_precision(monkeypatch, tmp_path, capsys, teacher, amp):
    trained, losses, evaluated = set(), set(), set()

    def forward_paths(*args):
        flow = fcfd.forward_paths(*args)
        features = [*flow.student.values(), *flow.s2t.values(), *(flow.mixed[path].logits for path in flow.mixed)]
        trained.update(x.dtype for x in (*features, flow.student_logits, flow.teacher_logits))
        return flow

    def fcfd_terms(*args):
        terms = fcfd.fcfd_terms(*args)
        losses.update(term.dtype for term in terms.values())
        return terms

    def evaluate(net, batches):
        evaluated.update(net.eval()(images).dtype for images, _ in batches)
        return {"top1": 50.0, "top5": 90.0}

    for function in (forward_paths, fcfd_terms, evaluate):
        monkeypatch.setattr(cifar100, function.__name__, function)
    call(capsys, *PAIR, *ONE_EPOCH, "--amp", amp, "--teacher-ckpt", teacher / "student.pth", "--out", tmp_path)
    assert (trained, losses, evaluated) == ({AMP[amp] or torch.float32}, {torch.float32}, {torch.float32})
    state = flatten_tensors(torch.load(tmp_path / "last.pt", weights_only=True))  # weights, statistics, momentum
    assert {x.dtype for x in state.values() if x.is_floating_point()} == {torch.float32}


def test_resuming_in_bfloat16_is_bitwise_identical(tmp_path, capsys, teacher):
    options = [*PAIR, *FEW_IMAGES, "--epochs", 2, "--amp", "bf16", "--teacher-ckpt", teacher / "student.pth"]
    call(capsys, *options, "--out", tmp_path / "a")
    call(capsys, *options, "--out", tmp_path / "b", "--max-minutes", 1e-9)
    call(capsys, *options, "--out", tmp_path / "b", "--resume")
    assert_bitwise_equal(tmp_path / "a", tmp_path / "b")


def test_default_folder_has_the_precision(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def out(resume=True, **given):
        args = Namespace(**{"amp": "bf16", "resume": resume, "given": set(given)} | given)
        return default_out(f"a-{args.amp}", args)

    def make(folder):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "last.pt").touch()

    assert out(resume=False) == out() == "runs/a-bf16"
    make("runs/a")  # by an earlier version
    assert (out(resume=False), out(), out(amp="off")) == ("runs/a-bf16", "runs/a", "runs/a")
    make("runs/a-fp16")  # on another device
    assert (out(resume=False), out(), out(amp="off")) == ("runs/a-bf16", "runs/a-fp16", "runs/a")
    make("runs/a-bf16")
    assert out() == "runs/a-bf16"


def test_unused_gpu_is_reported(monkeypatch, tmp_path):
    def described(*given):
        return describe_device(Namespace(device="cpu", amp="off", given={*given, "amp"}, resume=False))

    file = tmp_path / "nvidiactl"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "DEVICE_FILE", file)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert described() == "cpu, amp off"
    file.touch()
    assert described().startswith(f"cpu (PyTorch {torch.__version__} cannot use the NVIDIA GPU")
    assert described("device") == "cpu, amp off"
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert described() == "cpu, amp off"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a resumed run may have stored the CPU
    assert described() == "cpu, amp off"


def test_slow_precision_is_reported():
    def described(device, amp):
        return describe_device(Namespace(device=device, amp=amp, given={"device", "amp"}, resume=False))

    assert "slow" in described("cpu", "fp16")
    assert "slow" not in described("cpu", "bf16") + described("cuda:0", "fp16")


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


def test_peak_memory_is_reset_after_every_epoch(monkeypatch, tmp_path, capsys):
    """cuDNN's benchmarking counts in the first one only."""
    calls = []
    monkeypatch.setattr(run, "reset_peak_memory", lambda device: calls.append("reset"))
    monkeypatch.setattr(run, "peak_memory", lambda device: calls.append("read") or 0.0)
    call(capsys, *ALONE, "--epochs", 2, "--out", tmp_path)
    assert calls == ["reset", "read", "reset", "read", "reset"]
