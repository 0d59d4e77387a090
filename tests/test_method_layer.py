"""The method's modules can be copied into another project, and importing them loads only what they need."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cifar100

ROOT = Path(cifar100.__file__).parent
MODULES = ["bridges", "fcfd", "losses", "multipath_bn", "paths", "plan", "randomness", "simkd"]
FILES = [*(ROOT / "common" / f"{name}.py" for name in MODULES), *sorted((ROOT / "common" / "models").glob("*.py"))]

STEP = """
import torch
from vendored.bridges import build_bridges
from vendored.fcfd import EQ_9, fcfd_terms, forward_paths
from vendored.models import build
from vendored.multipath_bn import plain_state_dict, track_paths
from vendored.paths import candidate_paths, sample_paths
from vendored.simkd import build_simkd

for simkd in (False, True):
    teacher, student = build("resnet14", 10).requires_grad_(False), build("resnet8", 10)
    if simkd:
        student = build_simkd(student, teacher, 32)
    bridges, candidates = build_bridges(teacher, student, 32), candidate_paths(4)
    for net in (teacher, student):
        track_paths(net, {path.k for path in candidates})
    optimizer = torch.optim.SGD([*student.parameters(), *bridges.parameters()], 0.01)
    [[paths]] = [sample_paths(candidates, 2, steps=1, seed=1, epoch=0)]
    flow = forward_paths(teacher, student, bridges, torch.randn(4, 3, 32, 32), paths)
    loss = sum(fcfd_terms(flow, torch.arange(4), 4.0, EQ_9).values())
    loss.backward()
    optimizer.step()
    print(loss.isfinite().item(), len(plain_state_dict(student)) < len(student.state_dict()))
"""


def python(code, cwd):
    """Run code in a process that finds only installed modules and those in `cwd`; returns its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", f"import sys\n{code}"]  # the working directory is on sys.path
    completed = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_modules_work_in_another_package(tmp_path):
    package = tmp_path / "vendored"
    (package / "models").mkdir(parents=True)
    for file in FILES:
        shutil.copy(file, package / file.relative_to(ROOT / "common"))
    assert python(STEP, tmp_path) == "True True\n" * 2


def test_importing_fcfd_loads_no_networks_or_script_modules():
    code = "import torch\nbefore = set(sys.modules)\nimport common.fcfd\nprint(*(set(sys.modules) - before))"
    loaded = python(code, ROOT).split()
    needed = {
        f"common.{name}" for name in ("bridges", "fcfd", "losses", "models", "multipath_bn", "paths", "randomness")
    }
    assert {name for name in loaded if name.startswith("common.")} == needed | {"common.models.staged"}
    assert not {"torchvision", "PIL", "yaml", "tqdm"} & {name.split(".")[0] for name in loaded}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_import_only_torch_torchvision_numpy_and_each_other(file):
    def check_relative(module, level):
        folder = file.parents[level - 1]
        path = folder.joinpath(*module.split(".")) if module else folder
        assert path.with_suffix(".py") in FILES or path / "__init__.py" in FILES, f"{'.' * level}{module}"

    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            if node.level and node.module:
                check_relative(node.module, node.level)
            elif node.level:
                for alias in node.names:
                    check_relative(alias.name, node.level)
            else:
                names = [node.module]
        for name in names:
            package = name.split(".")[0]
            assert package in sys.stdlib_module_names | {"torch", "torchvision", "numpy"}, name
