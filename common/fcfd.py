"""Function-Consistent Feature Distillation, Sec. 2: what flows in a step, and the losses on it.

A network is a chain of stages M^1..M^N and a classifier C. In a step, images flow along

    the pure paths      teacher: F_t^1..F_t^N, p_t = C_t(F_t^N)         student: F_s^1..F_s^N, p_s = C_s(F_s^N)
    the mixed paths     <k, 1>:  F_s^k -> B_st^k -> teacher's stages k+1..N and its classifier
                        <k, 0>:  F_t^k -> B_ts^k -> student's stages k+1..N and its classifier

`forward_paths` computes all of it; each loss term is then a few lines on what it returns. If a student's feature
takes a teacher's place and what follows in the teacher does not change, the two function alike, however far apart
they are in L2; that is what L_func asks for, and L_func' asks the same of the teacher's feature inside the student.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from .bridges import Bridges
from .losses import kl, l2
from .models import StagedNet
from .multipath_bn import on_path
from .paths import MixedPath

TERMS = ("task", "kd", "app", "func_l2", "func_kl", "func_prime")


@dataclass
class MixedFlow:
    """One mixed path <k, delta>: its features after each later stage l = k+1..N, and its logits [B, K]."""

    features: dict[int, Tensor]
    logits: Tensor


@dataclass
class Flow:
    """Everything that flowed in a step. Features are keyed by their stage, 1..N, and are [B, C, H, W]."""

    teacher: dict[int, Tensor]  # F_t^k
    student: dict[int, Tensor]  # F_s^k
    teacher_logits: Tensor  # [B, K], whose softmax is p_t
    student_logits: Tensor
    s2t: dict[int, Tensor] = field(default_factory=dict)  # B_st^k(F_s^k)
    t2s: dict[int, Tensor] = field(default_factory=dict)  # B_ts^k(F_t^k)
    mixed: dict[MixedPath, MixedFlow] = field(default_factory=dict)


def forward_paths(
    teacher: StagedNet,
    student: StagedNet,
    bridges: Bridges | None,
    images: Tensor,
    paths: Iterable[MixedPath] = (),
    app: bool = True,
) -> Flow:
    """Run `images` [B, 3, H, W] along the pure paths and `paths` (Fig. 2); what two paths share runs once.

    Nothing is detached here: with a frozen teacher no gradient reaches it, with a trainable one (App. F) a mixed
    path trains every module that it passes. Mixed paths normalise by their batch when `bridges` is in training
    mode, whatever the modes of the networks, and by their own running statistics otherwise.

    Args:
        bridges: may be None if there are no `paths` and no `app`.
        app: whether L_app is wanted, which needs the bridged student features at every position 2..N.
    """
    last = student.num_stages
    flow_t = dict(enumerate(teacher.features(images), 1))
    flow_s = dict(enumerate(student.features(images), 1))
    flow = Flow(flow_t, flow_s, teacher.classify(flow_t[last]), student.classify(flow_s[last]))

    paths = list(paths)
    into_teacher = set(range(2, last + 1)) if app else {path.k for path in paths if path.delta == 1}
    into_student = {path.k for path in paths if path.delta == 0}
    flow.s2t = {k: bridges.s2t[str(k)](flow.student[k]) for k in sorted(into_teacher)}
    flow.t2s = {k: bridges.t2s[str(k)](flow.teacher[k]) for k in sorted(into_student)}

    for path in paths:
        net, x = (teacher, flow.s2t[path.k]) if path.delta == 1 else (student, flow.t2s[path.k])
        later = {}
        with on_path(net, path.k, training=bridges.training):
            for l in range(path.k + 1, last + 1):
                later[l] = x = net.stage(l, x)
            flow.mixed[path] = MixedFlow(later, net.classify(x))
    return flow


def fcfd_terms(flow: Flow, labels: Tensor, temperature: float, terms: Iterable[str] = TERMS) -> dict[str, Tensor]:
    """The terms of Eq. 9 before weighting: scalars in float32, each a sum over its positions and paths.

    Args:
        labels: [B], class indices.
        temperature: T of every KL.
        terms: which of TERMS to compute.
    """
    compute = {
        "task": lambda: F.cross_entropy(flow.student_logits.float(), labels),
        "kd": lambda: kl(flow.student_logits, flow.teacher_logits, temperature),
        "app": lambda: l_app(flow),
        "func_l2": lambda: l_func_l2(flow),
        "func_kl": lambda: l_func_kl(flow, temperature),
        "func_prime": lambda: l_func_prime(flow, temperature),
    }
    return {name: compute[name]() for name in terms}


def l_app(flow: Flow) -> Tensor:
    """Eq. 5, similar appearance: the bridged student feature is near the teacher's, at every position 2..N."""
    last = max(flow.teacher)
    losses = [l2(x, flow.teacher[k], pooled=k == last) for k, x in flow.s2t.items()]
    return _sum(losses, flow)


def l_func_l2(flow: Flow) -> Tensor:
    """Eq. 6, first part: after each later teacher stage the path <k, 1> is where the teacher itself is."""
    last = max(flow.teacher)
    losses = [
        l2(x, flow.teacher[l], pooled=l == last)
        for path, mixed in flow.mixed.items()
        if path.delta == 1
        for l, x in mixed.features.items()
    ]
    return _sum(losses, flow)


def l_func_kl(flow: Flow, temperature: float) -> Tensor:
    """Eq. 6, second part: the path <k, 1>, through the teacher's later part, ends at the teacher's answer p_t."""
    losses = [
        kl(mixed.logits, flow.teacher_logits, temperature) for path, mixed in flow.mixed.items() if path.delta == 1
    ]
    return _sum(losses, flow)


def l_func_prime(flow: Flow, temperature: float) -> Tensor:
    """Eq. 7: the path <k, 0>, through the student's later part, ends at the teacher's answer p_t."""
    losses = [
        kl(mixed.logits, flow.teacher_logits, temperature) for path, mixed in flow.mixed.items() if path.delta == 0
    ]
    return _sum(losses, flow)


def _sum(losses: list[Tensor], flow: Flow) -> Tensor:
    """Their sum; a float32 zero where no path of that direction was drawn in this step."""
    return sum(losses, start=flow.student_logits.new_zeros((), dtype=flow.student_logits.float().dtype))
