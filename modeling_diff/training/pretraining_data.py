"""Documents from text files, JSON lines or `datasets`, packed into rows whose positions restart at every document."""

import glob
import json
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase


JSON_LINES = (".jsonl", ".ndjson", ".json")
PIECE_BYTES = 1 << 20
IGNORED = -100

# A document comes in pieces, so that none is ever held whole; documents in an order that the generator decides.
Documents = Callable[[random.Random], Iterator[Iterable[str]]]
Row = dict[str, list[int]]


def text_files(patterns: list[str], text_column: str = "text") -> Documents:
    """
    Returns a reader of files: a text file is a document, of JSON lines every line is; a new order every epoch.

    Args:
        patterns: Glob patterns; `**` goes through folders.
        text_column: Field of JSON lines that holds the text.

    Raises:
        ValueError: No file matches a pattern, or, when read, a file is not UTF-8 or no such JSON.
    """
    paths = []
    for pattern in patterns:
        found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
        if not found:
            raise ValueError(f"{pattern}: no file matches; quote patterns, as in 'corpus/**/*.txt'")
        paths += found

    def read(order: random.Random) -> Iterator[Iterable[str]]:
        for path in order.sample(paths, len(paths)):
            yield from json_lines(path, text_column) if path.suffix in JSON_LINES else [pieces(path)]

    return read


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8") as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}); convert it, or narrow the pattern") from error


def pieces(path: Path) -> Iterator[str]:
    """Yields whole lines, about PIECE_BYTES at a time."""
    with opened(path) as lines:
        while piece := lines.readlines(PIECE_BYTES):
            yield "".join(piece)


def json_lines(path: Path, text_column: str) -> Iterator[Iterable[str]]:
    with opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield [checked_text(json.loads(line), text_column)]
            except (json.JSONDecodeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def checked_text(record: dict, text_column: str) -> str:
    text = record.get(text_column) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"no string under {text_column!r}; name the field with --text-column")
    return text


def dataset_documents(name: str, split: str, text_column: str = "text") -> Documents:
    """
    Returns a reader of a data set whose rows are documents, streamed where it is not on disk.

    Args:
        name: Folder that `datasets` saved, or what `load_dataset` takes.
        split: Split of it.
        text_column: Column that holds the text.

    Raises:
        ValueError: `datasets` is not installed, or, when read, a row has no text.
    """
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError as error:
        raise ValueError("--dataset needs `pip install datasets`; --data reads text files without it") from error
    if any((Path(name) / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        rows = load_from_disk(name)
        rows = rows[split] if isinstance(rows, DatasetDict) else rows
    else:
        rows = load_dataset(name, split=split, streaming=True)

    def read(order: random.Random) -> Iterator[Iterable[str]]:
        for row in rows:
            yield [checked_text(row, text_column)]

    return read


class PackedRows(IterableDataset):
    """
    Iterates over rows of exactly `max_length` tokens without end: bos, a document, eos, bos, the next document.

    `position_ids` restart at every document, by which LLaMA and DIFF models mask documents from each other; the first
    token of a document has no label, as nothing before it belongs to it. A document is cut where a row is full, and
    its rest begins the next row at position 0. Everything depends on `seed` alone.

    Args:
        documents: Reader of documents, as `text_files` and `dataset_documents` return it.
        tokenizer: Tokenizer with an eos token; a bos token is used where there is one.
        max_length: Tokens per row.
        seed: Seed of the order of documents and rows.
        shuffle_rows: Rows that wait to be drawn in random order.

    Raises:
        ValueError: The tokenizer has no eos token, or, while iterating, an epoch holds no text.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int = 0,
        shuffle_rows: int = 256,
    ):
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, which ends every document; name one with --eos-token")
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: a row needs 2 tokens at least, one to see and one to predict")
        self.documents = documents
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.seed = seed
        self.shuffle_rows = shuffle_rows

    def __iter__(self) -> Iterator[Row]:
        order = random.Random(self.seed)
        waiting = []
        for row in self.in_order(order, endless=True):
            waiting.append(row)
            if len(waiting) > self.shuffle_rows:
                place = order.randrange(len(waiting))
                waiting[place], waiting[-1] = waiting[-1], waiting[place]
                yield waiting.pop()

    def first_pass(self, max_rows: int | None = None) -> list[Row]:
        """
        Returns the rows of one epoch in the order read, without what does not fill a row.

        Args:
            max_rows: Rows after which reading stops; None reads all.

        Raises:
            ValueError: The text does not fill one row.
        """
        rows = []
        for row in self.in_order(random.Random(self.seed), endless=False):
            rows.append(row)
            if len(rows) == max_rows:
                break
        if not rows:
            raise ValueError(
                f"the text does not fill one row of {self.max_length} tokens; give more or lower --max-length"
            )
        return rows

    def in_order(self, order: random.Random, endless: bool) -> Iterator[Row]:
        row: Row = {"input_ids": [], "position_ids": [], "labels": []}
        read = None
        while read is None or endless:
            read = 0
            for document in self.documents(order):
                first = True
                for ids in self.token_pieces(document):
                    read += len(ids)
                    while ids:
                        room = self.room(row)
                        taken = ids[:room]
                        ids = ids[room:]
                        self.append(row, taken, restart=first or not row["input_ids"])
                        first = False
                        if not self.room(row):
                            yield row
                            row = {name: [] for name in row}
            if not read:
                raise ValueError("the data hold no text: every document is empty")

    def token_pieces(self, document: Iterable[str]) -> Iterator[list[int]]:
        """Yields bos and the document's tokens, then eos; nothing for an empty document."""
        bos = self.tokenizer.bos_token_id
        empty = True
        for text in document:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            if ids:
                yield [bos, *ids] if empty and bos is not None else ids
                empty = False
        if not empty:
            yield [self.tokenizer.eos_token_id]

    def room(self, row: Row) -> int:
        return self.max_length - len(row["input_ids"])

    def append(self, row: Row, ids: list[int], restart: bool) -> None:
        start = 0 if restart else row["position_ids"][-1] + 1
        row["input_ids"] += ids
        row["position_ids"] += range(start, start + len(ids))
        row["labels"] += [IGNORED, *ids[1:]] if restart else ids
