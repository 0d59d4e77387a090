"""ablations/anisotropy.py: directions, measurements, and files."""

import json
import math
import statistics
import sys
from argparse import Namespace

import pytest
import torch
from PIL import Image
from running import SMALL, call

import cifar100
from ablations import anisotropy
from common.data.batches import ImageSet, normalize
from common.models import build


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A one-epoch run of cifar100.py: resnet8 without a teacher."""
    folder = tmp_path_factory.mktemp("runs") / "resnet8-alone-seed1"
    assert cifar100.main(["--student", "resnet8", *SMALL, "--epochs", "1", "--out", str(folder)]) == 0
    return folder


def randomized_resnet8():
    """A resnet8 in evaluation mode, with distinct outputs and nontrivial BatchNorm statistics."""
    torch.manual_seed(0)
    net = build("resnet8", 5)
    net(3 * torch.randn(16, 3, 32, 32))  # updates the running statistics
    net.classifier_layer.weight.data *= 10
    return net.eval()


def random_images(n):
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=rng)
    return ImageSet(images, torch.arange(n) % 5)


def test_directions_are_unit_length_and_individually_seeded():
    directions = anisotropy.unit_directions(torch.Size([16, 8, 8]), 0, 6)
    assert directions.shape == (6, 16, 8, 8)
    assert directions.flatten(1).norm(dim=1).tolist() == pytest.approx([1] * 6, rel=1e-5)
    assert torch.equal(anisotropy.unit_directions(torch.Size([16, 8, 8]), 2, 5), directions[2:5])
    cosines = directions.flatten(1) @ directions.flatten(1).T - torch.eye(6)
    assert cosines.abs().max() < 5 / math.sqrt(16 * 8 * 8)  # random directions are almost orthogonal
    assert directions.mean().abs() < 0.1 / math.sqrt(16 * 8 * 8)


def test_perturbations_have_the_requested_length():
    features = torch.randn(3, 4, 5, 5) * torch.tensor([0.1, 1, 10]).view(3, 1, 1, 1)
    directions = anisotropy.unit_directions(features.shape[1:], 0, 7)
    moved = anisotropy.perturbed(features, directions, 0.25)
    assert moved.shape == (3, 7, 4, 5, 5)
    for i in range(3):
        for j in range(7):
            offset = moved[i, j] - features[i]
            assert offset.norm().item() == pytest.approx(0.25 * features[i].norm().item(), rel=1e-4)
            assert torch.allclose(offset / offset.norm(), directions[j], atol=1e-5)


@pytest.mark.parametrize("k", [2, 4])
def test_measure_matches_a_float64_loop_over_images_and_directions(k):
    net, test, count, length = randomized_resnet8(), random_images(5), 6, 0.5
    c = Namespace(directions=count, length=length, batch_size=7)
    measured = anisotropy.measure_feature(net, k, test, c)

    net = net.double()
    directions = anisotropy.unit_directions(net.features(torch.zeros(1, 3, 32, 32).double())[k - 1].shape[1:], 0, count)
    histogram = [0] * anisotropy.BINS
    for i in range(len(test)):
        label = test.labels[i].item()

        def probabilities(direction=None, i=i):
            x = normalize(test.images[i : i + 1]).double()
            with torch.no_grad():
                for stage in range(1, net.num_stages + 1):
                    x = net.stage(stage, x)
                    if stage == k and direction is not None:
                        x = x + length * math.sqrt((x**2).sum().item()) * direction.double()
                z = net.classify(x)[0].tolist()
            total = sum(math.exp(value - max(z)) for value in z)
            return [math.exp(value - max(z)) / total for value in z]

        p, kl, right = probabilities(), [], []
        for direction in directions:
            q = probabilities(direction)
            kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            right.append(100.0 * (q.index(max(q)) == label))
        assert measured["smallest"][i] == pytest.approx(min(kl), rel=1e-3)
        assert measured["median"][i] == pytest.approx(statistics.median_low(kl), rel=1e-3)
        assert measured["largest"][i] == pytest.approx(max(kl), rel=1e-3)
        assert measured["clean"][i] == 100 * (p.index(max(p)) == label)
        assert measured["mean"][i] == pytest.approx(statistics.fmean(right), rel=1e-4)
        assert measured["mildest"][i] == right[kl.index(min(kl))]
        assert measured["worst"][i] == right[kl.index(max(kl))]
        for value in kl:
            decades = math.log10(value / statistics.median_low(kl)) + anisotropy.DECADES
            histogram[int(decades * anisotropy.BINS / (2 * anisotropy.DECADES) + 1e-6)] += 1
    assert measured["histogram"] == histogram
    assert max(measured["largest"]) > 1e-3  # far above rounding errors


def test_results_do_not_depend_on_the_batch_size():
    net, test = randomized_resnet8(), random_images(9)
    by_batch_size = {
        size: anisotropy.measure_feature(net, 3, test, Namespace(directions=5, length=0.5, batch_size=size))
        for size in (2, 9, 20, 500)
    }
    for measured in by_batch_size.values():
        for key in ("smallest", "median", "largest", "clean", "mean", "mildest", "worst"):
            assert measured[key] == pytest.approx(by_batch_size[500][key], rel=1e-3)
        assert sum(measured["histogram"]) == 9 * 5


def test_batches_have_at_most_batch_size_features():
    seen = []

    def later(x):
        seen.append(len(x))
        return x.flatten(1)[:, :3]

    anisotropy.measure(later, torch.randn(4, 8), torch.zeros(4).long(), count=7, length=0.1, batch_size=9)
    assert seen == [4, 8, 8, 8, 4]


def test_mildest_and_worst_are_chosen_per_image():
    kl = torch.tensor([[0.1, 10.0, 1.0, 1.0, 0.9], [5.0, 0.5, 0.05, 0.4, 0.6]], dtype=torch.float64)
    hits = torch.tensor([[True, False, True, True, True], [False, True, False, True, True]])
    measured = anisotropy.per_image(kl, hits, torch.tensor([True, False]))
    expected = {"smallest": [0.1, 0.05], "median": [1, 0.5], "largest": [10, 5], "clean": [100, 0]}
    expected |= {"mean": [80, 60], "mildest": [100, 0], "worst": [0, 0]}
    assert {key: measured[key] for key in expected} == expected
    means = anisotropy.summary(measured)
    assert (means["ratio"], means["mean"], means["mildest"]) == (pytest.approx(100), 70, 50)


def test_isotropic_later_layers_have_a_ratio_near_1():
    """With p uniform over K classes, KL is |dz|^2 / 2K for a small change dz of logits that sum to 0.

    Later layers that preserve lengths have the same KL in every direction; layers that read a single value do not.
    """
    classes = 40
    onto = torch.linalg.qr(torch.cat([torch.ones(classes, 1), torch.eye(classes)[:, :-1]], 1)).Q[:, 1:]  # [K, K - 1]
    features = torch.randn(3, classes - 1, generator=torch.Generator().manual_seed(0)) + 1

    def kl_ratio(weights):
        def later(x):
            origin = features if len(x) == len(features) else features.repeat_interleave(len(x) // len(features), 0)
            return (weights * (x - origin)) @ onto.T

        kl, *_ = anisotropy.measure(later, features, torch.zeros(3).long(), count=64, length=0.05, batch_size=64 * 3)
        norms = features.norm(dim=1).double()
        if weights.std() == 0:
            assert kl[:, 0].tolist() == pytest.approx(((0.05 * norms) ** 2 / (2 * classes)).tolist(), rel=0.05)
        return (kl.amax(1) / kl.amin(1)).max().item()

    one = torch.zeros(classes - 1)
    one[0] = 1
    assert 1 <= kl_ratio(torch.ones(classes - 1)) < 1.2
    assert kl_ratio(one) > 100


def table_rows(folder):
    lines = (folder / "table.md").read_text().split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_smoke(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = ["--smoke", "--seeds", 1, 2, "--device", "cpu"]
    printed, out = call(capsys, *argv, module=anisotropy), tmp_path / "results" / "anisotropy" / "smoke"
    assert (out / "table.md").read_text() in printed
    rows = table_rows(out)
    names = ["resnet8, seed 1", "resnet8, seed 2", "mean of 2"]
    assert [row[:2] for row in rows] == [[name, f"F^{k}"] for name in names for k in (2, 3, 4)]
    for row in rows[:6]:
        smallest, median, largest, ratio, *accuracies = map(float, row[2:])
        assert 0 < smallest <= median + 1e-4 <= largest + 2e-4
        assert ratio > 1
        assert all(0 <= accuracy <= 100 for accuracy in accuracies)
    accuracy = {}
    for seed in (1, 2):
        result = tmp_path / "results" / "runs" / "smoke" / f"resnet8-alone-seed{seed}" / "result.json"
        accuracy[seed] = json.loads(result.read_text())["last"]["top1"]
    assert [float(row[6]) for row in rows[:6]] == [accuracy[1]] * 3 + [accuracy[2]] * 3  # all test images
    numbers = json.loads((out / "numbers.json").read_text())
    for row, k in zip(rows[6:], "234", strict=True):
        largest = [statistics.fmean(numbers[name]["features"][k]["largest"]) for name in names[:2]]
        assert row[4] == f"{statistics.fmean(largest):.4f} ± {statistics.stdev(largest):.4f}"
    assert "perturbed by 0.5 times their L2 norm along 8 random" in printed
    with Image.open(out / "histogram.png") as picture:
        assert picture.width >= 800
        assert len(picture.convert("RGB").getcolors(10**6)) > 20

    def fail_if_called(*_):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(anisotropy, "measure_feature", fail_if_called)
        call(capsys, *argv, module=anisotropy)
        assert table_rows(out) == rows
        for other in (["--length", 0.25], ["--directions", 9], ["--images", 30]):
            with pytest.raises(AssertionError, match="again"):
                anisotropy.main([*map(str, argv), *map(str, other)])
    call(capsys, *argv, "--length", 0.25, "--positions", 3, module=anisotropy)
    shorter = table_rows(out)
    assert [row[1] for row in shorter] == ["F^3"] * 3
    assert float(shorter[0][4]) < float(rows[1][4])


def test_run_and_its_checkpoint_have_the_same_results(tmp_path, capsys, monkeypatch, run):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    small = ["--directions", 4, "--images", 20, "--positions", 3, "--device", "cpu"]
    call(capsys, "--run", run, *small, module=anisotropy)
    data = ["--dataset", "synthetic", "--subset", 120, "--test-subset", 60]
    call(capsys, "--network", "resnet8", "--ckpt", run / "student.pth", *data, *small, module=anisotropy)
    first, second = (table_rows(tmp_path / "results" / "anisotropy" / name) for name in (run.name, "resnet8-student"))
    assert [first[0][0], second[0][0]] == [run.name, "resnet8-student"]
    assert first[0][1:] == second[0][1:]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--network", "resnet9"], "resnet8"),
        (["--network", "resnet8", "--ckpt", "missing.pth"], "missing.pth"),
        (["--network", "resnet8", "--ckpt", "short.pth"], "short.pth"),
        (["--network", "resnet14", "--ckpt", "RUN/student.pth"], "resnet14"),
        (["--network", "resnet8", "--ckpt", "x.pth", "--epochs", "3"], "--epochs"),
        (["--run", "missing"], "missing"),
        (["--run", "RUN", "--network", "resnet8"], "--network"),
        (["--positions", "3", "5"], "--positions 3 5"),
        (["--positions", "0"], "--positions 0"),
        (["--length", "0"], "--length: 0 must"),
        (["--length", "nan"], "--length: nan must"),
        (["--directions", "0"], "--directions: 0 must"),
        (["--images", "61"], "--images 61"),
        (["--images", "0"], "--images: 0 must"),
        (["--batch-size", "0"], "--batch-size: 0 must"),
        (["--seeds", "-1"], "--seeds: -1 must"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--bogus"], "--bogus"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, monkeypatch, run, options, expected):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.pth").write_bytes((run / "student.pth").read_bytes()[:999])
    options = [option.replace("RUN", str(run)) for option in options]
    data = [] if "--run" in options else ["--dataset", "synthetic", "--subset", "120", "--test-subset", "60"]
    message = call(capsys, *data, *options, code=2, module=anisotropy)
    assert message.startswith("error: ")
    assert expected in message
    assert message.count("\n") == 1
    assert not list(tmp_path.rglob("table.md"))


def test_damaged_numbers_and_other_images_are_rejected(tmp_path, capsys, monkeypatch, run):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for text in ("{", "[]", '{"a": {}}'):
        (tmp_path / "numbers.json").write_text(text)
        message = call(capsys, "--run", run, "--directions", 2, "--out", tmp_path, code=2, module=anisotropy)
        assert "numbers.json is damaged" in message
        assert message.count("\n") == 1
        assert (tmp_path / "numbers.json").read_text() == text
    monkeypatch.setattr(anisotropy, "load_config", lambda run, load_config=anisotropy.load_config:
                        load_config(run) | {"fingerprint": "another"})  # fmt: skip
    assert "other images" in call(capsys, "--run", run, code=2, module=anisotropy)


def test_missing_matplotlib_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "requirements-extra.txt" in call(capsys, "--smoke", code=2, module=anisotropy)
    assert not list(tmp_path.iterdir())
