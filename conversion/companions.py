"""The files that travel beside the weights: tokenizer, templates, licences from the source, model code from here."""

from collections.abc import Mapping
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import modeling_diff.modeling_diff_llama
from conversion.errors import file_errors
from conversion.safetensors_header import parse_json


# kind: patterns of which at least one file should be there, or its absence is reported
COMPANIONS = {
    "tokenizer": (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    ),
    "chat template": ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    "generation config": ("generation_config.json",),
    "licence": ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*"),
}


def companion_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The source's companions by the name they get, and notes on what is absent or comes without its code."""
    files: dict[str, Path] = {}
    notes = []
    for kind, patterns in COMPANIONS.items():
        found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
        files |= {path.relative_to(folder).as_posix(): path for path in found}
        if not found and not (kind == "chat template" and _has_inline_template(folder)):
            notes.append(f"no {kind} in the source")
    if "auto_map" in _read_object(folder / "tokenizer_config.json"):
        notes.append("tokenizer_config.json names code of its own (auto_map), which is not copied")
    return files, notes


def code_files() -> dict[str, Path]:
    """The model's code by file name: what `save_pretrained` puts beside the weights, imports followed."""
    entry = Path(modeling_diff.modeling_diff_llama.__file__)
    paths = [entry, *map(Path, get_relative_import_files(entry))]
    return {path.name: path for path in sorted(set(paths))}


def called_code(folder: Path) -> list[str]:
    """The code files that a checkpoint's config or its own code calls for, sorted, whether there or not.

    Followed in the folder itself: a bundle of an older version with other files is as good as today's.
    """
    auto_map = _read_object(folder / "config.json").get("auto_map")
    modules = {str(target).split(".")[0] for target in auto_map.values()} if isinstance(auto_map, dict) else set()
    seen: set[str] = set()
    while modules - seen:
        module = (modules - seen).pop()
        seen.add(module)
        path = folder / f"{module}.py"
        modules |= set(get_relative_imports(path)) if path.is_file() else set()
    return sorted(f"{module}.py" for module in seen)


def missing_code(folder: Path) -> list[str]:
    """Code files that a checkpoint calls for and that are not there, sorted."""
    return [name for name in called_code(folder) if not (folder / name).is_file()]


def _has_inline_template(folder: Path) -> bool:
    return "chat_template" in _read_object(folder / "tokenizer_config.json")


def _read_object(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        return {}
    with file_errors(path):
        return parse_json(path.read_bytes(), path)
