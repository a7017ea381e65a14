"""Fused differential attention on CUDA GPUs: tiles, launches, operators; `diff_attention_kernels` has the kernels.

Sizes: B batch, T queries, S keys, H heads, K KV heads, G = H // K, D head_dim, d map_dim. BLOCK_d and BLOCK_D are d
and D rounded up to powers of two.
"""

import functools

import torch

from .diff_attention import operator_namespace
from .diff_attention_kernels import (
    bwd_dkdv_kernel,
    bwd_dq_kernel,
    bwd_pre_kernel,
    combine_kernel,
    decode_kernel,
    fwd_kernel,
    triton,
)


FUSE = {"enable_fp_fusion": True}  # a * b + c in one instruction: triton 3.10 no longer does so by default
LOG2E = 1.4426950408889634
DECODE_MAX_QUERIES = 8
DECODE_MAX_BYTES = 16384  # of one decode tile, T * G rows of head_dim: what registers and shared memory hold
# What each kernel runs with, (BLOCK_M, BLOCK_N, warps, stages), by BLOCK_d; the first key is V1 (one key a map, values
# 2d wide) or V2 (shared keys, values d wide). On sm_90, where groups of four warps multiply out of shared memory, the
# tile whose fp32 accumulators stay in registers (BLOCK_M in fwd and dq, BLOCK_N in dkdv) has 16 rows a warp: with
# fewer, two groups repeat each other's scores and exponentials; more do not fit into 255 registers a thread.
TILES_SM_90 = {
    ("v1", 32): {"fwd": (128, 64, 8, 3), "dkdv": (64, 128, 8, 3), "dq": (128, 64, 8, 3), "decode": (64, 4, 3)},
    ("v1", 64): {"fwd": (128, 64, 8, 3), "dkdv": (32, 128, 8, 3), "dq": (128, 64, 8, 3), "decode": (64, 4, 3)},
    ("v1", 128): {"fwd": (128, 64, 8, 3), "dkdv": (32, 128, 8, 3), "dq": (128, 32, 8, 3), "decode": (32, 4, 3)},
    ("v2", 32): {"fwd": (128, 64, 8, 3), "dkdv": (64, 128, 8, 3), "dq": (128, 64, 8, 3), "decode": (64, 4, 3)},
    ("v2", 64): {"fwd": (128, 64, 8, 3), "dkdv": (32, 128, 8, 3), "dq": (128, 64, 8, 3), "decode": (64, 4, 3)},
    ("v2", 128): {"fwd": (128, 64, 8, 3), "dkdv": (32, 128, 8, 2), "dq": (128, 64, 8, 3), "decode": (64, 4, 3)},
    ("v2", 256): {"fwd": (128, 32, 8, 2), "dkdv": (32, 128, 8, 2), "dq": (64, 32, 8, 3), "decode": (32, 4, 3)},
}
# Everywhere else operands of a product are in registers, too, and consumer GPUs have 99 KiB of shared memory a program
# instead of 227: where the tiles are wide, others fit both, without spills in the loops over keys.
TILES = TILES_SM_90 | {
    ("v1", 64): {"fwd": (128, 32, 8, 2), "dkdv": (64, 64, 8, 2), "dq": (64, 32, 4, 2), "decode": (64, 4, 2)},
    ("v1", 128): {"fwd": (64, 32, 8, 2), "dkdv": (32, 64, 8, 1), "dq": (64, 32, 8, 1), "decode": (32, 4, 2)},
    ("v2", 64): {"fwd": (128, 64, 8, 2), "dkdv": (32, 128, 8, 2), "dq": (64, 32, 4, 2), "decode": (64, 4, 2)},
    ("v2", 128): {"fwd": (64, 64, 8, 2), "dkdv": (32, 32, 4, 2), "dq": (64, 32, 8, 2), "decode": (64, 4, 2)},
    ("v2", 256): {"fwd": (64, 32, 8, 1), "dkdv": (16, 32, 8, 1), "dq": (32, 32, 8, 1), "decode": (32, 4, 2)},
}
# Too wide for two accumulators: fwd takes one map after the other (v is read twice, no product is repeated), dkdv runs
# once for dk and once for dv (10 products instead of 8).
ONE_ACCUMULATOR = {("v1", 128), ("v2", 256)}
# fp32 operands are twice as wide and their products run as three tf32 products (error near fp32's, on tensor cores):
# small tiles for all of it (with larger ones in dkdv and dq at d = 128, the ptxas of triton 3.9 gives up and compiles
# for 32 registers).
TILES_FP32 = {"fwd": (32, 32, 4, 1), "dkdv": (16, 16, 8, 1), "dq": (16, 32, 8, 1), "decode": (16, 4, 1)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Operators are named after the module: a bundle copy of this file and the package can then live in one process.
NAMESPACE = operator_namespace("diff_triton", __name__)


def _cdiv(a, b):
    return -(-a // b)


def _widths(map_dim, head_dim):
    """BLOCK_d and BLOCK_D: powers of two, and at least 16 because tl.dot wants that."""
    return max(16, 1 << (map_dim - 1).bit_length()), max(16, 1 << (head_dim - 1).bit_length())


def _tiles(share_k, block_d, dtype, sm_90):
    """This shape's row of the table, and whether one accumulator is all that fits."""
    shape = ("v2" if share_k else "v1", max(32, block_d))
    table = TILES_SM_90 if sm_90 else TILES
    return TILES_FP32 if dtype == torch.float32 else table[shape], shape in ONE_ACCUMULATOR


@functools.lru_cache
def _multiprocessors(index):
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.lru_cache
def _is_sm_90(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def triton_can_run(device) -> str | None:
    """None when the kernels run on `device`, else the reason in words."""
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
    """Whether there are tiles for queries, keys and values of these widths."""
    return max(_widths(key_dim, head_dim)) <= 256 and key_dim in (map_dim, 2 * map_dim)


def _flags(query, key, value, diff_lambda, is_causal, key_start, bounds, sliding_window):
    """Sizes and constexpr flags that every kernel shares."""
    maps = 1 if diff_lambda is None else 2
    map_dim, head_dim = query.shape[-1], value.shape[-1]
    block_d, block_D = _widths(map_dim, head_dim)
    return {
        "MAPS": maps,
        "SHARE_K": key.shape[-1] == map_dim,
        "LAM_ROW": maps == 2 and diff_lambda.dim() == 3,
        "CAUSAL": is_causal,
        "LOWER": key_start is not None or bounds is not None or sliding_window is not None,
        "d": map_dim,
        "D": head_dim,
        "BLOCK_d": block_d,
        "BLOCK_D": block_D,
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
    }


def _decode_splits(device, programs, S, BLOCK_N):
    """As many splits as run at once, two programs a multiprocessor, each with at least two tiles of keys."""
    processors = _multiprocessors(device.index) if device.type == "cuda" else 8
    return max(1, min(2 * processors // max(1, programs), _cdiv(S, 2 * BLOCK_N), 128))


def _on_its_device(launch):
    """Triton launches on the current device: make that the tensors' own, which device_map may have moved."""

    @functools.wraps(launch)
    def run(first, *rest):
        with torch.cuda.device_of(first):
            return launch(first, *rest)

    return run


@_on_its_device
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    diff_lambda: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    key_start: torch.Tensor | None,
    key_length: torch.Tensor | None,
    bounds: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    sliding_window: int | None,
    norm_eps: float,
    norm_scale: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, and with `keep` what the backward reads: o before the norm, o2, (lse1, lse2, rstd); else empty tensors."""
    flags = _flags(query, key, value, diff_lambda, is_causal, key_start, bounds, sliding_window)
    (B, _, T, _), (_, K, S, D) = query.shape, value.shape
    H = query.shape[1] // flags["MAPS"]
    out, o, o2, stats = _forward_empty(query, value, flags["MAPS"], norm_weight is not None, keep)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    tiles, one_accumulator = _tiles(flags["SHARE_K"], flags["BLOCK_d"], query.dtype, _is_sm_90(query.device))
    group_rows = max(16, 1 << (T * H // K - 1).bit_length())
    fits = group_rows * flags["BLOCK_D"] * query.element_size() <= DECODE_MAX_BYTES
    if not keep and bounds is None and T <= DECODE_MAX_QUERIES and fits:
        block_n, warps, stages = tiles["decode"]
        splits = _decode_splits(query.device, B * K, S, block_n)
        parts = query.new_empty(B, K, splits, flags["MAPS"], T * H // K, D, dtype=torch.float32)
        lse = parts.new_empty(parts.shape[:-1])
        shape = {name: flags[name] for name in ("MAPS", "LAM_ROW", "D", "BLOCK_D")}
        flags = {name: flag for name, flag in flags.items() if name not in ("LAM_ROW", "LOWER")}
        decode_kernel[(B * K * splits,)](
            query, key, value, parts, lse, key_start, key_length, sliding_window, *strides,
            K, H // K, T, S, splits, scaling * LOG2E, **flags,
            BLOCK_M=group_rows, BLOCK_N=block_n, num_warps=warps, num_stages=stages, **FUSE,
        )  # fmt: skip
        combine_kernel[(B * T * H,)](
            parts, lse, diff_lambda, norm_weight, out, H, H // K, T, splits, norm_eps, norm_scale, **shape, BLOCK_S=16,
            **FUSE,
        )  # fmt: skip
        return out, o, o2, stats
    lse1, lse2, rstd = stats if keep else (None, None, None)
    two_pass = one_accumulator and flags["MAPS"] == 2
    scratch = torch.empty_like(out, dtype=torch.float32) if two_pass else None
    block_m, block_n, warps, stages = tiles["fwd"]
    fwd_kernel[(_cdiv(T, block_m) * B * H,)](
        query, key, value, diff_lambda, norm_weight, out, o if keep else None, o2 if keep else None, lse1, lse2, rstd,
        scratch, key_start, key_length, bounds, sliding_window, *strides,
        B, H, H // K, T, S, scaling * LOG2E, norm_eps, norm_scale, **flags,
        BLOCK_M=block_m, BLOCK_N=block_n, TWO_PASS=two_pass, num_warps=warps, num_stages=stages, **FUSE,
    )  # fmt: skip
    return out, o, o2, stats


def _forward_empty(query, value, maps, norm, keep):
    B, H, T, D = query.shape[0], query.shape[1] // maps, query.shape[2], value.shape[-1]
    out = query.new_empty(B, T, H, D)
    o = query.new_empty(out.shape if keep and norm else 0)
    o2 = query.new_empty(out.shape if keep and maps == 2 else 0)
    return out, o, o2, query.new_empty((3, B, H, T) if keep else 0, dtype=torch.float32)


@_on_its_device
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    o: torch.Tensor,
    o2: torch.Tensor,
    stats: torch.Tensor,
    diff_lambda: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    key_start: torch.Tensor | None,
    key_length: torch.Tensor | None,
    bounds: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    sliding_window: int | None,
    norm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, and (empty where they have no use) dlambda and dweight in fp32."""
    flags = _flags(query, key, value, diff_lambda, is_causal, key_start, bounds, sliding_window)
    (B, _, T, _), (_, K, S, D) = query.shape, value.shape
    H = query.shape[1] // flags["MAPS"]
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    grad = do = grad.contiguous()
    pre_rows, pre_tiles = 16, 8
    programs = _cdiv(B * T * H, pre_rows * pre_tiles)
    delta = torch.empty_like(stats[:2])  # (2, B, H, T): D1, D2
    dweight = None
    if norm_weight is not None:
        do = torch.empty_like(grad)
        dweight = stats.new_empty(programs, D)
    bwd_pre_kernel[(programs,)](
        grad, o, o2, diff_lambda, norm_weight, stats[2], do, delta[0], delta[1], dweight, H, T, B * T * H, norm_scale,
        **{name: flags[name] for name in ("MAPS", "LAM_ROW", "D", "BLOCK_D")},
        BLOCK_M=pre_rows, TILES=pre_tiles, num_warps=4, **FUSE,
    )  # fmt: skip
    masks = (key_start, key_length, bounds, sliding_window)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    sizes = (B, H, H // K, T, S, scaling * LOG2E, scaling)
    tiles, one_accumulator = _tiles(flags["SHARE_K"], flags["BLOCK_d"], query.dtype, _is_sm_90(query.device))
    block_m, block_n, warps, stages = tiles["dkdv"]
    for dk_now, dv_now in ((True, False), (False, True)) if one_accumulator else ((True, True),):
        bwd_dkdv_kernel[(_cdiv(S, block_n) * B * K,)](
            query, key, value, diff_lambda, do, dk, dv, stats[0], stats[1], delta[0], delta[1], *masks, *strides,
            *dk.stride()[:3], *dv.stride()[:3], *sizes, **flags,
            BLOCK_M=block_m, BLOCK_N=block_n, DK=dk_now, DV=dv_now, num_warps=warps, num_stages=stages, **FUSE,
        )  # fmt: skip
    block_m, block_n, warps, stages = tiles["dq"]
    bwd_dq_kernel[(_cdiv(T, block_m) * B * H,)](
        query, key, value, diff_lambda, do, dq, stats[0], stats[1], delta[0], delta[1], *masks, *strides,
        *dq.stride()[:3], *sizes, **flags, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        **FUSE,
    )  # fmt: skip
    # torch.sum orders its additions the same way every time, so both of these are deterministic, too.
    dlambda = stats.new_empty(0)
    if flags["MAPS"] == 2:
        dlambda = -delta[1].transpose(1, 2).contiguous() if flags["LAM_ROW"] else -delta[1].sum()
    return dq, dk, dv, dlambda, stats.new_empty(0) if dweight is None else dweight.sum(0)


def _forward_fake(query, key, value, diff_lambda, norm_weight, *rest):
    return _forward_empty(query, value, 1 if diff_lambda is None else 2, norm_weight is not None, rest[-1])


def _backward_fake(grad, query, key, value, o, o2, stats, diff_lambda, norm_weight, *rest):
    like = [torch.empty_like(tensor) for tensor in (query, key, value)]
    return (*like, stats.new_empty(0 if diff_lambda is None else diff_lambda.shape),
            stats.new_empty(0 if norm_weight is None else norm_weight.shape))  # fmt: skip


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
    *tensors, key_start, key_length, bounds = ctx.saved_tensors
    diff_lambda, norm_weight = tensors[6:8]
    dq, dk, dv, dlambda, dweight = _backward_op(grad, *tensors, key_start, key_length, bounds, *ctx.scalars)
    dlambda = None if diff_lambda is None else dlambda
    dweight = None if norm_weight is None else dweight.to(norm_weight.dtype)
    return (dq, dk, dv, dlambda, dweight, *(None,) * 9)


# Opaque operators (custom_op, not triton_op): one path for compiled, captured, interpreted and eager calls, and the
# kernels leave a compiler nothing to fuse into.
_forward_op = torch.library.custom_op(f"{NAMESPACE}::forward", _forward, mutates_args=())
_backward_op = torch.library.custom_op(f"{NAMESPACE}::backward", _backward, mutates_args=())
_forward_op.register_fake(_forward_fake)
_backward_op.register_fake(_backward_fake)
_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def _check(query, key, value, diff_lambda, is_causal, sliding_window, scaling):
    maps = 1 if diff_lambda is None else 2
    map_dim, head_dim = query.shape[-1], value.shape[-1]
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
            f"the query needs {maps} maps a head and a multiple of {value.shape[1]} heads, key and value one (B, K, S)"
        )
    lambda_shape = (query.shape[0], query.shape[2], query.shape[1] // 2)
    if diff_lambda is not None and diff_lambda.shape not in ((), lambda_shape):
        raise ValueError(f"diff_lambda must be () or {lambda_shape}, is {tuple(diff_lambda.shape)}")
    if scaling <= 0:
        raise ValueError(f"scaling={scaling} must be positive: the maximum is taken before it is applied")
    if sliding_window is not None and not is_causal:
        raise ValueError(f"sliding_window={sliding_window} needs is_causal=True")


def _check_masks(query, key, key_start, key_length, cu_seqlens, sequence_bounds):
    if key_start is not None and key_start.shape != query.shape[:1]:
        raise ValueError(f"key_start must be ({query.shape[0]},), is {tuple(key_start.shape)}")
    if cu_seqlens is None and sequence_bounds is None:
        return
    if query.shape[2] != key.shape[2] or (cu_seqlens is not None and query.shape[0] != 1):
        raise ValueError("packed sequences need as many keys as queries, and cu_seqlens batch size 1, got "
                         f"query {tuple(query.shape)} and key {tuple(key.shape)}")  # fmt: skip
    if cu_seqlens is not None and sequence_bounds is not None:
        raise ValueError("give cu_seqlens or sequence_bounds, not both")
    bounds_shape = (query.shape[0], query.shape[2], 2)
    if sequence_bounds is not None and sequence_bounds.shape != bounds_shape:
        raise ValueError(f"sequence_bounds must be {bounds_shape}, is {tuple(sequence_bounds.shape)}")
    if key_start is not None or key_length is not None:
        raise ValueError("packed sequences cannot be combined with key_start or key_length: cut the sequences instead")


def _bounds_of_tokens(cu_seqlens, num_tokens):
    """First and end (1, T, 2) of the sequence each token is in; past the last boundary an empty one."""
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
    sequence_bounds: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    norm_scale: float = 1.0,
) -> torch.Tensor:
    """Differential attention (B, T, H, D) of `query` (B, 2H, T, d), `key` (B, K, S, 2d or d), `value` (B, K, S, D).

    O = softmax(s q1 k1^T) v - lambda softmax(s q2 k2^T) v; with `norm_weight` norm_scale * RMSNorm(O) * norm_weight
    (arXiv:2410.05258, eq. 1 and 3). Causal queries are aligned to the last valid key. A row that sees no key gives 0.

    diff_lambda: fp32, () in V1, (B, T, H) in V2; None is plain attention, `query` (B, H, T, d), by the same kernels.
    sliding_window: how many keys up to its own position a query sees.
    key_start: (B,) first visible key of each row of the batch (left padding).
    key_length: (B,) or () number of valid keys (static caches); the rest of `key` and `value` is not read.
    cu_seqlens: (N + 1,) boundaries of packed sequences, batch size 1; tokens after the last boundary see nothing.
    sequence_bounds: (B, T, 2) the same in any batch: the first token of each token's sequence, and the one after its
        last; neither falls along a row.

    Raises ValueError where shapes, dtypes or head sizes do not fit, RuntimeError where triton cannot run.
    """
    _check(query, key, value, diff_lambda, is_causal, sliding_window, scaling)
    _check_masks(query, key, key_start, key_length, cu_seqlens, sequence_bounds)
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
        sequence_bounds = _bounds_of_tokens(cu_seqlens, query.shape[2])
    if sequence_bounds is not None:
        sequence_bounds = sequence_bounds.to(torch.int32).contiguous()
    tensors = (query, key, value, diff_lambda, norm_weight)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    out, *_ = _forward_op(
        *tensors, key_start, key_length, sequence_bounds, scaling, is_causal, sliding_window, norm_eps, norm_scale,
        keep,
    )  # fmt: skip
    return out
