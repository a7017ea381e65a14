"""
The path of each call when none was asked for: `attn_implementation="diff_auto"`, the default.

B batch, T queries, S keys, H heads, d map_dim, D head_dim.

Chosen by the call's device and dtype, not by the machine's: a model may lie on a CPU beside a GPU, or on both.
"""

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .diff_attention import attends_causally, computing_dtype, is_exporting
from .diff_attention_check import kernels_agree
from .diff_attention_fused import is_stretches, mask_of_stretches, visible_stretches
from .diff_attention_triton import widths_fit


# By device; anything else takes the one standard call, `sdpa`.
FASTEST = {
    # Measured (examples/benchmarks/attention.py): the one standard call and four calls take twice LLaMA's time; values
    # twice as wide as queries leave torch's fast CPU kernel, the worse the longer the text; flex_attention has no
    # backward pass there, flash attention no kernel.
    "cpu": "diff_chunked",
    # Counted, not measured: in V1 6 matrix products where the one standard call takes 8, and 10 for 20 backward; in V2
    # 8 for 8 and 16 for 20; no queries padded with zeros, and lambda and the norm in the same pass. In 16 bits only:
    # in float32 each product is three, of small tiles.
    "cuda": "diff_triton",
}
FUSED_DTYPES = (torch.bfloat16, torch.float16)


def auto_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **mask_arguments,
) -> torch.Tensor | None:
    """
    Stretches of visible keys where the kernels are likely to take the call and can read the mask, else `sdpa`'s mask.

    A compiled call with a padding mask gets `sdpa`'s, as whether it is one stretch a row is in its data.
    """
    mask_arguments |= {"attention_mask": attention_mask, "dtype": dtype, "device": device}
    device_type = torch.device(device).type
    fused = FASTEST.get(device_type) == "diff_triton" and computing_dtype(dtype, device_type) in FUSED_DTYPES
    if fused and (attention_mask is None or not torch.compiler.is_compiling()):
        stretches, refusal = visible_stretches(batch_size, q_length, kv_length, **mask_arguments)
        if stretches is None and refusal is None and q_length not in (1, kv_length):
            # Without one, the last query stands on the last key for the kernels, but the first on the first for sdpa.
            stretches = torch.tensor([0, kv_length], dtype=torch.int32, device=device).expand(batch_size, 1, 1, 2)
        if refusal is None:
            return stretches
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, **mask_arguments
    )


def fastest_path(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    num_maps: int,
    is_causal: bool | None = None,
) -> tuple[str, torch.Tensor | None]:
    """
    The implementation for this call, and the mask as that one reads it.

    `query` (B, num_maps H, T, d), `key` and `value` (B, K, S, .), `attention_mask` as from `auto_attention_mask` or by
    hand. Everything `sdpa` takes is taken; what the kernels do not take goes through the one standard call.
    """
    fastest = FASTEST.get(query.device.type, "sdpa")
    if fastest == "diff_triton" and not _kernels_take(query, key, value, attention_mask, num_maps):
        fastest = "sdpa"
    if fastest != "diff_triton" and attention_mask is not None and is_stretches(attention_mask):
        causal = attends_causally(module, is_causal)
        attention_mask = mask_of_stretches(attention_mask, query.shape[2], key.shape[2], causal)
    return fastest, attention_mask


def _kernels_take(query, key, value, attention_mask, num_maps) -> bool:
    """Whether the kernels can read these inputs and this mask, and are to be trusted with them."""
    dtype = computing_dtype(query.dtype, query.device.type)
    widths = query.shape[-1], key.shape[-1], value.shape[-1]
    if is_exporting() or dtype not in FUSED_DTYPES or not widths_fit(*widths):  # where it is run may be no triton
        return False
    if not (query.shape[2] in (1, key.shape[2]) if attention_mask is None else is_stretches(attention_mask)):
        return False
    training = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    return kernels_agree(query.device, dtype, *widths, num_maps, training)


def auto_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Plain attention, for layers that kept LLaMA's, by the path that `fastest_path` names."""
    name, attention_mask = fastest_path(module, query, key, value, attention_mask, 1, is_causal)
    return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, attention_mask, is_causal=is_causal, **kwargs)
