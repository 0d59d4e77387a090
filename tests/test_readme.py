"""The documentation matches the code, and its examples run."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import read_log

import cifar100
import detection
import imagenet
import online_kd
from ablations import compare
from common.models import build
from common.run.cost import added_cost

ROOT = Path(cifar100.__file__).parent
TORCHRUN = "--nnodes --node_rank --nproc_per_node --master_addr --master_port"  # torchrun's options
EXAMPLE_OPTIONS = ("--w-cosine",)  # from the README's example loss term
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "ablations" / "README.md"]
README, ABLATIONS_README = PAGES[0].read_text(), PAGES[-1].read_text()
TEXT = "\n".join(page.read_text() for page in PAGES)
LOOP, TERM, NETWORK, REGISTRATION = re.findall(r"```python\n(.*?)```", README, re.S)
MODULES = [importlib.import_module(f"ablations.{path.stem}") for path in sorted(ROOT.glob("ablations/*.py"))]
ABLATIONS = [module for module in MODULES if "__main__" in Path(module.__file__).read_text()]  # the scripts


SMALL = "--dataset synthetic --subset 40 --test-subset 20 --batch-size 20 --device cpu --out runs/student"


@pytest.fixture
def project_copy(tmp_path):
    """A copy of the scripts and of common/."""
    shutil.copytree(ROOT / "common", tmp_path / "common")
    for name in ("cifar100.py", "imagenet.py", "online_kd.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def python(folder, *args):
    completed = subprocess.run(
        [sys.executable, *map(str, args)], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_training_loop_runs_verbatim(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(LOOP.splitlines()) <= 30
    loader = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(2)]
    exec(LOOP, {"teacher": build("resnet14", 10), "student": build("resnet8", 10), "loader": loader, "epochs": 1})
    build("resnet8", 10).load_state_dict(torch.load("student.pth")["model"])


def test_training_loop_of_a_baseline_runs_verbatim():
    [loop] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "baselines.md").read_text(), re.S)
    loader = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,)), torch.arange(4)) for _ in range(2)]
    student = build("resnet8", 10)
    before = [p.clone() for p in student.parameters()]
    exec(loop, {"teacher": build("resnet14", 10), "student": student, "loader": loader, "epochs": 1})
    assert not any(torch.equal(p, old) for p, old in zip(student.parameters(), before, strict=True))


def test_example_term_can_be_added(project_copy, teacher):
    """The term is trained, logged, and warmed up; the other scripts have its option too."""
    with open(project_copy / "common" / "fcfd.py", "a") as file:
        file.write(f"\n\n{TERM}")
    options = f"--teacher resnet14 --student resnet8 --teacher-ckpt {teacher / 'student.pth'} --w-cosine 2 {SMALL}"
    # The warm-up takes 1/12 of 24 epochs; the run stops after the first epoch.
    python(project_copy, "cifar100.py", *options.split(), "--epochs", 24, "--max-minutes", 1e-9)
    [row] = read_log(project_copy / "runs" / "student")
    weights = {"task": 1, "kd": 1, "app": 2.5, "func_l2": 2.5, "func_kl": 1, "func_prime": 1, "cosine": 0.5 * 2}
    assert float(row["cosine"]) > 0
    assert float(row["loss"]) == pytest.approx(sum(w * float(row[name]) for name, w in weights.items()), rel=1e-4)
    code = "from contextlib import suppress\nimport imagenet, online_kd\nfor script in (imagenet, online_kd):"
    code += "\n    with suppress(SystemExit):\n        script.parse_args(['--help'])"
    assert python(project_copy, "-c", code).count("--w-cosine") >= 2 * 2  # in the usage and in the list of options


def test_example_network_can_be_added(project_copy):
    models = project_copy / "common" / "models"
    (models / "tiny.py").write_text(NETWORK)
    (models / "__init__.py").write_text(f"{(models / '__init__.py').read_text()}\n\n{REGISTRATION}")
    python(project_copy, "cifar100.py", *f"--teacher resnet8 --student Tiny --epochs 1 {SMALL}".split())
    assert (project_copy / "runs" / "student" / "student.pth").exists()


def test_named_files_and_functions_exist():
    scripts = "cifar100|imagenet|online_kd|detection"
    named = rf"((?:common|docs|ablations|results)/[\w/.-]+|(?:{scripts})\.py|requirements[\w-]*\.txt)"
    for path in re.findall(rf"`{named}`|python {named}", TEXT):
        name = "".join(path)
        assert (ROOT / name).exists() or name == "common/models/tiny.py", name  # the reader writes this one
    rows = re.findall(r"\| (`\w[^|]*`) in `([\w/.]+\.py)` \|", README)
    assert len(rows) >= 9
    for names, path in rows:
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b", (ROOT / path).read_text()), (name, path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_targets(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_named_options_exist(capsys):
    for script in (cifar100, imagenet, online_kd, detection, *ABLATIONS):
        with pytest.raises(SystemExit):
            script.main(["--help"])
    known = capsys.readouterr().out + TORCHRUN
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", TEXT)) - set(EXAMPLE_OPTIONS):
        assert option in known, option


def test_commands_use_their_scripts_options(capsys):
    """Options in commands are in the script's --help, or in cifar100.py's if the script takes its options."""

    def options_of(module):
        with pytest.raises(SystemExit):
            module.main(["--help"])
        text = capsys.readouterr().out
        return text + (options_of(cifar100) if "All other options are those of cifar100.py" in text else "")

    modules = {Path(module.__file__).name: module for module in (cifar100, imagenet, online_kd, detection, *ABLATIONS)}
    helps = {name: options_of(module) for name, module in modules.items()}
    calls = re.findall(r"(?:ablations/|python |\d |`)(\w+\.py)((?: [^`#|\n]*)?)", TEXT)
    seen = set()
    for name, words in calls:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", words):
            assert re.search(rf"{option}\b", helps[name]), (name, option)
            seen.add(name)
    scripts = "cifar100 imagenet online_kd detection compare components complexity"
    assert seen >= {f"{name}.py" for name in scripts.split()}


def test_every_ablation_script_is_documented():
    assert len(ABLATIONS) >= 14
    for module in ABLATIONS:
        name = module.__name__.rpartition(".")[2]
        assert f"`{name}.py" in ABLATIONS_README, name


def test_published_numbers_match_compare():
    rows = re.findall(r"^\| (\w+-\w+) \|((?: [\d.]+ \|){9})", TEXT, re.M)
    figures = {pair: [float(figure) for figure in re.findall(r"[\d.]+", line)] for pair, line in rows}
    assert figures == compare.PUBLISHED["cifar100"]["pairs"]


def test_published_pairs_match_the_settings():
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|$", README, re.M)
    pairs = {f"{teacher}-{student}" for teacher, students in rows for student in re.findall(r"`(\w+)`", students)}
    assert pairs == set(cifar100.SETTINGS["pairs"])
    named = re.findall(r"imagenet\.py --data-dir DIR --teacher (\w+) --student (\w+)", TEXT)
    assert {f"{teacher}-{student}" for teacher, student in named} == set(imagenet.SETTINGS["pairs"])


def test_simkd_cost_matches_the_table():
    number, share = r"([\d,.]+)[kM]", r"\(([\d.]+) %\)"
    rows = re.findall(
        rf"^\| (\w+) \| (\w+) \| {number} \| {number} {share} \| {number} \| {number} {share} \|$", TEXT, re.M
    )
    assert {f"{teacher}-{student}" for teacher, student, *_ in rows} == set(cifar100.SETTINGS["pairs"])
    for teacher, student, *written in rows:
        counted = []
        for before, after in zip(*added_cost(student, teacher, num_classes=100, image_size=32), strict=True):
            unit = 1e6 if counted else 1e3
            counted += [f"{before / unit:,.1f}", f"{(after - before) / unit:,.1f}", f"{100 * (after / before - 1):.1f}"]
        assert written == counted
