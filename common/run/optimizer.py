"""SGD for training in which some parameters go without gradient in some steps, or without weight decay."""

from collections.abc import Iterable

import torch
from torch import nn


def sgd(parameters: Iterable[nn.Parameter] | list[dict], lr: float, **options) -> torch.optim.SGD:
    """torch.optim.SGD with momentum that stands at zero from the start; `parameters`, `options` are as it takes them.

    A parameter without gradient, as of a bridge whose path was not drawn, is left alone: no decay, no momentum.
    PyTorch starts momentum with the first gradient, which gives the same numbers; but its fused form fails when a
    parameter gets its first gradient later than others, and keeps uninitialised memory when the first step overflows.
    """
    optimizer = torch.optim.SGD(parameters, lr, **options)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def decay_all_but_norms(net: nn.Module) -> list[dict]:
    """The parameters that are trained, for `sgd`: one group as usual, one of BatchNorm's without weight decay."""
    norms = {p for layer in net.modules() if isinstance(layer, nn.BatchNorm2d) for p in layer.parameters()}
    trained = [p for p in net.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p not in norms]},
        {"params": [p for p in trained if p in norms], "weight_decay": 0.0},
    ]
