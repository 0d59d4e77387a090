"""FGFI (Wang, Yuan, Zhang, Feng: Distilling Object Detectors with Fine-grained Feature Imitation, CVPR 2019).

The student imitates the teacher's features only near objects, where an anchor overlaps a ground-truth box well. The
method was published for a single feature map; here every level of an FPN has its own anchors, mask and adaptation.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou


class FGFI(nn.Module):
    """The imitation loss between two detectors' levels.

    Args:
        levels: number of FPN levels.
        channels: number of channels of each level.
    """

    def __init__(self, levels: int, channels: int):
        super().__init__()
        self.adaptations = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()) for _ in range(levels)
        )
        for conv, _ in self.adaptations:
            nn.init.trunc_normal_(conv.weight, std=1e-4, a=-2e-4, b=2e-4)
            nn.init.zeros_(conv.bias)

    def forward(self, levels_s: list[Tensor], levels_t: list[Tensor], masks: list[Tensor]) -> Tensor:
        """L_imitation = 1 / (2 N) sum_ijc I_ij (f_adap(s)_ijc - t_ijc)^2, with mask I of N ones; 0 if N = 0.

        The sum and N are over all images and levels. The loss is not divided by the number of channels.

        Args:
            levels_s, levels_t: the student's and the teacher's, [B, C, H, W] each; the teacher's are detached.
            masks: from `imitation_masks`.
        """
        total = 0
        for adapt, feature, target, mask in zip(self.adaptations, levels_s, levels_t, masks, strict=True):
            difference = adapt(feature).float() - target.detach().float()
            total = total + (mask * difference.square().sum(1)).sum()
        positions = sum(mask.sum() for mask in masks)
        return total / (2 * positions.clamp(min=1))


def imitation_masks(
    anchors: list[Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]], threshold: float = 0.5
) -> list[Tensor]:
    """The positions to imitate near ground-truth boxes: for each level, float [B, H, W] of 0 and 1.

    A position is 1 if the IoU of any of its anchors with any box of the image exceeds `threshold` times that box's
    largest IoU. The largest is over the anchors of all levels, so a box is imitated at the levels that fit its size.

    Args:
        anchors: for each image [A, 4], as torchvision orders them: by level, row, column, and shape. Those that extend
            beyond the image count.
        boxes: for each image [n, 4]; n may be 0.
        sizes: height and width of each level.
    """
    positions = [height * width for height, width in sizes]
    per_image = []
    for own_anchors, own_boxes in zip(anchors, boxes, strict=True):
        iou = box_iou(own_boxes, own_anchors)
        near = (iou > threshold * iou.amax(1, keepdim=True)).any(0)
        per_image.append(near.unflatten(0, (sum(positions), -1)).any(1))
    by_level = torch.stack(per_image).float().split(positions, 1)
    return [mask.unflatten(1, size) for mask, size in zip(by_level, sizes, strict=True)]
