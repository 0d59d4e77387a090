"""FCFD against a slow, simple implementation that runs each path separately on fresh copies."""

import copy
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.bridges import build_bridges
from common.fcfd import TERMS, fcfd_terms, forward_paths
from common.models import build
from common.multipath_bn import track_paths
from common.paths import candidate_paths

PAIRS = [
    ("resnet14", "resnet8"),
    ("wrn_16_2", "wrn_16_1"),
    ("vgg13", "vgg8"),
    ("ResNet50", "MobileNetV2"),
    ("resnet8x4", "ShuffleV1"),
    ("resnet8x4", "ShuffleV2"),
]
T = 4.0
WEIGHTS = {"task": 1.0, "kd": 0.9, "app": 5.0, "func_l2": 3.0, "func_kl": 0.7, "func_prime": 0.3}
WEIGHTS |= {"func_partial": 2.0, "func_prime_l2": 4.0}


def naive_kl(logits, target):
    p, q = F.softmax(target / T, 1), F.softmax(logits / T, 1)
    return (p * (p.log() - q.log())).sum(1).mean() * T * T


def naive_l2(x, y, last):
    loss = ((x - y) ** 2).mean()
    if last:
        loss = loss + ((x.clamp(min=0).mean((2, 3)) - y.clamp(min=0).mean((2, 3))) ** 2).mean()
    return loss


class Naive:
    """Each call of `run` uses fresh copies; gradients and losses are summed."""

    def __init__(self, teacher, student, bridges, images, labels):
        self.nets = {"teacher": teacher, "student": student, "bridges": bridges}
        self.images, self.labels, self.last = images, labels, teacher.num_stages
        self.gradients, self.terms = defaultdict(float), defaultdict(float)
        with torch.no_grad():
            copied = copy.deepcopy(teacher)
            self.target, x = {}, images
            for k in range(1, self.last + 1):
                x = self.target[k] = copied.stage(k, x)
            self.target_logits = copied.classify(x)

    def run(self, loss_fn, *args):
        nets = {role: copy.deepcopy(net) for role, net in self.nets.items()}
        losses = loss_fn(*nets.values(), *args)
        sum(WEIGHTS[name] * loss for name, loss in losses.items()).backward()
        for name, loss in losses.items():
            self.terms[name] += loss.item()
        for role, net in nets.items():
            for name, parameter in net.named_parameters():
                if parameter.grad is not None:
                    self.gradients[role, name] = self.gradients[role, name] + parameter.grad

    def task(self, teacher, student, bridges):
        return {"task": F.nll_loss(F.log_softmax(student(self.images), 1), self.labels)}

    def kd(self, teacher, student, bridges):
        return {"kd": naive_kl(student(self.images), self.target_logits)}

    def bridged(self, student, bridges, k):
        x = self.images
        for l in range(1, k + 1):
            x = student.stage(l, x)
        return bridges.s2t[str(k)](x)

    def app(self, teacher, student, bridges, k):
        return {"app": naive_l2(self.bridged(student, bridges, k), self.target[k], last=k == self.last)}

    def func(self, teacher, student, bridges, k):
        x, l2 = self.bridged(student, bridges, k), 0
        for l in range(k + 1, self.last + 1):
            x = teacher.stage(l, x)
            l2 = l2 + naive_l2(x, self.target[l], last=l == self.last)
            if l == k + 1:
                partial = l2
        terms = {"func_l2": l2, "func_kl": naive_kl(teacher.classify(x), self.target_logits)}
        return terms | {"func_partial": partial}

    def func_prime(self, teacher, student, bridges, k):
        x, direct, l2 = bridges.t2s[str(k)](self.target[k]), self.images, 0
        for l in range(1, k + 1):
            direct = student.stage(l, direct)
        for l in range(k + 1, self.last + 1):
            x, direct = student.stage(l, x), student.stage(l, direct)
            l2 = l2 + ((x - direct) ** 2).mean()
        return {"func_prime": naive_kl(student.classify(x), self.target_logits), "func_prime_l2": l2}


def pair(teacher_name, student_name):
    torch.manual_seed(3)
    teacher, student = build(teacher_name, 10), build(student_name, 10)
    bridges = build_bridges(teacher, student, 32)
    for net in (teacher, student, bridges):  # initial BatchNorm weights would hide mistakes
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0, 0.2)
            if isinstance(layer, nn.Linear):  # with small logits, rounding errors would dominate the KL
                nn.init.normal_(layer.weight, 0, 6 / layer.in_features**0.5)
    teacher.requires_grad_(False)
    return teacher, student, bridges


@pytest.mark.parametrize(("teacher_name", "student_name"), PAIRS)
def test_terms_and_gradients_match_the_naive_implementation(teacher_name, student_name):
    teacher, student, bridges = pair(teacher_name, student_name)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    naive = Naive(teacher, student, bridges, images, labels)
    last, middle = naive.last, range(2, naive.last)
    naive.run(naive.task)
    naive.run(naive.kd)
    for k in range(2, last + 1):
        naive.run(naive.app, k)
    for k in middle:
        naive.run(naive.func, k)
        naive.run(naive.func_prime, k)

    for net in (teacher, student):
        track_paths(net, middle)
    flow = forward_paths(teacher, student, bridges, images, candidate_paths(last))
    terms = fcfd_terms(flow, labels, T, TERMS)
    sum(WEIGHTS[name] * value for name, value in terms.items()).backward()

    assert list(terms) == list(TERMS)
    for name in terms:
        assert terms[name].item() == pytest.approx(naive.terms[name], rel=1e-4), name
    trained = {"student": student, "bridges": bridges}
    ours = {
        (role, name): parameter.grad
        for role, net in trained.items()
        for name, parameter in net.named_parameters()
        if parameter.grad is not None
    }
    assert ours.keys() == naive.gradients.keys()
    # The absolute tolerance is for gradients that are zero up to rounding, such as that of a bias before a BatchNorm.
    largest = max(gradient.abs().max() for gradient in ours.values())
    for key, gradient in ours.items():
        difference = (gradient - naive.gradients[key]).abs().max()
        assert difference <= 1e-3 * gradient.abs().max() + 1e-5 * largest, key
    assert all(parameter.grad is None for parameter in teacher.parameters())
