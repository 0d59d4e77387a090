"""ablations/exit_branches.py and the branches that it trains."""

import copy
import csv
import json
import shutil
from argparse import Namespace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from running import flatten_tensors
from torch import nn

import cifar100
from ablations import branches, exit_branches
from ablations.benchmarks import CIFAR
from ablations.cells import to_argv
from ablations.rows import Row, grid
from common.bridges import build_bridges
from common.data.batches import eval_batches, normalize, train_batches
from common.data.sources import load_data
from common.models import build
from common.models.resnet import ResNet
from common.randomness import generator
from common.run.errors import NonFiniteLossError, UserError
from common.run.folder import locked

SMOKE = ["--smoke", "--devices", "cpu", "--amp", "off"]
SETTINGS = {"branch_depth": 8, "branch_widths": [4, 6, 8, 10], "branch_epochs": 2, "batch_size": 24, "seed": 3}


def settings(**other):
    return Namespace(**SETTINGS | {"device": "cpu", "amp": "off"} | other)


@pytest.fixture(scope="module")
def data():
    return load_data("synthetic", "data", 60, 40)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return build("resnet14", 20)


@pytest.fixture(scope="module")
def trained(net, data, tmp_path_factory):
    """The teacher's state before training, the branches, the contents of branches.pt, and its folder."""
    before, folder = copy.deepcopy(net.state_dict()), tmp_path_factory.mktemp("trained")
    return before, *branches.train_branches(settings(), folder, net, data), folder


def smoke_cell(runs, method="fcfd"):
    args, given, _ = exit_branches.parse_args([*SMOKE, "--out", str(runs)], "", "exit_branches", [])
    return grid(args, given, exit_branches.ROWS)["resnet14-resnet8", method, 1]


def equal_tensors(a, b):
    a, b = flatten_tensors(a), flatten_tensors(b)
    return a.keys() == b.keys() and len(a) > 10 and all(torch.equal(a[key], b[key]) for key in a)


# --------------------------------------------------------------------------------------------------- networks


def test_branches_match_resnet50x4s_later_layers():
    whole = ResNet(50, (32, 64, 128, 256), 100)
    built = branches.build_branches(build("resnet32x4", 100), settings(**exit_branches.SHAPE), 100)
    count = {name: sum(p.numel() for p in getattr(whole, name).parameters()) for name in ("layer2", "layer3", "fc")}
    sizes = {k: sum(p.numel() for p in branch.parameters()) for k, branch in built.items()}
    assert sizes == {"2": sum(count.values()), "3": count["layer3"] + count["fc"]}
    assert [len(part) for part in built["2"].groups] == [8, 8]
    shapes = {
        k: built[k].groups(torch.zeros(2, *shape)).shape for k, shape in {"2": (64, 32, 32), "3": (128, 16, 16)}.items()
    }
    assert shapes == {"2": (2, 256, 8, 8), "3": (2, 256, 8, 8)}


def test_branches_of_a_five_stage_pre_relu_teacher():
    teacher = build("vgg8", 7)
    built = branches.build_branches(teacher, settings(), 7)
    features = branches.teacher_features(teacher, torch.randn(2, 3, 32, 32))
    assert {k: tuple(feature.shape[1:]) for k, feature in features.items()} == {
        "2": (128, 16, 16),
        "3": (256, 8, 8),
        "4": (512, 4, 4),
    }
    assert {k: tuple(built[k].groups(feature).shape) for k, feature in features.items()} == {
        "2": (2, 10, 4, 4),  # the first of the three groups keeps the resolution
        "3": (2, 10, 2, 2),
        "4": (2, 10, 2, 2),
    }
    assert any((feature < 0).any() for feature in features.values())
    for k, branch in built.eval().items():
        assert torch.equal(branch(features[k]), branch(features[k].relu()))
        assert not torch.equal(branch.groups(features[k]), branch.groups(features[k].relu()))


# --------------------------------------------------------------------------------------------------- training


def test_branches_are_trained_independently(net, data, trained):
    _, together, state, _ = trained
    for k, branch in branches.build_branches(net, settings(), 20).items():
        optimizer = torch.optim.SGD(branch.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
        before = copy.deepcopy(branch.state_dict())
        for epoch, lr in enumerate((0.05, 0.005)):  # the first milestone of two epochs is 1
            optimizer.param_groups[0]["lr"], losses, hits = lr, [], 0
            for images, labels in train_batches(data.train, 24, seed=3, epoch=epoch):
                logits = branch(net.features(images)[int(k) - 1].detach())
                losses.append(F.cross_entropy(logits, labels))
                hits += (logits.argmax(1) == labels).sum().item()
                optimizer.zero_grad()
                losses[-1].backward()
                optimizer.step()
            assert state["log"][epoch]["lr"] == pytest.approx(lr)
            assert state["log"][epoch][f"loss_{k}"] == pytest.approx(sum(losses).item() / 3, rel=1e-4)
            assert state["log"][epoch][f"train_top1_{k}"] == pytest.approx(100 * hits / 60)
        torch.testing.assert_close(together[k].state_dict(), branch.state_dict(), rtol=1e-4, atol=1e-5)
        assert not any(torch.equal(before[key], value) for key, value in together[k].state_dict().items())


def test_teacher_does_not_change(net, trained):
    before, *_ = trained
    assert equal_tensors(before, net.state_dict())


def test_resumed_training_is_bitwise_identical(net, data, trained, tmp_path, monkeypatch):
    def interrupted(images, batch_size, seed, epoch, *more):
        if epoch == 1:
            raise KeyboardInterrupt
        return train_batches(images, batch_size, seed, epoch, *more)

    monkeypatch.setattr(branches, "train_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        branches.train_branches(settings(), tmp_path, net, data)
    monkeypatch.undo()
    assert torch.load(tmp_path / "branches.pt")["epoch"] == 1
    branches.train_branches(settings(), tmp_path, net, data)
    resumed, uninterrupted = (torch.load(folder / "branches.pt") for folder in (tmp_path, trained[-1]))
    assert equal_tensors(resumed, uninterrupted)
    for row in (*resumed["log"], *uninterrupted["log"]):
        del row["seconds"]
    assert [resumed[key] for key in ("log", "top1", "epoch")] == [
        uninterrupted[key] for key in ("log", "top1", "epoch")
    ]


def test_mismatched_branches_are_rejected(net, data, trained, tmp_path, monkeypatch):
    folder = trained[-1]
    for other, message in (
        ({"branch_depth": 14}, "--branch-depth is 14 but was 8"),
        ({"amp": "bf16"}, "--amp is bf16"),
    ):
        with pytest.raises(UserError, match=message):
            branches.train_branches(settings(**other), folder, net, data)
    with pytest.raises(UserError, match="another teacher"):
        branches.train_branches(settings(), folder, build("resnet14", 20), data)
    torch.save({"model": {}}, tmp_path / "branches.pt")
    with pytest.raises(UserError, match="remove it"):
        branches.train_branches(settings(), tmp_path, net, data)
    (tmp_path / "branches.pt").unlink()
    monkeypatch.setattr(branches, "LR", 1e30)
    with pytest.raises(NonFiniteLossError, match="in epoch 1"):
        branches.train_branches(settings(), tmp_path, net, data)
    assert not any(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- students


def test_recalibrated_statistics_are_averages_over_a_full_pass(net, data, trained, monkeypatch):
    own = copy.deepcopy(trained[1]).train()
    before = copy.deepcopy(own.state_dict())
    monkeypatch.setattr(branches, "CALIBRATION_BATCH", 25)

    def shifted(images):
        return {k: 2 * feature - 0.3 for k, feature in branches.teacher_features(net, images).items()}

    recalibrated = branches.recalibrated(own, shifted, data.train)
    assert equal_tensors(before, own.state_dict())
    assert not any(module.training for module in recalibrated.modules())
    order = torch.randperm(60, generator=generator(0, 0, "recalibration")).tolist()
    for k, branch in own.items():
        naive, seen = copy.deepcopy(branch).train(), {}
        for name, layer in naive.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                seen[name] = []
                layer.register_forward_pre_hook(lambda _, inputs, own=seen[name]: own.append(inputs[0]))
        for part in (order[:20], order[20:40], order[40:]):
            naive(shifted(normalize(data.train.images[part]))[k])
        assert len(seen) >= 3
        for name, inputs in seen.items():
            layer = recalibrated[k].get_submodule(name)
            mean = sum(x.mean((0, 2, 3)) for x in inputs) / 3
            var = sum(x.transpose(0, 1).flatten(1).var(1) for x in inputs) / 3
            torch.testing.assert_close(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer.running_var, var, rtol=1e-4, atol=1e-5)
            assert layer.momentum == 0.1
        assert equal_tensors(list(branch.parameters()), list(recalibrated[k].parameters()))


def naive_features(run, images):
    """B_st^k(F_s^k), computed directly from the saved weights."""
    state = torch.load(run / "last.pt")
    student = build("resnet8", 20).eval()
    student.load_state_dict({key: value for key, value in state["student"].items() if ".path" not in key})
    x, features = images, {}
    for k in (1, 2, 3):
        x = student.stage(k, x)
        if k > 1:
            weights = {key.removeprefix(f"s2t.{k}."): value for key, value in state["bridges"].items()}
            y = F.conv2d(x, weights["0.weight"], padding=1)
            shape = (1, -1, 1, 1)
            mean, var = weights["1.running_mean"].view(shape), weights["1.running_var"].view(shape)
            y = (y - mean) / (var + 1e-5).sqrt() * weights["1.weight"].view(shape) + weights["1.bias"].view(shape)
            features[str(k)] = torch.where(y > 0, y, 0.1 * y).detach()
    return features


def loaded_teacher(runs):
    teacher = build("resnet14", 20).eval()
    teacher.load_state_dict(torch.load(runs / "resnet14-alone-seed1" / "student.pth")["model"])
    return teacher


def test_student_features_are_bridged_pure_path_features(branch_runs):
    data, cell = load_data("synthetic", "data", 40, 40), smoke_cell(branch_runs)
    images, _ = next(eval_batches(data.test))
    assert any(".path2." in key for key in torch.load(cell.folder / "last.pt")["student"])
    features = branches.student_features(cell, data, loaded_teacher(branch_runs), torch.device("cpu"))
    for actual in (features(images), features(images)):  # running statistics do not change
        torch.testing.assert_close(actual, naive_features(cell.folder, images), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="another resnet14"):
        branches.student_features(cell, data, build("resnet14", 20), torch.device("cpu"))


@pytest.fixture
def shuffle_runs(branch_runs, tmp_path, monkeypatch):
    """The options of two pairs of one teacher, whose runs are finished, and the runs by pair."""
    monkeypatch.setattr(exit_branches, "ROWS", [Row({"method": "fcfd"})])
    pairs = ["resnet14-ShuffleV1", "resnet14-ShuffleV2"]
    options = ["--pairs", *pairs, *CIFAR.smoke, "--devices", "cpu", "--amp", "off", "--out", str(tmp_path)]
    options += ["--branch-depth", "8", "--branch-widths", "4", "6", "8", "10"]
    options += ["--teacher-ckpt", f"resnet14={branch_runs / 'resnet14-alone-seed1' / 'student.pth'}"]
    args, given, _ = exit_branches.parse_args(options, "", "exit_branches", [])
    runs = {pair: cell for (pair, _, _), cell in grid(args, given, exit_branches.ROWS).items()}
    for cell in runs.values():
        assert cifar100.main(to_argv(cell.given | {"device": "cpu", "out": cell.folder})) == 0
    return options, runs


def test_students_of_other_architectures_share_the_branches_of_their_teacher(branch_runs, shuffle_runs, capsys):
    options, runs = shuffle_runs
    capsys.readouterr()
    assert exit_branches.main(options) == 0
    output = capsys.readouterr().out
    assert "2 runs, 2 already finished" in output
    assert output.count("branches, epoch") == 1
    data, teacher = load_data("synthetic", "data", 40, 40), loaded_teacher(branch_runs)
    images, _ = next(eval_batches(data.test))
    for pair, cell in runs.items():
        assert f"| {pair} | fcfd | 1 |" in output
        student = build(cell.given["student"], 20).eval()
        student.load_state_dict(torch.load(cell.network)["model"])
        bridges = build_bridges(teacher, student, 32).eval()
        bridges.load_state_dict(torch.load(cell.folder / "last.pt")["bridges"])
        f2 = student.stage(2, student.stage(1, images))
        naive = {"2": bridges.s2t["2"](f2).detach(), "3": bridges.s2t["3"](student.stage(3, f2)).detach()}
        features = branches.student_features(cell, data, teacher, torch.device("cpu"))
        torch.testing.assert_close(features(images), naive)


def top1(branch, features, labels):
    return 100 * (branch(features).argmax(1) == labels).float().mean().item()


def test_smoke_table_matches_the_files(branch_runs):
    data, teacher = load_data("synthetic", "data", 40, 40), loaded_teacher(branch_runs)
    rows = list(csv.DictReader((branch_runs / "cells.csv").open()))
    assert [(row["features"], row["after"]) for row in rows] == [
        (name, k) for name in ("teacher", "teacher, recalibrated", "app", "fcfd") for k in "23"
    ]
    c = settings(branch_depth=8, branch_widths=[8, 16, 32, 64], seed=1)
    trained = branches.build_branches(teacher, c, 20).eval()
    trained.load_state_dict(torch.load(branch_runs / "resnet14-branches-seed1" / "branches.pt")["branches"])
    images, labels = next(eval_batches(data.test))
    on = {name: partial(naive_features, branch_runs / f"resnet14-resnet8-{name}-seed1") for name in ("app", "fcfd")}
    on = dict.fromkeys(("teacher", "teacher, recalibrated"), partial(branches.teacher_features, teacher)) | on
    runs = ["resnet14-alone-seed1"] * 2 + ["resnet14-resnet8-app-seed1", "resnet14-resnet8-fcfd-seed1"]
    text = (branch_runs / "table.md").read_text()
    for (name, features), run in zip(on.items(), runs, strict=True):
        own = trained if name == "teacher" else branches.recalibrated(trained, features, data.train)
        expected = [top1(own[k], features(images)[k], labels) for k in "23"]
        assert [float(row["top1"]) for row in rows if row["features"] == name] == pytest.approx(expected)
        plain = json.loads((branch_runs / run / "result.json").read_text())["last"]["top1"]
        assert {float(row["plain"]) for row in rows if row["features"] == name} == {plain}
        assert f"| resnet14-resnet8 | {name} | 1 | {expected[0]:.2f} | {expected[1]:.2f} |" in text
    assert "depth 8 and widths 8, 16, 32, 64" in text


def test_results_are_kept_and_missing_files_are_reported(branch_runs, tmp_path, capsys, monkeypatch):
    runs = shutil.copytree(branch_runs, tmp_path / "runs")
    command = [*SMOKE, "--out", str(runs)]
    text, folder = (runs / "table.md").read_text(), runs / "resnet14-branches-seed1"

    def rerun(*options, code=0):
        assert exit_branches.main([*command, *options]) == code
        output = capsys.readouterr()
        return output.out if code == 0 else output.err

    (runs / "table.md").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(exit_branches, "load_data", None)  # nothing is left to do
        assert text in rerun()
        assert "--branch-depth is 14 but was 8" in rerun("--branch-depth", "14", code=2)
    row = folder / "resnet14-resnet8-app-seed1.json"
    kept = row.read_text()
    row.write_text(kept.replace('"of": [\n  "', '"of": [\n  "0'))  # as if measured with other branches
    output = rerun()
    assert "app-seed1: " in output
    assert "fcfd-seed1: " not in output
    assert "epoch   1" not in output
    assert row.read_text() == kept

    for file in runs.rglob("*.pt*"):  # as in a fresh clone: results, but no weights
        file.unlink()
    assert text in rerun()
    row.unlink()
    message = rerun(code=2)
    assert f"{runs}/resnet14-alone-seed1/student.pth is missing" in message
    missing = (
        "resnet14-alone-seed1",
        "resnet14-resnet8-app-seed1",
        "resnet14-resnet8-fcfd-seed1",
    )  # the branches are missing too
    assert message.endswith(f"train again: rm {' '.join(f'{runs}/{name}/result.json' for name in missing)}\n")
    assert message.count("\n") == 1
    with (
        locked(folder),
        pytest.raises(UserError, match="another process"),
        exit_branches.open_branches(
            settings(dataset="synthetic", data_dir="data", subset=40, test_subset=40), folder, [smoke_cell(branch_runs)]
        ),
    ):
        pass


def test_numbers_repeat_the_teacher_for_each_pair():
    def result(value):
        return {"top1": {"2": value}, "made_with": {"commit": "x"}}

    keys = {("a-b", "app", 1): 1.0, ("a-b", "app", 2): 2.0, ("a-c", "app", 1): 3.0}
    runs = {key: {"last": 10 * value, "teacher": 70.0} for key, value in keys.items()}
    teacher_results = {name: result(50.0 + i) for i, name in enumerate(exit_branches.TEACHER)}
    rows = exit_branches.numbers(teacher_results | {key: result(value) for key, value in keys.items()}, runs, seed=5)
    assert [tuple(row.values()) for row in rows] == [
        ("a-b", "teacher", 5, "2", 50.0, 70.0, "x"),
        ("a-b", "teacher, recalibrated", 5, "2", 51.0, 70.0, "x"),
        ("a-b", "app", 1, "2", 1.0, 10.0, "x"),
        ("a-b", "app", 2, "2", 2.0, 20.0, "x"),
        ("a-c", "teacher", 5, "2", 50.0, 70.0, "x"),
        ("a-c", "teacher, recalibrated", 5, "2", 51.0, 70.0, "x"),
        ("a-c", "app", 1, "2", 3.0, 30.0, "x"),
    ]


def test_table():
    def row(pair, features, seed, after, value):
        return {"pair": pair, "features": features, "seed": seed, "after": after, "top1": value}

    rows = [row("a-b", "teacher", 1, "2", 70.0), *(row("a-b", "app", seed, "2", 60.0 + seed) for seed in (1, 2, 3))]
    text = exit_branches.table([*rows, row("c-d", "teacher", 1, "2", 50.0), row("c-d", "teacher", 1, "3", 55.0)])
    assert text.splitlines()[0] == "| pair | features of | n | after F^2 | after F^3 |"
    assert "| a-b | teacher | 1 | 70.00 |  |\n| a-b | app | 3 | 62.00 ± 1.00 |  |\n" in text
    assert "| c-d | teacher | 1 | 50.00 | 55.00 |\n" in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--branch-depth", "9"], "--branch-depth: 9 must"),
        (["--branch-depth", "2"], "--branch-depth: 2 must"),
        (["--branch-widths", "8", "8", "0", "8"], "--branch-widths: 0 must"),
        (["--branch-widths", "8", "8"], "--branch-widths"),
        (["--branch-epochs", "0"], "--branch-epochs: 0 must"),
        (["--w-app", "0"], "--w-app 0"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, options, expected):
    assert exit_branches.main([*SMOKE, *options, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert expected in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()
