"""AT (Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017), activation-based."""

import torch.nn.functional as F
from torch import Tensor, nn

from ablations.baselines.batch import Batch
from common.losses import l2
from common.models import Taps


class AT(nn.Module):
    """L2 between the attention maps of both networks (Sec. 3.1), summed over the stages; nothing to train.

    Averaged over batch and positions, as the published weight of 1000 assumes. The maps of both networks have equal
    sizes.
    """

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        return sum(attention_loss(a, b) for a, b in zip(student.features, teacher.features, strict=True))


def attention_loss(feature: Tensor, target: Tensor) -> Tensor:
    """Features [B, C, H, W]; C may differ. `target` is detached."""
    return l2(attention(feature.float()), attention(target.float()))


def attention(feature: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W], of unit length: the mean of the squared activations over the channels."""
    return F.normalize(feature.square().mean(1).flatten(1))
