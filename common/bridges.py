"""The transforms between the feature spaces of student and teacher, B_st^k and B_ts^k (Sec. 2).

A bridge is one convolution and one BatchNorm; a leaky ReLU follows where the target feature is post-ReLU.
"""

from argparse import Namespace
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .models import StagedNet
from .paths import MixedPath, candidate_paths, sample_paths
from .run.errors import UserError

LEAKY_SLOPE = 0.1


class Bridges(nn.Module):
    """All bridges of a pair.

    Attributes:
        s2t: str(k) -> B_st^k, student to teacher, for k = 2..N; the identity at N if the student projects F^N itself.
        t2s: str(k) -> B_ts^k, teacher to student, for the positions of the mixed paths.
    """

    def __init__(self, s2t: dict[str, nn.Module], t2s: dict[str, nn.Module]):
        super().__init__()
        self.s2t = nn.ModuleDict(s2t)
        self.t2s = nn.ModuleDict(t2s)


def build_bridges(
    teacher: StagedNet, student: StagedNet, image_size: int, positions: Iterable[int] | None = None
) -> Bridges:
    """Bridges for a pair on images [B, 3, image_size, image_size]; `positions` as in `candidate_paths`.

    Raises:
        UserError: the networks have different numbers of stages, or at some stage sizes that are neither equal
            nor half nor double.
    """
    if teacher.num_stages != student.num_stages:
        raise UserError(
            f"the teacher has {teacher.num_stages} stages and the student {student.num_stages}: "
            "choose two networks whose stages correspond"
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


def connect(
    c: Namespace, teacher: StagedNet, student: StagedNet, image_size: int
) -> tuple[Bridges | None, list[MixedPath]]:
    """The bridges of a run, None if it needs none, and its candidate paths; settles c.num_paths and c.positions.

    A term of weight 0 takes its paths from the candidates, and its bridges from those that are built.

    Args:
        c: the settings, of which `w_<term>` for every term there is, `num_paths` and `positions` (None: the defaults)
            are read.

    Raises:
        UserError: a setting is out of range, no term is left, or the networks do not correspond.
    """
    weights = {key.removeprefix("w_"): value for key, value in vars(c).items() if key.startswith("w_")}
    last = student.num_stages

    def trains(path: MixedPath) -> bool:
        by_answer, by_features = (
            (["func_kl"], ["func_l2", "func_partial"]) if path.delta == 1 else (["func_prime"], ["func_prime_l2"])
        )
        # A path that leaves stage N goes straight to the classifier: it has no later stage whose features to compare.
        wanted = by_answer + (by_features if path.k < last else [])
        return any(weights.get(term, 0) > 0 for term in wanted)

    c.positions = c.positions or list(range(2, last))
    candidates = [path for path in candidate_paths(last, c.positions) if trains(path)]
    if c.num_paths is None:
        c.num_paths = min(2, len(candidates))
    sample_paths(candidates, c.num_paths, steps=1, seed=0, epoch=0)  # complains now if |S| is out of range
    if not c.num_paths and not any(weight for term, weight in weights.items() if not term.startswith("func")):
        raise UserError("no term is left to train on: draw paths (--num-paths), or give a weight to another term")
    if not c.w_app and not c.num_paths:
        return None, candidates
    return build_bridges(teacher, student, image_size, [path.k for path in candidates if path.delta == 0]), candidates


def bridge(source: torch.Size, target: torch.Size, post_relu: bool) -> nn.Sequential:
    """Sequential(conv, bn[, act]) from features of shape `source` (C, H, W) to `target`, post-ReLU or not.

    Raises:
        UserError: the sizes are neither equal nor half nor double.
    """
    (c_in, *size_in), (c_out, *size_out) = source, target
    if size_in == size_out:
        conv = nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False)
    elif size_in == [2 * s for s in size_out]:
        conv = nn.Conv2d(c_in, c_out, 3, 2, 1)
    elif [2 * s for s in size_in] == size_out:
        conv = nn.ConvTranspose2d(c_in, c_out, 4, 2, 1)  # keeps PyTorch's default start
    else:
        raise UserError(
            f"no bridge from features of {size_in[0]}x{size_in[1]} to {size_out[0]}x{size_out[1]} pixels: "
            "at every stage the sizes of teacher and student must be equal, half or double"
        )
    if isinstance(conv, nn.Conv2d):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    layers = [conv, nn.BatchNorm2d(c_out)]
    if post_relu:
        layers.append(nn.LeakyReLU(LEAKY_SLOPE, inplace=True))
    return nn.Sequential(*layers)


@torch.no_grad()
def feature_shapes(net: StagedNet, image_size: int) -> dict[int, torch.Size]:
    """k -> shape (C_k, H_k, W_k) of F^k for k = 1..N, found by passing one black image."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    image: Tensor = next(net.parameters()).new_zeros(1, 3, image_size, image_size)
    shapes = {k: feature.shape[1:] for k, feature in enumerate(net.features(image), 1)}
    for module, mode in modes.items():
        module.training = mode
    return shapes
