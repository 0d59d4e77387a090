"""detection.py, run from the command line with small ROI heads; test_detection_ranks.py uses several ranks."""

import json
import os
import shutil
import signal
from pathlib import Path

import detection_ranks
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from running import assert_bitwise_equal, assert_invalid, background_script, call, read_log, run_script
from tiny_detectors import shrink, write_coco
from torch import nn
from torchvision import models

import detection
from common.detection import synthetic
from common.detection.boxes import COLORS
from common.detection.coco import load_coco
from common.detection.detectors import build_detector
from common.detection.evaluation import METRICS
from common.detection.fcfd import TASK_LOSSES, TERMS, detection_terms, forward_detectors, level_bridges
from common.detection.images import BoxedImages, batches, load
from common.detection.records import add_row, all_reduce_mean
from common.randomness import derive_seed

pytest.importorskip("pycocotools")

SMALL = ["--min-size", 96, "--rois", 16, "--batch-size", 2, "--workers", 0, "--device", "cpu", "--amp", "off"]
ALONE = ["--student", "mobilenet_v2", "--scratch", *SMALL]
PAIR = ["--teacher", "resnet18", *ALONE]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def run(capsys, *args, code=0):
    return call(capsys, *args, code=code, module=detection)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco") / "data"
    synthetic.write(folder, {"train": 9, "val": 3})
    return folder


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    """Checkpoint of a resnet18 detector trained on the same classes."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    options = ["--data-dir", folder, "--student", "resnet18", "--scratch", *SMALL, "--iterations", 2, "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        assert detection.main([str(option) for option in options]) == 0
    return out / "student.pth"


@pytest.fixture(scope="module")
def pair(folder, teacher):
    return ["--data-dir", folder, *PAIR, "--teacher-ckpt", teacher]


@pytest.fixture(scope="module")
def after_one_iteration(pair, tmp_path_factory):
    """A run stopped after the first of two iterations."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        argv = [*pair, "--iterations", 2, "--out", out, "--max-minutes", 1e-9]
        assert detection.main([str(arg) for arg in argv]) == 0
    return out


@pytest.fixture
def stopped(after_one_iteration, tmp_path):
    return shutil.copytree(after_one_iteration, tmp_path / "run")


def test_trains_and_distills_a_detector(tmp_path, capsys, monkeypatch, folder):
    """The README's commands; distillation finds the teacher trained by the first one."""
    monkeypatch.chdir(tmp_path)
    options = ["--data-dir", folder, "--scratch", *SMALL, "--iterations", 6, "--save-every", 2, "--eval-every", 4]
    printed = run(capsys, "--student", "resnet18", *options)
    assert "resnet18 saved to runs/data-resnet18-alone-scratch-6it-seed1-off/student.pth" in printed
    printed = run(capsys, "--teacher", "resnet18", "--student", "mobilenet_v2", *options, "--visualize", 2)
    assert "teacher: runs/data-resnet18-alone-scratch-6it-seed1-off/student.pth" in printed

    out = Path("runs/data-resnet18-mobilenet_v2-fcfd-scratch-6it-seed1-off")
    files = "best.pt boxes config.yaml last.pt log.csv result.json student.pth student_best.pth"
    assert sorted(path.name for path in out.iterdir()) == files.split()
    rows, result = read_log(out), json.loads((out / "result.json").read_text())
    assert [row["iteration"] for row in rows] == ["2", "4", "6"]
    for row in rows:
        terms = [float(row[term]) for term in TERMS]
        assert all(term > 0 for term in terms)
        assert float(row["loss"]) == pytest.approx(sum(terms), rel=1e-5)
        assert terms[0] == pytest.approx(sum(float(row[name]) for name in TASK_LOSSES), rel=1e-5)
        assert 0 <= float(row["waiting_percent"]) <= 100
    assert [bool(row["AP"]) for row in rows] == [False, True, True]
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["min_size"], config["rois"], config["temperature"], config["script"]) == ([96], 16, 1, "detection")
    assert (result["iteration"], result["iterations"], result["ranks"]) == (6, 6, 1)
    assert result["last"] == {name: None if not rows[2][name] else float(rows[2][name]) for name in METRICS} | {
        "iteration": 6
    }
    assert result["best"]["AP"] == max(float(row["AP"]) for row in rows if row["AP"])
    assert set(result["teacher"]) == set(METRICS)
    shared = torch.load(out / "student.pth", weights_only=True)
    assert shared["classes"] == list(synthetic.CLASSES)
    assert list(shared["model"]) == list(build_detector("mobilenet_v2", 4, [96], scratch=True).state_dict())
    assert len(list((out / "boxes").iterdir())) == 2

    # The default size is the training size. Neither train/ nor its annotations are needed.
    shutil.copytree(folder, "only-test", ignore=shutil.ignore_patterns("*train*"))
    evaluate = [
        "--data-dir",
        "only-test",
        "--student",
        "mobilenet_v2",
        "--device",
        "cpu",
        "--evaluate",
        out / "student.pth",
    ]
    printed = run(capsys, *evaluate)
    metrics = ", ".join(f"{name} {f'{float(rows[2][name]):.2f}' if rows[2][name] else '-'}" for name in METRICS)
    assert printed == f"mobilenet_v2: {metrics} on 3 test images of 96 pixels\n"


def test_script_runs_in_a_subprocess(tmp_path, folder):
    """With full-size ROI heads, a worker process, and another working directory."""
    options = ["--data-dir", folder, *ALONE[:3], "--min-size", 96, "--rois", 8, "--batch-size", 1, "--workers", 1]
    options += ["--test-subset", 2, "--iterations", 1, "--device", "cpu", "--out", "run"]
    assert "student.pth (last)" in run_script(tmp_path, *options, module=detection)
    shutil.rmtree(tmp_path / "run")


def test_run_resumed_mid_epoch_is_bitwise_identical(tmp_path, capsys, pair):
    options = [*pair, "--iterations", 6, "--save-every", 2, "--eval-every", 4]
    run(capsys, *options, "--out", tmp_path / "uninterrupted")
    out = tmp_path / "resumed"
    assert "stopped after 1 of 6" in run(capsys, *options, "--out", out, "--max-minutes", 1e-9)
    assert read_log(out) == []
    resume = ["--student", "mobilenet_v2", "--resume", "--out", out, "--device", "cpu"]
    assert "stopped after 2 of 6" in run(capsys, *resume, "--max-minutes", 1e-9)
    run(capsys, *resume, "--workers", 2)
    assert_bitwise_equal(tmp_path / "uninterrupted", out)
    columns = ("iteration", "lr", "loss", *TERMS, *TASK_LOSSES, *METRICS)
    expected, actual = (
        [[row[c] for c in columns] for row in read_log(run)] for run in (tmp_path / "uninterrupted", out)
    )
    assert actual == expected
    results = [json.loads((run / "result.json").read_text()) for run in (tmp_path / "uninterrupted", out)]
    assert [results[0][key] for key in ("best", "last", "teacher")] == [
        results[1][key] for key in ("best", "last", "teacher")
    ]


def test_resume_cannot_add_a_teacher(tmp_path, capsys, folder):
    options = ["--data-dir", folder, *ALONE, "--iterations", 2, "--out", tmp_path]
    run(capsys, *options, "--max-minutes", 1e-9)
    assert "--teacher is resnet18 but was None" in run(capsys, *options, "--resume", "--teacher", "resnet18", code=2)


def test_error_during_evaluation_loses_no_training(tmp_path, capsys, folder):
    images = tmp_path / "data"
    shutil.copytree(folder, images)
    bad = images / "val" / f"{1:012}.jpg"
    intact = bad.read_bytes()
    bad.write_bytes(intact[:100])
    options = ["--data-dir", images, *ALONE, "--iterations", 3, "--eval-every", 2, "--out"]
    assert "cannot read the image" in run(capsys, *options, tmp_path / "resumed", code=2)
    assert torch.load(tmp_path / "resumed" / "last.pt", weights_only=True)["iteration"] == 2
    assert "cannot read the image" in run(capsys, *options, tmp_path / "resumed", "--resume", code=2)
    bad.write_bytes(intact)
    run(capsys, *options, tmp_path / "resumed", "--resume")
    run(capsys, *options, tmp_path / "uninterrupted")
    columns = ("iteration", "lr", "loss", *METRICS)
    logs = [[[row[c] for c in columns] for row in read_log(tmp_path / name)] for name in ("resumed", "uninterrupted")]
    assert logs[0] == logs[1]
    assert [row[0] for row in logs[0]] == ["2", "3"]
    assert_bitwise_equal(tmp_path / "resumed", tmp_path / "uninterrupted")


def test_suggested_command_trains_the_missing_teacher(tmp_path, capsys, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    options = ["--data-dir", folder, *PAIR, "--iterations", 1, "--subset", 5, "--out", "my/run"]
    message = run(capsys, *options, code=2)
    command = message.rstrip("\n").partition("python detection.py ")[2].split()
    run(capsys, *command, *SMALL)
    assert "teacher: my/resnet18/student.pth" in run(capsys, *options)


def test_resume_uses_the_stored_settings(capsys, pair, stopped):
    resume = ["--student", "mobilenet_v2", "--out", stopped, "--resume", "--device", "cpu"]
    assert "--rois is 17 but was 16" in run(capsys, *resume, "--rois", 17, code=2)
    assert "--min-size is [128] but was [96]" in run(capsys, *resume, "--min-size", 128, code=2)
    assert "already holds a run" in run(capsys, *pair, "--iterations", 2, "--out", stopped, code=2)
    assert "iteration      2/2" in run(capsys, *resume, "--temperature", 1, "--visualize", 1)
    assert len(list((stopped / "boxes").iterdir())) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sums", [1.0]),
        ("sums", {"loss": "x"}),
        ("classes", None),
        ("teacher_accuracy", {}),
        ("log", [{"iteration": 1}]),
    ],
)
def test_damaged_last_pt_is_rejected_and_kept(capsys, stopped, key, value):
    state = torch.load(stopped / "last.pt", weights_only=True)
    state[key] = value
    if value is None:
        del state[key]
    torch.save(state, stopped / "last.pt")
    before = (stopped / "last.pt").read_bytes()
    message = run(capsys, "--student", "mobilenet_v2", "--out", stopped, "--resume", code=2)
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert (stopped / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        (["--method", "kd"], {"task", "kd"}),
        (["--method", "app"], {"task", "kd", "app"}),
        (["--w-func-prime", 0, "--w-app", 0], {"task", "kd", "func"}),
        (["--amp", "bf16"], set(TERMS)),
    ],
)
def test_settings_select_terms_and_bridges(tmp_path, capsys, pair, teacher, options, terms):
    run(capsys, *pair, *options, "--iterations", 1, "--out", tmp_path)
    row = read_log(tmp_path)[0]
    assert {term for term in TERMS if row[term]} == terms
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    needed = {"app", "func", "func_prime"} & terms
    assert {key.rpartition(".")[0].split(".")[0] for key in state["bridges"]} == (
        ({"s2t"} if needed & {"app", "func"} else set()) | ({"t2s"} if "func_prime" in terms else set())
    )
    assert any(key.startswith("s2t.pool") for key in state["bridges"]) == ("app" in terms)
    before = torch.load(teacher, weights_only=True)["model"]
    for key, value in state["teacher"].items():  # the teacher is frozen
        assert torch.equal(value, before[key]), key


def test_inherit_starts_from_the_teachers_fpn_and_heads(tmp_path, capsys, folder, teacher):
    options = ["--data-dir", folder, "--teacher", "resnet18", "--student", "resnet18", "--scratch", *SMALL]
    options += [
        "--teacher-ckpt",
        teacher,
        "--inherit",
        "--iterations",
        1,
        "--lr",
        1e-12,
        "--seed",
        2,
        "--out",
        tmp_path,
    ]
    run(capsys, *options)
    before = torch.load(teacher, weights_only=True)["model"]
    after = torch.load(tmp_path / "student.pth", weights_only=True)["model"]
    for key, value in after.items():
        if key.startswith(("rpn.", "roi_heads.", "backbone.fpn.")):
            torch.testing.assert_close(value, before[key], rtol=1e-6, atol=1e-9)
    assert not torch.allclose(after["backbone.body.conv1.weight"], before["backbone.body.conv1.weight"])


def test_students_start_from_imagenet_weights(tmp_path, capsys, folder):
    torch.manual_seed(5)
    published = models.resnet18()
    torch.save(published.state_dict(), tmp_path / "resnet18.pth")
    options = ["--data-dir", folder, "--student", "resnet18", *SMALL, "--iterations", 1, "--out", tmp_path / "run"]
    run(capsys, *options, "--backbone-ckpt", tmp_path / "resnet18.pth")
    after = torch.load(tmp_path / "run" / "student.pth", weights_only=True)["model"]
    for name, value in published.state_dict().items():
        if not name.startswith("fc.") and "num_batches" not in name:
            fixed = "bn" in name or "downsample.1" in name or name.startswith(("conv1", "layer1"))
            assert torch.equal(after[f"backbone.body.{name}"], value) == fixed, name


def test_two_steps_match_a_manual_loop(tmp_path, capsys, folder, teacher, pair):
    """The script against a loop with hand-written SGD; no setting has its default value."""
    weights = {"task": 0.9, "kd": 0.8, "app": 0.2, "func": 0.7, "func_prime": 0.6}
    options = [word for term, w in weights.items() for word in (f"--w-{term.replace('_', '-')}", w)]
    options += ["--iterations", 2, "--lr", 0.004, "--temperature", 3, "--seed", 5, "--min-size", 96, 128]
    run(capsys, *pair, *options, "--out", tmp_path)

    torch.manual_seed(5)
    student = build_detector("mobilenet_v2", 4, [96, 128], rois=16, scratch=True)
    net_t = build_detector("resnet18", 4, [96]).requires_grad_(False)
    bridges = level_bridges()
    net_t.load_state_dict(torch.load(teacher, weights_only=True)["model"])
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    norms = {
        p for net in (student, bridges) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    }
    for net in (student, net_t, bridges):
        net.to(memory_format=torch.channels_last)
    data = load_coco(folder)
    samples = load(BoxedImages(data.train, 5), batches(data.train, 2, 5, 0, 2), 0, torch.device("cpu"))
    velocity, losses = {}, []
    for step, batch in enumerate(samples):
        torch.manual_seed(derive_seed(5, step, "step", 0))
        images, targets = [image for image, _ in batch], [target for _, target in batch]
        flow = forward_detectors(net_t.eval(), student.train(), bridges.train(), images, targets)
        terms = detection_terms(flow, 3.0)
        loss = sum(w * terms[name] for name, w in weights.items())
        losses.append(loss.item())
        # With two iterations, the warm-up ends after the first, and the second is past a milestone.
        rate = 0.004 * [0.001, 0.1][step]
        trained = [p for net in (student, bridges) for p in net.parameters()]
        for p, g in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            g = g + (0 if p in norms else 1e-4) * p.detach()
            velocity[p] = 0.9 * velocity.get(p, 0) + g
            p.data -= rate * velocity[p]

    assert float(read_log(tmp_path)[0]["loss"]) == pytest.approx(sum(losses) / 2, rel=1e-4)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    for name, p in student.named_parameters():
        moved = (p.detach() - start[name]).norm()
        assert (state["student"][name] - p.detach()).norm() < 0.01 * moved + 1e-6, name


def test_batchnorm_parameters_have_no_weight_decay(tmp_path, capsys, folder, monkeypatch):
    """With zero gradients, only weight decay changes a parameter."""
    terms = detection.detection_terms
    monkeypatch.setattr(detection, "detection_terms", lambda *args: {k: 0 * v for k, v in terms(*args).items()})
    run(capsys, "--data-dir", folder, *ALONE, "--iterations", 2, "--lr", 1, "--out", tmp_path)
    after = torch.load(tmp_path / "student.pth", weights_only=True)["model"]
    torch.manual_seed(1)
    for name, layer in build_detector("mobilenet_v2", 4, [96], scratch=True).named_modules():
        for key, value in layer.named_parameters(recurse=False):
            same = torch.equal(after[f"{name}.{key}"], value)
            assert same == (isinstance(layer, nn.BatchNorm2d) or not value.any()), (name, key)


def test_teacher_stays_in_evaluation_mode():
    args = detection.parse_args(["--teacher", "resnet18", "--student", "mobilenet_v2", "--device", "cpu"])
    detectors = [build_detector(name, 2, [96], scratch=True) for name in (args.student, args.teacher)]
    step = detection.Step(args, *detectors).train()
    assert not any(layer.training for layer in step.teacher.modules())
    assert all(layer.training for net in (step.student, step.bridges) for layer in net.modules())


def test_log_rows_cover_the_iterations_since_the_last_row():
    state = {"config": {"device": "cpu", "batch_size": 4}, "log": [], "best": {}}
    for done, ap in ((10, 20.0), (20, 30.0), (30, None), (40, 25.0)):
        state |= {"iteration": done, "sums": {"steps": 2, "seconds": 5.0, "waited": 1.0, "loss": 6.0, "task": done}}
        add_row(state, 0.1, dict.fromkeys(METRICS, ap) if ap else {}, 3.0)
        assert state["sums"] == {}
    assert (state["best"]["iteration"], state["best"]["AP"]) == (20, 30.0)
    assert [(row["iteration"], row["task"], row["AP"]) for row in state["log"][1:3]] == [(20, 10, 30.0), (30, 15, None)]
    row = {key: value for key, value in state["log"][0].items() if key not in (*METRICS, *TASK_LOSSES, *TERMS)}
    times = {"seconds": 8.0, "images_per_s": 1.6, "waiting_percent": 20.0, "peak_memory_mb": ""}
    assert row == {"iteration": 10, "lr": 0.1, "loss": 3.0, **times}


def test_single_rank_needs_no_device_for_the_mean():
    assert all_reduce_mean({"loss": 1.5}, torch.device("mps")) == {"loss": 1.5}  # MPS has no float64


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ([], {0: 1e-5, 500: 0.005005, 999: 0.00999001, 1000: 0.01, 119_999: 0.01, 120_000: 1e-3, 160_000: 1e-4}),
        (["--iterations", 1800], {0: 1e-5, 5: 0.005005, 10: 0.01, 1199: 0.01, 1200: 1e-3, 1600: 1e-4}),
        # A longer run has the same warm-up.
        (["--iterations", 540_000], {500: 0.005005, 1000: 0.01, 359_999: 0.01, 360_000: 1e-3, 480_000: 1e-4}),
        (["--milestones", 5000, 5001], {1000: 0.01, 4999: 0.01, 5000: 1e-3, 5001: 1e-4, 179_999: 1e-4}),
    ],
)
def test_learning_rate(options, rates):
    args = detection.parse_args(["--student", "resnet18", "--device", "cpu", *map(str, options)])
    assert {i: detection.learning_rate(args, i) for i in rates} == pytest.approx(rates)


def test_run_from_before_milestones_resumes_with_the_published_ones(capsys, stopped):
    state = torch.load(stopped / "last.pt", weights_only=True)
    assert state["config"].pop("milestones") == [1, 2]
    torch.save(state, stopped / "last.pt")
    resume = ["--student", "mobilenet_v2", "--out", stopped, "--resume", "--device", "cpu"]
    assert "iteration      2/2" in run(capsys, *resume)
    assert float(read_log(stopped)[0]["lr"]) == pytest.approx(0.001)


def test_published_settings():
    args = detection.parse_args(["--teacher", "resnet101", "--student", "resnet18", "--device", "cuda"])
    assert [getattr(args, f"w_{term}") for term in TERMS] == [1] * 5
    assert (args.temperature, args.lr, args.iterations, args.batch_size, args.amp) == (1, 0.01, 180_000, 8, "fp16")
    assert (args.min_size, args.rois) == ([640, 672, 704, 736, 768, 800], 512)
    assert (args.save_every, args.eval_every) == (1000, 5000)
    assert (args.scratch, args.inherit) == (False, False)


def test_pictures_show_boxes(tmp_path, capsys, folder, teacher):
    """Three panels; in the first, the left edge of each box has its class color."""
    options = ["--data-dir", folder, "--student", "resnet18", "--teacher", "resnet18", "--teacher-ckpt", teacher]
    run(capsys, *options, *SMALL, "--evaluate", teacher, "--visualize", 3, "--out", tmp_path)
    data = load_coco(folder)
    edges = 0
    for i, (file, size) in enumerate(zip(data.test.files, data.test.sizes, strict=True)):
        picture = np.asarray(Image.open(tmp_path / "boxes" / f"{i}-{Path(os.fsdecode(file)).stem}.png"))
        scale = 320 / max(size)
        width, height = np.floor(size * scale + 1e-9).astype(int)
        assert picture.shape[:2] == (20 + height, 3 * width)
        rows = slice(data.test.first[i], data.test.first[i + 1])
        for box, label in zip(data.test.boxes[rows] * scale, data.test.labels[rows], strict=True):
            color = [int(COLORS[label][k : k + 2], 16) for k in (1, 3, 5)]
            edge = picture[20 + int(box[1] + box[3]) // 2, max(0, int(box[0]) - 2) : int(box[0]) + 3]
            edges += (edge == color).all(1).any()
        assert not np.array_equal(picture[:, :width], picture[:, width : 2 * width])
    assert edges >= 0.8 * len(data.test.boxes) > 0  # later boxes may cover some


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--student", "resnet20"], "did you mean resnet"),
        (["--student", "resnet34"], "unknown network 'resnet34'"),
        (["--student", "resnet18", "--teacher", "vgg13"], "unknown network 'vgg13'"),
        (["--student", "resnet18", "--inherit"], "--inherit requires --teacher"),
        (["--student", "resnet18", "--scratch", "--method", "kd"], "--method requires --teacher"),
        (["--student", "resnet18", "--scratch", "--backbone-ckpt", "x.pth"], "exclude each other"),
        (
            ["--student", "resnet18", "--scratch", "--data-dir", "missing"],
            "there is no missing/annotations/instances_train",
        ),
        (["--student", "resnet18", "--scratch", "--batch-size", 10], "there are only 9 training images"),
        (["--student", "resnet18", "--scratch", "--batch-size", 0], "--batch-size: 0"),
        (["--student", "resnet18", "--scratch", "--min-size", 64, 96], "--min-size: 64 must be between 96"),
        (["--student", "resnet18", "--scratch", "--rois", 0], "--rois: 0"),
        (["--student", "resnet18", "--scratch", "--iterations", 0], "--iterations: 0"),
        (["--student", "resnet18", "--scratch", "--eval-every", 0], "--eval-every: 0"),
        (
            ["--student", "resnet18", "--scratch", "--milestones", 20, 20, "--data-dir", "missing"],
            "--milestones must increase",
        ),
        (
            ["--student", "resnet18", "--scratch", "--milestones", 5, 180_000, "--data-dir", "missing"],
            "be below --iterations 180000",
        ),
        (["--student", "resnet18", "--scratch", "--milestones", 5], "--milestones: expected 2 arguments"),
        (["--student", "resnet18", "--scratch", "--visualize", -1], "--visualize: -1"),
        (["--student", "resnet18", "--scratch", "--subset", 10], "--subset 10"),
        ([*PAIR[:4], "--scratch", "--method", "kd", "--w-task", 0, "--w-kd", 0], "every loss term has weight 0"),
        (["--student", "resnet18", "--scratch", "--resume"], "nothing to resume"),
        (["--student", "resnet18", "--evaluate", "missing.pth"], "there is no checkpoint missing.pth"),
        (["--student", "resnet18", "--backbone-ckpt", "missing.pth"], "there is no checkpoint missing.pth"),
        (["--teacher", "resnet101", "--student", "resnet18", "--scratch"], "there is no trained resnet101 in runs"),
        (
            ["--teacher", "resnet50", "--student", "resnet18", "--scratch"],
            "for COCO's categories and lack 'star'",
        ),
        (["--teacher", "resnet18", "--student", "resnet18", "--scratch", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, monkeypatch, folder, options, expected):
    monkeypatch.chdir(tmp_path)
    assert_invalid(capsys, [*SMALL, "--data-dir", folder], options, expected, module=detection)


def test_error_for_a_teacher_with_other_classes_says_how_to_train_one(tmp_path, capsys, folder, teacher):
    other = write_coco(
        tmp_path / "other", [(1, "a.png", 96, 96)], [(1, 1, [9, 9, 40, 40]), (1, 2, [9, 9, 20, 20])]
    ).parents[1]
    write_coco(other, [(1, "a.png", 96, 96)], [(1, 1, [9, 9, 40, 40])], split="val")
    options = ["--data-dir", other, *PAIR[:4], "--scratch", *SMALL, "--teacher-ckpt", teacher, "--batch-size", 1]
    message = run(capsys, *options, "--out", tmp_path / "run", code=2)
    assert message == (
        f"error: {teacher} is a detector for other classes: it lacks 'cat'; give a "
        "--teacher-ckpt for these classes, or train one: "
        f"python detection.py --data-dir {other} --student resnet18 --iterations 180000 --scratch "
        f"--out {tmp_path / 'resnet18'}\n"
    )
    assert not (tmp_path / "run").exists()


def test_missing_and_damaged_images_are_reported(tmp_path, capsys, folder):
    images = tmp_path / "data"
    shutil.copytree(folder, images)
    bad = images / "val" / f"{1:012}.jpg"
    bad.write_bytes(b"\xff\xd8\xff")
    options = ["--data-dir", images, *ALONE, "--iterations", 1, "--out", tmp_path / "run"]
    message = run(capsys, *options, "--workers", 1, code=2)
    assert message.startswith(f"error: cannot read the image {bad} (")
    assert message.count("\n") == 1
    bad.unlink()
    assert f"the image {bad} of" in run(capsys, *options[:-1], tmp_path / "other", code=2)
    assert not (tmp_path / "other").exists()


def test_dropped_boxes_are_reported_once(tmp_path, capsys, folder):
    images = tmp_path / "data"
    shutil.copytree(folder, images)
    file = images / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"].append({"id": 999, "image_id": 0, "category_id": 1, "bbox": [1, 1, 0, 5]})
    file.write_text(json.dumps(content))
    printed = run(capsys, "--data-dir", images, *ALONE, "--iterations", 1, "--out", tmp_path / "run")
    assert printed.count("instances_train.json: boxes dropped (no area, or outside their image): 1\n") == 1


def test_diverging_run_exits_with_1_and_keeps_its_checkpoint(tmp_path, capsys, monkeypatch, folder):
    options = ["--data-dir", folder, *ALONE, "--iterations", 3, "--out", tmp_path / "run"]
    run(capsys, *options, "--max-minutes", 1e-9)
    monkeypatch.setattr(detection, "learning_rate", lambda args, iteration: 1e30)
    message = run(capsys, *options, "--resume", code=1)
    assert "non-finite loss in iteration 3" in message or "in iteration 2" in message
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["iteration"] == 1


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_killed_run_keeps_its_checkpoint(tmp_path, folder, signum, code):
    argv = [tmp_path, "train", "--data-dir", folder, *ALONE, "--iterations", 10**6, "--save-every", 1]
    argv += ["--out", tmp_path / "run"]
    with background_script(*argv, module=detection_ranks, wait_for="iteration      1/") as process:
        os.killpg(process.pid, signum)
        message = process.communicate(timeout=60)[1]
        assert process.returncode == code
    expected = "interrupted: saved iterations are kept; continue with --resume (without it if none were saved)\n"
    assert message == (expected if code > 0 else "")
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["iteration"] >= 1


def test_resume_rejects_a_run_of_another_script(tmp_path, capsys, folder):
    torch.save({"config": {"script": "imagenet"}, "epoch": 1}, tmp_path / "last.pt")
    message = run(capsys, "--data-dir", folder, *ALONE, "--resume", "--out", tmp_path, code=2)
    assert "holds a run of imagenet.py: resume it with that script" in message


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--amp", "bf16"], ["--amp", "off"]])
def test_on_gpu(tmp_path, capsys, pair, options):
    on_gpu = [word if word != "cpu" else "cuda" for word in pair]
    run(capsys, *on_gpu, *options, "--iterations", 4, "--save-every", 2, "--out", tmp_path)
    assert all(float(row["peak_memory_mb"]) > 0 for row in read_log(tmp_path))
