"""Function-Consistent Feature Distillation, Sec. 2: what flows in a step, and the losses on it.

A network is a chain of stages M^1..M^N and a classifier C. In a step, images flow along

    two pure paths     teacher: F_t^1..F_t^N, logits C_t(F_t^N)       student: F_s^1..F_s^N, logits C_s(F_s^N)
    some mixed paths   <k, 1>:  F_s^k -> bridge B_st^k -> the teacher's stages k+1..N and its classifier
                       <k, 0>:  F_t^k -> bridge B_ts^k -> the student's stages k+1..N and its classifier

A training loop draws a few mixed paths for each step (S, of size 2 in the paper; common/paths.py). `forward_paths`
computes those and the pure ones; each loss term is a few lines on what it returns.

Two features are close in L2 if their numbers are. They function alike if the rest of a network makes the same of
them. L_app asks for the first, L_func and L_func' ask for the second: L_func with the teacher's later part as the
judge of the student's feature, L_func' with the student's later part as the judge of the teacher's.

In every term of Eq. 9 the teacher's side is the target and is detached (in common/losses.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .bridges import Bridges
from .losses import kl, l2
from .models import StagedNet
from .multipath_bn import on_path
from .paths import MixedPath

TERMS = ("task", "kd", "app", "func_l2", "func_kl", "func_prime")  # Eq. 9
VARIANTS = ("func_partial", "func_prime_l2")  # what the paper tries in the place of some of them (App. H.4, G)
L2_TERMS = ("app", "func_l2", *VARIANTS)  # those whose weight is warmed up
KDLoss = Callable[[Tensor, Tensor, float], Tensor]  # (logits, target, temperature) -> a scalar


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
    teacher_logits: Tensor  # [B, K]; their softmax is p_t
    student_logits: Tensor  # [B, K]; their softmax is p_s
    s2t: dict[int, Tensor] = field(default_factory=dict)  # B_st^k(F_s^k), in the shape of F_t^k
    t2s: dict[int, Tensor] = field(default_factory=dict)  # B_ts^k(F_t^k), in the shape of F_s^k
    mixed: dict[MixedPath, MixedFlow] = field(default_factory=dict)
    last_target: Tensor | None = None  # what L_app compares s2t[N] with where that is not F_t^N (common/simkd.py)


def forward_paths(
    teacher: StagedNet,
    student: StagedNet,
    bridges: Bridges | None,
    images: Tensor,
    paths: Iterable[MixedPath] = (),
    app: bool = True,
) -> Flow:
    """Run `images` [B, 3, H, W] along both pure paths and the mixed `paths` (Fig. 2); what two of them share runs once.

    No gradient is cut here. A frozen teacher gets none; one that trains too (App. F) gets it from every mixed path
    that passes through it, its early stages included.

    Args:
        teacher, student: with `paths` or `app`, networks of as many stages, between which `bridges` were built.
        bridges: may be None if there are no `paths` and no `app`. Its mode is that of the mixed paths: in training
            they normalise by their batch, in evaluation by their own running statistics, whatever the modes of the
            networks, which are those of the pure paths.
        app: whether L_app is wanted, which needs the bridged student features at every position 2..N.
    """
    last = student.num_stages
    features_t = dict(enumerate(teacher.features(images), 1))
    features_s = dict(enumerate(student.features(images), 1))
    logits_t, logits_s = teacher.classify(features_t[teacher.num_stages]), student.classify(features_s[last])
    flow = Flow(features_t, features_s, logits_t, logits_s)

    paths = list(paths)
    into_teacher = set(range(2, last + 1)) if app else {path.k for path in paths if path.delta == 1}
    into_student = {path.k for path in paths if path.delta == 0}
    flow.s2t = {k: bridges.s2t[str(k)](features_s[k]) for k in sorted(into_teacher)}
    if app and student.projected:
        flow.last_target = student.last_target(features_t[last], flow.s2t[last])
    flow.t2s = {k: bridges.t2s[str(k)](features_t[k]) for k in sorted(into_student)}

    for path in paths:
        net, x = (teacher, flow.s2t[path.k]) if path.delta == 1 else (student, flow.t2s[path.k])
        later = {}
        # Foreign features have other means and variances, so they have running statistics of their own (Fig. 3).
        with on_path(net, path.k, training=bridges.training):
            for l in range(path.k + 1, last + 1):
                later[l] = x = net.stage(l, x)
            flow.mixed[path] = MixedFlow(later, net.classify(x))
    return flow


def fcfd_terms(
    flow: Flow, labels: Tensor, temperature: float, terms: Iterable[str] = TERMS, kd_loss: KDLoss = kl
) -> dict[str, Tensor]:
    """The terms of Eq. 9, or variants, before weighting: float32 scalars, each the sum over its positions and paths.

    task is the cross entropy of the student's logits with the labels; kd is the KL of the student's p_s from the
    teacher's p_t, T^2 KL(p_t || p_s); the others are the functions below.

    Args:
        labels: [B], class indices.
        temperature: T, which divides the logits in every KL.
        terms: which of TERMS and VARIANTS to compute.
        kd_loss: what compares logits with the teacher's in kd, func_kl and func_prime. Another one, such as DKD
            (App. C.1), takes the place of KL in these three.
    """
    compute = {
        "task": lambda: F.cross_entropy(flow.student_logits.float(), labels),
        "kd": lambda: kd_loss(flow.student_logits, flow.teacher_logits, temperature),
        "app": lambda: l_app(flow),
        "func_l2": lambda: l_func_l2(flow),
        "func_kl": lambda: l_func_kl(flow, temperature, kd_loss),
        "func_prime": lambda: l_func_prime(flow, temperature, kd_loss),
        "func_partial": lambda: l_func_partial(flow),
        "func_prime_l2": lambda: l_func_prime_l2(flow),
    }
    return {name: compute[name]() for name in terms}


def l_app(flow: Flow) -> Tensor:
    """Eq. 5, appearance: L2 between the bridged student feature and the teacher's, at every position 2..N.

    At stage N, here and in L_func, L2 also compares what the classifier reads of the two: after ReLU and pooling.
    What SimKD projects is compared with F_t^N after ReLU, pooled to its size (common/simkd.py).
    """
    last = max(flow.teacher)
    targets = flow.teacher if flow.last_target is None else flow.teacher | {last: flow.last_target}
    return _sum(flow, (l2(flow.s2t[k], targets[k], pooled=k == last) for k in range(2, last + 1)))


def l_func_l2(flow: Flow) -> Tensor:
    """Eq. 6, first part: L2 between each <k, 1> path and the pure teacher, after each later stage of the teacher."""
    last = max(flow.teacher)
    return _sum(
        flow,
        (
            l2(x, flow.teacher[l], pooled=l == last)
            for path, mixed in flow.mixed.items()
            if path.delta == 1
            for l, x in mixed.features.items()
        ),
    )


def l_func_kl(flow: Flow, temperature: float, kd_loss: KDLoss = kl) -> Tensor:
    """Eq. 6, second part: KL between p_t and the answer of each <k, 1> path, by the teacher's later part."""
    return _answers(flow, 1, temperature, kd_loss)


def l_func_prime(flow: Flow, temperature: float, kd_loss: KDLoss = kl) -> Tensor:
    """Eq. 7: KL between p_t and the answer of each <k, 0> path, by the student's later part."""
    return _answers(flow, 0, temperature, kd_loss)


def l_func_partial(flow: Flow) -> Tensor:
    """L_func-partial (App. H.4): L2 between each <k, 1> path and the pure teacher after stage k + 1 alone, no KL."""
    last = max(flow.teacher)
    into_teacher = ((path.k + 1, mixed) for path, mixed in flow.mixed.items() if path.delta == 1 and path.k < last)
    return _sum(flow, (l2(mixed.features[l], flow.teacher[l], pooled=l == last) for l, mixed in into_teacher))


def l_func_prime_l2(flow: Flow) -> Tensor:
    """L_func'-L2 (App. G): L2 between each <k, 0> path and the pure student, after each later stage of the student.

    Both sides are the student's and neither is the target: the gradient reaches both, and there is no pooled part.
    """
    into_student = (mixed for path, mixed in flow.mixed.items() if path.delta == 0)
    pairs = ((x, flow.student[l]) for mixed in into_student for l, x in mixed.features.items())
    return _sum(flow, (F.mse_loss(x.float(), own.float()) for x, own in pairs))


def _answers(flow: Flow, delta: int, temperature: float, kd_loss: KDLoss) -> Tensor:
    paths = (mixed for path, mixed in flow.mixed.items() if path.delta == delta)
    return _sum(flow, (kd_loss(mixed.logits, flow.teacher_logits, temperature) for mixed in paths))


def _sum(flow: Flow, losses: Iterable[Tensor]) -> Tensor:
    """Their sum; zero where the step has no path of that direction."""
    return sum(losses, start=flow.student_logits.new_zeros((), dtype=torch.float32))
