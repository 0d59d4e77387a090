"""SGD for training in which some parameters go without gradient in some steps."""

from collections.abc import Iterable

import torch
from torch import nn


def sgd(parameters: Iterable[nn.Parameter], lr: float, **options) -> torch.optim.SGD:
    """torch.optim.SGD with momentum that stands at zero from the start; `options` are its own.

    A parameter without gradient, as of a bridge whose path was not drawn, is left alone: no decay, no momentum.
    PyTorch starts momentum with the first gradient, which gives the same numbers; but its fused form fails when a
    parameter gets its first gradient later than others, and keeps uninitialised memory when the first step overflows.
    """
    optimizer = torch.optim.SGD(parameters, lr, **options)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
