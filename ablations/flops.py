"""FLOPs of a training step by the formula of App. H, from the FLOPs of each module's forward pass.

Only convolutions and linear layers, which account for nearly everything, are counted; a multiply-add is two FLOPs.
Apart from the bias, the gradient of such a layer's input costs as many FLOPs as its forward pass, and so does that of
its weight. Hence

    3 x forward    a trained layer whose input needs a gradient: student, B_st
    2 x forward    a trained layer whose input needs none: B_ts, the student's first layer
    2 x forward    a frozen layer with a gradient through it: the teacher's later part on a mixed path
    1 x forward    a frozen layer without: the teacher's pure path
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
    """FLOPs of each module's forward pass for one image."""

    teacher: dict[int, int]  # f_t(l) of stages l = 1..N
    student: dict[int, int]  # f_s(l)
    classifier_t: int  # c_t
    classifier_s: int  # c_s
    s2t: dict[int, int]  # b_st(k), k = 2..N
    t2s: dict[int, int]  # b_ts(k), at the positions of the mixed paths
    first: int  # the student's first convolution, part of f_s(1)


@torch.no_grad()
def forward_flops(teacher: StagedNet, student: StagedNet, bridges: Bridges, image_size: int) -> Forward:
    """Count the FLOPs of each module for an image [3, image_size, image_size]; leaves all in evaluation mode.

    The modules may be on the "meta" device, where nothing is computed.
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
    """Student only, forward and backward: 3 (sum of f_s + c_s), minus the gradient of the image."""
    return 3 * (sum(f.student.values()) + f.classifier_s) - f.first


def kd_step(f: Forward) -> int:
    """KD or DKD: teacher forward, sum of f_t + c_t, plus student forward and backward."""
    return sum(f.teacher.values()) + f.classifier_t + alone_step(f)


def app_extra(f: Forward) -> int:
    """Added to a KD step by L_app: 3 (sum of b_st). The mixed paths <k, 1> reuse these bridges."""
    return 3 * sum(f.s2t.values())


def path_extra(f: Forward, path: MixedPath) -> int:
    """Added to that by a mixed path; sums are over stages l > k.

    <k, 1>: 2 (sum of f_t(l) + c_t), through the frozen teacher. <k, 0>: 2 b_ts(k) + 3 (sum of f_s(l) + c_s).
    """
    later = range(path.k + 1, len(f.student) + 1)
    if path.delta == 1:
        return 2 * (sum(f.teacher[l] for l in later) + f.classifier_t)
    return 2 * f.t2s[path.k] + 3 * (sum(f.student[l] for l in later) + f.classifier_s)


def fcfd_extra(f: Forward, candidates: Iterable[MixedPath], num_paths: int) -> float:
    """Added to a KD step by FCFD, in expectation: a candidate is in S with probability |S| / len(candidates)."""
    paths = [path_extra(f, path) for path in candidates]
    return app_extra(f) + num_paths / len(paths) * sum(paths)


def counter() -> FlopCounterMode:
    """A context manager that counts what runs in it, backward included, for steps without a formula here.

    PyTorch's own counter treats the weight gradient of a grouped convolution as that of an ungrouped one.
    """
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(grad_out, x, weight, bias, stride, padding, dilation, transposed, *rest, out_shape) -> int:
    """Arguments are shapes, as passed by FlopCounterMode; the last of `rest` is the mask of required gradients."""
    output_mask = rest[-1]
    return conv_flop_count(x, weight, grad_out, transposed) * (output_mask[0] + output_mask[1])
