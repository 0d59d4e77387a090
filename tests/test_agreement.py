"""ablations/agreement.py."""

import json
from dataclasses import replace

import pytest
import torch
from running import PAIR, call

from ablations import agreement


def test_measure_matches_its_definition():
    teacher = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 1])
    p, q = (logits.double().div(4).softmax(1) for logits in (teacher, student))
    measured = agreement.measure(student, teacher, labels)
    assert (measured["accuracy"], measured["agreement"]) == (75, 50)
    assert measured["kl"] == pytest.approx(16 * (p * (p / q).log()).sum().item() / 4, rel=1e-4)


def test_teacher_agrees_with_itself_and_accuracies_match_the_results(tmp_path, capsys, teacher):
    for seed in (1, 2):
        options = ["--epochs", 1, "--teacher-ckpt", teacher / "student.pth", "--seed", seed]
        call(capsys, *PAIR, *options, "--out", tmp_path / f"kd-seed{seed}")
    out, students = tmp_path / "table.md", [tmp_path / f"kd-seed{seed}" for seed in (1, 2)]
    runs = [str(run) for run in (teacher, *students)]
    assert agreement.main(["--teacher", *runs[:1], *runs, "--out", str(out)]) == 0
    rows = [line.strip("| \n").split(" | ") for line in out.read_text().splitlines()[2:]]
    assert [row[:2] for row in rows] == [[f"{teacher.parent.name}/alone", "1"], [f"{tmp_path.name}/kd", "2"]]
    assert rows[0][3:] == ["100.00", "0.000"]
    accuracies = [json.loads((run / "result.json").read_text())["last"]["top1"] for run in (teacher, *students)]
    assert rows[0][2] == f"{accuracies[0]:.2f}"
    assert rows[1][2].startswith(f"{sum(accuracies[1:]) / 2:.2f} ± ")

    # A checkpoint of the same teacher gives the same rows.
    assert agreement.main(["--teacher", str(teacher / "student.pth"), *runs, "--out", str(tmp_path / "again.md")]) == 0
    assert (tmp_path / "again.md").read_text() == out.read_text()


@pytest.mark.parametrize(
    "options", [["missing"], ["other"], ["online"], [], ["--teacher", "student.pth"], ["--teacher", "gone"]]
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, monkeypatch, teacher, options):
    """The last two: a checkpoint with a run that names no teacher, and no such file."""
    monkeypatch.chdir(tmp_path)
    if "--teacher" in options:
        (tmp_path / "student.pth").write_bytes((teacher / "student.pth").read_bytes())
        options = [str(teacher), *options]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("{student: resnet8, dataset: x, data_dir: x, fingerprint: x}")
    config = (teacher / "config.yaml").read_text()
    (tmp_path / "online").mkdir()
    (tmp_path / "online" / "config.yaml").write_text(config + "script: online_kd\n")
    (tmp_path / "online" / "student.pth").write_bytes((teacher / "student.pth").read_bytes())
    assert agreement.main(["--teacher", str(teacher), *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_other_images_in_the_data_folder_are_refused(tmp_path, capsys, monkeypatch, teacher):
    load_data = agreement.load_data
    monkeypatch.setattr(agreement, "load_data", lambda *args: replace(load_data(*args), fingerprint="other"))
    assert (
        agreement.main(["--teacher", str(teacher), str(teacher), "--data-dir", "x", "--out", str(tmp_path / "t")]) == 2
    )
    assert "did not use the images in x" in capsys.readouterr().err
