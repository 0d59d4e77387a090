"""ablations/toy.py: the points on the ring and their outputs."""

import json
import math
import sys
from pathlib import Path

import pytest
from PIL import Image

from ablations import toy

RECORD = Path(__file__).parents[1] / "results" / "toy" / "radius-1"


def reference_output(f1, f2):
    """The output for feature (f1, f2), from the formula in toy.py's docstring."""
    z = [2 * f1 - f2 + 1, -f1 + 2 * f2, f1 / 2 + f2 - 2]
    total = sum(math.exp(value) for value in z)
    return [math.exp(value) / total for value in z]


def reference_kl(f1, f2):
    return sum(p * math.log(p / q) for p, q in zip(reference_output(4, 4), reference_output(f1, f2), strict=True))


@pytest.mark.parametrize("radius", [0.1, 1.0, 3.0])
def test_ring_points_match_the_formula(radius):
    rows = toy.ring(radius)
    assert [row["angle"] for row in rows] == pytest.approx(list(range(360)))
    for degrees, row in enumerate(rows):
        f1, f2 = 4 + radius * math.cos(math.radians(degrees)), 4 + radius * math.sin(math.radians(degrees))
        assert row["point"] == pytest.approx([f1, f2])
        assert row["l2"] == pytest.approx(radius, rel=1e-12)
        assert math.dist(row["point"], (4, 4)) == pytest.approx(radius, rel=1e-12)
        assert row["output"] == pytest.approx(reference_output(f1, f2))
        assert row["kl"] == pytest.approx(reference_kl(f1, f2), rel=1e-9)


def test_extremes_match_a_dense_search():
    smallest, largest = toy.extremes(toy.ring(1.0))
    dense = {i / 20: reference_kl(4 + math.cos(math.radians(i / 20)), 4 + math.sin(math.radians(i / 20)))
             for i in range(7200)}  # fmt: skip
    lowest, highest = min(dense, key=dense.get), max(dense, key=dense.get)
    assert abs(smallest["angle"] - lowest) <= 0.5
    assert abs(largest["angle"] - highest) <= 0.5
    assert smallest["kl"] == pytest.approx(dense[lowest], rel=0.05)
    assert largest["kl"] == pytest.approx(dense[highest], rel=1e-3)
    assert largest["kl"] > 100 * smallest["kl"]


def test_writes_table_numbers_and_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert toy.main(["--smoke", "--radius", "0.5", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:12]]
    assert [row[1] for row in rows[:8]] == [str(degrees) for degrees in range(0, 360, 45)]
    assert {row[3] for row in rows} == {"0.50"}
    assert [row[0] for row in rows] == [""] * 8 + ["smallest KL", "largest KL"]
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert (numbers["radius"], len(numbers["ring"])) == (0.5, 360)
    kl = [row["kl"] for row in numbers["ring"]]
    assert [row[5] for row in rows[8:]] == [f"{min(kl):.3g}", f"{max(kl):.3g}"]
    assert rows[0] == ["", "0", "(4.50, 4.00)", "0.50", "({:.3f}, {:.3f}, {:.3f})".format(*reference_output(4.5, 4)),
                       f"{reference_kl(4.5, 4):.3g}"]  # fmt: skip
    assert f"{max(kl) / min(kl):.0f} times" in text
    with Image.open(tmp_path / "toy.png") as picture:
        assert picture.width >= 800
        assert len(picture.convert("RGB").getcolors(10**6)) > 100


def test_committed_record_is_reproduced(tmp_path):
    pytest.importorskip("matplotlib")
    assert toy.main(["--out", str(tmp_path)]) == 0
    for name in ("table.md", "numbers.json"):
        assert (tmp_path / name).read_text() == (RECORD / name).read_text(), name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--radius", "0"], "--radius: 0 must"),
        (["--radius", "nan"], "--radius: nan must"),
        (["--radius", "11"], "--radius: 11 must"),
        (["--radius", "wide"], "wide"),
        (["--out", ""], "--out is empty"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    assert toy.main(options) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert expected in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert toy.main(["--out", str(tmp_path / "out")]) == 2
    assert "requirements-extra.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
