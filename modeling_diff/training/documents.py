"""Reading of text to train or to measure on: files, JSON lines and data sets, as documents and their tokens."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO


JSON_LINES = (".jsonl", ".ndjson", ".json")
PIECE_BYTES = 1 << 16


class Tokenizer(Protocol):
    """What is asked of a transformers tokenizer."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]: ...


@dataclass(frozen=True)
class Document:
    """One document: text in pieces of whole lines, so that a large one is never held whole, or token ids."""

    text: Iterable[str] = ()
    input_ids: Sequence[int] | None = None


def is_json_lines(path: Path) -> bool:
    """Returns whether a file is read as JSON lines, which its name says; every other file is text."""
    return path.suffix.lower() in JSON_LINES


def is_saved_dataset(folder: Path) -> bool:
    """Returns whether `datasets` has saved this folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_documents(path: Path, text_column: str = "text") -> Iterator[Document]:
    """
    Yields the documents of a text file (one), of JSON lines (one per line) or of a folder that `datasets` saved.

    Args:
        path: File or folder. Of several splits `train` is read, or the first.
        text_column: Field that holds the text; a record without it may hold `input_ids`.

    Yields:
        One document after another, in the order of the file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is neither text nor JSON lines, the folder no data set, or a record holds no document.
    """
    if path.is_dir():
        for number, record in enumerate(read_saved_dataset(path)):
            yield record_document(record, f"{path}: row {number}", text_column)
    elif is_json_lines(path):
        for place, record in json_lines(path):
            yield record_document(record, place, text_column)
    else:
        yield Document(text_pieces(path))


def document_tokens(document: Document, tokenizer: Tokenizer) -> Iterator[Sequence[int]]:
    """
    Yields the tokens of a document piece by piece, without special tokens.

    Args:
        document: A document of text, or of token ids, which are one piece.
        tokenizer: Tokenizer of the text.

    Yields:
        Token ids of each piece.
    """
    if document.input_ids is not None:
        yield document.input_ids
    for text in document.text:
        # Not verbose: a warning about the length would be about documents, which are cut afterwards.
        yield tokenizer.encode(text, add_special_tokens=False, verbose=False)


def text_pieces(path: Path) -> Iterator[str]:
    """
    Yields whole lines of a text file, about PIECE_BYTES at a time.

    Args:
        path: A file of UTF-8.

    Yields:
        Text of several lines, line ends included.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, or holds NUL bytes.
    """
    with utf8_file(path) as lines:
        while piece := lines.readlines(PIECE_BYTES):
            text = "".join(piece)
            if "\0" in text:
                raise ValueError(f"{path}: holds NUL bytes, expected plain text (UTF-8) or JSON lines (.jsonl)")
            yield text


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """
    Yields what stands in the lines of a file that are not blank.

    Args:
        path: A file of UTF-8, with one value of JSON per line.

    Yields:
        The place of a line for messages, "FILE: line N" with N from 1, and what it holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, or a line is not JSON.
    """
    with utf8_file(path) as lines:  # whose lines do not end at U+2028 and its like, which JSON may hold
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}: line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                # Not the decoder's whole message: it counts lines within this one.
                reason = f"{error.msg} at {error.pos}" if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{place} is not JSON ({reason}); expected one object per line") from error
            yield place, record


@contextmanager
def utf8_file(path: Path) -> Iterator[TextIO]:
    """Opens a text file; `ValueError` where it is read and not UTF-8."""
    try:
        with path.open(encoding="utf-8") as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start} of a piece), expected plain "
            "text or JSON lines (.jsonl); convert it first"
        ) from error


def record_document(record: Any, place: str, text_column: str) -> Document:
    """
    Returns the document of a record.

    Args:
        record: An object of JSON or a row of a data set.
        place: Where it stands, which begins the message.
        text_column: Field that holds the text; a record without it may hold `input_ids`.

    Raises:
        ValueError: It holds neither, or text with half of a character.
    """
    if isinstance(record, dict):
        text = record.get(text_column)
        if isinstance(text, str):
            check_characters(text, f"{place}: {text_column}")
            return Document([text])
        if isinstance(record.get("input_ids"), list):
            return Document(input_ids=record["input_ids"])
    raise ValueError(
        f'{place} holds neither "{text_column}" (a string) nor "input_ids" (a list); expected one of them'
    )


def check_characters(text: str, what: str) -> None:
    """Raises `ValueError` for half of a character: JSON can spell one, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} has {text[error.start]!r} at {error.start}, half of a character (a surrogate), expected "
            "Unicode; mend the line or leave it out"
        ) from error


def read_saved_dataset(folder: Path, split: str | None = None) -> Iterable[Any]:
    """
    Returns the rows of a folder that `datasets` saved.

    Args:
        folder: What `save_to_disk` wrote.
        split: Split to read, where there are several; None reads `train`, or the first.

    Raises:
        ValueError: `datasets` did not save it, cannot read it or is not installed, or there is no such split.
    """
    if not is_saved_dataset(folder):
        raise ValueError(
            f"{folder}: a folder that `datasets` did not save (no state.json); give a file of text or JSON lines"
        )
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ValueError(
            f"{folder}: reading it needs the datasets package; install it, or give a file of text or JSON lines"
        ) from error
    try:
        rows = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: refused by datasets ({str(error).splitlines()[0]}); save it again") from error
    if not isinstance(rows, dict):
        return rows
    if split is None:
        return rows.get("train", next(iter(rows.values())))
    if split not in rows:
        raise ValueError(f"{folder}: has no split {split!r}; choose one of {', '.join(rows)}")
    return rows[split]
