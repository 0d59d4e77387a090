"""ablations/tables.py and rows.py, and the tables that they define completely: Tab. 5, 10, 13, and 14."""

import csv
import json
import random
from argparse import Namespace
from importlib.util import find_spec

import pytest
import torch

import cifar100
import imagenet
import online_kd
from ablations import (
    anisotropy,
    baseline_cifar100,
    compare,
    complexity,
    components,
    exit_branches,
    loss_terms,
    num_paths,
    partial,
    positions,
    tables,
)
from ablations.rows import ALONE, PAIRS_L2, Row, grid, options_of
from common.run.device import default_amp, default_device
from common.run.errors import UserError

SCRIPTS = (components, loss_terms, partial, positions)
PAIR = ("resnet32x4", "resnet8x4")


def settings(tmp_path, script, pair="resnet32x4-resnet8x4", *options):
    """Each row's leading cells and the settings of its run."""
    argv = ["--pairs", pair, "--out", str(tmp_path), "--epochs", "3", "--dataset", "synthetic", *options]
    args, given = tables.parse_args(argv, "", "some", [])
    runs = grid(args, given, [row for _, row in script.ROWS])
    return [(start, runs[pair, row.name, 1].settings()) for start, row in script.ROWS]


def weights(c):
    return {key.removeprefix("w_"): value for key, value in c.items() if key.startswith("w_") and value}


BASE = {"task": 1, "kd": 1}
APP, FUNC, PRIME = {"app": 5}, {"func_l2": 5, "func_kl": 1}, {"func_prime": 1}


def test_component_rows_have_the_named_weights(tmp_path):
    rows = settings(tmp_path, components)
    for marks, c in rows:
        parts = [part for mark, part in zip(marks, (APP, FUNC, PRIME), strict=True) if mark]
        assert weights(c) == BASE | {key: value for part in parts for key, value in part.items()}, marks
    assert [sum(map(bool, marks)) for marks, _ in rows] == [0, 1, 2, 2, 2, 3]


def test_loss_term_rows_have_the_named_weights(tmp_path):
    each = ({"func_kl": 1}, {"func_l2": 5}, {"func_prime": 1}, {"func_prime_l2": 5})
    rows = settings(tmp_path, loss_terms)
    assert len({marks for marks, _ in rows}) == len(rows)
    for marks, c in rows:
        parts = [part for mark, part in zip(marks, each, strict=True) if mark]
        assert weights(c) == BASE | APP | {key: value for part in parts for key, value in part.items()}, marks


def test_partial_rows_have_the_named_weights(tmp_path):
    parts = {"L_func-partial": {"func_partial": 5}, "L_func": FUNC, "L_func'": PRIME, "nothing": {}}
    for (title,), c in settings(tmp_path, partial):
        expected = [parts[name] for name in title.split(" and ")]
        assert weights(c) == BASE | APP | {key: value for part in expected for key, value in part.items()}, title


def test_position_rows_sample_two_paths_at_the_named_positions(tmp_path):
    by_title = {title: c for (title,), c in settings(tmp_path, positions)}
    assert [c["positions"] for c in by_title.values()] == [[2, 3], [2], [3], [4], [4], [2, 3]]
    assert [c["num_paths"] for c in by_title.values()] == [0, 2, 2, 2, 1, 2]
    assert weights(by_title["F^4, L_func alone (as SRRL)"]) == BASE | APP | FUNC
    assert all(weights(by_title[title]) == BASE | APP | FUNC | PRIME for title in ("F^2", "F^3", "F^4"))


def test_weight_applies_only_to_rows_whose_paths_feed_the_term(tmp_path):
    by_title = {title: c for (title,), c in settings(tmp_path, positions, "resnet32x4-resnet8x4", "--w-func-l2", "3")}
    assert (by_title["F^2"]["w_func_l2"], by_title["F^4"]["w_func_l2"]) == (3, 5)


def test_variants_use_the_pairs_l2_weight(tmp_path):
    *_, (_, c) = settings(tmp_path, loss_terms, "resnet56-resnet20")
    assert (c["w_func_l2"], c["w_func_prime_l2"]) == (0.02, 0.02)
    *_, (_, c) = settings(tmp_path, loss_terms, "resnet56-resnet20", "--w-app", "3")
    assert (c["w_app"], c["w_func_l2"], c["w_func_prime_l2"]) == (3, 0.02, 0.02)
    *_, (_, c) = settings(tmp_path, loss_terms, "resnet56-resnet20", "--w-func-l2", "3")
    assert (c["w_app"], c["w_func_l2"], c["w_func_prime_l2"]) == (0.02, 3, 3)
    *_, (_, c) = settings(tmp_path, loss_terms, "resnet56-resnet20", "--w-func-prime-l2", "3")
    assert (c["w_func_l2"], c["w_func_prime_l2"]) == (0.02, 3)


def test_names_are_equal_exactly_when_settings_are(tmp_path):
    by_name = {}
    for script in SCRIPTS:
        for (_, row), (_, c) in zip(script.ROWS, settings(tmp_path, script), strict=True):
            c = {key: value for key, value in c.items() if key not in ("out", "teacher_ckpt", "method")}
            assert by_name.setdefault(row.name, c) == c, row.name
    distinct = {json.dumps(c, sort_keys=True) for c in by_name.values()}
    assert len(distinct) == len(by_name)
    assert len(by_name) < sum(len(script.ROWS) for script in SCRIPTS)
    assert {row.name for _, row in components.ROWS} & {row.name for _, row in loss_terms.ROWS} > {"app", "fcfd"}


def test_row_names():
    rows = [ALONE, Row({"method": "kd", "kd_loss": "dkd"}), Row({"method": "dml"}, online_kd)]
    rows += [Row({"w_func_kl": 0, "method": "fcfd", "positions": [2, 4]}), Row({"method": "fcfd", "simkd": True})]
    rows.append(Row({"method": "app", "w_func_partial": PAIRS_L2}))
    names = ["alone", "kd-dkd", "online-dml", "fcfd-positions=2+4-w_func_kl=0", "fcfd-simkd", "app-func_partial"]
    assert [row.name for row in rows] == names


def test_each_row_takes_the_options_that_affect_it():
    given = {
        "epochs": 3,
        "w_app": 2,
        "w_func_l2": 8,
        "w_func_kl": 3,
        "num_paths": 1,
        "tckd": 4,
        "lr": 5,
        "temperature": 6,
        "amp": "off",
    }

    def applied(method, script=cifar100, **more):
        options = options_of(Row({"method": method, **more}, script), given, *PAIR)
        return {
            key: options.get(key)
            for key in ("w_app", "w_func_kl", "num_paths", "tckd", "lr", "temperature")
            if key in options
        }

    assert applied("kd") == {"lr": 5, "temperature": 6}
    assert applied("app") == {"w_app": 2, "lr": 5, "temperature": 6}
    assert applied("app", w_func_partial=PAIRS_L2) == {"w_app": 2, "num_paths": 1, "lr": 5, "temperature": 6}
    assert options_of(Row({"method": "app", "w_func_partial": PAIRS_L2}), given, *PAIR)["w_func_partial"] == 8
    all_options = {"w_app": 2, "w_func_kl": 3, "num_paths": 1, "lr": 5, "temperature": 6}
    assert applied("fcfd") == all_options
    assert applied("fcfd", kd_loss="dkd") == all_options | {"tckd": 4}
    assert applied("fcfd", w_app=0, num_paths=4) == all_options | {"w_app": 0, "num_paths": 4}
    assert applied("fcfd", online_kd) == all_options
    assert applied("dml", online_kd) == {"lr": 5, "temperature": 6}
    assert applied("crd", baseline_cifar100) == {"lr": 5}
    assert applied("dkd", baseline_cifar100) == {"lr": 5, "temperature": 6, "tckd": 4}
    alone = options_of(ALONE, given, None, "resnet8x4")
    assert alone == {"student": "resnet8x4", "epochs": 3, "lr": 5, "amp": "off"}


def test_folders_are_named_after_the_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def folders(*options):
        args, _ = tables.parse_args(list(options), "", "some", ["resnet14-resnet8"])
        return str(args.out), str(args.runs)

    assert folders("--amp", "fp16") == ("results/some/cifar100-240ep-fp16", "results/runs/cifar100-240ep-fp16")
    name = "tiny-subset50-3ep-bf16-lr=0.1-positions=2+3"
    options = ["--dataset", "folder", "--data-dir", "x/tiny", "--epochs", "3", "--lr", "0.1", "--positions", "2", "3"]
    assert folders(*options, "--subset", "50", "--amp", "bf16") == (f"results/some/{name}", f"results/runs/{name}")
    assert folders("--out", "here") == ("here", "here")
    assert folders("--out", "here", "--runs", "there") == ("here", "there")
    assert folders("--seeds", "4", "--jobs", "2") == folders()
    precision, _ = default_amp(default_device())
    assert folders() == folders("--amp", precision)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert folders("--devices", "cuda:1", "cpu") == folders("--amp", "fp16")  # one precision for all runs


def result_row(pair, method, seed, last, teacher="", **more):
    return {"pair": pair, "method": method, "seed": seed, "last": last, "best": last + 1, "teacher": teacher, **more}


def test_layout():
    rows = [(("", "✓"), Row({"method": "kd"})), (("✓", ""), Row({"method": "fcfd"}))]
    numbers = [
        result_row("a-b", "kd", 1, 70.0, 80.0),
        result_row("a-b", "kd", 2, 72.0, 80.0),
        result_row("c-d", "fcfd", 1, 50.0),
    ]
    args = Namespace(pairs=["a-b", "c-d"], seeds=[1, 2, 2])
    text = tables.layout(["one", "two"], rows, args, numbers)
    assert text.splitlines()[:4] == [
        "| one | two | a-b (teacher 80.00) | c-d |",
        "| --- | --- | --- | --- |",
        "|  | ✓ | 71.00 ± 1.41 / 72.00 ± 1.41 |  |",
        "| ✓ |  |  | 50.00 / 51.00 (n = 1) |",
    ]
    assert "Top-1 on the test set in percent, last / best epoch" in text
    assert "n = 2, as far as runs are finished." in text
    complete = [result_row(pair, row.name, seed, 1.0) for pair in args.pairs for _, row in rows for seed in (1, 2)]
    assert "n = 2." in tables.layout(["one", "two"], rows, args, complete)


def test_layout_with_several_metrics():
    rows = [(("FCFD",), Row({"method": "fcfd"}, imagenet))]
    found = [result_row("a-b", "fcfd", 1, 70.0, 73.0, teacher_top5=91.0, last_top5=89.0, best_top5=89.5)]
    text = tables.layout(["row"], rows, Namespace(pairs=["a-b"], seeds=[1]), found)
    assert text.splitlines()[:3] == [
        "| row | a-b (teacher 73.00), top-1 | a-b, top-5 |",
        "| --- | --- | --- |",
        "| FCFD | 70.00 / 71.00 | 89.00 / 89.50 |",
    ]
    assert "Top-1, top-5 on the test set" in text


def test_layout_with_costs():
    rows = [(("a",), Row({"method": "kd"})), (("b",), Row({"method": "fcfd"}))]
    cells = [(pair, name) for pair in ("a-b", "c-d") for name in ("kd", "fcfd")]
    steps = {key: complexity.Row(*key, {}, seconds=i / 8, megabytes=10 * i) for i, key in enumerate(cells, 1)}
    costs = tables.Costs(steps, Namespace(batch_size=5, amp="off", repeats=3, device="cpu"))
    args = Namespace(pairs=["a-b", "c-d"], seeds=[1])
    text = tables.layout(["row"], rows, args, [result_row("c-d", "kd", 1, 70.0)], costs)
    assert text.splitlines()[:4] == [
        "| row | a-b | ms | peak memory (MiB) | c-d | ms | peak memory (MiB) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| a |  | 125.0 | 10 | 70.00 / 71.00 | 375.0 | 30 |",
        "| b |  | 250.0 | 20 |  | 500.0 | 40 |",
    ]
    assert "the median of 3" in text
    assert "Batch 5, amp off; cpu, torch" in text
    steps["a-b", "kd"].megabytes = 0  # unknown
    assert costs.cells("a-b", "kd") == ["125.0", ""]


def test_online_runs_show_their_teacher():
    row = result_row("a-b", "online-dml", 1, 60.0) | {"best": 61.0, "teacher_last": 70.0, "teacher_best": 71.0}
    text = compare.table([row], {})
    assert (
        "| a-b | online-dml | 1 | 60.00 | 61.00 |  |\n| a-b | online-dml: its teacher | 1 | 70.00 | 71.00 |  |" in text
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder results/ of a working directory in which scripts ran with only --smoke, in random order.

    They share runs, so that nothing is trained twice. Not among them: scripts that train nothing.
    """
    scripts = [*SCRIPTS, compare, exit_branches, num_paths]
    scripts += [anisotropy] if find_spec("matplotlib") else []
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        order = random.sample(scripts, len(scripts))
        for script in order:
            assert script.main(["--smoke"]) == 0, order
    return folder / "results"


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke(smoke, capsys, monkeypatch, script):
    out, shown = smoke / script.__name__.split(".")[1] / "smoke", [script.ROWS[0], *script.ROWS[-4:]]
    with (out / "cells.csv").open() as file:
        cells = {cell["method"]: cell for cell in csv.DictReader(file)}
    assert list(cells) == [row.name for _, row in shown]
    lines = (out / "table.md").read_text().splitlines()[2:7]
    costs = [[] for _ in shown]
    if script in (positions, partial):
        steps = json.loads((out / "cost.json").read_text())["rows"]
        l2 = cifar100.SETTINGS["other"]["w_l2"]
        for (_, row), step in zip(shown, steps, strict=True):
            options = {key: l2 if value == PAIRS_L2 else value for key, value in row.settings.items()}
            assert (step["pair"], step["name"], step["options"]) == ("resnet14-resnet8", row.name, options)
        costs = [[f"{1000 * step['seconds']:.1f}", f"{step['megabytes']:.0f}"] for step in steps]
    for (start, row), line, cost in zip(shown, lines, costs, strict=True):
        run = smoke / "runs" / "smoke" / f"resnet14-resnet8-{row.name}-seed1"
        result = json.loads((run / "result.json").read_text())
        top1 = f"{result['last']['top1']:.2f} / {result['best']['top1']:.2f}"
        assert line == "| " + " | ".join([*start, top1, *cost]) + " |"
        assert float(cells[row.name]["best"]) == result["best"]["top1"]
    before = (out / "table.md").read_text()
    monkeypatch.chdir(smoke.parent)
    assert script.main(["--smoke"]) == 0
    text = capsys.readouterr().out
    assert "6 runs, 6 already finished" in text
    assert "measuring" not in text
    assert (out / "table.md").read_text() == before


def test_compare_also_runs_other_scripts(tmp_path, capsys):
    options = ["--smoke", "--out", str(tmp_path), "--methods"]
    assert compare.main([*options, "online-dml", "baseline-crd", "baseline-alone"]) == 0
    for run, title in (("resnet14-resnet8-baseline-crd", "CRD"), ("resnet8-baseline-alone", "alone")):
        last = json.loads((tmp_path / f"{run}-seed1" / "result.json").read_text())["last"]
        assert f"| resnet14-resnet8 | {title} | 1 | {last['top1']:.2f} |" in (tmp_path / "table.md").read_text()
    folder = tmp_path / "resnet14-resnet8-online-dml-seed1"
    result = json.loads((folder / "result.json").read_text())
    text = (tmp_path / "table.md").read_text()
    assert f"| resnet14-resnet8 | online-dml | 1 | {result['last']['top1']:.2f} |" in text
    assert f"| online-dml: its teacher | 1 | {result['teacher_last']['top1']:.2f} |" in text
    assert compare.main([*options, "online-dml", "baseline-crd", "baseline-alone"]) == 0
    assert "4 runs, 4 already finished" in capsys.readouterr().out
    assert compare.main([*options, "online-dml", "--lr", "0.3"]) == 2
    assert "--lr is 0.3 but was 0.05" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--pairs", "resnet14-resnet9"], "resnet8"),
        (["--pairs", "resnet14-vgg8"], "stages"),
        (["--method", "kd"], "--pairs"),
        (["--runs", ""], "--runs is empty"),
        (["--pairs", "resnet14-resnet8", "--tckd", "2"], "--tckd does not affect any row"),
        (["--pairs", "resnet14-resnet8", "--dataset", "synthetic", "--subset", "40"], "there are only 40"),
        (["--dataset", "folder", "--data-dir", "missing"], "missing"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, options, expected):
    assert components.main([*options, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert expected in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        (positions, ["--positions", "2"], "--positions is set by the rows"),
        (positions, ["--pairs", "vgg13-vgg8"], "networks of 5 stages"),
        (partial, ["--repeats", "0"], "--repeats: 0 must be"),
        (components, ["--w-app", "0"], "--w-app 0: the rows choose"),
        (components, ["--w-func-partial", "3"], "--w-func-partial does not affect any row"),
        (compare, ["--kd-loss", "dkd"], "--kd-loss is set by the rows"),
    ],
)
def test_options_that_contradict_row_names_are_rejected(tmp_path, capsys, script, options, expected):
    assert script.main([*options, "--epochs", "1", "--dataset", "synthetic", "--out", str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_students_of_different_teachers_are_rejected(tmp_path):
    argv = ["--pairs", "resnet14-resnet8", "--epochs", "1", "--dataset", "synthetic", "--out", str(tmp_path)]
    cells = grid(*tables.parse_args(argv, "", "some", []), [row for _, row in partial.ROWS[:2]])
    score = {"epoch": 1, "top1": 50.0}
    for cell, top1 in zip(cells.values(), (60.0, 60.1), strict=True):
        cell.folder.mkdir(parents=True)
        (cell.folder / "config.yaml").write_text("{}")
        result = {"epoch": 1, "epochs": 1, "last": score, "best": score, "teacher": {"top1": top1}, "seconds": 1}
        (cell.folder / "result.json").write_text(json.dumps(result))
    assert [row["teacher"] for row in tables.numbers(cells)] == [60.0, 60.1]  # another device may round differently
    (cell.folder / "result.json").write_text(json.dumps(result | {"teacher": {"top1": 61.0}}))
    with pytest.raises(UserError, match=r"different teachers, of 60\.00 and 61\.00"):
        tables.numbers(cells)


@pytest.mark.parametrize("damaged_file", ["config.yaml", "result.json"])
def test_run_with_damaged_files_is_not_finished(tmp_path, damaged_file):
    argv = ["--pairs", "resnet14-resnet8", "--epochs", "1", "--dataset", "synthetic", "--out", str(tmp_path)]
    (cell, *_) = grid(*tables.parse_args(argv, "", "some", []), [Row({"method": "kd"})]).values()
    cell.folder.mkdir(parents=True)
    score = {"epoch": 1, "top1": 50.0}
    intact = {"epoch": 1, "epochs": 1, "last": score, "best": score, "teacher": None, "seconds": 1}
    (cell.folder / "config.yaml").write_text("{}")
    (cell.folder / "result.json").write_text(json.dumps(intact))
    assert cell.result() == intact
    if damaged_file == "result.json":
        for damaged in ({"last": {}}, {"best": []}, {"teacher": 5}, {"last": {"top1": "x"}}):
            (cell.folder / "result.json").write_text(json.dumps(intact | damaged))
            assert cell.result() is None
    else:
        (cell.folder / "config.yaml").write_text("truncated: [")
        assert cell.result() is None
        with pytest.raises(UserError, match=r"config\.yaml is missing or damaged"):
            cell.settings()
        (cell.folder / "last.pt").touch()  # config.yaml is rewritten from it
        cell.settings()
