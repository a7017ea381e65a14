"""
The largest activations, and attention on quantized scores (arXiv:2410.05258, section 3.7).

B batch, T queries, S keys, H query heads, K key-value heads, D head_dim.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .maps import LayerMaps, attention_layers, decoder_of, visit_maps
from .tokens import check_token_ids


# A magnitude's bin is the first 19 of its 31 bits in float32: eleven of the mantissa, so that a median is exact to
# one part in 2000.
BIN_SHIFT = 12


class Magnitudes:
    """
    Streamed statistics of |x| in constant memory: the largest values exactly, and the median to 0.05 %.

    Args:
        k: How many of the largest values to keep.
    """

    def __init__(self, k: int = 100):
        self.k = k
        self.largest = torch.empty(0)
        self.bins = torch.zeros(1 << (31 - BIN_SHIFT), dtype=torch.int64)

    def update(self, values: torch.Tensor) -> None:
        """Adds finite values of any shape."""
        magnitudes = values.detach().float().abs().flatten()
        top = magnitudes.topk(min(self.k, len(magnitudes))).values.cpu()
        self.largest = torch.cat((self.largest, top)).sort(descending=True).values[: self.k]
        bits = magnitudes.view(torch.int32) >> BIN_SHIFT
        self.bins += torch.bincount(bits, minlength=len(self.bins)).cpu()

    @property
    def count(self) -> int:
        """Returns the number of values."""
        return int(self.bins.sum())

    def top(self, rank: int) -> float:
        """Returns the value of this rank, counted from 1; NaN beyond what was seen or kept."""
        return self.largest[rank - 1].item() if rank <= len(self.largest) else math.nan

    def median(self) -> float:
        """Returns the lower median; NaN without values."""
        if not self.count:
            return math.nan
        index = int((self.bins.cumsum(0) >= (self.count + 1) // 2).int().argmax())
        edges = torch.tensor([index << BIN_SHIFT, ((index + 1) << BIN_SHIFT) - 1], dtype=torch.int32)
        return edges.view(torch.float32).mean().item()


@dataclass(frozen=True)
class Outliers:
    """
    Magnitudes of activations.

    Attributes:
        attention_logits: Scaled scores before softmax, of both maps in DIFF.
        hidden_states: Outputs of every layer.
    """

    attention_logits: Magnitudes
    hidden_states: Magnitudes


def measure_outliers(model: Any, input_ids: torch.Tensor, k: int = 100) -> Outliers:
    """
    Measures activations over all positions, heads and layers, one text at a time.

    Args:
        model: A LLaMA-like or differential model.
        input_ids: Texts without padding, (B, T).
        k: How many of the largest values to keep.

    Returns:
        Magnitudes of attention logits and of hidden states.

    Raises:
        ValueError: The model's maps are not known.
    """
    attention_layers(model)
    found = Outliers(Magnitudes(k), Magnitudes(k))

    def visit(maps: LayerMaps) -> None:
        for logits in (maps.positive_logits, maps.negative_logits):
            if logits is not None:
                found.attention_logits.update(logits[logits.isfinite()])

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        found.hidden_states.update(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hook) for layer in decoder_of(model).layers]
    try:
        for text in input_ids.to(model.device).split(1):
            visit_maps(model, text, visit, logits=True)
    finally:
        for handle in handles:
            handle.remove()
    return found


def quantize(
    scores: torch.Tensor, bits: int, over: Literal["row", "head"] = "row", visible: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Rounds scores to 2^bits - 1 levels, symmetric about zero; the outermost is the largest magnitude.

    Args:
        scores: Attention scores, (..., T, S).
        bits: Bits per score, at least 2.
        over: Whether levels are chosen per "row" (query) or per "head".
        visible: True where a score counts for the largest magnitude. Defaults to everywhere.

    Returns:
        Scores of the same shape.
    """
    magnitudes = scores.abs() if visible is None else scores.abs().masked_fill(~visible, 0)
    largest = magnitudes.amax(-1 if over == "row" else (-2, -1), keepdim=True)
    # Where nothing is visible, any step that leaves hidden scores finite will do.
    step = torch.where(largest > 0, largest, 1.0) / (2 ** (bits - 1) - 1)
    return (scores / step).round() * step


def quantized_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    bits: int,
    over: Literal["row", "head"],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Computes attention by definition with scores quantized in float32, as an attention interface.

    Args:
        module: The attention module, which is not read.
        query: (B, H, T, d).
        key: (B, K, S, d).
        value: (B, K, S, D).
        attention_mask: (B, 1, T, S), additive, 0 for visible. None for all keys.
        scaling: Factor of the scores.
        bits: Bits per score, at least 2.
        over: Whether levels are chosen per "row" (query) or per "head".
        kwargs: What other implementations read.

    Returns:
        Outputs of heads, (B, T, H, D), and None, as there are no weights to give.
    """
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)).float() * scaling  # (B, H, T, S)
    visible = None if attention_mask is None else attention_mask == 0
    scores = quantize(scores, bits, over, visible)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2), None


@contextmanager
def quantized_scores(model: Any, bits: int, over: Literal["row", "head"] = "row") -> Iterator[Any]:
    """
    Quantizes a model's attention logits within a context.

    Args:
        model: A LLaMA-like or differential model.
        bits: Bits per score, 2 to 24.
        over: Whether levels are chosen per "row" (query) or per "head".

    Yields:
        The model.

    Raises:
        ValueError: The model's attention is not known, or an argument is out of range.
    """
    if not 2 <= bits <= 24:
        raise ValueError(f"bits={bits}: 2 to 24, as scores are float32")
    if over not in ("row", "head"):
        raise ValueError(f"over={over!r}: 'row' or 'head'")
    attention_layers(model)
    before = model.config._attn_implementation
    name = f"quantized_{bits}_bits_over_{over}"
    AttentionInterface.register(name, functools.partial(quantized_attention_forward, bits=bits, over=over))
    # Its mask is a float one that is always there.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation(name)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def mean_loss(model: Any, input_ids: torch.Tensor, batch_size: int = 4) -> float:
    """
    Computes the mean cross entropy of the next token in float32.

    Args:
        model: A causal language model.
        input_ids: Texts without padding, (B, T).
        batch_size: Texts per batch.

    Returns:
        The loss in nats/token.

    Raises:
        ValueError: A token is outside the vocabulary.
    """
    check_token_ids(model, input_ids, "rows")
    total = 0.0
    for batch in input_ids.to(model.device).split(batch_size):
        logits = model(input_ids=batch).logits[:, :-1].float()
        total += nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / input_ids[:, 1:].numel()
