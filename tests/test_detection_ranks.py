"""detection.py on two ranks with torchrun and gloo."""

import json
import signal
import sys
import time

import detection_ranks
import pytest
import torch
from running import background_torchrun, call, kill_one_rank, read_log, torchrun
from tiny_detectors import shrink

import detection
from common.detection import synthetic
from common.detection.evaluation import METRICS
from common.detection.fcfd import TERMS

pytest.importorskip("pycocotools")

SMALL = ["--scratch", "--min-size", 96, "--rois", 16, "--batch-size", 4, "--workers", 0]
SMALL += ["--device", "cpu", "--amp", "off"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Nine training images, so that batches of four span epochs, and five test images."""
    folder = tmp_path_factory.mktemp("coco") / "data"
    synthetic.write(folder, {"train": 9, "val": 5})
    return ["--data-dir", folder, "--student", "mobilenet_v2", *SMALL]


TERM_LISTS = [TERMS, ("kd", "func_prime")]


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    torchrun(detection_ranks.__file__, folder, "gradients", *map(",".join, TERM_LISTS))
    return folder


@pytest.mark.parametrize(("i", "terms"), list(enumerate(TERM_LISTS)))
def test_gradients_are_averaged_over_ranks(gradients, i, terms):
    one, two = (torch.load(gradients / f"gradients{r}-{i}.pt", weights_only=True) for r in (0, 1))
    assert len(one["local"]) > 150
    used = {name: gradient for name, gradient in one["local"].items() if gradient is not None}
    assert any("rpn" in name for name in used) == ("task" in terms)
    largest = max(gradient.abs().max() for gradient in used.values())
    for name, gradient in one["distributed"].items():
        if one["local"][name] is None:  # the RPN without the task term
            assert gradient is None, name
            continue
        assert torch.equal(gradient, two["distributed"][name]), name
        mean = (one["local"][name] + two["local"][name]) / 2
        assert (gradient - mean).abs().max() <= 1e-4 * mean.abs().max() + 1e-6 * largest, name
    assert any(not torch.allclose(gradient, two["local"][name]) for name, gradient in used.items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, options):
    """An FCFD run on two ranks: its folder, its output, and each rank's final state."""
    folder = tmp_path_factory.mktemp("trained")
    teacher = ["--student", "resnet18", *options[:2], *SMALL, "--iterations", 2, "--out", folder / "teacher"]
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        assert detection.main(list(map(str, teacher))) == 0
    more = ["--teacher", "resnet18", "--teacher-ckpt", folder / "teacher" / "student.pth", "--iterations", 4]
    argv = [*options, *more, "--save-every", 2, "--max-minutes", 1e-9, "--out", folder / "run"]
    output = torchrun(detection_ranks.__file__, folder, "train", *argv)
    output += torchrun(detection_ranks.__file__, folder, "train", *argv[:-4], "--resume", "--out", folder / "run")
    return folder / "run", output, [torch.load(folder / f"trained{r}.pt", weights_only=True) for r in (0, 1)]


def test_ranks_end_with_equal_states(trained):
    out, output, ((one, seed_of_one, rows), (two, seed_of_two, rows_of_two)) = trained
    assert seed_of_one != seed_of_two  # each rank samples its own proposals
    assert rows == rows_of_two  # logged metrics cover all ranks
    assert [row["steps"] for row in rows] == [2, 2]
    assert one.keys() == two.keys()
    assert not [key for key, value in one.items() if not torch.equal(value, two[key])]
    saved = torch.load(out / "last.pt", weights_only=True)
    assert saved["iteration"] == 4
    assert all(torch.equal(saved["student"][key], one[f"student.{key}"]) for key in saved["student"])
    assert [row["iteration"] for row in read_log(out)] == ["2", "4"]
    assert output.count("iteration      4/4") == 1
    assert output.count("stopped after 1 of 4") == 1
    assert "2 ranks" in output


def test_evaluation_matches_a_single_process(trained, options, capsys, monkeypatch):
    shrink(monkeypatch)
    out, *_ = trained
    last = json.loads((out / "result.json").read_text())["last"]
    printed = call(capsys, *options, "--evaluate", out / "student.pth", module=detection)
    expected = ", ".join(f"{name} {'-' if last[name] is None else f'{last[name]:.2f}'}" for name in METRICS)
    assert printed == f"mobilenet_v2: {expected} on 5 test images of 96 pixels\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_prints_an_error_without_waiting(tmp_path, capsys, monkeypatch, options, rank):
    """Rank 1 waits before printing, so that torchrun can end it first; test_distributed.py runs torchrun."""
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("sys.stdout", sys.stdout)  # restored afterwards: ranks other than 0 close it
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert detection.main([*map(str, options), "--batch-size", "3", "--out", str(tmp_path / "run")]) == 2
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert len(waits) == rank
    prefix = "(rank 1) " if rank else ""
    message = capsys.readouterr().err
    assert message.startswith(f"{prefix}error: --batch-size 3: must be a multiple of the 2 ranks")
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_killed_rank_ends_the_job(tmp_path, options):
    argv = [*options, "--iterations", 10**6, "--save-every", 1, "--out", tmp_path / "run"]
    with background_torchrun(detection_ranks.__file__, tmp_path, "train", *argv) as process:
        assert any(line.startswith("iteration      1/") for line in process.stdout)
        kill_one_rank(process, "detection")
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["iteration"] >= 1
