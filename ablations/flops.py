"""App. H's formula: what a step costs in FLOPs, from what each module costs forward.

Counted are convolutions and linear layers, which are nearly all of it; a multiply-add is two FLOPs. Of such a layer,
bias apart, the gradient of its input takes as many FLOPs as its forward pass, and so does that of its weight. Hence

    3 x forward    a layer that is trained and whose input has a gradient: student, B_st
    2 x forward    a layer that is trained and whose input has none: B_ts, the student's first layer
    2 x forward    a frozen layer that a gradient passes: the teacher's later part on a mixed path
    1 x forward    a frozen layer that none passes: the teacher's pure path
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from common.bridges import Bridges
from common.models import StagedNet
from common.paths import MixedPath


@dataclass(frozen=True)
class Forward:
    """FLOPs of each module's forward pass, for one image."""

    teacher: dict[int, int]  # f_t(l) of stages l = 1..N
    student: dict[int, int]  # f_s(l)
    classifier_t: int  # c_t
    classifier_s: int  # c_s
    s2t: dict[int, int]  # b_st(k), k = 2..N
    t2s: dict[int, int]  # b_ts(k), at the positions of the mixed paths
    first: int  # the student's first convolution, part of f_s(1)


@torch.no_grad()
def forward_flops(teacher: StagedNet, student: StagedNet, bridges: Bridges, image_size: int) -> Forward:
    """Count each module of a pair, for an image [3, image_size, image_size]; all are left in evaluation mode.

    They may be on the device "meta", where nothing is computed.
    """
    image = next(student.parameters()).new_zeros(1, 3, image_size, image_size)

    def count(function, *args) -> tuple[int, Tensor]:
        with FlopCounterMode(display=False) as counter:
            out = function(*args)
        return counter.get_total_flops(), out

    def stages(net: StagedNet) -> tuple[dict[int, int], dict[int, Tensor]]:
        flops, features, x = {}, {}, image
        for k in range(1, net.eval().num_stages + 1):
            flops[k], x = count(net.stage, k, x)
            features[k] = x
        return flops, features

    (of_t, features_t), (of_s, features_s) = stages(teacher), stages(student)
    bridges.eval()
    first = next(layer for layer in student.modules() if isinstance(layer, nn.Conv2d))
    return Forward(
        teacher=of_t,
        student=of_s,
        classifier_t=count(teacher.classify, features_t[teacher.num_stages])[0],
        classifier_s=count(student.classify, features_s[student.num_stages])[0],
        s2t={int(k): count(bridge, features_s[int(k)])[0] for k, bridge in bridges.s2t.items()},
        t2s={int(k): count(bridge, features_t[int(k)])[0] for k, bridge in bridges.t2s.items()},
        first=count(first, image)[0],
    )


def alone_step(f: Forward) -> int:
    """The student alone, forward and backward: 3 (sum of f_s + c_s), less the gradient of the image."""
    return 3 * (sum(f.student.values()) + f.classifier_s) - f.first


def kd_step(f: Forward) -> int:
    """KD, or DKD: the teacher forward, sum of f_t + c_t, and the student forward and backward."""
    return sum(f.teacher.values()) + f.classifier_t + alone_step(f)


def app_extra(f: Forward) -> int:
    """What L_app adds to a KD step: 3 (sum of b_st). Those bridges serve the mixed paths <k, 1>, too."""
    return 3 * sum(f.s2t.values())


def path_extra(f: Forward, path: MixedPath) -> int:
    """What a mixed path adds to that, over stages l > k.

    <k, 1>: 2 (sum of f_t(l) + c_t), the frozen teacher's. <k, 0>: 2 b_ts(k) + 3 (sum of f_s(l) + c_s).
    """
    later = range(path.k + 1, len(f.student) + 1)
    if path.delta == 1:
        return 2 * (sum(f.teacher[l] for l in later) + f.classifier_t)
    return 2 * f.t2s[path.k] + 3 * (sum(f.student[l] for l in later) + f.classifier_s)


def fcfd_extra(f: Forward, candidates: Iterable[MixedPath], num_paths: int) -> float:
    """What FCFD adds to a KD step, expected over the draws: each candidate is in S in |S| of len(candidates) steps."""
    paths = [path_extra(f, path) for path in candidates]
    return app_extra(f) + num_paths / len(paths) * sum(paths)


def counter() -> FlopCounterMode:
    """A context that counts whatever runs in it, backward too, for which there is no formula here.

    PyTorch's own count takes the weight gradient of a grouped convolution for that of an ungrouped one.
    """
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(grad_out, x, weight, bias, stride, padding, dilation, transposed, *rest, out_shape) -> int:
    """Arguments are shapes, as FlopCounterMode has them; the last of `rest` says which gradients are wanted."""
    wanted = rest[-1]
    return conv_flop_count(x, weight, grad_out, transposed) * (wanted[0] + wanted[1])
