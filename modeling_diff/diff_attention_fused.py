"""
The fused kernels behind transformers' attention and mask interfaces: `attn_implementation="diff_triton"`.

B batch, T queries, S keys, H heads, K key-value heads, d map_dim, D head_dim, N packed sequences.

The kernels read no mask but its shape, which this mask function gives as integers: the first visible and the number of
filled keys of each row, (B, 1, 1, 2), or the boundaries of packed sequences, (1, 1, 1, N + 1). Both have four
dimensions, because transformers passes such masks on as they are and would read fewer as padding.
"""

from collections.abc import Callable

import torch
from torch import nn

from .diff_attention import cast_for_autocast
from .diff_attention_triton import diff_attention_triton


def fused_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """
    What each row sees beside causality: None for everything, or int32 as above.

    Raises `ValueError` for what the kernels cannot read: a sliding window, padding inside a sequence, packed sequences
    in more than one row.
    """
    if local_size is not None:
        raise ValueError(f"sliding window {local_size}: LLaMA has none, and diff_triton is given none; use sdpa")
    if not allow_is_causal_skip and q_length == kv_length:
        return _packed_boundaries(batch_size, q_length, mask_function, device)
    filled = q_offset + q_length
    if attention_mask is None and isinstance(filled, int) and filled == kv_length:
        return None
    key_range = torch.empty(batch_size, 1, 1, 2, dtype=torch.int32, device=device)
    key_range[:, 0, 0, 0] = 0 if attention_mask is None else _first_visible(attention_mask, filled)
    key_range[..., 1] = filled
    return key_range


def _first_visible(attention_mask: torch.Tensor, filled: int | torch.Tensor) -> torch.Tensor:
    """The first key of each row that is no padding, (B,)."""
    visible = attention_mask.bool()
    first = visible.int().argmax(-1)
    if not torch.compiler.is_compiling() and isinstance(filled, int):  # a look at data would break the graph
        last = visible[:, :filled].shape[1] - visible[:, :filled].int().flip(-1).argmax(-1)
        if bool((visible[:, :filled].sum(-1) < last - first).any()):
            raise ValueError(
                "attention_mask has padding between tokens of a row (a padded prompt that went on generating must be "
                'padded on the left): diff_triton reads one stretch of keys a row; use attn_implementation="sdpa".'
            )
    return first


def _packed_boundaries(
    batch_size: int, num_tokens: int, mask_function: Callable | None, device: torch.device | str
) -> torch.Tensor | None:
    """A sequence starts where a token does not see the one before it."""
    if batch_size != 1 or mask_function is None:
        raise ValueError(
            f"packed sequences in {batch_size} rows: diff_triton takes them in one row; flatten the batch, or use "
            'attn_implementation="sdpa".'
        )
    tokens = torch.arange(1, num_tokens, device=device)
    zero = torch.zeros((), dtype=torch.long, device=device)
    starts = 1 + (~mask_function(zero, zero, tokens, tokens - 1)).nonzero().flatten()
    if len(starts) == 0:
        return None
    ends = torch.tensor([0, num_tokens], device=device)
    return torch.cat((ends[:1], starts, ends[1:])).to(torch.int32)[None, None, None]


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
    key_start = key_length = cu_seqlens = None
    if cu_seq_lens_q is not None:
        cu_seqlens = cu_seq_lens_q
    elif attention_mask is not None and attention_mask.dtype == torch.int32:
        if attention_mask.shape[-1] == 2:
            key_start, key_length = attention_mask[:, 0, 0].unbind(-1)
        else:
            cu_seqlens = attention_mask[0, 0, 0]
    elif attention_mask is not None:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: diff_triton reads no masks made by hand; use "
            'attn_implementation="sdpa".'
        )
    query, key, value = cast_for_autocast(query, key, value)
    output = diff_attention_triton(
        query, key, value, diff_lambda,
        scaling=scaling,
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        key_start=key_start, key_length=key_length, cu_seqlens=cu_seqlens,
        norm_weight=norm_weight, norm_eps=norm_eps, norm_scale=norm_scale,
    )  # fmt: skip
    return output, None
