"""ablations/complexity.py: what it writes; how long things take is not for a test."""

import json

import pytest
import torch

from ablations import complexity
from common.models import build


def test_smoke(tmp_path, capsys):
    assert complexity.main(["--smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "rows.json").read_text())
    rows = {(row["kind"], row["num_paths"]): row for row in numbers["rows"]}
    assert list(rows) == [("alone", None), ("fcfd", 0), ("fcfd", 2), ("plain", 2)]
    assert all(row["seconds"] > 0 for row in rows.values())
    megabytes = [row["megabytes"] for row in rows.values()]
    weights = sum(4 * p.numel() for p in build("resnet8", 100).parameters()) / 2**20
    assert 2 * weights < megabytes[0] < megabytes[1] < megabytes[2] < 40  # weights and gradients at least
    text = (tmp_path / "table.md").read_text()
    assert text.startswith(capsys.readouterr().out.split("\n\n")[0])
    unit = rows["alone", None]["seconds"]
    expected = f"| resnet14-resnet8 | FCFD | 2 | {rows['fcfd', 2]['seconds'] / unit:.2f} | "
    assert expected + f"{1000 * rows['fcfd', 2]['seconds']:.1f} | {4 / rows['fcfd', 2]['seconds']:.0f} | " in text


def test_memory_is_the_same_when_measured_again():
    c = complexity.parse_args(["--smoke", "--device", "cpu"])
    rows = [complexity.Row("resnet14-resnet8", "fcfd", 2) for _ in range(3)]
    for row in rows:
        complexity.measure_memory(row, c)
    assert rows[1].megabytes == pytest.approx(rows[0].megabytes, rel=0.01)
    assert rows[2].megabytes == pytest.approx(rows[0].megabytes, rel=0.01)


def test_time_is_the_median_without_the_first_round(monkeypatch):
    """A clock that the steps move: the row that takes 1, 2, 9 s counts 2, and its first step, of 100 s, not at all."""
    now = [0.0]
    monkeypatch.setattr(complexity.time, "perf_counter", lambda: now[0])
    lasting = {"a": [100, 1, 2, 9], "b": [0, 4, 4, 4]}
    order = []

    def step_of(name):
        def step(i):
            order.append(name)
            now[0] += lasting[name][i]

        return step

    rows = [complexity.Row("x-y", name) for name in lasting]
    monkeypatch.setattr(complexity, "steps_of", lambda *_: [(row, step_of(row.kind)) for row in rows])
    c = complexity.parse_args(["--repeats", "3", "--device", "cpu"])
    complexity.measure_time(rows, c)
    assert [row.seconds for row in rows] == [2, 4]
    assert "".join(order) == "baabbaab"


def test_a_step_trains_the_student_and_leaves_the_teacher(monkeypatch):
    built = []
    monkeypatch.setattr(complexity, "build", lambda *args: built.append(build(*args)) or built[-1])
    c = complexity.parse_args(["--smoke", "--device", "cpu"])
    step = complexity.fcfd_steps("resnet14-resnet8", c, plain=False)
    before = [[p.detach().clone() for p in net.parameters()] for net in built]
    step(2, 0)
    same = [
        [torch.equal(p, q) for p, q in zip(net.parameters(), old, strict=True)]
        for net, old in zip(built, before, strict=True)
    ]
    assert all(same[0])
    assert all(p.grad is None for p in built[0].parameters())
    assert not any(same[1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--pairs", "resnet14-resnet9"], "resnet8"),
        (["--pairs", "resnet14"], "hyphen"),
        (["--pairs", "vgg13-resnet8"], "stages"),
        (["--num-paths", "5"], "4 candidates"),
        (["--repeats", "0"], "--repeats 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, options, expected):
    assert complexity.main([*options, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()
