"""The files that go with the weights: tokenizer, templates, licenses from the source, model code from here."""

import codecs
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from glob import glob
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from conversion.checkpoint.json_files import check_size, read_json, read_small
from conversion.checkpoint.reader import checked_path
from conversion.checkpoint.safetensors_format import LFS_POINTER
from conversion.errors import ConversionError, file_errors


# As people spell them, in any case: LICENSE, License.md, licence.txt. Names that only begin so may be anything.
LICENSE_STEMS = ("LICENSE", "LICENCE", "LICENSE-CODE", "LICENSE-MODEL", "LICENSE_CODE", "LICENSE_MODEL", "COPYING")
NOTICE_STEMS = ("NOTICE", "NOTICES", "THIRD_PARTY_NOTICES", "USE_POLICY", "ACCEPTABLE_USE_POLICY")
TEXT_ENDINGS = ("", ".txt", ".md", ".rst")
PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY")
# A file of these kinds that is empty was not copied whole.
NEVER_EMPTY = (".json", ".model")


def _in_any_case(stems: Iterable[str]) -> tuple[str, ...]:
    """Returns patterns of the names with every ending, for glob and fnmatch."""
    names = [stem + ending for stem in stems for ending in TEXT_ENDINGS]
    return tuple("".join(f"[{c.upper()}{c.lower()}]" if c.isalpha() else c for c in name) for name in names)


LICENSES = _in_any_case(LICENSE_STEMS)
# kind: patterns of which at least one file should be there, or its absence is reported
COMPANIONS = {
    "tokenizer": (
        "tokenizer.json",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    ),
    "chat template": ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    "generation config": ("generation_config.json",),
    "license": LICENSES + _in_any_case(NOTICE_STEMS),
}


def companion_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Finds the files that go with the weights.

    Args:
        folder: The source.

    Returns:
        Their paths by the names that they get, and notes on what is absent or comes without its code.

    Raises:
        ConversionError: `whole_file` refuses one.
    """
    files: dict[str, Path] = {}
    notes = []
    for kind, patterns in COMPANIONS.items():
        found = {name: whole_file(folder, name) for name in matching_names(folder, patterns)}
        for name in [name for name, path in found.items() if is_license(name) and not is_text(path)]:
            del found[name]
            notes.append(f"{name} is no text, or holds a private key, and is not copied")
        files |= found
        if not found and not (kind == "chat template" and _has_inline_template(folder)):
            notes.append(f"no {kind} in the source")
    if "auto_map" in read_object(folder / "tokenizer_config.json"):
        notes.append("tokenizer_config.json names code of its own (auto_map), which is not copied")
    return files, notes


def matching_names(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Returns the names of the files that match; a link to nowhere counts, as in a Hub cache that lost a blob."""
    names = [name for pattern in patterns for name in sorted(glob(pattern, root_dir=folder))]
    return [name for name in names if not (folder / name).is_dir()]


def is_license(name: str) -> bool:
    """Returns whether a file of this name is one of the licenses and notices."""
    return any(fnmatch(name, pattern) for pattern in COMPANIONS["license"])


def is_text(path: Path) -> bool:
    """Returns whether a file is a text that may be published: no binary data, no private key."""
    data = read_small(path)
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if utf16 else "utf-8", errors="replace")
    return not any(char < " " and char not in "\t\n\r\f" for char in text) and not PRIVATE_KEY.search(text)


def whole_file(folder: Path, name: str) -> Path:
    """Returns the path of a file that is there, inside the folder, whole, and no larger than such files are.

    Raises:
        ConversionError: It is not.
    """
    path = checked_path(folder, name)
    if path.suffix != ".safetensors" and not check_size(path) and path.suffix in NEVER_EMPTY:
        raise ConversionError(f"{path}: empty; download it again")
    with file_errors(path), path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ConversionError(f"{path}: a git-lfs pointer, not the file; run `git lfs pull` in its folder")
    return path


def read_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer of a checkpoint; None if it has none.

    Raises:
        ConversionError: It cannot be used.
    """
    if not (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the libraries raise whatever a damaged file leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConversionError(
            f"{folder}: its tokenizer cannot be loaded ({reason}); get its files again, or install what it needs"
        ) from error
    # What transformers makes of a tokenizer_config.json alone.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ConversionError(
            f"{folder}: its tokenizer has no vocabulary, only special tokens: expected tokenizer.json or "
            "tokenizer.model next to tokenizer_config.json; get all of its files"
        )
    return tokenizer


def _has_inline_template(folder: Path) -> bool:
    return "chat_template" in read_object(folder / "tokenizer_config.json")


def read_object(path: Path) -> Mapping[str, object]:
    """Returns the JSON object in a file; an empty one without the file.

    Raises:
        ConversionError: The file holds none.
    """
    if not path.is_file():
        return {}
    return read_json(path, nonfinite=True)
