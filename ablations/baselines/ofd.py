"""OFD (Heo, Kim, Yun, Park, Kwak, Choi: A Comprehensive Overhaul of Feature Distillation, ICCV 2019).

Compares features before the ReLU: the teacher's through a margin ReLU, the student's through a 1x1 convolution.
"""

import math

import torch
from torch import Tensor, nn

from ablations.baselines.batch import Batch
from common.models import StagedNet, Taps
from common.models.imagenet_resnet import ImageNetResNet
from common.models.mobilenetv1 import STAGE_LAYERS, MobileNetV1
from common.models.staged import init_fan_out


class OFD(nn.Module):
    """Partial L2 of every stage; stage i of n weighs 1 / 2^(n - i).

    Summed over channels and positions and averaged over the batch, as the published weight of 1e-4 assumes.

    Args:
        c_s: channels of the student's features before the ReLU.
        norms: the teacher's BatchNorm layers before the ReLU at the end of each stage; not part of this module's state.
            The teacher may be loaded later.
    """

    def __init__(self, c_s: list[int], norms: list[nn.BatchNorm2d]):
        super().__init__()
        self.connectors = nn.ModuleList(connector(c, norm.num_features) for c, norm in zip(c_s, norms, strict=True))
        self.norms = list(norms)  # in a list, so that they are not registered

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        loss = 0
        for net, norm, feature, target in zip(
            self.connectors, self.norms, student.features, teacher.features, strict=True
        ):
            target = torch.maximum(target.detach().float(), margin(norm)[:, None, None])
            loss = loss / 2 + partial_l2(net(feature).float(), target)
        return loss


def connector(c_s: int, c_t: int) -> nn.Sequential:
    """A 1x1 convolution and a BatchNorm."""
    net = nn.Sequential(nn.Conv2d(c_s, c_t, 1, bias=False), nn.BatchNorm2d(c_t))
    init_fan_out(net)
    return net


def partial_l2(feature: Tensor, target: Tensor) -> Tensor:
    """Squared difference, 0 where feature <= target <= 0, summed and averaged over the batch. [B, C, H, W] each."""
    counted = (feature > target) | (target > 0)
    return torch.where(counted, (feature - target) ** 2, 0).sum() / len(feature)


@torch.no_grad()
def margin(norm: nn.BatchNorm2d) -> Tensor:
    """[C]: the expected negative response of each channel, E[x | x < 0] for x ~ N(beta, gamma^2).

    -3 |gamma| where P(x < 0) <= 0.001.
    """
    mean, std = norm.bias, norm.weight.abs()
    z = mean / std
    negative = torch.special.ndtr(-z)
    expected = mean - std * torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / negative
    return torch.where(negative > 0.001, expected, -3 * std)


def last_norms(net: StagedNet) -> list[nn.BatchNorm2d]:
    """The last BatchNorm before the ReLU at the end of each stage but the stem; of an ImageNet network.

    Raises:
        ValueError: another network.
    """
    if isinstance(net, MobileNetV1):
        return [net.model[end - 1][4] for k, (_, end) in STAGE_LAYERS.items() if k > 1]
    if not isinstance(net, ImageNetResNet):
        raise ValueError(f"OFD is for ImageNet networks, not for {type(net).__name__}")
    blocks = [getattr(net, f"layer{k}")[-1] for k in range(1, 5)]
    return [getattr(block, "bn3", block.bn2) for block in blocks]
