"""Tokens of a text: their ids, whether a model knows them, their labels, those of a part, and repeated random ones."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def encode_text(tokenizer: Any, text: str) -> torch.Tensor:
    """
    Tokenizes one text.

    Args:
        tokenizer: The checkpoint's tokenizer.
        text: The text.

    Returns:
        Token ids, (1, T).

    Raises:
        ValueError: The tokenizer is None, or the text is empty.
    """
    if tokenizer is None:
        raise ValueError("tokenizer is None: a text needs the checkpoint's tokenizer; give token ids otherwise.")
    if not text.strip():
        raise ValueError("text is empty: there is nothing to attend to; give at least a word.")
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids


def repeated_tokens(
    vocabulary: Sequence[int], length: int, repeats: int, batch_size: int, first: int | None, seed: int
) -> torch.Tensor:
    """
    Draws distinct random tokens and repeats them.

    Args:
        vocabulary: Token ids to draw from.
        length: Number of tokens that are repeated.
        repeats: How often they stand there, the first time included.
        batch_size: Number of texts.
        first: Token before them, such as bos; None for none.
        seed: Seed of the draw.

    Returns:
        Token ids, (B, length * repeats), and one more column with `first`.

    Raises:
        ValueError: The vocabulary has fewer tokens than `length`.
    """
    if len(vocabulary) < length:
        raise ValueError(f"length={length}: the vocabulary has {len(vocabulary)} tokens to draw from; choose fewer.")
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(vocabulary), generator=generator)[:length] for _ in range(batch_size)]
    rows = torch.tensor(list(vocabulary))[torch.stack(drawn)].repeat(1, repeats)
    return rows if first is None else torch.cat([torch.full((batch_size, 1), first), rows], dim=1)


def token_fault(ids: torch.Tensor | Iterable[Any], vocab_size: int) -> str | None:
    """
    Returns what is wrong with token ids for an embedding of `vocab_size` rows, or None.

    Every command and measurement checks here: PyTorch only says "index out of range", and on a GPU not even where.
    """
    if isinstance(ids, torch.Tensor):
        ids = (int(extreme) for extreme in torch.aminmax(ids)) if ids.numel() else ()
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            return (
                f"token {token!r}, expected whole numbers from 0 to {vocab_size - 1}, as vocab_size is "
                f"{vocab_size}; use the tokenizer that belongs to the checkpoint, or leave out text with that token"
            )
    return None


def check_token_ids(model: Any, ids: torch.Tensor | Iterable[Any], what: str) -> None:
    """Raises `ValueError` for ids that `model` has no embedding for; `what` they are begins the message."""
    if fault := token_fault(ids, model.config.vocab_size):
        raise ValueError(f"{what}: {fault}.")


def token_labels(tokenizer: Any, input_ids: Sequence[int]) -> list[str]:
    """
    Labels tokens with their text.

    Args:
        tokenizer: The checkpoint's tokenizer, or None.
        input_ids: Token ids.

    Returns:
        Each token as text, as the tokenizer's own piece where it is part of a character, or as its number without a
        tokenizer.
    """
    if tokenizer is None:
        return [str(token) for token in input_ids]
    labels = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in input_ids]
    pieces = tokenizer.convert_ids_to_tokens(list(input_ids))
    return [piece if not label or "\ufffd" in label else label for label, piece in zip(labels, pieces, strict=True)]


def token_span(tokenizer: Any, text: str, characters: tuple[int, int]) -> tuple[int, int]:
    """
    Finds the tokens of a part of a text.

    Args:
        tokenizer: A fast tokenizer.
        text: The whole text.
        characters: The part, characters [start, end).

    Returns:
        Positions [start, end) of its tokens, special tokens counted.

    Raises:
        ValueError: The tokenizer is a slow one, or the characters are part of no token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} does not tell where tokens stand; load the fast one.")
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False).offset_mapping
    start, end = characters
    positions = [position for position, (first, last) in enumerate(offsets) if first < end and last > start]
    if not positions:
        raise ValueError(f"characters={characters}: no token of the text stands there; it has {len(text)} characters.")
    return positions[0], positions[-1] + 1


def visible_tokens(config: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """
    Checks texts before a model reads them.

    Args:
        config: The model's config.
        input_ids: Texts, (B, T).
        attention_mask: 0 for padding, else 1, (B, T); None for no padding.

    Returns:
        False for padding, else True, (B, T); None for no padding.

    Raises:
        ValueError: There is no token, one is unknown, there are too many, or the mask has another shape.
    """
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids of shape {tuple(input_ids.shape)}: give (batch, tokens) with at least one token.")
    if fault := token_fault(input_ids, config.vocab_size):
        raise ValueError(f"input_ids: {fault}.")
    limit = config.max_position_embeddings
    if input_ids.shape[1] > limit:
        raise ValueError(
            f"{input_ids.shape[1]} tokens, and the model reads max_position_embeddings={limit}: shorten the text."
        )
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: give one number per token, "
            f"{tuple(input_ids.shape)}, 1 or 0 for padding."
        )
    return attention_mask.bool()
