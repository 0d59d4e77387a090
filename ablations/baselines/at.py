"""AT (Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017)."""

import torch.nn.functional as F
from torch import Tensor, nn

from ablations.baselines.batch import Batch
from common.losses import l2
from common.models import Taps


class AT(nn.Module):
    """L2 between the attention maps of both networks (Eq. 2), summed over the stages; nothing to train.

    The mean over batch and positions, which the published weight of 1000 is for. If the sizes of a stage differ, the
    larger map is average-pooled.
    """

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        return sum(attention_loss(a, b) for a, b in zip(student.features, teacher.features, strict=True))


def attention_loss(feature: Tensor, target: Tensor) -> Tensor:
    """Features [B, C, H, W], C may differ; `target` is detached."""
    size = min(feature.shape[2:], target.shape[2:])
    a, b = (attention(F.adaptive_avg_pool2d(x.float(), size)) for x in (feature, target))
    return l2(a, b)


def attention(feature: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W], of unit length: the mean of the squared activations over the channels."""
    return F.normalize(feature.square().mean(1).flatten(1))
