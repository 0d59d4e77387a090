"""ablations/complexity.py: output files and steps. Timings are not tested."""

import json

import pytest
import torch

import cifar100
from ablations import baseline_cifar100, complexity, measure, steps
from common.models import build

FCFD = {"method": "fcfd", "num_paths": 2}
SMOKE = ["--smoke", "--device", "cpu", "--amp", "off"]


def smoke_settings(*options):
    return complexity.parse_args([*SMOKE, *options])


def test_smoke(tmp_path, capsys):
    assert complexity.main([*SMOKE, "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "rows.json").read_text())
    rows = {(row["name"], row["options"].get("num_paths")): row for row in numbers["rows"]}
    once = [(name, None) for name in ("alone", "kd", "dkd", "app", "reviewkd", "crd")]
    assert list(rows) == [*once, ("fcfd", 0), ("fcfd", 2), ("plain", 2)]
    assert all(row["seconds"] > 0 for row in rows.values())
    memory = {key: row["megabytes"] for key, row in rows.items()}
    weights, teacher_weights = (
        sum(4 * p.numel() for p in build(n, 100).parameters()) / 2**20 for n in ("resnet8", "resnet14")
    )
    assert 2 * weights < memory["alone", None]  # at least weights and gradients
    assert memory["alone", None] + teacher_weights < memory["kd", None] < memory["app", None] < memory["fcfd", 0]
    assert memory["fcfd", 0] < memory["fcfd", 2] < 40
    read = 4 * 16_385  # the positive and the negatives of each image
    assert memory["crd", None] > 2 * (50_000 + read) * 128 * 4 / 2**20  # two banks, and copies of the rows read
    flops = {key: row["flops"] for key, row in rows.items()}
    assert flops["alone", None] < flops["kd", None] == flops["dkd", None] < flops["app", None]
    assert flops["app", None] == flops["fcfd", 0] < flops["fcfd", 2] == flops["plain", 2]
    # CRD trains two embeddings, and multiplies each by rows of a bank.
    embedding, products = 2 * 64 * 128, 2 * 128 * 16_385
    assert flops["crd", None] == flops["kd", None] + 4 * (5 * embedding + 4 * products)
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    alone, row = rows["alone", None], rows["fcfd", 2]
    expected = (
        f"| resnet14-resnet8 | FCFD | 2 | {row['seconds'] / alone['seconds']:.2f} | {1000 * row['seconds']:.1f} | "
    )
    expected += f"{4 / row['seconds']:.0f} | {row['megabytes']:.0f} | {row['flops'] / 1e9:.2f} | "
    assert expected + f"{row['flops'] / alone['flops']:.2f} |" in text
    fewer = ["--methods", "fcfd", "kd", "--num-paths", "2"]
    assert complexity.main([*SMOKE, "--out", str(tmp_path), *fewer]) == 0
    assert "resnet14-resnet8: kept" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text()) == numbers
    lines = text.splitlines()
    assert (tmp_path / "table.md").read_text().splitlines()[:5] == [*lines[:3], lines[9], lines[3]]


def rows_of(*options, pair="resnet32x4-resnet8x4"):
    args = complexity.parse_args([*options, "--device", "cpu"])
    return [(row.name, row.options.get("num_paths")) for row in complexity.rows_of(pair, args)], args.out


def test_options_select_rows():
    all_rows = [("alone", None), *(("fcfd", n) for n in range(5)), ("plain", 2)]
    assert rows_of() == (all_rows, "results/complexity")
    methods = ["kd", "dkd", "reviewkd", "crd"]
    compared = [("alone", None), *((method, None) for method in methods), ("fcfd", 2)]
    assert rows_of("--methods", *methods, "fcfd") == (compared, "results/complexity/methods")
    assert rows_of("--methods", "fcfd", "--num-paths", "0", "4")[0] == [("alone", None), ("fcfd", 0), ("fcfd", 4)]
    assert complexity.parse_args(["--pairs", "all"]).pairs == list(cifar100.SETTINGS["pairs"])
    shown = [("alone", None), ("fcfd", 1), ("plain", 1)]
    assert rows_of("--num-paths", "1", pair="resnet32x4-ShuffleV1")[0] == shown


def test_memory_is_reproducible():
    args = smoke_settings()
    rows = [complexity.Row("resnet14-resnet8", "fcfd", FCFD) for _ in range(3)]
    for row in rows:
        complexity.measure_memory(row, args)
    assert rows[1].megabytes == pytest.approx(rows[0].megabytes, rel=0.01)
    assert rows[2].megabytes == pytest.approx(rows[0].megabytes, rel=0.01)


def test_time_is_the_median_after_a_warm_up(monkeypatch):
    """Each step advances a fake clock: 1, 2, and 9 s have median 2. The first call with each number takes 100 s more.

    Of a, step 1 repeats the paths of step 0. All steps of b have the same paths.
    """
    now, order = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def step_of(name):
        distinct, durations = {"a": ([0, 2], (1, 9, 2)), "b": ([0], (4, 4, 4))}[name]

        def run(i):
            new = i in distinct and f"{name}{i}" not in order
            now[0] += durations[i] + 100 * new
            order.append(f"{name}{i}")

        return measure.Step(run, distinct)

    rows = [complexity.Row("x-y", name, {}) for name in "ab"]
    monkeypatch.setattr(complexity.Row, "build", lambda row, args: step_of(row.name))
    complexity.measure_time(rows, complexity.parse_args(["--repeats", "3", "--device", "cpu"]))
    assert [row.seconds for row in rows] == [2, 4]
    assert " ".join(order) == "a0 a2 b0" + " b0 a0 a1 b1 b2 a2"


def test_peak_memory_on_cuda_is_that_of_steps_after_the_warm_up(monkeypatch):
    """A fake allocator: the network takes 1 MiB, the first call with each number 50 MiB, step i later 2 + i MiB."""
    peak, calls = [0], []
    cuda = {"empty_cache": lambda: None, "max_memory_allocated": lambda device: peak[0] * 2**20}
    cuda |= {"reset_peak_memory_stats": lambda device: peak.__setitem__(0, 1)}
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)

    def run(i):
        peak[0] = max(peak[0], 3 + i if i in calls else 51)
        calls.append(i)

    assert measure.peak_memory(lambda: measure.Step(run, [0, 3]), "cuda") == 6
    assert calls == [0, 3, 0, 3]


@pytest.mark.parametrize(("num_paths", "sets"), [(0, 1), (1, 4), (2, 6), (4, 1)])
def test_every_set_of_paths_is_among_the_distinct_steps(monkeypatch, num_paths, sets):
    """Once each. Twenty steps sample all sets of 4 candidate paths."""
    seen = []
    monkeypatch.setattr(
        steps, "fcfd_terms", lambda flow, *_: seen.append(tuple(flow.mixed)) or {"": flow.student_logits.sum()}
    )
    options = {"method": "fcfd", "num_paths": num_paths}
    step = steps.build_step("resnet14-resnet8", options, smoke_settings("--repeats", "20"))
    step.run_distinct()
    assert len(seen) == len(set(seen)) == sets
    for i in range(20):
        step.run(i)
    assert len(set(seen)) == sets


@pytest.mark.parametrize("method", ["kd", "dkd", "app", "reviewkd", "crd", "fcfd", "plain"])
def test_step_trains_only_the_student(monkeypatch, method):
    built = {}
    for module in (cifar100, baseline_cifar100):
        monkeypatch.setattr(module, "build", lambda name, n: built.setdefault(name, build(name, n)))
    settings = smoke_settings("--methods", method, *(["--num-paths", "4"] if method in complexity.WITH_PATHS else []))
    _, row = complexity.rows_of("resnet14-resnet8", settings)
    step = row.build(settings)
    teacher, student = built["resnet14"], built["resnet8"]
    before = [[p.detach().clone() for p in net.parameters()] for net in (teacher, student)]
    seen_by_teacher = teacher.bn1.running_mean.clone()
    step.run(0)
    assert torch.equal(teacher.bn1.running_mean, seen_by_teacher) == (method == "crd")  # evaluation mode
    same = [
        [torch.equal(p, q) for p, q in zip(net.parameters(), old, strict=True)]
        for net, old in zip((teacher, student), before, strict=True)
    ]
    assert all(same[0])
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(same[1])
    channels_last = student.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert channels_last == (method != "plain")


KD, APP = ("task", "kd"), ("task", "kd", "app")
FUNC, PRIME = ("func_l2", "func_kl"), ("func_prime",)
INTO_TEACHER, ALL = {(2, 1), (3, 1)}, {(2, 0), (2, 1), (3, 0), (3, 1)}


@pytest.mark.parametrize(
    ("options", "terms", "num_paths", "candidates"),
    [
        ({"method": "kd"}, KD, 0, set()),
        ({"method": "kd", "kd_loss": "dkd"}, KD, 0, set()),
        ({"method": "app"}, APP, 0, set()),
        ({"method": "fcfd"}, APP + FUNC + PRIME, 2, ALL),
        ({"method": "fcfd", "num_paths": 3}, APP + FUNC + PRIME, 3, ALL),
        ({"method": "fcfd", "positions": [3]}, APP + FUNC + PRIME, 2, {(3, 0), (3, 1)}),
        ({"method": "fcfd", "positions": [4], "w_func_prime": 0}, APP + FUNC[1:], 1, {(4, 1)}),
        ({"method": "app", "w_func_partial": 5}, (*APP, "func_partial"), 2, INTO_TEACHER),
    ],
)
def test_step_is_that_of_the_run(monkeypatch, options, terms, num_paths, candidates):
    """Terms, bridges, and paths are the same as in cifar100.py."""
    requested = {}

    def fake_terms(flow, labels, temperature, terms, kd_loss):
        requested.update(
            terms=tuple(terms), dkd=kd_loss is not steps.kl, paths=list(flow.mixed), bridged=list(flow.s2t)
        )
        return {"task": flow.student_logits.sum()}

    monkeypatch.setattr(steps, "fcfd_terms", fake_terms)
    step = steps.build_step("resnet14-resnet8", options, smoke_settings("--repeats", "9"))
    sampled = set()
    for i in range(9):
        step.run(i)
        assert len(requested["paths"]) == num_paths
        sampled |= set(requested["paths"])
    assert sampled == candidates
    assert requested["terms"] == terms
    assert requested["dkd"] == (options.get("kd_loss") == "dkd")
    assert requested["bridged"] == ([2, 3, 4] if "app" in terms else [])


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_teacher_mode_is_that_of_the_run(monkeypatch, statistics):
    built = {}
    monkeypatch.setattr(cifar100, "build", lambda name, n: built.setdefault(name, build(name, n)))
    options = {"method": "kd", "teacher_bn": statistics}
    steps.build_step("resnet14-resnet8", options, smoke_settings()).run(0)
    assert built["resnet14"].bn1.running_mean.any() == (statistics == "batch")
    assert built["resnet8"].bn1.running_mean.any()


@pytest.mark.parametrize(("plain", "expected"), [(False, torch.bfloat16), (True, torch.float32)])
def test_mixed_precision_is_used(monkeypatch, plain, expected):
    seen = []
    monkeypatch.setattr(
        steps, "fcfd_terms", lambda flow, *_, **__: seen.append(flow.student_logits) or {"task": seen[0].sum()}
    )
    steps.build_step("resnet14-resnet8", FCFD, smoke_settings("--amp", "bf16"), plain).run(0)
    assert seen[0].dtype == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--pairs", "resnet14-resnet9"], "resnet8"),
        (["--pairs", "resnet14"], "hyphen"),
        (["--pairs", "vgg13-resnet8"], "stages"),
        (["--num-paths", "5"], "4 candidates"),
        (["--repeats", "0"], "--repeats: 0 must be"),
        (["--batch-size", "0"], "--batch-size: 0 must be"),
        (["--batch-size", "1", "--methods", "reviewkd"], "--batch-size 1"),
        (["--batch-size", "50001", "--methods", "crd"], "50000 images"),
        (["--methods", "kd", "--num-paths", "2"], "add fcfd"),
        (["--methods", "fitnet"], "reviewkd"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, capsys, options, expected):
    assert complexity.main([*options, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()
