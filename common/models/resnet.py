"""CIFAR ResNets with basic blocks: resnet8 to resnet110, and the wider resnet8x4 and resnet32x4."""

import torch.nn.functional as F
from torch import Tensor, nn

from .staged import StagedNet, init_fan_out, tap_last


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; post-ReLU input and output."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def pre_relu(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return out + (x if self.downsample is None else self.downsample(x))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pre_relu(x), inplace=True)


def group(c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` basic blocks; the first changes channels and size: [B, c_in, H, W] -> [B, c_out, H/stride, W/stride]."""
    first = BasicBlock(c_in, c_out, stride)
    return nn.Sequential(first, *(BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)))


class ResNet(StagedNet):
    """Stages: stem | three groups of (depth - 2) / 6 basic blocks. `widths` are the channels of stem and groups."""

    num_stages = 4
    post_relu = True

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = group(widths[0], widths[1], blocks, stride=1)
        self.layer2 = group(widths[1], widths[2], blocks, stride=2)
        self.layer3 = group(widths[2], widths[3], blocks, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        init_fan_out(self)

    def stage(self, k: int, x: Tensor) -> Tensor:
        if k == 1:
            return F.relu(self.bn1(self.conv1(x)), inplace=True)
        return getattr(self, f"layer{k - 1}")(x)

    def tap(self, k: int, x: Tensor, pre_relu: bool) -> tuple[Tensor, Tensor]:
        *blocks, last = getattr(self, f"layer{k - 1}")
        return tap_last(last.pre_relu(nn.Sequential(*blocks)(x)), pre_relu)

    @property
    def classifier_layer(self) -> nn.Linear:
        return self.fc
