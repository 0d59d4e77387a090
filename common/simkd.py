"""SimKD's projector and the teacher's classifier in the place of the student's classifier (App. C.2).

SimKD (Chen et al., CVPR 2022) lets the student do without a classifier of its own: a projector brings its last feature
into the teacher's space, where the teacher's classifier reads it. Together with FCFD, wherever a feature would enter
C_s, on the pure path, on the mixed ones and at inference, it goes through the projector into C_t instead, and B_st^N is
that projector. It makes inference cost more: `cost_line` says how much.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .bridges import feature_shapes
from .models import StagedNet, build
from .models.staged import init_fan_out

SQUEEZE = 2  # the projector's inner convolution has C_t / SQUEEZE channels


class SimKDStudent(StagedNet):
    """A student whose stage N ends with the projector, and whose classifier is the teacher's, the same module.

    F^N is the projected feature, after its ReLU, in the teacher's space. Stages before N are the student's, and so are
    `post_relu` and `channels_last`. The student is taken over: its own classifier is removed from it.

    Attributes:
        student, projector, classifier: the parts; the state dict holds all three.
    """

    projected = True

    def __init__(self, student: StagedNet, projector: nn.Module, classifier: nn.Module):
        super().__init__()
        self.num_stages = student.num_stages
        self.post_relu, self.channels_last = student.post_relu, student.channels_last
        own = next(name for name, module in student.named_modules() if module is student.classifier_layer)
        student.set_submodule(own, nn.Identity())  # neither trained, nor counted, nor saved
        self.student, self.projector, self.classifier = student, projector, classifier

    def stage(self, k: int, x: Tensor) -> Tensor:
        x = self.student.stage(k, x)
        return self.projector(x) if k == self.num_stages else x

    @property
    def classifier_layer(self) -> nn.Module:
        return self.classifier

    def last_target(self, feature_t: Tensor, projected: Tensor) -> Tensor:
        """The teacher's F^N as L_app compares `projected` with it: after ReLU, average-pooled to its size."""
        return F.adaptive_avg_pool2d(F.relu(feature_t.float()), projected.shape[2:])


def build_simkd(student: StagedNet, teacher: StagedNet, image_size: int) -> SimKDStudent:
    """`student` with a projector to `teacher`'s last feature and `teacher`'s classifier, which stays the teacher's too.

    Whatever is loaded into the teacher later is seen here. The student is changed: see SimKDStudent.
    """
    shapes_s, shapes_t = (feature_shapes(net, image_size)[net.num_stages] for net in (student, teacher))
    return SimKDStudent(student, projector(shapes_s, shapes_t), teacher.classifier_layer)


def projector(source: torch.Size, target: torch.Size) -> nn.Sequential:
    """From features of shape `source` (C, H, W) to the channels of `target`, post-ReLU, at the smaller size of both."""
    (c_in, *size_in), (c_out, *size_out) = source, target
    inner, size = c_out // SQUEEZE, [min(pair) for pair in zip(size_in, size_out, strict=True)]
    layers: list[nn.Module] = [] if size == size_in else [nn.AdaptiveAvgPool2d(size)]
    for channels_in, channels_out, kernel in ((c_in, inner, 1), (inner, inner, 3), (inner, c_out, 1)):
        conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)
        layers += [conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]
    net = nn.Sequential(*layers)
    init_fan_out(net)
    return net


@torch.no_grad()
def inference_cost(net: StagedNet, image_size: int) -> tuple[int, int]:
    """(parameters, FLOPs for one image) of `net`, which is left in evaluation mode; a multiply-add is two FLOPs.

    Counted are convolutions and linear layers, which are nearly all of it; BatchNorm, ReLU and pooling are not.
    """
    image = next(net.parameters()).new_zeros(1, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter:
        net.eval()(image)
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops()


def added_cost(student: str, teacher: str, num_classes: int, image_size: int) -> list[tuple[int, int]]:
    """`inference_cost` of a student alone and of the same student with SimKD, by the names of the networks.

    Nothing is drawn: the networks are built without memory of their own.
    """
    with torch.device("meta"):
        net = build(student, num_classes)
        alone = inference_cost(net, image_size)
        return [alone, inference_cost(build_simkd(net, build(teacher, num_classes), image_size), image_size)]


def cost_line(student: str, teacher: str, num_classes: int, image_size: int) -> str:
    """What SimKD adds to the student's cost at inference, in words; arguments as in `added_cost`."""
    alone, projected = added_cost(student, teacher, num_classes, image_size)
    units = ((1e3, "k parameters"), (1e6, " MFLOPs an image"))
    texts = [
        f"{(after - before) / unit:.1f}{name} ({100 * (after / before - 1):+.1f} %)"
        for before, after, (unit, name) in zip(alone, projected, units, strict=True)
    ]
    return f"SimKD: projector and teacher's classifier add {' and '.join(texts)} to {student} at inference"
