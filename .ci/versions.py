"""
Keeps the tested versions together, and says what pip would install.

    versions.py check          whether constraints.txt, pyproject.toml, README.md and the compat file agree
    versions.py renew          writes all four from the environment that runs this; `.ci/renew` does that
    versions.py resolve        whether README's commands install anything unpinned; asks the package index
    versions.py lower-bounds   the lower bounds of pyproject.toml as pip constraints, for `.ci/oldest`
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = "constraints.txt"
COMPAT = "modeling_diff/diff_transformers_compat.py"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# Not pinned: the build of torch belongs to the machine, and GPU builds ask for one release of triton each.
UNPINNED = {"torch", "triton"}
HEADER = """\
# The releases that `.ci/run` tests; README's two commands install them on Python {first} to {last}.
# torch and what only torch needs are left to the machine. Written by `.ci/renew`.
"""
# Each file with what is replaced in it. {oldest} and {torch} are the compat file's own bounds.
REPLACED = [
    ("pyproject.toml", r'"transformers>=[^"]*"', '"transformers>={oldest},<{cap}"'),
    ("pyproject.toml", r'"torch>=[^"]*"', '"torch>={torch}"'),
    ("README.md", r"transformers [0-9.]+ to [0-9.]+[0-9]", "transformers {oldest} to {newest}"),
    (COMPAT, r'NEWEST_TESTED_TRANSFORMERS = "[^"]*"', 'NEWEST_TESTED_TRANSFORMERS = "{newest}"'),
]


def requirements() -> list[str]:
    """Returns what README's two commands ask for by name: the project's dependencies with the extra `dev`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + project["optional-dependencies"]["dev"]


def packages_of(wanted: Iterable[str], requires: Callable[[str], list[str] | None]) -> set[str]:
    """Returns every package that `wanted` installs here, not going on into torch."""
    found: dict[str, set[str]] = {}
    waiting = [Requirement(line) for line in wanted]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras}
        if name in UNPINNED or extras <= found.get(name, set()):
            continue
        found[name] = found.get(name, set()) | extras
        for needed in map(Requirement, requires(name) or []):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(Requirement(str(needed).partition(";")[0]))
    return set(found)


def installed_versions() -> dict[str, str]:
    """Returns the packages to pin with their releases in the environment that runs this."""
    wanted = [line for line in requirements() if applies(line)]
    names = sorted(packages_of(wanted, importlib.metadata.requires))
    return {name: importlib.metadata.version(name) for name in names}


def applies(line: str) -> bool:
    marker = Requirement(line).marker
    return marker is None or marker.evaluate()


def pinned_versions() -> dict[str, str]:
    """Returns the pins of constraints.txt by canonical name."""
    lines = (ROOT / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def texts_for(newest: str) -> dict[str, str]:
    """Returns the text of every file that names versions, as it must be when `newest` is the newest tested release."""
    compat = (ROOT / COMPAT).read_text(encoding="utf-8")
    major, minor = Version(newest).release[:2]
    values = {
        "newest": newest,
        "cap": f"{major}.{minor + 1}",
        "oldest": constant(compat, "OLDEST_TRANSFORMERS"),
        "torch": constant(compat, "OLDEST_TORCH"),
    }
    texts: dict[str, str] = {}
    for file, pattern, replacement in REPLACED:
        text = texts.get(file) or (ROOT / file).read_text(encoding="utf-8")
        texts[file], count = re.subn(pattern, replacement.format(**values), text)
        if count != 1:
            raise SystemExit(f"{file}: {count} matches of {pattern}; versions.py replaces exactly one.")
    return texts


def constant(source: str, name: str) -> str:
    found = re.search(rf'^{name} = "([^"]+)"', source, re.MULTILINE)
    if not found:
        raise SystemExit(f'{COMPAT}: no line {name} = "..."')
    return found[1]


def check() -> list[str]:
    """Returns the files that do not agree with the transformers pin of constraints.txt."""
    newest = pinned_versions()["transformers"]
    return [
        f"{file}: its versions are not those of {CONSTRAINTS} (transformers {newest}) and {COMPAT}; run .ci/renew"
        for file, text in texts_for(newest).items()
        if text != (ROOT / file).read_text(encoding="utf-8")
    ]


def renew() -> list[str]:
    """Writes constraints, cap, README's sentence and the compat file's constant from the running environment."""
    versions = installed_versions()
    newest = versions["transformers"]
    if Version(newest).is_prerelease:
        return [f"transformers {newest} is a pre-release; renew when the release itself has been tested."]
    for file, text in texts_for(newest).items():
        (ROOT / file).write_text(text, encoding="utf-8")
    header = HEADER.format(first=PYTHONS[0], last=PYTHONS[-1])
    lines = [f"{name}=={version}\n" for name, version in versions.items()]
    (ROOT / CONSTRAINTS).write_text(header + "".join(lines), encoding="utf-8")
    return check()


def unpinned(report: dict, pins: dict[str, str]) -> list[str]:
    """Returns what an installation report of pip lists without a pin, what only torch needs left out."""
    listed = {canonicalize_name(entry["metadata"]["name"]): entry["metadata"] for entry in report["install"]}
    wanted = [line for line in requirements() if applies(line)]
    ours = packages_of(wanted, lambda name: listed.get(name, {}).get("requires_dist"))
    return sorted(f"{name} {listed[name]['version']}" for name in ours & listed.keys() if name not in pins)


def resolve() -> list[str]:
    """Asks pip what README's test command installs on each Python, and returns what is wrong with it."""
    faults = []
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "-c", CONSTRAINTS]
    for python in PYTHONS:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            target = ["--only-binary=:all:", "--python-version", python, "--target", folder, "--report", str(report)]
            run = subprocess.run([*pip, *target, ".[dev]"], cwd=ROOT, capture_output=True, text=True)
            if run.returncode:
                faults.append(f"Python {python}: {run.stderr.strip().splitlines()[-1]}")
            else:
                found = unpinned(json.loads(report.read_text(encoding="utf-8")), pinned_versions())
                faults += [f"Python {python}: {package} is not in {CONSTRAINTS}" for package in found]
    return faults


def lower_bounds() -> list[str]:
    """Prints the lower bounds of all dependencies but torch, whose build is the lane's choice."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in sorted({*project["dependencies"], *chain(*project["optional-dependencies"].values())}):
        requirement = Requirement(line)
        bounds = [part.version for part in requirement.specifier if part.operator == ">="]
        if bounds and requirement.name not in UNPINNED:
            print(f"{requirement.name}=={bounds[0]}")
    return []


def main() -> None:
    """Runs one command and ends with its faults."""
    commands = {"check": check, "renew": renew, "resolve": resolve, "lower-bounds": lower_bounds}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    faults = commands[sys.argv[1]]()
    raise SystemExit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
