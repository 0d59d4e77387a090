"""The losses as functions of tensors. All compute in float32, whatever precision their inputs have."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .models import pool
from .run.errors import UserError


def kl(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(target / T) || softmax(logits / T)), batch mean; `target` is detached. [B, K] each."""
    log_p = F.log_softmax(logits.float() / temperature, dim=1)
    log_target = F.log_softmax(target.detach().float() / temperature, dim=1)
    return F.kl_div(log_p, log_target, reduction="batchmean", log_target=True) * temperature**2


def dkd(
    logits: Tensor, target: Tensor, temperature: float, labels: Tensor, tckd: float = 1.0, nckd: float = 2.0
) -> Tensor:
    """Decoupled KD (Zhao et al., CVPR 2022), T^2 (tckd * TCKD + nckd * NCKD); `target` is detached. [B, K] each.

    KL(p_t || p_s) = TCKD + (1 - p_t[label]) NCKD. A teacher that is sure of the label thus mutes what it knows of the
    other classes; DKD gives that part a weight of its own. Both parts are batch means; there is no warm-up.

    Args:
        labels: [B], class indices.
        tckd: weight of the KL between (probability of the label, of all others together).
        nckd: weight of the KL between the distributions over the K - 1 other classes; zero with two classes.

    Raises:
        UserError: there is one class alone.
    """
    if logits.shape[1] < 2:
        raise UserError("DKD needs two classes or more, and there is one: leave --kd-loss out")
    log_p, log_p_others = _decouple(logits.float() / temperature, labels)
    log_target, log_target_others = _decouple(target.detach().float() / temperature, labels)
    of_label = F.kl_div(log_p, log_target, reduction="batchmean", log_target=True)
    of_others = F.kl_div(log_p_others, log_target_others, reduction="batchmean", log_target=True)
    return (tckd * of_label + nckd * of_others) * temperature**2


def _decouple(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, K] -> log-probabilities of (label, not label), [B, 2], and of the others without it, [B, K - 1]."""
    others = torch.arange(x.shape[1] - 1, device=x.device).expand(len(x), -1)
    others = x.gather(1, others + (others >= labels[:, None]))
    # From the log-odds and never as 1 - p, which is rounding alone where p is almost 1.
    odds = x.gather(1, labels[:, None]).squeeze(1) - others.logsumexp(1)
    return F.logsigmoid(torch.stack([odds, -odds], 1)), F.log_softmax(others, 1)


def l2(feature: Tensor, target: Tensor, pooled: bool = False) -> Tensor:
    """Squared difference, mean over all elements; `target` is detached. [B, C, H, W] each.

    `pooled` adds the same between the features after ReLU and global average pooling, which is what a classifier
    sees: it belongs to every L2 term at the last stage.
    """
    feature, target = feature.float(), target.detach().float()
    loss = F.mse_loss(feature, target)
    return loss + F.mse_loss(pool(feature), pool(target)) if pooled else loss
