"""ResNet50 for 32x32 images: bottleneck blocks, a 3x3 stem without pooling, five stages."""

import torch.nn.functional as F
from torch import Tensor, nn

from .staged import StagedNet, init_fan_out, tap_last

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; post-ReLU input and output."""

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        c_out = width * EXPANSION
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def pre_relu(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pre_relu(x), inplace=True)


class ResNet50(StagedNet):
    """Stages: stem | 3 | 4 | 6 | 3 bottleneck blocks."""

    num_stages = 5
    post_relu = True

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        c_in = 64
        for i, (blocks, width, stride) in enumerate([(3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)], 1):
            group = [Bottleneck(c_in, width, stride)]
            c_in = width * EXPANSION
            group += [Bottleneck(c_in, width, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{i}", nn.Sequential(*group))
        self.linear = nn.Linear(c_in, num_classes)
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
        return self.linear
