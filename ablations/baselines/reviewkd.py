"""ReviewKD (Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021).

Each student feature is fused with the output of the deeper levels before it is compared with the teacher's, so a
shallow teacher stage supervises all deeper student stages as well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.losses import l2
from common.models import pool


class ABF(nn.Module):
    """Attention-based fusion (Sec. 3.3) of a feature with the residual of the deeper levels."""

    def __init__(self, c_in: int, c_mid: int, c_out: int, fuse: bool):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(c_in, c_mid, 1, bias=False), nn.BatchNorm2d(c_mid))
        self.attention = nn.Sequential(nn.Conv2d(2 * c_mid, 2, 1), nn.Sigmoid()) if fuse else None
        self.conv2 = nn.Sequential(nn.Conv2d(c_mid, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out))
        for conv in (self.conv1[0], self.conv2[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Output [B, c_out, *size] to compare with the teacher's, and residual [B, c_mid, H, W] for the next level.

        Args:
            feature: the student's, [B, c_in, H, W].
            deeper: residual [B, c_mid, H', W'] of the next deeper level; None at the deepest.
            size: height and width of the teacher's feature; the map is resized to it before the last convolution.
        """
        x = self.conv1(feature)
        if self.attention is not None:
            deeper = resize(deeper, x.shape[2:])
            maps = self.attention(torch.cat([x, deeper], 1))
            x = x * maps[:, :1] + deeper * maps[:, 1:]
        return self.conv2(resize(x, size)), x


class ReviewKD(nn.Module):
    """Fuses the levels from the deepest to the shallowest, and computes the loss of their outputs.

    The levels are F^2..F^N and, as the deepest, the pooled F^N as a 1x1 map, whose BatchNorm needs at least two images
    per batch. The authors' code takes features before the ReLU where a network provides them; here they are as the
    networks return them (`StagedNet.post_relu`), and F^N of MobileNetV2 and ShuffleV2 includes the final 1x1
    convolution. The loss needs a warm-up: its weight rises linearly over 20 epochs.

    Args:
        shapes_s, shapes_t: k -> (C, H, W) of the student's and the teacher's F^k (common.bridges.feature_shapes).

    Raises:
        ValueError: the networks have different numbers of stages.
    """

    def __init__(self, shapes_s: dict[int, torch.Size], shapes_t: dict[int, torch.Size]):
        super().__init__()
        if len(shapes_s) != len(shapes_t):
            raise ValueError(
                f"the teacher has {len(shapes_t)} stages and the student {len(shapes_s)}: choose two networks whose "
                "stages correspond"
            )
        last = len(shapes_s)
        c_s, c_t = ([*(shapes[k][0] for k in range(2, last + 1)), shapes[last][0]] for shapes in (shapes_s, shapes_t))
        c_mid = min(512, c_s[-1])
        fuse = [True] * (last - 1) + [False]
        self.fusions = nn.ModuleList(ABF(*level) for level in zip(c_s, [c_mid] * last, c_t, fuse, strict=True))

    def forward(self, features_s: list[Tensor], features_t: list[Tensor]) -> Tensor:
        """Sum of `hcl` over the levels, given F^1..F^N of each network; the teacher's are detached."""
        levels = zip(self.fusions, self.levels(features_s), self.levels(features_t), strict=True)
        residual, loss = None, 0
        for fusion, feature, target in reversed(list(levels)):
            output, residual = fusion(feature, residual, target.shape[2:])
            loss = loss + hcl(output, target)
        return loss

    @staticmethod
    def levels(features: list[Tensor]) -> list[Tensor]:
        """[F^1, ..., F^N] -> [F^2, ..., F^N, pooled F^N as [B, C, 1, 1]]."""
        return [*features[1:], pool(features[-1])[:, :, None, None]]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps [B, C, H, W] by nearest-neighbor interpolation."""
    return x if x.shape[2:] == size else F.interpolate(x, size)


def hcl(feature: Tensor, target: Tensor) -> Tensor:
    """Hierarchical context loss (Sec. 3.3) of maps [B, C, H, W]; `target` is detached.

    Weighted mean of the L2 at full size and after average pooling to l x l, for each l of 4, 2, 1 below H; the weights
    are 1, 1/2, 1/4, 1/8 in this order.
    """
    feature, target = feature.float(), target.float()
    losses = [l2(feature, target)]
    for size in (4, 2, 1):
        if size < feature.shape[2]:
            losses.append(l2(F.adaptive_avg_pool2d(feature, size), F.adaptive_avg_pool2d(target, size)))
    return sum(loss / 2**i for i, loss in enumerate(losses)) / sum(1 / 2**i for i in range(len(losses)))
