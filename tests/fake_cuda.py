"""A fake CUDA device, on which a training loop runs without a GPU to find device mismatches and synchronizations.

PyTorch's FakeTensorMode computes the device, type and shape of every result, but no values. It raises where the host
would need a value of a tensor (`.item()`, `bool(tensor)`, `nonzero`) and where tensors are on different devices. Not
covered: kernels, numerics, streams, memory formats, and assignments to a boolean mask.

Build networks and read data in functions that run for real, on the CPU, then move them to "cuda:0", with the index:
a fake network cannot be moved, and Python cannot read fake data.
"""

import contextlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import wraps
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class BlockingCopyError(RuntimeError):
    """A copy between the devices would make the host wait for all queued kernels."""


class BlockingCopies(TorchDispatchMode):
    """Raises BlockingCopyError in blocking copies between devices, once `forbidden`; FakeTensorMode allows them.

    Indexing with a CPU tensor copies it, too. Operations other than copies take a scalar on the CPU by value.
    """

    forbidden = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        non_blocking = kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))
        if self.forbidden and not non_blocking:
            tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
            copies_scalars = func is aten._to_copy.default
            devices = {tensor.device for tensor in tensors if copies_scalars or tensor.is_cuda or tensor.dim()}
            if len(devices) > 1:
                raise BlockingCopyError(f"{func} copies between {' and '.join(sorted(map(str, devices)))}")
        return result


class CPUGenerator(torch.Generator):
    """Ignores its device; operations on the fake device accept it."""

    def __new__(cls, device: torch.device | None = None):
        return super().__new__(cls)


@contextlib.contextmanager
def fake_cuda(*cpu_only: str) -> Iterator[None]:
    """Tensors can be on "cuda:0" inside the context, but hold no values.

    Blocking copies between devices raise after the first backward pass. Before it, they load networks and data.

    Args:
        cpu_only: full names of functions that run for real, on the CPU.
    """
    copies = BlockingCopies()

    def first_backward(loss: Tensor) -> None:
        backward(loss)
        copies.forbidden = True

    patches = {
        "torch.Tensor.backward": first_backward,
        "torch._fused_sgd_": fused_sgd,
        "torch.Generator": CPUGenerator,
        "torch.cuda.is_available": lambda: False,  # the same behavior with a GPU
        "torch.cuda.Event": mock.MagicMock(),
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda *_: True,
        "torch.cuda.reset_peak_memory_stats": mock.MagicMock(),
    }
    patches |= {name: real(pkgutil.resolve_name(name)) for name in cpu_only}
    with contextlib.ExitStack() as stack:
        for name, new in patches.items():
            stack.enter_context(mock.patch(name, new))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(copies)
        yield


def real(function: Callable) -> Callable:
    """`function`, run outside FakeTensorMode."""

    @wraps(function)
    def run(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run


def backward(loss: Tensor) -> None:
    """Tensor.backward in Python: the autograd engine would ask the CUDA driver for streams. Overwrites `.grad`."""
    order, seen = [], set()

    def visit(node) -> None:
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                visit(following)
        order.append(node)

    visit(loss.grad_fn)
    grads = {loss.grad_fn: {0: torch.ones_like(loss)}}  # node -> index of its output -> gradient
    with torch.no_grad():
        for node in reversed(order):
            given = grads.pop(node, {})
            if hasattr(node, "variable"):
                node.variable.grad = given.get(0)
                continue
            result = node(*(given.get(i) for i in range(len(node._input_metadata))))
            result = result if isinstance(result, tuple) else (result,)
            for (following, i), grad in zip(node.next_functions, result, strict=True):
                if following is not None and grad is not None:
                    meta, slot = following._input_metadata[i], grads.setdefault(following, {})
                    grad = grad.sum_to_size(tuple(meta.shape)).to(meta.dtype)  # as the engine does
                    slot[i] = slot[i] + grad if i in slot else grad


def fused_sgd(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], **_) -> None:
    """Check what the fused kernel, which needs a GPU, requires of its tensors."""
    for tensors in zip(params, grads, buffers, strict=True):
        assert len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1
