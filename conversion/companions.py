"""The files that travel beside the weights: tokenizer, templates, licences from the source, model code from here."""

from collections.abc import Iterable, Mapping
from glob import glob
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import modeling_diff.modeling_diff_llama
from conversion.errors import ConversionError, file_errors
from conversion.reader import checked_path
from conversion.safetensors_header import LFS_POINTER, parse_json


# In any case, as people spell it: LICENSE, License.md, licence.txt.
LICENCE = "[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*"
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
    "licence": (LICENCE, "[Nn][Oo][Tt][Ii][Cc][Ee]*", "[Uu][Ss][Ee]_[Pp][Oo][Ll][Ii][Cc][Yy]*"),
}


def companion_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The source's companions by the name they get, and notes on what is absent or comes without its code.

    Raises ConversionError for one that `whole_file` refuses.
    """
    files: dict[str, Path] = {}
    notes = []
    for kind, patterns in COMPANIONS.items():
        found = matching_names(folder, patterns)
        files |= {name: whole_file(folder, name) for name in found}
        if not found and not (kind == "chat template" and _has_inline_template(folder)):
            notes.append(f"no {kind} in the source")
    if "auto_map" in read_object(folder / "tokenizer_config.json"):
        notes.append("tokenizer_config.json names code of its own (auto_map), which is not copied")
    return files, notes


def matching_names(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Names of the files that match; a link to nowhere counts, as in a Hub cache that lost a blob."""
    names = [name for pattern in patterns for name in sorted(glob(pattern, root_dir=folder))]
    return [name for name in names if not (folder / name).is_dir()]


def whole_file(folder: Path, name: str) -> Path:
    """The path of a file that is there, inside the folder, and no git-lfs pointer; ConversionError otherwise."""
    path = checked_path(folder, name)
    with file_errors(path), path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ConversionError(f"{path}: a git-lfs pointer, not the file; run `git lfs pull` in its folder")
    return path


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint, None if it has none. ConversionError for one that cannot be used."""
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
            "tokenizer.model beside tokenizer_config.json; get all of its files"
        )
    return tokenizer


def code_files() -> dict[str, Path]:
    """The model's code by file name: what `save_pretrained` puts beside the weights, imports followed."""
    entry = Path(modeling_diff.modeling_diff_llama.__file__)
    paths = [entry, *map(Path, get_relative_import_files(entry))]
    return {path.name: path for path in sorted(set(paths))}


def called_code(folder: Path) -> list[str]:
    """The code files that a checkpoint's config or its own code calls for, sorted, whether there or not.

    Followed in the folder itself: a bundle of an older version with other files is as good as today's.
    """
    auto_map = read_object(folder / "config.json").get("auto_map")
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
    return "chat_template" in read_object(folder / "tokenizer_config.json")


def read_object(path: Path) -> Mapping[str, object]:
    """The JSON object in a file, empty without the file. ConversionError for a file that holds none."""
    if not path.is_file():
        return {}
    with file_errors(path):
        return parse_json(path.read_bytes(), path)
