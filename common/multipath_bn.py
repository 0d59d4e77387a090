"""BatchNorm with shared affine parameters and separate running statistics per input path (Fig. 3).

The later stages of each network process its own features and, on the mixed path that leaves the other network after
stage k, that network's bridged features. Means and variances differ between paths, so one set of running statistics
would not fit any of them. All paths share weight and bias.

    track_paths(net, [2, 3])          # once: adds statistics for paths 2 and 3 to every BatchNorm
    with on_path(net, 2):             # uses the statistics of path 2 instead of the network's own
        y = net.stage(3, x)

Works on any module that contains PyTorch BatchNorm layers of any kind.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class PathStatistics(nn.Module):
    """Running statistics of one BatchNorm layer on one path; initially mean 0, variance 0, no batches tracked."""

    def __init__(self, like: Tensor):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros_like(like))
        self.register_buffer("running_var", torch.zeros_like(like))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=like.device))


def track_paths(net: nn.Module, positions: Iterable[int]) -> None:
    """Add running statistics for each path k in `positions` to every BatchNorm in `net`, in place.

    They are buffers of submodules `path<k>`, so `net.to()` moves them and `net.state_dict()` includes them.
    """
    for layer in _batch_norms(net):
        for k in positions:
            layer.add_module(f"path{k}", PathStatistics(layer.running_mean))


@contextmanager
def on_path(net: nn.Module, k: int, training: bool | None = None) -> Iterator[None]:
    """Context manager: the BatchNorm layers of `net` use and update the statistics of path k instead of their own.

    The buffers are swapped in and back out, so the layers' forward is unchanged.

    Args:
        training: normalize with batch statistics (True) or running statistics (False), regardless of the mode of
            `net`; None keeps the mode.

    Raises:
        KeyError: `track_paths(net, [k])` was not called.
    """
    layers = _batch_norms(net)
    modes = [layer.training for layer in layers]
    if any(not hasattr(layer, f"path{k}") for layer in layers):
        raise KeyError(f"no statistics for path {k}: call track_paths(net, [{k}]) first")
    _swap_buffers(layers, k)
    try:
        if training is not None:
            for layer in layers:
                layer.training = training
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
        _swap_buffers(layers, k)


def plain_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of `net` without the per-path statistics, loadable into a plain network."""
    extra = tuple(f"{name}." for name, module in net.named_modules() if isinstance(module, PathStatistics))
    return {key: value for key, value in net.state_dict().items() if not key.startswith(extra)}


def _batch_norms(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def _swap_buffers(layers: list[nn.Module], k: int) -> None:
    # Swapping whole dictionaries is faster than single buffers, and this runs for every path in every step.
    for layer in layers:
        path = getattr(layer, f"path{k}")
        layer._buffers, path._buffers = path._buffers, layer._buffers
