"""
Training text as rows of equal length: documents joined in one stream, which is cut.

R rows, T tokens a row.
"""

from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from conversion.data.text import JSON_LINES, checked_ids, read_dataset, read_file
from conversion.errors import ConversionError, file_errors


HELD_OUT_ROWS = 32
HELD_OUT_SHARE = 5  # in runs too short for so many, one row in five is held out


class Rows(Dataset):
    """Rows of token ids (R, T) with their numbers, by which a cache knows them."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index].long(), "row": index}


def pack_rows(
    paths: Sequence[Path], tokenizer: Any, row_tokens: int, vocab_size: int, max_rows: int | None, file: Path
) -> torch.Tensor:
    """
    int32 rows (R, T), T = `row_tokens`, mapped from `file`, which is written; at most `max_rows`.

    A document is a text file, a line of a JSON lines file or a row of a datasets folder. Text gets bos and eos around
    it, where the tokenizer has them; `input_ids` are taken as they are. A row may hold the end of one document and the
    beginning of the next, and attention reaches across; what does not fill the last row is dropped.
    Raises ConversionError for data that is missing, empty, neither text nor JSON lines, or not a row long.
    """
    tokens = _stream(paths, tokenizer, vocab_size)
    if max_rows is not None:
        tokens = islice(tokens, max_rows * row_tokens)
    count = 0
    with file_errors(file), file.open("wb") as stream:
        while piece := array("i", islice(tokens, 1 << 20)):
            stream.write(piece.tobytes())
            count += len(piece)
    if count < row_tokens:
        names = ", ".join(path.name for path in paths)
        raise ConversionError(f"{names}: {count} tokens, expected at least one row of {row_tokens}; give more text")
    return map_rows(file, count // row_tokens, row_tokens)


def map_rows(file: Path, num_rows: int, row_tokens: int) -> torch.Tensor:
    """Rows (R, T) that `pack_rows` has written; pages come into memory as they are read."""
    flat = torch.from_file(str(file), shared=False, size=num_rows * row_tokens, dtype=torch.int32)
    return flat.view(num_rows, row_tokens)


def rows_to_read(train_rows: int | None, held_out_rows: int | None) -> int | None:
    """How many rows give `train_rows` and those held out of them; None: all there are."""
    if train_rows is None:
        return None
    return train_rows + (held_out_rows or _share(train_rows, HELD_OUT_SHARE - 1))


def split_rows(rows: torch.Tensor, held_out_rows: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Holds out the first rows, by default one in HELD_OUT_SHARE, at most HELD_OUT_ROWS and at least one.

    Raises ConversionError if none is left to train on.
    """
    held_out_rows = held_out_rows or _share(len(rows), HELD_OUT_SHARE)
    if len(rows) <= held_out_rows:
        raise ConversionError(
            f"the data fill {len(rows)} rows of {rows.shape[1]} tokens, and {held_out_rows} are held out to measure "
            "on: give more text, a shorter --context, or other text to measure on (--held-out)"
        )
    return rows[held_out_rows:], rows[:held_out_rows]


def _share(num_rows: int, part: int) -> int:
    return min(HELD_OUT_ROWS, max(1, num_rows // part))


def _stream(paths: Sequence[Path], tokenizer: Any, vocab_size: int) -> Iterator[int]:
    for path in paths:
        is_text = path.is_file() and path.suffix.lower() not in JSON_LINES
        bos, eos = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
        around = [[] if token is None else [token] for token in (bos, eos)]
        checked_ids([*around[0], *around[1]], f"{path}: bos and eos", vocab_size)
        documents = enumerate(read_dataset(path) if path.is_dir() else read_file(path), 1)
        if is_text:
            yield from around[0]
        for number, document in documents:
            if not isinstance(document, str):
                yield from checked_ids(document, f"{path}: input_ids of document {number}", vocab_size)
                continue
            if tokenizer is None:
                raise ConversionError(
                    f"{path}: holds text, but the checkpoint has no tokenizer (tokenizer.json, or "
                    "tokenizer_config.json with its vocabulary); give JSON lines with input_ids"
                )
            ids = tokenizer.encode(document, add_special_tokens=False, verbose=False)
            checked_ids(ids, f"{path}: the text", vocab_size)
            yield from ids if is_text else [*around[0], *ids, *around[1]]
        if is_text:
            yield from around[1]
