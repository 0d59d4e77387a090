"""SGD for parameters that have no gradient in some steps."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class SGD(torch.optim.SGD):
    """Loads a state saved on another device or in another memory format."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for group in self.param_groups:
            group["fused"] = next(iter(self.state)).is_cuda
        for parameter, values in self.state.items():  # fused SGD requires buffers with the strides of their parameters
            values["momentum_buffer"] = torch.empty_like(parameter).copy_(values["momentum_buffer"])


def sgd(parameters: Iterable[nn.Parameter] | list[dict], lr: float, **options) -> SGD:
    """torch.optim.SGD, fused on CUDA, with momentum buffers initialized to zero; takes the same arguments.

    A parameter without a gradient, such as a bridge whose path was not sampled, is not updated: no weight decay, no
    momentum. PyTorch creates momentum buffers at the first gradient. The results are the same, but fused SGD fails if a
    parameter gets its first gradient later than others, and leaves buffers uninitialized if the first step overflows.
    """
    parameters = list(parameters)
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    optimizer = SGD(parameters, lr, **{"fused": first.is_cuda} | options)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
