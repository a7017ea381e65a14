"""
Calibration text as rows of token ids: from plain text, JSON lines, or a folder that `datasets` has saved.

R rows, T tokens a row.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from conversion.errors import ConversionError, file_errors
from modeling_diff.analysis.tokens import token_fault


JSON_LINES = (".jsonl", ".ndjson", ".json")
CHUNK_BYTES = 1 << 16


class Tokenizer(Protocol):
    """What is asked of a transformers tokenizer."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]: ...


def read_calibration(
    path: Path, tokenizer: Tokenizer | None, num_tokens: int, row_tokens: int, vocab_size: int
) -> torch.Tensor:
    """
    The first `num_tokens` tokens of `path` in rows (R, T), T = `row_tokens`, each behind a bos if there is one.

    Reads no further than needed. Text comes in pieces of lines; of JSON lines each holds `text` or `input_ids`; of a
    datasets folder the columns are called so. Without a tokenizer only `input_ids` will do.
    Raises ConversionError for a file that is missing, empty, neither text nor JSON lines, or too short.
    """
    path = Path(path)
    documents = read_documents(path)
    bos = tokenizer.bos_token_id if tokenizer is not None else None
    body = row_tokens - (bos is not None)
    num_rows = num_tokens // row_tokens
    if num_rows < 1:
        raise ConversionError(f"calibration tokens {num_tokens}: fewer than one row of {row_tokens}; ask for more")
    ids = list(islice(token_ids(path, documents, tokenizer, vocab_size), num_rows * body))
    if not ids:
        raise ConversionError(f"{path}: empty, expected calibration text of {num_tokens} tokens")
    if len(ids) < num_rows * body:
        raise ConversionError(
            f"{path}: {len(ids)} tokens, expected {num_rows * body} (--calibration-tokens {num_tokens}, in rows of "
            f"{row_tokens}); give more text or ask for fewer tokens"
        )
    rows = torch.tensor(ids, dtype=torch.long).view(num_rows, body)
    return rows if bos is None else torch.cat((torch.full((num_rows, 1), bos), rows), dim=1)


def read_documents(path: Path) -> Iterator[str | Sequence[int]]:
    """Returns the documents of a file or a folder that `datasets` saved. ConversionError where there is nothing."""
    if not path.exists():
        raise ConversionError(f"{path}: does not exist, expected text; check the path")
    return read_dataset(path) if path.is_dir() else read_file(path)


def token_ids(
    path: Path, documents: Iterable[str | Sequence[int]], tokenizer: Tokenizer | None, vocab_size: int
) -> Iterator[int]:
    """Yields the tokens of documents. ConversionError, naming `path`, for text without a tokenizer and unknown ids."""
    for number, document in enumerate(documents, 1):
        if isinstance(document, str):
            if tokenizer is None:
                raise ConversionError(
                    f"{path}: holds text, but the source has no tokenizer (tokenizer.json, or tokenizer_config.json "
                    "with its vocabulary); give JSON lines with input_ids"
                )
            ids = tokenizer.encode(document, add_special_tokens=False, verbose=False)
            yield from checked_ids(ids, f"{path}: the text", vocab_size)
            continue
        yield from checked_ids(document, f"{path}: input_ids of document {number}", vocab_size)


def checked_ids(ids: Sequence[int], where: str, vocab_size: int) -> Sequence[int]:
    """The ids. ConversionError for one that an embedding of `vocab_size` rows has no row for."""
    if fault := token_fault(ids, vocab_size):
        raise ConversionError(f"{where}: {fault}")
    return ids


def read_file(path: Path) -> Iterator[str | Sequence[int]]:
    """Documents of a JSON lines file, or the lines of a text file in pieces of about CHUNK_BYTES."""
    try:
        with file_errors(path), path.open(encoding="utf-8") as lines:
            if path.suffix.lower() in JSON_LINES:
                yield from _json_lines(path, lines)
                return
            while piece := lines.readlines(CHUNK_BYTES):
                text = "".join(piece)
                if "\0" in text:
                    raise ConversionError(
                        f"{path}: holds NUL bytes, expected plain text (UTF-8) or JSON lines (.jsonl)"
                    )
                yield text
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"{path}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start} of a piece), expected plain "
            "text or JSON lines (.jsonl); convert it first"
        ) from error


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[str | Sequence[int]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConversionError(
                f"{path}: line {number} is not JSON ({error}); expected one object a line"
            ) from error
        yield _document(record, f"{path}: line {number}")


def _document(record: Any, where: str) -> str | Sequence[int]:
    if isinstance(record, dict):
        if isinstance(text := record.get("text"), str):
            _check_characters(text, where)
            return text
        if isinstance(record.get("input_ids"), list):
            return record["input_ids"]
    raise ConversionError(f'{where} holds neither "text" (a string) nor "input_ids" (a list); expected one of them')


def _check_characters(text: str, where: str) -> None:
    """JSON can spell halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversionError(
            f"{where}: text has {text[error.start]!r} at {error.start}, half of a character (a surrogate), expected "
            "Unicode; mend the line or leave it out"
        ) from error


def read_dataset(folder: Path) -> Iterator[str | Sequence[int]]:
    """Documents of a folder written by `save_to_disk`; of several splits `train`, or the first."""
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ConversionError(
            f"{folder}: a folder that `datasets` did not save (no state.json); give a file of text or JSON lines"
        )
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ConversionError(
            f"{folder}: reading it needs the datasets package; install it, or give a file of text or JSON lines"
        ) from error
    try:
        loaded = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"{folder}: refused by datasets ({str(error).splitlines()[0]}); save it again"
        ) from error
    if isinstance(loaded, dict):
        loaded = loaded.get("train", next(iter(loaded.values())))
    for number, record in enumerate(loaded):
        yield _document(record, f"{folder}: row {number}")
