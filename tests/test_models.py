"""The networks match the parameter names and shapes of commonly shared CIFAR checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from common.models import NETWORKS, build, pool

LISTED = json.loads((Path(__file__).parent / "data" / "cifar_checkpoints.json").read_text())


def test_all_listed_networks_exist():
    assert list(NETWORKS) == list(LISTED)


@pytest.mark.parametrize("name", LISTED)
def test_network_matches_shared_checkpoints(name):
    net, listed = build(name, 100), LISTED[name]
    assert sum(p.numel() for p in net.parameters()) == listed["parameters"]
    # A checkpoint with the listed keys and shapes loads strictly.
    net.load_state_dict({key: torch.ones(shape) for key, shape in listed["state_dict"].items()})
    # Key order matters too: optimizer states refer to parameters by position.
    assert list(build(name, 100).state_dict()) == list(listed["state_dict"])


@pytest.mark.parametrize("name", LISTED)
def test_features_and_logits(name):
    net = build(name, 7).eval()
    images = torch.randn(2, 3, 32, 32)
    features = net.features(images)
    assert len(features) == net.num_stages
    for feature, shape in zip(features, LISTED[name].get("features", []), strict=False):
        assert list(feature.shape[1:]) == shape
    assert net.post_relu == (LISTED[name].get("features_are", "post-ReLU" if net.post_relu else "") == "post-ReLU")
    assert torch.equal(net(images), net.classify(features[-1]))
    assert net(images).shape == (2, 7)
    assert all(bool((feature >= 0).all()) == net.post_relu for feature in features)


@pytest.mark.parametrize("name", LISTED)
def test_stages_do_not_modify_their_input(name):
    """An in-place ReLU on a stage's input would change the feature that the losses compare."""
    net = build(name, 7).train()
    x = torch.randn(2, 3, 32, 32)
    for k in range(1, net.num_stages + 1):
        before = x.clone()
        y = net.stage(k, x)
        assert torch.equal(x, before), f"stage {k}"
        x = y
    before = x.clone()
    net.classify(x)
    assert torch.equal(x, before)


def test_classify_pools_after_the_relu():
    feature = torch.tensor([[[[-1.0, 3.0]]]])
    assert pool(feature).tolist() == [[1.5]]


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "vgg8", "MobileNetV2", "ResNet50"])
def test_convolutions_have_fan_out_initialization(name):
    torch.manual_seed(0)
    for layer in build(name, 100).modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 20_000:
            expected = (2 / (layer.kernel_size[0] ** 2 * layer.out_channels)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", ["vgg8", "MobileNetV2"])
def test_some_classifiers_start_with_small_weights(name):
    weight, bias = build(name, 100).classifier_layer.parameters()
    assert weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not bias.any()


def test_mobilenetv2_accepts_both_classifier_names():
    source, target = build("MobileNetV2", 10), build("MobileNetV2", 10)
    bare = {key.replace("classifier.0.", "classifier."): value for key, value in source.state_dict().items()}
    assert "classifier.weight" in bare
    target.load_state_dict(bare)
    assert torch.equal(target.classifier[0].weight, source.classifier[0].weight)


def test_error_for_an_unknown_network_lists_the_known_ones():
    with pytest.raises(ValueError, match="resnet32x4"):
        build("Resnet32_x4", 10)
