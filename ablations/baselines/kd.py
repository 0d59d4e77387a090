"""KD (Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015) and DKD.

DKD: Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022. Both losses are in common/losses.py,
since FCFD uses them too.
"""

from torch import Tensor, nn

from ablations.baselines.batch import Batch
from common.losses import dkd, kl
from common.models import Taps


class KD(nn.Module):
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)), averaged over the batch (Sec. 2)."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        return kl(student.logits, teacher.logits, self.temperature)


class DKD(nn.Module):
    """T^2 (tckd TCKD + nckd NCKD) (Eq. 7). With weights 1 and 1 - p_t[label] this is KD (Eq. 6)."""

    def __init__(self, temperature: float, tckd: float, nckd: float):
        super().__init__()
        self.temperature, self.tckd, self.nckd = temperature, tckd, nckd

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        return dkd(student.logits, teacher.logits, self.temperature, batch.labels, self.tckd, self.nckd)
