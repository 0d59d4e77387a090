"""FCFD for two-stage detectors with a feature pyramid (App. D, Eqs. 11-19): forward passes and losses of a step.

A detector is a backbone with a feature pyramid network (FPN), which computes five levels of features; an RPN, which
proposes boxes on them; and an ROI head, which reads four of the levels inside each proposal and outputs class logits
and box offsets. The levels take the role of stage features, and the ROI head that of the later stages and the
classifier. R denotes the proposals sampled to train the student's own ROI head, and their number. On these, each step
computes

    two pure outputs     teacher levels -> teacher ROI head      student levels -> student ROI head
    two mixed outputs    student levels -> s2t bridges -> teacher ROI head
                         teacher levels -> t2s bridges -> student ROI head

All four are computed in every step: with only one position to switch networks, no paths are sampled. ROI heads have no
BatchNorm, so they need no per-path statistics. In every term except task, the target is the teacher's own
levels or output, detached in common/losses.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import fastrcnn_loss

from ..bridges import Bridges, bridge
from ..losses import kl, l2
from .detectors import CHANNELS, LEVELS, ROI_LEVELS

TERMS = ("task", "kd", "app", "func", "func_prime")
TASK_LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")  # torchvision's names
Levels = dict[str, Tensor]  # level -> [B, 256, H, W]


class RoiOutput(NamedTuple):
    """Output of an ROI head for the R proposals of a batch; class 0 is the background."""

    logits: Tensor  # [R, K + 1]
    offsets: Tensor  # [R, 4 (K + 1)]: dx, dy, dw, dh per class in units of torchvision's box coder, not pixels


@dataclass
class Flow:
    """Features and outputs of a step, and the task losses."""

    task: dict[str, Tensor]  # TASK_LOSSES
    student: Levels
    student_output: RoiOutput
    teacher: Levels = field(default_factory=dict)
    teacher_output: RoiOutput | None = None
    s2t: Levels = field(default_factory=dict)  # the student's levels in the teacher's space
    t2s: Levels = field(default_factory=dict)  # the teacher's levels in the student's space
    s2t_output: RoiOutput | None = None  # the teacher's ROI head on s2t
    t2s_output: RoiOutput | None = None  # the student's ROI head on t2s


def level_bridges(terms: Iterable[str] = TERMS) -> Bridges:
    """The bridges that `terms` need, each a 3x3 convolution without bias and a BatchNorm.

    There is no activation because FPN levels are linear outputs. ROI heads do not read the fifth level: only L_app
    uses its s2t bridge, and it has no t2s bridge.
    """
    shape = torch.Size((CHANNELS, 1, 1))  # any size, as both networks have the same
    s2t = LEVELS if "app" in terms else ROI_LEVELS if "func" in terms else ()
    t2s = ROI_LEVELS if "func_prime" in terms else ()
    return Bridges(*({level: bridge(shape, shape, post_relu=False) for level in levels} for levels in (s2t, t2s)))


def forward_detectors(
    teacher: FasterRCNN | None,
    student: FasterRCNN,
    bridges: Bridges | None,
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
    terms: Iterable[str] = TERMS,
) -> Flow:
    """Run a batch through both detectors and the mixed paths that `terms` need; other fields stay empty.

    Args:
        teacher: frozen and in evaluation mode; L_func's gradient passes through its ROI head to the bridges. None to
            train a detector alone: then `bridges` is None and `terms` is ("task",).
        student: in training mode. Its transform resizes and normalizes the images for both.
        bridges: from `level_bridges` for these terms.
        images: float32 [3, H, W] in 0..1, of any sizes.
        targets: for each image, "boxes" [n, 4] as (x1, y1, x2, y2) in pixels and "labels" [n] in 1..K; n may be 0.
    """
    batch, targets = student.transform(images, targets)
    levels = student.backbone(batch.tensors)
    proposals, task = student.rpn(batch, levels, targets)
    # R: a mix of positive and negative proposals for each image, with the task's targets for the ROI head.
    proposals, _, target_labels, target_offsets = student.roi_heads.select_training_samples(proposals, targets)

    def roi_output(detector: FasterRCNN, pyramid: Levels) -> RoiOutput:
        heads = detector.roi_heads
        features = heads.box_head(heads.box_roi_pool(pyramid, proposals, batch.image_sizes))
        return RoiOutput(*heads.box_predictor(features))

    flow = Flow(task, levels, roi_output(student, levels))
    flow.task["loss_classifier"], flow.task["loss_box_reg"] = fastrcnn_loss(
        *flow.student_output, target_labels, target_offsets
    )
    if teacher is None:
        return flow

    with torch.no_grad():
        flow.teacher = teacher.backbone(batch.tensors)
        flow.teacher_output = roi_output(teacher, flow.teacher)
    if bridges is not None:
        flow.s2t = {level: net(flow.student[level]) for level, net in bridges.s2t.items()}
        flow.t2s = {level: net(flow.teacher[level]) for level, net in bridges.t2s.items()}
    if "func" in terms:
        flow.s2t_output = roi_output(teacher, flow.s2t)
    if "func_prime" in terms:
        flow.t2s_output = roi_output(student, flow.t2s)
    return flow


def detection_terms(flow: Flow, temperature: float = 1.0, terms: Iterable[str] = TERMS) -> dict[str, Tensor]:
    """The unweighted terms of the loss, float32 scalars.

    task is the sum of the four losses of Faster R-CNN. The others are those of Eqs. 5 to 7 and L_kd, with levels in
    place of stages and ROI heads in place of classifiers:

    app: L2 between the bridged student level and the teacher's, summed over all five levels.
    kd, func, func_prime: `distance` from the teacher's own output to the student's own (kd), to that of the teacher's
        ROI head on the student's levels (func), and to that of the student's ROI head on the teacher's (func_prime).
    """
    target = flow.teacher_output
    compute = {
        "task": lambda: sum(loss.float() for loss in flow.task.values()),
        "kd": lambda: distance(flow.student_output, target, temperature),
        "app": lambda: sum(l2(flow.s2t[level], flow.teacher[level]) for level in LEVELS),
        "func": lambda: distance(flow.s2t_output, target, temperature),
        "func_prime": lambda: distance(flow.t2s_output, target, temperature),
    }
    return {name: compute[name]() for name in terms}


def distance(output: RoiOutput, target: RoiOutput, temperature: float = 1.0) -> Tensor:
    """KL of the class logits, averaged over proposals, plus L2 of the box offsets, averaged over all elements.

    Only offsets of the K classes are used. torchvision's ROI head also has four for the background, which are not
    trained or used.
    """
    return kl(output.logits, target.logits, temperature) + l2(output.offsets[:, 4:], target.offsets[:, 4:])
