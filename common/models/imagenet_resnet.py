"""torchvision's resnet18, resnet34 and resnet50 split into stages, with torchvision's parameter names."""

from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import Bottleneck

from .staged import StagedNet, tap_last


class ImageNetResNet(StagedNet):
    """Stages: stem with pooling | layer1 | layer2 | layer3 | layer4. Features are post-ReLU."""

    num_stages = 5
    post_relu = True

    def __init__(self, name: str, num_classes: int):
        super().__init__()
        for child, module in models.get_model(name, weights=None, num_classes=num_classes).named_children():
            self.add_module(child, module)

    def stage(self, k: int, x: Tensor) -> Tensor:
        if k == 1:
            return self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return getattr(self, f"layer{k - 1}")(x)

    def tap(self, k: int, x: Tensor, pre_relu: bool) -> tuple[Tensor, Tensor]:
        *blocks, last = getattr(self, f"layer{k - 1}")
        return tap_last(before_relu(last, nn.Sequential(*blocks)(x)), pre_relu)

    @property
    def classifier_layer(self) -> nn.Linear:
        return self.fc


def before_relu(block: nn.Module, x: Tensor) -> Tensor:
    """The output of torchvision's BasicBlock or Bottleneck before its last ReLU."""
    out = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    if isinstance(block, Bottleneck):
        out = block.bn3(block.conv3(block.relu(out)))
    return out + (x if block.downsample is None else block.downsample(x))
