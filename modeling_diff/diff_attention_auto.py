"""
The path of each call when no implementation is named: `attn_implementation="diff_auto"`, the default.

B batch, T queries, S keys, H heads, K key-value heads, d map_dim, D head_dim.

It is chosen by the device and dtype of the call, not of the machine: a model may be on a CPU next to a GPU.
"""

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .diff_attention import attends_causally, computing_dtype, is_exporting
from .diff_attention_triton import widths_fit
from .diff_attention_triton_check import kernels_agree
from .diff_attention_triton_interface import is_key_ranges, mask_of_key_ranges, visible_key_ranges


# By device; anything else takes the one standard call, `sdpa`.
FASTEST = {
    # Measured (examples/benchmarks/attention.py): the one standard call and four calls take twice LLaMA's time; values
    # twice as wide as queries leave torch's fast CPU kernel, the worse the longer the text; flex_attention has no
    # backward pass there, flash attention no kernel.
    "cpu": "diff_chunked",
    # Counted, not measured: in V1 6 matrix products where the one standard call takes 8, and 10 for 20 backward; in V2
    # 8 for 8 and 16 for 20; no queries padded with zeros, and lambda and the norm in the same pass. In half precision
    # only: in float32 each product is three, of small tiles.
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
    Makes the mask of `diff_auto`: key ranges where the kernels are likely to take the call, else `sdpa`'s mask.

    A compiled call with a padding mask gets `sdpa`'s, as only its data tells whether it is one key range per sequence.
    """
    mask_arguments |= {"attention_mask": attention_mask, "dtype": dtype, "device": device}
    device_type = torch.device(device).type
    fused = FASTEST.get(device_type) == "diff_triton" and computing_dtype(dtype, device_type) in FUSED_DTYPES
    if fused and (attention_mask is None or not torch.compiler.is_compiling()):
        key_ranges, refusal = visible_key_ranges(batch_size, q_length, kv_length, **mask_arguments)
        if key_ranges is None and refusal is None and q_length not in (1, kv_length):
            # Without one, the last query is at the last key for the kernels, but the first at the first for sdpa.
            key_ranges = torch.tensor([0, kv_length], dtype=torch.int32, device=device).expand(batch_size, 1, 1, 2)
        if refusal is None:
            return key_ranges
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
    Chooses the implementation of a call. What the kernels do not support goes through the one standard call.

    Args:
        module: The attention module.
        query: (B, num_maps * H, T, d).
        key: (B, K, S, D) in V1, (B, K, S, d) in V2.
        value: (B, K, S, D).
        attention_mask: Of `auto_attention_mask`, or a custom one that `sdpa` reads.
        num_maps: Maps per head, 2 where the layer is differential.
        is_causal: Whether a call without a mask is causal. Defaults to the module's.

    Returns:
        The implementation's name, and the mask as it reads it.
    """
    fastest = FASTEST.get(query.device.type, "sdpa")
    if fastest == "diff_triton" and not _kernels_take(query, key, value, attention_mask, num_maps=num_maps):
        fastest = "sdpa"
    if fastest != "diff_triton" and attention_mask is not None and is_key_ranges(attention_mask):
        causal = attends_causally(module, is_causal)
        attention_mask = mask_of_key_ranges(attention_mask, query.shape[2], key.shape[2], causal)
    return fastest, attention_mask


def _kernels_take(query, key, value, attention_mask, *, num_maps) -> bool:
    """Returns whether the kernels can read these inputs and this mask, and agree with the definition here."""
    dtype = computing_dtype(query.dtype, query.device.type)
    widths = {"map_dim": query.shape[-1], "key_dim": key.shape[-1], "head_dim": value.shape[-1]}
    if is_exporting() or dtype not in FUSED_DTYPES or not widths_fit(**widths):  # an exported model may run elsewhere
        return False
    if attention_mask is None and query.shape[2] not in (1, key.shape[2]):
        return False
    if attention_mask is not None and not is_key_ranges(attention_mask):
        return False
    training = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    return kernels_agree(query.device, dtype, **widths, num_maps=num_maps, training=training)


def auto_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes plain attention, for layers that kept LLaMA's, by the path that `fastest_path` names."""
    name, attention_mask = fastest_path(
        module, query, key, value=value, attention_mask=attention_mask, num_maps=1, is_causal=is_causal
    )
    attention_function = ALL_ATTENTION_FUNCTIONS[name]
    return attention_function(module, query, key, value, attention_mask, is_causal=is_causal, **kwargs)
