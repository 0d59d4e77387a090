"""The bridges B_st^k and B_ts^k, which map the features of one network to the shape of the other's (Sec. 2).

A bridge is one convolution and one BatchNorm, followed by a leaky ReLU where the target feature is post-ReLU.
"""

from collections.abc import Iterable

import torch
from torch import nn

from .models.staged import StagedNet
from .paths import candidate_paths

LEAKY_SLOPE = 0.1


class Bridges(nn.Module):
    """All bridges of a teacher-student pair.

    Attributes:
        s2t: str(k) -> B_st^k, student to teacher, for k = 2..N. With SimKD, B_st^N is the identity because the student
            projects F^N itself.
        t2s: str(k) -> B_ts^k, teacher to student, for the positions of the mixed paths.
    """

    def __init__(self, s2t: dict[str, nn.Module], t2s: dict[str, nn.Module]):
        super().__init__()
        self.s2t = nn.ModuleDict(s2t)
        self.t2s = nn.ModuleDict(t2s)


def build_bridges(
    teacher: StagedNet, student: StagedNet, image_size: int, positions: Iterable[int] | None = None
) -> Bridges:
    """Bridges for a pair on images [B, 3, image_size, image_size].

    Args:
        positions: where mixed paths <k, 0> leave the teacher; default 2..N-1.

    Raises:
        ValueError: the networks have different numbers of stages, or at some stage their sizes are not equal, half or
            double.
    """
    if teacher.num_stages != student.num_stages:
        raise ValueError(
            f"the teacher has {teacher.num_stages} stages and the student {student.num_stages}: "
            "choose two networks with the same number of stages"
        )
    last = student.num_stages
    shapes_t, shapes_s = (feature_shapes(net, image_size) for net in (teacher, student))
    t2s_positions = sorted({path.k for path in candidate_paths(last, positions)})
    s2t_last = last - 1 if student.projected else last
    s2t = {str(k): bridge(shapes_s[k], shapes_t[k], teacher.post_relu) for k in range(2, s2t_last + 1)}
    if student.projected:
        s2t[str(last)] = nn.Identity()
    t2s = {str(k): bridge(shapes_t[k], shapes_s[k], student.post_relu) for k in t2s_positions}
    return Bridges(s2t, t2s)


def bridge(source: torch.Size, target: torch.Size, post_relu: bool) -> nn.Sequential:
    """Sequential(conv, bn[, act]) from features of shape `source` (C, H, W) to `target`, post-ReLU or not.

    Raises:
        ValueError: the sizes are not equal, half or double.
    """
    (c_in, *size_in), (c_out, *size_out) = source, target
    if size_in == size_out:
        conv = nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False)
    elif size_in == [2 * s for s in size_out]:
        conv = nn.Conv2d(c_in, c_out, 3, 2, 1)
    elif [2 * s for s in size_in] == size_out:
        conv = nn.ConvTranspose2d(c_in, c_out, 4, 2, 1)  # keeps PyTorch's default initialization
    else:
        raise ValueError(
            f"no bridge from features of {size_in[0]}x{size_in[1]} to {size_out[0]}x{size_out[1]} pixels: "
            "at every stage the teacher's and the student's sizes must be equal, half or double"
        )
    if isinstance(conv, nn.Conv2d):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    layers = [conv, nn.BatchNorm2d(c_out)]
    if post_relu:
        layers.append(nn.LeakyReLU(LEAKY_SLOPE, inplace=True))
    return nn.Sequential(*layers)


@torch.no_grad()
def feature_shapes(net: StagedNet, image_size: int) -> dict[int, torch.Size]:
    """k -> shape (C_k, H_k, W_k) of F^k for k = 1..N, from a forward pass of one black image."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    image = next(net.parameters()).new_zeros(1, 3, image_size, image_size)
    shapes = {k: feature.shape[1:] for k, feature in enumerate(net.features(image), 1)}
    for module, mode in modes.items():
        module.training = mode
    return shapes
