"""The code next to a checkpoint's weights: whose it is, how old it is, and what is known to be wrong with it."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from transformers import __version__ as INSTALLED_TRANSFORMERS
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import modeling_diff.modeling_diff_llama
from conversion.checkpoint.companions import read_object
from conversion.checkpoint.json_files import check_size, read_small
from conversion.record import RECORD
from modeling_diff.configuration_diff_llama import AUTO_MAP
from modeling_diff.diff_transformers_compat import NEWEST_TESTED_TRANSFORMERS, release


COMPAT_FILE = "diff_transformers_compat.py"
# File name: beginnings of the SHA-256 of every version of it that was ever committed. Written by `.ci/known_code`.
KNOWN_CODE = Path(__file__).with_name("known_code.json")
DIGEST_LENGTH = 16
PACKAGE_WINS = "importing modeling_diff before loading uses the package's code in its place"


@dataclass(frozen=True)
class CodeFault:
    """What the code of old checkpoints does wrong.

    Attributes:
        cured_by: File of the bundle that came with the cure; a bundle without it has the fault.
        transformers: First release of transformers under which it shows.
        what: What the user sees.
    """

    cured_by: str
    transformers: str
    what: str

    @property
    def shows_here(self) -> bool:
        """Whether the installed transformers brings it out."""
        return release(INSTALLED_TRANSFORMERS) >= release(self.transformers)

    def __str__(self) -> str:
        here = f", and {INSTALLED_TRANSFORMERS} is installed" if self.shows_here else ""
        return f"wrong under transformers >= {self.transformers}{here}: {self.what}"


KNOWN_FAULTS = (
    CodeFault(
        COMPAT_FILE, "5.24", "the cache is lost, so that every token after the first is computed from itself alone"
    ),
)


@dataclass(frozen=True)
class CheckpointCode:
    """The code of one checkpoint folder.

    Attributes:
        age: Compared with the package's: "none" without any, "different" where neither is known to be older.
        files: Bundle files in the folder, by name with their SHA-256.
        edited: Files among them that no version of ours is known to have had.
        foreign: Modules that auto_map takes models from, and that are none of ours.
        faults: Known faults of this code, whether or not the installed transformers brings them out.
    """

    age: Literal["none", "same", "older", "newer", "different"]
    files: Mapping[str, str]
    edited: tuple[str, ...]
    foreign: tuple[str, ...]
    faults: tuple[CodeFault, ...]

    @property
    def wrong_here(self) -> bool:
        """Whether it computes wrongly under the installed transformers, loaded without the package."""
        return any(fault.shows_here for fault in self.faults)

    def __str__(self) -> str:
        """Returns one line: age, faults, way out."""
        if self.foreign:
            return f"auto_map takes the model from {self.foreign[0]}, which is not diff-llama's"
        said = {
            "none": "none: it loads only where modeling_diff is imported first",
            "same": "the same as diff-llama's",
            "older": "older than diff-llama's",
            "newer": "newer than diff-llama's; upgrade diff-llama",
            "different": "not the same as diff-llama's",
        }[self.age]
        said += f", edited ({', '.join(self.edited)})" if self.edited else ""
        if self.age in ("same", "newer"):
            return said
        way_out = "`diff-llama update-code` puts diff-llama's there"
        return "; ".join([said, *map(str, self.faults), way_out, *([PACKAGE_WINS] if self.age != "none" else [])])

    def described(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return {
            "state": str(self),
            "age": self.age,
            "edited": list(self.edited),
            "known_faults": [str(fault) for fault in self.faults],
            "wrong_here": self.wrong_here,
        }


def package_code() -> dict[str, bytes]:
    """Returns the bundle of the installed package: contents by file name."""
    return {name: path.read_bytes() for name, path in code_files().items()}


def read_code(folder: Path) -> CheckpointCode:
    """Returns what is known of the code in a checkpoint folder. Nothing of it is run.

    Raises:
        ConversionError: config.json or conversion.json is not JSON.
    """
    ours = {name: _sha256(content) for name, content in package_code().items()}
    known = known_code()
    names = {name for name in {*ours, *known, *called_code(folder)} if (folder / name).is_file()}
    found = {name: _sha256(read_small(folder / name)) for name in sorted(names & {*ours, *known})}
    recorded = _recorded(folder)
    edited = tuple(
        name
        for name, digest in found.items()
        if digest not in (ours.get(name), recorded.get(name)) and digest[:DIGEST_LENGTH] not in known.get(name, ())
    )
    foreign = tuple(module for module in _model_modules(folder) if module not in {*ours, *known})
    faults = tuple(fault for fault in KNOWN_FAULTS if found and fault.cured_by not in found)
    return CheckpointCode(_age(folder, found, ours, known), found, edited, foreign, faults)


@cache
def known_code() -> Mapping[str, frozenset[str]]:
    """Returns the beginnings of SHA-256 that each file of the bundle is known to have had."""
    return {name: frozenset(digests) for name, digests in json.loads(KNOWN_CODE.read_text()).items()}


def _age(
    folder: Path, found: Mapping[str, str], ours: Mapping[str, str], known: Mapping[str, Iterable[str]]
) -> Literal["none", "same", "older", "newer", "different"]:
    if not found:
        return "none"
    if found == ours:
        return "same"
    tested = _stated_releases(folder / COMPAT_FILE).get("NEWEST_TESTED_TRANSFORMERS")
    if tested is None or release(tested) < release(NEWEST_TESTED_TRANSFORMERS):
        return "older"
    if release(tested) > release(NEWEST_TESTED_TRANSFORMERS):
        return "newer"
    past = all(digest[:DIGEST_LENGTH] in known.get(name, ()) for name, digest in found.items())
    return "older" if past else "different"


def code_requirements(folder: Path | None = None) -> str:
    """Returns a sentence on the releases that code needs: what a checkpoint carries, or the package's own."""
    carried = folder is not None and any((folder / name).is_file() for name in code_files())
    path = folder / COMPAT_FILE if folder is not None and carried else code_files()[COMPAT_FILE]
    stated = _stated_releases(path)
    if not stated:
        return (
            "Its code needs `transformers >= 5.17` and below 5.24, under which it computes wrong tokens "
            "(`diff-llama update-code` cures that), and `torch >= 2.11`."
        )
    return (
        f"Its code needs `transformers >= {stated['OLDEST_TRANSFORMERS']}` (newest tested: "
        f"{stated['NEWEST_TESTED_TRANSFORMERS']}) and `torch >= {stated['OLDEST_TORCH']}`."
    )


def _stated_releases(path: Path) -> dict[str, str]:
    """Returns the releases that a compat file names, by constant; nothing for code from before there was one."""
    text = read_small(path).decode(errors="replace") if path.is_file() else ""
    names = ("OLDEST_TRANSFORMERS", "NEWEST_TESTED_TRANSFORMERS", "OLDEST_TORCH")
    found = {name: re.search(rf'^{name} = "(\d+(?:\.\d+)*)', text, re.MULTILINE) for name in names}
    return {name: match[1] for name, match in found.items() if match} if all(found.values()) else {}


def _model_modules(folder: Path) -> list[str]:
    """Returns the files in auto_map, without the repository that transformers may put before them."""
    auto_map = read_object(folder / "config.json").get("auto_map")
    entries = [auto_map.get(name) for name in AUTO_MAP] if isinstance(auto_map, dict) else []
    return sorted({f"{str(entry).split('--')[-1].split('.')[0]}.py" for entry in entries if entry is not None})


def _recorded(folder: Path) -> Mapping[str, Any]:
    recorded = read_object(folder / RECORD).get("sha256")
    return recorded if isinstance(recorded, dict) else {}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def code_files() -> dict[str, Path]:
    """Returns the model's code by file name: what `save_pretrained` puts next to the weights, imports followed."""
    entry = Path(modeling_diff.modeling_diff_llama.__file__)
    paths = [entry, *map(Path, get_relative_import_files(entry))]
    return {path.name: path for path in sorted(set(paths))}


def called_code(folder: Path) -> list[str]:
    """Returns the code files that a checkpoint's config or its own code calls for, sorted, whether there or not.

    Followed in the folder itself: a bundle of an older version with other files is as good as today's.
    """
    auto_map = read_object(folder / "config.json").get("auto_map")
    modules = {str(target).split(".")[0] for target in auto_map.values()} if isinstance(auto_map, dict) else set()
    seen: set[str] = set()
    while modules - seen:
        module = (modules - seen).pop()
        seen.add(module)
        path = folder / f"{module}.py"
        if os.path.isfile(path):  # of any name: no error for one that no file can have
            check_size(path)
            modules |= set(get_relative_imports(path))
    return sorted(f"{module}.py" for module in seen)


def missing_code(folder: Path) -> list[str]:
    """Returns the code files that a checkpoint calls for and that are not there, sorted."""
    return [name for name in called_code(folder) if not os.path.isfile(folder / name)]
