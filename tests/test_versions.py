"""The files that name tested releases agree, and one command renews them together."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
COMPAT = "modeling_diff/diff_transformers_compat.py"
FILES = ("constraints.txt", "pyproject.toml", "README.md", COMPAT)


@pytest.fixture
def copied_project(tmp_path):
    for name in (".ci/versions.py", *FILES):
        target = tmp_path / "project" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return tmp_path / "project"


def versions(project, command, import_first=""):
    environment = os.environ | {"PYTHONPATH": str(import_first)}
    return subprocess.run(
        [sys.executable, str(project / ".ci" / "versions.py"), command],
        capture_output=True,
        text=True,
        env=environment,
    )


def imitate_transformers(folder, version):
    """Makes a folder whose metadata says that this release of transformers is installed."""
    information = folder / f"transformers-{version}.dist-info"
    information.mkdir(parents=True)
    needed = "".join(f"Requires-Dist: {line}\n" for line in importlib.metadata.requires("transformers") or [])
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n{needed}")
    return folder


def test_tested_releases_agree_in_every_file():
    result = versions(ROOT, "check")
    assert result.returncode == 0, result.stderr


def test_renewal_raises_pin_cap_sentence_and_constant_together(copied_project, tmp_path):
    result = versions(copied_project, "renew", imitate_transformers(tmp_path / "installed", "6.1.2"))
    assert result.returncode == 0, result.stderr
    texts = {name: (copied_project / name).read_text(encoding="utf-8") for name in FILES}
    assert "\ntransformers==6.1.2\n" in texts["constraints.txt"]
    assert re.search(r'"transformers>=[0-9.]+,<6\.2"', texts["pyproject.toml"])
    assert re.search(r"transformers [0-9.]+ to 6\.1\.2, torch", texts["README.md"])
    assert 'NEWEST_TESTED_TRANSFORMERS = "6.1.2"' in texts[COMPAT]
    for name in FILES[1:]:  # nothing but versions changed
        before = (ROOT / name).read_text(encoding="utf-8")
        assert len(before.splitlines()) == len(texts[name].splitlines())
        changed = [line for line in texts[name].splitlines() if line not in before.splitlines()]
        assert len(changed) == 1
    assert versions(copied_project, "check").returncode == 0


def test_renewal_refuses_a_pre_release(copied_project, tmp_path):
    result = versions(copied_project, "renew", imitate_transformers(tmp_path / "installed", "6.1.0rc1"))
    assert result.returncode == 1
    assert "6.1.0rc1 is a pre-release" in result.stderr
    assert all((copied_project / name).read_bytes() == (ROOT / name).read_bytes() for name in FILES)


@pytest.mark.parametrize(
    "name, pattern, other",
    [
        ("pyproject.toml", r"(transformers>=[0-9.]+),<[0-9.]+", r"\1,<99"),
        ("pyproject.toml", r"transformers>=[0-9.]+", "transformers>=5.1"),
        ("pyproject.toml", r"torch>=[0-9.]+", "torch>=2.1"),
        ("README.md", r"(transformers [0-9.]+ to) [0-9.]+[0-9]", r"\1 99.0"),
        (COMPAT, r'(NEWEST_TESTED_TRANSFORMERS =) "[0-9.]+"', r'\1 "99.0"'),
    ],
)
def test_check_names_the_file_that_was_left_behind(copied_project, name, pattern, other):
    text = (copied_project / name).read_text(encoding="utf-8")
    changed, count = re.subn(pattern, other, text)
    assert count == 1
    (copied_project / name).write_text(changed, encoding="utf-8")
    result = versions(copied_project, "check")
    assert result.returncode == 1
    assert result.stderr.startswith(f"{name}: ")


def test_constraints_pin_all_that_readme_commands_install():
    module = versions_module()
    pins = module.pinned_versions()
    installed = module.installed_versions()
    if installed["transformers"] != pins["transformers"]:
        pytest.skip(f"needs transformers {pins['transformers']}, the release of constraints.txt")
    assert installed.keys() <= pins.keys()
    assert not {"torch", "triton", "sympy", "mpmath"} & pins.keys()  # left to the machine


def test_unpinned_package_in_a_report_of_pip_is_found():
    metadata = [
        {"name": "torch", "version": "2.15.0", "requires_dist": ["sympy", "numpy; extra == 'all'"]},
        {"name": "sympy", "version": "1.14.0"},
        {"name": "Rich", "version": "16.0", "requires_dist": ["new_package[fast]>=1"]},
        {
            "name": "New.Package",
            "version": "1.1",
            "requires_dist": ["fast-part; extra == 'fast'", "y; extra == 'x'"],
        },
        {"name": "fast-part", "version": "3"},
        {"name": "y", "version": "2"},
    ]
    report = {"install": [{"metadata": entry} for entry in metadata]}
    assert versions_module().unpinned(report, {"rich": "16.0"}) == ["fast-part 3", "new-package 1.1"]


def test_every_dependency_has_a_lower_bound_that_the_oldest_lane_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.match(r"[\w-]+", line)[0] for group in groups for line in group}
    bounds = versions(ROOT, "lower-bounds").stdout.split()
    unbound = names - {line.partition("==")[0] for line in bounds}
    # torch is the lane's own; triton comes with it; flash-attn needs a CUDA compiler.
    assert unbound == {"torch", "triton", "flash-attn"}
    assert "peft==0.19" in bounds


def versions_module():
    specification = importlib.util.spec_from_file_location("versions", ROOT / ".ci" / "versions.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
