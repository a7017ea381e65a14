"""
The fused kernels behind transformers' attention and mask interfaces: `attn_implementation="diff_triton"`.

B batch, T queries, S keys, H heads, K key-value heads, d map_dim, D head_dim.

The kernels read no mask but which stretch of keys each query sees beside causality, as the first and the one after the
last: for a row of the batch, (B, 1, 1, 2), or for every token of packed sequences, (B, 1, T, 2). Four dimensions and
integers, because transformers passes such masks on as they are and would read fewer dimensions as padding.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig

from .diff_attention import attends_causally, cast_for_autocast, warn_without_maps
from .diff_attention_triton import diff_attention_triton


PADDING_BETWEEN_TOKENS = (
    "attention_mask has padding between tokens of a row (a padded prompt that went on generating must be padded on "
    "the left): the kernels read one stretch of keys a row"
)


def visible_stretches(
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
    The stretches that transformers' mask arguments stand for, int32 as above or None for everything, and None; or
    None and the reason in words why they are no such stretches.
    """
    is_causal = getattr(config, "is_causal", True)
    if local_size is not None:
        return None, f"sliding window {local_size}: LLaMA has none, and the kernels are given none"
    if use_vmap:
        return None, "a mask function of one's own: the kernels read one stretch of keys a row"
    looking = not torch.compiler.is_compiling()  # at data, which would break a compiler's graph
    if attention_mask is not None and looking and attention_mask.all():
        attention_mask = None  # without a mask the kernels skip its comparisons
    if attention_mask is None and is_causal and not allow_is_causal_skip and q_length == kv_length:
        return _sequence_bounds(batch_size, q_length, mask_function, device)[:, None], None
    filled = q_offset + q_length
    if attention_mask is None:
        if isinstance(filled, int) and filled == kv_length:
            return None, None
        first, end = torch.zeros(batch_size, dtype=torch.int32, device=device), filled
    else:
        tokens = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        visible = attention_mask.bool()
        first = torch.where(visible, tokens, filled).amin(-1)
        end = torch.where(visible, tokens + 1, 0).amax(-1)
        gapless = (visible.sum(-1) >= end - first).all()
        if not looking:
            torch._assert_async(gapless, PADDING_BETWEEN_TOKENS)
        elif not gapless:
            return None, PADDING_BETWEEN_TOKENS
        if is_causal:  # the last query stands on the last key filled, and padding after a token is in its future
            end = filled
    stretches = torch.empty(batch_size, 1, 1, 2, dtype=torch.int32, device=device)
    stretches[:, 0, 0, 0] = first
    stretches[:, 0, 0, 1] = end
    return stretches, None


def _sequence_bounds(
    batch_size: int, num_tokens: int, mask_function: Callable, device: torch.device | str
) -> torch.Tensor:
    """First token and end of each token's sequence, (B, T, 2): one starts where a token does not see the last."""
    rows, tokens = torch.arange(batch_size, device=device)[:, None], torch.arange(num_tokens, device=device)
    joined = mask_function(rows, 0, tokens[1:], tokens[:-1]).expand(batch_size, -1)  # (B, T - 1)
    starts = nn.functional.pad(torch.where(joined, 0, tokens[1:]), (1, 0)).cummax(-1).values
    ends = nn.functional.pad(torch.where(joined, num_tokens, tokens[1:]), (0, 1), value=num_tokens)
    return torch.stack((starts, ends.flip(-1).cummin(-1).values.flip(-1)), dim=-1).to(torch.int32)


def mask_of_stretches(stretches: torch.Tensor, num_queries: int, num_keys: int, is_causal: bool) -> torch.Tensor:
    """The same as the boolean mask of other implementations, (B, 1, T, S)."""
    first, end = stretches[..., :1], stretches[..., 1:]
    keys = torch.arange(num_keys, device=stretches.device)
    visible = (keys >= first) & (keys < end)
    queries = torch.arange(num_queries, device=stretches.device)[:, None]
    last = queries + (end - num_queries if stretches.shape[2] == 1 else 0)
    return visible & (keys <= last) if is_causal else visible.expand(-1, -1, num_queries, -1)


def is_stretches(attention_mask: torch.Tensor) -> bool:
    """Whether a mask was made by `visible_stretches`; those made by hand are boolean or additive."""
    return attention_mask.dtype == torch.int32 and attention_mask.shape[-1] == 2


def fused_attention_mask(batch_size: int, q_length: int, kv_length: int, **mask_arguments) -> torch.Tensor | None:
    """
    What each row sees beside causality, from transformers' mask arguments: None for everything, or int32 as above.

    Raises `ValueError` for what the kernels cannot read: a sliding window, a mask function of one's own, padding
    between the tokens of a row.
    """
    stretches, refusal = visible_stretches(batch_size, q_length, kv_length, **mask_arguments)
    if refusal is not None:
        raise ValueError(f'{refusal}; use attn_implementation="sdpa" instead of diff_triton.')
    return stretches


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
    `diff_attention_triton` from what transformers passes, as (B, T, H, D); with `norm_weight` normalised as in V1.

    Raises `ValueError` for a mask not made by `fused_attention_mask`, `RuntimeError` where the kernels cannot run.
    Without `diff_lambda` it is plain attention, for layers that kept LLaMA's.
    """
    warn_without_maps("diff_triton", kwargs.get("output_attentions"))
    key_start = key_length = sequence_bounds = None
    if attention_mask is not None and not is_stretches(attention_mask):
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: diff_triton reads no masks made by hand; use "
            'attn_implementation="sdpa".'
        )
    if cu_seq_lens_q is None and attention_mask is not None:
        if attention_mask.shape[2] == 1:
            key_start, key_length = attention_mask[:, 0, 0].unbind(-1)
        else:
            sequence_bounds = attention_mask[:, 0]
    query, key, value = cast_for_autocast(query, key, value)
    output = diff_attention_triton(
        query, key, value, diff_lambda,
        scaling=scaling,
        is_causal=attends_causally(module, is_causal),
        key_start=key_start, key_length=key_length, cu_seqlens=cu_seq_lens_q, sequence_bounds=sequence_bounds,
        norm_weight=norm_weight, norm_eps=norm_eps, norm_scale=norm_scale,
    )  # fmt: skip
    return output, None
