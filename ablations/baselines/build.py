"""Builds a method for two networks."""

import copy
from argparse import Namespace

import torch
from torch import Tensor, nn

from ablations.baselines.at import AT
from ablations.baselines.crd import CRD
from ablations.baselines.fitnet import FitNet
from ablations.baselines.kd import DKD, KD
from ablations.baselines.ofd import OFD, last_norms
from ablations.baselines.reviewkd import ReviewKD
from ablations.baselines.simkd import SimKD, StudentWithTeacherClassifier
from ablations.baselines.srrl import SRRL
from ablations.baselines.vid import VID
from common.models import StagedNet, Taps

ALL_STAGES = ("vid", "reviewkd")  # compare each stage with the teacher's


def build_student(student: StagedNet, teacher: StagedNet | None, method: str, image_size: int) -> nn.Module:
    """The network to train: the student, or with SimKD the student with its projector and the teacher's classifier.

    Raises:
        ValueError: the method compares each stage, but the networks have different numbers of stages.
    """
    if method in ALL_STAGES and student.num_stages != teacher.num_stages:
        raise ValueError(
            f"the teacher has {teacher.num_stages} stages and the student {student.num_stages}: choose two networks "
            "with the same number of stages"
        )
    if method != "simkd":
        return student
    shape_s, shape_t = shapes(student, image_size).features[-1].shape[1:], shapes(teacher, image_size).last.shape[1:]
    return StudentWithTeacherClassifier(student, teacher, shape_s, shape_t)


def build_method(args: Namespace, student: nn.Module, teacher: StagedNet, image_size: int, labels: Tensor) -> nn.Module:
    """The module that computes the loss: method(student's Taps, teacher's Taps, Batch) -> scalar.

    Its parameters are trained with the student's. Their initial values come from PyTorch's global generator.

    Args:
        args: the resolved settings (settings.py).
        student: the network to train (see `build_student`).
        labels: [n], of all training images.

    Raises:
        ValueError: the networks or the labels do not fit the method.
    """
    s, t = shapes(student, image_size, args.student_pre_relu), shapes(teacher, image_size, args.teacher_pre_relu)
    if args.method == "dkd" and t.logits.shape[1] < 2:
        raise ValueError("DKD needs at least two classes")
    c_s, c_t = ([feature.shape[1] for feature in taps.features] for taps in (s, t))
    build = {
        "kd": lambda: KD(args.temperature),
        "dkd": lambda: DKD(args.temperature, args.tckd, args.nckd),
        "fitnet": lambda: FitNet(s.features[1].shape[1:], t.features[1].shape[1:]),
        "vid": lambda: VID(c_s, c_t),
        "at": AT,
        "ofd": lambda: OFD(c_s, last_norms(teacher)),
        "srrl": lambda: SRRL(s.last.shape[1], t.last.shape[1], teacher.classifier_layer),
        "crd": lambda: CRD(s.pooled.shape[1], t.pooled.shape[1], labels, replacement=args.replacement),
        "reviewkd": lambda: ReviewKD([*c_s, s.pooled.shape[1]], [*c_t, t.pooled.shape[1]], args.c_mid),
        "simkd": SimKD,
    }
    return build[args.method]()


@torch.no_grad()
def shapes(net: nn.Module, image_size: int, pre_relu: bool = False) -> Taps:
    """The `Taps` of one image as meta tensors, for their shapes."""
    net = copy.deepcopy(net).to("meta").eval()
    return net.taps(torch.empty(1, 3, image_size, image_size, device="meta"), pre_relu)
