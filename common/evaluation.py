"""Accuracy on a test set."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def evaluate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, by the net's running statistics; leaves it in evaluation mode.

    Args:
        batches: images [B, 3, H, W] and labels [B] on the net's device. The hits are summed there.
    """
    net.eval()
    hits, images_seen = 0, 0
    for images, labels in batches:
        logits = net(images)
        hit = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        hits = hits + torch.stack([hit[:, 0].sum(), hit.sum()])
        images_seen += len(labels)
    top1, top5 = (100 * hit / images_seen for hit in hits.tolist())
    return {"top1": top1, "top5": top5}
