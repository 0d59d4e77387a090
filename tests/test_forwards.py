"""The forward pass of every network family against a functional implementation on its state dict.

Keys and shapes do not show where ReLUs, shortcuts, and shuffles are: a checkpoint could load and still be wrong.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.models import build

relu = torch.relu


class Weights:
    def __init__(self, net):
        self.w = {key: value.double() for key, value in net.state_dict().items()}

    def conv(self, x, name, stride=1, padding=None, groups=1):
        weight = self.w[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.w.get(f"{name}.bias"), stride, padding, 1, groups)

    def bn(self, x, name):
        mean, var, weight, bias = (
            self.w[f"{name}.{s}"][:, None, None] for s in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def has(self, name):
        return any(key.startswith(name) for key in self.w)


def spatial_mean(x):
    return x.mean((2, 3))


def resnet(n, x, blocks):
    out = [relu(n.bn(n.conv(x, "conv1"), "bn1"))]
    for layer in (1, 2, 3):
        x = out[-1]
        for i in range(blocks):
            b, stride = f"layer{layer}.{i}", 2 if layer > 1 and i == 0 else 1
            y = relu(n.bn(n.conv(x, f"{b}.conv1", stride), f"{b}.bn1"))
            y = n.bn(n.conv(y, f"{b}.conv2"), f"{b}.bn2")
            if n.has(f"{b}.downsample"):
                x = n.bn(n.conv(x, f"{b}.downsample.0", stride), f"{b}.downsample.1")
            x = relu(x + y)
        out.append(x)
    return out, n.linear(spatial_mean(x), "fc")


def wrn(n, x, blocks):
    out = [n.conv(x, "conv1")]
    for group in (1, 2, 3):
        x = out[-1]
        for i in range(blocks):
            b, stride = f"block{group}.layer.{i}", 2 if group > 1 and i == 0 else 1
            a = relu(n.bn(x, f"{b}.bn1"))
            y = n.conv(relu(n.bn(n.conv(a, f"{b}.conv1", stride), f"{b}.bn2")), f"{b}.conv2")
            x = y + (n.conv(a, f"{b}.convShortcut", stride) if n.has(f"{b}.convShortcut") else x)
        out.append(x)
    out[-1] = n.bn(out[-1], "bn1")
    return out, n.linear(spatial_mean(relu(out[-1])), "fc")


def vgg(n, x, convs):
    out = []
    for stage in range(5):
        for i in range(convs):
            x = n.bn(n.conv(x, f"block{stage}.{3 * i}"), f"block{stage}.{3 * i + 1}")
            if i + 1 < convs:
                x = relu(x)
        out.append(x)
        x = relu(x)
        if stage < 3:
            x = F.max_pool2d(x, 2, 2)
    return out, n.linear(spatial_mean(x), "classifier")


def resnet50(n, x, _):
    out = [relu(n.bn(n.conv(x, "conv1"), "bn1"))]
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        x = out[-1]
        for i in range(blocks):
            b, stride = f"layer{layer}.{i}", 2 if layer > 1 and i == 0 else 1
            y = relu(n.bn(n.conv(x, f"{b}.conv1"), f"{b}.bn1"))
            y = relu(n.bn(n.conv(y, f"{b}.conv2", stride), f"{b}.bn2"))
            y = n.bn(n.conv(y, f"{b}.conv3"), f"{b}.bn3")
            if n.has(f"{b}.shortcut"):
                x = n.bn(n.conv(x, f"{b}.shortcut.0", stride), f"{b}.shortcut.1")
            x = relu(x + y)
        out.append(x)
    return out, n.linear(spatial_mean(x), "linear")


def mobilenetv2(n, x, _):
    out = [n.bn(n.conv(x, "conv1.0", 2), "conv1.1")]
    x = relu(out[0])
    for group, (blocks, stride) in enumerate([(1, 1), (2, 1), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1)]):
        for i in range(blocks):
            c, first = f"blocks.{group}.{i}.conv", i == 0
            y = relu(n.bn(n.conv(x, f"{c}.0"), f"{c}.1"))
            y = relu(n.bn(n.conv(y, f"{c}.3", stride if first else 1, groups=y.shape[1]), f"{c}.4"))
            y = n.bn(n.conv(y, f"{c}.6"), f"{c}.7")
            x = y if first else x + y
        if group in (1, 2, 4):
            out.append(x)
    out.append(n.bn(n.conv(x, "conv2.0"), "conv2.1"))
    return out, n.linear(spatial_mean(relu(out[-1])), "classifier.0")


def shuffle(x, groups):
    order = [g * (x.shape[1] // groups) + i for i in range(x.shape[1] // groups) for g in range(groups)]
    return x[:, order]


def shufflev1(n, x, _):
    out = [n.bn(n.conv(x, "conv1"), "bn1")]
    for layer, blocks in enumerate((4, 8, 4), 1):
        x = out[-1]
        for i in range(blocks):
            b, x = f"layer{layer}.{i}", relu(x)
            groups = 1 if layer == 1 and i == 0 else 3
            y = shuffle(relu(n.bn(n.conv(x, f"{b}.conv1", groups=groups), f"{b}.bn1")), groups)
            y = relu(n.bn(n.conv(y, f"{b}.conv2", 2 if i == 0 else 1, groups=y.shape[1]), f"{b}.bn2"))
            y = n.bn(n.conv(y, f"{b}.conv3", groups=3), f"{b}.bn3")
            x = torch.cat([y, F.avg_pool2d(x, 3, stride=2, padding=1)], 1) if i == 0 else y + x
        out.append(x)
    return out, n.linear(spatial_mean(relu(x)), "linear")


def shufflev2(n, x, _):
    out = [relu(n.bn(n.conv(x, "conv1"), "bn1"))]
    for layer, blocks in enumerate((3, 7, 3), 1):
        b, x = f"layer{layer}.0", out[-1]
        left = n.bn(n.conv(x, f"{b}.conv1", 2, groups=x.shape[1]), f"{b}.bn1")
        left = relu(n.bn(n.conv(left, f"{b}.conv2"), f"{b}.bn2"))
        right = relu(n.bn(n.conv(x, f"{b}.conv3"), f"{b}.bn3"))
        right = n.bn(n.conv(right, f"{b}.conv4", 2, groups=right.shape[1]), f"{b}.bn4")
        right = relu(n.bn(n.conv(right, f"{b}.conv5"), f"{b}.bn5"))
        x = shuffle(torch.cat([left, right], 1), 2)
        for i in range(1, blocks + 1):
            b, half = f"layer{layer}.{i}", x.shape[1] // 2
            y = relu(n.bn(n.conv(x[:, half:], f"{b}.conv1"), f"{b}.bn1"))
            y = n.bn(n.conv(y, f"{b}.conv2", groups=half), f"{b}.bn2")
            y = relu(n.bn(n.conv(y, f"{b}.conv3"), f"{b}.bn3"))
            x = shuffle(torch.cat([x[:, :half], y], 1), 2)
        out.append(x)
    out[-1] = relu(n.bn(n.conv(out[-1], "conv2"), "bn2"))
    return out, n.linear(spatial_mean(out[-1]), "linear")


@pytest.mark.parametrize(
    ("name", "forward", "size"),
    [
        ("resnet14", resnet, 2),
        ("resnet8x4", resnet, 1),
        ("wrn_16_1", wrn, 2),
        ("wrn_16_2", wrn, 2),
        ("vgg8", vgg, 1),
        ("vgg13", vgg, 2),
        ("ResNet50", resnet50, None),
        ("MobileNetV2", mobilenetv2, None),
        ("ShuffleV1", shufflev1, None),
        ("ShuffleV2", shufflev2, None),
    ],
)
def test_forward_matches_a_functional_implementation(name, forward, size):
    torch.manual_seed(0)
    net = build(name, 10).eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):  # random, with variances near 1 to keep the scale
            for tensor, low, high in (("weight", 0.7, 1.3), ("bias", -0.4, 0.4), ("running_mean", -0.3, 0.3)):
                nn.init.uniform_(getattr(layer, tensor), low, high)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features, logits = forward(Weights(net), images.double(), size)
        for k, (ours, theirs) in enumerate(zip(net.features(images), features, strict=True), 1):
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max(), f"F^{k}"
        assert (net(images) - logits).abs().max() < 1e-4 * logits.abs().max()
