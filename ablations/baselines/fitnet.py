"""FitNet (Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, ICLR 2015).

The paper trains up to the hint first and the whole student afterwards. The published figures are of one stage: the hint
loss is added to the task loss throughout.
"""

import torch
from torch import Tensor, nn

from ablations.baselines.batch import Batch
from common.losses import l2
from common.models import Taps

HINT = 1  # index in Taps.features: f^3, the output of stage 3


class FitNet(nn.Module):
    """L2 between the student's f^3 after a regressor and the teacher's (Eq. 3, but without 1/2 and averaged).

    Args:
        shape_s, shape_t: (C, H, W) of f^3.

    Raises:
        ValueError: the student's feature is smaller than the teacher's, but not half its size.
    """

    def __init__(self, shape_s: torch.Size, shape_t: torch.Size):
        super().__init__()
        c_t = shape_t[0]
        self.regressor = nn.Sequential(regressor(shape_s, shape_t), nn.BatchNorm2d(c_t), nn.ReLU(inplace=True))

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        return l2(self.regressor(student.features[HINT]), teacher.features[HINT])


def regressor(shape_s: torch.Size, shape_t: torch.Size) -> nn.Module:
    """A convolution from features of `shape_s` (C, H, W) to `shape_t`."""
    (c_s, h_s, w_s), (c_t, h_t, w_t) = shape_s, shape_t
    if h_s == 2 * h_t:
        return nn.Conv2d(c_s, c_t, 3, 2, 1)
    if 2 * h_s == h_t:
        return nn.ConvTranspose2d(c_s, c_t, 4, 2, 1)
    if h_s >= h_t:
        return nn.Conv2d(c_s, c_t, (1 + h_s - h_t, 1 + w_s - w_t))
    raise ValueError(f"FitNet has no regressor from {h_s}x{w_s} to {h_t}x{w_t} pixels: choose other networks")
