"""SimKD's loss (Chen et al.: Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022).

The projector and the reused classifier are in common/simkd.py, since FCFD is combined with them too.
"""

from torch import Tensor, nn

from common.losses import l2
from common.simkd import SimKDStudent


class SimKD(nn.Module):
    """L2 between the student's projected F^N and the teacher's F^N; the projector belongs to the student."""

    def forward(self, student: SimKDStudent, projected: Tensor, feature_t: Tensor) -> Tensor:
        """Mean over all elements. F_s^N as projected, and F_t^N, which is detached: [B, C, H, W] each."""
        return l2(projected, student.last_target(feature_t, projected))
