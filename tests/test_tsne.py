"""ablations/tsne.py: the figure and its numbers."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from running import call
from torch import nn

from ablations import branches, tsne
from common.data.batches import ImageSet

SMOKE = ["--smoke", "--devices", "cpu", "--amp", "off"]


def naive(student, teacher, labels):
    n, nearest, distances = len(labels), [], []
    for i in range(n):
        to = [
            sum((a - b) ** 2 for a, b in zip(student[i].tolist(), teacher[j].tolist(), strict=True)) ** 0.5
            for j in range(n)
        ]
        nearest.append(min(range(n), key=to.__getitem__))
        distances.append(to[i])
    pairwise = [(teacher[i] - teacher[j]).norm().item() for i in range(n) for j in range(n) if i != j]
    return {
        "distance": sum(distances) / n,
        "relative": sum(distances) / n / (sum(pairwise) / len(pairwise)),
        "same_image": 100 * sum(nearest[i] == i for i in range(n)) / n,
        "same_class": 100 * sum(labels[nearest[i]].item() == labels[i].item() for i in range(n)) / n,
    }


def test_measure_matches_plain_loops():
    rng = torch.Generator().manual_seed(0)
    teacher = torch.randn(30, 5, generator=rng, dtype=torch.float64)
    student = teacher + torch.randn(30, 5, generator=rng, dtype=torch.float64)
    labels = torch.randint(3, (30,), generator=rng)
    measured = tsne.measure(student, teacher, labels)
    assert measured == pytest.approx(naive(student, teacher, labels))
    assert 0 < measured["same_image"] < measured["same_class"] < 100


def test_measure_in_extreme_cases():
    teacher, labels = 10 * torch.eye(4, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    ends = {"distance": 0, "relative": 0, "same_image": 100, "same_class": 100}
    assert tsne.measure(teacher, teacher, labels) == ends
    within = tsne.measure(teacher[[1, 0, 3, 2]], teacher, labels)  # swapped within each class
    assert within == pytest.approx({"distance": 200**0.5, "relative": 1, "same_image": 0, "same_class": 100})
    across = tsne.measure(teacher[[2, 3, 0, 1]], teacher, labels)
    assert (across["same_image"], across["same_class"]) == (0, 0)


def test_points_are_the_inputs_of_the_classifier():
    trained = nn.ModuleDict({k: branches.Branch(3, 1, 8, [4, 6, 8, 10], 5, pre_relu=True) for k in "23"}).eval()
    images = ImageSet(torch.randint(256, (510, 32, 32, 3), dtype=torch.uint8), torch.zeros(510))
    read = {k: [] for k in trained}
    for k, branch in trained.items():
        branch.fc.register_forward_pre_hook(lambda _, inputs, k=k: read[k].append(inputs[0]))
    features = lambda x: {"2": x[:, :, ::8, ::8], "3": -x[:, :, ::8, ::8]}  # noqa: E731
    points = tsne.points_of(trained, features, images)
    for k, branch in trained.items():
        for batch, _ in tsne.eval_batches(images):
            branch(features(batch)[k])
        torch.testing.assert_close(points[k], torch.cat(read[k]).double())


def test_only_the_first_ten_classes_are_kept():
    labels = torch.tensor([11, 3, 10, 9, 0])
    kept = tsne.first_classes(ImageSet(torch.arange(5)[:, None], labels))
    assert (kept.labels.tolist(), kept.images.flatten().tolist()) == ([3, 9, 0], [1, 3, 4])


class Plane:
    """Stands in for TSNE: returns the first two coordinates."""

    def __init__(self, perplexity, init, random_state):
        assert perplexity <= 30

    def fit_transform(self, points):
        return points[:, :2]


def test_students_are_blue_teachers_red_and_overlaps_brown():
    pytest.importorskip("matplotlib")
    r = 100 / 160  # of a disc: the points below span 100 units
    own = [(0, 0), (100, 100), (20, 80), (60, 20), (60 + r, 20)]  # the last two overlap
    app = [(80, 10), (40, 40), (40 + r, 40), (20, 80), (100 + r, 100)]  # the last two overlap teacher's points
    fcfd = [(10, 50), (90, 50), (50, 90), (70, 70), (30, 10)]
    teacher, *students = (dict.fromkeys("23", torch.tensor(each, dtype=torch.float64)) for each in (own, app, fcfd))
    students = dict(zip(("app", "fcfd"), students, strict=True))
    figure = tsne.draw(teacher, students, torch.arange(5) % 2, Plane)
    figure.set_dpi(300)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3]

    def color(panel, x, y):
        column, row = panel.transData.transform((x, y)).astype(int)
        return "#" + bytes(pixels[row, column].tolist()).hex().upper()

    only_own, between = [(0, 0), (100 - r / 2, 100), (60, 20), (60 + r / 2, 20)], (50, 50)
    only_app, both = [(80, 10), (40, 40), (40 + r / 2, 40), (100 + 1.5 * r, 100)], [(20, 80), (100 + r / 2, 100)]
    expected = {
        "app": {"student": only_app, "teacher": only_own, "both": both},
        "fcfd": {"student": fcfd, "teacher": [*own, (100 + r / 2, 100)], "both": []},
    }
    for panel, (name, points) in zip(figure.axes, [*expected.items()] * 2, strict=True):
        for kind, places in points.items():
            assert [color(panel, *place) for place in places] == [tsne.COLORS[kind]] * len(places), (name, kind)
        assert color(panel, *between) == "#FFFFFF"
    titles = [panel.get_title() for panel in figure.axes]
    starts = [f"{name}, after $F^{k}$\nrelative distance " for k in "23" for name in students]
    assert all(title.startswith(start) for title, start in zip(titles, starts, strict=True))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["teacher", "student", "both"]


def test_table():
    def row(after, seed):
        return {"pair": "a-b", "after": after, "method": "app", "seed": seed} | dict.fromkeys(tsne.DIGITS, float(seed))

    text = tsne.table([row("2", 1), row("2", 3), row("3", 4)])
    assert "| a-b | F^2 | app | 2 | 2.000 ± 1.414 | 2.000 ± 1.414 | 2.0 ± 1.4 | 2.0 ± 1.4 |\n" in text
    assert "| a-b | F^3 | app | 1 | 4.000 | 4.000 | 4.0 | 4.0 |\n" in text


def test_smoke_uses_existing_runs_and_branches(branch_runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    state = branch_runs / "resnet14-branches-seed1" / "branches.pt"
    before = {file: file.read_bytes() for file in branch_runs.rglob("*.*") if file.is_file()}
    command = [*SMOKE, "--runs", branch_runs, "--out", tmp_path]
    output = call(capsys, *command, module=tsne)
    assert "3 runs, 3 already finished" in output
    assert state in before
    assert before == {file: file.read_bytes() for file in branch_runs.rglob("*.*") if file.is_file()}
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert [(row["method"], row["after"]) for row in rows] == [("app", "2"), ("fcfd", "2"), ("app", "3"), ("fcfd", "3")]
    for row in rows:
        assert row["distance"] > 0
        assert row["relative"] > 0
        assert 0 <= row["same_image"] <= row["same_class"] <= 100
    assert len({row["distance"] for row in rows}) == 4
    with Image.open(tmp_path / "tsne.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == 1200
    for color in tsne.COLORS.values():
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels.astype(int) - wanted).max(2) <= 2).any(), color
    assert (tmp_path / "table.md").read_text() in output
    call(capsys, *command, module=tsne)
    assert json.loads((tmp_path / "numbers.json").read_text())["rows"] == rows


@pytest.mark.parametrize(("module", "name"), [("sklearn.manifold", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_missing_packages_are_reported_before_anything_runs(tmp_path, capsys, monkeypatch, module, name):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit):  # --help needs neither package
        tsne.main(["--help"])
    capsys.readouterr()
    message = call(capsys, *SMOKE, "--out", tmp_path / "out", module=tsne, code=2)
    assert name in message
    assert "pip install -r requirements-extra.txt" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()
