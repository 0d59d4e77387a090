"""AT (Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017), activation-based."""

import torch.nn.functional as F
from torch import Tensor, nn

from ablations.baselines.batch import Batch
from ablations.baselines.vid import same_size
from common.losses import l2
from common.models import Taps


class AT(nn.Module):
    """L2 between the attention maps of both networks (Sec. 3.1), summed over the stages; nothing to train.

    The mean over batch and positions, which the published weight of 1000 is for. Stages of equal index are compared,
    which have equal sizes in the published pairs; mdistiller compares MobileNetV1's with ResNet50's previous ones.
    """

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        return sum(attention_loss(a, b) for a, b in zip(student.features, teacher.features, strict=True))


def attention_loss(feature: Tensor, target: Tensor) -> Tensor:
    """Features [B, C, H, W], C may differ; the larger one is average-pooled first. `target` is detached."""
    feature, target = same_size(feature.float(), target.float())
    return l2(attention(feature), attention(target))


def attention(feature: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W], of unit length: the mean of the squared activations over the channels."""
    return F.normalize(feature.square().mean(1).flatten(1))
