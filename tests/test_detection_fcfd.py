"""FCFD on detectors against a naive implementation, and the modules that each term trains."""

import copy
import math

import pytest
import torch
from tiny_detectors import shrink
from torch import nn
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import roi_align

from common.detection.detectors import build_detector
from common.detection.fcfd import (
    LEVELS,
    ROI_LEVELS,
    TASK_LOSSES,
    TERMS,
    RoiOutput,
    detection_terms,
    distance,
    forward_detectors,
    level_bridges,
)

K = 3
IMAGES = [(90, 120), (100, 130)]


@pytest.fixture
def pair(monkeypatch):
    """A frozen teacher, a student, and bridges, with random BatchNorm weights; two images with targets."""
    shrink(monkeypatch)
    torch.manual_seed(0)
    teacher = build_detector("resnet18", K, [96], scratch=True).requires_grad_(False)
    student = build_detector("mobilenet_v2", K, [96], rois=24, scratch=True)
    bridges = level_bridges()
    for net in (teacher, student, bridges):
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0, 0.2)
    for net in (teacher, student):
        nn.init.normal_(net.roi_heads.box_predictor.cls_score.weight, 0, 1)  # distinct outputs
        nn.init.normal_(net.roi_heads.box_predictor.bbox_pred.weight, 0, 0.3)
    images = [torch.rand(3, height, width) for height, width in IMAGES]
    targets = [
        {"boxes": torch.tensor([[5.0, 8.0, 60.0, 70.0], [50.0, 20.0, 90.0, 80.0]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.tensor([[20.0, 10.0, 44.0, 50.0]]), "labels": torch.tensor([2])},
    ]
    # Proposals of all sizes, some larger than the images, use all four levels.
    sides = torch.tensor([20.0, 35.0, 60.0, 120.0, 150.0, 230.0, 300.0, 460.0, 900.0])
    boxes = torch.stack([sides / 90, sides / 70, 1.1 * sides, sides], 1)

    def proposals(batch, levels, targets, rpn=RegionProposalNetwork.forward):
        return [boxes for _ in images], rpn(student.rpn, batch, levels, targets)[1]

    monkeypatch.setattr(student.rpn, "forward", proposals)
    return teacher.eval(), student.train(), bridges.train(), images, targets


def run_flow(pair, terms=TERMS):
    teacher, student, bridges, images, targets = pair
    torch.manual_seed(1)  # the student samples its proposals
    return forward_detectors(teacher, student, bridges, images, targets, terms)


class Naive:
    """Functional ROI heads on proposals cropped one by one; each term runs on fresh copies."""

    def __init__(self, teacher, student, bridges, images, targets):
        self.nets = teacher, student, bridges
        torch.manual_seed(1)
        probe = copy.deepcopy(student)
        batch, scaled = probe.transform(images, targets)
        proposals, _ = probe.rpn(batch, probe.backbone(batch.tensors), scaled)
        self.pixels, self.sizes = batch.tensors, batch.image_sizes
        self.proposals, *_ = probe.roi_heads.select_training_samples(proposals, scaled)

    def head(self, net, levels):
        rows = []
        for i, boxes in enumerate(self.proposals):
            for box in boxes:
                side = ((box[2] - box[0]) * (box[3] - box[1])).sqrt().item()
                level = min(max(int(torch.tensor(side / 224 + 1e-30).log2().add(4).floor()), 2), 5)  # Eq. 1 of FPN
                feature = levels[str(level - 2)][i : i + 1]
                crop = roi_align(feature, [box[None]], 7, 1 / 2**level, sampling_ratio=2)
                head, last = net.roi_heads.box_head, net.roi_heads.box_predictor
                x = (crop.reshape(1, -1) @ head.fc6.weight.T + head.fc6.bias).clamp(min=0)
                x = (x @ head.fc7.weight.T + head.fc7.bias).clamp(min=0)
                rows.append(torch.cat([last.cls_score(x), last.bbox_pred(x)], 1))
        rows = torch.cat(rows)
        return rows[:, : K + 1], rows[:, K + 1 :].view(len(rows), K + 1, 4)

    def outputs(self, which, teacher, student, bridges):
        with torch.no_grad():
            levels_t = teacher.backbone(self.pixels)
            target = self.head(teacher, levels_t)
        levels_s = student.backbone(self.pixels)
        if which == "kd":
            return self.head(student, levels_s), target
        if which == "func":
            return self.head(teacher, {level: bridges.s2t[level](levels_s[level]) for level in ROI_LEVELS}), target
        return self.head(student, {level: bridges.t2s[level](levels_t[level]) for level in ROI_LEVELS}), target

    def term(self, which):
        """The term's value and its gradients, keyed by (network, parameter)."""
        nets = [copy.deepcopy(net) for net in self.nets]
        teacher, student, bridges = nets
        if which == "app":
            levels_t, levels_s = teacher.backbone(self.pixels), student.backbone(self.pixels)
            loss = sum(((bridges.s2t[level](levels_s[level]) - levels_t[level]) ** 2).mean() for level in LEVELS)
        else:
            (logits, offsets), (logits_t, offsets_t) = self.outputs(which, *nets)
            p, log_p = logits_t.softmax(1), logits.log_softmax(1)
            loss = (p * (p.log() - log_p)).sum() / len(p)
            loss = loss + sum(((offsets[:, k] - offsets_t[:, k]) ** 2).mean() for k in range(1, K + 1)) / K
        loss.backward()
        return loss.item(), gradients(*nets[1:])


def gradients(student, bridges):
    named = {"student": student, "bridges": bridges}
    return {
        (role, name): p.grad.clone()
        for role, net in named.items()
        for name, p in net.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("term", ["kd", "app", "func", "func_prime"])
def test_terms_and_gradients_match_the_naive_implementation(pair, term):
    value, expected = Naive(*pair).term(term)
    ours = detection_terms(run_flow(pair), terms=(term,))[term]
    ours.backward()
    assert ours.item() == pytest.approx(value, rel=1e-4)
    actual = gradients(pair[1], pair[2])
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in expected.items():
        difference = (actual[key] - gradient).abs().max()
        assert difference <= 1e-3 * gradient.abs().max() + 1e-5 * largest, key


BACKBONE = {"student.backbone.body", "student.backbone.fpn"}
HEAD = {"student.roi_heads.box_head", "student.roi_heads.box_predictor"}
ROI_S2T = {f"bridges.s2t.{level}" for level in ROI_LEVELS}
TRAINED_MODULES = {
    "task": BACKBONE | HEAD | {"student.rpn.head"},
    "kd": BACKBONE | HEAD,
    "app": BACKBONE | ROI_S2T | {"bridges.s2t.pool"},
    "func": BACKBONE | ROI_S2T,
    "func_prime": HEAD | {f"bridges.t2s.{level}" for level in ROI_LEVELS},
}


@pytest.mark.parametrize("term", TERMS)
def test_each_term_trains_exactly_its_modules(pair, term):
    detection_terms(run_flow(pair), terms=(term,))[term].backward()
    for role, net in (("student", pair[1]), ("bridges", pair[2]), ("teacher", pair[0])):
        for name, parameter in net.named_parameters():
            reached = any(f"{role}.{name}".startswith(f"{module}.") for module in TRAINED_MODULES[term])
            has_gradient = parameter.grad is not None and bool(parameter.grad.any())
            assert has_gradient == reached, (role, name)


def test_the_task_loss_matches_torchvision(pair):
    student, images, targets = pair[1], *pair[3:]
    torch.manual_seed(1)
    theirs = student(images, targets)
    torch.manual_seed(1)
    flow = forward_detectors(None, student, None, images, targets, ("task",))
    assert set(flow.task) == set(TASK_LOSSES) == set(theirs)
    for name, loss in theirs.items():
        assert torch.equal(flow.task[name], loss), name
    assert detection_terms(flow, terms=("task",))["task"].item() == pytest.approx(sum(theirs.values()).item())


def test_only_needed_bridges_are_built():
    bridges = level_bridges()
    assert list(bridges.s2t) == ["0", "1", "2", "3", "pool"]
    assert list(bridges.t2s) == ["0", "1", "2", "3"]
    for net in (*bridges.s2t.values(), *bridges.t2s.values()):
        conv, norm = net
        assert (conv.weight.shape, conv.bias, conv.stride) == ((256, 256, 3, 3), None, (1, 1))
        assert isinstance(norm, nn.BatchNorm2d)
    x = torch.randn(1, 256, 4, 6)
    assert bridges.s2t["0"](x).shape == x.shape
    assert bridges.s2t["0"](x).min() < 0  # no activation
    for terms, s2t, t2s in ((("func",), 4, 0), (("app",), 5, 0), (("func_prime",), 0, 4), (("kd",), 0, 0)):
        bridges = level_bridges(terms)
        assert (len(bridges.s2t), len(bridges.t2s)) == (s2t, t2s), terms


def test_distance_matches_a_hand_computed_value():
    """Two proposals and two classes; background offsets are ignored."""
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]), torch.tensor([[0.125, 0.375, 0.5], [0.2, 0.2, 0.6]])
    target, output = (RoiOutput(x.log() + 3, torch.zeros(2, 12)) for x in (p, q))
    target.offsets[:, :4] = 100.0
    output.offsets[1, 11] = 2.0
    kl = (0.5 * math.log(4) + 0.25 * math.log(2 / 3) + 0.25 * math.log(1 / 2)) / 2
    assert distance(output, target).item() == pytest.approx(kl + 2.0**2 / 16)
    softened = [x.sqrt() / x.sqrt().sum(1, keepdim=True) for x in (p, q)]  # T = 2
    kl = (softened[0] * (softened[0] / softened[1]).log()).sum().item() / 2
    assert distance(output, target, temperature=2).item() == pytest.approx(4 * kl + 2.0**2 / 16)


def test_images_without_boxes_can_be_trained_on(pair):
    teacher, student, bridges, images, targets = pair
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}, targets[1]]
    terms = detection_terms(run_flow((teacher, student, bridges, images, targets)))
    sum(terms.values()).backward()
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad is not None for net in (student, bridges) for p in net.parameters())
