"""ablations/baseline_detection.py: FGFI against a naive implementation, the training step, and complete runs."""

import json
import math
from functools import partial
from itertools import pairwise

import pytest
import running
import torch
import torch.nn.functional as F
import yaml
from running import assert_bitwise_equal, assert_invalid, read_log
from tiny_detectors import shrink
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator

import detection
from ablations import baseline_detection
from ablations.baselines.fgfi import FGFI, imitation_masks
from common.detection import synthetic
from common.detection.detectors import LEVELS, build_detector
from common.detection.fcfd import TASK_LOSSES

pytest.importorskip("pycocotools")

METHODS = ("reviewkd", "fgfi")
SMALL = ["--scratch", "--min-size", 96, "--rois", 16, "--batch-size", 2, "--workers", 0, "--device", "cpu"]
SMALL += ["--amp", "off"]
PAIR = ["--teacher", "resnet18", "--student", "mobilenet_v2"]

run = partial(running.call, module=baseline_detection)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


# ---------------------------------------------------------------------------------------------- FGFI

IMAGE = (64, 96)  # padded height and width
SIZES = [(16, 24), (4, 6)]  # of two levels
SHAPES = [(s / math.sqrt(ratio), s * math.sqrt(ratio)) for ratio in (0.5, 1.0, 2.0) for s in (1,)]
SIDES = (12, 48)
BOXES = [[(3.3, 5.9, 17.2, 16.4), (20.7, 9.1, 71.3, 55.8)], [], [(0.4, 40.2, 30.9, 63.7)]]  # of three images


def naive_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def naive_masks(boxes):
    """For each level a nested list [B][H][W]."""
    overlaps = {}  # (level, row, column) of a position -> the IoUs of its anchors with each box
    masks = [[[[0] * width for _ in range(height)] for _ in boxes] for height, width in SIZES]
    for image, own in enumerate(boxes):
        for level, (height, width) in enumerate(SIZES):
            for row in range(height):
                for column in range(width):
                    x, y = column * IMAGE[1] // width, row * IMAGE[0] // height
                    anchors = []
                    for w, h in SHAPES:  # torchvision rounds the corners of the anchor at the origin
                        w, h = round(SIDES[level] * w / 2), round(SIDES[level] * h / 2)
                        anchors.append((x - w, y - h, x + w, y + h))
                    overlaps[level, row, column] = [[naive_iou(box, anchor) for anchor in anchors] for box in own]
        for k in range(len(own)):
            largest = max(max(iou[k]) for iou in overlaps.values())
            for (level, row, column), iou in overlaps.items():
                if max(iou[k]) > 0.5 * largest:
                    masks[level][image][row][column] = 1
    return masks


def naive_loss(method, levels_s, levels_t, masks):
    total, positions = 0.0, 0
    for (conv, _), feature, target, mask in zip(method.adaptations, levels_s, levels_t, masks, strict=True):
        adapted = F.conv2d(feature.double(), conv.weight.double(), conv.bias.double(), padding=1)
        for image, rows in enumerate(mask):
            for i, row in enumerate(rows):
                for j, inside in enumerate(row):
                    positions += inside
                    for c in range(feature.shape[1]):
                        value = max(adapted[image, c, i, j].item(), 0)
                        total += inside * (value - target[image, c, i, j].item()) ** 2
    return total / (2 * positions) if positions else 0.0


def masks_of(boxes):
    """`imitation_masks` with torchvision's anchors."""
    generator = AnchorGenerator(tuple((side,) for side in SIDES), ((0.5, 1.0, 2.0),) * 2)
    images = ImageList(torch.zeros(len(boxes), 3, *IMAGE), [IMAGE] * len(boxes))
    anchors = generator(images, [torch.zeros(len(boxes), 1, *size) for size in SIZES])
    return imitation_masks(anchors, [torch.tensor(own).reshape(-1, 4) for own in boxes], SIZES)


def test_fgfi_masks_match_a_naive_implementation():
    masks, expected = masks_of(BOXES), naive_masks(BOXES)
    assert [mask.tolist() for mask in masks] == expected
    ones = [mask.sum((1, 2)).tolist() for mask in masks]
    assert ones[0][1] == ones[1][1] == 0  # no box
    assert all(0 < level[0] < mask[0].numel() for level, mask in zip(ones, masks, strict=True))
    # Alone, a large box is imitated at the coarse level only: the largest IoU is over all levels.
    fine, coarse = masks_of([BOXES[0][1:]])
    assert not fine.any()
    assert coarse.any()


def test_fgfi_threshold_is_exclusive():
    anchors = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 4], [0, 0, 8, 5]])  # IoU with the box: 1, 0.5, 0.625
    [mask] = imitation_masks([anchors], [anchors[:1]], [(1, 3)])
    assert mask.tolist() == [[[1, 0, 1]]]


@pytest.mark.parametrize("boxes", [BOXES, [[], []]])
def test_fgfi_loss_matches_a_naive_implementation(boxes):
    torch.manual_seed(0)
    method = FGFI(2, 4)
    for conv, _ in method.adaptations:
        nn.init.normal_(conv.weight)
        nn.init.normal_(conv.bias)
    levels_s, levels_t = ([torch.randn(len(boxes), 4, *size) for size in SIZES] for _ in range(2))
    for level in (*levels_s, *levels_t):
        level.requires_grad_()
    loss = method(levels_s, levels_t, masks_of(boxes))
    assert loss.item() == pytest.approx(naive_loss(method, levels_s, levels_t, naive_masks(boxes)), rel=1e-5)
    loss.backward()  # without boxes too, as DistributedDataParallel requires
    assert all(p.grad.isfinite().all() for p in (*method.parameters(), *levels_s))
    assert all(level.grad is None for level in levels_t)


def test_fgfi_starts_near_zero():
    torch.manual_seed(0)
    for conv, _ in FGFI(1, 32).adaptations:
        assert conv.bias.abs().max() == 0
        assert conv.weight.abs().max() <= 2e-4
        assert conv.weight.detach().std() == pytest.approx(
            0.88e-4, rel=0.05
        )  # of a normal distribution cut at two sigma


# ---------------------------------------------------------------------------------------------- the step


def make_step(method):
    """The Step of detectors for 3 classes, and two images with targets; the teacher's parameters are not frozen."""
    argv = [*PAIR, "--method", method, "--device", "cpu", "--amp", "off"]
    torch.manual_seed(0)
    student = build_detector("mobilenet_v2", 3, [96], rois=16, scratch=True)
    teacher = build_detector("resnet18", 3, [96], scratch=True)
    step = baseline_detection.Step(baseline_detection.parse_args(argv), student, teacher).train()
    images = [torch.rand(3, 60, 80), torch.rand(3, 60, 90)]
    targets = [
        {"boxes": torch.tensor([[5.0, 8.0, 60.0, 55.0], [50.0, 20.0, 70.0, 40.0]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return step, images, targets


@pytest.mark.parametrize("method", METHODS)
def test_methods_compare_the_five_levels(method, monkeypatch):
    """From the shallowest; FGFI's masks are of the resized boxes."""
    step, images, targets = make_step(method)
    calls = []
    name = "forward" if method == "fgfi" else "review"
    monkeypatch.setattr(step.method, name, lambda *args: calls.append(args) or torch.tensor(1.25))
    assert step(images, targets)["distill"] == 1.25
    [(levels_s, levels_t, *masks)] = calls
    batch, resized = step.student.transform(images, targets)
    expected_s, expected_t = step.student.backbone(batch.tensors), step.teacher.backbone(batch.tensors)
    assert [level.shape[2] for level in levels_s] == [24, 12, 6, 3, 2]
    assert not any(level.requires_grad for level in levels_t)
    for i, level in enumerate(LEVELS):
        assert torch.equal(levels_s[i], expected_s[level]), level
        assert torch.equal(levels_t[i], expected_t[level]), level
    if method == "fgfi":
        anchors = step.student.rpn.anchor_generator(batch, levels_s)
        boxes = [target["boxes"] * 96 / 60 for target in targets]
        assert torch.allclose(boxes[0], resized[0]["boxes"])
        expected = imitation_masks(anchors, boxes, [level.shape[2:] for level in levels_s])
        assert all(torch.equal(*pair) for pair in zip(*masks, expected, strict=True))
        assert sum(mask[0].sum() for mask in expected) > 0


@pytest.mark.parametrize("method", METHODS)
def test_task_is_torchvisions(method):
    step, images, targets = make_step(method)
    torch.manual_seed(3)
    values = step(images, targets)
    torch.manual_seed(3)
    expected = step.student(images, targets)
    assert expected.keys() == set(TASK_LOSSES)
    assert {name: values[name].item() for name in TASK_LOSSES} == {
        name: pytest.approx(loss.item()) for name, loss in expected.items()
    }
    assert values["task"].item() == pytest.approx(sum(expected.values()).item())
    assert not any(values[name].requires_grad for name in TASK_LOSSES)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_student_and_the_method_only(method):
    step, images, targets = make_step(method)
    step(images, targets)["distill"].backward()
    with_gradient = {name for name, p in step.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.partition(".")[0] for name in with_gradient} == {"student", "method"}
    student = {name.split(".")[1] for name in with_gradient if name.startswith("student")}
    assert student == {"backbone"}
    assert all(p.grad is not None for p in step.method.parameters())  # as DistributedDataParallel requires
    if method == "reviewkd":
        assert {name.removeprefix("method.") for name in with_gradient if name.startswith("method.")} == {
            name for name, _ in step.method.named_parameters()
        }
    assert not any(layer.training for layer in step.teacher.modules())
    assert all(layer.training for layer in step.student.modules())


@pytest.mark.parametrize(("method", "lr"), [("reviewkd", 0.1), ("fgfi", 1e-4)])
def test_training_lowers_the_methods_loss(method, lr):
    step, images, targets = make_step(method)
    optimizer = torch.optim.SGD([*step.student.parameters(), *step.method.parameters()], lr)
    losses = []
    for _ in range(6):
        loss = step(images, targets)["distill"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(b < a for a, b in pairwise(losses))


def test_fgfi_starts_after_400_iterations():
    def weights(iterations, *at):
        argv = [*PAIR, "--method", "fgfi", "--device", "cpu", "--iterations", str(iterations)]
        step = baseline_detection.Step(baseline_detection.parse_args(argv), nn.Module(), nn.Module())
        assert all(step.weights(i)["task"] == 1 for i in at)
        return [step.weights(i)["distill"] for i in at]

    assert weights(180_000, 0, 399, 400, 179_999) == [0, 0, 0.01, 0.01]
    assert weights(540_000, 399, 400) == [0, 0.01]
    assert weights(9000, 19, 20) == [0, 0.01]  # only a shorter run scales it


def test_published_weights():
    def default(method, teacher, student):
        argv = ["--method", method, "--teacher", teacher, "--student", student, "--device", "cpu"]
        return baseline_detection.parse_args(argv).weight

    assert default("reviewkd", "resnet101", "resnet18") == 1.2
    assert default("reviewkd", "resnet101", "resnet50") == 1.0
    assert default("reviewkd", "resnet50", "mobilenet_v2") == 2.0
    assert default("reviewkd", "resnet50", "resnet18") == 1.0
    assert default("fgfi", "resnet101", "resnet50") == 0.01


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a run on a dataset of nine images, with a teacher trained for two iterations."""
    folder = tmp_path_factory.mktemp("coco")
    synthetic.write(folder / "data", {"train": 9, "val": 2})
    alone = ["--data-dir", folder / "data", "--student", "resnet18", *SMALL, "--iterations", 2, "--out", folder / "run"]
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        assert detection.main([str(option) for option in alone]) == 0
    return ["--data-dir", folder / "data", *PAIR, *SMALL, "--teacher-ckpt", folder / "run" / "student.pth"]


def test_run_resumes_bitwise(tmp_path, capsys, options):
    method, weight = "reviewkd", 1  # its BatchNorm statistics must be restored too
    argv = [*options, "--method", method, "--iterations", 2]
    printed = run(capsys, *argv, "--out", tmp_path / "uninterrupted")
    assert printed.startswith(f"setting not published: {method}'s weight for resnet18-mobilenet_v2; using {weight}\n")
    out = tmp_path / "resumed"
    assert "stopped after 1 of 2" in run(capsys, *argv, "--out", out, "--max-minutes", 1e-9)
    resume = [*PAIR, "--resume", "--device", "cpu", "--out", out]
    message = running.call(capsys, *resume, code=2, module=detection)
    assert "ablations/baseline_detection.py: resume it with that script" in message
    assert "--method is fgfi but was reviewkd" in run(capsys, *resume, "--method", "fgfi", code=2)
    assert "--weight is 2.0 but was 1" in run(capsys, *resume, "--method", method, "--weight", 2, code=2)
    run(capsys, *resume, "--method", method)
    assert_bitwise_equal(tmp_path / "uninterrupted", out)

    rows = read_log(out)
    assert rows == [
        row | {name: mine[name] for name in ("seconds", "images_per_s", "waiting_percent")}
        for row, mine in zip(read_log(tmp_path / "uninterrupted"), rows, strict=True)
    ]
    for row in rows:
        task, distill = float(row["task"]), float(row["distill"])
        assert float(row["loss"]) == pytest.approx(task + weight * distill, rel=1e-5)
        assert task == pytest.approx(sum(float(row[name]) for name in TASK_LOSSES), rel=1e-5)
    state = torch.load(out / "last.pt", weights_only=True)
    assert {"student", "teacher", "method", "optimizer", "scaler"} <= state.keys()
    trained = [*build_detector("mobilenet_v2", 4, [96], scratch=True).parameters()]
    trained += [value for key, value in state["method"].items() if key.endswith(("weight", "bias"))]
    assert sum(len(group["params"]) for group in state["optimizer"]["param_groups"]) == len(trained)
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["script"], config["method"], config["weight"]) == ("baseline_detection", method, weight)
    last = json.loads((out / "result.json").read_text())["last"]
    assert f"AP {last['AP']:.2f}" in running.call(
        capsys, *options[:2], *PAIR[2:], "--device", "cpu", "--evaluate", out / "student.pth", module=detection
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--method", "fcfd", *PAIR], "--method: invalid choice: 'fcfd'"),
        (PAIR, "the following arguments are required: --method"),
        (["--method", "fgfi", "--student", "resnet18"], "--teacher is required"),
        (["--method", "fgfi", *PAIR, "--weight", -1], "--weight: -1"),
        (["--method", "fgfi", *PAIR, "--w-kd", 1], "unrecognized arguments: --w-kd 1"),
        (["--method", "fgfi", *PAIR, "--backbone-ckpt", "x.pth"], "exclude each other"),
        (["--method", "fgfi", *PAIR, "--milestones", 9, 8], "--milestones must increase"),
        (["--method", "fgfi", *PAIR], "there is no missing/annotations/instances_train"),
        (["--method", "fgfi", *PAIR, "--resume"], "nothing to resume"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    defaults = ["--data-dir", "missing", *SMALL[1:]]
    assert_invalid(capsys, defaults, [*given, "--scratch"], expected, module=baseline_detection)
