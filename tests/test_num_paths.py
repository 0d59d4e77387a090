"""ablations/num_paths.py: its rows, and which costs are remeasured. Timings are not tested."""

import csv
import json

import pytest
import torch

from ablations import complexity, num_paths
from common.run.earlier_runs import read_config

SMOKE = ["--smoke", "--devices", "cpu", "--amp", "off", "--out"]


def test_smoke(tmp_path, capsys):
    assert num_paths.main([*SMOKE, str(tmp_path)]) == 0
    runs = {run["method"]: run for run in csv.DictReader((tmp_path / "cells.csv").open())}
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert list(runs) == ["app", "fcfd-num_paths=1", "fcfd"]
    for n, (name, run) in enumerate(runs.items()):
        config = read_config(tmp_path / f"resnet14-resnet8-{name}-seed1")
        assert (config["num_paths"], config["w_func_kl"], config["w_app"]) == (n, 1 if n else 0, 5)
        step = cost["rows"][n]
        assert (step["pair"], step["num_paths"]) == ("resnet14-resnet8", n)
        line = f"| resnet14-resnet8 | {n} | 1 | {float(run['last']):.2f} | {1000 * step['seconds']:.1f} | "
        line += f"{20 / step['seconds']:.0f} | {step['megabytes']:.0f} | {step['flops'] / 1e9:.2f} |\n"
        assert line in (tmp_path / "table.md").read_text()
    for key in ("megabytes", "flops"):
        assert 0 < cost["rows"][0][key] < cost["rows"][1][key] < cost["rows"][2][key]
    assert all(step["seconds"] > 0 for step in cost["rows"])
    text, expected = capsys.readouterr().out, (tmp_path / "table.md").read_text()
    assert expected in text

    assert num_paths.main([*SMOKE, str(tmp_path)]) == 0  # nothing is left to do
    text = capsys.readouterr().out
    assert "4 runs, 4 already finished" in text
    assert "measuring" not in text
    assert json.loads((tmp_path / "cost.json").read_text()) == cost
    assert (tmp_path / "table.md").read_text() == expected


def test_sizes_stop_at_the_smallest_number_of_candidates():
    four, five = "resnet32x4-resnet8x4", "vgg13-vgg8"
    assert num_paths.path_counts([four]) == [0, 1, 2, 3, 4]
    assert num_paths.path_counts([five]) == [0, 1, 2, 3, 4, 5, 6]
    assert num_paths.path_counts([five, four]) == [0, 1, 2, 3, 4]
    names = [num_paths.row_of(n).name for n in range(4)]
    assert names == ["app", "fcfd-num_paths=1", "fcfd", "fcfd-num_paths=3"]


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Calls `complexity.measured` with fake measurements; returns its result and the pairs it measured."""
    measured = []

    def fake_time(rows, c):
        measured.append((rows[0].pair, [row.num_paths for row in rows]))
        for row in rows:
            row.seconds = len(measured) + row.num_paths / 10

    monkeypatch.setattr(complexity, "measure_memory", lambda row, c: setattr(row, "megabytes", 100.0))
    monkeypatch.setattr(complexity, "measure_time", fake_time)

    def measure(*pairs, sizes=(0, 1), repeats=2, **options):
        measured.clear()
        c = num_paths.cost_settings(list(pairs), options, repeats, "cpu")
        steps = num_paths.steps(c.pairs, list(sizes))
        return complexity.measured(steps, c, tmp_path / "cost.json"), list(measured)

    return measure


A, B = "resnet14-resnet8", "resnet20-resnet8"


def test_existing_costs_are_kept(measure, tmp_path):
    first, measured = measure(A)
    assert measured == [(A, [0, 1])]
    assert [(row["kind"], row["seconds"]) for row in first["rows"]] == [("app", 1.0), ("fcfd", 1.1)]
    both, measured = measure(A, B)
    assert measured == [(B, [0, 1])]
    assert both["rows"][:2] == first["rows"]
    assert json.loads((tmp_path / "cost.json").read_text()) == both
    assert measure(B)[1] == []
    assert measure(A, sizes=[0])[1] == []
    more, measured = measure(A, sizes=[0, 1, 2])  # a pair's steps are interleaved, so all are remeasured
    assert measured == [(A, [0, 1, 2])]
    assert sorted((row["pair"], row["num_paths"]) for row in more["rows"]) == [(A, 0), (A, 1), (A, 2), (B, 0), (B, 1)]


@pytest.mark.parametrize("other", [{"repeats": 3}, {"batch_size": 8}, {"amp": "bf16"}, "machine", "damaged", "empty"])
def test_costs_of_other_settings_or_machines_are_measured_again(measure, tmp_path, monkeypatch, other):
    measure(A)
    if other == "machine":
        machine = {"commit": "other", "torch": "9", "device": "cpu", "threads": 1}
        monkeypatch.setattr(complexity, "machine_of", lambda device: dict(machine))
    elif other in ("damaged", "empty"):
        (tmp_path / "cost.json").write_text('{"settings"' if other == "damaged" else "[]")
    cost, measured = measure(A, **(other if isinstance(other, dict) else {}))
    assert measured == [(A, [0, 1])]
    assert len(cost["rows"]) == 2


def test_costs_are_kept_across_commits(measure, monkeypatch):
    machine = complexity.machine_of(torch.device("cpu"))
    first, _ = measure(A)
    monkeypatch.setattr(complexity, "machine_of", lambda device: machine | {"commit": "other"})
    assert measure(A) == (first, [])


def test_table_shows_the_finished_runs(measure):
    cost, _ = measure(A, batch_size=11)
    run = {"pair": A, "seed": 1, "teacher": 70.0}
    runs = [run | {"method": "fcfd-num_paths=1", "last": last} for last in (60.0, 62.0)]
    flops = [f"{row['flops'] / 1e9:.2f}" for row in cost["rows"]]
    text = num_paths.table([*runs, run | {"method": "fcfd", "last": 90.0}], cost, [A], [0, 1])
    assert f"\n| {A} | 0 | 0 |  | 1000.0 | 11 | 100 | {flops[0]} |\n" in text
    assert f"\n| {A} | 1 | 2 | 61.00 ± 1.41 | 1100.0 | 10 | 100 | {flops[1]} |\n" in text
    assert "90.00" not in text
    assert "A step: batch 11, amp off, medians of 2; cpu, torch" in text


def test_steps_are_measured_with_the_settings_of_the_runs():
    c = num_paths.cost_settings([A], {"batch_size": 7, "amp": "bf16"}, 5, "cpu")
    assert (c.batch_size, c.amp, c.repeats, c.device, c.pairs) == (7, "bf16", 5, "cpu", [A])
    c = num_paths.cost_settings([A], {}, None, "cpu")
    assert (c.batch_size, c.amp, c.repeats) == (64, "off", 11)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--num-paths", "3"], "--num-paths"),
        (["--positions", "2"], "--positions"),
        (["--simkd"], "--simkd"),
        (["--w-func-prime", "0"], "--w-func-prime"),
        (["--w-func-partial", "1"], "--w-func-partial"),
        (["--repeats", "0"], "--repeats: 0 must"),
        (["--pairs", "resnet14-resnet9"], "resnet8"),
        (["--pairs", "resnet14"], "hyphen"),
        (["--pairs", "resnet14-vgg8"], "stages"),
        (["--seeds", "-1"], "--seeds: -1 must"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, options, expected):
    assert num_paths.main([*options, "--dataset", "synthetic", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert expected in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()
