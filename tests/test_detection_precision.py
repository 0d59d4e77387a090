"""Mixed precision in detectors: boxes are those of a float32 run."""

import pytest
import torch
from tiny_detectors import shrink
from torch import nn

from common.detection.detectors import LEVELS, build_detector
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
