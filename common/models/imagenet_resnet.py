"""torchvision's resnet18, resnet34 and resnet50 split into stages, with torchvision's parameter names."""

from torch import Tensor, nn
from torchvision import models

from .staged import StagedNet


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

    @property
    def classifier_layer(self) -> nn.Linear:
        return self.fc
