"""SimKD (Chen, Mei, Zhang, Wang, Feng, Chen: Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022).

A projector maps the student's last feature to the teacher's, and the teacher's classifier reads it. In FCFD with SimKD
(common/simkd.py) the projector reads F^N instead, which in most networks but ResNets is another tensor, and has another
initialization.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablations.baselines.batch import Batch
from common.losses import l2
from common.models import StagedNet, Taps, pool
from common.simkd import projector


class StudentWithTeacherClassifier(nn.Module):
    """The student, its projector (Sec. 3.2) and the teacher's classifier; inference needs all three.

    The student's layers after its last feature are unused.

    Args:
        shape_s, shape_t: (C, H, W) of the student's last feature and of the teacher's `Taps.last`.
    """

    def __init__(self, student: StagedNet, teacher: StagedNet, shape_s: torch.Size, shape_t: torch.Size):
        super().__init__()
        self.student, self.classifier = student, teacher.classifier_layer
        self.projector = projector(shape_s, shape_t)
        for layer in self.projector:
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()  # PyTorch's default

    def taps(self, images: Tensor, pre_relu: bool = False) -> Taps:
        """`Taps.last` is the projected feature."""
        features = self.student.taps(images, pre_relu).features
        projected = self.projector(features[-1])
        pooled = pool(projected)
        return Taps(features, projected, pooled, self.classifier(pooled))

    def forward(self, images: Tensor) -> Tensor:
        return self.taps(images).logits


class SimKD(nn.Module):
    """L2 between the projected feature and the teacher's last map (Sec. 3.2), the mean over all elements.

    The projector works at the smaller of both sizes. If the teacher's map is larger, it is average-pooled.
    """

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        return l2(student.last, F.adaptive_avg_pool2d(teacher.last.float(), student.last.shape[2:]))
