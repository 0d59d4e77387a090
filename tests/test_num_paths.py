"""ablations/num_paths.py: its rows. The costs of tables: which are remeasured. Timings are not tested."""

import csv
import json
from argparse import Namespace

import pytest
import torch

from ablations import complexity, num_paths, tables
from ablations.cells import to_argv
from ablations.rows import Row, grid
from common.run.earlier_runs import read_config
from common.run.errors import UserError

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
        options = {"method": "fcfd" if n else "app"} | ({"num_paths": 1} if n == 1 else {})
        assert (step["pair"], step["name"], step["options"]) == ("resnet14-resnet8", name, options)
        flops = 20 * complexity.formula("resnet14-resnet8", {"method": "fcfd", "num_paths": n})
        top1 = f"{float(run['last']):.2f} / {float(run['best']):.2f}"
        line = f"| resnet14-resnet8 | {n} | 1 | {top1} | {1000 * step['seconds']:.1f} | "
        line += f"{20 / step['seconds']:.0f} | {step['megabytes']:.0f} | {flops / 1e9:.2f} |\n"
        assert line in (tmp_path / "table.md").read_text()
    memory = [row["megabytes"] for row in cost["rows"]]
    assert 0 < memory[0] < memory[1] < memory[2]
    assert all(step["seconds"] > 0 for step in cost["rows"])
    text, expected = capsys.readouterr().out, (tmp_path / "table.md").read_text()
    assert expected in text

    assert num_paths.main([*SMOKE, str(tmp_path)]) == 0  # nothing is left to do
    text = capsys.readouterr().out
    assert "4 runs, 4 already finished" in text
    assert "measuring" not in text
    assert json.loads((tmp_path / "cost.json").read_text()) == cost
    assert (tmp_path / "table.md").read_text() == expected

    assert num_paths.main([*SMOKE, str(tmp_path), "--num-paths", "2", "0"]) == 0
    rows = [line for line in expected.splitlines(keepends=True) if "| resnet14-resnet8 |" in line]
    assert (tmp_path / "table.md").read_text() == expected.replace(rows[1], "")


def test_sizes_stop_at_the_smallest_number_of_candidates():
    four, five = "resnet32x4-resnet8x4", "vgg13-vgg8"

    def counts(*pairs, given=None, smoke=False):
        return num_paths.path_counts(Namespace(pairs=pairs, num_paths=given, smoke=smoke))

    assert counts(four) == [0, 1, 2, 3, 4]
    assert counts(five) == [0, 1, 2, 3, 4, 5, 6]
    assert counts(five, four) == [0, 1, 2, 3, 4]
    assert counts(five, smoke=True) == [0, 1, 2]
    assert counts(four, given=[4, 0, 4], smoke=True) == [0, 4]
    with pytest.raises(UserError, match="--num-paths 5: there are 4"):
        counts(five, four, given=[0, 5])
    names = [num_paths.row_of(n).name for n in range(4)]
    assert names == ["app", "fcfd-num_paths=1", "fcfd", "fcfd-num_paths=3"]


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Calls `tables.measure_steps` with fake measurements; returns its result and the pairs and rows it measured."""
    measured = []

    def fake_time(rows, settings):
        measured.append((rows[0].pair, [row.name for row in rows]))
        for i, row in enumerate(rows):
            row.seconds = len(measured) + i / 10

    monkeypatch.setattr(complexity, "measure_memory", lambda row, c: setattr(row, "megabytes", 100.0))
    monkeypatch.setattr(complexity, "measure_time", fake_time)
    monkeypatch.setattr(tables, "with_dependencies", list)  # without loading the data

    def measure(*pairs, rows=(APP, ONE_PATH), repeats=2, **options):
        measured.clear()
        argv = ["--pairs", *pairs, "--out", str(tmp_path), "--devices", "cpu", "--repeats", str(repeats)]
        argv += ["--dataset", "synthetic", *to_argv({"amp": "off"} | options)]
        args, given = tables.parse_args(argv, "", "some", [], tables.add_repeats)
        return tables.measure_steps(args, given, grid(args, given, list(rows))), list(measured)

    return measure


A, B = "resnet14-resnet8", "resnet20-resnet8"
APP, ONE_PATH, FCFD = (num_paths.row_of(n) for n in range(3))
NAMES = [APP.name, ONE_PATH.name]


def test_existing_costs_are_kept(measure, tmp_path):
    first, measured = measure(A)
    assert measured == [(A, NAMES)]
    assert {key: step.seconds for key, step in first.steps.items()} == {(A, NAMES[0]): 1.0, (A, NAMES[1]): 1.1}
    both, measured = measure(A, B)
    assert measured == [(B, NAMES)]
    assert both.steps.items() > first.steps.items()
    stored = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert [row | vars(step) for row, step in zip(stored, both.steps.values(), strict=True)] == stored
    assert measure(B)[1] == []
    assert measure(A, rows=[APP])[1] == []
    more, measured = measure(A, rows=[APP, ONE_PATH, FCFD])  # a pair's steps are interleaved, so all are remeasured
    assert measured == [(A, [*NAMES, FCFD.name])]
    stored = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert [(row["pair"], row["name"]) for row in stored] == [*((B, name) for name in NAMES), *more.steps]


@pytest.mark.parametrize("same", [{"epochs": 2}, {"lr": 0.1}, {"subset": 100}])
def test_costs_do_not_depend_on_the_length_of_a_run(measure, same):
    measure(A)
    assert measure(A, **same)[1] == []


@pytest.mark.parametrize(
    "other",
    [
        {"repeats": 3},
        {"batch_size": 8},
        {"amp": "bf16"},
        {"kd_loss": "dkd"},
        {"teacher_bn": "running"},
        "machine",
        "damaged",
        "empty",
    ],
)
def test_costs_of_other_settings_or_machines_are_measured_again(measure, tmp_path, monkeypatch, other):
    measure(A)
    if other == "machine":
        machine = {"commit": "other", "torch": "9", "device": "cpu", "threads": 1}
        monkeypatch.setattr(complexity, "machine_of", lambda device: dict(machine))
    elif other in ("damaged", "empty"):
        (tmp_path / "cost.json").write_text('{"settings"' if other == "damaged" else "[]")
    _, measured = measure(A, **(other if isinstance(other, dict) else {}))
    assert measured == [(A, NAMES)]
    assert len(json.loads((tmp_path / "cost.json").read_text())["rows"]) == 2


def test_costs_are_kept_across_commits(measure, monkeypatch):
    machine = complexity.machine_of(torch.device("cpu"))
    first, _ = measure(A)
    monkeypatch.setattr(complexity, "machine_of", lambda device: machine | {"commit": "other"})
    assert measure(A) == (first, [])


def test_table_shows_the_finished_runs(measure):
    costs, _ = measure(A, batch_size=11)
    run = {"pair": A, "seed": 1, "teacher": 70.0}
    runs = [run | {"method": "fcfd-num_paths=1", "last": last, "best": 63.0} for last in (60.0, 62.0)]
    text = num_paths.table([*runs, run | {"method": "fcfd", "last": 90.0, "best": 90.0}], costs, [A], [0, 1])
    flops = [11 * complexity.formula(A, {"method": "fcfd", "num_paths": n}) / 1e9 for n in (0, 1)]
    assert f"\n| {A} | 0 | 0 |  | 1000.0 | 11 | 100 | {flops[0]:.2f} |\n" in text
    assert f"\n| {A} | 1 | 2 | 61.00 ± 1.41 / 63.00 ± 0.00 | 1100.0 | 10 | 100 | {flops[1]:.2f} |\n" in text
    assert "90.00" not in text
    assert "the median of 2" in text
    assert "Batch 11, amp off; cpu, torch" in text


def test_steps_are_measured_with_the_settings_of_the_runs(measure):
    settings = measure(A, batch_size=7, amp="bf16", repeats=5)[0].settings
    assert (settings.batch_size, settings.amp, settings.repeats, settings.device) == (7, "bf16", 5, "cpu")
    args, given = tables.parse_args(["--pairs", A, "--devices", "cpu"], "", "some", [], tables.add_repeats)
    settings = tables.cost_settings(args, given)
    assert (settings.batch_size, settings.amp, settings.repeats) == (64, given["amp"], 11)


def test_device_is_opened_before_steps_are_measured(measure, monkeypatch):
    """As in training, which affects cuDNN's algorithms and precision."""
    opened = []
    monkeypatch.setattr(tables, "open_device", opened.append)
    monkeypatch.setattr(complexity, "measure", lambda *_: opened.append("measured"))
    measure(A)
    assert opened == ["cpu", "measured"]


def test_steps_have_the_options_of_the_runs(measure):
    row = Row({"method": "fcfd", "positions": [2], "w_func_l2": 0})
    costs, _ = measure(A, rows=[APP, row], w_func_kl=3, kd_loss="dkd", tckd=2, lr=0.1)
    given = {"kd_loss": "dkd", "tckd": 2}
    assert costs.steps[A, "app"].options == {"method": "app"} | given
    assert costs.steps[A, row.name].options == row.settings | {"w_func_kl": 3} | given


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--num-paths", "5"], "--num-paths 5"),
        (["--positions", "2"], "--positions"),
        (["--simkd"], "--simkd"),
        (["--w-func-prime", "0"], "--w-func-prime"),
        (["--w-func-partial", "1"], "--w-func-partial"),
        (["--w-func-prime-l2", "1"], "--w-func-prime-l2"),
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
