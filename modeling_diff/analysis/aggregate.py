"""
Aggregates of maps: means over heads and layers, normalized rows, attention to a span.

B batch, L chosen layers, H chosen heads, Q chosen queries, S keys.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from .maps import LayerMaps, visit_maps


MapKind = Literal["positive", "negative", "difference"]
Normalization = Literal["none", "sum", "absolute"]
MAP_KINDS: tuple[MapKind, ...] = ("positive", "negative", "difference")


def weights_of(maps: LayerMaps, kind: MapKind, normalization: Normalization = "none") -> torch.Tensor:
    """
    Selects one of a layer's maps.

    Args:
        maps: A layer's maps.
        kind: "positive" for A1 (LLaMA's A), "negative" for A2, "difference" for A1 - lambda A2.
        normalization: See `normalize`.

    Returns:
        Attention weights, (B, H, Q, S).

    Raises:
        ValueError: The kind is unknown, or the layer has no negative map.
    """
    if kind not in MAP_KINDS:
        raise ValueError(f"kind={kind!r}: there are {', '.join(MAP_KINDS)}.")
    if kind == "negative" and maps.negative is None:
        raise ValueError(f"kind='negative': layer {maps.layer} subtracts no map; ask for 'positive' or 'difference'.")
    weights = maps.difference() if kind == "difference" else getattr(maps, kind)
    return normalize(weights, normalization)


def normalize(weights: torch.Tensor, normalization: Normalization) -> torch.Tensor:
    """
    Scales rows so that they compare: those of a difference sum to 1 - lambda, which differs between heads and layers.

    Args:
        weights: Attention weights, (..., S).
        normalization: "none", "sum" to divide by the row's sum (1 - lambda, which must not be near 0), or "absolute"
            to divide by the sum of absolute values.

    Returns:
        Weights of the same shape; rows of zeros are unchanged.

    Raises:
        ValueError: The normalization is unknown.
    """
    if normalization == "none":
        return weights
    if normalization not in ("sum", "absolute"):
        raise ValueError(f"normalization={normalization!r}: there are none, sum, absolute.")
    totals = (weights if normalization == "sum" else weights.abs()).sum(-1, keepdim=True)
    return weights / totals.masked_fill(totals == 0, 1.0)


def mean_maps(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    over: Literal["heads", "layers", "both"] = "both",
    kind: MapKind = "difference",
    normalization: Normalization = "absolute",
    **choices: Any,
) -> torch.Tensor:
    """
    Averages one kind of map in one forward pass; besides the result, one block of maps is held.

    Args:
        model: A LLaMA-like or differential model.
        input_ids: Texts, (B, T).
        over: "heads", "layers" (which needs the same number of heads in every layer) or "both" (where every layer
            has the same weight).
        kind: Which map, see `weights_of`.
        normalization: See `normalize`.
        choices: Keyword arguments of `visit_maps`.

    Returns:
        Mean weights: (L, B, Q, S) over heads, (B, H, Q, S) over layers, (B, Q, S) over both.

    Raises:
        ValueError: An argument is unknown or out of range, or layers have different numbers of heads.
    """
    if over not in ("heads", "layers", "both"):
        raise ValueError(f"over={over!r}: there are heads, layers, both.")
    blocks: dict[int, dict[int, torch.Tensor]] = {}
    num_layers: set[int] = set()

    def add(maps: LayerMaps) -> None:
        weights = weights_of(maps, kind, normalization)
        weights = weights if over == "layers" else weights.mean(1, keepdim=True)
        rows = blocks.setdefault(maps.layer if over == "heads" else 0, {})
        start = int(maps.queries[0])
        if start in rows and rows[start].shape != weights.shape:
            raise ValueError(
                f"layer {maps.layer} has {weights.shape[1]} chosen heads and an earlier one {rows[start].shape[1]}: "
                'a mean over layers needs as many in each; choose heads, or over="both".'
            )
        rows[start] = rows[start] + weights if start in rows else weights
        num_layers.add(maps.layer)

    visit_maps(model, input_ids, add, **choices)
    means = [torch.cat(list(rows.values()), dim=2) for _, rows in sorted(blocks.items())]  # (B, 1 or H, Q, S) each
    if over == "heads":
        return torch.stack(means).squeeze(2)
    mean = means[0] / len(num_layers)
    return mean if over == "layers" else mean.squeeze(1)


def attention_to_span(
    weights: torch.Tensor, span: Sequence[int], normalization: Normalization = "absolute"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sums the attention of every query to the keys of a span, and to all other keys.

    Args:
        weights: Attention weights, (..., Q, S).
        span: Positions of keys, each from 0 to S - 1.
        normalization: See `normalize`. With "absolute" the two sums are shares that add up to 1; otherwise they are
            signed.

    Returns:
        Attention to the span and to all other keys, (..., Q) each.

    Raises:
        ValueError: The span is empty or out of range.
    """
    num_keys = weights.shape[-1]
    if not len(span) or any(not 0 <= position < num_keys for position in span):
        raise ValueError(f"span={list(span)}: positions of keys, from 0 to {num_keys - 1}, at least one.")
    weights = normalize(weights, normalization)
    weights = weights.abs() if normalization == "absolute" else weights
    inside = weights[..., list(span)].sum(-1)
    return inside, weights.sum(-1) - inside


def top_keys(weights: torch.Tensor, count: int = 10) -> list[list[int]]:
    """
    Finds the keys of largest absolute weight.

    Args:
        weights: Attention weights, (Q, S).
        count: The largest number of keys per query.

    Returns:
        Positions of keys for each query, largest weight first, without those of weight 0.
    """
    values, keys = weights.abs().topk(min(count, weights.shape[-1]), dim=-1)
    return [
        [key for key, value in zip(query_keys, query_values, strict=True) if value > 0]
        for query_keys, query_values in zip(keys.tolist(), values.tolist(), strict=True)
    ]
