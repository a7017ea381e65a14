"""What the licenses of base models ask of a model made from them: facts read in their texts, and warnings."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from conversion.checkpoint.companions import COMPANIONS, LICENSES, matching_names
from conversion.checkpoint.json_files import read_small


LICENSE_HEAD_CHARS = 2000
AGREEMENT = re.compile(r"\bLLAMA\s+([\d.]+)\s+COMMUNITY\s+LICENSE\s+AGREEMENT", re.IGNORECASE)
HUB_NAME = re.compile(r"(?:meta[-_ ]?)?llama[-_ ]?([234](?:\.\d)?)(?:[-_ ].*)?", re.IGNORECASE)
GATED_LICENSES = re.compile(r"llama|gemma", re.IGNORECASE)


@dataclass(frozen=True)
class LlamaTerms:
    """Section 1.b of one of Meta's community licenses: what to display, how a name begins, what a Notice file says."""

    license: str
    built_with: str | None
    name_start: str | None
    notice: str


def _community_terms(model: str) -> LlamaTerms:
    license = f"{model} Community License"
    notice = f"{model} is licensed under the {license}, Copyright © Meta Platforms, Inc. All Rights Reserved."
    return LlamaTerms(license, "Built with Llama", "Llama", notice)


# Read in meta-llama/llama-models (models/llama3_1 to llama3_3 and llama4, License/Llama2.txt) and meta-llama/llama3.
LLAMA_TERMS = {
    "2": LlamaTerms(
        "LLAMA 2 Community License",
        None,
        None,
        "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights "
        "Reserved.",
    ),
    "3": LlamaTerms(
        "Meta Llama 3 Community License",
        "Built with Meta Llama 3",
        "Llama 3",
        "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. All "
        "Rights Reserved.",
    ),
} | {version: _community_terms(f"Llama {version}") for version in ("3.1", "3.2", "3.3", "4")}


def llama_terms(metadata: Mapping[str, Any], folder: Path | None = None) -> LlamaTerms | None:
    """Returns the terms that a card's metadata names, else those of a text in the folder; None for other licenses."""
    for key in ("license", "license_name"):
        if match := HUB_NAME.fullmatch(str(metadata.get(key, ""))):
            return LLAMA_TERMS.get(match[1])
    if metadata.get("license") not in (None, "other") or folder is None:
        return None
    for name in sorted(matching_names(folder, LICENSES)):
        head = read_small(folder / name).decode(errors="replace")[:LICENSE_HEAD_CHARS]
        if match := AGREEMENT.search(head):
            return LLAMA_TERMS.get(match[1])
    return None


def private_reason(metadata: Mapping[str, Any], terms: LlamaTerms | None, base_model: str | None) -> str | None:
    """Returns why a first upload should be private; None where nothing speaks for it."""
    if terms:
        return f"the base is under the {terms.license}, and Meta gives access on request"
    stated = " ".join(str(metadata.get(key) or "") for key in ("license", "license_name")).strip()
    if GATED_LICENSES.search(stated):
        return f"the base's license is {stated!r}, under which models are given on request"
    if metadata.get("license") == "other":
        return f"the base has a license of its own ({stated!r}), which may not allow everybody to have it"
    if not stated and (base_model or "").startswith("meta-llama/"):
        return f"the base is {base_model}, which Meta gives on request"
    return None


def license_warnings(
    metadata: Mapping[str, Any], terms: LlamaTerms | None, files: Iterable[str], repo_id: str
) -> list[str]:
    """Returns what the base's license asks for and this upload lacks. Whether it applies is for a person to say."""
    names = list(files)
    warnings = []
    if not metadata.get("license"):
        warnings.append("README.md states no license: write the base's into its metadata block (license: ...)")
    licenses = [name for name in names if any(fnmatch(name, pattern) for pattern in COMPANIONS["license"])]
    if terms is None:
        return warnings
    if not any(fnmatch(name, pattern) for name in licenses for pattern in LICENSES):
        warnings.append(f"the {terms.license} asks for a copy of itself next to the weights: put LICENSE there")
    if not any(name.upper().startswith("NOTICE") for name in licenses):
        warnings.append(f"the {terms.license} asks for a Notice file that says: {terms.notice}")
    name = repo_id.split("/")[-1]
    if terms.name_start and not name.replace("-", " ").startswith(terms.name_start):
        warnings.append(
            f"the {terms.license} asks that names of models made from it begin with {terms.name_start!r}, and this "
            f"is {name!r}"
        )
    return warnings
