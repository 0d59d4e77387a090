"""Where the scripts write, by default and in documented commands: never among committed records."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from ablations import tables
from common.run.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "ablations" / "README.md"]
# Bash runs the commands of a page with this instead of Python: each prints its words on a line.
STUB = 'python() { printf \'%s\\037\' "$@"; echo; }; torchrun() { python "$@"; }\n'
# These need trained networks, which no record has: they also write to the folders of the runs.
TRAINED_AGAIN = ("exit_branches", "tsne")


@pytest.fixture(scope="module")
def committed():
    """The folders that have committed files."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {str(Path(line).parent) for line in listed.splitlines()}


def default_folders():
    """The folders in results/ that scripts name in their source, and those that tables.py names after scripts."""
    found = set()
    for file in [*ROOT.glob("*.py"), *ROOT.glob("ablations/*.py")]:
        args, _ = tables.parse_args([], "", file.stem, [])
        found |= {args.out, args.runs}
        written = map(Path, re.findall(r'"(results/[\w./-]+)"', file.read_text()))
        found |= {path.parent if path.suffix else path for path in written}
    return {str(folder) for folder in found}


def documented_commands(page, folder):
    """The words of each command of a page, in code blocks and between backticks, as Python would get them."""
    text = page.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    spans = re.findall(r"`(?:python )?([\w/]+\.py(?: [^`]*)?)`", re.sub(r"```.*?```", "", text, flags=re.S))
    script = "\n".join([STUB, *blocks, *(f"python {span}" for span in spans)])
    options = {"cwd": folder, "env": {"PATH": ""}, "capture_output": True, "text": True, "check": False}
    printed = subprocess.run(["/bin/bash", "-c", script], **options).stdout
    return [line.split("\x1f")[:-1] for line in printed.splitlines()]


def folders_of_table(script, words, monkeypatch):
    """The folders of a script that calls tables.parse_args; none for another script, or if it refuses the words."""
    found, parse_args = [], tables.parse_args

    def stop(*args):
        parsed, _ = parse_args(*args)
        found.append(parsed.out)
        if script in TRAINED_AGAIN:
            found.append(parsed.runs / f"{parsed.pairs[0].split('-')[0]}-branches-seed{parsed.seeds[0]}")
        raise UserError("not to be run")

    with monkeypatch.context() as patch:
        patch.setattr(tables, "parse_args", stop)
        importlib.import_module(f"ablations.{script}").main(words)
    return found


def test_default_output_folders_have_no_committed_files(committed):
    folders = default_folders()
    assert folders > {f"results/{name}" for name in ("toy", "complexity", "complexity/methods", "curves", "agreement")}
    assert not folders & committed


def test_documented_commands_do_not_write_to_committed_folders(committed, tmp_path, monkeypatch):
    """Neither to their --out, nor to the default folder of a table with their other options."""
    with_out, of_tables = 0, set()
    monkeypatch.chdir(tmp_path)
    sources = {file.stem: file.read_text() for file in ROOT.glob("ablations/*.py")}
    tabular = {name for name, source in sources.items() if "tables." in source and "__main__" in source}
    for page in PAGES:
        for script, *words in documented_commands(page, tmp_path):
            folders = [Path(words[i + 1]) for i, word in enumerate(words[:-1]) if word == "--out"]
            with_out += len(folders)
            if (name := Path(script).stem) in tabular:
                folders += folders_of_table(name, words, monkeypatch)
                of_tables.add(name)
            for folder in folders:
                written = str(folder.parent if folder.suffix in (".md", ".png") else folder)
                assert written not in committed, (page.name, script, words)
    assert with_out >= 5
    assert of_tables >= {"compare", "components", "loss_terms", "exit_branches", "num_paths"}
