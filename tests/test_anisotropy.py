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
from ablations.benchmarks import CIFAR
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


def options(**changes):
    defaults = {"directions": 6, "directions_per": "dataset", "length_unit": "relative", "batch_size": 4}
    defaults |= {"autocast": False}
    return Namespace(**(defaults | changes))


def test_directions_are_unit_length_and_depend_on_the_seed():
    directions = anisotropy.unit_directions(6, torch.Size([16, 8, 4]), seed=0)
    assert directions.shape == (6, 16, 8, 4)
    assert directions.flatten(1).norm(dim=1).tolist() == pytest.approx([1] * 6, rel=1e-5)
    assert torch.equal(anisotropy.unit_directions(6, torch.Size([16, 8, 4]), seed=0), directions)
    others = anisotropy.unit_directions(6, torch.Size([16, 8, 4]), seed=1)
    every = torch.cat([directions, others]).flatten(1)
    cosines = every @ every.T - torch.eye(12)
    assert cosines.abs().max() < 5 / math.sqrt(16 * 8 * 4)  # random directions are almost orthogonal
    assert every.mean().abs() < 0.1 / math.sqrt(16 * 8 * 4)


@pytest.mark.parametrize(
    ("k", "unit", "per"), [(2, "relative", "dataset"), (4, "relative", "image"), (3, "absolute", "dataset")]
)
def test_measure_matches_a_float64_loop_over_images_and_directions(k, unit, per):
    net, test, length = randomized_resnet8(), random_images(5), 0.5
    kl, hits, clean = anisotropy.measure(net, k, test, length, options(length_unit=unit, directions_per=per))

    net = net.double()

    def probabilities(i, offset=None):
        """The output for image i with an offset added to F^k, and the L2 norm of F^k without it."""
        x = normalize(test.images[i : i + 1]).double()
        with torch.no_grad():
            for stage in range(1, net.num_stages + 1):
                x = net.stage(stage, x)
                if stage == k:
                    norm = math.sqrt((x**2).sum().item())
                    x = x if offset is None else x + offset
            z = net.classify(x)[0].tolist()
        total = sum(math.exp(value - max(z)) for value in z)
        return [math.exp(value - max(z)) / total for value in z], norm

    clean_hits = []
    shape = net.features(torch.zeros(1, 3, 32, 32).double())[k - 1].shape[1:]
    norms = [probabilities(i)[1] for i in range(5)]
    assert max(norms) > 1.001 * min(norms)  # so that the units differ
    for i in range(5):
        p, label = probabilities(i)[0], test.labels[i].item()
        clean_hits.append(p.index(max(p)) == label)
        directions = anisotropy.unit_directions(6, shape, seed=i if per == "image" else 0).double()
        for j in range(6):
            q = probabilities(i, length * {"relative": norms[i], "absolute": sum(norms) / 5}[unit] * directions[j])[0]
            expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            assert kl[i, j].item() == pytest.approx(expected, rel=5e-4)
            assert hits[i, j] == (q.index(max(q)) == label)
    assert clean == sum(clean_hits) / 5
    assert kl.min() > 1e-4  # far above rounding errors


def test_autocast_rounds_the_later_stages_only():
    net, test = randomized_resnet8(), random_images(5)
    for k in (2, 4):
        exact, *_ = anisotropy.measure(net, k, test, 0.5, options())
        rounded, *_ = anisotropy.measure(net, k, test, 0.5, options(autocast=True))
        assert torch.allclose(rounded, exact, rtol=0.2)
        assert torch.equal(rounded, exact) == (k == 4)


def test_results_do_not_depend_on_the_batch_size():
    net, test, seen = randomized_resnet8(), random_images(3), []
    classify = net.classify
    net.classify = lambda x: (seen.append(len(x)), classify(x))[1]
    small, *_ = anisotropy.measure(net, 3, test, 0.5, options(batch_size=4))
    assert seen == [3, *[4, 2] * 3]
    large, *_ = anisotropy.measure(net, 3, test, 0.5, options(batch_size=500))
    assert seen[7:] == [3, 6, 6, 6]
    assert torch.allclose(small, large, rtol=1e-3)


def test_mildest_and_worst_are_chosen_for_each_image_and_for_all():
    kl = torch.tensor([[0.1, 10.0, 1.0, 0.4], [5.0, 0.5, 0.05, 0.4]], dtype=torch.float64)
    hits = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.float64)
    found = anisotropy.summarize(kl, hits, 0.75, "dataset")
    assert found["image"] == {"smallest": 0.075, "largest": 7.5, "clean": 75, "mildest": 50, "worst": 50}
    assert found["mean"] == {"smallest": 0.4, "largest": 5.25, "clean": 75, "mildest": 50, "worst": 100}
    assert anisotropy.summarize(kl, hits, 0.75, "image") == {"image": found["image"]}


def test_isotropic_later_layers_have_a_ratio_near_1():
    """With p uniform over K classes, KL is |dz|^2 / 2K for a small change dz of logits that sum to 0.

    Later layers that preserve lengths have the same KL in every direction; layers that read a single value do not.
    """
    classes = 40
    onto = torch.linalg.qr(torch.cat([torch.ones(classes, 1), torch.eye(classes)[:, :-1]], 1)).Q[:, 1:]  # [K, K - 1]
    feature = torch.randn(1, classes - 1, 1, 1, generator=torch.Generator().manual_seed(0)) + 1

    class Net:
        num_stages = 1

        def stage(self, k, x):
            return feature

        def classify(self, x):
            return (self.weights * (x - feature).flatten(1)) @ onto.T

    def ratio(net):
        kl, *_ = anisotropy.measure(net, 1, random_images(1), 0.05, options(directions=64))
        found = anisotropy.summarize(kl, torch.zeros_like(kl), 0, "dataset")["image"]
        return found["largest"] / found["smallest"], kl

    net = Net()
    net.weights = torch.ones(classes - 1)
    isotropic, kl = ratio(net)
    assert 1 <= isotropic < 1.2
    assert kl[0].tolist() == pytest.approx([(0.05 * feature.norm().item()) ** 2 / (2 * classes)] * 64, rel=0.05)
    net.weights[1:] = 0
    assert ratio(net)[0] > 100


def curve(**smallest):
    return {float(length[1:]): {"image": {"smallest": kl}} for length, kl in smallest.items()}


def test_length_is_interpolated_where_the_smallest_kl_rises():
    rising = curve(_1=0.03, _2=0.12, _4=0.48, _8=3.84)  # KL = 0.03 length^2, then steeper
    assert anisotropy.length_at(rising, "image", 0.27) == pytest.approx(3)
    assert anisotropy.length_at(rising, "image", 0.48) == pytest.approx(4)
    assert anisotropy.length_at(rising, "image", 0.96) == pytest.approx(4 * 2 ** (1 / 3), rel=1e-3)
    assert anisotropy.length_at(curve(_1=0.1, _2=0.4, _4=0.2, _8=0.8), "image", 0.3) < 2  # the first of two
    for beyond in (0.029, 3.85):
        assert anisotropy.length_at(rising, "image", beyond) is None
    assert anisotropy.length_at(curve(_1=0.1), "image", 0.2) is None
    assert anisotropy.length_at(curve(_1=0.4, _2=0.1), "image", 0.2) is None


def table_rows(folder):
    lines = (folder / "table.md").read_text().split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_smoke(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # --smoke of a table's script leaves runs like this one.
    earlier = ["--student", "resnet8", "--device", "cpu", "--out", "results/runs/smoke/resnet8-alone-seed1"]
    assert cifar100.main([*CIFAR.smoke, *earlier]) == 0
    argv = ["--smoke", "--seeds", 1, 2, "--positions", 3, 4, "--device", "cpu"]
    printed, out = call(capsys, *argv, module=anisotropy), tmp_path / "results" / "anisotropy" / "smoke"
    assert (out / "table.md").read_text() in printed
    rows = table_rows(out)
    names = ["resnet8, seed 1", "resnet8, seed 2", "mean of 2"]
    expected = [[name, f"F^{k}", whose] for name in names for k in (3, 4) for whose in ("all images", "each image")]
    assert [row[:3] for row in rows] == expected
    numbers = json.loads((out / "numbers.json").read_text())
    lengths = {}  # of the table's rows, by name
    for row in rows[:8]:
        name, feature, whose, *values = row
        length, smallest, largest, ratio, clean, mildest, worst, *falls = map(float, values)
        accuracy = json.loads((out / f"resnet8-alone-seed{name[-1]}" / "result.json").read_text())["last"]["top1"]
        assert clean == accuracy  # all test images
        assert smallest == pytest.approx(0.01, rel=0.1)
        assert 1.001 < ratio < 20
        assert falls == pytest.approx([clean - mildest, clean - worst])
        measured = numbers[name]["measured"]
        at = [key for key in measured if key.startswith(f"{feature}, 40 images, directions per dataset, relative")]
        (found,) = [measured[key] for key in at if round(float(key.split()[-1]), 3) == length]
        found = found["mean" if whose == "all images" else "image"]
        assert (smallest, largest) == (round(found["smallest"], 4), round(found["largest"], 4))
        assert ratio == pytest.approx(found["largest"] / found["smallest"], abs=0.006)
        lengths.setdefault(name, []).append(length)
    for row, *values in zip(rows[8:], *lengths.values(), strict=True):
        assert row[3] == f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
    assert "of 40 test images, perturbed along 8 random directions, the same for all images" in printed
    assert "smallest KL of 0.01 on 20 images" in printed
    with Image.open(out / "curves.png") as picture:
        assert picture.width >= 800
        assert len(picture.convert("RGB").getcolors(10**6)) > 20

    def fail_if_called(*_):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(anisotropy, "measure", fail_if_called)
        call(capsys, *argv, module=anisotropy)
        assert table_rows(out) == rows
        others = {"lengths": 0.25, "directions": 9, "sweep-images": 30, "images": 30, "smallest-kl": 0.02}
        others |= {"directions-per": "image", "length-unit": "absolute"}
        for more in (["--autocast"], *([f"--{name}", str(value)] for name, value in others.items())):
            with pytest.raises(AssertionError, match="again"):
                anisotropy.main([*map(str, argv), *more])
    one = ["--smoke", "--positions", 4, "--device", "cpu"]
    call(capsys, *one, "--directions-per", "image", "--lengths", 16, 1, module=anisotropy)
    assert [row[:3] for row in table_rows(out)] == [["resnet8, seed 1", "F^4", "each image"]]
    call(capsys, *one, "--smallest-kl", 100, module=anisotropy)
    reached = [row[2:] for row in table_rows(out)]
    assert reached == [[whose, "not reached", *[""] * 8] for whose in ("all images", "each image")]


def test_run_and_its_checkpoint_have_the_same_results(tmp_path, capsys, monkeypatch, run):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    small = ["--directions", 4, "--lengths", 1, 16, "--smallest-kl", 0.01, "--sweep-images", 20, "--images", 30]
    small += ["--positions", 4, "--device", "cpu"]
    call(capsys, "--run", run, *small, module=anisotropy)
    data = ["--dataset", "synthetic", "--subset", 120, "--test-subset", 60]
    call(capsys, "--network", "resnet8", "--ckpt", run / "student.pth", *data, *small, module=anisotropy)
    first, second = (table_rows(tmp_path / "results" / "anisotropy" / name) for name in (run.name, "resnet8-student"))
    assert [first[0][0], second[0][0]] == [run.name, "resnet8-student"]
    assert first[0][1:] == second[0][1:]
    assert first[0][3] != "not reached"


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
        (["--lengths", "1", "0"], "--lengths: 0 must"),
        (["--lengths", "nan"], "--lengths: nan must"),
        (["--directions", "0"], "--directions: 0 must"),
        (["--length-unit", "cm"], "--length-unit"),
        (["--directions-per", "class"], "--directions-per"),
        (["--smallest-kl", "0"], "--smallest-kl: 0 must"),
        (["--images", "61"], "--images 61"),
        (["--sweep-images", "61"], "--sweep-images 61"),
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
    for text in ("{", "[]", '{"a": {}}', '{"a": {"settings": {}, "measured": {"b": {"image": {"smallest": 1}}}}}'):
        (tmp_path / "numbers.json").write_text(text)
        message = call(capsys, "--run", run, "--directions", 2, "--out", tmp_path, code=2, module=anisotropy)
        assert "numbers.json is damaged" in message
        assert message.count("\n") == 1
        assert (tmp_path / "numbers.json").read_text() == text
    monkeypatch.setattr(anisotropy, "load_config", lambda run, load_config=anisotropy.load_config:
                        load_config(run) | {"fingerprint": "another"})  # fmt: skip
    assert "was not trained on the images" in call(capsys, "--run", run, code=2, module=anisotropy)


def test_missing_matplotlib_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "requirements-extra.txt" in call(capsys, "--smoke", code=2, module=anisotropy)
    assert not list(tmp_path.iterdir())
