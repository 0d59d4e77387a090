"""Function-Consistent Feature Distillation (Sec. 2): the data paths of a training step, and the losses on them.

A network is a chain of stages M^1..M^N (M^1 is the stem) and a classifier C. In a training step, images flow along

    two pure paths     teacher: F_t^1..F_t^N, logits C_t(F_t^N)       student: F_s^1..F_s^N, logits C_s(F_s^N)
    some mixed paths   <k, 1>:  F_s^k -> bridge B_st^k -> the teacher's stages k+1..N and its classifier
                       <k, 0>:  F_t^k -> bridge B_ts^k -> the student's stages k+1..N and its classifier

Each step samples a set S of mixed paths (|S| = 2 in the paper; see paths.py). `forward_paths` runs the pure and the
sampled mixed paths and returns a `Flow`. Each loss term is a function of that `Flow`.

The loss is Eq. 9, where w_l2 and w_kl depend on the pair:

    L_task + L_kd + w_l2 (L_app + the L2 part of L_func) + w_kl (the KL part of L_func + L_func')

Each term is the sum over its positions and paths, not divided by |S|.

L_app matches the values of features. L_func and L_func' match their function: the output that the later stages of a
network compute from them, the teacher's in L_func and the student's in L_func'.

In every term of Eq. 9 except L_task, the target is a feature or the logits of the pure teacher path, detached in
losses.py. On <k, 1>, gradients flow through the frozen later stages of the teacher into the bridge and the student's
stages 1..k; on <k, 0>, into the bridge and the student's later stages.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import losses
from .bridges import Bridges
from .losses import l2
from .models.staged import StagedNet
from .multipath_bn import on_path
from .paths import MixedPath


@dataclass
class MixedFlow:
    """One mixed path <k, delta>: its features after each later stage l = k+1..N, and its logits [B, K]."""

    features: dict[int, Tensor]
    logits: Tensor


@dataclass
class Flow:
    """All features and logits of a step. Features are keyed by their stage, 1..N, and have shape [B, C, H, W].

    Without a teacher only the student's part is set.
    """

    student: dict[int, Tensor]  # F_s^k
    student_logits: Tensor  # [B, K]; their softmax is p_s
    teacher: dict[int, Tensor] = field(default_factory=dict)  # F_t^k
    teacher_logits: Tensor | None = None  # [B, K]; their softmax is p_t
    s2t: dict[int, Tensor] = field(default_factory=dict)  # B_st^k(F_s^k), in the shape of F_t^k
    t2s: dict[int, Tensor] = field(default_factory=dict)  # B_ts^k(F_t^k), in the shape of F_s^k
    mixed: dict[MixedPath, MixedFlow] = field(default_factory=dict)
    last_target: Tensor | None = None  # SimKD only: replaces F_t^N as the target of L_app (simkd.py)


def forward_paths(
    teacher: StagedNet | None,
    student: StagedNet,
    bridges: Bridges | None,
    images: Tensor,
    paths: Iterable[MixedPath] = (),
    all_bridges: bool = True,
) -> Flow:
    """Run `images` [B, 3, H, W] along both pure paths and the mixed `paths` (Fig. 2). Shared parts run once.

    Nothing is detached here, so a trainable teacher (App. F) also receives gradients from the mixed paths.

    Args:
        teacher: None to run the student alone; then there are no `paths`, and `all_bridges` is ignored.
        bridges: may be None if there are no `paths` and `all_bridges` is False. Their mode selects batch or running
            statistics on the mixed paths, in both networks. Each network's own mode applies to its pure path only.
        all_bridges: bridge the student's features at every position 2..N, as L_app needs, not only for `paths`.
    """
    last = student.num_stages
    features_t = dict(enumerate(teacher.features(images), 1)) if teacher else {}
    features_s = dict(enumerate(student.features(images), 1))
    if not teacher:
        return Flow(features_s, student.classify(features_s[last]))
    logits_t, logits_s = teacher.classify(features_t[teacher.num_stages]), student.classify(features_s[last])
    flow = Flow(features_s, logits_s, features_t, logits_t)

    paths = list(paths)
    into_teacher = set(range(2, last + 1)) if all_bridges else {path.k for path in paths if path.delta == 1}
    into_student = {path.k for path in paths if path.delta == 0}
    flow.s2t = {k: bridges.s2t[str(k)](features_s[k]) for k in sorted(into_teacher)}
    flow.t2s = {k: bridges.t2s[str(k)](features_t[k]) for k in sorted(into_student)}
    if all_bridges and student.projected:
        flow.last_target = student.last_target(features_t[last], flow.s2t[last])

    for path in paths:
        net, x = (teacher, flow.s2t[path.k]) if path.delta == 1 else (student, flow.t2s[path.k])
        later = {}
        # Bridged features differ in mean and variance from the net's own, so they have separate statistics (Fig. 3).
        with on_path(net, path.k, training=bridges.training):
            for l in range(path.k + 1, last + 1):
                later[l] = x = net.stage(l, x)
            flow.mixed[path] = MixedFlow(later, net.classify(x))
    return flow


# A loss term is a function (flow, labels [B], kl) that returns a float32 scalar: the sum over its positions and paths.
# kl(logits, target) is the KL at the run's temperature, or its replacement, such as DKD.

KL = Callable[[Tensor, Tensor], Tensor]


def l_task(flow: Flow, labels: Tensor, kl: KL) -> Tensor:
    """Cross entropy of the student's logits with the labels."""
    return F.cross_entropy(flow.student_logits.float(), labels)


def l_kd(flow: Flow, labels: Tensor, kl: KL) -> Tensor:
    """T^2 KL(p_t || p_s), between the two pure paths."""
    return kl(flow.student_logits, flow.teacher_logits)


def l_app(flow: Flow, labels: Tensor, kl: KL) -> Tensor:
    """Eq. 5, appearance: L2 between the bridged student feature and the teacher's, at every position 2..N.

    At stage N, here and in L_func, every L2 adds an L2 between the features after ReLU and pooling, the classifier's
    input. With SimKD, L_app compares F^N with `last_target` instead of F_t^N.
    """
    last = max(flow.teacher)
    targets = flow.teacher if flow.last_target is None else flow.teacher | {last: flow.last_target}
    return _sum(flow, (l2(flow.s2t[k], targets[k], pooled=k == last) for k in range(2, last + 1)))


def l_func_l2(flow: Flow, labels: Tensor, kl: KL) -> Tensor:
    """Eq. 6, first part: L2 between each <k, 1> path and the pure teacher, after each later stage of the teacher."""
    last = max(flow.teacher)
    pairs = ((x, l) for mixed in _paths(flow, delta=1).values() for l, x in mixed.features.items())
    return _sum(flow, (l2(x, flow.teacher[l], pooled=l == last) for x, l in pairs))


def l_func_kl(flow: Flow, labels: Tensor, kl: KL) -> Tensor:
    """Eq. 6, second part: T^2 KL(p_t || p), where p is the softmax of each <k, 1> path's logits."""
    return _sum(flow, (kl(mixed.logits, flow.teacher_logits) for mixed in _paths(flow, delta=1).values()))


def l_func_prime(flow: Flow, labels: Tensor, kl: KL) -> Tensor:
    """Eq. 7: T^2 KL(p_t || p), where p is the softmax of each <k, 0> path's logits."""
    return _sum(flow, (kl(mixed.logits, flow.teacher_logits) for mixed in _paths(flow, delta=0).values()))


# Variants of the ablations, not part of Eq. 9.


def l_func_partial(flow: Flow, labels: Tensor, kl: KL) -> Tensor:
    """L_func-partial (App. H.4): L2 between each <k, 1> path and the pure teacher after stage k + 1 only, no KL."""
    last, paths = max(flow.teacher), _paths(flow, delta=1)
    pairs = ((mixed.features[path.k + 1], path.k + 1) for path, mixed in paths.items() if path.k < last)
    return _sum(flow, (l2(x, flow.teacher[l], pooled=l == last) for x, l in pairs))


def l_func_prime_l2(flow: Flow, labels: Tensor, kl: KL) -> Tensor:
    """L_func'-L2 (App. G): L2 between each <k, 0> path and the pure student, after each later stage of the student.

    Nothing is detached, so gradients reach both sides. There is no pooled part.
    """
    pairs = ((x, l) for mixed in _paths(flow, delta=0).values() for l, x in mixed.features.items())
    return _sum(flow, (F.mse_loss(x.float(), flow.student[l].float()) for x, l in pairs))


class Term(NamedTuple):
    """One row of TERMS, from which the scripts derive options, log columns, the warm-up and the candidate paths.

    The default weight of a term is 0 if the chosen method in a script's METHODS does not include it.
    """

    function: Callable[[Flow, Tensor, KL], Tensor]
    delta: int | None = None  # the direction of the mixed paths it reads; None if it reads no mixed path
    compares_features: bool = False  # has weight w_l2, warmed up; without `delta` it needs every bridge s2t


TERMS: dict[str, Term] = {
    "task": Term(l_task),
    "kd": Term(l_kd),
    "app": Term(l_app, compares_features=True),
    "func_l2": Term(l_func_l2, delta=1, compares_features=True),
    "func_kl": Term(l_func_kl, delta=1),
    "func_prime": Term(l_func_prime, delta=0),
    "func_partial": Term(l_func_partial, delta=1, compares_features=True),
    "func_prime_l2": Term(l_func_prime_l2, delta=0, compares_features=True),
}
EQ_9 = ("task", "kd", "app", "func_l2", "func_kl", "func_prime")  # the terms of the method; the others are variants


def fcfd_terms(
    flow: Flow,
    labels: Tensor,
    temperature: float,
    terms: Iterable[str] = EQ_9,
    kd_loss: Callable[[Tensor, Tensor, float], Tensor] = losses.kl,
    table: Mapping[str, Term] = TERMS,
) -> dict[str, Tensor]:
    """The unweighted loss terms of a step, float32 scalars by name.

    Args:
        labels: [B], class indices.
        temperature: T, which divides the logits in every KL.
        terms: names in `table`, such as the keys of a dictionary of weights.
        kd_loss: (logits, target, temperature) -> scalar; compares logits in kd, func_kl and func_prime. Another
            loss, such as DKD (App. C.1), replaces KL in all three.
    """

    def kl(logits: Tensor, target: Tensor) -> Tensor:
        return kd_loss(logits, target, temperature)

    return {name: table[name].function(flow, labels, kl) for name in terms}


def _paths(flow: Flow, delta: int) -> dict[MixedPath, MixedFlow]:
    return {path: mixed for path, mixed in flow.mixed.items() if path.delta == delta}


def _sum(flow: Flow, values: Iterable[Tensor]) -> Tensor:
    """The sum of `values`; zero if there are none."""
    return sum(values, start=flow.student_logits.new_zeros((), dtype=torch.float32))
