"""SRRL (Yang, Martinez, Bulat, Tzimiropoulos: Knowledge Distillation via Softmax Regression Representation Learning,
ICLR 2021)."""

from torch import Tensor, nn

from ablations.baselines.batch import Batch
from ablations.baselines.ofd import connector
from common.losses import l2
from common.models import Taps, pool


class SRRL(nn.Module):
    """Feature matching L_FM plus softmax regression L_SR, each with weight 1.

    L_FM compares the pooled features, L_SR the teacher's logits with those that its classifier computes from the
    student's feature. Both are L2, the mean over all elements, as in the published ImageNet runs.

    Args:
        c_s, c_t: channels of `Taps.last`.
        classifier: the teacher's linear layer, frozen; not part of this module's state.
    """

    def __init__(self, c_s: int, c_t: int, classifier: nn.Module):
        super().__init__()
        self.connector = connector(c_s, c_t)  # then a ReLU, in `pool`
        self.classify = [classifier]  # in a list, so that it is not registered

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """The gradient of L_SR passes through the teacher's classifier."""
        pooled = pool(self.connector(student.last))
        logits = self.classify[0](pooled)
        return l2(pooled, teacher.pooled) + l2(logits, teacher.logits)
