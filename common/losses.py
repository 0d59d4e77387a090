"""The losses as functions of tensors. All compute in float32, whatever precision their inputs have."""

import torch.nn.functional as F
from torch import Tensor

from .models import pool


def kl(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(target / T) || softmax(logits / T)), batch mean; `target` is detached. [B, K] each."""
    log_p = F.log_softmax(logits.float() / temperature, dim=1)
    log_target = F.log_softmax(target.detach().float() / temperature, dim=1)
    return F.kl_div(log_p, log_target, reduction="batchmean", log_target=True) * temperature**2


def l2(feature: Tensor, target: Tensor, pooled: bool = False) -> Tensor:
    """Squared difference, mean over all elements; `target` is detached. [B, C, H, W] each.

    `pooled` adds the same between the features after ReLU and global average pooling, which is what a classifier
    sees: it belongs to every L2 term at the last stage.
    """
    feature, target = feature.float(), target.detach().float()
    loss = F.mse_loss(feature, target)
    return loss + F.mse_loss(pool(feature), pool(target)) if pooled else loss
