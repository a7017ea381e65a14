"""README and what it speaks of stay together."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_test_command_is_the_one_that_ci_runs():
    commands = re.findall(r"^(python3 -m venv .*)$", README, re.MULTILINE)
    assert len(commands) == 2
    assert "quickstart.py" in commands[0]
    assert all(" -c constraints.txt " in command for command in commands)
    assert commands[1] in map(str.strip, (ROOT / ".ci" / "run").read_text().splitlines())


def test_every_file_that_readme_lists_exists():
    tree = re.search(r"## Files\n+```\n(.*?)```", README, re.DOTALL)
    assert tree, "README has a file tree under ## Files"
    folder = ROOT
    for line in tree[1].splitlines():
        name = line.split()[0]
        if line[0] != " ":
            folder = ROOT / name if name.endswith("/") else ROOT
            assert (ROOT / name).exists(), name
        else:
            assert (folder / name).exists(), f"{folder.name}/{name}"


def test_every_package_file_is_in_readme():
    tree = re.search(r"## Files\n+```\n(.*?)```", README, re.DOTALL)[1]
    blocks = dict(re.findall(r"^(\S+/)\n((?: .*\n)+)", tree, re.MULTILINE))
    subpackages = ("serving", "training", "analysis", "experiments")
    libraries = ("modeling_diff", *(f"modeling_diff/{name}" for name in subpackages))
    examples = ("examples/scripts", "examples/benchmarks", "examples/studies")
    rooms = [f"conversion/{path.parent.name}" for path in sorted((ROOT / "conversion").glob("*/__init__.py"))]
    for package in (*libraries, "conversion", *rooms, *examples):
        listed = {line.split()[0] for line in blocks[f"{package}/"].splitlines()}
        files = {path.name for path in (ROOT / package).glob("*.py")}
        assert files - {"__init__.py"} <= listed, package
