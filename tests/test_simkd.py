"""FCFD with SimKD's projector and the teacher's classifier, and with DKD, against naive implementations."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_naive import WEIGHTS, T, naive_kl, naive_l2, pair
from torch import nn

from common.bridges import build_bridges
from common.fcfd import EQ_9, fcfd_terms, forward_paths
from common.losses import dkd, kl
from common.models import build
from common.multipath_bn import plain_state_dict, track_paths
from common.paths import candidate_paths
from common.run.cost import added_cost, cost_line, inference_cost
from common.simkd import build_simkd

PAIRS = [  # (teacher, student, shape of the projected feature)
    ("resnet14", "resnet8", (64, 8, 8)),
    ("wrn_16_2", "wrn_16_1", (128, 8, 8)),  # pre-ReLU features
    ("resnet8x4", "ShuffleV1", (256, 4, 4)),  # the student's map is smaller
    ("vgg13", "MobileNetV2", (512, 2, 2)),
    ("ShuffleV1", "resnet8", (960, 4, 4)),  # the student's map is larger
]


def build_pair(teacher_name, student_name):
    """Teacher, SimKD student, copy of the student without SimKD, and bridges, with random BatchNorm weights."""
    teacher, student, _ = pair(teacher_name, student_name)
    plain = copy.deepcopy(student)
    student = build_simkd(student, teacher, 32)
    bridges = build_bridges(teacher, student, 32)
    for net in (student.projector, bridges):
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0, 0.2)
    return teacher, student, plain, bridges


class NaiveSimKD:
    """Runs FCFD with SimKD on copies, with a functional projector; `seen` holds the inputs of its BatchNorms."""

    def __init__(self, teacher, student, plain, bridges, images):
        self.teacher, self.plain, self.bridges = (copy.deepcopy(net) for net in (teacher, plain, bridges))
        self.weights = {n: p.detach().clone().requires_grad_() for n, p in student.projector.named_parameters()}
        self.last, self.images, self.seen = teacher.num_stages, images, []
        with torch.no_grad():
            self.target = dict(enumerate(self.teacher.features(images), 1))
            self.target_logits = self.teacher.classify(self.target[self.last])
        self.size = min(self.target[self.last].shape[2], plain.features(images)[-1].shape[2])

    def shrink(self, x):
        ratio = x.shape[2] // self.size
        return sum(x[:, :, i::ratio, j::ratio] for i in range(ratio) for j in range(ratio)) / ratio**2

    def project(self, x):
        x, seen = self.shrink(x), []
        conv1, weight1, bias1, conv2, weight2, bias2, conv3, weight3, bias3 = self.weights.values()
        for conv, weight, bias in ((conv1, weight1, bias1), (conv2, weight2, bias2), (conv3, weight3, bias3)):
            x = F.conv2d(x, conv, padding=conv.shape[2] // 2)
            seen.append(x.detach())
            x = F.relu(F.batch_norm(x, None, None, weight, bias, training=True))
        self.seen.append(seen)
        return x

    def classify(self, x):
        *_, linear = (layer for layer in self.teacher.modules() if isinstance(layer, nn.Linear))
        return x.clamp(min=0).mean((2, 3)) @ linear.weight.T + linear.bias

    def student_from(self, k, x):
        for l in range(k + 1, self.last + 1):
            x = self.plain.stage(l, x)
        return self.project(x)

    def terms(self, labels):
        features = dict(enumerate(self.plain.features(self.images), 1))
        projected = self.project(features[self.last])
        logits = self.classify(projected)
        terms = {"task": F.cross_entropy(logits, labels), "kd": naive_kl(logits, self.target_logits)}
        bridged = {k: self.bridges.s2t[str(k)](features[k]) for k in range(2, self.last)}
        terms["app"] = sum(naive_l2(x, self.target[k], last=False) for k, x in bridged.items())
        terms["app"] += naive_l2(projected, self.shrink(self.target[self.last].clamp(min=0)), last=True)
        terms |= dict.fromkeys(("func_l2", "func_kl", "func_prime"), 0)
        self.logits = {"pure": logits}
        for k in range(2, self.last):
            x = bridged[k]
            for l in range(k + 1, self.last + 1):
                x = self.teacher.stage(l, x)
                terms["func_l2"] += naive_l2(x, self.target[l], last=l == self.last)
            terms["func_kl"] += naive_kl(self.classify(x), self.target_logits)
            y = self.classify(self.student_from(k, self.bridges.t2s[str(k)](self.target[k])))
            terms["func_prime"] += naive_kl(y, self.target_logits)
            self.logits |= {(k, 1): self.classify(x), (k, 0): y}
        return terms

    def gradients(self):
        gradients = {f"projector.{name}": p.grad for name, p in self.weights.items()}
        gradients |= {f"student.{name}": p.grad for name, p in self.plain.named_parameters()}
        gradients |= {f"bridges.{name}": p.grad for name, p in self.bridges.named_parameters()}
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize(("teacher_name", "student_name", "shape"), PAIRS)
def test_step_matches_the_naive_implementation(teacher_name, student_name, shape):
    teacher, student, plain, bridges = build_pair(teacher_name, student_name)
    images, labels, last = torch.randn(4, 3, 32, 32), torch.randint(10, (4,)), teacher.num_stages
    naive = NaiveSimKD(teacher, student, plain, bridges, images)
    expected = naive.terms(labels)
    sum(WEIGHTS[name] * value for name, value in expected.items()).backward()

    for net in (teacher, student):
        track_paths(net, range(2, last))
    flow = forward_paths(teacher, student, bridges, images, candidate_paths(last))
    terms = fcfd_terms(flow, labels, T)
    sum(WEIGHTS[name] * value for name, value in terms.items()).backward()

    assert flow.s2t[last].shape[1:] == shape
    assert flow.s2t[last] is flow.student[last]
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
    close(flow.student_logits, naive.logits["pure"])
    for path, mixed in flow.mixed.items():
        close(mixed.logits, naive.logits[tuple(path)])
    for name in EQ_9:
        assert terms[name].item() == pytest.approx(expected[name].item(), rel=1e-4), name
    ours = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    ours |= {f"bridges.{name}": p.grad for name, p in bridges.named_parameters() if p.grad is not None}
    gradients = naive.gradients()
    assert ours.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in ours.values())
    for name, gradient in ours.items():
        difference = (gradient - gradients[name]).abs().max()
        assert difference <= 1e-3 * gradient.abs().max() + 1e-5 * largest, name
    assert all(p.grad is None for p in teacher.parameters())  # including its classifier, which the student shares

    # In the projector each path has its own statistics, updated once with momentum 0.1.
    paths = ["", *(f"path{k}." for k in range(2, last))]
    layers = [layer for layer in student.projector if isinstance(layer, nn.BatchNorm2d)]
    assert len(layers) == 3
    assert len(naive.seen) == len(paths)
    for path, seen in zip(paths, naive.seen, strict=True):
        for layer, x in zip(layers, seen, strict=True):
            state = layer.state_dict()
            assert state[f"{path}num_batches_tracked"] == 1
            close(state[f"{path}running_mean"], 0.1 * x.mean((0, 2, 3)))
            start = 0.9 if path == "" else 0  # running variances start at 1, those of a path at 0
            close(state[f"{path}running_var"], start + 0.1 * x.var((0, 2, 3)))


def test_simkd_keeps_the_students_initial_weights_but_not_its_classifier():
    torch.manual_seed(5)
    plain = build("MobileNetV2", 10)
    torch.manual_seed(5)
    student, teacher = build("MobileNetV2", 10), build("vgg13", 10)
    wrapped = build_simkd(student, teacher, 32)
    own = {f"student.{key}": value for key, value in plain.state_dict().items() if not key.startswith("classifier")}
    state = wrapped.state_dict()
    assert all(torch.equal(state[key], value) for key, value in own.items())
    rest = [key for key in state if key not in own]
    assert all(key.startswith("projector.") or key in ("classifier.weight", "classifier.bias") for key in rest)
    with torch.no_grad():  # as if the teacher's checkpoint were loaded later
        teacher.classifier.weight.fill_(2)
    assert torch.equal(wrapped.state_dict()["classifier.weight"], torch.full((10, 512), 2.0))
    convs = [layer for layer in wrapped.projector if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.bias) for c in convs] == [
        (1280, 256, 1, None),
        (256, 256, 3, None),
        (256, 512, 1, None),
    ]
    for conv in convs:
        deviation = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(deviation, rel=0.03)


def test_inference_uses_the_pure_path_and_a_plain_network_is_saved():
    teacher, student, _, bridges = build_pair("resnet14", "resnet8")
    images = torch.randn(4, 3, 32, 32)
    fresh = build_simkd(build("resnet8", 10), build("resnet14", 10), 32)
    for net in (teacher, student):
        track_paths(net, [2, 3])
    forward_paths(teacher, student, bridges, images, candidate_paths(4))
    fresh.load_state_dict(plain_state_dict(student))
    assert torch.equal(student.eval()(images), fresh.eval()(images))


@pytest.mark.parametrize(
    ("teacher_name", "student_name", "macs"),
    [  # multiply-adds of the projector
        ("resnet14", "resnet8", 8 * 8 * (64 * 32 + 9 * 32 * 32 + 32 * 64)),
        ("vgg13", "MobileNetV2", 2 * 2 * (1280 * 256 + 9 * 256 * 256 + 256 * 512)),
    ],
)
def test_added_cost_matches_a_hand_count(teacher_name, student_name, macs):
    c_s, c_t = (build(name, 7).classifier_layer for name in (student_name, teacher_name))
    c_s, c_t = (sum(p.numel() for p in layer.parameters()) // 7 - 1 for layer in (c_s, c_t))  # widths
    inner, pixels = c_t // 2, {"resnet8": 64, "MobileNetV2": 4}[student_name]
    parameters = macs // pixels + 2 * (inner + inner + c_t) + 7 * (c_t - c_s)  # convolutions, BatchNorms, classifiers
    alone, wrapped = added_cost(student_name, teacher_name, 7, 32)
    assert wrapped[0] - alone[0] == parameters
    assert wrapped[1] - alone[1] == 2 * (macs + 7 * (c_t - c_s))
    assert f"add {parameters / 1e3:.1f}k parameters" in cost_line(student_name, teacher_name, 7, 32)


def test_cost_of_a_published_network():
    parameters, flops = inference_cost(build("resnet8x4", 100), 32)
    assert parameters == 1233540
    # Stem; two convolutions and a shortcut per group; classifier.
    macs = 32 * 32 * (27 * 32 + 9 * 32 * 64 + 9 * 64 * 64 + 32 * 64)
    macs += 16 * 16 * (9 * 64 * 128 + 9 * 128 * 128 + 64 * 128)
    macs += 8 * 8 * (9 * 128 * 256 + 9 * 256 * 256 + 128 * 256) + 256 * 100
    assert flops == 2 * macs


def test_added_cost_leaves_the_global_generator_unchanged():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    added_cost("ShuffleV2", "resnet8x4", 10, 32)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("simkd", [False, True])
def test_dkd_replaces_kl_in_exactly_three_terms(simkd):
    teacher, student, bridges = pair("resnet14", "resnet8")
    if simkd:
        student = build_simkd(student, teacher, 32)
        bridges = build_bridges(teacher, student, 32)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    for net in (teacher, student):
        track_paths(net, [2, 3])
    flow = forward_paths(teacher, student, bridges, images, candidate_paths(4))
    with_kl, with_dkd = (
        fcfd_terms(flow, labels, 3.0, kd_loss=kd_loss) for kd_loss in (kl, partial(dkd, labels=labels, nckd=5.0))
    )
    assert with_kl == fcfd_terms(flow, labels, 3.0)
    assert [name for name in EQ_9 if with_kl[name] != with_dkd[name]] == ["kd", "func_kl", "func_prime"]
    by_path = {path: dkd(x.logits, flow.teacher_logits, 3.0, labels, 1.0, 5.0) for path, x in flow.mixed.items()}
    assert with_dkd["kd"] == dkd(flow.student_logits, flow.teacher_logits, 3.0, labels, 1.0, 5.0)
    for delta, name in ((1, "func_kl"), (0, "func_prime")):
        assert with_dkd[name] == sum(value for path, value in by_path.items() if path.delta == delta)
