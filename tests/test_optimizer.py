"""SGD against its definition."""

import pytest
import torch

from common.run.optimizer import sgd

OPTIONS = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}


def reference_sgd(weights, gradients, lr):
    """SGD with Nesterov momentum on one tensor; None means a step without a gradient."""
    velocity = torch.zeros_like(weights)
    for gradient in gradients:
        if gradient is not None:
            gradient = gradient + 0.1 * weights
            velocity = 0.9 * velocity + gradient
            weights = weights - lr * (gradient + 0.9 * velocity)
    return weights


@pytest.mark.parametrize("fused", [False, True])
def test_steps_match_the_definition_with_and_without_gradients(fused):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5)) for _ in range(2)]
    starts = [p.detach().clone() for p in parameters]
    gradients = [[torch.randn(5) for _ in range(4)], [None, torch.randn(5), None, torch.randn(5)]]
    optimizer = sgd(parameters, 0.1, fused=fused, **OPTIONS)
    for step in range(4):
        for p, grads in zip(parameters, gradients, strict=True):
            p.grad = grads[step]
        optimizer.step()
    for p, start, grads in zip(parameters, starts, gradients, strict=True):
        torch.testing.assert_close(p.detach(), reference_sgd(start, grads, 0.1))


def test_overflow_in_the_first_step_has_no_effect():
    parameter = torch.nn.Parameter(torch.ones(1000))
    optimizer = sgd([parameter], 0.1, fused=True, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu")
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(parameter.detach(), reference_sgd(torch.ones(1000), [torch.ones(1000)], 0.1))


@pytest.mark.parametrize("fused", [False, True])
def test_loaded_buffers_have_the_memory_format_of_their_parameters(fused):
    """Fused SGD on CUDA fails if they do not."""
    torch.manual_seed(0)
    start = torch.randn(4, 3, 2, 2)
    first, second = (torch.nn.Parameter(start.clone()) for _ in range(2))
    saved = sgd([first], 0.1, fused=fused, **OPTIONS)
    first.grad = torch.randn_like(first)
    saved.step()
    second.data = first.detach().to(memory_format=torch.channels_last)
    loaded = sgd([second], 0.1, **OPTIONS)
    loaded.load_state_dict(saved.state_dict())
    assert not loaded.param_groups[0]["fused"]  # the parameter is on the CPU
    buffer = loaded.state[second]["momentum_buffer"]
    assert buffer.stride() == second.stride() != start.stride()
    assert torch.equal(buffer, saved.state[first]["momentum_buffer"])
