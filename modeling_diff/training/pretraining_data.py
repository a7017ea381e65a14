"""Documents from text files, JSON lines or `datasets`, packed into rows whose positions restart at every document.

Size legend: T tokens a row (the context).
"""

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
    Every text file is a document, of JSON lines every line; files in another order every epoch.

    Raises `ValueError` for a pattern that no file matches, and, when read, for what is not UTF-8 or not such JSON.
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
    """Whole lines, about PIECE_BYTES at a time."""
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
    Rows of a folder that `datasets` saved, or of what `load_dataset` knows, streamed.

    Raises `ValueError` without `datasets`, and, when read, for a row without text.
    """
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError as error:
        raise ValueError("--dataset needs `pip install datasets`; --train reads text files without it") from error
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
    Rows of exactly `context` tokens without end: bos, a document, eos, bos, the next, cut where a row is full.

    `position_ids` restart at every document, by which LLaMA and DIFF models mask documents from each other; the first
    token of a document has no label, nothing before it belongs to it. What a row cuts off begins the next row, at
    position 0. Rows leave through a buffer of `shuffle_rows` in random order. Everything depends on `seed` alone.

    Raises `ValueError` for a tokenizer without eos, and while iterating, if an epoch holds no text.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        seed: int = 0,
        shuffle_rows: int = 256,
    ):
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, which ends every document; name one with --eos-token")
        if context < 2:
            raise ValueError(f"context={context}: a row needs 2 tokens at least, one to see and one to predict")
        self.documents, self.tokenizer, self.context = documents, tokenizer, context
        self.seed, self.shuffle_rows = seed, shuffle_rows

    def __iter__(self) -> Iterator[Row]:
        order, waiting = random.Random(self.seed), []
        for row in self.in_order(order, endless=True):
            waiting.append(row)
            if len(waiting) > self.shuffle_rows:
                place = order.randrange(len(waiting))
                waiting[place], waiting[-1] = waiting[-1], waiting[place]
                yield waiting.pop()

    def first_pass(self, max_rows: int | None = None) -> list[Row]:
        """The rows of one epoch in the order read, `max_rows` at most; what does not fill a row is dropped."""
        rows = []
        for row in self.in_order(random.Random(self.seed), endless=False):
            rows.append(row)
            if len(rows) == max_rows:
                break
        if not rows:
            raise ValueError(f"the text does not fill one row of {self.context} tokens; give more or lower --context")
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
                        taken, ids = ids[: self.room(row)], ids[self.room(row) :]
                        self.append(row, taken, restart=first or not row["input_ids"])
                        first = False
                        if not self.room(row):
                            yield row
                            row = {name: [] for name in row}
            if not read:
                raise ValueError("the data hold no text: every document is empty")

    def token_pieces(self, document: Iterable[str]) -> Iterator[list[int]]:
        """bos and the document's tokens, then eos; nothing for an empty document."""
        bos, empty = self.tokenizer.bos_token_id, True
        for text in document:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            if ids:
                yield [bos, *ids] if empty and bos is not None else ids
                empty = False
        if not empty:
            yield [self.tokenizer.eos_token_id]

    def room(self, row: Row) -> int:
        return self.context - len(row["input_ids"])

    def append(self, row: Row, ids: list[int], restart: bool) -> None:
        start = 0 if restart else row["position_ids"][-1] + 1
        row["input_ids"] += ids
        row["position_ids"] += range(start, start + len(ids))
        row["labels"] += [IGNORED, *ids[1:]] if restart else ids
