"""
Differential attention on tensors: the reference, the eager path with its maps, and the one standard attention call.

B batch, T queries, S keys, H heads, K key-value heads, G = H / K heads per key-value head, d map_dim, D head_dim.
Maps 2i and 2i + 1 belong to head i, which reads key-value head i // G. In V1 a key is [k1; k2] and D = 2d; in V2 both
maps of a head read the same key and D = d.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass
class AttentionMaps:
    """
    Holds a layer's two softmax maps and lambda: `positive - diff_lambda * negative` weighs V.

    With `attn_implementation="eager"`, a dictionary given to a forward pass as `attention_maps_by_layer` receives one
    for each differential layer, by its index. Maps are in float32 or wider.

    Attributes:
        positive: A1, (B, H, T, S); the weights of a query sum to 1.
        negative: A2, (B, H, T, S); the weights of a query sum to 1.
        diff_lambda: lambda, () in V1, (B, T, H) in V2.
    """

    positive: torch.Tensor
    negative: torch.Tensor
    diff_lambda: torch.Tensor


def lambda_over_maps(diff_lambda: torch.Tensor) -> torch.Tensor:
    """Reshapes lambda, () or (B, T, H), so that it broadcasts over (B, H, T, S)."""
    return diff_lambda if diff_lambda.dim() == 0 else diff_lambda.transpose(1, 2).unsqueeze(-1)


def attention_maps(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes both softmax maps in float32, or in the queries' dtype if it is wider.

    Args:
        query: (B, 2H, T, d).
        key: (B, K, S, D).
        attention_mask: (B, 1, T, S), boolean or additive. None for all keys.
        scaling: Factor of the scores.

    Returns:
        A1 and A2, (B, H, T, S) each.
    """
    num_maps = query.shape[1]
    map_dim = query.shape[-1]
    key = key.unflatten(-1, (-1, map_dim)).transpose(2, 3).unsqueeze(2)  # (B, K, 1, 2 in V1 or 1 in V2, S, d)
    key = key.expand(-1, -1, num_maps // key.shape[1] // 2, 2, -1, -1).flatten(1, 3)  # (B, 2H, S, d)
    # Laid out and multiplied as in LLaMA's eager attention, so that equal maps come out equal to the last bit.
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, 2H, T, S)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    maps = nn.functional.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
    return maps[:, 0::2], maps[:, 1::2]


def diff_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    diff_lambda: torch.Tensor,
    scaling: float,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Computes O = (softmax(s q1 k1^T) - lambda softmax(s q2 k2^T)) v, before any norm (arXiv:2410.05258, eq. 1).

    Nothing is rounded in between: in float64 every other path is tested against this.

    Args:
        query: (B, 2H, T, d); maps 2i and 2i + 1 belong to head i.
        key: (B, K, S, D), in V1 [k1; k2].
        value: (B, K, S, D).
        diff_lambda: lambda, () in V1 or (B, T, H) in V2.
        scaling: Factor of the scores, d^-1/2 in the paper.
        attention_mask: (B, 1, T, S), boolean (True for visible) or additive. None for all keys.

    Returns:
        Outputs of heads, (B, T, H, D), in float32 or wider.
    """
    positive, negative = attention_maps(query, key, attention_mask, scaling)
    value = value.repeat_interleave(positive.shape[1] // value.shape[1], dim=1)
    return torch.matmul(positive - lambda_over_maps(diff_lambda) * negative, value.to(positive.dtype)).transpose(1, 2)


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    diff_lambda: torch.Tensor,
    attention_maps_by_layer: dict[int, AttentionMaps] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes attention by definition, and keeps what multiplies V.

    Args:
        module: The attention module.
        query: (B, 2H, T, d).
        key: (B, K, S, D).
        value: (B, K, S, D).
        attention_mask: (B, 1, T, S), boolean or additive. None for all keys.
        scaling: Factor of the scores.
        diff_lambda: lambda, () in V1 or (B, T, H) in V2.
        attention_maps_by_layer: A dictionary that receives this layer's `AttentionMaps`.
        kwargs: What other implementations read.

    Returns:
        Outputs of heads, (B, T, H, D), and A1 - lambda A2, (B, H, T, S).
    """
    positive, negative = attention_maps(query, key, attention_mask, scaling)
    if attention_maps_by_layer is not None:
        attention_maps_by_layer[module.layer_idx] = AttentionMaps(positive, negative, diff_lambda)
    attn_weights = (positive - lambda_over_maps(diff_lambda) * negative).to(query.dtype)
    value = value.repeat_interleave(attn_weights.shape[1] // value.shape[1], dim=1)
    return torch.matmul(attn_weights, value).transpose(1, 2), attn_weights


def place_queries(query: torch.Tensor, head_dim: int) -> torch.Tensor:
    """
    Pads queries for one standard attention call: (B, 2H, T, d) -> (B, 2H, T, D).

    In V1 a key is [k1; k2], so the queries of the positive map become [q1; 0] and those of the negative one [0; q2]:
    the scores are those of each map alone. In V2 keys are as wide as queries, which are returned unchanged.
    """
    map_dim = query.shape[-1]
    if map_dim == head_dim:
        return query
    padded = query.unflatten(1, (-1, 2)).movedim(2, -1).diag_embed(dim1=2, dim2=4)  # (B, H, 2, T, 2, d)
    return padded.flatten(1, 2).flatten(3)


def operator_namespace(kind: str, module_name: str) -> str:
    """
    Returns the namespace of a module's operators, different for every copy of a file in one process.

    A bundle's module is named after its folder, in any script and of any length, while torch takes ASCII letters only.
    """
    return f"{kind}_{hashlib.sha256(ascii(module_name).encode()).hexdigest()[:16]}"


def warn_without_maps(implementation: str, output_attentions: bool | None) -> None:
    """Warns once, as transformers' attentions do, that an implementation without whole maps returns no attentions."""
    if output_attentions:
        logger.warning_once(
            f"`{implementation}` attention does not support `output_attentions=True` and returns none. Please "
            'set your attention to `eager`, with set_attn_implementation("eager"), if you want them.'
        )


def attends_causally(module: Any, is_causal: bool | None) -> bool:
    """Returns whether a call without a mask is causal: what it says, else what its module says."""
    return getattr(module, "is_causal", True) if is_causal is None else is_causal


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Returns the dtype of autocast if it is on, else None."""
    enabled = device_type != "meta" and torch.is_autocast_enabled(device_type)  # which raises on meta
    return torch.get_autocast_dtype(device_type) if enabled else None


def computing_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Returns the dtype in which attention on states of `dtype` is computed."""
    return autocast_dtype(device_type) or dtype


def is_exporting() -> bool:
    """Returns torch.compiler.is_exporting(), except under torch 2.11, where that is True while compiling as well."""
    return getattr(torch.compiler, "_is_exporting_flag", False)


def cast_for_autocast(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Casts states as autocast, if it is on, does before scaled_dot_product_attention."""
    dtype = autocast_dtype(states[0].device.type)
    return states if dtype is None else tuple(state.to(dtype) for state in states)


def subtract_maps(attn_output: torch.Tensor, diff_lambda: torch.Tensor) -> torch.Tensor:
    """
    Computes O = A1 V - lambda A2 V from the outputs of both maps, (B, T, 2H, D) -> (B, T, H, D).

    It is in float32 or wider: the difference cancels leading digits, so it is normalized before it is rounded.
    """
    wide = attn_output.to(torch.promote_types(attn_output.dtype, torch.float32))
    positive, negative = wide.unflatten(2, (-1, 2)).unbind(3)
    return torch.addcmul(positive, diff_lambda[..., None], negative, value=-1)


def own_halves(attn_output: torch.Tensor, map_dim: int) -> torch.Tensor:
    """
    Takes what V1's heads that are not differential give, from the outputs of both maps: (B, T, 2H, D) -> (B, T, H, D).

    Such a head holds two of LLaMA's side by side: each map weighs its own half of the value.
    """
    left, right = attn_output.unflatten(2, (-1, 2)).unbind(3)
    return torch.cat((left[..., :map_dim], right[..., map_dim:]), dim=-1)


def runs_of_heads(is_differential: Sequence[bool]) -> list[tuple[int, bool]]:
    """Returns how many neighboring heads are alike, and whether they are differential, from the first head on."""
    return [(len(list(run)), differential) for differential, run in groupby(is_differential)]


def mix_heads(difference: torch.Tensor, halves: torch.Tensor, runs: Sequence[tuple[int, bool]]) -> torch.Tensor:
    """
    Joins heads that are differential with those that are not.

    Args:
        difference: All heads as differential ones, normalized, (B, T, H, D).
        halves: All heads as `own_halves` gives them, (B, T, H, D).
        runs: Which of them to take, of `runs_of_heads`.

    Returns:
        Outputs of heads, (B, T, H, D), in the dtype of `difference`.
    """
    sizes = [size for size, _ in runs]
    pairs = zip(difference.split(sizes, dim=2), halves.to(difference.dtype).split(sizes, dim=2), runs, strict=True)
    pieces = [subtracted if differential else kept for subtracted, kept, (_, differential) in pairs]
    # A rank without differential heads takes part in the sum of lambda's gradient over ranks as well.
    return torch.cat((*pieces, difference[:, :, :0]), dim=2)
