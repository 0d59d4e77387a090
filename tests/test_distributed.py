"""imagenet.py on two ranks with torchrun and gloo."""

import json
import subprocess

import pytest
import ranks
import torch
from running import TORCHRUN, background_torchrun, call, kill_one_rank, read_log, torchrun, write_images

import imagenet

SMALL = ["--image-size", 32, "--workers", 0, "--device", "cpu", "--amp", "off", "--lr", 0.01]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 training and 13 test images in four classes; 13 images do not split evenly over two ranks."""
    classes = [f"n{i}" for i in range(4)]
    folder = write_images(tmp_path_factory.mktemp("images"), {"train": 5, "val": 4}, classes)
    for i in (1, 2, 3):
        (folder / "val" / f"n{i}" / "3.JPEG").unlink()
    return folder


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    options = ["--data-dir", folder, "--student", "resnet18", *SMALL, "--batch-size", 8, "--epochs", 1, "--out", out]
    assert imagenet.main([str(option) for option in options]) == 0
    return out / "student.pth"


@pytest.fixture(scope="module")
def options(folder, teacher):
    """Five steps per epoch: batches of 4."""
    pair = ["--teacher", "resnet18", "--student", "MobileNetV1", "--teacher-ckpt", teacher]
    return ["--data-dir", folder, *pair, *SMALL, "--batch-size", 4]


def test_gradients_match_a_single_process(tmp_path):
    torchrun(ranks.__file__, tmp_path, "gradients")
    saved = [torch.load(tmp_path / f"gradients{r}.pt", weights_only=True) for r in (0, 1)]
    expected = saved[0]["whole_batch"]
    unused = {name for name, gradient in expected.items() if gradient is None and name.startswith("bridges")}
    assert {name.split(".")[2] for name in unused} == {"2", "4"}  # t2s bridges of unsampled paths
    for gradients in (rank["distributed"] for rank in saved):
        for name, gradient in expected.items():
            if gradient is None:
                assert gradients[name] is None, name
            else:
                assert relative_error(gradients[name], gradient) <= 1e-5, name
    # The comparison is meaningful: all terms contribute, and the gradients of a single rank differ.
    assert all(value > 0 for value in saved[0]["terms"].values())
    errors = [
        relative_error(saved[0]["local"][name], gradient) for name, gradient in expected.items() if gradient is not None
    ]
    assert min(errors) > 1e-4


def relative_error(a, b):
    """Largest difference relative to the largest entry."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, options):
    """Five FCFD steps on two ranks: the run's folder, its output, and each rank's final state."""
    folder = tmp_path_factory.mktemp("trained")
    out = folder / "run"
    output = torchrun(ranks.__file__, folder, "train", *options, "--epochs", 3, "--max-minutes", 1e-9, "--out", out)
    return out, output, [torch.load(folder / f"trained{r}.pt", weights_only=True) for r in (0, 1)]


def test_ranks_are_equal_after_five_steps(trained):
    out, _, (one, two) = trained
    assert one["step"].keys() == two["step"].keys()
    assert not [key for key, value in one["step"].items() if not torch.equal(value, two["step"][key])]
    assert len(one["evaluations"]) == len(two["evaluations"]) == 2  # the teacher before training, the student after
    for (state, accuracy), (state_2, accuracy_2) in zip(one["evaluations"], two["evaluations"], strict=True):
        assert accuracy == accuracy_2
        assert not [key for key, value in state.items() if not torch.equal(value, state_2[key])]
    moved = [key for key in one["step"] if key.startswith("student") and "num_batches_tracked" not in key]
    saved = torch.load(out / "last.pt", weights_only=True)
    assert all(torch.equal(saved["student"][key.removeprefix("student.")], one["step"][key]) for key in moved)
    assert int(saved["student"]["model.0.1.num_batches_tracked"]) == 5


def test_only_one_rank_prints_and_writes_and_evaluation_is_exact(trained, folder, capsys):
    out, output, _ = trained
    assert output.count("epoch   1/3") == 1
    assert "2 ranks" in output
    assert "Warning" not in output
    assert len(read_log(out)) == 1
    result = json.loads((out / "result.json").read_text())
    options = ["--data-dir", folder, "--student", "MobileNetV1", *SMALL[:6], "--evaluate", out / "student.pth"]
    printed = call(capsys, *options, module=imagenet)
    assert f"MobileNetV1 {result['last']['top1']:.2f} % top-1" in printed
    assert "on 13 test images" in printed


def test_two_ranks_match_one_process_with_fixed_batchnorm(tmp_path, monkeypatch, options):
    """Batches of 7, 7, and 6 images, so that one rank gets an extra image."""
    for name in ("train", "distribute", "evaluate_distributed"):
        monkeypatch.setattr(imagenet, name, getattr(imagenet, name))  # ranks.py replaces them

    def one_process(_, *argv):
        with pytest.raises(SystemExit, match="0"):
            ranks.train_fixed(argv[0], *map(str, argv[2:]))

    results = []
    for name, start in (("one", one_process), ("two", torchrun)):
        folder = tmp_path / name
        folder.mkdir()
        argv = [*options, "--batch-size", 7, "--epochs", 1, "--w-app", 1, "--w-func-l2", 1, "--out", folder / "run"]
        start(ranks.__file__, folder, "train-fixed", *argv)
        results.append((read_log(folder / "run")[0], torch.load(folder / "trained0.pt", weights_only=True)))
    (log, one), (log_2, two) = results
    columns = ("loss", "task", "kd", "app", "func_l2", "func_kl", "func_prime", "train_top1")
    assert [float(log_2[c]) for c in columns] == pytest.approx([float(log[c]) for c in columns], rel=1e-3)
    torch.manual_seed(1)
    start = imagenet.build_imagenet("MobileNetV1", 4)
    for name, p in start.named_parameters():
        ours, theirs = (result["step"][f"student.{name}"] for result in (two, one))
        assert (ours - theirs).norm() <= 0.01 * (theirs - p.detach()).norm(), name


def test_resumes_on_another_number_of_ranks(trained, capsys):
    resume = ["--student", "MobileNetV1", "--resume", "--out", trained[0]]
    assert "epoch   2/3" in call(capsys, *resume, "--max-minutes", 1e-9, module=imagenet)
    output = torchrun(imagenet.__file__, *resume)
    assert "epoch   3/3" in output
    assert "epoch   2/3" not in output
    assert [row["epoch"] for row in read_log(trained[0])] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], True),  # two of six paths: the other t2s bridges get no gradients
        (["--num-paths", 6], False),
        (["--num-paths", 6, "--w-app", 0], True),
        (["--num-paths", 6, "--w-task", 0, "--w-kd", 0], True),
        (["--method", "kd"], False),
        (["--method", "app"], False),
        (["--method", "app", "--w-task", 0], False),
        (["--method", "app", "--w-task", 0, "--w-kd", 0], True),  # the student's classifier is unused
    ],
)
def test_ddp_searches_for_unused_parameters_only_if_needed(tmp_path, monkeypatch, options, argv, expected):
    """DDP would fail or hang on undeclared unused parameters; searching for them slows every step."""

    class Called(Exception):
        pass

    def distribute(_, some_unused):
        raise Called(some_unused)

    monkeypatch.setattr(imagenet, "distribute", distribute)
    with pytest.raises(Called, match=str(expected)):
        imagenet.main([*map(str, (*options, *argv)), "--out", str(tmp_path / "run")])


def test_parameters_that_no_term_uses_are_not_updated(tmp_path, options):
    """L_app never uses the student's classifier."""
    argv = ["--method", "app", "--w-task", 0, "--w-kd", 0, "--epochs", 1, "--out", tmp_path / "run"]
    assert imagenet.main([str(word) for word in (*options, *argv)]) == 0
    torch.manual_seed(1)
    start = imagenet.build_imagenet("MobileNetV1", 4).state_dict()
    end = torch.load(tmp_path / "run" / "student.pth", weights_only=True)["model"]
    assert torch.equal(end["fc.weight"], start["fc.weight"])  # no weight decay either
    assert not torch.equal(end["model.13.3.weight"], start["model.13.3.weight"])


def test_error_is_printed_once(tmp_path, options):
    output = torchrun(imagenet.__file__, *options, "--num-paths", 7, "--out", tmp_path / "run", code=2)
    errors = [line for line in output.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: cannot sample 7 paths")
    assert not (tmp_path / "run").exists()


def test_killed_rank_ends_the_job(tmp_path, options):
    with background_torchrun(imagenet.__file__, *options, "--epochs", 10**6, "--out", tmp_path / "run") as process:
        assert any(line.startswith("epoch   1/") for line in process.stdout)
        kill_one_rank(process, "imagenet.py")
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] >= 1


@pytest.mark.gpu
def test_nccl_with_one_rank(tmp_path, options):
    """One GPU means one rank, but the collectives still use NCCL."""
    on_gpu = [word if word != "cpu" else "cuda" for word in options]
    command = [word if word != "--nproc_per_node=2" else "--nproc_per_node=1" for word in TORCHRUN]
    command += [imagenet.__file__, *on_gpu, "--epochs", 2, "--out", tmp_path / "run"]
    subprocess.run(list(map(str, command)), check=True, timeout=300)
    assert len(read_log(tmp_path / "run")) == 2
