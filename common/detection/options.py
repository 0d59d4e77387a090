"""Command-line options that detection.py shares with ablations/baseline_detection.py."""

import argparse

from ..run.options import PUBLISHED, Parser
from ..run.torchrun import default_workers
from ..run.types import count, name_in, number, positive
from .detectors import DETECTORS

SETTINGS = PUBLISHED["detection"]


def add_options(parser: Parser) -> argparse._ArgumentGroup:
    """Add them; returns the group of those about distillation."""
    add = parser.add_argument
    add("--data-dir", default="data/coco", metavar="DIR", help="a dataset in COCO's format")
    add("--student", type=name_in(DETECTORS), required=True, metavar="NAME", help=", ".join(DETECTORS))
    add("--teacher", type=name_in(DETECTORS), metavar="NAME", help="without it, detection.py trains --student alone")
    add("--backbone-ckpt", metavar="FILE", help="classifier for the student's backbone (default: torchvision's)")
    add("--scratch", action="store_true", help="random weights, ordinary BatchNorm, nothing frozen")
    add("--subset", type=count, metavar="N", help="train on N images, spread evenly over the dataset")
    add("--test-subset", type=count, metavar="N", help="test on N images, spread evenly over the dataset")
    sizes = {"type": number(int, 96, 1333), "nargs": "+", "default": SETTINGS["min_size"]}
    add("--min-size", **sizes, metavar="PIXELS", help="shorter sides in training; tests use the largest")
    add("--rois", type=count, default=SETTINGS["rois"], metavar="N", help="proposals per image that train the ROI head")
    add("--workers", type=number(int, 0, 1000), default=default_workers(), metavar="N", help="image readers per rank")
    add("--iterations", type=count, default=SETTINGS["iterations"], metavar="N", help="the schedule scales with it")
    add("--batch-size", type=count, default=SETTINGS["batch_size"], metavar="N", help="of all ranks together")
    add("--lr", type=positive, default=SETTINGS["lr"], help="after the warm-up")
    add("--milestones", type=count, nargs=2, metavar="N", help="iterations where lr drops (default: published, scaled)")
    add("--save-every", type=count, default=1000, metavar="N", help="save a checkpoint every N iterations")
    add("--eval-every", type=count, default=5000, metavar="N", help="test every N iterations and after the last one")
    add("--visualize", type=count, metavar="N", help="draw detections on N test images; saved to boxes/")
    distillation = parser.add_argument_group("distillation")
    add = distillation.add_argument
    add("--teacher-ckpt", metavar="FILE", help="default: an earlier run's, else torchvision's for resnet50")
    add("--inherit", action="store_true", help="start with the teacher's FPN, RPN and ROI head")
    parser.add_run_options(unit="iteration")
    return distillation
