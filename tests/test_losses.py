import pytest
import torch

from common.losses import kl, l2


def test_kl_against_its_definition_in_float64():
    torch.manual_seed(0)
    logits, target = 5 * torch.randn(16, 10), 5 * torch.randn(16, 10)
    p, q = (torch.softmax(x.double() / 4, 1) for x in (target, logits))
    expected = (p * (p / q).log()).sum(1).mean() * 16
    assert kl(logits, target, 4.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_kl_stays_finite_where_a_probability_underflows():
    logits = torch.tensor([[0.0, 500.0]], requires_grad=True)
    value = kl(logits, torch.tensor([[500.0, 0.0]]), 1.0)
    value.backward()
    assert value.item() == pytest.approx(500.0)
    assert logits.grad.isfinite().all()


def test_l2_and_its_pooled_part():
    feature, target = torch.tensor([[[[1.0, -3.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
    assert l2(feature, target).item() == (1 + 25) / 2
    assert l2(feature, target, pooled=True).item() == (1 + 25) / 2 + (0.5 - 1.0) ** 2


@pytest.mark.parametrize(
    "loss", [lambda x, y: kl(x, y, 4.0), lambda x, y: l2(x[..., None, None], y[..., None, None], True)]
)
def test_targets_are_detached_and_results_are_float32(loss):
    x, y = (torch.randn(4, 8, dtype=torch.float16, requires_grad=True) for _ in range(2))
    value = loss(x, y)
    value.backward()
    assert value.dtype == torch.float32
    assert x.grad.abs().sum() > 0
    assert y.grad is None
