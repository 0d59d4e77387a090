"""Losses on tensors, all computed in float32 regardless of the precision of their inputs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .models.staged import pool


def kl(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(target / T) || softmax(logits / T)), batch mean; `target` is detached. [B, K] each."""
    log_p = F.log_softmax(logits.float() / temperature, dim=1)
    log_target = F.log_softmax(target.detach().float() / temperature, dim=1)
    return F.kl_div(log_p, log_target, reduction="batchmean", log_target=True) * temperature**2


def dkd(
    logits: Tensor, target: Tensor, temperature: float, labels: Tensor, tckd: float = 1.0, nckd: float = 2.0
) -> Tensor:
    """Decoupled KD (Zhao et al., CVPR 2022), T^2 (tckd * TCKD + nckd * NCKD); `target` is detached. [B, K] each.

    KL(p_t || p_s) = TCKD + (1 - p_t[label]) NCKD, so a confident teacher suppresses the part about the other
    classes. DKD weights the two parts independently. Both are batch means; there is no warm-up.

    Args:
        labels: [B], class indices.
        tckd: weight of the KL between the binary distributions (label, not label).
        nckd: weight of the KL between the distributions over the K - 1 other classes; this KL is zero if K = 2.

    Raises:
        ValueError: there is only one class.
    """
    if logits.shape[1] < 2:
        raise ValueError("DKD needs at least two classes, and there is only one")
    log_p, log_p_others = _decouple(logits.float() / temperature, labels)
    log_target, log_target_others = _decouple(target.detach().float() / temperature, labels)
    of_label = F.kl_div(log_p, log_target, reduction="batchmean", log_target=True)
    of_others = F.kl_div(log_p_others, log_target_others, reduction="batchmean", log_target=True)
    return (tckd * of_label + nckd * of_others) * temperature**2


def _decouple(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, K] -> log-probabilities of (label, not label), [B, 2], and of the other classes, [B, K - 1]."""
    others = torch.arange(x.shape[1] - 1, device=x.device).expand(len(x), -1)
    others = x.gather(1, others + (others >= labels[:, None]))
    # Computed from the log-odds: 1 - p would be mostly rounding error where p is close to 1.
    odds = x.gather(1, labels[:, None]).squeeze(1) - others.logsumexp(1)
    return F.logsigmoid(torch.stack([odds, -odds], 1)), F.log_softmax(others, 1)


def l2(feature: Tensor, target: Tensor, pooled: bool = False) -> Tensor:
    """Squared difference, mean over all elements; `target` is detached. [B, C, H, W] each.

    `pooled` adds the same loss between the features after ReLU and global average pooling, the classifier's
    input. The L2 terms of Eq. 9 use it at the last stage.
    """
    feature, target = feature.float(), target.detach().float()
    # F.mse_loss returns a contiguous gradient: with channels last it has the features' memory format, which is faster.
    loss = F.mse_loss(feature.movedim(1, -1), target.movedim(1, -1))
    return loss + F.mse_loss(pool(feature), pool(target)) if pooled else loss
