"""imagenet.py, run from the command line on small folders of JPEGs; test_distributed.py uses several ranks."""

import contextlib
import json
import os
import shutil
import signal
from argparse import Namespace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import yaml
from running import assert_bitwise_equal, assert_invalid, background_script, call, read_log, run_script, write_images
from torch import nn
from torchvision import models

import imagenet
from common.bridges import build_bridges, feature_shapes
from common.data.image_files import FileData, ImageFiles, Shard, list_files, train_loader
from common.fcfd import EQ_9, TERMS, fcfd_terms, forward_paths
from common.models import IMAGENET_NETWORKS, build_imagenet
from common.multipath_bn import track_paths
from common.paths import candidate_paths, sample_paths
from common.run.errors import UserError

SMALL = ["--image-size", 32, "--batch-size", 8, "--lr", 0.01, "--workers", 0, "--device", "cpu", "--amp", "off"]
PAIR = ["--teacher", "resnet18", "--student", "MobileNetV1", *SMALL]


def run(capsys, *args, code=0):
    return call(capsys, *args, code=code, module=imagenet)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), {"train": 6, "val": 5})


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    """Checkpoint of a resnet18 trained on the same classes, long enough for its running statistics."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    options = ["--data-dir", folder, "--student", "resnet18", *SMALL, "--epochs", 8, "--out", out]
    assert imagenet.main([str(option) for option in options]) == 0
    return out / "student.pth"


@pytest.fixture(scope="module")
def pair(folder, teacher):
    return ["--data-dir", folder, *PAIR, "--teacher-ckpt", teacher]


@pytest.fixture(scope="module")
def main_run(tmp_path_factory, folder, pair):
    """Two epochs of FCFD in a subprocess with workers and another working directory: its folder and output."""
    cwd = tmp_path_factory.mktemp("main")
    printed = run_script(cwd, *pair, "--workers", 2, "--epochs", 2, module=imagenet)
    return cwd / "runs" / f"{folder.name}-32px-resnet18-MobileNetV1-fcfd-2ep-seed1-off", printed


@pytest.fixture(scope="module")
def first_epoch(tmp_path_factory, pair):
    """The same run without workers, stopped after its first epoch, and the epochs whose batches it read."""
    out, options = tmp_path_factory.mktemp("first") / "run", [*pair, "--epochs", 2, "--max-minutes", 1e-9]
    with recorded_epochs() as epochs:
        assert imagenet.main([str(word) for word in (*options, "--out", out)]) == 0
    return out, epochs


@pytest.fixture
def stopped(tmp_path, first_epoch):
    """A copy of the stopped run."""
    return shutil.copytree(first_epoch[0], tmp_path / "run")


@contextlib.contextmanager
def recorded_epochs():
    epochs = []

    class Recorded(Shard):
        def __iter__(self):
            epochs.append(self.epoch)
            return super().__iter__()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagenet, "Shard", Recorded)
        yield epochs


def test_distillation_and_evaluation(tmp_path, main_run, capsys, folder):
    out, printed = main_run
    assert sorted(path.name for path in out.iterdir()) == [
        "best.pt",
        "config.yaml",
        "last.pt",
        "log.csv",
        "result.json",
        "student.pth",
        "student_best.pth",
    ]
    rows, result = read_log(out), json.loads((out / "result.json").read_text())
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert len(rows) == 2
    assert all(float(row[term]) > 0 for row in rows for term in EQ_9)
    assert all(0 <= float(row["waiting_percent"]) <= 100 and float(row["images_per_s"]) > 0 for row in rows)
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.01, 0.0001])
    assert result["last"]["top1"] == float(rows[-1]["test_top1"])
    assert result["last"]["top5"] == 100  # three classes
    assert (config["positions"], config["num_paths"], config["temperature"]) == ([2, 3, 4], 2, 1)
    assert "% of the time waiting for data" in printed
    assert f"MobileNetV1 saved to runs/{out.name}/student.pth" in printed
    shared = torch.load(out / "student.pth", weights_only=True)
    assert list(shared["model"]) == list(build_imagenet("MobileNetV1", 3).state_dict())
    shutil.copytree(folder / "val", tmp_path / "val")  # train/ is not needed
    printed = run(capsys, "--data-dir", tmp_path, "--student", "MobileNetV1", *SMALL, "--evaluate", out / "student.pth")
    assert f"MobileNetV1 {result['last']['top1']:.2f} % top-1, 100.00 % top-5 on 15 test images" in printed


def test_run_resumed_with_another_number_of_workers_is_bitwise_identical(capsys, main_run, first_epoch, stopped):
    with recorded_epochs() as epochs:
        run(capsys, "--student", "MobileNetV1", "--resume", "--workers", 2, "--out", stopped)
    assert_bitwise_equal(main_run[0], stopped)
    assert (set(first_epoch[1]), set(epochs)) == ({0}, {1})  # each call read only its own epoch


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        (["--method", "kd"], {"task", "kd"}),
        (["--method", "app"], {"task", "kd", "app"}),
        (["--w-func-prime", 0, "--positions", 3, "--num-paths", 1], set(EQ_9) - {"func_prime"}),
        (["--amp", "bf16", "--teacher-bn", "running", "--lr", 1e-5], set(EQ_9)),
    ],
)
def test_settings_select_terms(tmp_path, capsys, pair, teacher, options, terms):
    run(capsys, *pair, *options, "--epochs", 1, "--out", tmp_path)
    row = read_log(tmp_path)[0]
    assert {term for term in TERMS if row.get(term)} == terms
    assert float(row["waiting_percent"]) > 0
    before = torch.load(teacher, weights_only=True)["model"]
    after = torch.load(tmp_path / "last.pt", weights_only=True)["teacher"]
    assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"]) == ("running" in options)


def test_resumes_on_another_device(capsys, stopped):
    state = torch.load(stopped / "last.pt", weights_only=True)
    state["config"]["device"] = "cuda:7"
    torch.save(state, stopped / "last.pt")
    printed = run(capsys, "--student", "MobileNetV1", "--out", stopped, "--device", "cpu", "--resume")
    assert "; cpu, " in printed
    assert "amp off;" in printed


def test_resume_rejects_changed_settings(capsys, stopped):
    options = ["--student", "MobileNetV1", "--out", stopped, "--resume", "--device", "cpu"]
    assert "--temperature is 2.0 but was 1" in run(capsys, *options, "--temperature", 2, code=2)
    assert "epoch   2/2" in run(capsys, *options, "--temperature", 1, "--w-app", 5)


def test_two_steps_match_a_manual_loop(tmp_path, capsys, folder, teacher, pair):
    """The script against a loop with hand-written SGD; no setting has its default value."""
    weights = {"task": 0.9, "kd": 0.8, "app": 0.2, "func_l2": 0.3, "func_kl": 0.7, "func_prime": 0.6}
    options = [word for term, w in weights.items() for word in (f"--w-{term.replace('_', '-')}", w)]
    options += [
        "--epochs",
        40,
        "--lr",
        0.0005,
        "--temperature",
        3,
        "--num-paths",
        3,
        "--seed",
        5,
        "--max-minutes",
        1e-9,
    ]
    run(capsys, *pair, *options, "--batch-size", 9, "--image-size", 64, "--out", tmp_path)

    torch.manual_seed(5)
    student, net_t = build_imagenet("MobileNetV1", 3), build_imagenet("resnet18", 3)
    bridges = build_bridges(net_t, student, 64)
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    net_t.load_state_dict(torch.load(teacher, weights_only=True)["model"])
    net_t.requires_grad_(False).train()
    for net in (student, net_t):
        track_paths(net, [2, 3, 4])
    for net in (student, net_t, bridges):
        net.to(memory_format=torch.channels_last)
    loader = train_loader(ImageFiles(list_files(folder).train, 64, 5), Shard(18, 9, 5), 0, torch.device("cpu"))
    velocity, losses = {}, []
    for paths, (images, labels) in zip(sample_paths(candidate_paths(5), 3, 2, 5, 0), loader, strict=True):
        terms = fcfd_terms(forward_paths(net_t, student, bridges, images, paths), labels, 3.0)
        warm = {"app": 0.5, "func_l2": 0.5}  # the warm-up takes 1/20 of 40 epochs
        loss = sum(w * warm.get(name, 1) * terms[name] for name, w in weights.items())
        losses.append(loss.item())
        trained = [p for net in (student, bridges) for p in net.parameters()]
        for p, g in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
            if g is not None:
                g = g + 1e-4 * p.detach()
                velocity[p] = 0.9 * velocity.get(p, 0) + g
                p.data -= 0.0005 * (g + 0.9 * velocity[p])

    assert float(read_log(tmp_path)[0]["loss"]) == pytest.approx(sum(losses) / 2, rel=1e-4)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    for name, p in student.named_parameters():  # BatchNorm over few values amplifies rounding errors
        assert (state["student"][name] - p.detach()).norm() < 0.1 * (p.detach() - start[name]).norm() + 1e-6, name
    assert all(torch.equal(state["teacher"][name], p) for name, p in net_t.named_parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_resnets_match_torchvision(name):
    theirs = models.get_model(name, weights=None, num_classes=7)
    ours = build_imagenet(name, 7)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for net in (ours, theirs):
        net.train()
    torch.testing.assert_close(ours(images), theirs(images))
    assert torch.equal(ours.bn1.running_mean, theirs.bn1.running_mean)


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet18", 11.689512), ("resnet34", 21.797672), ("resnet50", 25.557032)]
)
def test_resnet_parameter_counts(name, millions):
    assert sum(p.numel() for p in build_imagenet(name, 1000).parameters()) == round(millions * 1e6)


def test_mobilenetv1_architecture():
    net = build_imagenet("MobileNetV1", 1000)
    assert sum(p.numel() for p in net.parameters()) == 4_231_976
    shapes = {1: (32, 112, 112), 2: (128, 56, 56), 3: (256, 28, 28), 4: (512, 14, 14), 5: (1024, 7, 7)}
    assert {k: tuple(shape) for k, shape in feature_shapes(net, 224).items()} == shapes
    ran = []
    for i, layer in enumerate(net.model):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    x, by_stage = torch.zeros(1, 3, 32, 32), {}
    for k in range(1, 6):
        x = net.eval().stage(k, x)
        by_stage[k], ran[:] = list(ran), []
    assert by_stage == {1: [0], 2: [1, 2, 3], 3: [4, 5], 4: [6, 7, 8, 9, 10, 11], 5: [12, 13]}
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 27
    assert [conv.groups > 1 for conv in convolutions] == [False, *[True, False] * 13]


@pytest.mark.parametrize("name", IMAGENET_NETWORKS)
def test_stages_do_not_modify_their_input_and_end_after_a_relu(name):
    net, x = build_imagenet(name, 7).train(), torch.randn(2, 3, 64, 64)
    assert net.post_relu
    for k in range(1, 6):
        before = x.clone()
        y = net.stage(k, x)
        assert torch.equal(x, before)
        assert y.min() >= 0
        x = y


def test_published_settings_and_schedules():
    for student, teacher, w_l2 in (("resnet18", "resnet34", 0.02), ("MobileNetV1", "resnet50", 5)):
        args = imagenet.parse_args(["--teacher", teacher, "--student", student, "--device", "cuda"])
        assert [getattr(args, f"w_{term}") for term in TERMS] == [1, 1, w_l2, w_l2, 1, 1, 0, 0]
        assert (args.temperature, args.lr, args.epochs, args.batch_size) == (1, 0.1, 100, 256)
        assert (args.amp, args.image_size) == ("fp16", 224)
    rates = [imagenet.learning_rate(Namespace(lr=0.1, epochs=100), epoch) for epoch in range(100)]
    assert rates == pytest.approx([0.1] * 30 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 10)
    warmed = [imagenet.warmed_up({"app": 1, "kd": 3}, Namespace(epochs=100), epoch) for epoch in range(6)]
    assert [weights["app"] for weights in warmed] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert {weights["kd"] for weights in warmed} == {3}


def load_teacher(teacher_ckpt=None, name="resnet18", num_classes=1000):
    net = build_imagenet(name, num_classes)
    imagenet.load_teacher(net, Namespace(teacher=name, teacher_ckpt=teacher_ckpt, data_dir="images"), num_classes)
    return net


def test_teacher_can_load_torchvision_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    theirs = models.resnet18()
    (tmp_path / "checkpoints").mkdir()
    name = models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save(theirs.state_dict(), tmp_path / "checkpoints" / name)
    assert torch.equal(load_teacher().fc.weight, theirs.fc.weight)
    (tmp_path / "checkpoints" / name).write_bytes(b"cut short")
    with pytest.raises(UserError, match="delete it to download it again"):
        load_teacher()


def test_torchvision_weights_are_checked_when_downloaded(tmp_path, monkeypatch):
    asked = []

    def download(url, path, hash_prefix):
        asked.append((url, path, hash_prefix))
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError, match=r"could not download torchvision's resnet50 .*no network.*--teacher-ckpt"):
        load_teacher(name="resnet50")
    ((url, path, hash_prefix),) = asked
    assert url == models.ResNet50_Weights.IMAGENET1K_V1.url
    assert path == str(tmp_path / "checkpoints" / url.rpartition("/")[2])
    assert hash_prefix == "0676ba61"


def test_error_for_a_missing_teacher_says_how_to_train_one(teacher):
    remedy = "train one on these images: python imagenet.py --data-dir images --student "
    for arguments in ({"num_classes": 7}, {"name": "MobileNetV1"}, {"teacher_ckpt": teacher, "num_classes": 4}):
        with pytest.raises(UserError) as error:
            load_teacher(**arguments)
        assert remedy + arguments.get("name", "resnet18") in str(error.value)
    with pytest.raises(UserError) as error:
        load_teacher(teacher_ckpt="missing.pth")
    assert remedy not in str(error.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--student", "resnet20"], "did you mean"),
        (["--student", "resnet18", "--teacher", "resnet110"], "resnet110"),
        (["--student", "resnet18", "--teacher", "resnet34"], "train one on these images"),
        (["--student", "resnet18", "--method", "kd"], "--teacher"),
        (["--student", "resnet18", "--data-dir", "missing"], "missing/train is not an image folder"),
        (["--student", "resnet18", "--batch-size", 19], "18 training images"),
        (["--student", "resnet18", "--batch-size", 1], "two images"),
        (["--student", "resnet18", "--image-size", 8], "--image-size: 8"),
        (["--student", "resnet18", "--workers", -1], "--workers: -1"),
        (["--student", "resnet18", "--subset", 2], "--subset 2"),
        (["--student", "resnet18", "--sync-bn"], "--sync-bn"),
        (["--student", "resnet18", "--evaluate", "missing.pth"], "missing.pth"),
        (["--student", "resnet18", "--resume"], "nothing to resume"),
        ([*PAIR[:4], "--num-paths", 7], "6 candidates"),
        ([*PAIR[:4], "--positions", 5, "--w-func-l2", 5], "func_l2"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, monkeypatch, folder, options, expected):
    monkeypatch.chdir(tmp_path)
    assert_invalid(capsys, [*SMALL, "--data-dir", folder], options, expected, module=imagenet)


def test_damaged_image_ends_the_run(tmp_path, capsys):
    images = write_images(tmp_path / "images", {"train": 4, "val": 2})
    (images / "val" / "n3" / "1.JPEG").write_bytes(b"\xff\xd8\xff")
    options = ["--data-dir", images, "--student", "resnet18", *SMALL, "--epochs", 1, "--out", tmp_path / "run"]
    message = run(capsys, *options, "--workers", 1, code=2)
    assert message.startswith(f"error: cannot read the image {images}/val/n3/1.JPEG (")
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("target", "signum", "code", "expected"),
    [
        ("a worker", signal.SIGKILL, 2, "error: a DataLoader worker died"),
        ("all", signal.SIGTERM, 143, "interrupted: "),
        ("all", signal.SIGINT, 130, "interrupted: "),
    ],
)
def test_signals_to_the_run_and_its_workers(tmp_path, folder, target, signum, code, expected):
    options = ["--data-dir", folder, "--student", "resnet18", *SMALL, "--workers", 2, "--epochs", 10**6]
    with background_script(*options, "--out", tmp_path / "run", module=imagenet) as process:
        if target == "all":  # like a cluster, or Ctrl-C in a terminal
            os.killpg(process.pid, signum)
        else:
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(workers[0]), signum)
        message = process.communicate(timeout=60)[1]
        assert process.returncode == code
    assert message.startswith(expected)
    assert message.count("\n") == 1
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] >= 1


def test_diverging_run_exits_with_1(tmp_path, capsys, monkeypatch, folder):
    monkeypatch.setattr(imagenet, "learning_rate", lambda args, epoch: 1e30)
    options = ["--data-dir", folder, "--student", "resnet18", *SMALL, "--epochs", 2, "--out", tmp_path / "run"]
    assert "non-finite loss in epoch 1" in run(capsys, *options, code=1)


def test_sync_bn_converts_every_layer_and_keeps_the_keys():
    args = imagenet.parse_args(["--teacher", "resnet18", "--student", "MobileNetV1"])
    step = imagenet.Step(args, FileData([], [], ["n1", "n2", "n3"], ""))
    student, keys = step.student, list(step.state_dict())
    step = nn.SyncBatchNorm.convert_sync_batchnorm(step)
    assert not [module for module in step.modules() if isinstance(module, nn.BatchNorm2d)]
    assert list(step.state_dict()) == keys
    assert step.student is student
    track_paths(step.student, [2])
    assert any("path2.running_mean" in key for key in student.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--amp", "bf16"], ["--sync-bn"]])
def test_on_gpu(tmp_path, capsys, pair, options):
    on_gpu = [word if word != "cpu" else "cuda" for word in pair]
    run(capsys, *on_gpu, *options, "--workers", 2, "--epochs", 2, "--out", tmp_path)
    rows = read_log(tmp_path)
    assert len(rows) == 2
    assert all(float(row["peak_memory_mb"]) > 0 for row in rows)
