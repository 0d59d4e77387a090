"""The methods that FCFD is compared with on ImageNet (Tab. 2), each with its published settings.

    python ablations/baseline_imagenet.py --data-dir DIR --method at --teacher resnet34 --student resnet18
    torchrun --nproc_per_node=8 ablations/baseline_imagenet.py ...      on eight GPUs; not with crd

Each method is one file in ablations/baselines/, and settings.yaml there holds the settings. The loss is --w-task *
cross entropy + --weight * the method's loss. The training loop, the data and the teacher are those of imagenet.py, and
`imagenet.py --student NAME --evaluate FILE` tests the students. See docs/baselines.md.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import imagenet
from ablations.baseline_cifar100 import loss_terms
from ablations.baselines import settings
from ablations.baselines.batch import Batch
from ablations.baselines.build import build_method
from common.data.image_files import FileData, Shard
from common.models import IMAGENET_NETWORKS, build_imagenet
from common.randomness import derive_seed
from common.run.device import AMP, open_device
from common.run.distributed import rank, world_size
from common.run.earlier_runs import default_out
from common.run.errors import exit_code
from common.run.options import Parser, set_defaults
from common.run.run import stored_options
from common.run.torchrun import process_group

SCRIPT = "baseline_imagenet"


def parse_args(argv: list[str] | None = None, stored: dict | None = None) -> Namespace:
    """Parse the options; defaults are those `stored` by the run being resumed, then the published settings."""
    parser = Parser(__doc__)
    distillation = settings.add_options(parser, "imagenet", IMAGENET_NETWORKS)
    distillation.add_argument("--teacher-ckpt", metavar="FILE", help="default: torchvision's IMAGENET1K_V1")
    imagenet.add_shared_options(parser)
    args = parser.parse(argv, stored)

    set_defaults(args, epochs=settings.SETTINGS["imagenet"]["recipe"]["epochs"])  # for the name of the folder
    args.out = args.out or default_out(run_name(args), args)
    if args.resume and stored is None:
        return args  # main() reads the stored options once the ranks can communicate
    settings.resolve(args, "imagenet", parser, distillation, stored)
    if args.method == "crd" and world_size() > 1:
        parser.error("--method crd runs in one process, since every batch updates its memory banks: omit torchrun")
    return args


def run_name(args: Namespace) -> str:
    """The name of the default output folder."""
    return imagenet.run_name(Namespace(**vars(args) | {"method": f"baseline-{args.method}"}))


class Step(nn.Module):
    """The networks and the loss of a method; used like imagenet.Step.

    Raises:
        ValueError: the networks or the labels do not fit the method.
    """

    columns = ("task", "distill")

    def __init__(self, args: Namespace, data: FileData):
        super().__init__()
        self.args, self.amp, self.name, self.candidates = args, AMP[args.amp], run_name(args), []
        self.notes = [note for note in (settings.summary(args), settings.notice(args, "imagenet")) if note]
        nesterov = args.optimizer == "nesterov"
        self.sgd_options = {"momentum": 0.9, "weight_decay": args.weight_decay, "nesterov": nesterov}
        torch.manual_seed(args.seed)  # the same initial student for every method and in imagenet.py
        self.student = build_imagenet(args.student, len(data.classes))
        self.teacher = build_imagenet(args.teacher, len(data.classes)).requires_grad_(False)
        labels = torch.tensor([label for _, label in data.train])
        self.method = build_method(args, self.student, self.teacher, args.image_size, labels)
        # The features do not depend on the student's classifier.
        self.some_unused = not args.w_task and args.method not in ("kd", "dkd")

    def epoch(self, shard: Shard) -> tuple[float, dict[str, float], list[tuple[Tensor, torch.Generator]]]:
        """The learning rate and the weights of the terms, and for each step the other fields of its `Batch`."""
        lr = settings.learning_rate(self.args, "imagenet", shard.epoch)
        weight = self.args.weight * settings.ramp(self.args, "imagenet", shard.epoch)
        generator = torch.Generator(self.student.classifier_layer.weight.device)
        generator.manual_seed(derive_seed(self.args.seed, shard.epoch, "negatives"))
        return lr, {"task": self.args.w_task, "distill": weight}, [(index, generator) for index in indices(shard)]

    def forward(
        self, images: Tensor, labels: Tensor, inputs: tuple[Tensor, torch.Generator]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The unweighted terms, means over these images, and the number of correct predictions."""
        index, generator = inputs
        batch = Batch(labels, index.to(images.device, non_blocking=True), generator)
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            terms, logits = loss_terms(self.method, self.student, self.teacher, images, batch, self.args)
        return terms, (logits.detach().argmax(1) == labels).sum()


def indices(shard: Shard) -> list[Tensor]:
    """The indices of each batch of an epoch among the training images."""
    return [torch.tensor([index for _, index in batch]) for batch in shard]


def train(args: Namespace, device: torch.device) -> None:
    """Train until the last epoch or the time limit."""
    imagenet.train(args, device, Step, SCRIPT)


def main(argv: list[str] | None = None) -> int:
    """Train, and return the exit code."""

    def script() -> None:
        args = parse_args(argv)
        with process_group(args.device) as name:
            device = open_device(name)
            if args.resume:
                args = parse_args(argv, stored_options(args, SCRIPT) | {"device": args.device})
            train(args, device)

    return exit_code(script, rank=rank(), smaller="a smaller --image-size")


if __name__ == "__main__":
    sys.exit(main())
