"""Where the scripts write by default: never among committed records."""

import re
import subprocess
from pathlib import Path

import pytest

from ablations import tables

ROOT = Path(__file__).parents[1]


def default_folders():
    """The folders in results/ that scripts name in their source, and those that tables.py names after scripts."""
    found = set()
    for file in [*ROOT.glob("*.py"), *ROOT.glob("ablations/*.py")]:
        args, _ = tables.parse_args([], "", file.stem, [])
        found |= {args.out, args.runs}
        written = map(Path, re.findall(r'"(results/[\w./-]+)"', file.read_text()))
        found |= {path.parent if path.suffix else path for path in written}
    return {str(folder) for folder in found}


def test_default_output_folders_have_no_committed_files():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    committed = {str(Path(line).parent) for line in listed.splitlines()}
    folders = default_folders()
    assert folders > {f"results/{name}" for name in ("toy", "complexity", "complexity/methods", "curves", "agreement")}
    assert not folders & committed
