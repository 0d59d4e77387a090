"""online_kd.py, run from the command line."""

import json
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import running
import torch
import torch.nn.functional as F
import yaml
from running import PAIR, SMALL, assert_bitwise_equal, assert_invalid, read_log

import cifar100
import online_kd
from common.bridges import build_bridges
from common.data.batches import train_batches
from common.data.sources import load_data
from common.models import build
from common.paths import candidate_paths, sample_paths

call, run_script = (partial(function, module=online_kd) for function in (running.call, running.run_script))
TERMS = ("task", "kd", "app", "func_l2", "func_kl", "func_prime", "teacher_task", "teacher_kd")
ONE_STEP = [*PAIR, "--subset", 20, "--test-subset", 20, "--batch-size", 20, "--epochs", 1]
NETWORKS = PAIR[:4]
ROLES = {"student": "", "teacher": "teacher_"}


def option(term):
    return f"--w-{term.replace('_', '-')}"


def last_state(folder):
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def main_run(tmp_path_factory):
    """A small version of the README's command: the run's folder and output."""
    folder = tmp_path_factory.mktemp("online")
    printed = run_script(folder, *PAIR, "--epochs", 3)
    return folder / "runs" / "synthetic-subset120-resnet14-resnet8-online-fcfd-3ep-seed1-off", printed


def test_main_run_writes_its_files(main_run):
    folder, printed = main_run
    assert list(folder.parent.iterdir()) == [folder]  # no separate teacher run
    names = ["best.pt", "config.yaml", "last.pt", "log.csv", "result.json", "student.pth", "student_best.pth"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "teacher.pth", "teacher_best.pth"]
    rows, state = read_log(folder), last_state(folder)
    result, config = (yaml.safe_load((folder / name).read_text()) for name in ("result.json", "config.yaml"))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(float(row[term]) > 0 for row in rows for term in TERMS)
    assert (config["temperature"], config["w_app"], config["num_paths"], config["positions"]) == (4, 5, 2, [2, 3])
    assert [config[f"w_{term}"] for term in TERMS] == [1, 1, 5, 5, 1, 1, 1, 1]
    assert result["teacher"] is None  # no pretrained teacher
    for (role, prefix), network in zip(ROLES.items(), ("resnet8", "resnet14"), strict=True):
        accuracies = [float(row[f"{prefix}test_top1"]) for row in rows]
        best = result[f"{prefix}best"]
        assert (result[f"{prefix}last"]["top1"], best["top1"]) == (accuracies[-1], max(accuracies))
        assert best["epoch"] == 1 + accuracies.index(max(accuracies))
        last, at_best = (torch.load(folder / f"{role}{best}.pth", weights_only=True) for best in ("", "_best"))
        assert (last["epoch"], last["accuracy"], last["best_acc"]) == (3, accuracies[-1], best["top1"])
        assert (at_best["epoch"], at_best["accuracy"]) == (best["epoch"], best["top1"])
        assert list(last["model"]) == list(build(network, 20).state_dict())  # plain: no per-path statistics
        assert all(torch.equal(value, state[role][key]) for key, value in last["model"].items())
        for name in ("best", "last"):
            top1, top5 = (result[f"{prefix}{name}"][top] for top in ("top1", "top5"))
            title = f"{prefix}{name}".replace("_", " ")
            assert re.search(rf"^{title} +{top1:.2f} % top-1, {top5:.2f} % top-5", printed, re.M)
    assert torch.load(folder / "best.pt", weights_only=True)["epoch"] == result["best"]["epoch"]


def test_both_networks_can_be_evaluated_and_used_by_cifar100(main_run, tmp_path, capsys):
    folder, _ = main_run
    result = json.loads((folder / "result.json").read_text())
    for role, network in (("student", "resnet8"), ("teacher", "resnet14")):
        last = result[f"{ROLES[role]}last"]
        printed = running.call(capsys, "--evaluate", folder / f"{role}.pth", "--student", network, *SMALL)
        assert f"{network} {last['top1']:.2f} % top-1, {last['top5']:.2f} % top-5 on 60 test images" in printed
    options = [*PAIR, "--method", "kd", "--epochs", 1, "--teacher-ckpt", folder / "teacher.pth"]
    printed = running.call(capsys, *options, "--out", tmp_path)
    assert f"teacher: {result['teacher_last']['top1']:.2f} % top-1 before distillation" in printed


def test_student_is_not_reused_as_an_offline_teacher(tmp_path, capsys):
    call(capsys, *ONE_STEP, "--out", tmp_path / "online")
    options = [*ONE_STEP, "--teacher", "resnet8", "--method", "kd", "--out", tmp_path / "offline"]
    assert "teacher: training resnet8" in running.call(capsys, *options)


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        (
            ["--method", "dml", "--teacher", "vgg8"],
            {"task", "kd", "teacher_task", "teacher_kd"},
        ),  # five and four stages
        (["--method", "dml", "--teacher", "resnet8"], {"task", "kd", "teacher_task", "teacher_kd"}),
        (["--method", "kd"], {"task", "kd", "teacher_task"}),
        (["--method", "kd", "--w-app", 1], {"task", "kd", "teacher_task", "app"}),
        (["--w-func-prime", 0, "--w-teacher-kd", 0], {*TERMS} - {"func_prime", "teacher_kd"}),
        (["--positions", 2, 4, "--num-paths", 4, "--amp", "bf16"], {*TERMS}),
    ],
)
def test_methods_and_weights_compute_only_their_terms(tmp_path, capsys, options, terms):
    call(capsys, *ONE_STEP, *options, "--out", tmp_path)
    row, state = read_log(tmp_path)[0], last_state(tmp_path)
    assert {term for term in TERMS if row[term]} == terms
    assert all(np.isfinite(float(row[term])) for term in terms)
    assert ("bridges" in state) == ("app" in terms)
    t2s, mixed = (any(word in key for key in running.flatten_tensors(state)) for word in ("/t2s.", ".path"))
    assert t2s == ("func_prime" in terms)
    assert mixed == ("func_kl" in terms)


def test_kd_trains_the_teacher_independently(tmp_path, capsys):
    options = [*PAIR, "--epochs", 1, "--method", "kd"]
    call(capsys, *options, "--out", tmp_path / "kd")
    call(capsys, *options, "--w-kd", 0, "--w-task", 0, "--out", tmp_path / "alone")
    both, alone = (last_state(tmp_path / name) for name in ("kd", "alone"))
    assert all(torch.equal(value, alone["teacher"][key]) for key, value in both["teacher"].items())
    assert not torch.equal(both["student"]["conv1.weight"], alone["student"]["conv1.weight"])


@pytest.mark.parametrize(
    ("term", "in_student", "in_teacher"),
    [
        ("task", "1234C", ""),
        ("kd", "1234C", ""),
        ("app", "1234", ""),
        ("func_l2", "12", "34"),
        ("func_kl", "12", "34C"),
        ("func_prime", "34C", "12"),  # the teacher's early stages, through the bridge
        ("teacher_task", "", "1234C"),
        ("teacher_kd", "", "1234C"),
    ],
)
def test_each_term_trains_exactly_its_modules(tmp_path, capsys, term, in_student, in_teacher):
    """One step on one term, with mixed paths at k = 2, trains all modules on a path and no targets."""
    weights = [word for other in TERMS for word in (option(other), int(other == term))]
    call(capsys, *ONE_STEP, *weights, "--positions", 2, "--out", tmp_path)
    torch.manual_seed(1)
    before, after = {"student": build("resnet8", 20), "teacher": build("resnet14", 20)}, last_state(tmp_path)
    stages = {"conv1": "1", "bn1": "1", "layer1": "2", "layer2": "3", "layer3": "4", "fc": "C"}
    for role, expected in (("student", in_student), ("teacher", in_teacher)):
        moved = {
            stages[name.split(".")[0]]
            for name, p in before[role].named_parameters()
            if not torch.equal(p, after[role][name])
        }
        assert "".join(sorted(moved)) == expected, role


def reference_losses(teacher, student, bridges, images, labels, paths, temperature):
    """All terms as in the paper, the hits of both networks, and the buffers after the pure paths."""

    def kl(logits, target):
        p, q = F.softmax(target.detach() / temperature, 1), F.softmax(logits / temperature, 1)
        return (p * (p.log() - q.log())).sum(1).mean() * temperature**2

    def l2(x, target, k):
        target = target.detach()
        pooled = (x.clamp(min=0).mean((2, 3)) - target.clamp(min=0).mean((2, 3))) ** 2
        return ((x - target) ** 2).mean() + (pooled.mean() if k == 4 else 0)

    def cross_entropy(logits):
        return -F.log_softmax(logits, 1)[range(len(labels)), labels].mean()

    t, s = (dict(enumerate(net.features(images), 1)) for net in (teacher, student))
    p_t, p_s = teacher.classify(t[4]), student.classify(s[4])
    pure = [(buffer, buffer.clone()) for net in (teacher, student) for buffer in net.buffers()]
    bridged = {k: bridges.s2t[str(k)](s[k]) for k in (2, 3, 4)}
    losses = dict.fromkeys(TERMS, 0) | {"task": cross_entropy(p_s), "kd": kl(p_s, p_t)}
    losses |= {"teacher_task": cross_entropy(p_t), "teacher_kd": kl(p_t, p_s)}
    losses["app"] = sum(l2(bridged[k], t[k], k) for k in (2, 3, 4))
    for k, delta in paths:
        if delta == 1:
            x = bridged[k]
            for l in range(k + 1, 5):
                x = teacher.stage(l, x)
                losses["func_l2"] += l2(x, t[l], l)
            losses["func_kl"] += kl(teacher.classify(x), p_t)
        else:
            x = bridges.t2s[str(k)](t[k])
            for l in range(k + 1, 5):
                x = student.stage(l, x)
            losses["func_prime"] += kl(student.classify(x), p_t)
    hits = [(logits.argmax(1) == labels).sum().item() for logits in (p_s, p_t)]
    return losses, hits, pure


def test_two_epochs_match_a_manual_loop(tmp_path, capsys):
    """The script against a loop with hand-written losses, SGD, and statistics; no setting has its default value."""
    weights = dict(zip(TERMS, (0.9, 0.8, 2.0, 3.0, 0.7, 0.6, 1.1, 0.5), strict=True))
    options = [word for term, w in weights.items() for word in (option(term), w)]
    options += ["--epochs", 24, "--lr", 0.002, "--temperature", 3, "--num-paths", 3, "--seed", 5, "--subset", 40]
    options += ["--out", tmp_path, "--max-minutes", 1e-9]
    call(capsys, *PAIR, *options)
    call(capsys, *PAIR, *options, "--resume")  # each call stops after one epoch

    torch.manual_seed(5)
    student, teacher = build("resnet8", 20), build("resnet14", 20)
    nets = {"student": student, "teacher": teacher, "bridges": build_bridges(teacher, student, 32)}
    for net in nets.values():  # as in the script, so that rounding is similar
        net.to(memory_format=torch.channels_last)
    start = {role: {name: p.detach().clone() for name, p in net.named_parameters()} for role, net in nets.items()}
    data = load_data("synthetic", "", 40, 60)
    velocity, rows = {}, []
    for epoch in range(2):
        warm = (epoch + 1) / 2  # 1/12 of 24 epochs
        paths = sample_paths(candidate_paths(4), 3, 2, 5, epoch)
        hits, logged = np.zeros(2), []
        for step, (images, labels) in enumerate(train_batches(data.train, 32, 5, epoch)):
            terms, hit, pure = reference_losses(teacher, student, nets["bridges"], images, labels, paths[step], 3.0)
            factors = {name: w * (warm if name in ("app", "func_l2") else 1) for name, w in weights.items()}
            loss = sum(factors[name] * value for name, value in terms.items())
            logged.append([loss.item(), *(torch.as_tensor(terms[name]).item() for name in TERMS)])
            hits += hit
            trained = [p for net in nets.values() for p in net.parameters()]
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            for buffer, value in pure:
                buffer.copy_(value)
            for p, g in zip(trained, gradients, strict=True):
                if g is not None:
                    g = g + 5e-4 * p.detach()
                    velocity[p] = 0.9 * velocity.get(p, 0) + g
                    p.data -= 0.002 * (g + 0.9 * velocity[p])
        rows.append([*np.mean(logged, 0), *(100 * hits / 40)])

    columns = ("loss", *TERMS, "train_top1", "teacher_train_top1")
    for row, expected in zip(read_log(tmp_path), rows, strict=True):
        assert [float(row[column]) for column in columns] == pytest.approx(expected, rel=1e-3)
    state = last_state(tmp_path)
    for role, net in nets.items():
        for name, p in net.named_parameters():
            update = p.detach() - start[role][name]
            assert (state[role][name] - p.detach()).norm() <= 0.01 * update.norm(), (role, name)
        for name, value in net.named_buffers():
            torch.testing.assert_close(state[role][name], value, rtol=1e-2, atol=1e-4)


@pytest.fixture(scope="module")
def killed(main_run, tmp_path_factory):
    """The folder of the same run, killed after its first epoch."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    command = [sys.executable, online_kd.__file__, *PAIR, "--epochs", "3", "--out", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert any(line.startswith("epoch   1/") for line in process.stdout)
        process.kill()
    assert last_state(folder)["epoch"] < 3
    return folder


def test_run_resumed_after_a_kill_is_bitwise_identical(main_run, killed, capsys):
    call(capsys, *NETWORKS, "--resume", "--max-minutes", 1e-9, "--out", killed)  # other options are stored
    printed = call(capsys, *NETWORKS, "--resume", "--out", killed)
    assert "epoch   1/3" not in printed
    uninterrupted, _ = main_run
    assert_bitwise_equal(uninterrupted, killed)
    result, resumed = (json.loads((folder / "result.json").read_text()) for folder in (uninterrupted, killed))
    for name in ("best", "last", "teacher_best", "teacher_last"):
        assert resumed[name] == result[name]
    for name in ("student", "student_best", "teacher", "teacher_best"):
        files = [torch.load(folder / f"{name}.pth", weights_only=True) for folder in (uninterrupted, killed)]
        assert all(torch.equal(value, files[1]["model"][key]) for key, value in files[0]["model"].items())
    timings = {"seconds", "images_per_s"}
    logs = [
        [{k: v for k, v in row.items() if k not in timings} for row in read_log(f)] for f in (uninterrupted, killed)
    ]
    assert logs[0] == logs[1]


def test_files_are_restored_from_last_pt(tmp_path, capsys):
    call(capsys, *ONE_STEP, "--out", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in before.keys() - {"last.pt"}:
        (tmp_path / name).unlink()
    call(capsys, *ONE_STEP, "--resume", "--out", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("method", online_kd.METHODS)
def test_scripts_do_not_resume_each_others_runs(tmp_path, capsys, teacher, method):
    online, offline = tmp_path / "online", tmp_path / "offline"
    call(capsys, *ONE_STEP, "--method", method, "--out", online)
    same = [] if method == "dml" else ["--method", method]
    running.call(capsys, *ONE_STEP, *same, "--teacher-ckpt", teacher / "student.pth", "--out", offline)
    for folder, module, owner in ((online, cifar100, "online_kd"), (offline, online_kd, "cifar100")):
        before = (folder / "last.pt").read_bytes()
        for more in ([], ["--resume"]):
            message = running.call(capsys, *ONE_STEP, *more, "--out", folder, code=2, module=module)
            assert ("holds a run of" if more else "already holds a run") in message
            assert (f"{owner}.py" in message) == bool(more)
            assert message.count("\n") == 1
        assert (folder / "last.pt").read_bytes() == before


def test_resume_rejects_changed_settings_by_name(main_run, capsys):
    folder, _ = main_run
    for name, value in (("--w-teacher-kd", 0.5), ("--method", "dml"), ("--epochs", 9), ("--subset", 100)):
        message = call(capsys, *PAIR, name, value, "--resume", "--out", folder, code=2)
        assert f"{name} is {value}" in message


def test_diverging_run_keeps_the_last_good_epoch(tmp_path, capsys, monkeypatch):
    options = [*PAIR, "--method", "dml", "--epochs", 3, "--out", tmp_path]
    call(capsys, *options, "--max-minutes", 1e-9)
    config = tmp_path / "config.yaml"  # stores the time limit of the last call
    before, settings = {path: path.read_bytes() for path in tmp_path.iterdir()}, yaml.safe_load(config.read_text())
    monkeypatch.setattr(online_kd, "learning_rate", lambda args, epoch: 1e30)
    assert "epoch 2, step 2" in call(capsys, *options, "--resume", code=1)
    after = {path: path.read_bytes() for path in tmp_path.iterdir()} | {config: before[config]}
    assert after == before
    assert yaml.safe_load(config.read_text()) == settings | {"max_minutes": None}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--teacher, --student"),
        (["--student", "resnet8"], "--teacher"),
        (["--teacher", "resnet8"], "--student"),
        (["--student", "resnet8", "--teacher", ""], "--teacher: unknown network"),
        (["--student", "resnet8", "--teacher", "resnet15"], "resnet14"),
        (["--student", "resnet8", "--teacher", "vgg8"], "5 stages and the student 4"),
        ([*NETWORKS, "--method", "app"], "--method"),
        ([*NETWORKS, "--teacher-ckpt", "x.pth"], "--teacher-ckpt"),
        ([*NETWORKS, "--num-paths", 5], "4 candidates"),
        ([*NETWORKS, "--method", "dml", "--num-paths", 1], "0 candidates"),
        ([*NETWORKS, "--positions", 1], "outside 2..4"),
        ([*NETWORKS, "--positions", 4, "--w-func-l2", 5], "func_l2"),
        ([*NETWORKS, "--w-teacher-kd", -1], "--w-teacher-kd: -1"),
        ([*NETWORKS, "--w-teacher-task", "nan"], "--w-teacher-task: nan"),
        ([*NETWORKS, "--temperature", 0], "--temperature: 0"),
        ([*NETWORKS, "--method", "kd", "--w-task", 0, "--w-kd", 0, "--w-teacher-task", 0], "another term a weight"),
        ([*NETWORKS, "--epochs", 0], "--epochs: 0"),
        ([*NETWORKS, "--subset", 20], "20 training images"),
        ([*NETWORKS, "--device", "cuda:99"], "cuda:99"),
        ([*NETWORKS, "--out", "x" * 300], "x" * 300),
        ([*NETWORKS, "--resume"], "nothing to resume"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    assert_invalid(capsys, SMALL, options, expected, module=online_kd)


def test_settings_and_schedules_match_the_paper():
    args = online_kd.parse_args(["--teacher", "resnet56", "--student", "resnet20", "--device", "cuda"])
    assert [getattr(args, f"w_{term}") for term in TERMS] == [1, 1, 0.02, 0.02, 1, 1, 1, 1]
    assert (args.w_func_partial, args.w_func_prime_l2) == (0, 0)
    assert (args.lr, args.temperature, args.epochs, args.batch_size, args.amp) == (0.05, 4, 240, 64, "fp16")
    args = online_kd.parse_args(["--teacher", "resnet32x4", "--student", "ShuffleV2"])
    assert (args.lr, args.temperature, args.w_app) == (0.01, 8, 5)
    weights = {"app": 5, "func_l2": 2, "func_kl": 1}
    for epochs in (240, 24, 8):
        args.epochs = epochs
        for epoch in range(epochs):
            assert online_kd.learning_rate(args, epoch) == cifar100.learning_rate(args, epoch)
            assert online_kd.warmed_up(weights, args, epoch) == cifar100.warmed_up(weights, args, epoch)
    assert online_kd.warmed_up({"teacher_kd": 3}, args, 0) == {"teacher_kd": 3}


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--amp", "bf16"], ["--method", "dml"]])
def test_main_run_on_gpu(tmp_path, capsys, options):
    small = [word if word != "cpu" else "cuda" for word in PAIR]
    call(capsys, *small, *options, "--epochs", 2, "--out", tmp_path)
    assert all(np.isfinite(float(row["loss"])) and float(row["peak_memory_mb"]) > 0 for row in read_log(tmp_path))
