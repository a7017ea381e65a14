"""README and what it speaks of stay together."""

import re
import tomllib
from pathlib import Path

import conversion
import modeling_diff


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "developer" / "architecture.md").read_text(encoding="utf-8")
TREE = re.search(r"<!-- tree -->\n```\n(.*?)```", ARCHITECTURE, re.DOTALL)


def test_readme_test_command_is_the_one_that_ci_runs():
    commands = re.findall(r"^(python3 -m venv .*)$", README, re.MULTILINE)
    assert len(commands) == 2
    assert "quickstart.py" in commands[0]
    assert all(" -c constraints.txt " in command for command in commands)
    assert commands[1] in map(str.strip, (ROOT / ".ci" / "run").read_text().splitlines())


def test_every_file_of_the_tree_exists():
    assert TREE, "docs/developer/architecture.md has a file tree"
    folder = ROOT
    for line in TREE[1].splitlines():
        name = line.split()[0]
        if line[0] != " ":
            folder = ROOT / name if name.endswith("/") else ROOT
            assert (ROOT / name).exists(), name
        else:
            assert (folder / name).exists(), f"{folder.name}/{name}"


def test_every_file_of_the_code_is_in_the_tree():
    blocks = dict(re.findall(r"^(\S+/)\n((?: .*\n)+)", TREE[1], re.MULTILINE))
    for top in ("modeling_diff", "conversion", "examples"):
        for folder in {path.parent for path in (ROOT / top).rglob("*.py")}:
            listed = {line.split()[0] for line in blocks[f"{folder.relative_to(ROOT).as_posix()}/"].splitlines()}
            assert {path.name for path in folder.glob("*.py")} <= listed, folder


def test_both_packages_have_one_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == modeling_diff.__version__
    assert conversion.__version__ == modeling_diff.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "modeling_diff.__version__"}


def test_badge_of_python_shows_the_oldest_release_that_installs():
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert f">{oldest.removeprefix('>=')}+<" in (ROOT / "docs" / "assets" / "python.svg").read_text(encoding="utf-8")
