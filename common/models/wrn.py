"""Wide ResNets with pre-activation blocks: wrn_16_1, wrn_16_2, wrn_40_1 and wrn_40_2."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from .staged import StagedNet, init_fan_out


class PreActBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a shortcut; pre-BatchNorm input and output."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        # If the width changes, the shortcut takes the activated input; otherwise it is x itself.
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class WideResNet(StagedNet):
    """Stages: stem | three groups of (depth - 4) / 6 blocks. The final BatchNorm belongs to stage 4."""

    num_stages = 4
    post_relu = False

    def __init__(self, depth: int, widen: int, num_classes: int):
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.block1 = self._group(widths[0], widths[1], blocks, stride=1)
        self.block2 = self._group(widths[1], widths[2], blocks, stride=2)
        self.block3 = self._group(widths[2], widths[3], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        init_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    @staticmethod
    def _group(c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
        first = PreActBlock(c_in, c_out, stride)
        layer = nn.Sequential(first, *(PreActBlock(c_out, c_out, 1) for _ in range(blocks - 1)))
        return nn.Sequential(OrderedDict(layer=layer))

    def stage(self, k: int, x: Tensor) -> Tensor:
        if k == 1:
            return self.conv1(x)
        x = getattr(self, f"block{k - 1}")(x)
        return self.bn1(x) if k == 4 else x

    def tap(self, k: int, x: Tensor, pre_relu: bool) -> tuple[Tensor, Tensor]:
        """f^k is the output of the last block; with `pre_relu`, after the BatchNorm that follows it."""
        x = getattr(self, f"block{k - 1}")(x)
        bn = self.bn1 if k == 4 else getattr(self, f"block{k}").layer[0].bn1
        return (normalize(x, bn) if pre_relu else x), self.bn1(x) if k == 4 else x

    @property
    def classifier_layer(self) -> nn.Linear:
        return self.fc


def normalize(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """The output of a BatchNorm, without updating its running statistics."""
    if not bn.training:
        return bn(x)
    return F.batch_norm(x, None, None, bn.weight, bn.bias, training=True, eps=bn.eps)
