"""FCFD for two-stage detectors with a feature pyramid (App. D, Eqs. 11-19): what flows in a step, and its losses.

A detector is a backbone with a feature pyramid (FPN), which makes five levels of features; an RPN, which proposes boxes
on them; and a ROI head, which reads four of the levels inside each proposal and answers with class logits and box
offsets. So the levels take the place of the stages' features, and the ROI head that of the later stages and the
classifier. In a step, on the same proposals R (which also stands for their number), those that are sampled for the
student's own training,

    two pure answers    teacher's levels -> teacher's ROI head      student's levels -> student's ROI head
    two mixed ones      student's levels -> bridges s2t -> teacher's ROI head
                        teacher's levels -> bridges t2s -> student's ROI head

All of them are computed in every step: no paths are sampled, for there is one place alone to change networks at. ROI
heads have no BatchNorm, so no statistics per path are needed. In every term but the task's the target is the teacher's
own levels or own answer, detached (in common/losses.py).
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
TASK_LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")  # a Faster R-CNN's own
Levels = dict[str, Tensor]  # level -> [B, 256, H, W]


class Answer(NamedTuple):
    """What a ROI head says of the R proposals of a batch; class 0 is the background."""

    logits: Tensor  # [R, K + 1]
    offsets: Tensor  # [R, 4 (K + 1)]: for each class dx, dy, dw, dh in units of torchvision's box coder, not pixels


@dataclass
class Flow:
    """Everything that flowed in a step."""

    task: dict[str, Tensor]  # TASK_LOSSES
    student: Levels
    student_answer: Answer
    teacher: Levels = field(default_factory=dict)
    teacher_answer: Answer | None = None
    s2t: Levels = field(default_factory=dict)  # the student's levels in the teacher's space
    t2s: Levels = field(default_factory=dict)  # the teacher's levels in the student's space
    s2t_answer: Answer | None = None  # the teacher's ROI head on s2t
    t2s_answer: Answer | None = None  # the student's ROI head on t2s


def level_bridges(terms: Iterable[str] = TERMS) -> Bridges:
    """The same-size bridges that these terms need: 3x3 convolution without bias and BatchNorm, no activation.

    FPN levels are linear outputs, hence no activation. No ROI head reads the fifth level: its s2t bridge has L_app
    alone, and it has no t2s bridge.
    """
    shape = torch.Size((CHANNELS, 1, 1))  # any size: it is the same on both sides
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
    """Run a batch through both detectors and the mixed paths that `terms` need; what they do not need stays empty.

    Args:
        teacher: frozen, and in evaluation mode; L_func's gradient passes through its ROI head to the bridges. None for
            a detector that is trained alone: then `bridges` is None and `terms` is ("task",).
        student: in training mode. Its transform resizes and normalises the images for both.
        bridges: as `level_bridges` makes them for these terms.
        images: float32 [3, H, W] in 0..1, of any sizes.
        targets: for each image "boxes" [n, 4] as (x1, y1, x2, y2) in pixels and "labels" [n] in 1..K; n may be 0.
    """
    batch, targets = student.transform(images, targets)
    levels = student.backbone(batch.tensors)
    proposals, task = student.rpn(batch, levels, targets)
    # R: for each image a mix of good and bad proposals, with what the task wants the ROI head to say of them.
    proposals, _, true_labels, true_offsets = student.roi_heads.select_training_samples(proposals, targets)

    def answer(detector: FasterRCNN, pyramid: Levels) -> Answer:
        heads = detector.roi_heads
        return Answer(*heads.box_predictor(heads.box_head(heads.box_roi_pool(pyramid, proposals, batch.image_sizes))))

    flow = Flow(task, levels, answer(student, levels))
    flow.task["loss_classifier"], flow.task["loss_box_reg"] = fastrcnn_loss(
        *flow.student_answer, true_labels, true_offsets
    )
    if teacher is None:
        return flow

    with torch.no_grad():
        flow.teacher = teacher.backbone(batch.tensors)
        flow.teacher_answer = answer(teacher, flow.teacher)
    if bridges is not None:
        flow.s2t = {level: net(flow.student[level]) for level, net in bridges.s2t.items()}
        flow.t2s = {level: net(flow.teacher[level]) for level, net in bridges.t2s.items()}
    if "func" in terms:
        flow.s2t_answer = answer(teacher, flow.s2t)
    if "func_prime" in terms:
        flow.t2s_answer = answer(student, flow.t2s)
    return flow


def detection_terms(flow: Flow, temperature: float = 1.0, terms: Iterable[str] = TERMS) -> dict[str, Tensor]:
    """The terms of the loss before weighting, float32 scalars.

    task is the sum of the four losses of a Faster R-CNN. The others are Eqs. 5 to 7 and L_kd again, with levels for
    stages and ROI heads for classifiers:

    app: L2 between the bridged student level and the teacher's, summed over all five levels.
    kd, func, func_prime: how far an answer is from the teacher's own: the student's own one, that of the teacher's ROI
        head to the student's levels, and that of the student's ROI head to the teacher's levels.
    """
    target = flow.teacher_answer
    compute = {
        "task": lambda: sum(loss.float() for loss in flow.task.values()),
        "kd": lambda: distance(flow.student_answer, target, temperature),
        "app": lambda: sum(l2(flow.s2t[level], flow.teacher[level]) for level in LEVELS),
        "func": lambda: distance(flow.s2t_answer, target, temperature),
        "func_prime": lambda: distance(flow.t2s_answer, target, temperature),
    }
    return {name: compute[name]() for name in terms}


def distance(answer: Answer, target: Answer, temperature: float = 1.0) -> Tensor:
    """KL of the class logits, the mean over proposals, plus L2 of the box offsets, the mean over all their elements.

    The offsets are those of the K classes. torchvision's ROI head has four for the background too, which are left out:
    nothing trains or reads them.
    """
    return kl(answer.logits, target.logits, temperature) + l2(answer.offsets[:, 4:], target.offsets[:, 4:])
