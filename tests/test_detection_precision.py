"""Mixed precision in detectors: boxes are those of a float32 run, and backbones compute in half precision."""

import pytest
import torch
from tiny_detectors import shrink
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from common.detection.detectors import LEVELS, FrozenBatchNorm, build_detector
from common.detection.fcfd import forward_detectors

HALF = [torch.float16, torch.bfloat16]
IMAGE = torch.zeros(3, 800, 1333)
TARGET = {
    "boxes": torch.tensor([[1100.3, 610.2, 1108.7, 620.9], [3.3, 5.1, 700.7, 380.4], [600.6, 90.9, 1110.1, 600.7]]),
    "labels": torch.tensor([1, 2, 2]),
}


class FixedLevels(nn.Module):
    """A backbone whose levels are exact in every dtype, and largest at the coarsest. Returns autocast's dtype."""

    def __init__(self):
        super().__init__()
        strides = (4, 8, 16, 32, 64)
        shapes = [(1, 256, -(-800 // stride), -(-1344 // stride)) for stride in strides]
        self.levels = [torch.randint(-127, 128, shape) * s / 4096 for shape, s in zip(shapes, strides, strict=True)]

    def forward(self, images):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        return {name: level.to(dtype) for name, level in zip(LEVELS, self.levels, strict=True)}


@pytest.fixture
def net(monkeypatch):
    """A detector with the same outputs in every dtype: the RPN copies channels, the ROI head is constant."""
    shrink(monkeypatch)
    torch.manual_seed(0)
    net = build_detector("mobilenet_v2", 2, [800], rois=64)
    net.backbone, net.rpn.head.conv = FixedLevels(), nn.Identity()
    for layer, scale in ((net.rpn.head.cls_logits, 1), (net.rpn.head.bbox_pred, 1 / 16)):
        channels = torch.randperm(256)[: layer.out_channels]
        layer.weight.data = scale * nn.functional.one_hot(channels, 256)[:, :, None, None].float()
    for layer in (net.roi_heads.box_predictor.cls_score, net.roi_heads.box_predictor.bbox_pred):
        layer.weight.data.zero_()
        layer.bias.data = torch.randint(-64, 65, layer.bias.shape) / 64
    return net


def boxes_and_losses(net, dtype):
    """What a training step and a test compute from boxes."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.no_grad():
        batch, targets = net.train().transform([IMAGE], [TARGET])
        levels = net.backbone(batch.tensors)
        anchors = net.rpn.anchor_generator(batch, list(levels.values()))
        _, matched = net.rpn.assign_targets_to_anchors(anchors, targets)
        torch.manual_seed(1)
        proposals, _ = net.rpn(batch, levels, targets)
        sampled, _, labels, roi_targets = net.roi_heads.select_training_samples(list(proposals), targets)
        flow = forward_detectors(None, net, None, [IMAGE], [TARGET], ("task",))
        return {
            "anchors": anchors,
            "targets of the RPN": net.rpn.box_coder.encode(matched, anchors),
            "proposals": proposals,
            "proposals of the ROI head": sampled,
            "targets of the ROI head": roi_targets,
            "labels": labels,
            "losses": flow.task,
            "outputs": flow.student_output._asdict(),
            "detections": net.eval()([IMAGE]),
        }


def test_boxes_and_losses_are_those_of_a_float32_run(net):
    expected = boxes_and_losses(net, torch.float32)
    assert len(expected["proposals"][0]) == 1000
    assert len(expected["detections"][0]["boxes"]) > 20
    [labels], [targets] = expected["labels"], expected["targets of the ROI head"]
    assert targets[labels > 0].any(1).sum() > 5  # proposals other than the boxes of TARGET
    for dtype in HALF:
        torch.testing.assert_close(boxes_and_losses(net, dtype), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_frozen_batchnorm_in_half_precision(dtype):
    """Only the result is rounded; scale and bias stay float32."""
    torch.manual_seed(0)
    layer = FrozenBatchNorm(8)
    layer.weight, layer.bias, layer.running_mean = (torch.randn(8) for _ in range(3))
    layer.running_var = 0.1 + torch.rand(8)
    x = torch.randn(2, 8, 30, 40).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    weight, bias, mean, var = (
        value.double()[:, None, None] for value in (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    )
    scale = weight / (var + 1e-5).sqrt()
    rounding = torch.finfo(dtype).eps / 2
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(y.double(), (x.double() - mean) * scale + bias, rtol=1.001 * rounding, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), scale.expand(x.shape), rtol=1.001 * rounding, atol=1e-5)


def test_frozen_batchnorm_in_float32_is_torchvisions():
    torch.manual_seed(0)
    ours, theirs = FrozenBatchNorm(8), FrozenBatchNorm2d(8)
    ours.load_state_dict({key: torch.rand(8) for key in theirs.state_dict()})
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 30, 40)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_backbones_compute_in_half_precision(monkeypatch, name, dtype):
    shrink(monkeypatch)
    torch.manual_seed(0)
    backbone = build_detector(name, 2, [96]).eval().backbone
    dtypes = set()
    for layer in backbone.body.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda layer, inputs, output: dtypes.add(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        backbone(torch.randn(1, 3, 64, 96))
    assert dtypes == {dtype}
