"""ShuffleNet V1 (3 groups, widths 240/480/960) and V2 (1x) for 32x32 images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .staged import StagedNet, tap_last


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel shuffle across `groups` groups: [B, C, H, W] -> [B, C, H, W]."""
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class ShuffleV1Block(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; post-ReLU input, pre-ReLU output.

    With stride 2 the average-pooled input is concatenated instead of added.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int):
        super().__init__()
        self.stride = stride
        width = c_out // 4
        self.first_groups = 1 if c_in == 24 else groups
        self.conv1 = nn.Conv2d(c_in, width, 1, groups=self.first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(shuffle(out, self.first_groups))), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1)
        return out + x


class ShuffleV1(StagedNet):
    """Stages: 1x1 stem | 4 | 8 | 4 blocks. Features are pre-ReLU."""

    num_stages = 4
    post_relu = False

    def __init__(self, num_classes: int, groups: int = 3, widths: tuple[int, ...] = (240, 480, 960)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        c_in = 24
        for i, (width, blocks) in enumerate(zip(widths, (4, 8, 4), strict=True), 1):
            # The first block concatenates its pooled input, so its convolutions output only the remaining channels.
            group = [ShuffleV1Block(c_in, width - c_in, 2, groups)]
            group += [ShuffleV1Block(width, width, 1, groups) for _ in range(blocks - 1)]
            setattr(self, f"layer{i}", nn.Sequential(*group))
            c_in = width
        self.linear = nn.Linear(c_in, num_classes)

    def stage(self, k: int, x: Tensor) -> Tensor:
        if k == 1:
            return self.bn1(self.conv1(x))
        for block in getattr(self, f"layer{k - 1}"):
            x = block(F.relu(x))
        return x

    @property
    def classifier_layer(self) -> nn.Linear:
        return self.linear


class ShuffleV2Block(nn.Module):
    """Passes half of the channels through and transforms the other half; post-ReLU input and output."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor, pre_relu: bool = False) -> Tensor:
        kept, x = x.chunk(2, dim=1)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn2(self.conv2(x))
        x = self.bn3(self.conv3(x))
        return shuffle(torch.cat([kept, x if pre_relu else F.relu(x, inplace=True)], 1), 2)


class ShuffleV2Down(nn.Module):
    """Two branches of stride 2, each on all input channels; post-ReLU input and output."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        half = c_out // 2
        self.conv1 = nn.Conv2d(c_in, c_in, 3, 2, 1, groups=c_in, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv2 = nn.Conv2d(c_in, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(c_in, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))), inplace=True)
        return shuffle(torch.cat([left, right], 1), 2)


class ShuffleV2(StagedNet):
    """Stages: 1x1 stem | 1 + 3 | 1 + 7 | 1 + 3 blocks. The final 1x1 convolution belongs to stage 4."""

    num_stages = 4
    post_relu = True

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (116, 232, 464)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        c_in = 24
        for i, (width, blocks) in enumerate(zip(widths, (3, 7, 3), strict=True), 1):
            group = [ShuffleV2Down(c_in, width), *(ShuffleV2Block(width) for _ in range(blocks))]
            setattr(self, f"layer{i}", nn.Sequential(*group))
            c_in = width
        self.conv2 = nn.Conv2d(c_in, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def stage(self, k: int, x: Tensor) -> Tensor:
        if k == 1:
            return F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = getattr(self, f"layer{k - 1}")(x)
        return self._last(x) if k == 4 else x

    def tap(self, k: int, x: Tensor, pre_relu: bool) -> tuple[Tensor, Tensor]:
        """f^k is the output of the last block, before the final convolution."""
        *blocks, last = getattr(self, f"layer{k - 1}")
        feature, x = tap_last(last(nn.Sequential(*blocks)(x), pre_relu=True), pre_relu)
        return feature, self._last(x) if k == 4 else x

    def _last(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)), inplace=True)

    @property
    def classifier_layer(self) -> nn.Linear:
        return self.linear
