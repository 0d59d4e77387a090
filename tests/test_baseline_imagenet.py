"""ablations/baseline_imagenet.py: AT, OFD and SRRL against naive implementations, settings, and small runs."""

import json
import math
from functools import partial

import numpy as np
import pytest
import running
import torch
import torch.nn.functional as F
import yaml
from running import assert_bitwise_equal, assert_invalid, read_log, write_images
from torch import nn

import imagenet
from ablations import baseline_imagenet
from ablations.baselines import build, settings
from ablations.baselines.at import AT
from ablations.baselines.batch import Batch
from ablations.baselines.crd import CRD
from ablations.baselines.ofd import OFD, last_norms, margin
from ablations.baselines.srrl import SRRL
from common.data.image_files import FileData, ImageFiles, Shard, list_files, train_loader
from common.models import Taps, build_imagenet
from common.randomness import derive_seed, generator

call = partial(running.call, module=baseline_imagenet)
METHODS = settings.METHODS["imagenet"]
SMALL = ["--image-size", 32, "--batch-size", 9, "--lr", 0.01, "--workers", 0, "--device", "cpu", "--amp", "off"]
PAIR = ["--teacher", "resnet18", "--student", "MobileNetV1"]


# ------------------------------------------------------------------------------------------------ naive references


def random_taps(channels, sizes, pooled=5, classes=4, batch=3):
    """Random features and outputs that require gradients."""
    shapes = [(c, size, size) for c, size in zip(channels, sizes, strict=True)]
    shapes += [(pooled, 2, 2), (pooled,), (classes,)]
    *features, last, vector, logits = (torch.randn(batch, *shape, requires_grad=True) for shape in shapes)
    return Taps(features, last, vector, logits)


def flat(taps):
    return [*taps.features, *taps[1:]]


def assert_matches(method, student, teacher, naive):
    """The loss and its gradients are those of `naive(parameters by name, student, teacher)` in float64."""
    parameters = {name: p.detach().double().requires_grad_() for name, p in method.named_parameters()}
    exact = [x.detach().double().requires_grad_() for x in flat(student)]
    n = len(student.features)
    fixed = [x.detach().double() for x in flat(teacher)]
    value = method(student, teacher, None)
    expected = naive(parameters, Taps(exact[:n], *exact[n:]), Taps(fixed[:n], *fixed[n:]))
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in method.named_parameters():
        torch.testing.assert_close(p.grad.double(), parameters[name].grad, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(flat(student), exact, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)
    assert all(x.grad is None for x in flat(teacher))


def naive_conv_norm(x, weight, gamma, beta):
    """A 1x1 convolution without bias, then BatchNorm over batch and positions."""
    out = torch.stack([sum(w * x[:, c] for c, w in enumerate(row)) for row in weight[:, :, 0, 0]], 1)
    columns = []
    for c in range(out.shape[1]):
        mean = out[:, c].mean()
        variance = ((out[:, c] - mean) ** 2).mean()
        columns.append((out[:, c] - mean) / (variance + 1e-5).sqrt() * gamma[c] + beta[c])
    return torch.stack(columns, 1)


def test_at_matches_a_naive_implementation():
    torch.manual_seed(0)

    def naive(_, student, teacher):
        total = 0
        for feature, target in zip(student.features, teacher.features, strict=True):
            squares = []
            for image, other in zip(feature, target, strict=True):
                maps = [sum(channel**2 for channel in x) / len(x) for x in (image, other)]
                a, b = (x / sum(v**2 for v in x.flatten()).sqrt() for x in maps)
                squares += [(p - q) ** 2 for p, q in zip(a.flatten(), b.flatten(), strict=True)]
            total = total + sum(squares) / len(squares)
        return total

    student, teacher = random_taps([2, 3], [4, 2]), random_taps([4, 3], [4, 2])
    assert_matches(AT(), student, teacher, naive)


def random_norms(channels):
    """BatchNorm layers with random parameters; in the last one channels are hardly ever negative, or always zero."""
    norms = [nn.BatchNorm2d(c).requires_grad_(False) for c in channels]
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    norms[-1].bias[0], norms[-1].weight[0] = 3.2, -1.0
    norms[-1].bias[1], norms[-1].weight[1] = 3.0, 1.0
    norms[-1].bias[2], norms[-1].weight[2] = 0.0, 0.0
    return norms


def naive_margin(mean, std):
    """E[x | x < 0] for x ~ N(mean, std^2), by numerical integration."""
    if std == 0:
        return min(mean, 0)
    x = np.linspace(min(0, mean - 12 * std), 0, 200_001)
    density = np.exp(-(((x - mean) / std) ** 2) / 2)
    below = np.trapezoid(density, x) / (std * math.sqrt(2 * math.pi))
    return np.trapezoid(x * density, x) / np.trapezoid(density, x) if below > 0.001 else -3 * std


def test_margin_is_the_expected_negative_response():
    torch.manual_seed(0)
    (norm,) = random_norms([40])
    expected = [
        naive_margin(mean, abs(std)) for mean, std in zip(norm.bias.tolist(), norm.weight.tolist(), strict=True)
    ]
    assert margin(norm).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert margin(norm)[:3].tolist() == pytest.approx([-3, -0.2831, 0], rel=1e-3)
    assert not margin(norm).requires_grad


def test_ofd_matches_a_naive_implementation():
    torch.manual_seed(0)
    norms = random_norms([4, 3])

    def naive(parameters, student, teacher):
        total = 0
        for i, (feature, target, norm) in enumerate(zip(student.features, teacher.features, norms, strict=True)):
            conv, gamma, beta = (parameters[f"connectors.{i}.{name}"] for name in ("0.weight", "1.weight", "1.bias"))
            feature = naive_conv_norm(feature, conv, gamma, beta)
            stage = 0
            for c in range(target.shape[1]):
                bound = naive_margin(norm.bias[c].item(), abs(norm.weight[c].item()))
                pairs = zip(feature[:, c].flatten(), target[:, c].flatten().tolist(), strict=True)
                for s, t in pairs:
                    t = max(t, bound)
                    stage = stage + (0 if s <= t <= 0 else (s - t) ** 2)
            total = total + stage / len(target) * (0.5 if i == 0 else 1)
        return total

    method = OFD([2, 3], norms)
    assert [name for name, _ in method.named_parameters() if "norms" in name] == []
    assert_matches(method, random_taps([2, 3], [4, 2]), random_taps([4, 3], [4, 2]), naive)


def test_srrl_matches_a_naive_implementation():
    torch.manual_seed(0)
    classifier = nn.Linear(6, 4).requires_grad_(False)

    def naive(parameters, student, teacher):
        conv, gamma, beta = (parameters[f"connector.{name}"] for name in ("0.weight", "1.weight", "1.bias"))
        mapped = naive_conv_norm(student.last, conv, gamma, beta).clamp(min=0)
        pooled = torch.stack([mapped[:, c].mean((1, 2)) for c in range(6)], 1)
        logits = pooled @ classifier.weight.double().T + classifier.bias.double()
        matching = sum((p - q) ** 2 for p, q in zip(pooled.flatten(), teacher.pooled.flatten(), strict=True)) / (3 * 6)
        regression = sum((p - q) ** 2 for p, q in zip(logits.flatten(), teacher.logits.flatten(), strict=True))
        return matching + regression / (3 * 4)

    method = SRRL(5, 6, classifier)
    assert not any("classif" in name for name in method.state_dict())
    assert_matches(method, random_taps([2], [2], pooled=5), random_taps([2], [2], pooled=6), naive)


@pytest.mark.parametrize("c_t", [40, 300])
def test_connectors_have_the_published_initialization(c_t):
    """Normal with standard deviation sqrt(2 / output channels)."""
    torch.manual_seed(0)
    for connector in (OFD([500], random_norms([c_t])).connectors[0], SRRL(500, c_t, nn.Linear(c_t, 4)).connector):
        weight = connector[0].weight
        assert weight.std().item() == pytest.approx((2 / c_t) ** 0.5, rel=0.02)
        assert 0.25 < (weight.abs() > weight.std()).float().mean() < 0.38  # 0.32 if normal, 0.42 if uniform
        assert connector[0].bias is None


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "MobileNetV1"])
def test_last_norms_are_those_before_the_relu(name):
    """Setting them to zero leaves the shortcut of a ResNet, and nothing of a MobileNet's stage."""
    net = build_imagenet(name, 4).eval()
    images = torch.randn(1, 3, 64, 64)
    for norm in last_norms(net):
        nn.init.zeros_(norm.weight)
        nn.init.constant_(norm.bias, 0.5)
    shortcuts = [torch.zeros(())] * 4
    if name != "MobileNetV1":
        hooks = [getattr(net, f"layer{k}")[-1].register_forward_pre_hook for k in range(1, 5)]
        shortcuts = []
        for hook in hooks:
            hook(lambda _, inputs: shortcuts.append(inputs[0]))
        net(images)
    for feature, shortcut in zip(net.taps(images, pre_relu=True).features, shortcuts, strict=True):
        torch.testing.assert_close(feature, shortcut + 0.5 * torch.ones_like(feature))


# --------------------------------------------------------------------------------------------------------- settings

RECIPE = {"epochs": 100, "optimizer": "sgd", "weight_decay": 1e-4, "milestones": [30, 60, 90], "teacher_bn": "running"}
RECIPE |= {"w_task": 1, "weight": 1, "warmup": 0, "batch_size": 512, "lr": 0.2}
RECIPE |= {"student_pre_relu": False, "teacher_pre_relu": False, "published": True}
PRE_RELU = {"student_pre_relu": True, "teacher_pre_relu": True}
SMALL_BATCH = {"batch_size": 256, "lr": 0.1}
AUTHORS_OFD = SMALL_BATCH | PRE_RELU | {"weight": 1e-4, "optimizer": "nesterov", "teacher_bn": "batch"}
AUTHORS_OFD |= {"milestones": [29, 59, 89]}
# By method: what differs from the recipe for resnet34-resnet18 and for resnet50-MobileNetV1.
PUBLISHED = {
    "kd": [{"w_task": 0.5, "weight": 0.5, "temperature": 1}] * 2,
    "at": [{"weight": 1000} | SMALL_BATCH, {"weight": 1000}],
    "ofd": [AUTHORS_OFD | {"published": False}, AUTHORS_OFD],
    "srrl": [{}, {}],
    "crd": [{"weight": 0.8, "replacement": True} | SMALL_BATCH] * 2,
    "dkd": [{"temperature": 1, "tckd": 0.5, "nckd": 0.5}, {"temperature": 1, "tckd": 0.5, "nckd": 2}],
    "reviewkd": [SMALL_BATCH | PRE_RELU | {"c_mid": 512}, SMALL_BATCH | PRE_RELU | {"c_mid": 256, "weight": 8}],
}


def parse(teacher, student, method, *options):
    argv = ["--teacher", teacher, "--student", student, "--method", method, "--device", "cuda", *options]
    return baseline_imagenet.parse_args(argv)


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_the_published_ones(method):
    for pair, differences in zip(imagenet.SETTINGS["pairs"], PUBLISHED[method], strict=True):
        args = parse(*pair.split("-"), method)
        expected = RECIPE | differences
        assert {name: getattr(args, name) for name in expected} == expected
        assert (args.amp, args.image_size) == ("fp16", 224)
        assert args.out == f"runs/imagenet-{pair}-baseline-{method}-100ep-seed1-fp16"
        notice = settings.notice(args, "imagenet")
        assert notice is None or notice.startswith(f"setting not published: some of {method}'s for {pair}")
        assert (notice is None) == args.published
    assert "not a published pair" in settings.notice(parse("resnet50", "resnet18", method), "imagenet")


# ------------------------------------------------------------------------------------------------------- small runs


@pytest.fixture(autouse=True)
def few_negatives(monkeypatch):
    """16384 per image would take most of the time."""
    monkeypatch.setattr(build, "CRD", partial(CRD, negatives=64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), {"train": 6, "val": 5})


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    """Checkpoint of a random resnet18 with the running statistics of the training images."""
    torch.manual_seed(0)
    net = build_imagenet("resnet18", 3)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over all batches
    for images, _ in train_loader(ImageFiles(list_files(folder).train, 32, 1), Shard(18, 9, 1), 0, torch.device("cpu")):
        net(images)
    file = tmp_path_factory.mktemp("teacher") / "resnet18.pth"
    torch.save(net.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def pair(folder, teacher):
    return ["--data-dir", folder, *PAIR, *SMALL, "--teacher-ckpt", teacher]


def make_step(method, *options, data=None):
    args = baseline_imagenet.parse_args([str(word) for word in (*PAIR, *SMALL, "--method", method, *options)])
    samples = [("", i % 3) for i in range(18)]
    return baseline_imagenet.Step(args, data or FileData(samples, [], ["n1", "n2", "n3"], ""))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_student_and_the_method(method):
    step, images, labels = make_step(method, "--amp", "bf16"), torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    torch.manual_seed(1)
    for key, value in build_imagenet("MobileNetV1", 3).state_dict().items():  # as in imagenet.py
        assert torch.equal(step.student.state_dict()[key], value)
    _, weights, inputs = step.epoch(Shard(18, 6, 1))
    inputs = inputs[0]
    terms, _ = step(images, labels, inputs)
    assert all(term.dtype == torch.float32 and term.ndim == 0 for term in terms.values())
    sum(weights[name] * term for name, term in terms.items()).backward()
    for role, net in step.named_children():
        for name, p in net.named_parameters():
            assert (p.grad is not None and bool(p.grad.any())) == (role != "teacher"), (role, name)
    step.zero_grad(set_to_none=True)
    step.args.w_task = 0
    terms, _ = step(images, labels, inputs)
    terms["distill"].backward()
    unused = {name for name, p in step.student.named_parameters() if p.grad is None}
    assert unused == (set() if method in ("kd", "dkd") else {"fc.weight", "fc.bias"})
    assert make_step(method, "--w-task", 0).some_unused == bool(unused)
    assert not step.some_unused


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_plain_student(tmp_path, capsys, folder, teacher, pair, method):
    printed = call(capsys, *pair, "--method", method, "--epochs", 1, "--out", tmp_path)
    assert "resnet18-MobileNetV1 is not a published pair" in printed
    assert f"-baseline-{method}-1ep-" in printed
    [row] = read_log(tmp_path)
    assert float(row["loss"]) > 0
    args = make_step(method).args
    parts = args.w_task * float(row["task"]) + args.weight * float(row["distill"])
    assert float(row["loss"]) == pytest.approx(parts, rel=1e-4)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (config["script"], config["method"]) == ("baseline_imagenet", method)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    roles = [name for name in state if name in ("student", "teacher", "method", "bridges", "optimizer", "scaler")]
    assert roles == ["student", "teacher", "method", "optimizer", "scaler"]
    before = torch.load(teacher, weights_only=True)
    assert all(
        torch.equal(state["teacher"][key], before[key]) for key in before if "running" not in key and "num" not in key
    )
    assert torch.equal(before["bn1.running_mean"], state["teacher"]["bn1.running_mean"]) == (method != "ofd")
    last = json.loads((tmp_path / "result.json").read_text())["last"]
    test = ["--data-dir", folder, "--student", "MobileNetV1", *SMALL, "--evaluate", tmp_path / "student.pth"]
    assert f"MobileNetV1 {last['top1']:.2f} % top-1" in running.call(capsys, *test, module=imagenet)


def test_resumed_run_is_bitwise_identical(tmp_path, capsys, pair):
    options = [*pair, "--method", "crd", "--epochs", 2]
    call(capsys, *options, "--out", tmp_path / "uninterrupted")
    assert "stopped after 1 of 2" in call(capsys, *options, "--out", tmp_path / "resumed", "--max-minutes", 1e-9)
    resume = [*PAIR, "--method", "crd", "--resume", "--out", tmp_path / "resumed"]
    assert "epoch   1/2" not in call(capsys, *resume)
    assert_bitwise_equal(tmp_path / "uninterrupted", tmp_path / "resumed")
    message = running.call(capsys, "--student", "MobileNetV1", *resume[-3:], code=2, module=imagenet)
    assert "ablations/baseline_imagenet.py" in message


@pytest.mark.parametrize("method", ["crd", "ofd"])
def test_two_steps_match_a_manual_loop(tmp_path, capsys, folder, teacher, pair, method):
    """The script against a loop with hand-written SGD. In a run of one epoch, the first milestone is its beginning."""
    w_task, weight, lr = 0.9, {"crd": 0.7, "ofd": 1e-3}[method], 0.02
    options = [*pair, "--method", method, "--w-task", w_task, "--weight", weight, "--batch-size", 9]
    options += ["--image-size", 64, "--lr", lr, "--seed", 5, "--epochs", 1, "--out", tmp_path]
    call(capsys, *options)

    data = list_files(folder)
    step = make_step(method, "--image-size", 64, "--seed", 5, data=data)
    student, net, loss_of = step.student, step.teacher, step.method
    net.load_state_dict(torch.load(teacher, weights_only=True))
    for part in (student, net, loss_of):
        part.train().to(memory_format=torch.channels_last)
    net.train(method == "ofd")
    loader = train_loader(ImageFiles(data.train, 64, 5), Shard(18, 9, 5), 0, torch.device("cpu"))
    index = torch.randperm(18, generator=generator(5, 0, "data"))
    rng = torch.Generator().manual_seed(derive_seed(5, 0, "negatives"))
    trained = {f"student.{name}": p for name, p in student.named_parameters()}
    trained |= {f"method.{name}": p for name, p in loss_of.named_parameters()}
    start = {name: p.detach().clone() for name, p in trained.items()}
    velocity, losses = dict.fromkeys(trained, 0), []
    for i, (images, labels) in enumerate(loader):
        own, target = student.taps(images, method == "ofd"), net.taps(images, method == "ofd")
        distill = loss_of(own, target, Batch(labels, index[9 * i : 9 * i + 9], rng))
        loss = w_task * F.cross_entropy(own.logits, labels) + weight * distill
        losses.append(loss.item())
        for (name, p), g in zip(trained.items(), torch.autograd.grad(loss, [*trained.values()]), strict=True):
            g = g + 1e-4 * p.detach()
            velocity[name] = 0.9 * velocity[name] + g
            p.data -= lr / 10 * (g + 0.9 * velocity[name] if method == "ofd" else velocity[name])

    assert float(read_log(tmp_path)[0]["loss"]) == pytest.approx(sum(losses) / 2, rel=1e-4)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    for name, p in trained.items():  # BatchNorm over few values amplifies rounding errors
        role, _, key = name.partition(".")
        assert (state[role][key] - p.detach()).norm() < 0.1 * (p.detach() - start[name]).norm() + 1e-6, name
    if method == "crd":
        torch.testing.assert_close(state["method"]["bank_s"], loss_of.bank_s, rtol=1e-2, atol=1e-3)


def test_negatives_depend_on_the_epoch_and_the_step():
    step, negatives = make_step("crd"), []
    for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0)):
        step.args.seed = seed
        _, _, inputs = step.epoch(Shard(18, 9, 1, epoch=epoch))
        negatives.append([step.method.draw(torch.arange(9), rng) for _, rng in inputs])
    first, *others, again = negatives
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(first[0], other) for other in (first[1], others[0][0], others[1][0]))


NETWORKS = ["--teacher", "resnet34", "--student", "resnet18"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--student", "resnet18", "--method", "at"], "--method at also needs --teacher"),
        ([*NETWORKS], "--method"),
        ([*NETWORKS, "--method", "vid"], "--method"),
        ([*NETWORKS, "--method", "at", "--temperature", 2], "--temperature is not an option of at"),
        ([*NETWORKS, "--method", "kd", "--nckd", 2], "--nckd is not an option of kd"),
        ([*NETWORKS, "--method", "at", "--evaluate", "student.pth"], "--evaluate"),
        (["--teacher", "resnet34", "--student", "resnet20", "--method", "at"], "did you mean"),
        ([*NETWORKS, "--method", "ofd"], "train one on these images"),
        ([*NETWORKS, "--method", "kd", "--weight", 0, "--w-task", 0], "no loss remains"),
        ([*NETWORKS, "--method", "kd", "--batch-size", 1], "two images"),
        ([*NETWORKS, "--method", "kd", "--sync-bn"], "--sync-bn"),
        ([*NETWORKS, "--method", "kd", "--resume"], "nothing to resume"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, monkeypatch, folder, options, expected):
    monkeypatch.chdir(tmp_path)
    assert_invalid(capsys, [*SMALL, "--data-dir", folder], options, expected, module=baseline_imagenet)


def test_crd_refuses_several_ranks(tmp_path, capsys, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    for name, value in (("TORCHELASTIC_RUN_ID", "job"), ("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    options = [*NETWORKS, "--method", "crd"]
    assert_invalid(capsys, [*SMALL, "--data-dir", folder], options, "omit torchrun", module=baseline_imagenet)


def test_single_class_is_refused_by_crd(tmp_path, capsys):
    images = write_images(tmp_path / "images", {"train": 9, "val": 2}, classes=["n1"])
    options = ["--data-dir", images, *PAIR, *SMALL, "--out", tmp_path / "run"]
    assert "all are of one" in call(capsys, *options, "--method", "crd", code=2)
