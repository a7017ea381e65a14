"""
The fused kernels behind transformers' attention and mask interfaces: `attn_implementation="diff_triton"`.

B batch, T queries, S keys, H heads, K key-value heads, d map_dim, D head_dim.

The kernels read masks as key ranges only: next to causality, the keys [first, end) that a query sees, one range per
sequence, (B, 1, 1, 2), or one per token of packed sequences, (B, 1, T, 2). They are integers of four dimensions,
because transformers passes such masks on unchanged and would read fewer dimensions as padding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .diff_attention import attends_causally, cast_for_autocast, warn_without_maps
from .diff_attention_triton import diff_attention_triton


PADDING_BETWEEN_TOKENS = (
    "attention_mask has padding between tokens of a sequence (a padded prompt that went on generating must be padded "
    "on the left): the kernels read one key range per sequence"
)


def visible_key_ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> tuple[torch.Tensor | None, str | None]:
    """
    Converts transformers' mask arguments to key ranges.

    Returns:
        The key ranges, int32 as above or None for all keys, and None. Or None, and the reason why there are none.
    """
    is_causal = getattr(config, "is_causal", True)
    if local_size is not None:
        return None, f"sliding window {local_size}: LLaMA has none, and the kernels are given none"
    if use_vmap:
        return None, "a custom mask function: the kernels read one key range per sequence"
    can_read_data = not torch.compiler.is_compiling()  # which would break a compiler's graph
    if attention_mask is not None and can_read_data and attention_mask.all():
        attention_mask = None  # without a mask the kernels skip its comparisons
    if attention_mask is None and is_causal and not allow_is_causal_skip and q_length == kv_length:
        return _ranges_of_sequences(batch_size, q_length, mask_function, device)[:, None], None
    filled = q_offset + q_length
    if attention_mask is None:
        if isinstance(filled, int) and filled == kv_length:
            return None, None
        first = torch.zeros(batch_size, dtype=torch.int32, device=device)
        end = filled
    else:
        tokens = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        visible = attention_mask.bool()
        first = torch.where(visible, tokens, filled).amin(-1)
        end = torch.where(visible, tokens + 1, 0).amax(-1)
        gapless = (visible.sum(-1) >= end - first).all()
        if not can_read_data:
            torch._assert_async(gapless, PADDING_BETWEEN_TOKENS)
        elif not gapless:
            return None, PADDING_BETWEEN_TOKENS
        if is_causal:  # the last query is at the last key filled, and padding after a token is in its future
            end = filled
    key_ranges = torch.empty(batch_size, 1, 1, 2, dtype=torch.int32, device=device)
    key_ranges[:, 0, 0, 0] = first
    key_ranges[:, 0, 0, 1] = end
    return key_ranges, None


def _ranges_of_sequences(
    batch_size: int, num_tokens: int, mask_function: Callable, device: torch.device | str
) -> torch.Tensor:
    """Returns first token and end of each token's packed sequence, (B, T, 2), which begins at a token that does not
    see the one before."""
    batch = torch.arange(batch_size, device=device)[:, None]
    tokens = torch.arange(num_tokens, device=device)
    joined = mask_function(batch, 0, tokens[1:], tokens[:-1]).expand(batch_size, -1)  # (B, T - 1)
    starts = nn.functional.pad(torch.where(joined, 0, tokens[1:]), (1, 0)).cummax(-1).values
    ends = nn.functional.pad(torch.where(joined, num_tokens, tokens[1:]), (0, 1), value=num_tokens)
    return torch.stack((starts, ends.flip(-1).cummin(-1).values.flip(-1)), dim=-1).to(torch.int32)


def mask_of_key_ranges(key_ranges: torch.Tensor, num_queries: int, num_keys: int, is_causal: bool) -> torch.Tensor:
    """Converts key ranges to the boolean mask of other implementations, (B, 1, T, S)."""
    first, end = key_ranges.split(1, dim=-1)
    keys = torch.arange(num_keys, device=key_ranges.device)
    visible = (keys >= first) & (keys < end)
    queries = torch.arange(num_queries, device=key_ranges.device)[:, None]
    last = queries + (end - num_queries if key_ranges.shape[2] == 1 else 0)
    return visible & (keys <= last) if is_causal else visible.expand(-1, -1, num_queries, -1)


def is_key_ranges(attention_mask: torch.Tensor) -> bool:
    """Returns whether a mask was made by `visible_key_ranges`; custom ones are boolean or additive."""
    return attention_mask.dtype == torch.int32 and attention_mask.shape[-1] == 2


def fused_attention_mask(batch_size: int, q_length: int, kv_length: int, **mask_arguments) -> torch.Tensor | None:
    """
    Makes the mask of `diff_triton` from transformers' mask arguments, for AttentionMaskInterface.

    Returns:
        Key ranges, int32 as above, or None for all keys.

    Raises:
        ValueError: The kernels cannot read it: a sliding window, a custom mask function, padding between tokens.
    """
    key_ranges, refusal = visible_key_ranges(batch_size, q_length, kv_length, **mask_arguments)
    if refusal is not None:
        raise ValueError(f'{refusal}; use attn_implementation="sdpa" instead of diff_triton.')
    return key_ranges


def fused_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    diff_lambda: torch.Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    norm_scale: float = 1.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Calls `diff_attention_triton` with what transformers passes, for AttentionInterface.

    Args:
        module: The attention module.
        query: (B, 2H, T, d); (B, H, T, d) without `diff_lambda`, for layers that kept LLaMA's attention.
        key: (B, K, S, 2d) in V1, (B, K, S, d) in V2.
        value: (B, K, S, D).
        attention_mask: Key ranges of `fused_attention_mask`.
        scaling: Factor of the scores.
        diff_lambda: lambda, () in V1 or (B, T, H) in V2.
        is_causal: Defaults to the module's.
        cu_seq_lens_q: Boundaries of packed sequences.
        norm_weight: Weight of V1's norm over heads, for the kernels to normalize.
        norm_eps: Epsilon of that norm.
        norm_scale: Factor after it.
        kwargs: What other implementations read.

    Returns:
        Outputs of heads, (B, T, H, D), and None for attention weights.

    Raises:
        ValueError: The mask was not made by `fused_attention_mask`.
        RuntimeError: The kernels cannot run here.
    """
    warn_without_maps("diff_triton", kwargs.get("output_attentions"))
    masks: dict[str, Any] = {"cu_seqlens": cu_seq_lens_q}
    if attention_mask is not None and not is_key_ranges(attention_mask):
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: diff_triton reads no custom masks; use "
            'attn_implementation="sdpa".'
        )
    if cu_seq_lens_q is None and attention_mask is not None:
        if attention_mask.shape[2] == 1:
            masks["key_start"], masks["key_length"] = attention_mask[:, 0, 0].unbind(-1)
        else:
            masks["key_ranges"] = attention_mask[:, 0]
    query, key, value = cast_for_autocast(query, key, value)
    output = diff_attention_triton(
        query,
        key,
        value,
        diff_lambda=diff_lambda,
        scaling=scaling,
        is_causal=attends_causally(module, is_causal),
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        norm_scale=norm_scale,
        **masks,
    )
    return output, None
