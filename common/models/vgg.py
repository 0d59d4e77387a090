"""VGG with BatchNorm for 32x32 images: vgg8 and vgg13."""

import torch.nn.functional as F
from torch import Tensor, nn

from .staged import StagedNet, init_classifier, init_fan_out

WIDTHS = (64, 128, 256, 512, 512)


class VGG(StagedNet):
    """Five stages of convolutions at 32, 16, 8, 4 and 4 pixels. Features are pre-ReLU."""

    num_stages = 5
    post_relu = False

    def __init__(self, convs_per_stage: int, num_classes: int):
        super().__init__()
        c_in = 3
        for i, width in enumerate(WIDTHS):
            layers = []
            for _ in range(convs_per_stage):
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                c_in = width
            setattr(self, f"block{i}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(c_in, num_classes)
        init_fan_out(self)
        init_classifier(self.classifier)

    def stage(self, k: int, x: Tensor) -> Tensor:
        if k > 1:
            x = F.relu(x)
        if 1 < k < 5:
            x = F.max_pool2d(x, 2)
        return getattr(self, f"block{k - 1}")(x)

    @property
    def classifier_layer(self) -> nn.Linear:
        return self.classifier
