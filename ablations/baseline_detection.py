"""Published distillation methods for detectors, to compare FCFD with (Tab. 3).

    python ablations/baseline_detection.py --method reviewkd --data-dir COCO --teacher resnet101 --student resnet18
    python ablations/baseline_detection.py --method fgfi --data-dir COCO --teacher resnet101 --student resnet50

reviewkd  Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021
fgfi      Wang, Yuan, Zhang, Feng: Distilling Object Detectors with Fine-grained Feature Imitation, CVPR 2019

The training loop, the options and the files are those of detection.py, which also trains the teacher and tests a
student (--evaluate). The loss is L_task + weight * the method's loss between the five levels of the FPNs. The methods
are in ablations/baselines/.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

import detection
from ablations.baselines.fgfi import FGFI, imitation_masks
from ablations.baselines.reviewkd import ReviewKD
from ablations.baselines.settings import SETTINGS, of_pair
from common.detection.detectors import CHANNELS, LEVELS
from common.detection.evaluation import require_pycocotools
from common.detection.options import add_options
from common.run.device import AMP, open_device
from common.run.distributed import rank
from common.run.errors import exit_code
from common.run.options import Parser, set_defaults
from common.run.run import stored_options
from common.run.torchrun import process_group
from common.run.types import weight

SCRIPT = "baseline_detection"  # in last.pt
METHODS = SETTINGS["detection"]


def parse_args(argv: list[str] | None = None, stored: dict | None = None) -> Namespace:
    """Parse the options; defaults are those `stored` by the run being resumed, then the published settings."""
    parser = Parser(__doc__)
    add = add_options(parser).add_argument
    add("--method", choices=METHODS, required=True, help="see docs/detection.md")
    add("--weight", type=weight, metavar="W", help="of the method's loss (default: the pair's)")
    args = parser.parse(argv, stored)
    if not args.teacher:
        parser.error("--teacher is required")
    if detection.resolve(parser, args, stored):
        pair = f"{args.teacher}-{args.student}"
        set_defaults(args, weight=of_pair(METHODS[args.method]["weight"], pair, args.student))
    return args


class Step(nn.Module):
    """L_task and the method's loss of a batch; see detection.Step."""

    columns = ("task", "distill")

    def __init__(self, args: Namespace, student: FasterRCNN, teacher: FasterRCNN):
        super().__init__()
        self.student, self.teacher = student, teacher
        channels = [CHANNELS] * len(LEVELS)
        self.method = FGFI(len(LEVELS), CHANNELS) if args.method == "fgfi" else ReviewKD(channels, channels, CHANNELS)
        self.parts = {"method": self.method}
        self.weight, self.amp = args.weight, AMP[args.amp]
        part = min(1, args.iterations / detection.SETTINGS["iterations"])
        self.start = round(METHODS[args.method].get("start", 0) * part)

    def weights(self, iteration: int) -> dict[str, float]:
        return {"task": 1.0, "distill": self.weight if iteration >= self.start else 0.0}

    def train(self, mode: bool = True) -> "Step":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The unweighted terms, and the four losses that make up L_task."""
        with torch.autocast(images[0].device.type, self.amp, enabled=self.amp is not None):
            batch, targets = self.student.transform(images, targets)
            levels = self.student.backbone(batch.tensors)
            proposals, losses = self.student.rpn(batch, levels, targets)
            losses |= self.student.roi_heads(levels, proposals, batch.image_sizes, targets)[1]
            with torch.no_grad():
                levels_t = self.teacher.backbone(batch.tensors)

            levels_s, levels_t = ([pyramid[name] for name in LEVELS] for pyramid in (levels, levels_t))
            if isinstance(self.method, FGFI):
                anchors = self.student.rpn.anchor_generator(batch, levels_s)
                boxes, sizes = [target["boxes"] for target in targets], [level.shape[2:] for level in levels_s]
                distill = self.method(levels_s, levels_t, imitation_masks(anchors, boxes, sizes))
            else:
                distill = self.method.review(levels_s, levels_t)
        task = sum(loss.float() for loss in losses.values())
        return {"task": task, "distill": distill} | {name: loss.detach() for name, loss in losses.items()}


def main(argv: list[str] | None = None) -> int:
    """Train, and return the exit code."""

    def script() -> None:
        args = parse_args(argv)
        require_pycocotools()
        with process_group(args.device) as name:
            device = open_device(name, fixed_size=False)
            if args.resume:
                args = parse_args(argv, stored_options(args, SCRIPT, "iteration") | {"device": args.device})
            pair = f"{args.teacher}-{args.student}"
            if pair not in METHODS[args.method]["weight"]:
                print(f"setting not published: {args.method}'s weight for {pair}; using {args.weight:g}")
            detection.train(args, device, Step, SCRIPT)

    return exit_code(script, detection.INTERRUPTED, rank(), smaller="smaller images (--min-size)")


if __name__ == "__main__":
    sys.exit(main())
