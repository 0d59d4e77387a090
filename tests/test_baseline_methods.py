"""The methods in ablations/baselines/ against naive implementations."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ablations import baseline_cifar100
from ablations.baselines.batch import Batch
from ablations.baselines.build import build_method
from ablations.baselines.crd import CRD
from ablations.baselines.fitnet import FitNet
from ablations.baselines.kd import DKD, KD
from ablations.baselines.reviewkd import ReviewKD, hcl
from ablations.baselines.vid import VID
from common.models import Taps

METHODS = [name for name in baseline_cifar100.METHODS if name != "alone"]


def networks(name, teacher="resnet14", student="resnet8", classes=20):
    """The settings, the student, the teacher in evaluation mode, and the method for 40 images."""
    argv = ["--teacher", teacher, "--student", student, "--method", name, "--device", "cpu", "--seed", "5"]
    args = baseline_cifar100.parse_args(argv)
    student, teacher = baseline_cifar100.build_networks(args, classes)
    return args, student, teacher.eval(), build_method(args, student, teacher, 32, torch.arange(40) % classes)


def random_taps(channels, sizes, batch=4, pooled=3, classes=5):
    """Random features and outputs that require gradients."""
    shapes = [(c, size, size) for c, size in zip(channels, sizes, strict=True)]
    features = [torch.randn(batch, *shape, requires_grad=True) for shape in shapes]
    others = [torch.randn(batch, *shape, requires_grad=True) for shape in ((pooled, 2, 2), (pooled,), (classes,))]
    return Taps(features, *others)


def exact(taps):
    """A copy in float64."""
    features, *others = ([x.detach().double().requires_grad_() for x in each] for each in (taps.features, taps[1:]))
    return Taps(features, *others[0])


def flat(taps):
    return [*taps.features, *taps[1:]]


def assert_matches(method, student, teacher, naive, batch=None):
    """The value of a method and its gradients are those of `naive(parameters by name, student, teacher)` in float64."""
    parameters = {name: p.detach().double().requires_grad_() for name, p in method.named_parameters()}
    exact_s, exact_t = exact(student), exact(teacher)
    value, expected = method(student, teacher, batch), naive(parameters, exact_s, exact_t)
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in method.named_parameters():
        torch.testing.assert_close(p.grad.double(), parameters[name].grad, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(flat(student), flat(exact_s), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)
    assert all(x.grad is None for x in flat(teacher))


# -------------------------------------------------------------------------------------------------- KD and DKD


def softmax(row, temperature):
    weights = [math.exp(x / temperature) for x in row]
    return [w / sum(weights) for w in weights]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_kd_and_dkd_match_naive_implementations():
    torch.manual_seed(0)
    student, teacher, labels = random_taps([], []), random_taps([], []), [3, 0, 4, 4]
    kd = of_label = of_others = 0
    for z_s, z_t, label in zip(student.logits.tolist(), teacher.logits.tolist(), labels, strict=True):
        p_s, p_t = softmax(z_s, 2), softmax(z_t, 2)
        kd += kl(p_t, p_s) / 4
        of_label += kl([p_t[label], 1 - p_t[label]], [p_s[label], 1 - p_s[label]]) / 4
        others = [[x for k, x in enumerate(z) if k != label] for z in (z_t, z_s)]
        of_others += kl(*(softmax(z, 2) for z in others)) / 4
    batch = Batch(torch.tensor(labels), None, None)
    assert KD(2)(student, teacher, batch).item() == pytest.approx(4 * kd, rel=1e-4)
    assert DKD(2, 1.5, 7)(student, teacher, batch).item() == pytest.approx(
        4 * (1.5 * of_label + 7 * of_others), rel=1e-4
    )


# ------------------------------------------------------------------------------------------------ FitNet and VID


def batch_norm(x, weight, bias):
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]


def randomize(method):
    """Random BatchNorm weights and biases, so that both matter."""
    for layer in method.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    return method


@pytest.mark.parametrize(
    ("size_s", "size_t", "kernel"),
    [(4, 4, (3, 2, 1, 1)), (8, 4, (3, 2, 3, 3)), (4, 8, (2, 3, 4, 4)), (6, 4, (3, 2, 3, 3))],
)
def test_fitnet_matches_a_naive_implementation(size_s, size_t, kernel):
    torch.manual_seed(0)
    method = randomize(FitNet(torch.Size((2, size_s, size_s)), torch.Size((3, size_t, size_t))))
    assert method.regressor[0].weight.shape == kernel
    student = random_taps((2, 2, 2), (8, size_s, 2))
    teacher = random_taps((3, 3, 3), (8, size_t, 2))

    def naive(p, s, t):
        weight, bias, x = p["regressor.0.weight"], p["regressor.0.bias"], s.features[1]
        if size_t == 2 * size_s:
            x = F.conv_transpose2d(x, weight, bias, 2, 1)
        else:
            x = F.conv2d(x, weight, bias, *((2, 1) if size_s == 2 * size_t else (1, 0)))
        x = batch_norm(x, p["regressor.1.weight"], p["regressor.1.bias"]).clamp(min=0)
        return sum(((a - b.detach()) ** 2).sum() for a, b in zip(x, t.features[1], strict=True)) / x.numel()

    assert_matches(method, student, teacher, naive)


def test_fitnet_refuses_a_student_with_much_smaller_features():
    with pytest.raises(ValueError, match="no regressor from 2x2 to 8x8"):
        FitNet(torch.Size((2, 2, 2)), torch.Size((2, 8, 8)))


def test_vid_matches_a_naive_implementation():
    torch.manual_seed(0)
    method = VID([2, 3, 2], [3, 2, 4])
    for stage in method.stages:
        variance = F.softplus(stage.alpha) + 1e-5
        torch.testing.assert_close(variance, torch.full_like(variance, 5.0))
        nn.init.normal_(stage.alpha)
    student, teacher = random_taps((2, 3, 2), (8, 4, 2)), random_taps((3, 2, 4), (8, 8, 1))

    def naive(p, s, t):
        total = 0
        for i, (x, y) in enumerate(zip(s.features, t.features, strict=True)):
            y, size = y.detach(), min(x.shape[2], y.shape[2])
            x, y = (average_pool(each, size).unflatten(2, (size, size)) for each in (x, y))
            for j in (0, 2, 4):
                x = torch.einsum("oi,bihw->bohw", p[f"stages.{i}.mu.{j}.weight"][:, :, 0, 0], x)
                x = x if j == 4 else x.clamp(min=0)
            for c in range(y.shape[1]):
                variance = (1 + p[f"stages.{i}.alpha"][c].exp()).log() + 1e-5
                parts = (x[:, c] - y[:, c]) ** 2 / variance + variance.log()
                total = total + 0.5 * parts.sum() / y.numel()
        return total

    assert_matches(method, student, teacher, naive)


# --------------------------------------------------------------------------------------------------- ReviewKD


def resize_nearest(x, size):
    """Nearest-neighbor resize, pixel by pixel."""
    (h, w), out = x.shape[2:], []
    for i in range(size[0]):
        out.append(torch.stack([x[:, :, i * h // size[0], j * w // size[1]] for j in range(size[1])], 2))
    return torch.stack(out, 2)


def average_pool(x, l):
    """Average pooling to l x l, cell by cell."""
    step = x.shape[2] // l
    cells = [x[:, :, i * step :, j * step :][:, :, :step, :step].mean((2, 3)) for i in range(l) for j in range(l)]
    return torch.stack(cells, 2)


def naive_hcl(x, y):
    squared, weights = [((x - y) ** 2).mean()], [1]
    for l in (4, 2, 1):
        if l < x.shape[2]:
            squared.append(((average_pool(x, l) - average_pool(y, l)) ** 2).mean())
            weights.append(weights[-1] / 2)
    return sum(w * value for w, value in zip(weights, squared, strict=True)) / sum(weights)


def naive_reviewkd(p, levels_s, levels_t):
    """The loss from named parameters, deepest level first; the levels are given from the shallowest to the deepest."""

    def conv_bn(x, name, padding):
        x = F.conv2d(x, p[f"{name}.0.weight"], padding=padding)
        return batch_norm(x, p[f"{name}.1.weight"], p[f"{name}.1.bias"])

    last = len(levels_s) - 1
    x = conv_bn(levels_s[last], f"fusions.{last}.conv1", 0)
    loss = ((conv_bn(x, f"fusions.{last}.conv2", 1) - levels_t[last]) ** 2).mean()
    for level in reversed(range(last)):
        target = levels_t[level]
        own = conv_bn(levels_s[level], f"fusions.{level}.conv1", 0)
        deeper = resize_nearest(x, own.shape[2:])
        z = F.conv2d(torch.cat([own, deeper], 1), *(p[f"fusions.{level}.attention.0.{k}"] for k in ("weight", "bias")))
        z = 1 / (1 + torch.exp(-z))
        x = resize_nearest(z[:, 0, None] * own + z[:, 1, None] * deeper, target.shape[2:])
        loss = loss + naive_hcl(conv_bn(x, f"fusions.{level}.conv2", 1), target)
    return loss


@pytest.mark.parametrize(
    ("sizes_s", "sizes_t"),
    [
        ((16, 8, 4), (16, 8, 4)),
        ((8, 4, 2), (16, 8, 4)),  # the student's maps are smaller, as with ShuffleV1
        ((16, 8, 8), (8, 4, 4)),
        ((8, 4, 2, 2), (8, 4, 2, 2)),  # four features; HCL without its larger sizes
    ],
)
def test_reviewkd_matches_a_naive_implementation(sizes_s, sizes_t):
    torch.manual_seed(0)
    channels_s, channels_t = ([c * k for k in range(1, len(sizes_s) + 1)] for c in (4, 3))
    method = randomize(ReviewKD([*channels_s, 7], [*channels_t, 5]))
    for fusion in method.fusions[:-1]:
        nn.init.normal_(fusion.attention[0].bias)
    student, teacher = random_taps(channels_s, sizes_s, pooled=7), random_taps(channels_t, sizes_t, pooled=5)

    def naive(p, s, t):
        levels_s, levels_t = ([*x.features, x.pooled[:, :, None, None]] for x in (s, t))
        return naive_reviewkd(p, levels_s, [x.detach() for x in levels_t])

    assert_matches(method, student, teacher, naive)


def test_hcl_matches_hand_computed_values():
    x, y = torch.tensor([[[[3.0, 1.0], [1.0, 1.0]]]]), torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]]])
    assert hcl(x, y).item() == pytest.approx((4 / 4 + 0.5 * 0.5**2) / 1.5)  # the maps are too small for 4x4 and 2x2
    assert hcl(x[..., :1, :1], y[..., :1, :1]).item() == 4


@pytest.mark.parametrize(
    ("teacher", "student", "c_s", "c_t", "c_mid"),
    [
        ("vgg13", "MobileNetV2", (12, 16, 48, 160, 1280), (128, 256, 512, 512, 512), 512),
        ("resnet32x4", "ShuffleV2", (116, 232, 464, 1024), (64, 128, 256, 256), 512),
        ("wrn_40_2", "wrn_40_1", (16, 32, 64, 64), (32, 64, 128, 128), 64),
    ],
)
def test_fusions_have_the_published_shapes(teacher, student, c_s, c_t, c_mid):
    *_, method = networks("reviewkd", teacher, student)
    shapes = [[list(conv[0].weight.shape) for conv in (f.conv1, f.conv2)] for f in method.fusions]
    assert shapes == [[[c_mid, a, 1, 1], [b, c_mid, 3, 3]] for a, b in zip(c_s, c_t, strict=True)]
    assert [f.attention is None for f in method.fusions] == [False] * (len(c_s) - 1) + [True]
    for fusion in method.fusions:
        for conv in (fusion.conv1[0], fusion.conv2[0]):
            bound = (3 / conv.weight[0].numel()) ** 0.5
            assert conv.bias is None
            assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.02)


# -------------------------------------------------------------------------------------------------------- CRD

LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 2, 2])  # unsorted and unbalanced


def crd_loss(method, pooled_s, pooled_t, index, negatives):
    """The loss for these negatives."""
    method.draw = lambda *_: negatives
    student, teacher = (Taps([], None, pooled, None) for pooled in (pooled_s, pooled_t))
    return method(student, teacher, Batch(None, index, None))


def naive_direction(v, bank, z, index, negatives, temperature):
    """The loss of one direction and its Z, computed anchor by anchor and row by row."""
    n, m = len(bank), negatives.shape[1]
    scores = [
        [((a * bank[row]).sum() / temperature).exp() for row in (i, *others)]
        for a, i, others in zip(v, index.tolist(), negatives.tolist(), strict=True)
    ]
    z = z or sum(s.item() for row in scores for s in row) / (len(v) * (m + 1)) * n
    total = 0
    for positive, *rest in scores:
        total = total - (positive / z / (positive / z + m / n + 1e-7)).log()
        for s in rest:
            total = total - (m / n / (s / z + m / n + 1e-7)).log()
    return total / len(v), z


def test_crd_matches_a_naive_implementation_for_three_steps():
    torch.manual_seed(0)
    method = CRD(3, 5, LABELS, negatives=7, dim=4, momentum=0.3)
    banks = {role: getattr(method, f"bank_{role}").double() for role in "st"}
    z = {"s": None, "t": None}
    for step, batch in enumerate(([4, 0, 9], [10, 4], [1, 0, 2])):
        index = torch.tensor(batch)
        negatives = torch.randint(12, (len(batch), 7))
        feature_s, feature_t = (torch.randn(len(batch), c, requires_grad=True) for c in (3, 5))
        method.zero_grad()
        value = crd_loss(method, feature_s, feature_t, index, negatives)
        value.backward()

        parameters = {n: p.detach().double().requires_grad_() for n, p in method.named_parameters()}
        exact_s, exact_t = (x.detach().double().requires_grad_() for x in (feature_s, feature_t))
        v = {}
        for role, feature in (("s", exact_s), ("t", exact_t.detach())):
            embedded = feature @ parameters[f"embed_{role}.weight"].T + parameters[f"embed_{role}.bias"]
            v[role] = embedded / (embedded**2).sum(1, keepdim=True).sqrt()
        loss_s, z["t"] = naive_direction(v["s"], banks["t"], z["t"], index, negatives, 0.07)
        loss_t, z["s"] = naive_direction(v["t"], banks["s"], z["s"], index, negatives, 0.07)
        (loss_s + loss_t).backward()
        assert value.item() == pytest.approx((loss_s + loss_t).item(), rel=1e-5), step
        assert (method.z_s.item(), method.z_t.item()) == pytest.approx((z["s"], z["t"]), rel=1e-5), step
        for name, p in method.named_parameters():
            torch.testing.assert_close(p.grad.double(), parameters[name].grad, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(feature_s.grad.double(), exact_s.grad, rtol=1e-3, atol=1e-5)
        assert feature_t.grad is None

        for role, bank in banks.items():
            for i, a in zip(batch, v[role].detach(), strict=True):
                moved = 0.3 * bank[i] + 0.7 * a
                bank[i] = moved / (moved**2).sum().sqrt()
            ours = getattr(method, f"bank_{role}")
            torch.testing.assert_close(ours.double(), bank, rtol=1e-5, atol=1e-6)
            assert not ours.requires_grad


def test_crd_has_the_published_initialization():
    method = CRD(64, 64, torch.arange(500) % 10)
    bound = (3 / 128) ** 0.5
    for bank in (method.bank_s, method.bank_t):
        assert bank.shape == (500, 128)
        assert -bound <= bank.min().item() < -0.99 * bound
        assert 0.99 * bound < bank.max().item() <= bound
    assert not torch.equal(method.bank_s, method.bank_t)
    assert (method.z_s.item(), method.z_t.item()) == (-1, -1)
    assert (method.negatives, method.temperature, method.momentum) == (16384, 0.07, 0.5)


def test_negatives_are_uniform_over_the_other_classes():
    method = CRD(3, 5, LABELS)  # too few images for negatives without replacement
    index = torch.arange(12)
    sampled = method.draw(index, torch.Generator().manual_seed(1))
    assert sampled.shape == (12, 16384)
    for i, row in zip(index.tolist(), sampled, strict=True):
        others = LABELS[i] != LABELS
        counts = row.bincount(minlength=12).double()
        assert counts[~others].sum() == 0
        freedom, expected = others.sum().item() - 1, 16384 / others.sum().item()
        chi_squared = ((counts[others] - expected) ** 2 / expected).sum().item()
        # Near the degrees of freedom for independent samples; almost 0 for sampling without replacement.
        assert 0.05 * freedom < chi_squared < freedom + 5 * (2 * freedom) ** 0.5
    repeats = (sampled[0] == sampled[5]).double().mean().item()  # two anchors of the same class
    assert repeats == pytest.approx(1 / 6, abs=0.02)
    assert torch.equal(sampled, method.draw(index, torch.Generator().manual_seed(1)))


def test_negatives_without_replacement_are_uniform_over_the_other_classes():
    method, index = CRD(3, 5, LABELS, negatives=5), torch.arange(12).repeat(500)
    assert CRD(3, 5, LABELS, replacement=True, negatives=5).replacement
    sampled = method.draw(index, torch.Generator().manual_seed(1))
    assert sampled.shape == (6000, 5)
    assert all(len(set(row)) == 5 for row in sampled.tolist())
    for i in range(12):
        counts = sampled[index == i].flatten().bincount(minlength=12).double()
        others = LABELS[i] != LABELS
        assert counts[~others].sum() == 0
        share = 5 / others.sum().item()  # of an image's rows; counts are binomial
        assert (counts[others] - 500 * share).abs().max() < 5 * (500 * share * (1 - share) + 1) ** 0.5
    assert not torch.equal(sampled[0].sort().values, sampled[12].sort().values)
    # The largest class leaves six other images.
    assert [CRD(3, 5, LABELS, negatives=m).replacement for m in (6, 7)] == [False, True]


def test_crd_computes_in_float32_under_autocast():
    torch.manual_seed(0)
    method, index = CRD(16, 16, LABELS, negatives=50), torch.tensor([3, 7])
    twin, negatives = copy.deepcopy(method), method.draw(index, torch.Generator())
    feature_s, feature_t = (torch.randn(2, 16, dtype=torch.bfloat16) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        value = crd_loss(method, feature_s, feature_t, index, negatives)
    assert value.dtype == torch.float32
    assert torch.equal(value, crd_loss(twin, feature_s, feature_t, index, negatives))


def test_crd_rejects_a_single_class():
    with pytest.raises(ValueError, match="different classes"):
        CRD(3, 5, torch.full((6,), 4))


# ------------------------------------------------------------------------------------------------------- SimKD


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("resnet14", "resnet8"), ("vgg8", "MobileNetV2"), ("resnet14", "ShuffleV2"), ("wrn_16_2", "wrn_16_1")],
)
def test_simkd_matches_a_naive_implementation(teacher, student):
    args, student, teacher, method = networks("simkd", teacher, student)
    images = torch.randn(3, 3, 32, 32)
    terms, logits = baseline_cifar100.loss_terms(method, student, teacher, images, None, args)
    own = student.student
    x, y = own.stage(1, images), images
    for k in range(2, own.num_stages):
        x = own.stage(k, x)
    if args.student == "MobileNetV2":  # before the final convolutions
        x = own.blocks[6](own.blocks[5](x))
    elif args.student == "wrn_16_1":
        x = own.block3(x)
    else:
        x = own.layer3(x)
    for k in range(1, teacher.num_stages + 1):
        y = teacher.stage(k, y)
    y = y.clamp(min=0)
    ratio = x.shape[2] / y.shape[2]
    x = average_pool(x, y.shape[2]).unflatten(2, y.shape[2:]) if ratio > 1 else x
    y = average_pool(y, x.shape[2]).unflatten(2, x.shape[2:]) if ratio < 1 else y
    layers = [layer for layer in student.projector if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    for conv, bn in zip(layers[::2], layers[1::2], strict=True):
        x = batch_norm(F.conv2d(x, conv.weight, padding=conv.kernel_size[0] // 2), bn.weight, bn.bias).clamp(min=0)
    assert [conv.kernel_size[0] for conv in layers[::2]] == [1, 3, 1]
    for conv in layers[::2]:  # PyTorch's default
        assert conv.weight.abs().max().item() == pytest.approx(conv.weight[0].numel() ** -0.5, rel=0.02)
    assert list(terms) == ["distill"]
    assert terms["distill"].item() == pytest.approx(((x - y) ** 2).mean().item(), rel=1e-4)
    torch.testing.assert_close(logits, teacher.classifier_layer(x.mean((2, 3))), rtol=1e-3, atol=1e-4)
    student.eval()
    torch.testing.assert_close(student(images), student.taps(images).logits)


# ------------------------------------------------------------------------------------------------------ a step


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_step_gradients_reach_only_trained_parameters(name, amp):
    args, student, teacher, method = networks(name)
    before = copy.deepcopy(teacher.state_dict())
    index = torch.tensor([3, 0, 21, 7])
    args.w_task = 0 if name == "simkd" else 1
    with torch.autocast("cpu", amp, enabled=amp is not None):
        batch = Batch(index % 20, index, torch.Generator())
        terms, logits = baseline_cifar100.loss_terms(method, student, teacher, torch.randn(4, 3, 32, 32), batch, args)
    assert logits.shape == (4, 20)
    assert all(term.dtype == torch.float32 for term in terms.values())
    terms["distill"].backward()
    trained = dict(student.named_parameters()) | {f"method.{key}": p for key, p in method.named_parameters()}
    without = {key for key, p in trained.items() if p.requires_grad and (p.grad is None or not p.grad.any())}
    own = {"fitnet": ("layer3", "fc"), "kd": (), "dkd": (), "simkd": ("student.fc",)}.get(name, ("fc",))
    assert without == {key for key in trained if key.startswith(own)}
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    if name != "simkd":
        assert terms["task"].item() == pytest.approx(F.cross_entropy(logits.float(), index % 20).item())


def test_each_method_reads_the_published_features():
    """Before or after the ReLU, of the teacher and the student."""
    for name in METHODS:
        args, student, teacher, method = networks(name)
        images, batch = torch.randn(4, 3, 32, 32), Batch(torch.arange(4), torch.arange(4), torch.Generator())
        seen = []
        method.forward = lambda own, target, _, seen=seen: seen.extend((own, target)) or own.logits.sum()
        baseline_cifar100.loss_terms(method, student, teacher, images, batch, args)
        negative = [any((f < 0).any() for f in taps.features) for taps in seen]
        assert negative == [False, name == "reviewkd"], name


@pytest.mark.parametrize("name", ["vid", "reviewkd"])
def test_networks_of_different_depth_are_refused(name):
    with pytest.raises(ValueError, match="5 stages and the student 4"):
        networks(name, "vgg8", "resnet8")
    networks("simkd", "vgg8", "resnet8")
