"""cifar100.py with DKD and SimKD (Tab. 4), run from the command line."""

import json
import re

import pytest
import torch
import yaml
from running import FEW_IMAGES, PAIR, SMALL, assert_bitwise_equal, assert_invalid, call, read_log

import cifar100
from ablations import agreement
from ablations.cells import Cell
from common.fcfd import EQ_9

NETWORKS = ["--teacher", "resnet14", "--student", "resnet8"]


def run(capsys, teacher, out, *options, epochs=1):
    return call(capsys, *PAIR, "--epochs", epochs, "--teacher-ckpt", teacher / "student.pth", "--out", out, *options)


@pytest.fixture(scope="module")
def simkd(teacher, tmp_path_factory):
    """An uninterrupted two-epoch run of FCFD with DKD and SimKD."""
    out = tmp_path_factory.mktemp("simkd") / "run"
    options = ["--simkd", "--kd-loss", "dkd", "--epochs", 2, "--teacher-ckpt", teacher / "student.pth", "--out", out]
    assert cifar100.main([str(word) for word in (*PAIR, *options)]) == 0
    return out


def test_simkd_with_dkd_stores_its_settings_and_student(simkd):
    config = yaml.safe_load((simkd / "config.yaml").read_text())
    assert (config["simkd"], config["kd_loss"], config["tckd"], config["nckd"]) == (True, "dkd", 1, 2)
    assert all(float(row[term]) > 0 for row in read_log(simkd) for term in EQ_9)
    model = torch.load(simkd / "student.pth", weights_only=True)["model"]
    assert {key.split(".")[0] for key in model} == {"student", "projector", "classifier"}
    assert not any(".path" in key or key.startswith("student.fc") for key in model)
    state = torch.load(simkd / "last.pt", weights_only=True)
    for name in ("weight", "bias"):  # the teacher's classifier, frozen
        assert torch.equal(model[f"classifier.{name}"], state["teacher"][f"fc.{name}"])
    assert {".".join(key.split(".")[:2]) for key in state["bridges"]} == {"s2t.2", "s2t.3", "t2s.2", "t2s.3"}


def test_evaluate_reproduces_the_accuracy_of_a_simkd_run(capsys, simkd):
    last = json.loads((simkd / "result.json").read_text())["last"]
    printed = call(capsys, *PAIR, "--simkd", "--evaluate", simkd / "student.pth")
    assert f"resnet8 {last['top1']:.2f} % top-1, {last['top5']:.2f} % top-5 on 60 test images" in printed


def test_resumed_simkd_run_is_bitwise_identical(tmp_path, capsys, teacher, simkd):
    options = ["--simkd", "--kd-loss", "dkd", "--max-minutes", 1e-9]
    printed = run(capsys, teacher, tmp_path, *options, epochs=2)
    assert "resnet14-resnet8-fcfd-dkd-simkd" in printed
    assert re.search(r"^SimKD: projector and teacher's classifier add 13.6k parameters \(\+17", printed, re.M)
    call(capsys, *PAIR, "--resume", "--out", tmp_path, "--epochs", 2)  # the other options are stored
    assert_bitwise_equal(simkd, tmp_path)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--kd-loss", "dkd", "--method", "kd"], "kd-dkd"),
        (["--simkd", "--method", "kd"], "kd-simkd"),
        (["--simkd", "--method", "app", "--kd-loss", "kl"], "app-simkd"),
        (["--kd-loss", "dkd", "--nckd", 0.5, "--tckd", 0], "fcfd-dkd"),
        (["--simkd", "--teacher-bn", "running", "--positions", 2], "fcfd-simkd"),
    ],
)
def test_methods_combine(tmp_path, capsys, monkeypatch, teacher, options, name):
    monkeypatch.chdir(tmp_path)
    files = ["--teacher-ckpt", teacher / "student.pth"]
    call(capsys, *PAIR, *options, "--epochs", 1, *files, *FEW_IMAGES)
    (row,) = read_log(f"runs/synthetic-subset40-resnet14-resnet8-{name}-1ep-seed1-off")
    assert [term for term in EQ_9 if row[term]] == list(cifar100.METHODS[name.split("-")[0]])


def test_kd_loss_and_its_weights_reach_the_terms(tmp_path, capsys, teacher):
    """After one step from the same initial weights, the logs differ only in the terms that use DKD."""
    kinds = {"kl": [], "1": ["--kd-loss", "dkd"], "t": ["--kd-loss", "dkd", "--tckd", 3, "--nckd", 0]}
    kinds["n"] = ["--kd-loss", "dkd", "--tckd", 0, "--nckd", 5]
    log = {}
    for kind, options in kinds.items():
        run(capsys, teacher, tmp_path / kind, *options, *FEW_IMAGES, "--batch-size", 40)
        (log[kind],) = read_log(tmp_path / kind)
    for term in EQ_9:
        kl, both, label, others = (float(log[kind][term]) for kind in kinds)
        if term in ("kd", "func_kl", "func_prime"):
            assert both != kl
            assert both == pytest.approx(label / 3 + 2 * others / 5, rel=1e-4)
        else:
            assert both == label == others == kl


def test_run_that_predates_the_options_resumes(tmp_path, capsys, teacher):
    uninterrupted, old = tmp_path / "uninterrupted", tmp_path / "old"
    run(capsys, teacher, uninterrupted, *FEW_IMAGES, epochs=2)
    run(capsys, teacher, old, *FEW_IMAGES, "--max-minutes", 1e-9, epochs=2)
    state = torch.load(old / "last.pt", weights_only=True)
    for key in ("simkd", "kd_loss", "tckd", "nckd", "w_func_partial", "w_func_prime_l2"):
        del state["config"][key]
    torch.save(state, old / "last.pt")
    (old / "config.yaml").write_text(yaml.safe_dump(state["config"]))
    for options, message in (
        (["--simkd"], "--simkd is True but was False"),
        (["--kd-loss", "dkd"], "--kd-loss is dkd but was kl"),
    ):
        assert message in call(capsys, *PAIR, *FEW_IMAGES, *options, "--epochs", 2, "--resume", "--out", old, code=2)
    call(capsys, *PAIR, *FEW_IMAGES, "--epochs", 2, "--resume", "--out", old)
    assert_bitwise_equal(uninterrupted, old)


def test_resume_rejects_changed_dkd_weights(capsys, simkd):
    message = call(capsys, *PAIR, "--nckd", 3, "--epochs", 2, "--resume", "--out", simkd, code=2)
    assert "--nckd is 3.0 but was 2" in message


def test_simkd_student_does_not_load_as_a_plain_network(tmp_path, capsys, simkd, teacher):
    file = simkd / "student.pth"
    for options in (
        ["--student", "resnet8", "--evaluate", file],
        [
            "--teacher",
            "resnet8",
            "--student",
            "resnet8",
            "--teacher-ckpt",
            file,
            "--epochs",
            1,
            "--out",
            tmp_path / "x",
        ],
    ):
        message = call(capsys, *SMALL, *options, code=2)
        assert f"{file} is a SimKD student" in message
        assert message.count("\n") == 1
    message = call(capsys, *PAIR, "--simkd", "--evaluate", teacher / "student.pth", code=2)
    assert "does not match resnet8 by SimKD from resnet14" in message
    assert 'Missing key(s) in state_dict: "student.conv1.weight"' in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--student", "resnet8", "--simkd"], "--simkd requires --teacher"),
        (["--student", "resnet8", "--simkd", "--evaluate", "x.pth"], "requires --teacher"),
        (["--student", "resnet8", "--kd-loss", "dkd"], "--kd-loss requires --teacher"),
        ([*NETWORKS, "--tckd", 1], "--tckd and --nckd are weights inside DKD: also give --kd-loss dkd"),
        ([*NETWORKS, "--kd-loss", "kl", "--nckd", 1], "--tckd and --nckd are weights inside DKD"),
        ([*NETWORKS, "--kd-loss", "dkd", "--nckd", -1], "--nckd: -1"),
        ([*NETWORKS, "--kd-loss", "dkd", "--tckd", "nan"], "--tckd: nan"),
        ([*NETWORKS, "--kd-loss", "crd"], "crd"),
        ([*NETWORKS, "--simkd", "--positions", 2, 4], "--positions 4: with --simkd"),
        ([*NETWORKS, "--simkd", "--method", "kd", "--positions", 4], "--positions 4: with --simkd"),
        (["--teacher", "vgg8", "--student", "resnet8", "--simkd"], "5 stages and the student 4"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    assert_invalid(capsys, SMALL, options, expected)


def test_grid_passes_simkd_to_its_runs(tmp_path):
    command = Cell(tmp_path, {"teacher": "resnet14", "student": "resnet8", "simkd": True, "seed": 1}).command(None)
    assert command[2:] == ["--teacher=resnet14", "--student=resnet8", "--simkd", "--seed=1", f"--out={tmp_path}"]


def test_agreement_evaluates_a_simkd_student(tmp_path, capsys, monkeypatch, simkd, teacher):
    monkeypatch.chdir(tmp_path)
    accuracy = json.loads((simkd / "result.json").read_text())["last"]["top1"]
    assert agreement.main(["--teacher", str(teacher), str(simkd)]) == 0
    assert f"| {simkd.name} | 1 | {accuracy:.2f} |" in capsys.readouterr().out
