"""forward_paths and fcfd_terms against every number of a training step of the published implementation."""

import pytest
import torch

from common.bridges import build_bridges
from common.fcfd import fcfd_terms, forward_paths
from common.losses import kl, l2
from common.models import build
from common.multipath_bn import track_paths
from common.paths import MixedPath, candidate_paths
from common.run.device import open_device

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RELATIVE = {"cpu": 1e-5, "cuda": 1e-4}


# Float32 rounding error of a KL of 0.01, a difference of sums near 2.3, times T^2 = 16.
KL_ROUNDING = 3e-6


def assert_close(value, expected, device, scale=None):
    """Equal up to a tolerance relative to the largest entry."""
    expected = expected.to(value.device)
    scale = expected.abs().max() if scale is None else scale
    assert (value.detach() - expected).abs().max() <= RELATIVE[device] * scale


@pytest.fixture(scope="module", params=DEVICES)
def step(request, parity):
    device = request.param
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    open_device(device)  # makes float32 convolutions on CUDA precise
    teacher, student = build("resnet14", 10), build("resnet8", 10)
    bridges = build_bridges(teacher, student, 32)
    teacher.load_state_dict(parity["teacher"])
    student.load_state_dict(parity["student"])
    for name, weights in parity["bridges"].items():
        direction, k = name.split(".")
        if name != "t2s.4":  # not on any path, so it is not built
            getattr(bridges, direction)[k].load_state_dict(weights)
    teacher.requires_grad_(False)
    for net in (teacher, student):
        track_paths(net, [2, 3])
        net.to(device)
    bridges.to(device)

    flow = forward_paths(teacher, student, bridges, parity["images"].to(device), candidate_paths(4))
    terms = fcfd_terms(flow, parity["labels"].to(device), parity["settings"]["temperature"])
    weight = parity["settings"]["l2_weight"]
    total = sum(value * (weight if name in ("app", "func_l2") else 1) for name, value in terms.items())
    total.backward()
    yield device, teacher, student, bridges, flow, terms, total
    torch.set_num_threads(threads)


def test_logits(step, parity):
    device, _, _, _, flow, _, _ = step
    assert_close(flow.teacher_logits, parity["expected"]["teacher_logits"], device)
    assert_close(flow.student_logits, parity["expected"]["student_logits"], device)


def test_every_piece_of_every_term(step, parity):
    device, _, _, _, flow, terms, total = step
    expected, t = parity["expected"], parity["settings"]["temperature"]
    pieces = 0

    def piece(value, number, rounding=0.0):
        nonlocal pieces
        pieces += 1
        assert value.item() == pytest.approx(number.item(), rel=RELATIVE[device], abs=rounding)

    def l2_pieces(feature, target, name, numbers):
        piece(l2(feature, target), numbers[name])
        if f"{name}_pooled" in numbers:
            both = l2(feature, target, pooled=True)
            piece(both - l2(feature, target), numbers[f"{name}_pooled"])

    for k in (2, 3, 4):
        l2_pieces(flow.s2t[k], flow.teacher[k], f"{k}", expected["L_app"])
    for k in (2, 3):
        mixed = flow.mixed[MixedPath(k, 1)]
        for l, feature in mixed.features.items():
            l2_pieces(feature, flow.teacher[l], f"k{k}_l{l}", expected["L_func_L2"])
        piece(kl(mixed.logits, flow.teacher_logits, t), expected["L_func_KL"][f"k{k}"], KL_ROUNDING)
        mixed = flow.mixed[MixedPath(k, 0)]
        piece(kl(mixed.logits, flow.teacher_logits, t), expected["L_func_prime"][f"k{k}"], KL_ROUNDING)
    piece(terms["kd"], expected["L_kd"], KL_ROUNDING)
    piece(terms["task"], expected["L_task"])
    piece(total, expected["total"])
    groups = ("L_app", "L_func_L2", "L_func_KL", "L_func_prime")
    assert pieces == sum(len(expected[group]) for group in groups) + 3


@pytest.mark.parametrize(
    ("term", "group"),
    [("app", "L_app"), ("func_l2", "L_func_L2"), ("func_kl", "L_func_KL"), ("func_prime", "L_func_prime")],
)
def test_each_term_is_the_sum_of_its_pieces(step, parity, term, group):
    device, *_, terms, _ = step
    expected = sum(value.item() for value in parity["expected"][group].values())
    assert terms[term].item() == pytest.approx(expected, rel=RELATIVE[device], abs=KL_ROUNDING)


def test_gradients(step, parity):
    device, teacher, student, bridges, *_ = step
    expected = parity["expected"]
    assert set(expected["grad_student"]) == {name for name, _ in student.named_parameters()}
    for name, parameter in student.named_parameters():
        assert_close(parameter.grad, expected["grad_student"][name], device)
    for bridge, gradients in expected["grad_bridges"].items():
        direction, k = bridge.split(".")
        for name, gradient in gradients.items():
            assert_close(getattr(bridges, direction)[k].get_parameter(name).grad, gradient, device)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_running_statistics_pure_and_per_path(step, parity):
    device, teacher, student, _, *_ = step
    nets = {"teacher": teacher.state_dict(), "student": student.state_dict()}
    for role, state in nets.items():
        for name, value in parity["expected"][f"{role}_running_pure"].items():
            assert_close(state[name], value, device)
    for name, statistics in parity["expected"]["running_per_path"].items():
        role, layer = name.split(".", 1)
        layer, k = layer.rsplit(".k", 1)
        for statistic, value in statistics.items():
            assert_close(nets[role][f"{layer}.path{k}.{statistic}"], value, device)
    # No other layer was on a mixed path.
    seen = {
        f"{role}.{key.removesuffix('.num_batches_tracked').replace('.path', '.k')}"
        for role, state in nets.items()
        for key, value in state.items()
        if ".path" in key and key.endswith("num_batches_tracked") and value > 0
    }
    assert seen == set(parity["expected"]["running_per_path"])
