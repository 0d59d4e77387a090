"""KL, DKD, and L2 against their definitions."""

import math

import pytest
import torch

from common.losses import dkd, kl, l2


def naive_dkd(logits, target, temperature, labels, tckd, nckd):
    """DKD in float64, from probabilities, with a loop over classes."""
    total = 0
    for x, y, label in zip(logits.double(), target.double(), labels.tolist(), strict=True):
        q, p = ((z / temperature).exp() / (z / temperature).exp().sum() for z in (x, y))
        others = [j for j in range(len(p)) if j != label]
        p_not, q_not = p[others].sum(), q[others].sum()
        tckd_term = p[label] * (p[label] / q[label]).log() + p_not * (p_not / q_not).log()
        nckd_term = sum(p[j] / p_not * ((p[j] / p_not) / (q[j] / q_not)).log() for j in others)
        total = total + tckd * tckd_term + nckd * nckd_term
    return total / len(labels) * temperature**2


def assert_dkd_matches(logits, target, temperature, labels, **weights):
    exact = logits.double().requires_grad_()
    expected = naive_dkd(exact, target, temperature, labels, **weights)
    expected.backward()
    logits = logits.clone().requires_grad_()
    value = dkd(logits, target, temperature, labels, **weights)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    for row, exact_row in zip(logits.grad.double(), exact.grad, strict=True):
        assert (row - exact_row).norm() <= 1e-4 * exact_row.norm()


def test_kl_matches_its_definition_in_float64():
    torch.manual_seed(0)
    logits, target = 5 * torch.randn(16, 10), 5 * torch.randn(16, 10)
    p, q = (torch.softmax(x.double() / 4, 1) for x in (target, logits))
    expected = (p * (p / q).log()).sum(1).mean() * 16
    assert kl(logits, target, 4.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_kl_is_finite_when_a_probability_underflows():
    logits = torch.tensor([[0.0, 500.0]], requires_grad=True)
    value = kl(logits, torch.tensor([[500.0, 0.0]]), 1.0)
    value.backward()
    assert value.item() == pytest.approx(500.0)
    assert logits.grad.isfinite().all()


def test_dkd_matches_its_definition_in_float64():
    torch.manual_seed(0)
    logits, target, labels = 5 * torch.randn(16, 10), 5 * torch.randn(16, 10), torch.randint(10, (16,))
    labels[:2] = torch.tensor([0, 9])  # the first and last classes have neighbors on only one side
    assert_dkd_matches(logits, target, 4.0, labels, tckd=1.0, nckd=2.0)
    assert_dkd_matches(logits, target, 1.0, labels, tckd=0.7, nckd=0.0)
    assert_dkd_matches(logits, target, 1.0, labels, tckd=0.0, nckd=3.0)
    one, two = (dkd(logits, target, 4.0, labels, *weights).item() for weights in ((), (1.0, 2.0)))
    assert one == two


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("student_is_right", [True, False])
def test_dkd_is_accurate_for_a_very_confident_teacher(temperature, student_is_right):
    torch.manual_seed(1)
    labels = torch.arange(8)
    target = torch.randn(8, 10, dtype=torch.float64)
    own = torch.zeros(8, 10, dtype=torch.bool).scatter_(1, labels[:, None], True)
    rest = (target / temperature).masked_fill(own, -torch.inf).logsumexp(1)
    target[own] = temperature * (rest + math.log((1 - 1e-7) / 1e-7))
    assert torch.softmax(target / temperature, 1)[own].tolist() == pytest.approx([1 - 1e-7] * 8, rel=1e-12)
    logits = torch.randn(8, 10)
    logits[own] += temperature * (20 if student_is_right else -5)  # more confident than the teacher, or wrong
    assert_dkd_matches(logits, target.float(), temperature, labels, tckd=1.0, nckd=2.0)
    assert_dkd_matches(logits, target.float(), temperature, labels, tckd=1.0, nckd=0.0)


def test_dkd_is_finite_when_probabilities_underflow():
    logits = torch.tensor([[0.0, 500.0, 0.0]], requires_grad=True)
    value = dkd(logits, torch.tensor([[500.0, 0.0, 0.0]]), 1.0, torch.tensor([0]), 1.0, 0.0)
    value.backward()
    assert value.item() == pytest.approx(500.0)
    assert logits.grad.isfinite().all()


def test_dkd_with_two_classes_is_kl():
    torch.manual_seed(2)
    logits, target, labels = torch.randn(6, 2), torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    assert dkd(logits, target, 4.0, labels, 1.0, 1e6).item() == pytest.approx(kl(logits, target, 4.0).item(), rel=1e-4)


def test_l2_with_and_without_pooling():
    feature, target = torch.tensor([[[[1.0, -3.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
    assert l2(feature, target).item() == (1 + 25) / 2
    assert l2(feature, target, pooled=True).item() == (1 + 25) / 2 + (0.5 - 1.0) ** 2


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: kl(x, y, 4.0),
        lambda x, y: dkd(x, y, 4.0, torch.arange(4)),
        lambda x, y: l2(x[..., None, None], y[..., None, None], True),
    ],
)
def test_targets_are_detached_and_results_are_float32(loss):
    x, y = (torch.randn(4, 8, dtype=torch.float16, requires_grad=True) for _ in range(2))
    value = loss(x, y)
    value.backward()
    assert value.dtype == torch.float32
    assert x.grad.abs().sum() > 0
    assert y.grad is None


def test_dkd_rejects_a_single_class():
    with pytest.raises(ValueError, match="two classes"):
        dkd(torch.zeros(2, 1), torch.zeros(2, 1), 4.0, torch.zeros(2, dtype=torch.int64))


def test_gradient_of_l2_is_in_channels_last():
    feature, target = (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(2))
    (gradient,) = torch.autograd.grad(l2(feature.requires_grad_(), target), feature)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
