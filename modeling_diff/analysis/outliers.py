"""
The largest activations, and attention on quantised scores (arXiv:2410.05258, section 3.7).

B batch, T queries, S keys, H query heads, K key-value heads, D head_dim, N rows.
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
    """Streamed statistics of |x|: the k largest, exactly, and the median, to 0.05 %, in memory that does not grow."""

    def __init__(self, k: int = 100):
        self.k = k
        self.largest = torch.empty(0)
        self.bins = torch.zeros(1 << (31 - BIN_SHIFT), dtype=torch.int64)

    def update(self, values: torch.Tensor) -> None:
        """Takes in finite values of any shape."""
        magnitudes = values.detach().float().abs().flatten()
        top = magnitudes.topk(min(self.k, len(magnitudes))).values.cpu()
        self.largest = torch.cat((self.largest, top)).sort(descending=True).values[: self.k]
        bits = magnitudes.view(torch.int32) >> BIN_SHIFT
        self.bins += torch.bincount(bits, minlength=len(self.bins)).cpu()

    @property
    def count(self) -> int:
        return int(self.bins.sum())

    def top(self, rank: int) -> float:
        """The value of this rank, counted from 1; NaN beyond what was seen or kept."""
        return self.largest[rank - 1].item() if rank <= len(self.largest) else math.nan

    def median(self) -> float:
        """The lower median."""
        if not self.count:
            return math.nan
        place = int((self.bins.cumsum(0) >= (self.count + 1) // 2).int().argmax())
        edges = torch.tensor([place << BIN_SHIFT, ((place + 1) << BIN_SHIFT) - 1], dtype=torch.int32)
        return edges.view(torch.float32).mean().item()


@dataclass(frozen=True)
class Outliers:
    """Magnitudes of scaled scores before softmax, both maps' in DIFF, and of every layer's output."""

    attention_logits: Magnitudes
    hidden_states: Magnitudes


def measure_outliers(model: Any, rows: torch.Tensor, k: int = 100) -> Outliers:
    """
    Over all positions of `rows` (N, T) of token ids, all heads and all layers.

    Raises `ValueError` for models whose maps are not known.
    """
    attention_layers(model)
    found = Outliers(Magnitudes(k), Magnitudes(k))

    def visit(maps: LayerMaps) -> None:
        for logits in (maps.first_logits, maps.second_logits):
            if logits is not None:
                found.attention_logits.update(logits[logits.isfinite()])

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        found.hidden_states.update(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hook) for layer in decoder_of(model).layers]
    try:
        for row in rows.to(model.device).split(1):
            visit_maps(model, row, visit, logits=True)
    finally:
        for handle in handles:
            handle.remove()
    return found


def quantise(
    scores: torch.Tensor, bits: int, over: Literal["row", "head"] = "row", visible: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Scores (..., T, S) rounded to 2^bits - 1 levels, symmetric about zero: the largest magnitude of a row, or of a
    head's whole map, is the outermost. What is not `visible` has no part in it.
    """
    magnitudes = scores.abs() if visible is None else scores.abs().masked_fill(~visible, 0)
    largest = magnitudes.amax(-1 if over == "row" else (-2, -1), keepdim=True)
    # Where nothing is visible, any step will do that leaves what is hidden finite.
    step = torch.where(largest > 0, largest, 1.0) / (2 ** (bits - 1) - 1)
    return (scores / step).round() * step


def quantised_attention_forward(
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
    """Attention (B, T, H, D) by definition, scores quantised in float32; `query` (B, H, T, D), `key` (B, K, S, D)."""
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * scaling  # (B, H, T, S)
    visible = None if attention_mask is None else attention_mask == 0
    scores = quantise(scores, bits, over, visible)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2), None


@contextmanager
def quantised_scores(model: Any, bits: int, over: Literal["row", "head"] = "row") -> Iterator[Any]:
    """
    Inside, the model's attention logits are quantised, whatever it is asked to do; afterwards it is as before.

    `bits` 2 to 24. Raises `ValueError` for models whose attention is not known.
    """
    if not 2 <= bits <= 24:
        raise ValueError(f"bits={bits}: 2 to 24, as scores are float32")
    if over not in ("row", "head"):
        raise ValueError(f"over={over!r}: 'row' or 'head'")
    attention_layers(model)
    before = model.config._attn_implementation
    name = f"quantised_{bits}_bits_over_{over}"
    AttentionInterface.register(name, functools.partial(quantised_attention_forward, bits=bits, over=over))
    # Its mask is a float one that is always there.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation(name)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def mean_loss(model: Any, rows: torch.Tensor, batch_size: int = 4) -> float:
    """Cross entropy in nats a token over `rows` (N, T) of token ids, in float32."""
    check_token_ids(model, rows, "rows")
    total = 0.0
    for part in rows.to(model.device).split(batch_size):
        logits = model(input_ids=part).logits[:, :-1].float()
        total += nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / rows[:, 1:].numel()
