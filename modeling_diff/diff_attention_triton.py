"""
Differential attention on CUDA GPUs as one function, differentiable and compilable, by fused Triton kernels.

B batch, T queries, S keys, H heads, K key-value heads, d map_dim, D head_dim.
"""

import torch

from .diff_attention import operator_namespace
from .diff_attention_triton_kernels import fwd_kernel, triton
from .diff_attention_triton_launches import empty_outputs, launch_backward, launch_forward
from .diff_attention_triton_tiles import padded_widths


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Operators are named after the module: a bundle copy of this file and the package can then live in one process.
NAMESPACE = operator_namespace("diff_triton", __name__)


def triton_can_run(device: torch.device | str) -> str | None:
    """
    Returns why the kernels cannot run on a device.

    Args:
        device: Device of the tensors.

    Returns:
        The reason in words, or None where they can.
    """
    device = torch.device(device)
    if triton is None:
        return "triton is not installed"
    if not isinstance(fwd_kernel, triton.JITFunction):
        return None  # TRITON_INTERPRET=1: any device
    if device.type != "cuda":
        return f"the kernels need a CUDA device, the tensors are on {device.type}"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA's GPUs, this torch is built for AMD's"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0 or newer, this device has {major}.{minor}"
    return None


def widths_fit(map_dim: int, key_dim: int, head_dim: int) -> bool:
    """Returns whether there are tiles for queries, keys and values of these widths."""
    return max(padded_widths(key_dim, head_dim)) <= 256 and key_dim in (map_dim, 2 * map_dim)


def _forward_fake(query, key, value, diff_lambda, norm_weight, *rest):
    maps = 1 if diff_lambda is None else 2
    return empty_outputs(query, value, maps=maps, norm=norm_weight is not None, keep=rest[-1])


def _backward_fake(grad, query, key, value, o, o2, stats, diff_lambda, norm_weight, *rest):
    dlambda = stats.new_empty(0 if diff_lambda is None else diff_lambda.shape)
    dweight = stats.new_empty(0 if norm_weight is None else norm_weight.shape)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), dlambda, dweight


def _setup_context(ctx, inputs, output):
    query, key, value, diff_lambda, norm_weight, *masks = inputs[:8]
    out, o, o2, stats = output
    ctx.save_for_backward(
        query, key, value, out if norm_weight is None else o, o2, stats, diff_lambda, norm_weight, *masks
    )
    ctx.scalars = (*inputs[8:11], inputs[12])
    ctx.set_materialize_grads(False)  # or zeros as large as o and o2 would be made for outputs nobody differentiates


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 14
    saved = ctx.saved_tensors  # read once: activation checkpointing refuses to unpack it again
    diff_lambda, norm_weight = saved[6:8]
    dq, dk, dv, dlambda, dweight = _backward_op(grad, *saved, *ctx.scalars)
    dlambda = None if diff_lambda is None else dlambda
    dweight = None if norm_weight is None else dweight.to(norm_weight.dtype)
    return (dq, dk, dv, dlambda, dweight, *(None,) * 9)


# Opaque operators (custom_op, not triton_op): one path for compiled, captured, interpreted and eager calls, and the
# kernels leave a compiler nothing to fuse into.
_forward_op = torch.library.custom_op(f"{NAMESPACE}::forward", launch_forward, mutates_args=())
_backward_op = torch.library.custom_op(f"{NAMESPACE}::backward", launch_backward, mutates_args=())
_forward_op.register_fake(_forward_fake)
_backward_op.register_fake(_backward_fake)
_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def _check(query, key, value, diff_lambda):
    maps = 1 if diff_lambda is None else 2
    map_dim = query.shape[-1]
    head_dim = value.shape[-1]
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must share one of {DTYPES}, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if key.shape[-1] not in (map_dim, maps * map_dim):
        raise ValueError(
            f"key is {key.shape[-1]} wide and query {map_dim}: give keys {map_dim} (V2) or {2 * map_dim} (V1) wide"
        )
    if not widths_fit(map_dim, key.shape[-1], head_dim):
        raise ValueError(
            f"map_dim={map_dim} with head_dim={head_dim} does not fit the kernels: at most 256 each, and 128 for V1's "
            "maps, since fp32 accumulators head_dim wide stay in registers; use another attn_implementation"
        )
    if query.shape[1] % (maps * value.shape[1]) or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit together: "
            f"the query needs {maps} maps per head and a multiple of {value.shape[1]} heads, key and value one "
            "(B, K, S)"
        )
    lambda_shape = (query.shape[0], query.shape[2], query.shape[1] // 2)
    if diff_lambda is not None and diff_lambda.shape not in ((), lambda_shape):
        raise ValueError(f"diff_lambda must be () or {lambda_shape}, is {tuple(diff_lambda.shape)}")


def _check_masks(query, key, *, key_start, key_length, cu_seqlens, key_ranges):
    if key_start is not None and key_start.shape != query.shape[:1]:
        raise ValueError(f"key_start must be ({query.shape[0]},), is {tuple(key_start.shape)}")
    if cu_seqlens is None and key_ranges is None:
        return
    if query.shape[2] != key.shape[2] or (cu_seqlens is not None and query.shape[0] != 1):
        raise ValueError(
            "packed sequences need as many keys as queries, and cu_seqlens batch size 1, got "
            f"query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    if cu_seqlens is not None and key_ranges is not None:
        raise ValueError("give cu_seqlens or key_ranges, not both")
    ranges_shape = (query.shape[0], query.shape[2], 2)
    if key_ranges is not None and key_ranges.shape != ranges_shape:
        raise ValueError(f"key_ranges must be {ranges_shape}, is {tuple(key_ranges.shape)}")
    if key_start is not None or key_length is not None:
        raise ValueError("packed sequences cannot be combined with key_start or key_length: cut the sequences instead")


def _ranges_of_tokens(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Returns the key range of each token, (1, T, 2): its sequence, or an empty one past the last boundary."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    boundaries = torch.cat((cu_seqlens, cu_seqlens[-1:]))
    index = torch.searchsorted(boundaries[1:-1].contiguous(), tokens, right=True)
    return torch.stack((boundaries[index], boundaries[index + 1]), dim=-1)[None]


def diff_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    diff_lambda: torch.Tensor | None,
    *,
    scaling: float,
    is_causal: bool = True,
    sliding_window: int | None = None,
    key_start: torch.Tensor | None = None,
    key_length: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    key_ranges: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    norm_scale: float = 1.0,
) -> torch.Tensor:
    """
    Computes differential attention, O = softmax(s q1 k1^T) v - lambda softmax(s q2 k2^T) v, and with `norm_weight`
    norm_scale * RMSNorm(O) * norm_weight (arXiv:2410.05258, eq. 1 and 3).

    Causal queries are aligned to the last valid key. A query that sees no key gives 0.

    Args:
        query: (B, 2H, T, d); (B, H, T, d) without `diff_lambda`.
        key: (B, K, S, 2d) in V1, (B, K, S, d) in V2.
        value: (B, K, S, D).
        diff_lambda: lambda in float32, () in V1 or (B, T, H) in V2. None for plain attention by the same kernels.
        scaling: Factor of the scores, above 0.
        is_causal: Whether a query sees only keys up to its own position.
        sliding_window: How many keys up to its own position a causal query sees.
        key_start: First visible key of each sequence, (B,) (left padding).
        key_length: Number of valid keys, (B,) or () (static caches); the rest of `key` and `value` is not read.
        cu_seqlens: Boundaries of N packed sequences, (N + 1,), in a batch of 1; tokens after the last see nothing.
        key_ranges: The same for any batch: key range [first, end) of each token's sequence, (B, T, 2). Neither end
            may decrease from one token to the next.
        norm_weight: Weight of the norm over each head's output, (D,). None for no norm.
        norm_eps: Epsilon of the norm.
        norm_scale: Factor after the norm.

    Returns:
        (B, T, H, D) in the dtype of the query.

    Raises:
        ValueError: Shapes, dtypes or widths do not fit.
        RuntimeError: Triton cannot run here.
    """
    if scaling <= 0:
        raise ValueError(f"scaling={scaling} must be positive: the maximum is taken before it is applied")
    if sliding_window is not None and not is_causal:
        raise ValueError(f"sliding_window={sliding_window} needs is_causal=True")
    _check(query, key, value, diff_lambda)
    _check_masks(query, key, key_start=key_start, key_length=key_length, cu_seqlens=cu_seqlens, key_ranges=key_ranges)
    reason = triton_can_run(query.device)
    if reason is not None:
        raise RuntimeError(f"diff_triton cannot run: {reason}")
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if diff_lambda is not None:
        diff_lambda = diff_lambda.float().contiguous()
    if norm_weight is not None:
        norm_weight = norm_weight.contiguous()
    if key_start is not None:
        key_start = key_start.to(torch.int32).contiguous()
    if key_length is not None:
        key_length = key_length.to(torch.int32).expand(query.shape[0]).contiguous()
    if cu_seqlens is not None:
        key_ranges = _ranges_of_tokens(cu_seqlens, query.shape[2])
    if key_ranges is not None:
        key_ranges = key_ranges.to(torch.int32).contiguous()
    tensors = (query, key, value, diff_lambda, norm_weight)
    masks = (key_start, key_length, key_ranges)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    options = (scaling, is_causal, sliding_window, norm_eps, norm_scale, keep)
    return _forward_op(*tensors, *masks, *options)[0]
