"""ablations/curves.py."""

import sys

import pytest
from PIL import Image

from ablations import curves


def write_run(folder, values):
    folder.mkdir()
    rows = "".join(f"{epoch},{value},\n" for epoch, value in enumerate(values, 1))
    (folder / "log.csv").write_text("epoch,test_top1,app\n" + rows)
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / name, v)
        for name, v in (("a-seed1", [1, 2]), ("a-seed2", [3, 5, 9]), ("b-seed10-x$y$", [7, 7]))
    ]


def test_runs_that_differ_only_in_the_seed_are_grouped(runs):
    groups = curves.group(runs, "test_top1")
    assert groups == {"a": [{1: 1, 2: 2}, {1: 3, 2: 5, 3: 9}], "b-seed10-x$y$": [{1: 7, 2: 7}]}
    assert curves.mean_curve(groups["a"]) == {1: 2, 2: 3.5}


def test_empty_cells_are_omitted(tmp_path):
    """As in the logs of detection.py, which tests its network less often than it writes a row."""
    for name, rows in (("d-seed1", "250,\n500,3\n750,\n1000,5\n"), ("d-seed2", "500,4\n1000,\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text("iteration,AP\n" + rows)
    groups = curves.group([tmp_path / "d-seed1", tmp_path / "d-seed2"], "AP")
    assert groups == {"d": [{500: 3, 1000: 5}, {500: 4}]}
    assert curves.mean_curve(groups["d"]) == {500: 3.5}


def test_equal_names_in_different_folders_are_not_grouped(tmp_path, runs):
    (tmp_path / "other").mkdir()
    other = write_run(tmp_path / "other" / "a-seed1", [8])
    groups = curves.group([runs[0], other, runs[0]], "test_top1")
    assert groups == {f"{tmp_path.name}/a": [{1: 1, 2: 2}], "other/a": [{1: 8}]}


def test_figure_has_a_panel_per_column(tmp_path, runs):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "curves.png"
    assert curves.main([*map(str, runs), "--columns", "test_top1", "epoch", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.width > 1.5 * picture.height  # two panels
        assert len(picture.convert("RGB").getcolors(10**6)) > 10  # not empty


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["missing"], "missing"),
        (["a-seed1", "--columns", "bogus"], "it has epoch, test_top1, app"),
        (["a-seed1", "--columns", "app"], "no numbers"),
        (["a-seed1", "--out", "curves.bogus"], "curves.bogus"),
        (["a-seed1", "--out", "curves"], ".png"),
        (["empty"], "no epochs"),
        (["ragged"], "no column test_top1"),
        (["a-seed1", "--out", "a-seed1/log.csv/curves.png"], "log.csv"),
        ([], "RUN"),
    ],
)
def test_invalid_input_exits_with_one_line_error(tmp_path, runs, capsys, monkeypatch, options, expected):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "empty", [])
    write_run(tmp_path / "ragged", []).joinpath("log.csv").write_text("epoch,loss\n1,2,3\n")
    assert curves.main(options) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


def test_missing_matplotlib_is_reported(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert curves.main([str(runs[0])]) == 2
    assert "requirements-extra.txt" in capsys.readouterr().err
