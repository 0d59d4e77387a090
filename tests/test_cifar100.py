"""cifar100.py, run from the command line."""

import json
import re
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
import yaml
from running import (
    FEW_IMAGES,
    PAIR,
    SMALL,
    assert_bitwise_equal,
    assert_invalid,
    call,
    read_log,
    run_script,
    write_images,
)

import cifar100
from common.bridges import build_bridges
from common.data.batches import train_batches
from common.data.sources import load_data
from common.fcfd import TERMS, fcfd_terms, forward_paths
from common.models import build
from common.multipath_bn import track_paths
from common.paths import candidate_paths, sample_paths

METHODS = {
    "kd": {"task", "kd"},
    "app": {"task", "kd", "app"},
    "fcfd": {"task", "kd", "app", "func_l2", "func_kl", "func_prime"},
}


@pytest.fixture(scope="module")
def main_run(tmp_path_factory):
    """A small version of the README's first command: its working directory and output."""
    folder = tmp_path_factory.mktemp("main")
    return folder, run_script(folder, *PAIR, "--epochs", 2)


def test_main_run_trains_the_teacher_and_distills(main_run):
    folder, printed = main_run
    runs = folder / "runs"
    alone, distilled = (
        runs / "synthetic-subset120-resnet14-alone-2ep-seed1-off",
        runs / "synthetic-subset120-resnet14-resnet8-fcfd-2ep-seed1-off",
    )
    assert sorted(runs.iterdir()) == [alone, distilled]
    assert "teacher: training resnet14 for 2 epochs" in printed
    result = json.loads((distilled / "result.json").read_text())
    for name in ("best", "last", "teacher"):
        assert re.search(
            rf"^{name} +{result[name]['top1']:.2f} % top-1, {result[name]['top5']:.2f} % top-5", printed, re.M
        )
    assert str(distilled.relative_to(folder) / "student.pth") in printed
    # Same as in the teacher's own run: measured before distillation updates its running statistics.
    assert result["teacher"] == {
        key: json.loads((alone / "result.json").read_text())["last"][key] for key in ("top1", "top5")
    }


def test_main_run_writes_its_files(main_run):
    folder = main_run[0] / "runs" / "synthetic-subset120-resnet14-resnet8-fcfd-2ep-seed1-off"
    names = ["best.pt", "config.yaml", "last.pt", "log.csv", "result.json", "student.pth", "student_best.pth"]
    assert sorted(path.name for path in folder.iterdir()) == names
    rows = read_log(folder)
    result, config = (
        json.loads((folder / "result.json").read_text()),
        yaml.safe_load((folder / "config.yaml").read_text()),
    )
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(row[term]) > 0 for row in rows for term in METHODS["fcfd"])
    accuracies = [float(row["test_top1"]) for row in rows]
    assert result["last"]["top1"] == accuracies[-1]
    assert result["best"]["top1"] == max(accuracies)
    assert result["best"]["epoch"] == 1 + accuracies.index(max(accuracies))
    assert {"seconds", "commit", "torch", "device"} <= result.keys()
    assert (config["temperature"], config["w_app"], config["num_paths"], config["positions"]) == (4, 5, 2, [2, 3])
    shared = torch.load(folder / "student.pth", weights_only=True)
    assert list(shared["model"]) == list(build("resnet8", 20).state_dict())  # plain: no bridges, no per-path statistics
    best = torch.load(folder / "student_best.pth", weights_only=True)
    assert (best["epoch"], best["accuracy"]) == (result["best"]["epoch"], result["best"]["top1"])
    state = torch.load(folder / "last.pt", weights_only=True)
    assert {"student", "teacher", "bridges", "optimizer", "scaler", "epoch"} <= state.keys()
    assert torch.equal(state["student"]["conv1.weight"], shared["model"]["conv1.weight"])
    assert torch.load(folder / "best.pt", weights_only=True)["epoch"] == result["best"]["epoch"]


def test_earlier_teacher_is_reused_or_the_reason_is_printed(main_run, capsys, monkeypatch):
    monkeypatch.chdir(main_run[0])
    printed = call(capsys, *PAIR, "--epochs", 1, "--teacher-epochs", 2, "--method", "kd")
    assert "teacher: runs/synthetic-subset120-resnet14-alone-2ep-seed1-off/student.pth, from an earlier run" in printed
    printed = call(capsys, *PAIR, "--epochs", 1, "--seed", 2, "--method", "kd")
    assert "trained for 2 epochs, not 1" in printed
    assert "teacher: training resnet14 for 1 epochs" in printed
    printed = call(capsys, *PAIR, *FEW_IMAGES, "--epochs", 2, "--method", "kd")
    assert "it was trained on different data" in printed


def test_evaluate_reproduces_the_accuracy_of_a_run(main_run, capsys):
    run = main_run[0] / "runs" / "synthetic-subset120-resnet14-resnet8-fcfd-2ep-seed1-off"
    last = json.loads((run / "result.json").read_text())["last"]
    printed = call(capsys, "--evaluate", run / "student.pth", "--student", "resnet8", *SMALL)
    assert f"resnet8 {last['top1']:.2f} % top-1, {last['top5']:.2f} % top-5 on 60 test images" in printed


@pytest.mark.parametrize("method", ["kd", "app"])
def test_methods_compute_only_their_terms(tmp_path, capsys, teacher, method):
    options = ["--epochs", 1, "--teacher-ckpt", teacher / "student.pth", "--out", tmp_path]
    call(capsys, *PAIR, *FEW_IMAGES, "--method", method, *options)
    row = read_log(tmp_path)[0]
    assert {term for term in METHODS["fcfd"] if row[term]} == METHODS[method]
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert ("bridges" in state) == (method == "app")


@pytest.mark.parametrize(
    ("options", "terms", "t2s"),
    [
        (["--w-func-prime", 0], METHODS["fcfd"] - {"func_prime"}, False),
        (["--w-func-l2", 0, "--w-func-kl", 0], METHODS["fcfd"] - {"func_l2", "func_kl"}, True),
        (["--w-app", 0, "--positions", 3, "--num-paths", 1], METHODS["fcfd"] - {"app"}, True),
        (["--method", "kd", "--w-func-kl", 1], {"task", "kd", "func_kl"}, False),
        (["--teacher-bn", "running", "--positions", 2, 4, "--num-paths", 4], METHODS["fcfd"], True),
        (["--amp", "bf16"], METHODS["fcfd"], True),
        (["--num-paths", 0], METHODS["fcfd"], True),
        (["--positions", 4], METHODS["fcfd"] - {"func_l2"}, True),  # no path feeds func_l2
        (["--method", "app", "--w-func-partial", 2], METHODS["app"] | {"func_partial"}, False),
        (["--method", "kd", "--w-func-prime-l2", 2, "--positions", 2, 4], {"task", "kd", "func_prime_l2"}, True),
    ],
)
def test_settings_select_terms_and_bridges(tmp_path, capsys, teacher, options, terms, t2s):
    files = ["--teacher-ckpt", teacher / "student.pth", "--out", tmp_path]
    call(capsys, *PAIR, *FEW_IMAGES, *options, "--epochs", 1, *files)
    row = read_log(tmp_path)[0]
    assert {term for term in TERMS if row.get(term)} == terms
    assert all(np.isfinite(float(row[term])) for term in terms)
    bridges = torch.load(tmp_path / "last.pt", weights_only=True)["bridges"]
    assert any(key.startswith("t2s") for key in bridges) == t2s


@pytest.mark.parametrize("teacher_bn", ["batch", "running"])
def test_two_epochs_match_a_manual_loop(tmp_path, capsys, teacher, teacher_bn):
    """The script against a loop with hand-written SGD; no setting has its default value."""
    weights = {"task": 0.9, "kd": 0.8, "app": 2.0, "func_l2": 3.0, "func_kl": 0.7, "func_prime": 0.6}
    weights |= {"func_partial": 1.5, "func_prime_l2": 2.5}
    options = [word for term, w in weights.items() for word in (f"--w-{term.replace('_', '-')}", w)]
    options += [
        "--epochs",
        24,
        "--lr",
        0.002,
        "--temperature",
        3,
        "--num-paths",
        3,
        "--seed",
        5,
        "--teacher-bn",
        teacher_bn,
    ]
    options += ["--teacher-ckpt", teacher / "student.pth", "--subset", 40, "--out", tmp_path, "--max-minutes", 1e-9]
    pair = PAIR[:6] + PAIR[8:]  # without its --subset
    call(capsys, *pair, *options)
    call(capsys, *pair, *options, "--resume")  # each call stops after one epoch

    torch.manual_seed(5)
    student, net_t = build("resnet8", 20), build("resnet14", 20)
    bridges = build_bridges(net_t, student, 32)
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    weights_t = torch.load(teacher / "student.pth", weights_only=True)["model"]
    net_t.load_state_dict(weights_t)
    net_t.requires_grad_(False).train(teacher_bn == "batch")
    for net in (student, net_t):
        track_paths(net, [2, 3])
    for net in (student, net_t, bridges):  # as in the script, so that rounding is similar
        net.to(memory_format=torch.channels_last)
    data = load_data("synthetic", "", 40, 60)
    velocity, losses = {}, []
    for epoch in range(2):
        warm = (epoch + 1) / 2  # 1/12 of 24 epochs
        paths = sample_paths(candidate_paths(4), 3, 2, 5, epoch)
        for step, (images, labels) in enumerate(train_batches(data.train, 32, 5, epoch)):
            terms = fcfd_terms(forward_paths(net_t, student, bridges, images, paths[step]), labels, 3.0, weights)
            l2_terms = ("app", "func_l2", "func_partial", "func_prime_l2")
            factors = {name: w * (warm if name in l2_terms else 1) for name, w in weights.items()}
            loss = sum(factors[name] * value for name, value in terms.items())
            losses.append(loss.item())
            trained = {p: p.grad for net in (student, bridges) for p in net.parameters()}
            for p, g in zip(trained, torch.autograd.grad(loss, list(trained), allow_unused=True), strict=True):
                if g is not None:
                    g = g + 5e-4 * p.detach()
                    velocity[p] = 0.9 * velocity.get(p, 0) + g
                    p.data -= 0.002 * (g + 0.9 * velocity[p])

    rows = read_log(tmp_path)
    assert [float(row["loss"]) for row in rows] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-4)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    for name, p in student.named_parameters():
        update = p.detach() - start[name]
        assert (state["student"][name] - p.detach()).norm() < 0.01 * update.norm(), name
    for name, p in net_t.named_parameters():
        assert torch.equal(state["teacher"][name], p)  # frozen
    for name, value in net_t.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(state["teacher"][name], value, rtol=1e-2, atol=1e-4)
            if ".path" not in name:  # the teacher's pure-path statistics change only with batch statistics
                assert torch.equal(value, weights_t[name]) == (teacher_bn == "running")


def test_files_are_restored_from_last_pt(tmp_path, capsys):
    options = ["--student", "resnet8", *SMALL, "--epochs", 1, "--out", tmp_path]
    call(capsys, *options)
    names = ["best.pt", "config.yaml", "log.csv", "result.json", "student.pth", "student_best.pth"]
    before = {name: (tmp_path / name).read_bytes() for name in names}
    for name in names:
        (tmp_path / name).unlink()
    call(capsys, *options, "--resume")
    for name in names:
        assert (tmp_path / name).read_bytes() == before[name], name


def test_max_minutes_stops_teacher_and_student(tmp_path, capsys):
    base = [*PAIR, *FEW_IMAGES, "--epochs", 2, "--out"]
    call(capsys, *base, tmp_path / "one" / "uninterrupted")
    options = [*base, tmp_path / "two" / "resumed", "--max-minutes", 1e-9]
    assert "stopped after 1 of 2 epochs" in call(capsys, *options)
    other_seed = [*options, "--resume", "--out", tmp_path / "two" / "seed", "--seed", 10]
    assert "nothing to resume" in call(capsys, *other_seed, code=2)  # the interrupted teacher has seed 1
    (
        tmp_path / "two" / "synthetic-subset40-resnet14-alone-2ep-seed1-off" / "result.json"
    ).unlink()  # as if the run had been killed
    assert "teacher: training" in call(capsys, *options, "--resume")  # the teacher's last epoch and the student's first
    typo = [*PAIR, *FEW_IMAGES, "--epochs", 2, "--resume", "--out", tmp_path / "two" / "typo"]
    assert "nothing to resume" in call(capsys, *typo, code=2)  # the teacher has finished
    assert "--resume" in call(capsys, *options, code=2)  # the folder already holds a run
    printed = call(capsys, *options, "--resume")
    assert "epoch   2/2" in printed
    assert "resnet8 saved to" in printed
    assert_bitwise_equal(tmp_path / "one" / "uninterrupted", tmp_path / "two" / "resumed")


def test_folder_dataset(tmp_path, capsys):
    images = write_images(tmp_path / "images", {"train": 12, "val": 4}, ["a", "b", "c"])
    data = ["--dataset", "folder", "--data-dir", images, "--device", "cpu", "--amp", "off"]
    options = [*data, "--epochs", 1, "--batch-size", 16, "--out", tmp_path / "runs" / "x"]
    printed = call(capsys, "--teacher", "vgg8", "--student", "MobileNetV2", *options)
    assert "36 training and 12 test images in 3 classes" in printed
    assert (tmp_path / "runs" / "folder-images-vgg8-alone-1ep-seed1-off" / "student.pth").exists()
    shutil.rmtree(images / "train")  # not needed for evaluation
    top1 = float(read_log(tmp_path / "runs" / "x")[0]["test_top1"])
    printed = call(capsys, "--student", "MobileNetV2", *data, "--evaluate", tmp_path / "runs" / "x" / "student.pth")
    assert printed == f"MobileNetV2 {top1:.2f} % top-1, 100.00 % top-5 on 12 test images\n"


def test_diverging_run_keeps_the_last_good_epoch(tmp_path, capsys, monkeypatch):
    options = ["--student", "resnet8", *SMALL, "--epochs", 3, "--out", tmp_path]
    call(capsys, *options, "--max-minutes", 1e-9)
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(cifar100, "learning_rate", lambda args, epoch: 1e30)
    message = call(capsys, *options, "--resume", code=1)
    assert "epoch 2, step 2" in message
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--student", "resnet9"], "resnet8"),
        (["--student", "resnet8", "--teacher", "vgg8"], "5 stages and the student 4"),
        (["--student", "resnet8", "--teacher", "resnet14", "--num-paths", 5], "4 candidates"),
        (["--student", "resnet8", "--teacher", "resnet14", "--positions", 1], "outside 2..4"),
        (["--student", "resnet8", "--teacher", "resnet14", "--w-app", "nan"], "--w-app: nan"),
        (["--student", "resnet8", "--teacher", "resnet14", "--temperature", 0], "--temperature: 0"),
        (["--student", "resnet8", "--teacher", "resnet14", "--teacher-ckpt", "missing.pth"], "missing.pth"),
        ([*PAIR[:4], "--teacher-ckpt", "x.pth", "--teacher-epochs", 2], "exclude each other"),
        (["--student", "resnet8", "--method", "kd"], "--teacher"),
        (["--student", "resnet8", "--teacher", ""], "--teacher: unknown network"),
        (["--student", "resnet8", "--out", ""], "--out is empty"),
        (["--student", "resnet8", "--out", "x" * 300], "x" * 300),
        (["--student", "resnet8", "--device", "meta"], "meta"),
        (["--student", "resnet8", "--seed", 10**20], "--seed: 1"),
        (
            ["--student", "resnet8", "--teacher", "vgg8", "--method", "kd", "--w-task", 0, "--w-kd", 0],
            "another term a weight",
        ),
        (
            [*PAIR[:4], "--epochs", 1, "--out", "synthetic-subset120-resnet14-alone-1ep-seed1-off"],
            "choose another --out",
        ),
        ([*PAIR[:4], "--positions", 4, "--w-func-kl", 0, "--w-func-prime", 0, "--num-paths", 1], "0 candidates"),
        ([*PAIR[:4], "--positions", 4, "--w-func-l2", 5], "func_l2"),
        (["--student", "resnet8", "--lr", "inf"], "--lr: inf"),
        (["--student", "resnet8", "--epochs", 0], "--epochs: 0"),
        (["--student", "resnet8", "--subset", 10], "--subset 10"),
        (["--student", "resnet8", "--subset", 20], "20 training images"),
        (["--student", "resnet8", "--device", "cuda:99"], "cuda:99"),
        (["--student", "resnet8", "--dataset", "cifar"], "cifar100"),
        (["--student", "resnet8", "--bogus"], "--bogus"),
        (["--student", "resnet8", "--resume"], "nothing to resume"),
        ([], "--student"),
        (["--student", "resnet8", "--evaluate", "missing.pth"], "missing.pth"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    assert_invalid(capsys, SMALL, options, expected)


def test_resume_cannot_add_a_teacher(tmp_path, capsys):
    call(capsys, "--student", "resnet8", *SMALL, "--epochs", 1, "--out", tmp_path)
    options = ["--student", "resnet8", "--teacher", "resnet14", "--resume", "--out", tmp_path]
    assert "--teacher is resnet14 but was None" in call(capsys, *options, code=2)


def test_resume_rejects_a_file_not_written_by_a_run(tmp_path, capsys):
    torch.save({"model": {}}, tmp_path / "last.pt")
    assert "was not written by a run" in call(
        capsys, "--student", "resnet8", *SMALL, "--resume", "--out", tmp_path, code=2
    )


def test_script_prints_no_traceback(tmp_path):
    message = run_script(tmp_path, "--student", "resnet9", code=2)
    assert message.startswith("error: --student: unknown network")
    assert message.count("\n") == 1


def test_schedules():
    def rates(epochs):
        args = Namespace(lr=0.05, epochs=epochs)
        return [cifar100.learning_rate(args, epoch) for epoch in range(epochs)]

    def warmup(epochs, epoch):
        weights = cifar100.warmed_up({"app": 1, "func_kl": 3}, Namespace(epochs=epochs), epoch)
        assert weights["func_kl"] == 3  # only L2 terms are warmed up
        return weights["app"]

    assert rates(240) == [0.05] * 150 + [0.05 / 10] * 30 + [0.05 / 100] * 30 + [0.05 / 1000] * 30
    assert rates(8) == [0.05] * 5 + [0.05 / 10] + [0.05 / 100] + [0.05 / 1000]
    assert [warmup(240, epoch) for epoch in range(22)] == [(epoch + 1) / 20 for epoch in range(20)] + [1, 1]
    assert [warmup(24, epoch) for epoch in range(3)] == [0.5, 1, 1]
    assert warmup(3, 0) == 1


@pytest.mark.parametrize(
    ("teacher_name", "student_name", "row"),
    [  # (learning rate, temperature, weight of L2 terms, weight of KL terms)
        ("wrn_40_2", "wrn_16_2", (0.05, 4, 5, 0.2)),
        ("wrn_40_2", "wrn_40_1", (0.05, 4, 5, 1)),
        ("resnet56", "resnet20", (0.05, 4, 0.02, 1)),
        ("resnet32x4", "resnet8x4", (0.05, 4, 5, 1)),
        ("vgg13", "vgg8", (0.05, 4, 5, 1)),
        ("resnet32x4", "ShuffleV1", (0.01, 8, 5, 1)),
        ("wrn_40_2", "ShuffleV1", (0.01, 4, 5, 1)),
        ("vgg13", "MobileNetV2", (0.01, 4, 5, 1)),
        ("ResNet50", "MobileNetV2", (0.01, 8, 5, 1)),
        ("resnet32x4", "ShuffleV2", (0.01, 8, 5, 1)),
        ("resnet110", "resnet32", (0.05, 4, 5, 1)),
        ("vgg8", "MobileNetV2", (0.01, 4, 5, 1)),
    ],
)
def test_published_settings(teacher_name, student_name, row):
    args = cifar100.parse_args(["--teacher", teacher_name, "--student", student_name, "--device", "cuda"])
    assert (args.lr, args.temperature, args.w_app, args.w_func_kl) == row
    assert (args.w_func_l2, args.w_func_prime, args.w_task, args.w_kd) == (args.w_app, args.w_func_kl, 1, 1)
    assert (args.w_func_partial, args.w_func_prime_l2) == (0, 0)
    assert (args.epochs, args.batch_size, args.teacher_bn, args.method, args.amp) == (240, 64, "batch", "fcfd", "fp16")


@pytest.mark.slow
def test_resnet14_beats_resnet8_by_five_points_on_synthetic(tmp_path, capsys):
    def accuracy(name):
        means = []
        for seed in (1, 2, 3):
            out = tmp_path / f"{name}-{seed}"
            call(capsys, "--student", name, "--dataset", "synthetic", "--epochs", 8, "--seed", seed, "--out", out)
            means.append(json.loads((out / "result.json").read_text())["last"]["top1"])
        return sum(means) / 3

    assert accuracy("resnet14") >= accuracy("resnet8") + 5


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--amp", "bf16"], ["--amp", "off"]])
def test_main_run_on_gpu(tmp_path, capsys, options):
    small = [word if word != "cpu" else "cuda" for word in PAIR]
    call(capsys, *small, *options, "--epochs", 2, "--out", tmp_path / "x")
    rows = read_log(tmp_path / "x")
    assert all(
        np.isfinite(float(row[term])) and float(row["peak_memory_mb"]) > 0 for row in rows for term in METHODS["fcfd"]
    )
