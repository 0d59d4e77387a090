"""ReviewKD (Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021).

Each student feature is fused with the output of the deeper levels before it is compared with the teacher's, so a
shallow teacher stage supervises all deeper student stages as well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablations.baselines.batch import Batch
from common.losses import l2
from common.models import Taps


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
        """Output [B, c_out, *size] to compare with the teacher's, and residual [B, c_mid, *size] for the next level.

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
        x = resize(x, size)
        return self.conv2(x), x


class ReviewKD(nn.Module):
    """Fuses the levels from the deepest to the shallowest, and computes the loss of their outputs.

    The levels are the features and, as the deepest, the pooled vector as a 1x1 map. Its BatchNorm needs at least two
    images per batch.

    Args:
        c_s, c_t: channels of the student's and the teacher's levels, the shallowest first.
        c_mid: channels of the residuals, at most those of the student's deepest level.
    """

    def __init__(self, c_s: list[int], c_t: list[int], c_mid: int = 512):
        super().__init__()
        c_mid = min(c_mid, c_s[-1])
        fuse = [True] * (len(c_s) - 1) + [False]
        self.fusions = nn.ModuleList(ABF(a, c_mid, b, f) for a, b, f in zip(c_s, c_t, fuse, strict=True))

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        return self.review(self.levels(student), self.levels(teacher))

    def review(self, levels_s: list[Tensor], levels_t: list[Tensor]) -> Tensor:
        """Sum of `hcl` over the levels [B, C, H, W], the shallowest first; the teacher's are detached."""
        residual, loss = None, 0
        for fusion, feature, target in reversed(list(zip(self.fusions, levels_s, levels_t, strict=True))):
            output, residual = fusion(feature, residual, target.shape[2:])
            loss = loss + hcl(output, target)
        return loss

    @staticmethod
    def levels(taps: Taps) -> list[Tensor]:
        """[f^2, ..., f^N, the pooled vector as [B, C, 1, 1]]."""
        return [*taps.features, taps.pooled[:, :, None, None]]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps [B, C, H, W] by nearest-neighbor interpolation."""
    return x if x.shape[2:] == size else F.interpolate(x, size)


def hcl(feature: Tensor, target: Tensor) -> Tensor:
    """Hierarchical context loss (Sec. 3.3) of maps [B, C, H, W]; `target` is detached.

    Weighted mean of the L2 at full size and after average pooling to 4x4, 2x2 and 1x1, omitting sizes not below H. The
    weights are 1, 1/2, 1/4, 1/8, in the order of the remaining terms.
    """
    feature, target = feature.float(), target.float()
    losses = [l2(feature, target)]
    for size in (4, 2, 1):
        if size < feature.shape[2]:
            losses.append(l2(F.adaptive_avg_pool2d(feature, size), F.adaptive_avg_pool2d(target, size)))
    return sum(loss / 2**i for i, loss in enumerate(losses)) / sum(1 / 2**i for i in range(len(losses)))
