"""BatchNorm with shared affine parameters and separate statistics for each path."""

import copy

import pytest
import torch
from torch import nn

from common.models import build
from common.multipath_bn import STATISTICS, on_path, plain_state_dict, track_paths


def batch_norm():
    net = nn.Sequential(nn.BatchNorm2d(3))
    track_paths(net, [2, 3])
    return net.train()


def test_statistics_start_at_zero_and_only_those_of_the_path_are_updated():
    net, x = batch_norm(), torch.randn(8, 3, 4, 4) * 2 + 1
    assert not any(getattr(net[0].path2, name).any() for name in STATISTICS)
    with on_path(net, 2):
        net(x)
    torch.testing.assert_close(net[0].path2.running_mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(net[0].path2.running_var, 0.1 * x.var((0, 2, 3)))
    assert net[0].path2.num_batches_tracked == 1
    assert not net[0].running_mean.any()
    assert (net[0].running_var == 1).all()
    assert not any(getattr(net[0].path3, name).any() for name in STATISTICS)


def test_evaluation_uses_the_statistics_of_the_path():
    net, x = batch_norm(), torch.randn(8, 3, 4, 4)
    with torch.no_grad():
        net[0].path3.running_mean.fill_(2.0)
        net[0].path3.running_var.fill_(4.0)
    net.eval()
    with on_path(net, 3):
        torch.testing.assert_close(net(x), (x - 2) / (4 + net[0].eps) ** 0.5)
    torch.testing.assert_close(net(x), x / (1 + net[0].eps) ** 0.5)


def test_weight_and_bias_are_shared():
    net, x = batch_norm(), torch.randn(8, 3, 4, 4)
    with torch.no_grad():
        net[0].weight.fill_(3.0)
        net[0].bias.fill_(5.0)
    with on_path(net, 2):
        torch.testing.assert_close(net(x).mean(), torch.tensor(5.0))
    assert {name for name, _ in net.named_parameters()} == {"0.weight", "0.bias"}


def test_buffers_keep_their_identity_and_are_restored_after_an_error():
    """Buffers are updated in place, as captured CUDA graphs require."""
    net = batch_norm()
    own, other = net[0].running_mean, net[0].path2.running_mean
    with pytest.raises(ValueError, match="expected 4D"), on_path(net, 2):
        net(torch.randn(8, 3))
    with on_path(net, 2):
        assert net[0].running_mean is other
        net(torch.randn(8, 3, 4, 4))
    assert net[0].running_mean is own
    assert net[0].path2.running_mean is other


@pytest.mark.parametrize(("mode", "override"), [(False, True), (True, False)])
def test_training_overrides_the_mode_and_restores_it(mode, override):
    net, x = batch_norm().train(mode), torch.randn(8, 3, 4, 4)
    with on_path(net, 2, training=override):
        net(x)
    assert net[0].path2.num_batches_tracked == int(override)
    assert net[0].training == mode


def test_untracked_path_raises():
    with pytest.raises(KeyError, match=r"track_paths\(net, \[4\]\)"), on_path(batch_norm(), 4):
        pass


def test_plain_state_dict_loads_into_a_plain_network():
    net, plain = build("resnet8", 10), build("resnet8", 10)
    expected = copy.deepcopy(net.state_dict())
    track_paths(net, [2, 3])
    assert len(net.state_dict()) > len(expected)
    plain.load_state_dict(plain_state_dict(net))
    assert all(torch.equal(value, expected[key]) for key, value in plain.state_dict().items())
    assert list(plain_state_dict(net)) == list(expected)
