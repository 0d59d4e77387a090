"""Top-1 and top-5 accuracy."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def evaluate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent. Leaves the network in evaluation mode.

    Args:
        batches: images [B, 3, H, W] and labels [B] on the network's device, where the counts accumulate.
    """
    return accuracy(count_hits(net, batches))


@torch.no_grad()
def count_hits(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """int64 [top-1 correct, top-5 correct, images] on the batches' device. Counts of shards can be added."""
    net.eval()
    counts = torch.zeros(3, dtype=torch.int64)
    for images, labels in batches:
        logits = net(images)
        correct = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        total = torch.full_like(labels[0], len(labels))
        counts = counts.to(total.device) + torch.stack([correct[:, 0].sum(), correct.sum(), total])
    return counts


def accuracy(counts: Tensor) -> dict[str, float]:
    """Convert the counts from `count_hits` to percent."""
    top1, top5, images = counts.tolist()
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images}
