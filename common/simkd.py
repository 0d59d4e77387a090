"""SimKD's projector and the teacher's classifier, which replace the student's classifier (App. C.2).

In SimKD (Chen et al., CVPR 2022) a projector maps the student's last feature to the teacher's space, where the
teacher's classifier reads it. Combined with FCFD, every feature that would enter C_s enters C_t(projector(.)) instead:
on the pure path, on the mixed paths and at inference. The projector takes the place of B_st^N.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bridges import feature_shapes
from .models.staged import StagedNet, init_fan_out

SQUEEZE = 2  # the projector's inner convolution has C_t / SQUEEZE channels


class SimKDStudent(StagedNet):
    """A student whose stage N ends with the projector, and whose classifier is the teacher's classifier module.

    F^N is the projected feature, post-ReLU, in the teacher's space. The classifier of `student` is removed in place.
    Earlier stages and `post_relu` are the student's.

    Attributes:
        student, projector, classifier: the parts; the state dict holds all three.
    """

    projected = True

    def __init__(self, student: StagedNet, projector: nn.Module, classifier: nn.Module):
        super().__init__()
        self.num_stages = student.num_stages
        self.post_relu = student.post_relu
        own = next(name for name, module in student.named_modules() if module is student.classifier_layer)
        student.set_submodule(own, nn.Identity())  # not trained, counted or saved
        self.student, self.projector, self.classifier = student, projector, classifier

    def stage(self, k: int, x: Tensor) -> Tensor:
        x = self.student.stage(k, x)
        return self.projector(x) if k == self.num_stages else x

    @property
    def classifier_layer(self) -> nn.Module:
        return self.classifier

    def last_target(self, feature_t: Tensor, projected: Tensor) -> Tensor:
        """The target of L_app for `projected`: the teacher's F^N after ReLU, average-pooled to the same size."""
        return F.adaptive_avg_pool2d(F.relu(feature_t.float()), projected.shape[2:])


def build_simkd(student: StagedNet, teacher: StagedNet, image_size: int) -> SimKDStudent:
    """`student`, modified in place, with a new projector and the classifier of `teacher`, which both share."""
    shapes_s, shapes_t = (feature_shapes(net, image_size)[net.num_stages] for net in (student, teacher))
    return SimKDStudent(student, projector(shapes_s, shapes_t), teacher.classifier_layer)


def projector(source: torch.Size, target: torch.Size) -> nn.Sequential:
    """From features of shape `source` (C, H, W) to the channels of `target`, post-ReLU, at the smaller size."""
    (c_in, *size_in), (c_out, *size_out) = source, target
    inner, size = c_out // SQUEEZE, [min(pair) for pair in zip(size_in, size_out, strict=True)]
    layers: list[nn.Module] = [] if size == size_in else [nn.AdaptiveAvgPool2d(size)]
    for channels_in, channels_out, kernel in ((c_in, inner, 1), (inner, inner, 3), (inner, c_out, 1)):
        conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]
    net = nn.Sequential(*layers)
    init_fan_out(net)
    return net
