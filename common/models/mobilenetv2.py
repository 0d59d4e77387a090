"""MobileNetV2 for 32x32 images: width multiplier 0.5, expansion 6, stem stride 2."""

import torch.nn.functional as F
from torch import Tensor, nn

from .staged import StagedNet, init_classifier, init_fan_out

WIDTH = 0.5
# expansion, output channels at width 1, number of blocks, stride of the first block
SETTINGS = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
# the groups of blocks (indices into SETTINGS) in each stage
STAGE_GROUPS = {2: (0, 1), 3: (2,), 4: (3, 4), 5: (5, 6)}


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int):
        super().__init__()
        hidden = c_in * expansion
        self.residual = stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            nn.Conv2d(c_in, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(StagedNet):
    """Stages: conv1 | blocks 0-1 | 2 | 3-4 | 5-6 and conv2. Only stage 2 starts with a ReLU: blocks end without one."""

    num_stages = 5
    post_relu = False

    def __init__(self, num_classes: int):
        super().__init__()
        c_in = int(32 * WIDTH)
        self.conv1 = nn.Sequential(nn.Conv2d(3, c_in, 3, 2, 1, bias=False), nn.BatchNorm2d(c_in))
        self.blocks = nn.ModuleList()
        for expansion, channels, blocks, stride in SETTINGS:
            group = []
            for i in range(blocks):
                group.append(InvertedResidual(c_in, int(channels * WIDTH), stride if i == 0 else 1, expansion))
                c_in = int(channels * WIDTH)
            self.blocks.append(nn.Sequential(*group))
        self.conv2 = nn.Sequential(nn.Conv2d(c_in, 1280, 1, bias=False), nn.BatchNorm2d(1280))
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        init_fan_out(self)
        init_classifier(self.classifier[0])
        self.register_load_state_dict_pre_hook(_accept_bare_classifier)

    def stage(self, k: int, x: Tensor) -> Tensor:
        if k == 1:
            return self.conv1(x)
        return self.tap(k, x, pre_relu=True)[1]

    def tap(self, k: int, x: Tensor, pre_relu: bool) -> tuple[Tensor, Tensor]:
        """f^k is the last block's linear output, before conv2, whatever `pre_relu` is."""
        if k == 2:
            x = F.relu(x)
        for group in STAGE_GROUPS[k]:
            x = self.blocks[group](x)
        return x, self.conv2(x) if k == 5 else x

    @property
    def classifier_layer(self) -> nn.Sequential:
        return self.classifier


def _accept_bare_classifier(net, state_dict, prefix, *_) -> None:
    """Accept both names of the classifier found in checkpoints: `classifier.0.*` and `classifier.*`."""
    for name in ("weight", "bias"):
        if (old := f"{prefix}classifier.{name}") in state_dict:
            state_dict[f"{prefix}classifier.0.{name}"] = state_dict.pop(old)
