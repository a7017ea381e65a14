"""Whether files are still those that were read: by their state on disk with a sample of bytes, or by every byte."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conversion.errors import file_errors


SAMPLES = 64
SAMPLE_BYTES = 4096
# Of a config.json, what may change under weights in float32 without a change of any logit: names and versions, what is
# a caller's choice, ids of tokens, and how new weights are drawn.
IDLE_FIELDS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "transformers_version",
        "lambda_std_dev",  # a text for other classes to stop at
        "dtype",
        "torch_dtype",
        "attn_implementation",
        "_attn_implementation",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "id2label",
        "label2id",
        "problem_type",
        "initializer_range",
        "lambda_init_std",
    ]
)


def file_state(stat: os.stat_result) -> tuple[int, int, int, int]:
    """Returns what changes with every write: unlike the time of the write, that of the change cannot be put back."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def file_sha256(path: Path) -> str:
    """Returns the hex digest of every byte."""
    with file_errors(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fields_sha256(config: Mapping[str, Any]) -> str:
    """Returns the hex digest of the fields of a config.json that a model's numbers depend on, in any order."""
    fields = {name: value for name, value in config.items() if name not in IDLE_FIELDS}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def quick_identity(paths: Iterable[Path]) -> list[list[Any]]:
    """Returns name, state and a digest of samples of each file, for JSON; as fast for large files as for small."""
    identity = []
    for path in paths:
        with file_errors(path), path.open("rb", buffering=0) as stream:
            state = file_state(os.fstat(stream.fileno()))
            size = state[1]
            digest = hashlib.sha256()
            for number in range(SAMPLES):
                stream.seek(number * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
        identity.append([path.name, *state, digest.hexdigest()])
    return identity


def content_identity(paths: Iterable[Path]) -> list[list[str]]:
    """Returns name and SHA-256 of each file, and of the files in folders, for JSON: a copy has the same."""
    with_folders = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [[file.name, file_sha256(file)] for file in with_folders if file.is_file()]
