"""Resuming cifar100.py: stored options, conflicting options, and edited or damaged last.pt files."""

import shutil

import pytest
import torch
import yaml
from running import FEW_IMAGES, PAIR, assert_bitwise_equal, call

import cifar100

SETTINGS = ["--epochs", 2, "--lr", 0.01, "--temperature", 3, "--w-app", 2, "--w-func-kl", 0.5, "--positions", 3, 2]
SETTINGS += ["--seed", 7, "--num-paths", 3]
NETWORKS = ["--teacher", "resnet14", "--student", "resnet8"]


@pytest.fixture(scope="module")
def uninterrupted(teacher, tmp_path_factory):
    """Output folder of two epochs with non-default settings."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    argv = [*PAIR, *FEW_IMAGES, *SETTINGS, "--teacher-ckpt", teacher / "student.pth", "--out", out]
    assert cifar100.main(list(map(str, argv))) == 0
    return out


@pytest.fixture(scope="module")
def after_one_epoch(teacher, tmp_path_factory):
    """The same run, stopped after its first epoch; its teacher's checkpoint is deleted."""
    folder = tmp_path_factory.mktemp("stopped")
    file = shutil.copy(teacher / "student.pth", folder / "teacher.pth")
    argv = [*PAIR, *FEW_IMAGES, *SETTINGS, "--teacher-ckpt", file, "--max-minutes", 1e-9, "--out", folder / "run"]
    assert cifar100.main(list(map(str, argv))) == 0
    (folder / "teacher.pth").unlink()
    return folder / "run"


@pytest.fixture
def stopped(after_one_epoch, tmp_path):
    return shutil.copytree(after_one_epoch, tmp_path / "run")


def test_resume_uses_stored_options_and_needs_no_teacher_file(capsys, uninterrupted, stopped):
    before = yaml.safe_load((stopped / "config.yaml").read_text())
    printed = call(capsys, *NETWORKS, "--out", stopped, "--resume")
    assert "epoch   2/2" in printed
    assert "epoch   1/2" not in printed
    assert_bitwise_equal(uninterrupted, stopped)
    changing = {"out": str(stopped), "max_minutes": None}  # the stored limit does not apply to this call
    assert yaml.safe_load((stopped / "config.yaml").read_text()) == before | changing


def test_options_may_repeat_the_stored_ones(capsys, uninterrupted, stopped):
    """In another order and number format."""
    same = ["--positions", 2, 3, "--lr", "1e-2", "--w-app", 2.0, "--method", "fcfd"]
    call(capsys, *PAIR, *FEW_IMAGES, *same, "--epochs", 2, "--seed", 7, "--out", stopped, "--resume")
    assert_bitwise_equal(uninterrupted, stopped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher", "resnet32"], "--teacher is resnet32 but was resnet14"),
        (["--student", "resnet14"], "--student is resnet14 but was resnet8"),
        (["--lr", 0.02], "--lr is 0.02 but was 0.01"),
        (["--epochs", 3], "--epochs is 3 but was 2"),
        (["--batch-size", 16], "--batch-size is 16 but was 32"),
        (["--dataset", "cifar10"], "--dataset is cifar10 but was synthetic"),
        (["--subset", 60], "--subset is 60 but was 40"),
        (["--seed", 1], "--seed is 1 but was 7"),
        (["--w-app", 5], "--w-app is 5.0 but was 2"),
        (["--w-func-partial", 5], "--w-func-partial is 5.0 but was 0"),
        (["--method", "kd"], "--method is kd but was fcfd"),
        (["--teacher-bn", "running"], "--teacher-bn is running but was batch"),
        (["--num-paths", 2], "--num-paths is 2 but was 3"),
        (["--positions", 2], "--positions is [2] but was [2, 3]"),
        (["--kd-loss", "dkd"], "--kd-loss is dkd but was kl"),
        (["--simkd"], "--simkd is True but was False"),
        (["--amp", "bf16"], "--amp is bf16 but was off"),
        (["--teacher-ckpt", "other.pth"], "--teacher-ckpt is other.pth but was"),
    ],
)
def test_conflicting_options_are_rejected_by_name(capsys, after_one_epoch, options, message):
    before = (after_one_epoch / "last.pt").read_bytes()
    printed = call(capsys, *NETWORKS, *options, "--out", after_one_epoch, "--resume", code=2)
    assert printed.startswith("error: cannot resume with different settings: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert (after_one_epoch / "last.pt").read_bytes() == before


def set_config(**values):
    return lambda state: state["config"].update(values)


def edit_momentum(change):
    """Replace the optimizer's first momentum buffer."""

    def edit(state):
        parameter_state = state["optimizer"]["state"][0]
        parameter_state["momentum_buffer"] = change(parameter_state["momentum_buffer"])

    return edit


def replace(value, *keys):
    def edit(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return edit


def delete(*keys):
    def edit(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return edit


def mismatched_row(state):
    state["log"] = [*state["log"], {"epoch": 2}]
    state["epoch"] = 2


DAMAGE = {
    "a number as a network": set_config(teacher=14),
    "an unknown network": set_config(teacher="resnet15"),
    "a number as a choice": set_config(method=1),
    "a list as a number": set_config(lr=[0.01]),
    "text as a number": set_config(epochs="many"),
    "a number as text": set_config(lr="0.05"),
    "a fraction as a count": set_config(epochs=2.5),
    "a number out of range": set_config(temperature=-1.0),
    "NaN as a weight": set_config(w_app=float("nan")),
    "a number as a list": set_config(positions=2),
    "None as a count": set_config(epochs=None),
    "None as a name": set_config(dataset=None),
    "None as a flag": set_config(simkd=None),
    "a position outside the network": set_config(positions=[2, 9]),
    "text as a flag": set_config(simkd="yes"),
    "too many paths": set_config(num_paths=99),
    "another pair of networks": set_config(teacher="resnet20"),
    "a list as the config": replace([1], "config"),
    "a list as a state dict": replace([1], "student"),
    "no bridges": delete("bridges"),
    "a missing weight": delete("student", "conv1.weight"),
    "a list as the optimizer": replace([1], "optimizer"),
    "a list as the optimizer's groups": replace({}, "optimizer", "param_groups"),
    "text as the learning rate": replace("x", "optimizer", "param_groups", 0, "lr"),
    "None as the momentum": replace(None, "optimizer", "param_groups", 0, "momentum"),
    "parameters in another order": lambda state: state["optimizer"]["param_groups"][0]["params"].reverse(),
    "momentum of another shape": edit_momentum(lambda buffer: buffer[:1]),
    "momentum of another dtype": edit_momentum(lambda buffer: buffer.double()),
    "momentum that is not a tensor": edit_momentum(lambda buffer: 0.5),
    "no momentum": replace({}, "optimizer", "state"),
    "text as a score": replace("x", "best", "top1"),
    "text as the best scores": replace("x", "best"),
    "best scores without an accuracy": delete("best", "top1"),
    "best scores without an epoch": delete("best", "epoch"),
    "a teacher without an accuracy": delete("teacher_accuracy", "top1"),
    "a list as the teacher's scores": replace([50.0], "teacher_accuracy"),
    "rows with other columns": mismatched_row,
    "a row that is not a dictionary": replace([1], "log"),
    "a missing column": delete("log", 0, "test_top1"),
    "text in the log": replace("x", "log", 0, "seconds"),
    "more epochs than rows": replace(2, "epoch"),
    "text as the epoch": replace("x", "epoch"),
    "no finished epoch": lambda state: state.update(epoch=0, log=[]),
    "a negative epoch": replace(-1, "epoch"),
    "no epoch": delete("epoch"),
    "no scores": delete("best"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_last_pt_is_rejected_and_kept(capsys, monkeypatch, stopped, damage):
    monkeypatch.setattr(cifar100, "train_batches", None)  # must not be called
    state = torch.load(stopped / "last.pt", weights_only=True)
    DAMAGE[damage](state)
    torch.save(state, stopped / "last.pt")
    before = (stopped / "last.pt").read_bytes()
    message = call(capsys, "--student", "resnet8", "--out", stopped, "--resume", code=2)
    assert message.startswith("error: ")
    assert "with different settings" not in message
    assert message.count("\n") == 1
    assert (stopped / "last.pt").read_bytes() == before


@pytest.mark.parametrize("edit", [set_config(epochs=2), set_config(w_app=2), set_config(some_new_option=1)])
def test_intact_state_resumes(capsys, stopped, edit):
    """Control for the tests above."""
    state = torch.load(stopped / "last.pt", weights_only=True)
    edit(state)
    torch.save(state, stopped / "last.pt")
    assert "epoch   2/2" in call(capsys, "--student", "resnet8", "--out", stopped, "--resume")
