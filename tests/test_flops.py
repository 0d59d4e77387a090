"""ablations/flops.py: App. H's formula against the counted FLOPs of whole training steps."""

from itertools import combinations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ablations import flops
from common.bridges import build_bridges
from common.fcfd import EQ_9, fcfd_terms, forward_paths
from common.models import build
from common.multipath_bn import track_paths
from common.paths import candidate_paths

B, SIZE = 2, 16


class Pair:
    """Networks and bridges as in training, the formula's inputs, and the counted FLOPs of a step."""

    def __init__(self, pair, counter):
        self.teacher, self.student = (build(name, 10) for name in pair.split("-"))
        self.bridges = build_bridges(self.teacher, self.student, SIZE)
        self.forward = flops.forward_flops(self.teacher, self.student, self.bridges, SIZE)
        self.candidates = candidate_paths(self.student.num_stages)
        self.teacher.requires_grad_(False)
        for net in (self.teacher, self.student):
            track_paths(net, {path.k for path in self.candidates})
        for net in (self.teacher, self.student, self.bridges):
            net.train()
        self.images, self.labels = torch.randn(B, 3, SIZE, SIZE), torch.arange(B)
        self.counter = counter

    def count(self, terms, paths=()):
        """FLOPs per image."""
        with self.counter() as counter:
            flow = forward_paths(self.teacher, self.student, self.bridges, self.images, paths, "app" in terms)
            sum(fcfd_terms(flow, self.labels, 4.0, terms).values()).backward()
        return counter.get_total_flops() / B


def pytorch_counter():
    return FlopCounterMode(display=False)


# Equal-size, strided and transposed bridges; grouped and depthwise convolutions in the student, then in the teacher.
@pytest.mark.parametrize(
    ("pair", "counter", "path_counts"),
    [
        ("resnet14-resnet8", pytorch_counter, range(5)),
        ("resnet8x4-ShuffleV1", flops.counter, (0, 1, 4)),
        ("ShuffleV2-wrn_16_1", flops.counter, (0, 1)),
    ],
)
def test_formula_matches_the_count(pair, counter, path_counts):
    pair = Pair(pair, counter)
    kd = pair.count(("task", "kd"))
    assert kd == flops.kd_step(pair.forward)
    assert pair.count(("task", "kd", "app")) - kd == flops.app_extra(pair.forward)
    for n in path_counts:
        steps = [pair.count(EQ_9, paths) for paths in combinations(pair.candidates, n)]
        extra = flops.fcfd_extra(pair.forward, pair.candidates, n)
        assert sum(steps) / len(steps) - kd == pytest.approx(extra, rel=1e-12)


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "MobileNetV2"])
def test_student_formula_matches_the_count(name):
    net, images = build(name, 10), torch.randn(B, 3, SIZE, SIZE)
    forward = flops.forward_flops(net, net, build_bridges(net, net, SIZE), SIZE)
    net.train()
    with flops.counter() as counter:
        net(images).sum().backward()
    assert counter.get_total_flops() == B * flops.alone_step(forward)


def test_forward_flops_match_a_hand_count():
    """resnet8 at 32x32: a stem and three blocks of two 3x3 convolutions; blocks two and three have 1x1 shortcuts."""
    with torch.device("meta"):
        teacher, student = build("resnet14", 100), build("resnet8", 100)
        bridges = build_bridges(teacher, student, 32)
    f = flops.forward_flops(teacher, student, bridges, 32)
    stem = 2 * 32**2 * 9 * 3 * 16
    first = 2 * 32**2 * 9 * (16 * 16 + 16 * 16)
    second = 2 * 16**2 * (9 * (16 * 32 + 32 * 32) + 16 * 32)
    third = 2 * 8**2 * (9 * (32 * 64 + 64 * 64) + 32 * 64)
    assert f.student == {1: stem, 2: first, 3: second, 4: third}
    assert (f.first, f.classifier_s, f.classifier_t) == (stem, 2 * 64 * 100, 2 * 64 * 100)
    assert f.teacher[2] == 2 * first
    assert f.s2t == {2: first // 2, 3: 2 * 16**2 * 9 * 32 * 32, 4: 2 * 8**2 * 9 * 64 * 64}
    assert f.t2s == {k: f.s2t[k] for k in (2, 3)}


@pytest.mark.parametrize(
    ("layer", "c_in"),
    [
        (nn.Conv2d(6, 12, 3, 2, 1), 6),
        (nn.ConvTranspose2d(6, 12, 4, 2, 1), 6),
        (nn.Conv2d(6, 12, 3, 1, 1, groups=3), 6),
        (nn.Conv2d(6, 6, 3, 2, 1, groups=6), 6),
    ],
)
@pytest.mark.parametrize(("input_grad", "weight_grad"), [(True, True), (True, False), (False, True)])
def test_counter_counts_each_gradient(layer, c_in, input_grad, weight_grad):
    """Each gradient of a layer costs as much as its forward pass, also with groups."""
    x = torch.randn(B, c_in, 8, 8, requires_grad=input_grad)
    layer.requires_grad_(weight_grad)
    with torch.no_grad():
        positions = x if isinstance(layer, nn.ConvTranspose2d) else layer(x)  # one entry per kernel position
    once = 2 * B * positions[0, 0].numel() * layer.weight.numel()
    with flops.counter() as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == once * (1 + input_grad + weight_grad)
