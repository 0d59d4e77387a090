"""Accuracy on a test set."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def evaluate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, by the net's running statistics; leaves it in evaluation mode.

    Args:
        batches: images [B, 3, H, W] and labels [B] on the net's device. The hits are summed there.
    """
    return accuracy(count_hits(net, batches))


@torch.no_grad()
def count_hits(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """int64 [top-1 hits, top-5 hits, images], on the batches' device; such counts of parts of a set add up."""
    net.eval()
    counts = torch.zeros(3, dtype=torch.int64)
    for images, labels in batches:
        logits = net(images)
        hit = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        seen = torch.full_like(labels[0], len(labels))
        counts = counts.to(seen.device) + torch.stack([hit[:, 0].sum(), hit.sum(), seen])
    return counts


def accuracy(counts: Tensor) -> dict[str, float]:
    """Hits as `count_hits` gives them, in percent."""
    top1, top5, images = counts.tolist()
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images}
