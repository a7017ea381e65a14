"""Documents from text files, JSON lines or `datasets`, packed into rows whose positions restart at every document."""

import glob
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from ..analysis.tokens import token_fault
from .documents import (
    Document,
    document_tokens,
    is_saved_dataset,
    read_documents,
    read_saved_dataset,
    record_document,
)


IGNORED = -100

# Documents in an order that the generator decides.
Documents = Callable[[random.Random], Iterator[Document]]
Row = dict[str, list[int]]


def text_files(patterns: list[str], text_column: str = "text") -> Documents:
    """
    Returns a reader of files: a text file is a document, of JSON lines every line is; a new order every epoch.

    Args:
        patterns: Glob patterns; `**` goes through folders.
        text_column: Field of JSON lines that holds the text; a line without it may hold `input_ids`.

    Returns:
        The reader: called with a generator, it yields the documents of one epoch.

    Raises:
        ValueError: No file matches a pattern, or, when read, a file is not UTF-8 or no such JSON.
    """
    paths = []
    for pattern in patterns:
        found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
        if not found:
            raise ValueError(f"{pattern}: no file matches; quote patterns, as in 'corpus/**/*.txt'")
        paths += found

    def read(order: random.Random) -> Iterator[Document]:
        for path in order.sample(paths, len(paths)):
            yield from read_documents(path, text_column)

    return read


def dataset_documents(name: str, split: str, text_column: str = "text") -> Documents:
    """
    Returns a reader of a data set whose rows are documents, streamed where it is not on disk.

    Args:
        name: Folder that `datasets` saved, or what `load_dataset` takes.
        split: Split of it.
        text_column: Column that holds the text; a row without it may hold `input_ids`.

    Returns:
        The reader: called with a generator, which it ignores, it yields the documents of one epoch.

    Raises:
        ValueError: `datasets` is not installed, there is no such split, or, when read, a row has no text.
    """
    if is_saved_dataset(Path(name)):
        rows = read_saved_dataset(Path(name), split)
    else:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError("--dataset needs `pip install datasets`; --data reads text files without it") from error
        rows = load_dataset(name, split=split, streaming=True)

    def read(order: random.Random) -> Iterator[Document]:
        for number, row in enumerate(rows):
            yield record_document(row, f"{name}: row {number}", text_column)

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

    def token_pieces(self, document: Document) -> Iterator[Sequence[int]]:
        """Yields bos and the tokens of a text, then eos; nothing for an empty one, and `input_ids` unchanged."""
        if document.input_ids is not None:
            if fault := token_fault(document.input_ids, len(self.tokenizer)):
                raise ValueError(f"input_ids of a document: {fault}")
            yield document.input_ids
            return
        bos = self.tokenizer.bos_token_id
        empty = True
        for ids in document_tokens(document, self.tokenizer):
            if ids:
                yield [bos, *ids] if empty and bos is not None else ids
                empty = False
        if not empty:
            yield [self.tokenizer.eos_token_id]

    def room(self, row: Row) -> int:
        return self.max_length - len(row["input_ids"])

    def append(self, row: Row, ids: Sequence[int], restart: bool) -> None:
        start = 0 if restart else row["position_ids"][-1] + 1
        row["input_ids"] += ids
        row["position_ids"] += range(start, start + len(ids))
        row["labels"] += [IGNORED, *ids[1:]] if restart else ids
