"""Properties not covered by test_parity.py and test_naive.py: what is skipped, shared, or left unchanged."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from common.bridges import build_bridges
from common.fcfd import fcfd_terms, forward_paths
from common.models import build
from common.multipath_bn import track_paths
from common.paths import MixedPath, candidate_paths, sample_paths
from common.run.optimizer import sgd

PAIRS = [  # (teacher, student): the ten published pairs, and one with equal feature sizes
    ("wrn_40_2", "wrn_16_2"),
    ("wrn_40_2", "wrn_40_1"),
    ("resnet56", "resnet20"),
    ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
    ("resnet32x4", "ShuffleV1"),
    ("wrn_40_2", "ShuffleV1"),
    ("vgg13", "MobileNetV2"),
    ("ResNet50", "MobileNetV2"),
    ("resnet32x4", "ShuffleV2"),
    ("resnet110", "resnet32"),
]


def pair(teacher_name="resnet14", student_name="resnet8", positions=None):
    torch.manual_seed(0)
    teacher, student = build(teacher_name, 100).requires_grad_(False), build(student_name, 100)
    bridges = build_bridges(teacher, student, 32, positions)
    for net in (teacher, student):
        track_paths(net, positions or range(2, net.num_stages))
    return teacher, student, bridges


def batch(n=4):
    return torch.randn(n, 3, 32, 32), torch.randint(100, (n,))


@pytest.mark.parametrize(("teacher_name", "student_name"), PAIRS)
def test_loss_decreases_for_published_pairs(teacher_name, student_name):
    teacher, student, bridges = pair(teacher_name, student_name)
    images, labels = batch()
    optimizer = torch.optim.SGD([*student.parameters(), *bridges.parameters()], 0.005, momentum=0.9, nesterov=True)
    last, losses = student.num_stages, []
    for _ in range(3):
        flow = forward_paths(teacher, student, bridges, images, [MixedPath(last - 1, 1), MixedPath(last - 1, 0)])
        terms = fcfd_terms(flow, labels, 4.0)
        assert all(value.isfinite() and value > 0 for value in terms.values())
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("fused", [False, True])
def test_bridge_of_an_unsampled_path_does_not_change(fused):
    teacher, student, bridges = pair()
    images, labels = batch()
    optimizer = sgd(
        [*student.parameters(), *bridges.parameters()],
        0.05,
        momentum=0.9,
        weight_decay=5e-4,
        nesterov=True,
        fused=fused,
    )

    def step(paths):
        terms = fcfd_terms(forward_paths(teacher, student, bridges, images, paths), labels, 4.0)
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        optimizer.step()

    step([MixedPath(2, 0), MixedPath(2, 1)])
    step(candidate_paths(4))  # the first gradient of t2s.3; now every parameter has momentum
    unused = bridges.t2s["3"]
    tensors = [*unused.state_dict().values(), *(optimizer.state[p]["momentum_buffer"] for p in unused.parameters())]
    before = [t.clone() for t in tensors]
    sampled = bridges.t2s["2"][0].weight.clone()
    step([MixedPath(2, 0), MixedPath(3, 1)])
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert not torch.equal(bridges.t2s["2"][0].weight, sampled)


def test_shared_modules_run_once():
    teacher, student, bridges = pair()
    calls = Counter()
    for role, net in (("teacher", teacher), ("student", student)):
        net.conv1.register_forward_hook(lambda *_, role=role: calls.update([role]))
    for name, module in bridges.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    forward_paths(teacher, student, bridges, batch()[0], candidate_paths(4))
    assert set(calls) == {"teacher", "student", "s2t.2.0", "s2t.3.0", "s2t.4.0", "t2s.2.0", "t2s.3.0"}
    assert set(calls.values()) == {1}


def test_only_requested_parts_are_computed():
    teacher, student, bridges = pair()
    images, labels = batch()
    flow = forward_paths(teacher, student, bridges, images, [MixedPath(3, 1)], all_bridges=False)
    assert (list(flow.s2t), list(flow.t2s)) == ([3], [])
    terms = fcfd_terms(flow, labels, 4.0, ("kd", "func_l2", "func_prime"))
    assert list(terms) == ["kd", "func_l2", "func_prime"]
    assert terms["func_prime"].item() == 0
    with pytest.raises(KeyError):  # L_app needs every position
        fcfd_terms(flow, labels, 4.0)
    flow = forward_paths(teacher, student, None, images, all_bridges=False)
    assert (flow.s2t, flow.t2s, flow.mixed) == ({}, {}, {})


def test_student_trains_without_a_teacher():
    student = build("resnet8", 100)
    images, labels = batch()
    logits = copy.deepcopy(student)(images)
    flow = forward_paths(None, student, None, images)
    assert torch.equal(flow.student_logits, logits)
    assert list(flow.student) == [1, 2, 3, 4]
    assert (flow.teacher, flow.teacher_logits, flow.s2t, flow.t2s, flow.mixed) == ({}, None, {}, {}, {})
    terms = fcfd_terms(flow, labels, 4.0, terms={"task": 1})
    assert list(terms) == ["task"]
    before = student.fc.weight.clone()
    terms["task"].backward()
    torch.optim.SGD(student.parameters(), 0.1).step()
    assert not torch.equal(student.fc.weight, before)


@pytest.mark.parametrize(("teacher_name", "student_name"), [("vgg8", "resnet8"), ("resnet8", "vgg8")])
def test_kd_works_with_different_numbers_of_stages(teacher_name, student_name):
    teacher, student = build(teacher_name, 10).eval(), build(student_name, 10).eval()
    images, _ = batch()
    flow = forward_paths(teacher, student, None, images, all_bridges=False)
    torch.testing.assert_close(flow.teacher_logits, teacher(images))
    torch.testing.assert_close(flow.student_logits, student(images))


def test_the_last_position_feeds_only_the_classifier():
    teacher, student, bridges = pair(positions=[4])
    images, labels = batch()
    paths = [MixedPath(4, 1), MixedPath(4, 0)]
    flow = forward_paths(teacher, student, bridges, images, paths)
    assert all(not mixed.features for mixed in flow.mixed.values())
    torch.testing.assert_close(flow.mixed[paths[0]].logits, teacher.classify(flow.s2t[4]))
    torch.testing.assert_close(flow.mixed[paths[1]].logits, student.classify(flow.t2s[4]))
    terms = fcfd_terms(flow, labels, 4.0)
    assert terms["func_l2"].item() == 0
    assert terms["func_kl"].item() > 0


def test_mixed_paths_use_batch_statistics_when_the_teacher_does_not():
    """With --teacher-bn running, p_t and F_t use frozen running statistics; mixed paths still update their own."""
    teacher, student, bridges = pair()
    teacher.eval()
    images, _ = batch()
    before = teacher.bn1.running_mean.clone()
    flow = forward_paths(teacher, student, bridges, images, [MixedPath(2, 1)])
    torch.testing.assert_close(flow.teacher_logits, teacher(images))
    assert torch.equal(teacher.bn1.running_mean, before)
    assert teacher.layer2[0].bn1.path2.num_batches_tracked == 1
    assert not teacher.training
    bridges.eval()
    forward_paths(teacher, student, bridges, images, [MixedPath(2, 1)])
    assert teacher.layer2[0].bn1.path2.num_batches_tracked == 1


def test_trainable_teacher_is_trained_by_mixed_paths_but_not_as_a_target():
    """App. F: a mixed path trains every module it passes through, including the teacher's early stages."""
    teacher, student, bridges = pair()
    teacher.requires_grad_(True)
    images, labels = batch()

    def trained(path, term):
        teacher.zero_grad(), student.zero_grad(), bridges.zero_grad()
        fcfd_terms(forward_paths(teacher, student, bridges, images, [path]), labels, 4.0, (term,))[term].backward()
        return {
            f"{role}.{name.split('.')[0]}"
            for role, net in (("teacher", teacher), ("student", student))
            for name, p in net.named_parameters()
            if p.grad is not None and p.grad.any()
        }

    early, late = {"conv1", "bn1", "layer1"}, {"layer2", "layer3", "fc"}
    assert trained(MixedPath(2, 1), "func_kl") == {f"student.{m}" for m in early} | {f"teacher.{m}" for m in late}
    assert trained(MixedPath(2, 0), "func_prime") == {f"teacher.{m}" for m in early} | {f"student.{m}" for m in late}
    assert trained(MixedPath(2, 1), "app") == {f"student.{m}" for m in early | late - {"fc"}}


@pytest.mark.gpu
@pytest.mark.parametrize(("teacher_name", "student_name"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_stay_finite_for_ten_amp_steps(teacher_name, student_name, dtype):
    nets = pair(teacher_name, student_name)
    teacher, student, bridges = (net.cuda() for net in nets)
    images, labels = (x.cuda() for x in batch(64))
    optimizer = sgd([*student.parameters(), *bridges.parameters()], 0.01, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler(enabled=dtype == torch.float16)
    losses = []
    for paths in sample_paths(candidate_paths(student.num_stages), 2, 10, 0, 0):
        with torch.autocast("cuda", dtype):
            flow = forward_paths(teacher, student, bridges, images, paths)
        assert flow.student_logits.dtype == dtype
        loss = sum(fcfd_terms(flow, labels, 4.0).values())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(torch.tensor(losses).isfinite())
