"""Files that are read whole: a limit for each kind, and JSON as transformers reads it, with every fault named."""

import codecs
import json
import stat
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from conversion.errors import ConversionError, file_errors, quote


MIB = 1 << 20
# The first pattern that fits. The largest that published models have: tokenizer.json 35 MB, an index 10 MB, a
# tokenizer_config.json 1 MB, a license 0.05 MB.
LIMITS = (
    ("*.index.json", 128 * MIB),
    ("tokenizer.json", 512 * MIB),
    ("*.model", 512 * MIB),
    ("vocab.*", 512 * MIB),
    ("merges.txt", 512 * MIB),
    ("*", 16 * MIB),
)
MAX_NESTING = 100
CHUNK_CHARS = MIB
OVERLAP_CHARS = 4096  # longer than anything looked for
ENCODINGS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def check_size(path: Path) -> int:
    """Returns the bytes of a file that is read or copied whole.

    Raises:
        ConversionError: It is no regular file, or larger than any file of its name.
        FilesError: It cannot be read.
    """
    with file_errors(path):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ConversionError(f"{path}: not a regular file; put the file itself there, or remove it")
    limit = next(limit for pattern, limit in LIMITS if fnmatch(path.name, pattern))
    if found.st_size > limit:
        raise ConversionError(
            f"{path}: {found.st_size:,} bytes, expected at most {limit:,} in a file of this name; get the right file, "
            "or remove it"
        )
    return found.st_size


def read_small(path: Path) -> bytes:
    """Returns the content of a file, never more than `LIMITS` allows.

    Raises:
        ConversionError: `check_size` refuses it.
        FilesError: It cannot be read.
    """
    size = check_size(path)
    with file_errors(path), path.open("rb") as stream:
        return stream.read(size)


def read_json(path: Path, nonfinite: bool = False) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
        path: The file.
        nonfinite: Whether NaN and Infinity are taken, as Python writes and transformers reads them.

    Raises:
        ConversionError: `read_small` or `parse_json` refuses it.
        FilesError: It cannot be read.
    """
    return parse_json(read_small(path), path, nonfinite)


def text_parts(path: Path) -> Iterator[str]:
    """Yields a file's text in parts that overlap, so that what is looked for is whole in one of them."""
    check_size(path)
    tail = ""
    with file_errors(path), path.open(encoding="utf-8", errors="replace") as stream:
        while part := stream.read(CHUNK_CHARS):
            yield tail + part
            tail = part[-OVERLAP_CHARS:]


def parse_json(data: bytes, label: object, nonfinite: bool = False) -> dict[str, Any]:
    """Returns a JSON object: UTF-8, no key twice, nested at most `MAX_NESTING` deep.

    Args:
        data: The text.
        label: What a message begins with.
        nonfinite: Whether NaN and Infinity are taken, as Python writes and transformers reads them.

    Raises:
        ConversionError: It is not such an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ConversionError(f"{label}: {quote(name)} appears twice; keep the one that is meant")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    text = _decoded(data, label)
    try:
        parsed = json.loads(text, object_pairs_hook=unique, parse_constant=None if nonfinite else refuse)
    except RecursionError as error:
        raise _nested(label) from error
    except ValueError as error:
        raise ConversionError(f"{label} is not JSON ({error}); correct it, or download the file again") from error
    if not isinstance(parsed, dict):
        raise ConversionError(
            f"{label} is a JSON {type(parsed).__name__}, expected an object; download the file again"
        )
    if text.count("[") + text.count("{") > MAX_NESTING and _is_deep(parsed):
        raise _nested(label)
    return parsed


def _decoded(data: bytes, label: object) -> str:
    for mark, encoding in ENCODINGS.items():
        if data.startswith(mark):
            raise ConversionError(f"{label} is {encoding}, which transformers cannot read; save it as UTF-8")
    if data.startswith(codecs.BOM_UTF8):
        raise ConversionError(
            f"{label} begins with a byte order mark, which transformers cannot read; save it as UTF-8 without one"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"{label} is not JSON (not UTF-8 at byte {error.start}); save it as UTF-8, or download the file again"
        ) from error


def _nested(label: object) -> ConversionError:
    return ConversionError(
        f"{label} is nested more than {MAX_NESTING} deep; remove that, nothing reads it, or get the file again"
    )


def _is_deep(parsed: Any) -> bool:
    """Returns whether anything lies deeper than MAX_NESTING, found without recursion."""
    level = [parsed]
    for _ in range(MAX_NESTING):
        level = [
            part
            for container in level
            for part in (container.values() if isinstance(container, dict) else container)
            if isinstance(part, dict | list)
        ]
        if not level:
            return False
    return True
