"""ablations/train_baseline.py: losses against naive implementations, and complete runs."""

import copy
import json
from functools import partial

import pytest
import running
import torch
import torch.nn.functional as F
import yaml
from running import PAIR, SMALL, assert_bitwise_equal, assert_invalid, read_log

import cifar100
from ablations import train_baseline
from ablations.baselines.crd import CRD
from ablations.baselines.reviewkd import ReviewKD, hcl
from common.data.batches import train_batches
from common.data.sources import load_data
from common.models import build
from common.randomness import derive_seed, generator

call = partial(running.call, module=train_baseline)
METHODS = ("reviewkd", "crd", "simkd")
NETWORKS = PAIR[:4]
TINY = [*PAIR, "--subset", 40, "--test-subset", 40, "--batch-size", 20]


def networks(method, teacher="resnet14", student="resnet8"):
    """The student, the teacher in evaluation mode, and the method's module for 40 images in 20 classes."""
    argv = ["--teacher", teacher, "--student", student, "--method", method, "--device", "cpu", "--seed", "5"]
    student, teacher = train_baseline.build_networks(train_baseline.parse_args(argv), 20)
    return student, teacher.eval(), train_baseline.build_method(method, teacher, student, torch.arange(40) % 20)


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


def naive_reviewkd(p, features_s, features_t):
    """The loss from named parameters, deepest level first."""

    def conv_bn(x, name, padding):
        x = F.conv2d(x, p[f"{name}.0.weight"], padding=padding)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        scale, shift = (p[f"{name}.1.{key}"][:, None, None] for key in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def embedding(x):
        return x.clamp(min=0).mean((2, 3))[:, :, None, None]

    levels = len(features_s)  # the stages after the stem, and the embedding
    x = conv_bn(embedding(features_s[-1]), f"fusions.{levels - 1}.conv1", 0)
    loss = ((conv_bn(x, f"fusions.{levels - 1}.conv2", 1) - embedding(features_t[-1])) ** 2).mean()
    for level in reversed(range(levels - 1)):
        feature, target = features_s[level + 1], features_t[level + 1]
        own = conv_bn(feature, f"fusions.{level}.conv1", 0)
        deeper = resize_nearest(x, own.shape[2:])
        z = F.conv2d(torch.cat([own, deeper], 1), *(p[f"fusions.{level}.attention.0.{k}"] for k in ("weight", "bias")))
        z = 1 / (1 + torch.exp(-z))
        x = z[:, 0, None] * own + z[:, 1, None] * deeper
        loss = loss + naive_hcl(conv_bn(resize_nearest(x, target.shape[2:]), f"fusions.{level}.conv2", 1), target)
    return loss


@pytest.mark.parametrize(
    ("sizes_s", "sizes_t"),
    [
        ((16, 16, 8, 4), (16, 16, 8, 4)),
        ((16, 8, 4, 2), (16, 16, 8, 4)),  # the student's maps are smaller, as with ShuffleV1
        ((16, 16, 8, 8), (16, 8, 4, 4)),
        ((16, 8, 4, 2, 2), (16, 8, 4, 2, 2)),  # five stages; HCL without its larger sizes
    ],
)
def test_reviewkd_matches_a_naive_implementation(sizes_s, sizes_t):
    torch.manual_seed(0)
    shapes_s, shapes_t = (
        {k: torch.Size((c * k, size, size)) for k, size in enumerate(sizes, 1)}
        for c, sizes in ((2, sizes_s), (3, sizes_t))
    )
    method = ReviewKD(shapes_s, shapes_t)
    for name, p in method.named_parameters():
        if name.endswith("1.weight"):  # BatchNorm
            torch.nn.init.uniform_(p, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(p)
    features_s, features_t = (
        [torch.randn(4, *shape, requires_grad=True) for shape in s.values()] for s in (shapes_s, shapes_t)
    )
    exact = {name: p.detach().double().requires_grad_() for name, p in method.named_parameters()}
    exact_s, exact_t = (
        [x.detach().double().requires_grad_() for x in features] for features in (features_s, features_t)
    )

    value, expected = method(features_s, features_t), naive_reviewkd(exact, exact_s, [x.detach() for x in exact_t])
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    pairs = [(p, exact[name]) for name, p in method.named_parameters()] + list(zip(features_s, exact_s, strict=True))[
        1:
    ]
    for ours, naive in pairs:
        torch.testing.assert_close(ours.grad.double(), naive.grad, rtol=1e-3, atol=1e-4)
    assert features_s[0].grad is None  # the stem is not a level
    assert all(x.grad is None for x in features_t)


def test_hcl_matches_hand_computed_values():
    x, y = torch.tensor([[[[3.0, 1.0], [1.0, 1.0]]]]), torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]]])
    assert hcl(x, y).item() == pytest.approx((4 / 4 + 0.5 * 0.5**2) / 1.5)  # the maps are too small for 4x4 and 2x2
    assert hcl(x[..., :1, :1], y[..., :1, :1]).item() == 4


def test_fusions_match_a_published_pair():
    *_, method = networks("reviewkd", "vgg13", "MobileNetV2")
    shapes = [[list(conv[0].weight.shape) for conv in (f.conv1, f.conv2)] for f in method.fusions]
    c_s, c_t = (12, 16, 48, 1280, 1280), (128, 256, 512, 512, 512)
    assert shapes == [[[512, a, 1, 1], [b, 512, 3, 3]] for a, b in zip(c_s, c_t, strict=True)]
    assert [f.attention is None for f in method.fusions] == [False] * 4 + [True]
    for fusion in method.fusions:
        for conv in (fusion.conv1[0], fusion.conv2[0]):
            bound = (3 / conv.weight[0].numel()) ** 0.5
            assert conv.bias is None
            assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)


# -------------------------------------------------------------------------------------------------------- CRD

LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 2, 2])  # unsorted and unbalanced


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
        feature_s, feature_t = (torch.randn(len(batch), c, 2, 2, requires_grad=True) for c in (3, 5))
        method.zero_grad()
        value = method(feature_s, feature_t, index, negatives)
        value.backward()

        exact = {n: p.detach().double().requires_grad_() for n, p in method.named_parameters()}
        exact_s, exact_t = (x.detach().double().requires_grad_() for x in (feature_s, feature_t))
        v = {}
        for role, feature in (("s", exact_s), ("t", exact_t.detach())):
            embedded = feature.clamp(min=0).mean((2, 3)) @ exact[f"embed_{role}.weight"].T + exact[f"embed_{role}.bias"]
            v[role] = embedded / (embedded**2).sum(1, keepdim=True).sqrt()
        loss_s, z["t"] = naive_direction(v["s"], banks["t"], z["t"], index, negatives, 0.07)
        loss_t, z["s"] = naive_direction(v["t"], banks["s"], z["s"], index, negatives, 0.07)
        (loss_s + loss_t).backward()
        assert value.item() == pytest.approx((loss_s + loss_t).item(), rel=1e-5), step
        assert (method.z_s.item(), method.z_t.item()) == pytest.approx((z["s"], z["t"]), rel=1e-5), step
        for name, p in method.named_parameters():
            torch.testing.assert_close(p.grad.double(), exact[name].grad, rtol=1e-3, atol=1e-5)
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
    method = CRD(3, 5, LABELS)
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


def test_crd_computes_in_float32_under_autocast():
    torch.manual_seed(0)
    method, index = CRD(16, 16, LABELS, negatives=50), torch.tensor([3, 7])
    twin, negatives = copy.deepcopy(method), method.draw(index, torch.Generator())
    feature_s, feature_t = (torch.randn(2, 16, 2, 2, dtype=torch.bfloat16) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        value = method(feature_s, feature_t, index, negatives)
    assert value.dtype == torch.float32
    assert torch.equal(value, twin(feature_s, feature_t, index, negatives))


def test_crd_rejects_a_single_class():
    with pytest.raises(ValueError, match="different classes"):
        CRD(3, 5, torch.full((6,), 4))


# ----------------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize(
    ("teacher", "student"), [("resnet14", "resnet8"), ("vgg8", "MobileNetV2"), ("resnet8", "wrn_16_1")]
)
def test_simkd_matches_a_naive_implementation(teacher, student):
    student, teacher, method = networks("simkd", teacher, student)
    images = torch.randn(3, 3, 32, 32)
    losses, logits = train_baseline.terms(method, teacher, student, images, torch.arange(3), torch.arange(3), None)
    x, y = images, images
    for k in range(1, teacher.num_stages + 1):
        x, y = student.student.stage(k, x), teacher.stage(k, y)
    x, y = student.projector(x), y.clamp(min=0)
    ratio = y.shape[2] // x.shape[2]
    y = sum(y[:, :, i::ratio, j::ratio] for i in range(ratio) for j in range(ratio)) / ratio**2
    assert list(losses) == ["distill"]
    assert losses["distill"].item() == pytest.approx(((x - y) ** 2).mean().item(), rel=1e-4)
    torch.testing.assert_close(logits, teacher.classify(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_step_gradients_reach_only_trained_parameters(name, amp):
    student, teacher, method = networks(name)
    before = copy.deepcopy(teacher.state_dict())
    index = torch.tensor([3, 0, 21, 7])
    with torch.autocast("cpu", amp, enabled=amp is not None):
        arguments = (torch.randn(4, 3, 32, 32), index % 20, index, torch.Generator())
        losses, logits = train_baseline.terms(method, teacher, student, *arguments)
    assert logits.shape == (4, 20)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    losses["distill"].backward()
    trained = [p for p in student.parameters() if p.requires_grad] + list(method.parameters())
    own = [] if name == "simkd" else list(student.classifier_layer.parameters())  # no feature depends on it
    assert all((p.grad is None or not p.grad.any()) == any(p is q for q in own) for p in trained)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    if name != "simkd":
        assert losses["task"].item() == pytest.approx(F.cross_entropy(logits.float(), index % 20).item())


# ----------------------------------------------------------------------------------------------- complete runs


@pytest.mark.parametrize("name", METHODS)
def test_two_epochs_match_a_manual_loop(tmp_path, capsys, monkeypatch, teacher, name):
    """Two of 24 epochs, stopped after each, against a loop with hand-written SGD and schedules."""
    draw, negatives = CRD.draw, []
    monkeypatch.setattr(CRD, "draw", lambda *args: negatives.append(draw(*args)) or negatives[-1])
    options = [*TINY, "--batch-size", 32, "--method", name, "--weight", 0.7, "--lr", 0.002, "--epochs", 24, "--seed", 5]
    options += ["--teacher-ckpt", teacher / "student.pth", "--out", tmp_path, "--max-minutes", 1e-9]
    call(capsys, *options)
    call(capsys, *options, "--resume")

    student, net, method = networks(name)
    weights = torch.load(teacher / "student.pth", weights_only=True)["model"]
    net.load_state_dict(weights)
    data = load_data("synthetic", "", 40, 40)
    trained = [p for p in (*student.parameters(), *method.parameters()) if p.requires_grad]
    for part in (student, net, method):  # as in the script, so that rounding is similar
        part.to(memory_format=torch.channels_last)
    velocity, start = [0.0] * len(trained), [p.detach().clone() for p in trained]
    rows = []
    for epoch in range(2):
        warm = (epoch + 1) / 2 if name == "reviewkd" else 1  # over 1/12 of 24 epochs
        order = torch.randperm(40, generator=generator(5, epoch, "data"))
        negatives_rng = torch.Generator().manual_seed(derive_seed(5, epoch, "negatives"))
        logged, hits = [], 0
        student.train()
        for step, (images, labels) in enumerate(train_batches(data.train, 32, 5, epoch)):
            index = order[32 * step : 32 * (step + 1)]
            losses, logits = train_baseline.terms(method, net, student, images, labels, index, negatives_rng)
            loss = losses.get("task", 0) + 0.7 * warm * losses["distill"]
            logged.append([loss.item(), losses["distill"].item()])
            hits += (logits.argmax(1) == labels).sum().item()
            gradients = torch.autograd.grad(loss, trained)
            for i, (p, gradient) in enumerate(zip(trained, gradients, strict=True)):
                velocity[i] = 0.9 * velocity[i] + gradient + 5e-4 * p.detach()
                p.data -= 0.002 * velocity[i]
        rows.append([*(sum(column) / 2 for column in zip(*logged, strict=True)), 100 * hits / 40])

    assert len(negatives) == (8 if name == "crd" else 0)
    assert all(torch.equal(a, b) for a, b in zip(negatives[:4], negatives[4:], strict=True))
    log = read_log(tmp_path)
    for row, expected in zip(log, rows, strict=True):
        assert [float(row[column]) for column in ("loss", "distill", "train_top1")] == pytest.approx(expected, rel=1e-3)
        assert bool(row["task"]) == (name != "simkd")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    saved = {
        id(p): state[role][key]
        for role, part in (("student", student), ("method", method))
        for key, p in part.named_parameters()
    }
    for p, old in zip(trained, start, strict=True):
        assert (saved[id(p)] - p.detach()).norm() <= 0.01 * (p.detach() - old).norm() + 1e-7
    for key, value in state["method"].items():
        torch.testing.assert_close(value, method.state_dict()[key], rtol=1e-2, atol=1e-3)
    assert all(
        torch.equal(value, weights[key]) for key, value in state["teacher"].items()
    )  # BatchNorm statistics included


@pytest.mark.parametrize("name", METHODS)
def test_resumed_run_is_bitwise_identical(tmp_path, capsys, teacher, name):
    options = [*TINY, "--method", name, "--epochs", 2, "--teacher-ckpt", teacher / "student.pth"]
    call(capsys, *options, "--out", tmp_path / "uninterrupted")
    stopped = call(capsys, *options, "--out", tmp_path / "resumed", "--max-minutes", 1e-9)
    assert "stopped after 1 of 2 epochs" in stopped
    printed = call(capsys, *NETWORKS, "--method", name, "--resume", "--max-minutes", 9, "--out", tmp_path / "resumed")
    assert "epoch   1/2" not in printed
    assert_bitwise_equal(tmp_path / "uninterrupted", tmp_path / "resumed")
    timings = {"seconds", "images_per_s"}
    logs = [
        [{k: v for k, v in row.items() if k not in timings} for row in read_log(tmp_path / f)]
        for f in ("uninterrupted", "resumed")
    ]
    assert logs[0] == logs[1]
    accuracies = [float(row["test_top1"]) for row in logs[1]]
    result = json.loads((tmp_path / "resumed" / "result.json").read_text())
    assert (result["best"]["top1"], result["last"]["top1"]) == (max(accuracies), accuracies[-1])
    assert result["best"]["epoch"] == 1 + accuracies.index(max(accuracies))


def test_smoke_run_writes_its_files(tmp_path, capsys):
    printed = call(capsys, "--smoke", "--device", "cpu", "--amp", "off", "--out", tmp_path)
    assert printed.count("teacher: training resnet14") == 1
    assert printed.count("from an earlier run") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *sorted(METHODS),
        "synthetic-subset40-resnet14-alone-1ep-seed1-off",
    ]
    for name in METHODS:
        folder = tmp_path / name
        names = ["best.pt", "config.yaml", "last.pt", "log.csv", "result.json", "student.pth", "student_best.pth"]
        assert sorted(path.name for path in folder.iterdir()) == names
        config, result = (
            yaml.safe_load((folder / "config.yaml").read_text()),
            json.loads((folder / "result.json").read_text()),
        )
        assert (config["script"], config["method"], config["subset"]) == ("baselines", name, 40)
        assert config["weight"] == {"reviewkd": 5, "crd": 0.8, "simkd": 1}[name]
        last = result["last"]
        simkd = ["--simkd", "--teacher", "resnet14"] if name == "simkd" else []
        test = ["--evaluate", folder / "student.pth", "--student", "resnet8", *simkd, *SMALL, "--test-subset", 40]
        assert f"resnet8 {last['top1']:.2f} % top-1, {last['top5']:.2f} % top-5" in running.call(capsys, *test)
    again = call(capsys, "--smoke", "--device", "cpu", "--amp", "off", "--out", tmp_path)
    assert again.count("saved to") == 3
    assert "epoch   1/1" not in again
    message = running.call(capsys, *NETWORKS, "--resume", "--out", tmp_path / "crd", code=2, module=cifar100)
    assert "train_baseline.py" in message


def test_resume_first_finishes_the_teacher(tmp_path, capsys):
    options = [*TINY, "--method", "simkd", "--epochs", 1, "--teacher-epochs", 2, "--out", tmp_path / "run"]
    assert "stopped after 1 of 2" in call(capsys, *options, "--max-minutes", 1e-9)
    assert not (tmp_path / "run").exists()
    call(capsys, *options, "--resume")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["teacher_ckpt"] == str(tmp_path / "synthetic-subset40-resnet14-alone-2ep-seed1-off" / "student.pth")


def test_published_settings():
    weights = {
        "reviewkd": {
            "resnet56-resnet20": 0.6,
            "vgg13-MobileNetV2": 8,
            "ResNet50-MobileNetV2": 8,
            "resnet32x4-ShuffleV2": 8,
        },
        "crd": {},
        "simkd": {},
    }
    for pair, row in cifar100.SETTINGS["pairs"].items():
        teacher, student = pair.split("-")
        for name, other in (("reviewkd", 5), ("crd", 0.8), ("simkd", 1)):
            argv = ["--teacher", teacher, "--student", student, "--method", name, "--device", "cuda"]
            args = train_baseline.parse_args(argv)
            assert (args.weight, args.lr) == (weights[name].get(pair, other), row["lr"])
            assert (args.epochs, args.batch_size, args.amp, args.teacher_epochs) == (240, 64, "fp16", 240)
            assert args.out == f"runs/cifar100-{pair}-{name}-240ep-seed1-fp16"


def test_student_initialization_matches_cifar100():
    torch.manual_seed(5)
    plain = build("resnet8", 20).state_dict()
    for name in METHODS:
        student = networks(name)[0]
        own = student.student if name == "simkd" else student
        assert all(torch.equal(value, plain[key]) for key, value in own.state_dict().items())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--teacher, --student, --method"),
        ([*NETWORKS], "--method"),
        ([*NETWORKS, "--method", "fcfd"], "--method"),
        (["--teacher", "resnet14", "--student", "resnet9", "--method", "crd"], "resnet8"),
        (["--teacher", "vgg8", "--student", "resnet8", "--method", "reviewkd"], "5 stages and the student 4"),
        ([*NETWORKS, "--method", "crd", "--weight", -1], "--weight: -1 must be"),
        ([*NETWORKS, "--method", "reviewkd", "--weight", "nan"], "--weight: nan must be"),
        ([*NETWORKS, "--method", "simkd", "--weight", 0], "--weight 0"),
        ([*NETWORKS, "--method", "crd", "--lr", 0], "--lr: 0 must be"),
        ([*NETWORKS, "--method", "crd", "--epochs", 0], "--epochs: 0 must be"),
        ([*NETWORKS, "--method", "crd", "--subset", 20], "20 training images"),
        ([*NETWORKS, "--method", "reviewkd", "--subset", 33], "a batch of one"),
        ([*NETWORKS, "--method", "crd", "--teacher-ckpt", "none.pth"], "none.pth"),
        (
            [*NETWORKS, "--method", "crd", "--teacher-ckpt", "a.pth", "--teacher-epochs", 3],
            "omit it, or",
        ),
        ([*NETWORKS, "--method", "crd", "--device", "cuda:99"], "cuda:99"),
        ([*NETWORKS, "--method", "crd", "--resume"], "nothing to resume"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    assert_invalid(capsys, SMALL, options, expected, module=train_baseline)


def test_single_class_is_rejected_before_training_a_teacher(tmp_path, capsys):
    running.write_images(tmp_path / "images", {"train": 4, "test": 2}, classes=["n1"])
    options = [
        *NETWORKS,
        "--dataset",
        "folder",
        "--data-dir",
        tmp_path / "images",
        "--batch-size",
        2,
        "--device",
        "cpu",
    ]
    message = call(capsys, *options, "--method", "crd", "--out", tmp_path / "runs" / "run", code=2)
    assert "different classes" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_on_gpu(tmp_path, capsys, name):
    call(capsys, "--smoke", "--method", name, "--device", "cuda", "--epochs", 2, "--out", tmp_path)
    assert all(float(row["loss"]) > 0 and float(row["peak_memory_mb"]) > 0 for row in read_log(tmp_path / name))
