"""The metadata block of a model card: read as text, and written so that every reader of YAML finds that text."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from conversion.errors import escape


MAX_BLOCK_BYTES = 1 << 18
MAX_VALUE_CHARS = 1000
MAX_VALUES = 1000
BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
NULLS = ("", "~", "null", "Null", "NULL")
# All else is quoted: to some reader 010, 1e3, 1:20, 2024-01-01, no, y and ~ are numbers, dates, booleans or null.
PLAIN = re.compile(r"[A-Za-z](?:[\w./+()-]| (?! ))*", re.ASCII)
WORDS_OF_YAML = ("y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf")


def read_metadata(card: Path) -> dict[str, str | list[str]]:
    """Returns the fields of a card's metadata block that are text or lists of text, all of them as written.

    A card is no part of a checkpoint: one that is missing or cannot be read has no metadata, and stops nothing.
    """
    try:
        if not card.is_file():  # a pipe would be waited for
            return {}
        with card.open("rb") as stream:
            block = BLOCK.match(stream.read(MAX_BLOCK_BYTES).decode("utf-8", errors="replace").removeprefix("\ufeff"))
        # Text only, where huggingface_hub.metadata_load takes `language: no` for false and `license: 010` for 8.
        found = yaml.load(block[1], Loader=yaml.BaseLoader) if block else {}
    except (ValueError, OSError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(found, dict):
        return {}
    texts = {name: _text(value) for name, value in found.items() if isinstance(name, str)}
    return {name: value for name, value in texts.items() if value}


def _text(value: object) -> str | list[str] | None:
    """Returns the value if it is text or a list of text, of a reasonable length; None for null and all else."""
    if isinstance(value, list):
        return [part for part in value[:MAX_VALUES] if isinstance(part, str) and _text(part)]
    return value if isinstance(value, str) and value not in NULLS and len(value) <= MAX_VALUE_CHARS else None


class _Dumper(yaml.SafeDumper):
    """Puts every string that is not plainly a word between quotes, and follows no references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = PLAIN.fullmatch(text) and text.casefold() not in WORDS_OF_YAML
    return dumper.represent_scalar("tag:yaml.org,2002:str", escape(text), style=None if plain else '"')


_Dumper.add_representer(str, _quoted)


def metadata_block(data: ModelCardData) -> str:
    """Returns the block with its lines of `---`; a reader of YAML 1.1 or 1.2 finds each string as it is in `data`."""
    text = yaml.dump(_plain(data.to_dict()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**16)
    return f"---\n{text}---"


def _plain(value: Any) -> Any:
    """Returns data without the classes of the Hub's client, whose text is a str of another type."""
    if isinstance(value, Mapping):
        return {_plain(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, str) else value
