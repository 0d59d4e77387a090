"""MobileNetV1 for ImageNet: 14 layers, width 1."""

from torch import Tensor, nn

from .staged import StagedNet, tap_last

# output channels and stride of the 13 depthwise separable layers after the stem
LAYERS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
# the layers of each stage, as [start, end)
STAGE_LAYERS = {1: (0, 1), 2: (1, 4), 3: (4, 6), 4: (6, 12), 5: (12, 14)}


def separable(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """A depthwise 3x3 and a 1x1 convolution, each followed by BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False),
        nn.BatchNorm2d(c_in),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_in, c_out, 1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


class MobileNetV1(StagedNet):
    """Stages: layers 0 | 1-3 | 4-5 | 6-11 | 12-13. Features are post-ReLU."""

    num_stages = 5
    post_relu = True

    def __init__(self, num_classes: int):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        layers, c_in = [stem], 32
        for c_out, stride in LAYERS:
            layers.append(separable(c_in, c_out, stride))
            c_in = c_out
        self.model = nn.Sequential(*layers)
        self.fc = nn.Linear(c_in, num_classes)

    def stage(self, k: int, x: Tensor) -> Tensor:
        for i in range(*STAGE_LAYERS[k]):
            x = self.model[i](x)
        return x

    def tap(self, k: int, x: Tensor, pre_relu: bool) -> tuple[Tensor, Tensor]:
        *layers, last = self.model[slice(*STAGE_LAYERS[k])]
        return tap_last(last[:-1](nn.Sequential(*layers)(x)), pre_relu)

    @property
    def classifier_layer(self) -> nn.Linear:
        return self.fc
