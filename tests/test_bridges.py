"""The bridges' layers, shapes and initialization."""

import pytest
import torch
from torch import nn

from common.bridges import LEAKY_SLOPE, bridge, build_bridges, feature_shapes
from common.models import build

LAYER_BY_SCALE = {
    1: (nn.Conv2d, (3, 3), (1, 1), False),
    0.5: (nn.Conv2d, (3, 3), (2, 2), True),
    2: (nn.ConvTranspose2d, (4, 4), (2, 2), True),
}


@pytest.mark.parametrize(
    ("teacher_name", "student_name"),
    [("resnet56", "resnet20"), ("wrn_40_2", "ShuffleV1"), ("vgg13", "MobileNetV2"), ("resnet32x4", "ShuffleV2")],
)
def test_bridge_outputs_have_the_other_networks_shapes(teacher_name, student_name):
    teacher, student = build(teacher_name, 10).eval(), build(student_name, 10).eval()
    bridges, last = build_bridges(teacher, student, 32).eval(), student.num_stages
    images = torch.randn(2, 3, 32, 32)
    features = {"s2t": student.features(images), "t2s": teacher.features(images)}
    targets = {"s2t": (teacher, features["t2s"]), "t2s": (student, features["s2t"])}
    assert list(bridges.s2t) == [str(k) for k in range(2, last + 1)]
    assert list(bridges.t2s) == [str(k) for k in range(2, last)]
    for direction, (target_net, target) in targets.items():
        for k, module in getattr(bridges, direction).items():
            source = features[direction][int(k) - 1]
            assert module(source).shape == target[int(k) - 1].shape
            kind, kernel, stride, bias = LAYER_BY_SCALE[target[int(k) - 1].shape[2] / source.shape[2]]
            assert isinstance(module[0], kind)
            assert (module[0].kernel_size, module[0].stride, module[0].bias is not None) == (kernel, stride, bias)
            assert isinstance(module[1], nn.BatchNorm2d)
            assert len(module) == (3 if target_net.post_relu else 2)
            if target_net.post_relu:
                assert module[2].negative_slope == LEAKY_SLOPE == 0.1


def test_positions_limit_only_the_t2s_bridges():
    bridges = build_bridges(build("resnet14", 10), build("resnet8", 10), 32, [4])
    assert (list(bridges.s2t), list(bridges.t2s)) == (["2", "3", "4"], ["4"])


def test_convolutions_have_kaiming_fan_out_initialization():
    torch.manual_seed(0)
    conv = bridge(torch.Size((32, 8, 8)), torch.Size((128, 8, 8)), True)[0]
    assert conv.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.03)


def test_feature_shapes_leaves_the_network_unchanged():
    net = build("resnet8", 10).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert feature_shapes(net, 32)[4] == (64, 8, 8)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_mismatched_networks_are_rejected():
    with pytest.raises(ValueError, match="5 stages and the student 4"):
        build_bridges(build("vgg13", 10), build("resnet8", 10), 32)
    with pytest.raises(ValueError, match="32x32 to 8x8"):
        bridge(torch.Size((8, 32, 32)), torch.Size((8, 8, 8)), True)
