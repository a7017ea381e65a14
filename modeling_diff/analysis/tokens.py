"""A text as tokens: ids, how they are written, and which of them a stretch of it became."""

from collections.abc import Sequence
from typing import Any

import torch


def encode_text(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids (1, T). ValueError for a missing tokenizer or a text without tokens."""
    if tokenizer is None:
        raise ValueError("tokenizer is None: a text needs the checkpoint's tokenizer; give token ids otherwise.")
    if not text.strip():
        raise ValueError("text is empty: there is nothing to attend to; give at least a word.")
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids


def token_labels(tokenizer: Any, input_ids: Sequence[int]) -> list[str]:
    """Each token as text; as the tokenizer's own piece where it is part of a character; as its number without one."""
    if tokenizer is None:
        return [str(token) for token in input_ids]
    labels = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in input_ids]
    pieces = tokenizer.convert_ids_to_tokens(list(input_ids))
    return [piece if not label or "\ufffd" in label else label for label, piece in zip(labels, pieces, strict=True)]


def token_span(tokenizer: Any, text: str, characters: tuple[int, int]) -> tuple[int, int]:
    """
    First token, and one past the last, that characters [start, end) of a text became, special tokens counted.

    Raises ValueError for a tokenizer that does not tell, and for characters that became no token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} does not tell where tokens stand; load the fast one.")
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False).offset_mapping
    start, end = characters
    touched = [place for place, (first, last) in enumerate(offsets) if first < end and last > start]
    if not touched:
        raise ValueError(f"characters={characters}: no token of the text stands there; it has {len(text)} characters.")
    return touched[0], touched[-1] + 1
