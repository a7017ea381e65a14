"""
What maps say in sum: means over heads and layers, rows made comparable, attention to a span against all else.

B batch, L chosen layers, H chosen heads, Q chosen queries, S keys.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from .maps import LayerMaps, visit_maps


MapKind = Literal["positive", "negative", "difference"]
Normalisation = Literal["none", "sum", "absolute"]
MAP_KINDS: tuple[MapKind, ...] = ("positive", "negative", "difference")


def weights_of(maps: LayerMaps, kind: MapKind, normalisation: Normalisation = "none") -> torch.Tensor:
    """
    One of a layer's maps, (B, H, Q, S): A1 ("positive"; LLaMA's A), A2 ("negative") or A1 - lambda A2 ("difference").

    Raises ValueError for an unknown kind, and for the negative map of a layer that has none.
    """
    if kind not in MAP_KINDS:
        raise ValueError(f"kind={kind!r}: there are {', '.join(MAP_KINDS)}.")
    if kind == "negative" and maps.second is None:
        raise ValueError(f"kind='negative': layer {maps.layer} subtracts no map; ask for 'positive' or 'difference'.")
    weights = {"positive": lambda: maps.first, "negative": lambda: maps.second, "difference": maps.difference}[kind]()
    return normalise(weights, normalisation)


def normalise(weights: torch.Tensor, normalisation: Normalisation) -> torch.Tensor:
    """
    Rows (..., S) on one scale, as a difference's sum to 1 - lambda and so differ between heads and layers.

    "sum" divides by the row's sum (1 - lambda: it must not be near 0), "absolute" by the sum of its absolute values.
    Rows of zeros stay.
    """
    if normalisation == "none":
        return weights
    if normalisation not in ("sum", "absolute"):
        raise ValueError(f"normalisation={normalisation!r}: there are none, sum, absolute.")
    totals = (weights if normalisation == "sum" else weights.abs()).sum(-1, keepdim=True)
    return weights / totals.masked_fill(totals == 0, 1.0)


def mean_maps(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    over: Literal["heads", "layers", "both"] = "both",
    kind: MapKind = "difference",
    normalisation: Normalisation = "absolute",
    **choices: Any,
) -> torch.Tensor:
    """
    Mean of one kind of map over heads (L, B, Q, S), layers (B, H, Q, S) or both (B, Q, S), in one forward pass.

    Nothing larger than the result is held beside a block. `choices` are those of `visit_maps`. A mean over layers
    alone needs as many heads in every layer; over both, every layer counts the same.
    """
    if over not in ("heads", "layers", "both"):
        raise ValueError(f"over={over!r}: there are heads, layers, both.")
    blocks: dict[int, dict[int, torch.Tensor]] = {}
    num_layers: set[int] = set()

    def add(maps: LayerMaps) -> None:
        weights = weights_of(maps, kind, normalisation)
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
    weights: torch.Tensor, span: Sequence[int], normalisation: Normalisation = "absolute"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention of every row (..., Q, S) to the keys of a span, and to everything else: (..., Q) each.

    With "absolute", shares of the row's absolute weight, which sum to 1; else signed sums of weights.
    """
    num_keys = weights.shape[-1]
    if not len(span) or any(not 0 <= position < num_keys for position in span):
        raise ValueError(f"span={list(span)}: positions of keys, from 0 to {num_keys - 1}, at least one.")
    weights = normalise(weights, normalisation)
    weights = weights.abs() if normalisation == "absolute" else weights
    inside = weights[..., list(span)].sum(-1)
    return inside, weights.sum(-1) - inside


def top_keys(weights: torch.Tensor, count: int = 10) -> list[list[int]]:
    """
    For rows (Q, S), the keys of largest absolute weight, largest first; keys of weight 0 are left out.
    """
    values, places = weights.abs().topk(min(count, weights.shape[-1]), dim=-1)
    return [
        [key for key, value in zip(keys, row, strict=True) if value > 0]
        for keys, row in zip(places.tolist(), values.tolist(), strict=True)
    ]
