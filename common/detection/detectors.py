"""torchvision's Faster R-CNN with FPN on four backbones."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

LEVELS = ("0", "1", "2", "3", "pool")  # of the FPN, with torchvision's names: strides 4, 8, 16, 32 and 64
ROI_LEVELS = LEVELS[:4]  # read by the ROI heads
CHANNELS = 256  # of each level
MAX_SIZE = 1333  # pixels: the limit of an image's longer side after resizing


class FrozenBatchNorm(FrozenBatchNorm2d):
    """Returns the dtype of its input: torchvision's layer returns float32 for half precision under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def _resnet(name: str) -> Callable[[type[nn.Module], bool], BackboneWithFPN]:
    def build(norm: type[nn.Module], frozen: bool) -> BackboneWithFPN:
        trainable = 3 if frozen else 5  # the last of stem and layer1..4
        return resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=norm, trainable_layers=trainable)

    return build


def _mobilenet_v2(norm: type[nn.Module], frozen: bool) -> BackboneWithFPN:
    """Width 1; the FPN takes the output of the last block at each resolution: 24, 32, 96 and 320 channels."""
    features = models.mobilenet_v2(weights=None, norm_layer=norm).features
    ends = {"3": "0", "6": "1", "13": "2", "17": "3"}
    return BackboneWithFPN(features, ends, [24, 32, 96, 320], CHANNELS)


DETECTORS = {**{name: _resnet(name) for name in ("resnet18", "resnet50", "resnet101")}, "mobilenet_v2": _mobilenet_v2}


def build_detector(
    name: str, num_classes: int, min_sizes: list[int], rois: int = 512, scratch: bool = False
) -> FasterRCNN:
    """A detector with random weights from PyTorch's global generator and torchvision's parameter names.

    Args:
        name: a backbone in DETECTORS. It has FrozenBatchNorm; a ResNet's stem and layer1 are frozen.
        num_classes: K, without the background.
        min_sizes: pixels. An image's shorter side is resized to a random one of them in training, to the largest in
            evaluation.
        rois: proposals per image sampled to train the ROI heads.
        scratch: ordinary BatchNorm, and nothing frozen.
    """
    net = FasterRCNN(
        DETECTORS[name](nn.BatchNorm2d if scratch else FrozenBatchNorm, not scratch),
        num_classes + 1,
        min_size=sorted(min_sizes),  # torchvision evaluates at the last one
        max_size=MAX_SIZE,
        rpn_post_nms_top_n_train=1000,
        box_batch_size_per_image=rois,
    )
    _keep_boxes_float32(net)
    return net


def _keep_boxes_float32(net: FasterRCNN) -> None:
    """Make torchvision compute boxes and scores in float32 under autocast.

    torchvision computes anchors in the dtype of the levels, and boxes and scores in that of the heads' outputs.
    """

    def float32(level: Tensor) -> Tensor:  # only dtype, device and shape matter; it takes the memory of one element
        return level.new_empty(1, dtype=torch.float32).expand(level.shape)

    net.rpn.anchor_generator.register_forward_pre_hook(lambda _, inputs: (inputs[0], [float32(x) for x in inputs[1]]))
    net.rpn.head.register_forward_hook(lambda _, __, outputs: tuple([x.float() for x in levels] for levels in outputs))
    net.roi_heads.box_predictor.register_forward_hook(lambda _, __, outputs: tuple(x.float() for x in outputs))


def decay_all_but_norms(net: nn.Module) -> list[dict]:
    """Parameter groups of the trainable parameters: BatchNorm parameters get no weight decay, all others do."""
    norms = {p for layer in net.modules() if isinstance(layer, nn.BatchNorm2d) for p in layer.parameters()}
    trainable = [p for p in net.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p not in norms]},
        {"params": [p for p in trainable if p in norms], "weight_decay": 0.0},
    ]
