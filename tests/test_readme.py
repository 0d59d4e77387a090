"""What the README says about the code holds."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cifar100
import detection
import imagenet
import online_kd
from ablations import compare
from common.run.cost import added_cost

ROOT = Path(cifar100.__file__).parent
TORCHRUN = "--nnodes --node_rank --nproc_per_node --master_addr --master_port"  # options of torchrun, named there too
README = (ROOT / "README.md").read_text()
OF_ABLATIONS = (ROOT / "ablations" / "README.md").read_text()
MODULES = [importlib.import_module(f"ablations.{path.stem}") for path in sorted(ROOT.glob("ablations/*.py"))]
ABLATIONS = [module for module in MODULES if "__main__" in Path(module.__file__).read_text()]  # the scripts


def test_the_worked_network_can_be_added_as_told(tmp_path):
    shutil.copy(ROOT / "cifar100.py", tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    network, names = re.findall(r"```python\n(.*?)```", README, re.S)
    models = tmp_path / "common" / "models"
    (models / "tiny.py").write_text(network)
    (models / "__init__.py").write_text((models / "__init__.py").read_text() + "\n\n" + names)
    options = "--dataset synthetic --subset 40 --test-subset 20 --epochs 1 --batch-size 20 --device cpu"
    command = [sys.executable, "cifar100.py", "--teacher", "resnet8", "--student", "Tiny", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Tiny lies in" in done.stdout


def test_files_and_functions_it_names_are_there():
    scripts = "cifar100|imagenet|online_kd|detection"
    named = rf"((?:common|docs|ablations|results)/[\w/.-]+|(?:{scripts})\.py|requirements[\w-]*\.txt)"
    for path in re.findall(rf"`{named}`|\]\({named}\)|python {named}", README + OF_ABLATIONS):
        name = "".join(path)
        assert (ROOT / name).exists() or name == "common/models/tiny.py", name  # that one is the reader's to write
    rows = re.findall(r"\| (`\w[^|]*`) in `([\w/.]+\.py)` \|", README)
    assert len(rows) >= 9
    for names, path in rows:
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b", (ROOT / path).read_text()), (name, path)


def test_options_it_names_exist(capsys):
    for script in (cifar100, imagenet, online_kd, detection, *ABLATIONS):
        with pytest.raises(SystemExit):
            script.main(["--help"])
    known = capsys.readouterr().out + TORCHRUN
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README + OF_ABLATIONS)):
        assert option in known, option


def test_commands_have_options_of_their_own_script(capsys):
    """Each line that calls a script is held against its --help, and cifar100.py's where that takes its options too."""

    def options_of(module):
        with pytest.raises(SystemExit):
            module.main(["--help"])
        text = capsys.readouterr().out
        return text + (options_of(cifar100) if "Any other option is one of cifar100.py" in text else "")

    modules = {Path(module.__file__).name: module for module in (cifar100, imagenet, online_kd, detection, *ABLATIONS)}
    helps = {name: options_of(module) for name, module in modules.items()}
    calls = re.findall(r"(?:ablations/|python |\d |`)(\w+\.py)((?: [^`#|\n]*)?)", README + OF_ABLATIONS)
    seen = set()
    for name, words in calls:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", words):
            assert re.search(rf"{option}\b", helps[name]), (name, option)
            seen.add(name)
    assert seen >= {
        "cifar100.py",
        "imagenet.py",
        "online_kd.py",
        "detection.py",
        "compare.py",
        "components.py",
        "complexity.py",
    }


def test_every_script_of_a_table_or_figure_is_named():
    assert len(ABLATIONS) >= 14
    for module in ABLATIONS:
        name = module.__name__.rpartition(".")[2]
        assert f"`ablations/{name}.py`" in README
        assert f"`{name}.py" in OF_ABLATIONS


def test_published_figures_are_those_of_compare():
    rows = re.findall(r"^\| (\w+-\w+) \|((?: [\d.]+ \|){9})", README, re.M)
    figures = {pair: [float(figure) for figure in re.findall(r"[\d.]+", line)] for pair, line in rows}
    assert figures == compare.PUBLISHED["pairs"]


def test_published_pairs_are_the_settings():
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|$", README, re.M)
    pairs = {f"{teacher}-{student}" for teacher, students in rows for student in re.findall(r"`(\w+)`", students)}
    assert pairs == set(cifar100.SETTINGS["pairs"])
    named = re.findall(r"imagenet\.py --data-dir DIR --teacher (\w+) --student (\w+)", README)
    assert {f"{teacher}-{student}" for teacher, student in named} == set(imagenet.SETTINGS["pairs"])


def test_simkds_cost_is_as_counted():
    number, share = r"([\d,.]+)[kM]", r"\(([\d.]+) %\)"
    rows = re.findall(
        rf"^\| (\w+) \| (\w+) \| {number} \| {number} {share} \| {number} \| {number} {share} \|$", README, re.M
    )
    assert {f"{teacher}-{student}" for teacher, student, *_ in rows} == set(cifar100.SETTINGS["pairs"])
    for teacher, student, *written in rows:
        counted = []
        for before, after in zip(*added_cost(student, teacher, num_classes=100, image_size=32), strict=True):
            unit = 1e6 if counted else 1e3
            counted += [f"{before / unit:,.1f}", f"{(after - before) / unit:,.1f}", f"{100 * (after / before - 1):.1f}"]
        assert written == counted
