"""The features that other methods compare, against the published networks' shapes and a stage-by-stage forward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.models import StagedNet, build, build_imagenet

# Channels and sizes of the features, then the length of the pooled vector, as in the published networks.
CIFAR = {
    "resnet8x4": ([64, 128, 256], [32, 16, 8], 256),
    "resnet20": ([16, 32, 64], [32, 16, 8], 64),
    "wrn_16_2": ([32, 64, 128], [32, 16, 8], 128),
    "wrn_40_1": ([16, 32, 64], [32, 16, 8], 64),
    "vgg8": ([128, 256, 512, 512], [16, 8, 4, 4], 512),
    "ResNet50": ([256, 512, 1024, 2048], [32, 16, 8, 4], 2048),
    "MobileNetV2": ([12, 16, 48, 160], [16, 8, 4, 2], 1280),
    "ShuffleV1": ([240, 480, 960], [16, 8, 4], 960),
    "ShuffleV2": ([116, 232, 464], [16, 8, 4], 1024),
}
IMAGENET = {
    "resnet18": ([64, 128, 256, 512], [56, 28, 14, 7], 512),
    "resnet50": ([256, 512, 1024, 2048], [56, 28, 14, 7], 2048),
    "MobileNetV1": ([128, 256, 512, 1024], [56, 28, 14, 7], 1024),
}


def random_norms(net):
    """`net` with random BatchNorm weights and statistics, so that wrong layers are noticed."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value in (layer.weight, layer.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
            for value in (layer.bias, layer.running_mean):
                nn.init.normal_(value)
    return net


@pytest.mark.parametrize("name", [*CIFAR, *IMAGENET])
def test_shapes_are_the_published_ones(name):
    channels, sizes, pooled = (CIFAR | IMAGENET)[name]
    with torch.device("meta"):
        net = build(name, 7) if name in CIFAR else build_imagenet(name, 7)
        images = torch.empty(2, 3, *(2 * [32 if name in CIFAR else 224]))
    for pre_relu in (False, True):
        taps = net.taps(images, pre_relu)
        assert [f.shape for f in taps.features] == [(2, c, s, s) for c, s in zip(channels, sizes, strict=True)]
        assert taps.pooled.shape == (2, pooled)
        assert taps.last.shape[:2] == (2, pooled)
        assert taps.logits.shape == (2, 7)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*CIFAR, "imagenet-resnet18", "imagenet-resnet50", "imagenet-MobileNetV1"])
def test_taps_agree_with_the_forward_pass(name, training):
    torch.manual_seed(0)
    imagenet = name.startswith("imagenet-")
    net = build_imagenet(name.removeprefix("imagenet-"), 7) if imagenet else build(name, 7)
    net, images = random_norms(net).train(training), torch.randn(4, 3, 64 if imagenet else 32, 64 if imagenet else 32)
    start = {key: value.clone() for key, value in net.state_dict().items()}
    expected, logits = net.features(images), net(images)
    statistics = {key: value.clone() for key, value in net.state_dict().items()}

    after, before = [], []
    for pre_relu, found in ((False, after), (True, before)):
        net.load_state_dict(start)
        taps = net.taps(images, pre_relu)
        found += taps.features
        assert torch.equal(taps.logits, logits)
        assert torch.equal(taps.last, expected[-1].relu())
        assert torch.equal(taps.pooled, F.adaptive_avg_pool2d(expected[-1].relu(), 1).flatten(1))
        if training:  # a forward pass updates the running statistics once; the two above did so twice
            net(images)
            assert all(torch.equal(value, statistics[key]) for key, value in net.state_dict().items())

    for k, (a, b) in enumerate(zip(after, before, strict=True), 2):
        if name.startswith("wrn"):  # raw, and normalized by the next BatchNorm
            raw = getattr(net, f"block{k - 1}")(expected[k - 2])
            bn = net.bn1 if k == 4 else getattr(net, f"block{k}").layer[0].bn1
            assert torch.equal(a, raw)
            mean, var = (raw.mean((0, 2, 3)), raw.var((0, 2, 3), unbiased=False)) if training else (None, None)
            mean, var = (mean, var) if training else (bn.running_mean, bn.running_var)
            scale = (bn.weight / (var + bn.eps).sqrt())[:, None, None]
            torch.testing.assert_close(b, (raw - mean[:, None, None]) * scale + bn.bias[:, None, None])
        elif name == "MobileNetV2":  # linear
            assert torch.equal(a, b)
            assert (a < 0).any()
            assert torch.equal(expected[k - 1], net.conv2(a) if k == 5 else a)
        else:
            assert torch.equal(a, b.relu())
            assert (b < 0).any()
            stage = {"ShuffleV2": 4}.get(name)  # whose final convolution follows f
            own = expected[k - 1].relu()
            assert torch.equal(own, net.bn2(net.conv2(a)).relu() if k == stage else a)


def test_features_before_a_relu_inside_a_stage_are_refused():
    class Net(StagedNet):
        num_stages, post_relu, classifier_layer = 2, True, nn.Identity()

        def stage(self, k, x):
            return x.relu()

    with pytest.raises(ValueError, match="Net does not provide"):
        Net().taps(torch.ones(1, 3, 2, 2), pre_relu=True)
    assert len(Net().taps(torch.ones(1, 3, 2, 2)).features) == 1
