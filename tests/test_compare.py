"""ablations/compare.py and the runs it starts."""

import csv
import json

import pytest

from ablations import cells, compare
from ablations.cells import Cell, mean_and_deviation, run_cells
from common.errors import UserError

# In the place of cifar100.py: notes when it was at work and whether it was told to resume; "resnet32" fails.
FAKE = """
import json, sys, time
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = Path(given["--out"])
began = time.time()
time.sleep(0.3)
if given["--student"] == "resnet32":
    sys.exit("error: it fails")
out.mkdir(exist_ok=True)
(out / "student.pth").touch()
place = given.get("--device")
(out / "notes.json").write_text(json.dumps([began, time.time(), "--resume" in sys.argv, place]))
(out / "result.json").write_text(json.dumps({"epoch": 1, "epochs": 1, "last": {"top1": 50.0}}))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(cells, "SCRIPT", tmp_path / "fake.py")
    return lambda name, **more: Cell(tmp_path / name, {"student": "resnet8", "epochs": 1}, **more)


def notes(cell):
    return json.loads((cell.folder / "notes.json").read_text())


def at_once(runs):
    """The largest number of runs that were at work at one time."""
    spans = [notes(run)[:2] for run in runs]
    return max(sum(a <= began < b for a, b in spans) for began, _ in spans)


@pytest.mark.parametrize(("jobs", "devices"), [(1, []), (2, []), (1, ["cpu", "cuda:1"])])
def test_runs_at_once(fake, jobs, devices):
    runs = [fake(str(i)) for i in range(4)]
    run_cells(runs, jobs, devices)
    assert at_once(runs) == jobs * max(1, len(devices))
    assert {notes(run)[3] for run in runs} == set(devices or [None])


def test_a_run_starts_when_what_it_needs_is_finished(fake):
    teacher = fake("teacher")
    students = [fake("a", after=teacher), fake("b", after=teacher)]
    run_cells(students, jobs=3)
    assert all(notes(student)[0] >= notes(teacher)[1] for student in students)


def test_finished_runs_are_kept_and_broken_ones_resumed(fake):
    kept, broken, teacher = fake("kept"), fake("broken"), fake("teacher")
    run_cells([kept, broken, teacher])
    before = notes(kept)
    (broken.folder / "last.pt").touch()
    (broken.folder / "result.json").write_text(json.dumps({"epoch": 1, "epochs": 2}))
    teacher.network.unlink()  # its numbers were kept, as in a clone of the results, but not its weights
    run_cells([kept, broken, fake("student", after=teacher)])
    assert notes(kept) == before
    assert notes(broken)[2]
    assert teacher.network.exists()


def test_what_fails_takes_along_what_needs_it_and_no_more(fake, tmp_path, capsys):
    bad = Cell(tmp_path / "bad", {"student": "resnet32", "epochs": 1})
    with pytest.raises(UserError, match="2 of the runs"):
        run_cells([bad, fake("needs", after=bad), fake("good")])
    assert "bad: error: it fails" in capsys.readouterr().out
    assert fake("good").result()
    assert not (tmp_path / "needs").exists()


def test_everything_is_checked_before_anything_runs(fake, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("{student: resnet8, epochs: 1, seed: 7}")
    wrong = [
        (Cell(tmp_path / "x", {"student": "resnet9"}), "resnet8"),
        (Cell(tmp_path / "x", {"student": "resnet8", "teacher": "resnet14", "num_paths": 9}), "4 candidates"),
        (fake("other"), "--seed is 1 and was 7"),
    ]
    for cell, message in wrong:
        with pytest.raises(UserError, match=message):
            run_cells([fake("good"), cell])
    assert not (tmp_path / "good").exists()


def test_mean_and_sample_deviation():
    assert mean_and_deviation([70.0, 72.0]) == "71.00 ± 1.41"
    assert mean_and_deviation([70.0]) == "70.00"


def row(method, seed, last, best, teacher=75.0):
    return {"pair": "a-b", "method": method, "seed": seed, "last": last, "best": best, "teacher": teacher}


def test_table():
    rows = [row("alone", 1, 60.0, 61.0, ""), row("kd", 1, 70.0, 71.0), row("kd", 2, 72.0, 72.0)]
    text = compare.table(rows, {"a-b": {"kd": "73.33 *"}})
    assert "| a-b | teacher | 1 | 75.00 |  |  |\n" in text
    assert "| a-b | alone | 1 | 60.00 | 61.00 |  |\n" in text
    assert "| a-b | kd | 2 | 71.00 ± 1.41 | 71.50 ± 0.71 | 73.33 * |\n" in text


def published(tmp_path, *options):
    args, given = compare.parse_args(["--out", str(tmp_path), "--pairs", "resnet56-resnet20", "vgg13-vgg8", *options])
    return compare.published_figures(compare.grid(args, given))


def test_published_figures_stand_beside_the_same_definition_alone(tmp_path):
    figures = published(tmp_path)
    assert figures["vgg13-vgg8"] == {"teacher": "74.64 *", "alone": "70.36 *", "kd": "72.98 *", "fcfd": "75.22"}
    assert figures["resnet56-resnet20"]["fcfd"] == "71.96"
    assert set(published(tmp_path, "--num-paths", "2", "--device", "cpu", "--amp", "off", "--seeds", "5")) == set(
        figures
    )
    for options in (["--epochs", "30"], ["--dataset", "synthetic"], ["--subset", "500"], ["--lr", "0.1"]):
        assert published(tmp_path, *options) == {}, options
    assert set(published(tmp_path, "--teacher-epochs", "30")["vgg13-vgg8"]) == {"teacher", "alone"}
    assert set(published(tmp_path, "--w-app", "2")["vgg13-vgg8"]) == {"teacher", "alone", "kd"}


def test_grid(tmp_path):
    options = ["--pairs", "resnet20-resnet8", "resnet32-resnet20", "--methods", "alone", "kd", "--seeds", "3", "4"]
    options += ["--epochs", "2", "--temperature", "2", "--teacher-ckpt", "resnet32=some.pth", "--out", str(tmp_path)]
    runs = compare.grid(*compare.parse_args(options))
    assert len(runs) == 8
    kd = runs["resnet20-resnet8", "kd", 4]
    assert kd.folder == tmp_path / "resnet20-resnet8-kd-seed4"
    assert kd.after is runs["resnet32-resnet20", "alone", 3]  # that teacher is also a student here
    assert kd.given["teacher_ckpt"] == str(kd.after.folder / "student.pth")
    assert (kd.given["temperature"], kd.given["seed"], kd.given["epochs"]) == (2.0, 4, 2)
    assert "temperature" not in kd.after.given
    assert runs["resnet32-resnet20", "kd", 3].given["teacher_ckpt"] == "some.pth"
    assert runs["resnet32-resnet20", "kd", 3].after is None
    words = kd.command("cuda:1")
    assert words[words.index("--teacher-ckpt") + 1] == kd.given["teacher_ckpt"]
    assert words[words.index("--device") + 1] == "cuda:1"
    longer = compare.grid(*compare.parse_args([*options, "--teacher-epochs", "5"]))["resnet20-resnet8", "kd", 4].after
    assert (longer.folder.name, longer.given["epochs"]) == ("resnet20-alone-5ep-seed3", 5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--pairs", "resnet8"], "hyphen"),
        (["--pairs", "resnet14-resnet9"], "resnet8"),
        (["--pairs", "resnet14-vgg8", "--methods", "fcfd"], "stages"),
        (["--student", "resnet8"], "--pairs"),
        (["--seed=3"], "--seeds"),
        (["--jobs", "0"], "--jobs 0"),
        (["--seeds", "-1"], "--seed -1"),
        (["--teacher-ckpt", "resnet32x4"], "NAME=FILE"),
        (["--bogus"], "--bogus"),
        (["--epochs", "0"], "--epochs 0"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, options, expected):
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
    assert "5 runs, of which 5 are done" in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == text
    assert compare.main(["--smoke", "--out", str(tmp_path), "--temperature", "2"]) == 2
    assert "--temperature is 2.0 and was 4" in capsys.readouterr().err
