"""Staged networks. Parameters carry the names of checkpoints that people have.

Those for 32x32 images carry the names of the field's shared CIFAR checkpoints, ImageNet's ResNets torchvision's.
"""

import difflib
from collections.abc import Callable

from ..run.errors import UserError
from .imagenet_resnet import ImageNetResNet
from .mobilenetv1 import MobileNetV1
from .mobilenetv2 import MobileNetV2
from .resnet import ResNet
from .resnet50 import ResNet50
from .shufflenet import ShuffleV1, ShuffleV2
from .staged import StagedNet, pool
from .vgg import VGG
from .wrn import WideResNet

__all__ = ["IMAGENET_NETWORKS", "NETWORKS", "StagedNet", "build", "build_imagenet", "check_name", "pool"]

Networks = dict[str, Callable[[int], StagedNet]]  # name -> function of the number of classes

NETWORKS: Networks = {
    **{f"resnet{d}": (lambda n, d=d: ResNet(d, (16, 16, 32, 64), n)) for d in (8, 14, 20, 32, 56, 110)},
    **{f"resnet{d}x4": (lambda n, d=d: ResNet(d, (32, 64, 128, 256), n)) for d in (8, 32)},
    **{f"wrn_{d}_{w}": (lambda n, d=d, w=w: WideResNet(d, w, n)) for d in (16, 40) for w in (1, 2)},
    "vgg8": lambda n: VGG(1, n),
    "vgg13": lambda n: VGG(2, n),
    "ResNet50": ResNet50,
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleV1,
    "ShuffleV2": ShuffleV2,
}
IMAGENET_NETWORKS: Networks = {
    **{f"resnet{d}": (lambda n, d=d: ImageNetResNet(f"resnet{d}", n)) for d in (18, 34, 50)},
    "MobileNetV1": MobileNetV1,
}


def check_name(name: str, networks: Networks = NETWORKS) -> None:
    """Raise a UserError that lists the nearest names if there is no network of this name."""
    if name not in networks:
        spelled = {known.lower(): known for known in networks}
        near = [spelled[n] for n in difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(networks)}"
        raise UserError(f"unknown network {name!r}: {hint}")


def build(name: str, num_classes: int) -> StagedNet:
    """A CIFAR network with fresh weights from PyTorch's global generator, BatchNorm as plain nn.BatchNorm2d.

    Raises:
        UserError: no network of that name.
    """
    check_name(name)
    return NETWORKS[name](num_classes)


def build_imagenet(name: str, num_classes: int) -> StagedNet:
    """An ImageNet network of five stages with fresh weights from PyTorch's global generator, BatchNorm plain.

    Raises:
        UserError: no network of that name.
    """
    check_name(name, IMAGENET_NETWORKS)
    return IMAGENET_NETWORKS[name](num_classes)
