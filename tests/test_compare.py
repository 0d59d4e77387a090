"""ablations/compare.py and the runs it starts."""

import csv
import json
import os
import time

import pytest
import torch

import cifar100
from ablations import cells, compare, rows, tables
from ablations.cells import Cell, mean_and_deviation, run_cells, with_dependencies
from common.data.batches import eval_batches
from common.data.sources import load_data
from common.models import build
from common.run.errors import UserError
from common.run.folder import locked

# Stands in for cifar100.py. Waits until WIDTH processes are running and fails if there are more, so that no test
# depends on timing. "resnet32" fails; "resnet110" runs until it is killed.
FAKE = """
import json, os, sys, time
from pathlib import Path
options = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
out, status, width = Path(options["out"]), Path(__file__).parent / "status", int(os.environ.get("WIDTH", 0))
(status / f"{out.name}.started").write_text(str(os.getpid()))
end = time.time() + 30
while (busy := len([*status.glob("*.started")]) - len([*status.glob("*.finished")])) < width and time.time() < end:
    time.sleep(0.01)
while options["student"] == "resnet110" and time.time() < end:
    time.sleep(0.01)
if (width and busy != width) or options["student"] == "resnet32":
    sys.exit(f"error: it fails, {busy} running")
time.sleep(0.2)  # so that an extra process is noticed
(out / "student.pth").touch()
notes = {"argv": sys.argv[1:], "device": options.get("device"), "threads": os.environ.get("OMP_NUM_THREADS")}
notes["before"] = sorted(path.stem for path in status.glob("*.finished"))
(out / "notes.json").write_text(json.dumps(notes))
score = {"epoch": 1, "top1": 50.0}
(out / "config.yaml").write_text("{}")
(out / "result.json").write_text(json.dumps(dict(epoch=1, epochs=1, last=score, best=score, teacher=None, seconds=1)))
(status / f"{out.name}.finished").touch()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "status").mkdir()
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(cifar100, "__file__", str(tmp_path / "fake.py"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return lambda name, **more: Cell(
        tmp_path / name, {"student": "resnet8", "epochs": 1, "dataset": "synthetic"}, **more
    )


def notes(cell):
    return json.loads((cell.folder / "notes.json").read_text())


@pytest.mark.parametrize(("jobs", "devices"), [(1, []), (2, []), (1, ["cpu", "cuda:1"])])
def test_jobs_run_in_parallel_on_each_device(fake, monkeypatch, jobs, devices):
    width = jobs * max(1, len(devices))
    monkeypatch.setenv("WIDTH", str(width))
    monkeypatch.setattr(cells.os, "cpu_count", lambda: 6)
    runs = [fake(str(i)) for i in range(4)]
    run_cells(runs, jobs, devices)
    assert {notes(run)["device"] for run in runs} == set(devices or [None])
    assert {notes(run)["threads"] for run in runs} == {"3" if width == 2 else None}


def test_run_starts_after_its_teacher_has_finished(fake):
    teacher = fake("teacher")
    students = [fake("a", after=teacher), fake("b", after=teacher)]
    run_cells([*students, teacher], jobs=3)
    assert all("teacher" in notes(student)["before"] for student in students)


def test_finished_runs_are_kept_and_interrupted_ones_resumed(fake, tmp_path):
    kept, interrupted, teacher = fake("kept"), fake("interrupted"), fake("teacher")
    run_cells([kept, interrupted, teacher])
    for file in (tmp_path / "status").iterdir():
        file.unlink()
    (interrupted.folder / "last.pt").touch()
    result = json.loads((interrupted.folder / "result.json").read_text())
    (interrupted.folder / "result.json").write_text(json.dumps(result | {"epochs": 2}))
    teacher.network.unlink()  # as in a fresh clone: results, but no weights
    run_cells([kept, interrupted, teacher, fake("student", after=teacher)])
    assert not (tmp_path / "status" / "kept.started").exists()
    assert "--resume" in notes(interrupted)["argv"]
    assert "--resume" not in notes(teacher)["argv"]
    assert teacher.network.exists()
    teacher.network.unlink()
    run_cells([kept, teacher])
    assert not teacher.network.exists()
    run_cells([kept, teacher], networks_of=[teacher])
    assert teacher.network.exists()


def test_failed_run_skips_only_its_dependents(fake, tmp_path, capsys):
    bad = Cell(tmp_path / "bad", {"student": "resnet32", "epochs": 1})
    with pytest.raises(UserError, match="2 of the runs"):
        run_cells([bad, fake("student", after=bad), fake("good")])
    assert "bad: error: it fails" in capsys.readouterr().out
    assert fake("good").result()
    assert not (tmp_path / "student").exists()


def test_old_result_does_not_hide_a_failure(fake, tmp_path):
    teacher = fake("teacher")
    run_cells([teacher])
    teacher.network.unlink()
    teacher.given["student"] = "resnet32"
    with pytest.raises(UserError, match="2 of the runs"):
        run_cells([teacher, fake("student", after=teacher)])


def test_interrupt_terminates_the_runs(fake, tmp_path, monkeypatch):
    started = tmp_path / "status" / "endless.started"

    def interrupted_sleep(seconds):
        sleep(seconds)
        if started.exists():
            raise KeyboardInterrupt

    sleep = time.sleep
    monkeypatch.setattr(cells.time, "sleep", interrupted_sleep)
    with pytest.raises(KeyboardInterrupt):
        run_cells([Cell(tmp_path / "endless", {"student": "resnet110"})])
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert not started.with_suffix(".finished").exists()  # it was killed


def test_table_shows_the_finished_runs(fake, tmp_path, capsys):
    options = [
        "--pairs",
        "resnet32-resnet8",
        "--methods",
        "alone",
        "kd",
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert compare.main([*options, "--dataset", "synthetic", "--test-subset", "40"]) == 2
    assert (
        "| resnet32-resnet8 | alone, FCFD's settings | 1 | 50.00 | 50.00 |  |"
        in (tmp_path / "out" / "table.md").read_text()
    )
    assert "2 of the runs failed" in capsys.readouterr().err


def test_everything_is_checked_before_anything_runs(fake, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("{student: resnet8, epochs: 1, seed: 7}")
    wrong = [
        (Cell(tmp_path / "x", {"student": "resnet9"}), "resnet8"),
        (Cell(tmp_path / "x", {"student": "resnet8", "teacher": "resnet14", "num_paths": 9}), "4 candidates"),
        (fake("other"), "--seed is 1 but was 7"),
    ]
    for cell, message in wrong:
        with pytest.raises(UserError, match=message):
            with_dependencies([fake("good"), cell])


def test_runs_on_other_images_are_rejected(fake, tmp_path):
    fingerprint = load_data("synthetic", "data").fingerprint
    (tmp_path / "there").mkdir()
    config = {"student": "resnet8", "epochs": 1, "dataset": "synthetic", "data_dir": "elsewhere"}
    (tmp_path / "there" / "config.yaml").write_text(json.dumps(config | {"fingerprint": fingerprint}))
    assert len(with_dependencies([fake("there")])) == 1
    (tmp_path / "there" / "config.yaml").write_text(json.dumps(config | {"fingerprint": "other"}))
    with pytest.raises(UserError, match="used different images"):
        with_dependencies([fake("there")])


def test_students_of_another_teacher_are_rejected(fake, tmp_path):
    cell = fake("student", after=fake("teacher-seed1"))
    cell.given |= {"teacher": "resnet14", "teacher_ckpt": str(cell.after.network)}
    cell.folder.mkdir()
    for folder, ok in (("/elsewhere/teacher-seed1", True), ("/elsewhere/teacher-seed2", False)):
        config = cell.given | {"teacher_ckpt": f"{folder}/student.pth"}
        (cell.folder / "config.yaml").write_text(json.dumps(config))
        if ok:
            cell.settings()
        else:
            with pytest.raises(UserError, match="keep the first of --seeds"):
                cell.settings()


def test_mean_and_standard_deviation():
    assert mean_and_deviation([70.0, 72.0]) == "71.00 ± 1.41"
    assert mean_and_deviation([70.0]) == "70.00"


def row(method, seed, last, best, teacher=75.0):
    columns = {"pair": "a-b", "method": method, "seed": seed, "last": last, "best": best, "teacher": teacher}
    return columns | {"teacher_last": "", "teacher_best": ""}


def test_table():
    rows = [row("alone", 1, 60.0, 61.0, ""), row("kd", 1, 70.0, 71.0), row("kd", 2, 72.0, 72.0)]
    text = compare.table(rows, {"a-b": {"kd": "73.33 (last)"}})
    assert "| a-b | teacher | 1 | 75.00 |  |  |\n" in text
    assert "| a-b | alone, FCFD's settings | 1 | 60.00 | 61.00 |  |\n" in text
    assert "| a-b | L_task + L_kd of FCFD | 2 | 71.00 ± 1.41 | 71.50 ± 0.71 | 73.33 (last) |\n" in text
    assert "| n | top-1, last | top-1, best | published |\n" in text


def grid(*options, methods=("alone", "kd", "app", "fcfd")):
    args, given = tables.parse_args(
        [str(word) for word in options], "", "compare", list(compare.PUBLISHED["cifar100"]["pairs"])
    )
    return rows.grid(args, given, [compare.METHODS[method] for method in methods])


def test_teachers_of_a_folder(tmp_path):
    named = tmp_path / "mine.pth"
    for file in (named, *(tmp_path / f"{name}_vanilla" / "ckpt_epoch_240.pth" for name in ("resnet32", "resnet56"))):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    pairs = ["--pairs", "resnet32-resnet8", "resnet56-resnet8"]
    options = [*pairs, "--teachers", tmp_path, "--teacher-ckpt", f"resnet56={named}", "--out", tmp_path / "out"]
    runs = grid(*options, methods=["kd"])
    assert [cell.after for cell in runs.values()] == [None, None]
    folder = tmp_path / "resnet32_vanilla"
    assert [cell.given["teacher_ckpt"] for cell in runs.values()] == [f"{folder}/ckpt_epoch_240.pth", str(named)]


def test_relative_paths_of_teachers_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher.pth").touch()
    (cell,) = grid("--pairs", "resnet32-resnet8", "--teacher-ckpt", "resnet32=teacher.pth", methods=["kd"]).values()
    assert cell.given["teacher_ckpt"] == str(tmp_path / "teacher.pth")


def test_given_teachers_are_tested_before_use(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "run_cells", lambda *args: print("run_cells"))
    torch.manual_seed(0)
    net, data = build("resnet56", 20).eval(), load_data("synthetic", "data", None, 40)
    file = tmp_path / "resnet56_vanilla" / "ckpt_epoch_240.pth"
    file.parent.mkdir()
    torch.save({"model": net.state_dict()}, file)
    with torch.no_grad():
        correct = [net(images).argmax(1) == labels for images, labels in eval_batches(data.test, 1)]
    options = ["--pairs", "resnet56-resnet20", "--dataset", "synthetic", "--test-subset", "40", "--methods", "kd"]
    options += ["--devices", "cpu", "--teachers", str(tmp_path), "--out", str(tmp_path / "out")]
    assert compare.main(options) == 0
    top1 = 100 * torch.cat(correct).float().mean()
    line = f"teacher resnet56: {top1:.2f} % top-1 (published on CIFAR-100: 72.34), {file}\nrun_cells\n"
    assert line in capsys.readouterr().out
    file.write_bytes(file.read_bytes()[:1000])
    assert compare.main([*options[:-1], str(tmp_path / "other")]) == 2
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "other").exists()


def published(tmp_path, *options):
    return compare.published_figures(grid("--out", tmp_path, "--pairs", "resnet56-resnet20", "vgg13-vgg8", *options))


def test_published_figures_are_shown_only_for_published_settings(tmp_path):
    figures = published(tmp_path)
    # Not beside alone, kd and app, which have FCFD's settings.
    assert figures["vgg13-vgg8"] == {"teacher": "74.64 (last) *", "fcfd": "75.22 (best)"}
    assert figures["resnet56-resnet20"]["fcfd"] == "71.96 (best)"
    assert published(tmp_path, "--num-paths", "2", "--devices", "cpu", "--amp", "off", "--seeds", "5") == figures
    for options in (["--epochs", "30"], ["--dataset", "synthetic"], ["--subset", "500"], ["--lr", "0.1"]):
        assert published(tmp_path, *options) == {}, options
    assert published(tmp_path, "--teacher-epochs", "30") == published(tmp_path, "--w-app", "2") == {}
    (tmp_path / "teacher.pth").touch()
    assert "teacher" in figures["vgg13-vgg8"]
    given = published(tmp_path, "--teacher-ckpt", f"vgg13={tmp_path / 'teacher.pth'}")
    assert given["vgg13-vgg8"] == {"teacher": "74.64 (last)", "fcfd": "75.22 (best)"}


def test_published_figures_of_the_baselines(tmp_path):
    methods = [row.name for row in compare.TABLES["1"]] + ["baseline-simkd", "online-kd"]
    pairs = ["vgg13-vgg8", "resnet56-resnet20"]
    cells = grid("--out", tmp_path, "--pairs", *pairs, "--amp", "off", methods=methods)
    figures = compare.published_figures(cells)
    known = {"teacher": "72.34 (last) *", "baseline-alone": "69.06 (last)", "baseline-kd": "70.66 (last)"}
    known |= {"baseline-fitnet": "69.21 (last)", "baseline-vid": "70.38 (last)", "baseline-crd": "71.16 (last)"}
    known |= {"baseline-dkd": "71.97 (best)", "baseline-reviewkd": "71.89 (?)", "fcfd": "71.96 (best)"}
    assert figures["resnet56-resnet20"] == known | {"baseline-simkd": "setting not published"}
    assert figures["vgg13-vgg8"]["baseline-reviewkd"] == "setting not published"
    cells = grid("--out", tmp_path, "--pairs", "resnet32x4-resnet8x4", methods=["baseline-simkd", "fcfd-simkd"])
    figures = compare.published_figures(cells)["resnet32x4-resnet8x4"]
    assert (figures["baseline-simkd"], figures["fcfd-simkd"]) == ("78.08 (best)", "FCFD + 2.2 (best)")
    cells = grid(
        "--out", tmp_path, "--pairs", "vgg13-vgg8", "--temperature", "3", methods=["baseline-kd", "baseline-vid"]
    )
    assert compare.published_figures(cells)["vgg13-vgg8"] == {
        "teacher": "74.64 (last) *",
        "baseline-vid": "71.23 (last)",
    }


def test_grid(tmp_path):
    checkpoint = tmp_path / "teacher.pth"
    checkpoint.touch()
    options = ["--pairs", "resnet20-resnet8", "resnet32-resnet20", "--seeds", "3", "4"]
    options += ["--epochs", "2", "--temperature", "2", "--teacher-ckpt", f"resnet32={checkpoint}", "--out", tmp_path]
    runs = grid(*options, methods=["alone", "kd"])
    assert len(runs) == 8
    kd = runs["resnet20-resnet8", "kd", 4]
    assert kd.folder == tmp_path / "resnet20-resnet8-kd-seed4"
    assert kd.after is runs["resnet32-resnet20", "alone", 3]  # that teacher is also a student here
    assert kd.given["teacher_ckpt"] == str(kd.after.folder / "student.pth")
    assert (kd.given["temperature"], kd.given["seed"], kd.given["epochs"]) == (2.0, 4, 2)
    assert "temperature" not in kd.after.given
    assert runs["resnet32-resnet20", "kd", 3].given["teacher_ckpt"] == str(checkpoint)
    assert runs["resnet32-resnet20", "kd", 3].after is None
    assert {f"--teacher-ckpt={kd.given['teacher_ckpt']}", "--device=cuda:1", "--seed=4"} <= set(kd.command("cuda:1"))
    longer = grid(*options, "--teacher-epochs", "5")["resnet20-resnet8", "kd", 4].after
    assert (longer.folder.name, longer.given["epochs"]) == ("resnet20-alone-5ep-seed3", 5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--pairs", "resnet8"], "hyphen"),
        (["--pairs", "resnet14-resnet9"], "resnet8"),
        (["--pairs", "resnet14-vgg8", "--methods", "fcfd"], "stages"),
        (["--student", "resnet8"], "--pairs"),
        (["--seed=3"], "--seeds"),
        (["--jobs", "0"], "--jobs: 0 must"),
        (["--pairs", "resnet8-"], "hyphen"),
        (["--devices", "cuda:99"], "cuda:99"),
        (["--device", "cpu"], "--devices"),
        (["--teacher-epochs", "0"], "--teacher-epochs: 0 must"),
        (["--teacher-ckpt", "resnet32x4=missing.pth"], "no such file"),
        (["--teacher-ckpt", "resnet110=missing.pth"], "teacher of none"),
        (["--dataset", "synthetic", "--subset", "5"], "--subset 5"),
        (["--seeds", "-1"], "--seeds: -1 must"),
        (["--teacher-ckpt", "resnet32x4"], "NAME=FILE"),
        (["--bogus"], "--bogus"),
        (["--epochs", "0"], "--epochs: 0 must"),
        (["--table", "2"], "data/imagenet/val is not an image folder"),
        (["--table", "3"], "there is no data/coco/annotations"),
        (["--table", "7"], "there is no data/coco/annotations"),
        (["--table", "3", "--epochs", "3"], "--epochs"),
        (["--table", "7", "--inherit"], "--inherit is set by the rows"),
        (["--table", "7", "--pairs", "resnet101-resnet18"], "networks with matching FPNs"),
        (["--table", "2", "--teachers", "there"], "--teachers holds networks for CIFAR-100"),
        (["--teachers", "there"], "there/wrn_40_2_vanilla/ckpt_epoch_240.pth"),
        (["--methods", "baseline-at"], "on CIFAR-100 are alone, kd, app"),
        (["--table", "3", "--inherit"], "--inherit is set by the rows"),
        (["--table", "9", "--teacher-epochs", "3"], "no teacher has to be trained"),
        (["--methods", "alone", "--teacher-epochs", "3"], "no teacher has to be trained"),
        (["--table", "9", "--teacher-ckpt", f"resnet56={__file__}"], "no row needs a trained teacher"),
        (["--smoke", "--pairs", "resnet14-resnet8"], "omit --pairs"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, monkeypatch, capsys, options, expected):
    monkeypatch.chdir(tmp_path)
    assert compare.main([*options, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert expected in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_smoke(tmp_path, capsys):
    assert compare.main(["--smoke", "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "cells.csv").open()))
    assert [row["method"] for row in rows] == ["alone", "kd", "app", "fcfd"]
    students = [f"resnet14-resnet8-{method}-seed1" for method in ("app", "fcfd", "kd")]
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["resnet14-alone-seed1", *students, "resnet8-alone-seed1"]
    for row in rows[1:]:
        result = json.loads((tmp_path / f"resnet14-resnet8-{row['method']}-seed1" / "result.json").read_text())
        assert float(row["last"]) == result["last"]["top1"]
        assert float(row["best"]) == result["best"]["top1"]
        assert float(row["teacher"]) == result["teacher"]["top1"]
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("| resnet14-resnet8 |") == 5
    assert compare.main(["--smoke", "--out", str(tmp_path)]) == 0
    assert "5 runs, 5 already finished" in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == text
    assert compare.main(["--smoke", "--out", str(tmp_path), "--temperature", "2"]) == 2
    assert "--temperature is 2.0 but was 4" in capsys.readouterr().err
    assert (tmp_path / "table.md").read_text() == text
    with locked(tmp_path):
        assert compare.main(["--smoke", "--out", str(tmp_path)]) == 2
    assert "another process" in capsys.readouterr().err
    tmp_path.rename(tmp_path.with_name("moved"))
    assert compare.main(["--smoke", "--out", str(tmp_path.with_name("moved"))]) == 0
