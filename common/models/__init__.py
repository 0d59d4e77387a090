"""Staged networks, by name. A family is imported when one of its networks is built.

Parameter names match the widely used CIFAR checkpoints and, for the ImageNet ResNets, torchvision's.
"""

from collections.abc import Mapping
from importlib import import_module

from .staged import StagedNet, Taps, pool

__all__ = ["IMAGENET_NETWORKS", "NETWORKS", "StagedNet", "Taps", "build", "build_imagenet", "pool"]

# name -> (module, class, arguments that precede num_classes)
NETWORKS: dict[str, tuple] = {
    **{f"resnet{d}": ("resnet", "ResNet", d, (16, 16, 32, 64)) for d in (8, 14, 20, 32, 56, 110)},
    **{f"resnet{d}x4": ("resnet", "ResNet", d, (32, 64, 128, 256)) for d in (8, 32)},
    **{f"wrn_{d}_{w}": ("wrn", "WideResNet", d, w) for d in (16, 40) for w in (1, 2)},
    "vgg8": ("vgg", "VGG", 1),
    "vgg13": ("vgg", "VGG", 2),
    "ResNet50": ("resnet50", "ResNet50"),
    "MobileNetV2": ("mobilenetv2", "MobileNetV2"),
    "ShuffleV1": ("shufflenet", "ShuffleV1"),
    "ShuffleV2": ("shufflenet", "ShuffleV2"),
}
IMAGENET_NETWORKS: dict[str, tuple] = {
    **{f"resnet{d}": ("imagenet_resnet", "ImageNetResNet", f"resnet{d}") for d in (18, 34, 50)},
    "MobileNetV1": ("mobilenetv1", "MobileNetV1"),
}


def build(name: str, num_classes: int, networks: Mapping[str, tuple] = NETWORKS) -> StagedNet:
    """A CIFAR network with plain nn.BatchNorm2d layers, initialized from PyTorch's global generator.

    Raises:
        ValueError: unknown name.
    """
    if name not in networks:
        raise ValueError(f"unknown network {name!r}: choose from {', '.join(networks)}")
    module, cls, *arguments = networks[name]
    return getattr(import_module(f".{module}", __package__), cls)(*arguments, num_classes)


def build_imagenet(name: str, num_classes: int) -> StagedNet:
    """Like `build`, for an ImageNet network; all have five stages."""
    return build(name, num_classes, IMAGENET_NETWORKS)
