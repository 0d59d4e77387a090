"""compare.py --table, and the tables on ImageNet and COCO: ablations/benchmarks.py."""

import csv
import json
from argparse import Namespace

import pytest
import torch
from running import write_images

import detection
from ablations import benchmarks, compare, tables
from ablations.benchmarks import DETECTION, IMAGENET
from ablations.cells import Cell
from ablations.rows import grid
from common.detection import synthetic
from common.run.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory in which tables of both datasets were written with --smoke."""
    folder = tmp_path_factory.mktemp("benchmarks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for table, methods in (
            ("2", ["baseline-kd", "fcfd"]),
            ("3", ["alone", "baseline-fgfi"]),
            ("7", ["fcfd-inherit"]),
        ):
            assert compare.main(["--smoke", "--table", table, "--methods", *methods]) == 0
            for file in (*folder.rglob("*.pt"), *folder.rglob("student_best.pth")):
                file.unlink()  # they take gigabytes
    return folder


@pytest.mark.parametrize(
    ("benchmark", "table", "methods", "runs"),
    [
        (IMAGENET, "2", {"baseline-kd": "KD", "fcfd": "FCFD"}, 3),
        (DETECTION, "3", {"alone": "alone", "baseline-fgfi": "FGFI"}, 2),
        (DETECTION, "7", {"fcfd-inherit": "FCFD, inheriting"}, 2),
    ],
)
def test_smoke(folder, monkeypatch, capsys, benchmark, table, methods, runs):
    smoke, pair = f"smoke-{benchmark.name}", benchmark.smoke_pair
    out = folder / "results" / "compare" / smoke / f"table{table}"
    lines = (out / "table.md").read_text().splitlines()
    cells = {cell["method"]: cell for cell in csv.DictReader((out / "cells.csv").open())}
    assert list(cells) == list(methods)
    for (method, title), line in zip(methods.items(), lines[2:], strict=False):
        network = pair if method != "alone" else pair.split("-")[1]
        result = json.loads(
            (folder / "results" / "runs" / smoke / f"{network}-{method}-seed1" / "result.json").read_text()
        )
        texts = [f"{result['last'][key]:.2f} / {result['best'][key]:.2f}" for key in benchmark.metrics]
        assert line == "| " + " | ".join([title, *texts]) + " |"
        for key in benchmark.metrics:
            assert float(cells[method][benchmark.column("last", key)]) == result["last"][key]
        alone = [
            text for key in benchmark.metrics for text in (f"{result[which][key]:.2f}" for which in ("last", "best"))
        ]
        assert f"| {pair} | {title} | 1 | " + " | ".join(alone) + " |  |" in lines
    monkeypatch.chdir(folder)
    before = (out / "table.md").read_text()
    assert compare.main(["--smoke", "--table", table, "--methods", *methods]) == 0
    assert f"{runs} runs, {runs} already finished" in capsys.readouterr().out
    assert (out / "table.md").read_text() == before


def cells_of(table, *options):
    """The runs of a table, with the names of its rows."""
    choose = lambda args: (compare.TABLES[table][0].benchmark, compare.PAIRS[table])  # noqa: E731
    args, given = tables.parse_args([str(word) for word in options], "", "some", [], choose=choose)
    return grid(args, given, compare.TABLES[table])


def test_teachers_with_weights_for_the_classes_are_downloaded(tmp_path, monkeypatch, capsys):
    def teachers():
        cells = cells_of("2", "--data-dir", tmp_path / "images", "--amp", "off")
        found = [
            (cells[pair, "fcfd", 1].after, "teacher_ckpt" in cells[pair, "fcfd", 1].given)
            for pair in compare.PAIRS["2"]
        ]
        return [(after and after.given["student"], named) for after, named in found]

    write_images(tmp_path / "images", {"train": 1, "val": 1})
    assert teachers() == [("resnet34", True), ("resnet50", True)]
    classes = [f"n{i}" for i in range(1000)]
    for split in ("train", "val"):
        for name in classes:
            (tmp_path / "images" / split / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "images" / split / name / "0.JPEG").touch()
    for name in ("n1", "n2", "n3"):  # from write_images
        assert (tmp_path / "images" / "train" / name).exists()
    assert teachers() == [(None, False), (None, False)]

    def offline(network, weights):
        raise UserError(f"cannot download {network} {weights}: no network")

    monkeypatch.setattr(benchmarks, "torchvision_weights", offline)
    options = ["--table", "2", "--data-dir", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    assert compare.main(options) == 2
    assert capsys.readouterr().err == "error: cannot download resnet34 IMAGENET1K_V1: no network\n"
    assert not (tmp_path / "out").exists()


def test_detectors_are_the_teachers_of_other_rows(tmp_path):
    synthetic.write(tmp_path / "coco", {"train": 4, "val": 2})
    cells = cells_of("3", "--data-dir", tmp_path / "coco", "--amp", "off", "--iterations", 4, "--out", tmp_path)
    teacher = cells["resnet50-mobilenet_v2", "fcfd", 1].after
    assert teacher is cells["resnet101-resnet50", "alone", 1]  # trained once, as a student and as a teacher
    assert teacher.folder == tmp_path / "resnet50-alone-seed1"
    assert cells["resnet50-mobilenet_v2", "baseline-reviewkd", 1].given["teacher_ckpt"] == str(teacher.network)
    longer = cells_of("3", "--data-dir", tmp_path / "coco", "--iterations", 4, "--teacher-epochs", 8, "--out", tmp_path)
    assert longer["resnet101-resnet18", "kd", 1].after.folder == tmp_path / "resnet101-alone-8it-seed1"


@pytest.mark.parametrize(("table", "teacher"), [("2", "resnet34"), ("3", "resnet50")])
def test_invalid_teacher_is_reported_before_training(tmp_path, capsys, table, teacher):
    file, data = tmp_path / "teacher.pth", tmp_path / "data"
    torch.save({"model": {"weight": torch.zeros(2)}}, file)
    if table == "2":
        write_images(data, {"train": 2, "val": 1})
    else:
        synthetic.write(data, {"train": 4, "val": 2})
    pair = "resnet34-resnet18" if table == "2" else "resnet50-mobilenet_v2"
    options = ["--table", table, "--pairs", pair, "--data-dir", str(data), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert compare.main([*options, "--batch-size", "2", "--teacher-ckpt", f"{teacher}={file}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert str(file) in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_interrupted_smoke_data_is_written_again(tmp_path, monkeypatch):
    def interrupted(folder):
        write(folder)
        next(folder.glob("val/*/*.JPEG")).unlink()
        raise KeyboardInterrupt

    write = IMAGENET.write_smoke_data
    options = ["--smoke", "--table", "2", "--methods", "fcfd", "--out", str(tmp_path)]
    monkeypatch.setattr(IMAGENET, "write_smoke_data", interrupted)
    assert compare.main(options) == 130
    monkeypatch.setattr(IMAGENET, "write_smoke_data", write)
    sizes = []
    monkeypatch.setattr(tables, "run", lambda args, cells, finish: sizes.append(len(data_of(cells).test)))
    assert compare.main(options) == 0
    assert sizes == [20]
    assert compare.main(["--smoke", "--table", "7", "--out", str(tmp_path)]) == 0  # has its own data
    assert sizes == [20, 2]


def data_of(cells):
    cell = next(iter(cells.values()))
    return cell.benchmark.load(cell.given)


@pytest.mark.parametrize("key", ["AP", "AP75"])
def test_run_without_all_metrics_is_not_finished(tmp_path, key):
    cell = Cell(tmp_path, {"student": "resnet18"}, script=detection)
    scores = {"iteration": 4, "AP": 1.0, "AP50": 2.0, "AP75": 0.5}
    result = {"iteration": 4, "iterations": 4, "last": scores, "best": scores, "teacher": None, "seconds": 1}
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert cell.result() == result
    (tmp_path / "result.json").write_text(json.dumps(result | {"last": {k: v for k, v in scores.items() if k != key}}))
    assert cell.result() is None


def test_folders_are_named_after_the_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def folders(benchmark, *options):
        choose = lambda args: (benchmark, ["a-b"])  # noqa: E731
        args, _ = tables.parse_args([*options, "--amp", "off"], "", "some", [], choose=choose)
        return str(args.out), str(args.runs)

    name = "imagenet-100ep-off-image_size=64"
    assert folders(IMAGENET, "--image-size", "64", "--workers", "3") == (f"results/some/{name}", f"results/runs/{name}")
    name = "tiny-subset5-90it-off"
    options = ["--data-dir", "x/tiny", "--subset", "5", "--iterations", "90", "--eval-every", "9"]
    assert folders(DETECTION, *options) == (f"results/some/{name}", f"results/runs/{name}")


def test_every_row_of_a_table_has_a_title():
    for rows in compare.TABLES.values():
        for row in rows:
            title = compare.title(row.name, row.benchmark)
            assert title != row.name or row.name.startswith("online-") or title == "alone"


def test_detectors_need_matching_fpns_to_inherit():
    for student, fits in (("resnet50", True), ("resnet18", False)):
        args = Namespace(teacher="resnet101", student=student, inherit=True, min_size=[96])
        if fits:
            DETECTION.check(None, args)
        else:
            with pytest.raises(UserError, match="matching FPNs"):
                DETECTION.check(None, args)


def test_published_figures_on_imagenet_need_all_of_its_images(tmp_path, monkeypatch):
    write_images(tmp_path, {"train": 2, "val": 1})
    monkeypatch.setattr(IMAGENET, "downloads", lambda settings: ("resnet34", "resnet50"))
    options = ["--table", "2", "--data-dir", str(tmp_path), "--amp", "off"]
    options += ["--methods", "baseline-at", "baseline-ofd", "fcfd"]

    def figures(*more):
        found = []
        monkeypatch.setattr(tables, "run", lambda args, cells, finish: found.append(compare.published_figures(cells)))
        assert compare.main([*options, *more]) == 0
        return found[0]

    assert figures() == {}
    monkeypatch.setattr(compare, "IMAGENET_IMAGES", 6)
    compare.all_of_imagenet.cache_clear()
    known = {"baseline-at": "70.70 / 90.00 (?)", "baseline-ofd": "setting not published", "fcfd": "72.25 (best)"}
    found = figures()
    assert found["resnet34-resnet18"] == known
    assert found["resnet50-MobileNetV1"]["baseline-ofd"] == "71.25 / 90.34 (best)"
    assert figures("--epochs", "50") == {}
    (tmp_path / "mine.pth").touch()
    assert list(figures("--teacher-ckpt", f"resnet34={tmp_path / 'mine.pth'}")) == ["resnet50-MobileNetV1"]


def test_rows_of_the_papers_tables():
    names = {table: [row.name for row in rows] for table, rows in compare.TABLES.items()}

    def baselines(*methods):
        return [f"baseline-{method}" for method in methods]

    assert names == {
        "1": [*baselines("alone", "kd", "fitnet", "vid", "crd", "dkd", "reviewkd"), "fcfd"],
        "2": ["alone", *baselines("kd", "at", "ofd", "srrl", "crd", "dkd", "reviewkd"), "fcfd"],
        "3": ["alone", "kd", *baselines("fgfi", "reviewkd"), "fcfd"],
        "4": ["fcfd", "baseline-dkd", "fcfd-dkd", "baseline-simkd", "fcfd-simkd", "fcfd-dkd-simkd"],
        "7": ["alone", "fcfd", "fcfd-inherit"],
        "9": ["online-kd", "online-dml", "online-fcfd"],
    }


def test_methods_select_rows_of_the_table(tmp_path, capsys, monkeypatch):
    names = []
    monkeypatch.setattr(tables, "run", lambda args, cells, finish: names.extend(name for _, name, _ in cells))
    options = ["--table", "4", "--pairs", "resnet14-resnet8", "--out", str(tmp_path), "--methods"]
    assert compare.main([*options, "fcfd", "baseline-dkd"]) == 0
    assert names == ["fcfd", "baseline-dkd"]
    assert compare.main([*options, "kd"]) == 2
    assert "the rows of --table 4 are fcfd, baseline-dkd," in capsys.readouterr().err


def test_each_paper_table_has_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "run", lambda args, cells, finish: places.append((args.out, args.runs)))
    places = []
    assert compare.main(["--table", "4", "--pairs", "resnet14-resnet8", "--out", str(tmp_path)]) == 0
    assert places == [(tmp_path / "table4", tmp_path)]
