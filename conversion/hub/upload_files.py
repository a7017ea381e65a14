"""Which files of a folder go to the Hub: an allow-list, checked before anything is sent."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from conversion.checkpoint.companions import COMPANIONS, PRIVATE_KEY, is_license, is_text, matching_names, whole_file
from conversion.checkpoint.json_files import read_json, text_parts
from conversion.checkpoint.reader import CheckpointReader
from conversion.errors import TOKEN, ConversionError
from conversion.hub.bundle import called_code
from conversion.record import CERTIFICATE, RECORD


INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", INDEX)
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
CARD = "README.md"
MODULE_FILE = re.compile(r"[A-Za-z_]\w*\.py")
TEXT_SUFFIXES = (".json", ".md", ".txt", ".rst", ".py", ".jinja", "")
KINDS = {"diff_llama": "checkpoint", "diffllama": "diffllama"}


@dataclass(frozen=True)
class UploadFolder:
    """What a folder holds that may be published: files by the name they get, and its config."""

    kind: Literal["checkpoint", "diffllama", "adapter"]
    files: Mapping[str, Path]
    config: Mapping[str, Any]

    @property
    def code(self) -> list[str]:
        return [name for name in self.files if name.endswith(".py")]


def read_upload_folder(folder: Path) -> UploadFolder:
    """Returns the files of a folder to upload.

    Raises:
        ConversionError: Others could not load the folder, or it holds a Hub token.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ConversionError(f"{folder}: {found}, expected a checkpoint folder; check the path")
    if (folder / ADAPTER[0]).is_file():
        config = _read_json(folder, ADAPTER[0])
        kind = "adapter"
        names = _adapter(folder)
    else:
        config = _read_json(folder, "config.json")
        kind = KINDS.get(str(config.get("model_type")), "")
        if not kind:
            raise ConversionError(
                f"{folder / 'config.json'}: model_type is {config.get('model_type')!r}, expected diff_llama or "
                "diffllama; convert it first"
            )
        names = _weights(folder) | {"config.json"} | _code(folder)
    for patterns in (*COMPANIONS.values(), (CARD, RECORD, CERTIFICATE)):
        names |= set(matching_names(folder, patterns))
    files = {name: whole_file(folder, name) for name in sorted(names)}
    for name, path in files.items():
        if is_license(name) and not is_text(path):
            raise ConversionError(f"{path}: no text, or holds a private key; remove or rename it")
        if path.suffix in TEXT_SUFFIXES:
            for text in text_parts(path):
                refuse_secret(name, text)
    return UploadFolder(kind, files, config)  # type: ignore[arg-type]


def refuse_secret(name: str, text: str) -> None:
    """Checks that a text holds no secret.

    Raises:
        ConversionError: It holds what looks like a token or a private key, which the message does not repeat.
    """
    if TOKEN.search(text):
        raise ConversionError(f"{name}: holds a Hub token (hf_...); take it out, and revoke it on the Hub")
    if PRIVATE_KEY.search(text):
        raise ConversionError(f"{name}: holds a private key; take it out, and no longer use the key")


def is_replaced(name: str) -> bool:
    """Returns whether a file on the Hub belongs to a state of the weights: a new state without it removes it."""
    return any(fnmatch(name, pattern) for pattern in (*WEIGHTS, CERTIFICATE))


def _weights(folder: Path) -> set[str]:
    """Returns the weight files that are loaded, with their index; stray shards are left out."""
    files = {path.name for path in CheckpointReader(folder).files}
    return files | ({INDEX} if files != {WEIGHTS[0]} else set())


def _code(folder: Path) -> set[str]:
    """Returns the code that the config calls for; ConversionError where it is not in the folder, or not all of it."""
    names = called_code(folder)
    for name in names:
        if not MODULE_FILE.fullmatch(name):
            raise ConversionError(
                f"{folder / 'config.json'}: auto_map names {name!r}, expected files next to the weights; save the "
                "checkpoint again with its own code"
            )
        if not (folder / name).is_file():
            raise ConversionError(
                f"{folder / name}: missing, and config.json calls for it; save the checkpoint again, or convert again"
            )
    return set(names)


def _adapter(folder: Path) -> set[str]:
    if not (folder / ADAPTER[1]).is_file():
        raise ConversionError(f"{folder / ADAPTER[1]}: missing; save the adapter again as safetensors")
    return set(ADAPTER)


def _read_json(folder: Path, name: str) -> Mapping[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ConversionError(f"{path}: missing, expected a checkpoint or an adapter; check the path")
    return read_json(path, nonfinite=True)
