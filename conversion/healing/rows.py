"""
Rows of token ids to train and to measure on, and how many of them are held out.

R rows, T tokens per row.
"""

from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset

from conversion.data.text import document_ids
from conversion.errors import ConversionError, typed
from conversion.healing.options import MAX_LENGTH
from modeling_diff.training.documents import Document, record_document


HELD_OUT_ROWS = 32
HELD_OUT_SHARE = 5  # in runs too short for so many, one row in five is held out


class Rows(Dataset):
    """Rows of token ids (R, T) with their numbers from `first` on, by which a cache knows them."""

    def __init__(self, rows: torch.Tensor, first: int = 0):
        self.rows = rows
        self.first = first

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index].long(), "row": self.first + index}


def sequence_length(config: Any, max_length: int | None) -> int:
    """Returns the tokens per sequence: what was asked for, or MAX_LENGTH, or what the model can read if that is less.

    Raises:
        ConversionError: It is more than the model can read, or holds nothing to predict.
    """
    longest = config.max_position_embeddings
    length = max_length or min(longest, MAX_LENGTH)
    if length > longest:
        raise ConversionError(
            f"{typed('max_length')} is {length}: the model reads at most {longest} tokens (max_position_embeddings); "
            "ask for fewer"
        )
    if length < 2:
        raise ConversionError(
            f"{typed('max_length')} is {length}: a sequence holds a token and one that follows; ask for more"
        )
    return length


def dataset_rows(
    records: Iterable[Any],
    name: str,
    tokenizer: Any,
    *,
    row_tokens: int,
    vocab_size: int,
    max_rows: int | None = None,
) -> Rows:
    """Packs records in memory as `pack_rows` packs files.

    Args:
        records: Objects with `text` or `input_ids`.
        name: What the records are called in messages.
        tokenizer: The checkpoint's tokenizer; without one only `input_ids` will do.
        row_tokens: Tokens per row.
        vocab_size: Number of tokens that the model knows.
        max_rows: Rows after which reading stops; None reads all.

    Raises:
        ConversionError: A record holds neither, text comes without a tokenizer, or there is less than a row.
    """
    documents = _documents(records, name)
    tokens = document_ids(documents, name, tokenizer, vocab_size, boundaries=True)
    ids = array("i", tokens if max_rows is None else islice(tokens, max_rows * row_tokens))
    if len(ids) < row_tokens:
        raise ConversionError(
            f"{name}: {len(ids)} tokens, expected at least one sequence of {row_tokens}; give more text"
        )
    whole = len(ids) // row_tokens * row_tokens
    return Rows(torch.tensor(ids[:whole], dtype=torch.int32).view(-1, row_tokens))


def _documents(records: Iterable[Any], name: str) -> Iterator[Document]:
    for number, record in enumerate(records, 1):
        given = record
        if isinstance(record, dict) and hasattr(record.get("input_ids"), "tolist"):  # numpy's and torch's
            given = record | {"input_ids": record["input_ids"].tolist()}
        try:
            document = record_document(given, f"{name}: record {number}", "text")
        except ValueError as error:
            raise ConversionError(str(error)) from error
        yield document


def rows_to_read(train_rows: int | None, held_out_rows: int | None) -> int | None:
    """Returns how many rows give `train_rows` and those held out of them; None: all there are."""
    if train_rows is None:
        return None
    return train_rows + (held_out_rows or _share(train_rows, HELD_OUT_SHARE - 1))


def split_rows(rows: torch.Tensor, held_out_rows: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Holds out the first rows.

    Args:
        rows: Rows, (R, T).
        held_out_rows: How many; None: one in HELD_OUT_SHARE, at most HELD_OUT_ROWS and at least one.

    Returns:
        Rows to train on, and rows held out.

    Raises:
        ConversionError: None is left to train on.
    """
    held_out_rows = held_out_rows or _share(len(rows), HELD_OUT_SHARE)
    if len(rows) <= held_out_rows:
        raise ConversionError(
            f"the data fill {len(rows)} sequences of {rows.shape[1]} tokens, and {held_out_rows} are held out to "
            "measure on: give more text, a shorter --max-length, or other text to measure on (--held-out)"
        )
    return rows[held_out_rows:], rows[:held_out_rows]


def _share(num_rows: int, part: int) -> int:
    return min(HELD_OUT_ROWS, max(1, num_rows // part))
