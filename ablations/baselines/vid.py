"""VID (Ahn, Hu, Damianou, Lawrence, Dai: Variational Information Distillation for Knowledge Transfer, CVPR 2019)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablations.baselines.batch import Batch
from common.models import Taps


class VID(nn.Module):
    """The negative log-likelihood of the teacher's features given the student's, summed over the stages.

    Args:
        c_s, c_t: channels of the student's and the teacher's features.
    """

    def __init__(self, c_s: list[int], c_t: list[int]):
        super().__init__()
        self.stages = nn.ModuleList(Gaussian(a, b) for a, b in zip(c_s, c_t, strict=True))

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        stages = zip(self.stages, student.features, teacher.features, strict=True)
        return sum(stage(feature, target) for stage, feature, target in stages)


class Gaussian(nn.Module):
    """A Gaussian of the teacher's feature: mean mu(feature), and one variance per channel, softplus(alpha) + EPSILON.

    Attributes:
        alpha: [c_t], trained like all parameters. It starts at a variance of 5.
    """

    EPSILON = 1e-5

    def __init__(self, c_s: int, c_t: int):
        super().__init__()
        convs = [nn.Conv2d(a, c_t, 1, bias=False) for a in (c_s, c_t, c_t)]
        self.mu = nn.Sequential(convs[0], nn.ReLU(inplace=True), convs[1], nn.ReLU(inplace=True), convs[2])
        self.alpha = nn.Parameter(torch.full((c_t,), math.log(math.expm1(5 - self.EPSILON))))

    def forward(self, feature: Tensor, target: Tensor) -> Tensor:
        """Mean over all elements, without the constant log(2 pi) / 2; the larger map is average-pooled first."""
        feature, target = same_size(feature, target.detach().float())
        variance = (F.softplus(self.alpha) + self.EPSILON)[:, None, None]
        return 0.5 * ((self.mu(feature).float() - target) ** 2 / variance + variance.log()).mean()


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps [B, C, H, W] to the size of the smaller one."""
    size = min(a.shape[2:], b.shape[2:])
    return F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size)
