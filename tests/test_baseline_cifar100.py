"""ablations/baseline_cifar100.py: settings, and complete runs."""

import json
from functools import partial

import pytest
import running
import torch
import torch.nn.functional as F
import yaml
from running import PAIR, SMALL, assert_bitwise_equal, assert_invalid, read_log

import cifar100
from ablations import baseline_cifar100
from ablations.baselines import settings
from ablations.baselines.batch import Batch
from ablations.baselines.build import build_method
from ablations.baselines.crd import CRD
from common.data.batches import train_batches
from common.data.sources import load_data
from common.models import build
from common.randomness import derive_seed, generator

call = partial(running.call, module=baseline_cifar100)
METHODS = baseline_cifar100.METHODS
NETWORKS = PAIR[:4]
TINY = [*PAIR, "--subset", 40, "--test-subset", 40, "--batch-size", 20]


def parse(pair, method):
    teacher, _, student = pair.partition("-")
    networks = ["--student", student] if method == "alone" else ["--teacher", teacher, "--student", student]
    return baseline_cifar100.parse_args([*networks, "--method", method, "--device", "cuda"])


# ---------------------------------------------------------------------------------------------------- settings

RECIPE = {"batch_size": 64, "optimizer": "sgd", "teacher_bn": "running", "w_task": 1, "warmup": 0}
RECIPE |= {"milestones": [150, 180, 210], "weight_decay": 5e-4, "epochs": 240}
# By method: what differs from the recipe, and what has other values for some pairs or students, with the others' first.
PUBLISHED = {
    "alone": ({}, {}),
    "kd": ({"w_task": 0.1, "weight": 0.9, "temperature": 4}, {}),
    "fitnet": ({"weight": 100}, {}),
    "vid": ({"weight": 1}, {}),
    "crd": ({"weight": 0.8, "replacement": False}, {}),
    "dkd": (
        {"weight": 1, "temperature": 4, "tckd": 1, "warmup": 20},
        {
            "nckd": {
                "wrn_40_2-wrn_16_2": 6,
                "wrn_40_2-wrn_40_1": 6,
                "resnet56-resnet20": 2,
                "resnet32x4-resnet8x4": 8,
                "vgg13-vgg8": 6,
                "resnet32x4-ShuffleV1": 8,
                "wrn_40_2-ShuffleV1": 8,
                "vgg13-MobileNetV2": 6,
                "ResNet50-MobileNetV2": 8,
                "resnet32x4-ShuffleV2": 8,
            }
        },
    ),
    "reviewkd": (
        {
            "batch_size": 128,
            "optimizer": "nesterov",
            "teacher_bn": "batch",
            "warmup": 20,
            "milestones": [151, 181, 211],
            "teacher_pre_relu": True,
            "student_pre_relu": False,
        },
        {
            "weight": {
                "wrn_40_2-wrn_16_2": 5,
                "wrn_40_2-wrn_40_1": 5,
                "resnet56-resnet20": 0.6,
                "resnet32x4-resnet8x4": 5,
                "resnet32x4-ShuffleV1": 5,
                "wrn_40_2-ShuffleV1": 5,
                "resnet32x4-ShuffleV2": 8,
            }
        },
    ),
    "simkd": ({"w_task": 0, "weight": 1}, {}),
}
UNKNOWN = {"reviewkd": {"vgg13-vgg8", "vgg13-MobileNetV2", "ResNet50-MobileNetV2"}}
UNKNOWN["simkd"] = set(cifar100.SETTINGS["pairs"]) - {"resnet32x4-resnet8x4"}


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_the_published_ones(method):
    same, by_pair = PUBLISHED[method]
    for pair in cifar100.SETTINGS["pairs"]:
        args = parse(pair, method)
        found = vars(args)
        assert {key: found[key] for key in RECIPE | same} == RECIPE | same, pair
        for name, values in by_pair.items():
            assert pair not in values or found[name] == values[pair]
        small = args.student in ("MobileNetV2", "ShuffleV1", "ShuffleV2")
        assert args.lr == {False: (0.05, 0.01), True: (0.1, 0.02)}[method == "reviewkd"][small]
        assert args.published == (pair not in UNKNOWN.get(method, ()))
        networks = f"{args.student}-baseline-alone" if method == "alone" else f"{pair}-baseline-{method}"
        assert args.out == f"runs/cifar100-{networks}-240ep-seed1-fp16"


def test_notice_of_settings_that_are_not_published(monkeypatch):
    def notice(pair, method):
        return settings.notice(parse(pair, method), "cifar100")

    assert notice("resnet32x4-resnet8x4", "reviewkd") is None
    assert notice("vgg13-vgg8", "reviewkd").startswith("setting not published: some of reviewkd's for vgg13-vgg8")
    assert "resnet32-resnet20 is not a published pair" in notice("resnet32-resnet20", "kd")
    assert notice("resnet32-resnet20", "alone") is None
    monkeypatch.setitem(settings.SETTINGS["cifar100"]["vid"], "published", [])  # of no pair
    assert notice("resnet32x4-resnet8x4", "vid").startswith("setting not published")


def test_warmup_and_learning_rate():
    args = parse("resnet32x4-resnet8x4", "reviewkd")
    assert [settings.ramp(args, "cifar100", epoch) for epoch in (0, 1, 19, 20, 239)] == [0, 0.05, 0.95, 1, 1]
    rates = [settings.learning_rate(args, "cifar100", epoch) for epoch in (150, 151, 180, 181, 210, 211)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4])
    args = parse("resnet32x4-resnet8x4", "dkd")
    assert [settings.ramp(args, "cifar100", epoch) for epoch in (0, 1, 18, 19, 239)] == [0.05, 0.1, 0.95, 1, 1]
    rates = [settings.learning_rate(args, "cifar100", epoch) for epoch in (149, 150, 179, 180, 209, 210)]
    assert rates == pytest.approx([0.05, 0.005, 0.005, 5e-4, 5e-4, 5e-5])
    args.epochs = 24
    assert [settings.ramp(args, "cifar100", epoch) for epoch in (0, 1, 2)] == [0.5, 1, 1]
    assert settings.learning_rate(args, "cifar100", 15) == pytest.approx(0.005)
    args.epochs = 5  # too short for a warm-up
    assert settings.ramp(args, "cifar100", 0) == 1


# ----------------------------------------------------------------------------------------------- complete runs


@pytest.mark.parametrize("name", METHODS)
def test_two_epochs_match_a_manual_loop(tmp_path, capsys, monkeypatch, teacher, name):
    """Two of 24 epochs, stopped after each, against a loop with hand-written SGD and schedules."""
    draw, negatives = CRD.draw, []
    monkeypatch.setattr(CRD, "draw", lambda *args: negatives.append(draw(*args)) or negatives[-1])
    alone, w_task = name == "alone", {"kd": 0.1, "simkd": 0}.get(name, 1)
    options = [*(TINY[2:] if alone else TINY), "--method", name, "--batch-size", 32, "--lr", 0.002, "--epochs", 24]
    options += ["--seed", 5, "--out", tmp_path, "--max-minutes", 1e-9]
    options += [] if alone else ["--weight", 0.7, "--teacher-ckpt", teacher / "student.pth"]
    call(capsys, *options)
    call(capsys, *options, "--resume")

    args = baseline_cifar100.parse_args([str(option) for option in options])
    student, net = baseline_cifar100.build_networks(args, 20)
    data = load_data("synthetic", "", 40, 40)
    method = None if alone else build_method(args, student, net, 32, data.train.labels)
    trained = [p for part in (student, method) if part for p in part.parameters() if p.requires_grad]
    for part in filter(None, (student, net, method)):  # as in the script, so that rounding is similar
        part.to(memory_format=torch.channels_last)
    if net:
        net.load_state_dict(torch.load(teacher / "student.pth", weights_only=True)["model"])
    velocity, start = [torch.zeros_like(p) for p in trained], [p.detach().clone() for p in trained]
    rows = []
    for epoch in range(2):
        warm = {"reviewkd": epoch / 2, "dkd": (epoch + 1) / 2}.get(name, 1)  # over 1/12 of 24 epochs
        order = torch.randperm(40, generator=generator(5, epoch, "data"))
        rng = torch.Generator().manual_seed(derive_seed(5, epoch, "negatives"))
        logged, hits = [], 0
        student.train()
        if net:
            net.train(name == "reviewkd")
        for step, (images, labels) in enumerate(train_batches(data.train, 32, 5, epoch)):
            batch = Batch(labels, order[32 * step : 32 * (step + 1)], rng)
            own = student.taps(images)
            loss, distill = w_task * F.cross_entropy(own.logits, labels), torch.zeros(())
            if net:
                with torch.no_grad():
                    target = net.taps(images, pre_relu=name == "reviewkd")
                distill = method(own, target, batch)
                loss = loss + 0.7 * warm * distill
            logged.append([loss.item(), distill.item()])
            hits += (own.logits.argmax(1) == labels).sum().item()
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            for i, (p, gradient) in enumerate(zip(trained, gradients, strict=True)):
                if gradient is not None:
                    gradient = gradient + 5e-4 * p.detach()
                    velocity[i] = 0.9 * velocity[i] + gradient
                    p.data -= 0.002 * (gradient + 0.9 * velocity[i] if name == "reviewkd" else velocity[i])
        rows.append([*(sum(column) / 2 for column in zip(*logged, strict=True)), 100 * hits / 40])

    assert len(negatives) == (8 if name == "crd" else 0)
    assert all(torch.equal(a, b) for a, b in zip(negatives[:4], negatives[4:], strict=True))
    for row, expected in zip(read_log(tmp_path), rows, strict=True):
        found = [float(row[column] or 0) for column in ("loss", "distill", "train_top1")]
        assert found == pytest.approx(expected, rel=1e-3)
        assert (bool(row["task"]), bool(row["distill"])) == (name != "simkd", not alone)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    parts = {"student": student} | ({"method": method} if method else {})
    saved = {id(p): state[role][key] for role, part in parts.items() for key, p in part.named_parameters()}
    for p, old in zip(trained, start, strict=True):
        assert (saved[id(p)] - p.detach()).norm() <= 0.01 * (p.detach() - old).norm() + 1e-7
    for key, value in (state["method"] if method else {}).items():
        torch.testing.assert_close(value, method.state_dict()[key], rtol=1e-2, atol=1e-3)
    if net:  # BatchNorm statistics included
        for key, value in net.state_dict().items():
            torch.testing.assert_close(state["teacher"][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS[1:])
def test_resumed_run_is_bitwise_identical(tmp_path, capsys, teacher, name):
    options = [*TINY, "--method", name, "--epochs", 2, "--teacher-ckpt", teacher / "student.pth"]
    call(capsys, *options, "--out", tmp_path / "uninterrupted")
    stopped = call(capsys, *options, "--out", tmp_path / "resumed", "--max-minutes", 1e-9)
    assert "stopped after 1 of 2 epochs" in stopped
    printed = call(capsys, *NETWORKS, "--method", name, "--resume", "--max-minutes", 9, "--out", tmp_path / "resumed")
    assert "epoch   1/2" not in printed
    assert_bitwise_equal(tmp_path / "uninterrupted", tmp_path / "resumed")
    timings = {"seconds", "images_per_s"}
    logs = [
        [{k: v for k, v in row.items() if k not in timings} for row in read_log(tmp_path / f)]
        for f in ("uninterrupted", "resumed")
    ]
    assert logs[0] == logs[1]
    accuracies = [float(row["test_top1"]) for row in logs[1]]
    result = json.loads((tmp_path / "resumed" / "result.json").read_text())
    assert (result["best"]["top1"], result["last"]["top1"]) == (max(accuracies), accuracies[-1])
    assert result["best"]["epoch"] == 1 + accuracies.index(max(accuracies))


def test_smoke_runs_every_method(tmp_path, capsys):
    printed = call(capsys, "--smoke", "--device", "cpu", "--amp", "off", "--out", tmp_path)
    assert printed.count("teacher: training resnet14") == 1
    assert printed.count("from an earlier run") == len(METHODS) - 2  # all but alone and the first of the others
    assert printed.count("resnet14-resnet8 is not a published pair") == len(METHODS) - 1
    teacher = "synthetic-subset40-resnet14-alone-1ep-seed1-off"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*METHODS, teacher])
    for name in METHODS:
        folder = tmp_path / name
        names = ["best.pt", "config.yaml", "last.pt", "log.csv", "result.json", "student.pth", "student_best.pth"]
        assert sorted(path.name for path in folder.iterdir()) == names
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["script"], config["method"], config["subset"]) == ("baseline_cifar100", name, 40)
        assert config["published"] == (name == "alone")
        last = json.loads((folder / "result.json").read_text())["last"]
        networks = ["--student", "resnet8"] + (["--teacher", "resnet14"] if name == "simkd" else [])
        test = ["--evaluate", folder / "student.pth", *networks, *SMALL, "--test-subset", 40]
        script, method = (baseline_cifar100, ["--method", name]) if name == "simkd" else (cifar100, [])
        printed = running.call(capsys, *test, *method, module=script)
        assert f"resnet8 {last['top1']:.2f} % top-1, {last['top5']:.2f} % top-5" in printed
    again = call(capsys, "--smoke", "--device", "cpu", "--amp", "off", "--out", tmp_path)
    assert again.count("saved to") == len(METHODS)
    assert "epoch   1/1" not in again
    message = running.call(capsys, *NETWORKS, "--resume", "--out", tmp_path / "crd", code=2, module=cifar100)
    assert "ablations/baseline_cifar100.py" in message
    state = torch.load(tmp_path / "crd" / "last.pt", weights_only=True)
    state["config"]["script"] = "baselines"  # of an earlier version
    torch.save(state, tmp_path / "crd" / "last.pt")
    message = call(capsys, *NETWORKS, "--method", "crd", "--resume", "--out", tmp_path / "crd", code=2)
    assert "a run of an earlier version of ablations/baseline_cifar100.py" in message
    message = running.call(
        capsys,
        "--student",
        "resnet8",
        *SMALL,
        "--evaluate",
        tmp_path / "simkd" / "student.pth",
        code=2,
        module=cifar100,
    )
    assert "SimKD student" in message
    assert "baseline_cifar100.py" in message


@pytest.mark.parametrize("option", ["--method", "--teacher", "--weight", "--resume", "--evaluate"])
def test_smoke_accepts_no_other_options(capsys, option):
    assert option in call(capsys, "--smoke", option, "kd", code=2)


def test_resume_refuses_changed_settings(tmp_path, capsys, monkeypatch, teacher):
    options = [*TINY, "--method", "dkd", "--epochs", 2, "--out", tmp_path]
    call(capsys, *options, "--teacher-ckpt", teacher / "student.pth", "--max-minutes", 1e-9)
    monkeypatch.setitem(settings.SETTINGS["cifar100"]["recipe"], "weight_decay", 1e-3)
    assert "weight_decay 0.001, and the run began with 0.0005" in call(capsys, *options, "--resume", code=2)


def test_a_student_alone_is_no_teacher_of_other_runs(tmp_path, capsys):
    """Its recipe differs from that of cifar100.py, which trains a teacher."""
    call(capsys, *TINY[2:], "--method", "alone", "--epochs", 1, "--out", tmp_path / "alone")
    networks = ["--teacher", "resnet8", *TINY[2:], "--epochs", 1]
    assert "teacher: training resnet8" in running.call(capsys, *networks, "--out", tmp_path / "run", module=cifar100)


def test_resume_first_finishes_the_teacher(tmp_path, capsys):
    options = [*TINY, "--method", "simkd", "--epochs", 1, "--teacher-epochs", 2, "--out", tmp_path / "run"]
    assert "stopped after 1 of 2" in call(capsys, *options, "--max-minutes", 1e-9)
    assert not (tmp_path / "run").exists()
    call(capsys, *options, "--resume")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["teacher_ckpt"] == str(tmp_path / "synthetic-subset40-resnet14-alone-2ep-seed1-off" / "student.pth")


def test_student_initialization_matches_cifar100():
    torch.manual_seed(5)
    plain = build("resnet8", 20).state_dict()
    for name in METHODS:
        args = parse("resnet14-resnet8", name)
        args.seed = 5
        student, _ = baseline_cifar100.build_networks(args, 20)
        own = student.student if name == "simkd" else student
        assert all(torch.equal(value, plain[key]) for key, value in own.state_dict().items())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--student, --method"),
        (["--student", "resnet8", "--method", "kd"], "--method kd also needs --teacher"),
        ([*NETWORKS, "--method", "alone"], "omit --teacher"),
        (["--student", "resnet8", "--method", "alone", "--weight", 1], "--weight has no effect with --method alone"),
        ([*NETWORKS, "--method", "vid", "--temperature", 2], "--temperature is not an option of vid"),
        ([*NETWORKS, "--method", "kd", "--nckd", 2], "--nckd is not an option of kd"),
        ([*NETWORKS, "--method", "simkd", "--w-task", 1], "does not apply to simkd"),
        ([*NETWORKS, "--method", "ofd"], "--method"),
        ([*NETWORKS, "--method", "kd", "--weight", 0, "--w-task", 0], "--weight 0: no loss remains"),
        (["--student", "resnet8", "--method", "alone", "--w-task", 0], "--w-task 0: no loss remains"),
        (
            ["--student", "resnet8", "--method", "alone", "--teacher-epochs", 2],
            "--teacher-epochs has no effect",
        ),
        ([*NETWORKS, "--method", "kd", "--evaluate", "none.pth"], "cifar100.py --student NAME --evaluate"),
        ([*NETWORKS, "--method", "simkd", "--evaluate", "none.pth"], "none.pth"),
        (["--student", "resnet8", "--method", "simkd", "--evaluate", "none.pth"], "also needs --teacher"),
        ([*NETWORKS], "--method"),
        ([*NETWORKS, "--method", "fcfd"], "--method"),
        (["--teacher", "resnet14", "--student", "resnet9", "--method", "crd"], "resnet8"),
        (["--teacher", "vgg8", "--student", "resnet8", "--method", "reviewkd"], "5 stages and the student 4"),
        ([*NETWORKS, "--method", "crd", "--weight", -1], "--weight: -1 must be"),
        ([*NETWORKS, "--method", "reviewkd", "--weight", "nan"], "--weight: nan must be"),
        ([*NETWORKS, "--method", "simkd", "--weight", 0], "no loss remains"),
        ([*NETWORKS, "--method", "crd", "--lr", 0], "--lr: 0 must be"),
        ([*NETWORKS, "--method", "crd", "--epochs", 0], "--epochs: 0 must be"),
        ([*NETWORKS, "--method", "crd", "--subset", 20], "20 training images"),
        ([*NETWORKS, "--method", "reviewkd", "--subset", 33], "a batch of one"),
        ([*NETWORKS, "--method", "crd", "--teacher-ckpt", "none.pth"], "none.pth"),
        (
            [*NETWORKS, "--method", "crd", "--teacher-ckpt", "a.pth", "--teacher-epochs", 3],
            "exclude each other",
        ),
        ([*NETWORKS, "--method", "crd", "--device", "cuda:99"], "cuda:99"),
        ([*NETWORKS, "--method", "crd", "--resume"], "nothing to resume"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    assert_invalid(capsys, SMALL, options, expected, module=baseline_cifar100)


@pytest.mark.parametrize(("method", "expected"), [("crd", "different classes"), ("dkd", "at least two classes")])
def test_single_class_is_rejected_before_training_a_teacher(tmp_path, capsys, method, expected):
    running.write_images(tmp_path / "images", {"train": 4, "test": 2}, classes=["n1"])
    options = [
        *NETWORKS,
        "--dataset",
        "folder",
        "--data-dir",
        tmp_path / "images",
        "--batch-size",
        2,
        "--device",
        "cpu",
    ]
    message = call(capsys, *options, "--method", method, "--out", tmp_path / "runs" / "run", code=2)
    assert expected in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.gpu
def test_on_gpu(tmp_path, capsys):
    call(capsys, "--smoke", "--device", "cuda", "--epochs", 2, "--out", tmp_path)
    for name in METHODS:
        assert all(float(row["loss"]) > 0 and float(row["peak_memory_mb"]) > 0 for row in read_log(tmp_path / name))
