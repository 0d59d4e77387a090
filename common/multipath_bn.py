"""BatchNorm with one affine transform and separate running statistics per input path (Fig. 3).

The student's later part sees its own features and, by the path that left the teacher after stage k, the
bridged features of the teacher; the teacher's later part likewise. Their means and variances differ, so one pair
of running statistics would fit none of them. Weight and bias are shared by all paths.

    track_paths(net, [2, 3])          once: every BatchNorm gets statistics for path 2 and for path 3
    with on_path(net, 2):             here they stand in the place of the net's own
        y = net.stage(3, x)

It works on any module with any of PyTorch's BatchNorm layers.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class PathStatistics(nn.Module):
    """Running statistics of one BatchNorm layer on one path: mean 0, variance 0, no batch seen."""

    def __init__(self, like: Tensor):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros_like(like))
        self.register_buffer("running_var", torch.zeros_like(like))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=like.device))


def track_paths(net: nn.Module, positions: Iterable[int]) -> None:
    """Give every BatchNorm of `net`, in place, running statistics for each path k in `positions`.

    They are buffers in submodules `path<k>`, so they follow the net to its device and into its state dict.
    """
    for layer in _batch_norms(net):
        for k in positions:
            layer.add_module(f"path{k}", PathStatistics(layer.running_mean))


@contextmanager
def on_path(net: nn.Module, k: int, training: bool | None = None) -> Iterator[None]:
    """Inside the context `net`'s BatchNorm layers use and update the statistics of path k, not their own.

    The buffers change places, so the layers' own code runs unchanged, and go back at the end.

    Args:
        training: normalise by the batch (True) or by the running statistics (False) whatever the mode of
            `net`; None keeps the mode.

    Raises:
        KeyError: `track_paths(net, [k])` was not called.
    """
    layers = _batch_norms(net)
    modes = [layer.training for layer in layers]
    if any(not hasattr(layer, f"path{k}") for layer in layers):
        raise KeyError(f"no statistics for path {k}: call track_paths(net, [{k}]) first")
    _exchange(layers, k)
    try:
        if training is not None:
            for layer in layers:
                layer.training = training
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
        _exchange(layers, k)


def plain_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of `net` without the per-path statistics: a plain network's, which others can load."""
    extra = tuple(f"{name}." for name, module in net.named_modules() if isinstance(module, PathStatistics))
    return {key: value for key, value in net.state_dict().items() if not key.startswith(extra)}


def _batch_norms(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def _exchange(layers: list[nn.Module], k: int) -> None:
    # The dictionaries that hold the buffers, and not buffer by buffer: this runs for every path of every step.
    for layer in layers:
        path = getattr(layer, f"path{k}")
        layer._buffers, path._buffers = path._buffers, layer._buffers
