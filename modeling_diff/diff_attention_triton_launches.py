"""
Launches of the fused kernels: arguments, grids and buffers.

B batch, T queries, S keys, H heads, K key-value heads, G = H // K, d map_dim, D head_dim.
"""

import functools
from typing import Any

import torch

from .diff_attention_triton_backward_kernels import bwd_dkdv_kernel, bwd_dq_kernel, bwd_pre_kernel
from .diff_attention_triton_kernels import combine_kernel, decode_kernel, fwd_kernel
from .diff_attention_triton_tiles import DECODE_MAX_BYTES, DECODE_MAX_QUERIES, choose_tiles, padded_widths


FUSE = {"enable_fp_fusion": True}  # a * b + c in one instruction: triton 3.10 no longer does so by default
LOG2E = 1.4426950408889634


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up."""
    return -(-a // b)


@functools.lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.lru_cache
def _is_sm_90(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def decode_splits(device: torch.device, programs: int, num_keys: int, *, block_n: int) -> int:
    """Returns as many splits as run at once, two programs per multiprocessor, each with at least two tiles of keys."""
    processors = _multiprocessors(device.index) if device.type == "cuda" else 8
    return max(1, min(2 * processors // max(1, programs), cdiv(num_keys, 2 * block_n), 128))


def _flags(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, diff_lambda: torch.Tensor | None, **masks: Any
) -> dict[str, Any]:
    """Returns widths and constexpr flags that every kernel shares."""
    maps = 1 if diff_lambda is None else 2
    map_dim = query.shape[-1]
    head_dim = value.shape[-1]
    block_d, block_D = padded_widths(map_dim, head_dim)
    return {
        "MAPS": maps,
        "SHARE_K": key.shape[-1] == map_dim,
        "LAM_ROW": maps == 2 and diff_lambda.dim() == 3,
        "LOWER": any(masks[name] is not None for name in ("start_ptr", "ranges_ptr", "window")),
        "d": map_dim,
        "D": head_dim,
        "BLOCK_d": block_d,
        "BLOCK_D": block_D,
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
    }


def _sizes(query: torch.Tensor, value: torch.Tensor, maps: int) -> dict[str, int]:
    num_heads = query.shape[1] // maps
    return {
        "B": query.shape[0],
        "H": num_heads,
        "G": num_heads // value.shape[1],
        "T": query.shape[2],
        "S": value.shape[2],
    }


def _strides(**tensors: torch.Tensor) -> dict[str, int]:
    """Returns the strides of tensors (B, heads, tokens, width) by the names of the kernels' arguments."""
    strides: dict[str, int] = {}
    for name, tensor in tensors.items():
        axes = "bht" if name.endswith("q") else "bhs"
        strides |= {f"stride_{name}{axis}": tensor.stride(dim) for dim, axis in enumerate(axes)}
    return strides


def _on_its_device(launch):
    """Makes the tensors' device the current one, where Triton launches; device_map may have moved them to another."""

    @functools.wraps(launch)
    def run(first, *rest):
        with torch.cuda.device_of(first):
            return launch(first, *rest)

    return run


def empty_outputs(
    query: torch.Tensor, value: torch.Tensor, *, maps: int, norm: bool, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns buffers for what `launch_forward` returns."""
    batch_size, num_queries, num_tokens, _ = query.shape
    num_heads = num_queries // maps
    out = query.new_empty(batch_size, num_tokens, num_heads, value.shape[-1])
    o = query.new_empty(out.shape if keep and norm else 0)
    o2 = query.new_empty(out.shape if keep and maps == 2 else 0)
    stats = query.new_empty((3, batch_size, num_heads, num_tokens) if keep else 0, dtype=torch.float32)
    return out, o, o2, stats


@_on_its_device
def launch_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    diff_lambda: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    key_start: torch.Tensor | None,
    key_length: torch.Tensor | None,
    key_ranges: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    sliding_window: int | None,
    norm_eps: float,
    norm_scale: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Computes attention by the forward or the decode kernels.

    Returns:
        out; and for the backward pass, with `keep`: o before the norm and o2, (B, T, H, D) each, and (lse1, lse2,
        rstd), (3, B, H, T). They are empty where they have no use.
    """
    masks: dict[str, Any] = {
        "start_ptr": key_start,
        "length_ptr": key_length,
        "ranges_ptr": key_ranges,
        "window": sliding_window,
    }
    flags = {**_flags(query, key, value, diff_lambda=diff_lambda, **masks), "CAUSAL": is_causal}
    maps = flags["MAPS"]
    sizes = _sizes(query, value, maps)
    outputs = empty_outputs(query, value, maps=maps, norm=norm_weight is not None, keep=keep)
    out, o, o2, stats = outputs
    states: dict[str, Any] = {"q_ptr": query, "k_ptr": key, "v_ptr": value, **_strides(q=query, k=key, v=value)}
    states["scale"] = scaling * LOG2E  # of scores in base 2
    epilogue: dict[str, Any] = {"lam_ptr": diff_lambda, "weight_ptr": norm_weight, "out_ptr": out}
    epilogue |= {"eps": norm_eps, "norm_scale": norm_scale}
    tiles, one_accumulator = choose_tiles(flags, query.dtype, sm_90=_is_sm_90(query.device))
    block_rows = max(16, 1 << (sizes["T"] * sizes["G"] - 1).bit_length())
    fits = block_rows * flags["BLOCK_D"] * query.element_size() <= DECODE_MAX_BYTES
    if not keep and key_ranges is None and sizes["T"] <= DECODE_MAX_QUERIES and fits:
        del masks["ranges_ptr"]
        tile = {"BLOCK_M": block_rows, **_tile("decode", tiles)}
        _launch_decode(states | masks, epilogue, sizes=sizes, flags=flags, tile=tile)
        return outputs
    lse1, lse2, rstd = stats if keep else (None, None, None)
    two_pass = one_accumulator and maps == 2
    tile = _tile("fwd", tiles)
    fwd_kernel[(cdiv(sizes["T"], tile["BLOCK_M"]) * sizes["B"] * sizes["H"],)](
        **states,
        **masks,
        **epilogue,
        o_ptr=o if keep else None,
        o2_ptr=o2 if keep else None,
        lse1_ptr=lse1,
        lse2_ptr=lse2,
        rstd_ptr=rstd,
        scratch_ptr=torch.empty_like(out, dtype=torch.float32) if two_pass else None,
        **sizes,
        **flags,
        TWO_PASS=two_pass,
        **tile,
        **FUSE,
    )
    return outputs


def _tile(kernel: str, tiles: dict[str, tuple]) -> dict[str, int]:
    """Returns a kernel's blocks, warps and stages by the names of its arguments."""
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return dict(zip(names[-len(tiles[kernel]) :], tiles[kernel], strict=True))


def _launch_decode(
    states: dict[str, Any],
    epilogue: dict[str, Any],
    *,
    sizes: dict[str, int],
    flags: dict[str, Any],
    tile: dict[str, int],
) -> None:
    """Computes a decode step: splits of the keys in parallel, then lambda and the norm over their sum."""
    out = epilogue["out_ptr"]
    num_heads = sizes["H"]
    num_kv_heads = num_heads // sizes["G"]
    programs = sizes["B"] * num_kv_heads
    splits = decode_splits(out.device, programs, sizes["S"], block_n=tile["BLOCK_N"])
    shape = (sizes["B"], num_kv_heads, splits, flags["MAPS"], sizes["T"] * sizes["G"], flags["D"])
    parts = out.new_empty(shape, dtype=torch.float32)
    lse = parts.new_empty(parts.shape[:-1])
    shared: dict[str, Any] = {"part_ptr": parts, "lse_ptr": lse, "SPLITS": splits, "G": sizes["G"], "T": sizes["T"]}
    decode_kernel[(programs * splits,)](
        **states,
        **shared,
        K=num_kv_heads,
        S=sizes["S"],
        **{name: flag for name, flag in flags.items() if name not in ("LAM_ROW", "LOWER")},
        **tile,
        **FUSE,
    )
    combine_kernel[(sizes["B"] * sizes["T"] * num_heads,)](
        **shared,
        **epilogue,
        H=num_heads,
        **{name: flags[name] for name in ("MAPS", "LAM_ROW", "D", "BLOCK_D")},
        BLOCK_S=16,
        **FUSE,
    )


@_on_its_device
def launch_backward(
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
    key_ranges: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    sliding_window: int | None,
    norm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Computes gradients by the backward kernels.

    Returns:
        dq, dk, dv; dlambda and dweight in fp32, empty where they have no use.
    """
    masks: dict[str, Any] = {
        "start_ptr": key_start,
        "length_ptr": key_length,
        "ranges_ptr": key_ranges,
        "window": sliding_window,
    }
    flags = {**_flags(query, key, value, diff_lambda=diff_lambda, **masks), "CAUSAL": is_causal}
    sizes = _sizes(query, value, flags["MAPS"])
    grad = grad.contiguous()
    deltas = torch.empty_like(stats[:2])  # (2, B, H, T): D1, D2
    do, dweight = _launch_norm_backward(
        grad,
        deltas,
        forward={"o_ptr": o, "o2_ptr": o2, "rstd_ptr": stats[2], "lam_ptr": diff_lambda, "weight_ptr": norm_weight},
        sizes=sizes,
        flags=flags,
        norm_scale=norm_scale,
    )
    dq = torch.empty_like(query)
    dk = torch.empty_like(key)
    dv = torch.empty_like(value)
    shared: dict[str, Any] = {"q_ptr": query, "k_ptr": key, "v_ptr": value, "lam_ptr": diff_lambda, "do_ptr": do}
    shared |= {"lse1_ptr": stats[0], "lse2_ptr": stats[1], "delta1_ptr": deltas[0], "delta2_ptr": deltas[1]}
    shared |= {**masks, **_strides(q=query, k=key, v=value), "scale": scaling * LOG2E, "scaling": scaling}
    shared |= {**sizes, **flags, **FUSE}
    tiles, one_accumulator = choose_tiles(flags, query.dtype, sm_90=_is_sm_90(query.device))
    tile = _tile("dkdv", tiles)
    grid = (cdiv(sizes["S"], tile["BLOCK_N"]) * sizes["B"] * value.shape[1],)
    for with_dk, with_dv in ((True, False), (False, True)) if one_accumulator else ((True, True),):
        bwd_dkdv_kernel[grid](**shared, dk_ptr=dk, dv_ptr=dv, **_strides(dk=dk, dv=dv), DK=with_dk, DV=with_dv, **tile)
    tile = _tile("dq", tiles)
    grid = (cdiv(sizes["T"], tile["BLOCK_M"]) * sizes["B"] * sizes["H"],)
    bwd_dq_kernel[grid](**shared, dq_ptr=dq, **_strides(dq=dq), **tile)
    # torch.sum orders its additions the same way every time, so both of these are deterministic, too.
    dlambda = stats.new_empty(0)
    if flags["MAPS"] == 2:
        dlambda = -deltas[1].transpose(1, 2).contiguous() if flags["LAM_ROW"] else -deltas[1].sum()
    return dq, dk, dv, dlambda, stats.new_empty(0) if dweight is None else dweight.sum(0)


def _launch_norm_backward(
    grad: torch.Tensor,
    deltas: torch.Tensor,
    *,
    forward: dict[str, torch.Tensor | None],
    sizes: dict[str, int],
    flags: dict[str, Any],
    norm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fills D1 and D2; returns the gradient before the norm and, with a norm, parts of dweight (programs, D)."""
    block_m = 16
    tiles_per_program = 8
    num_rows = sizes["B"] * sizes["T"] * sizes["H"]
    programs = cdiv(num_rows, block_m * tiles_per_program)
    has_norm = forward["weight_ptr"] is not None
    do = torch.empty_like(grad) if has_norm else grad
    dweight = deltas.new_empty(programs, flags["D"]) if has_norm else None
    bwd_pre_kernel[(programs,)](
        grad_ptr=grad,
        do_ptr=do,
        delta1_ptr=deltas[0],
        delta2_ptr=deltas[1],
        dweight_ptr=dweight,
        **forward,
        H=sizes["H"],
        T=sizes["T"],
        N_ROWS=num_rows,
        norm_scale=norm_scale,
        **{name: flags[name] for name in ("MAPS", "LAM_ROW", "D", "BLOCK_D")},
        BLOCK_M=block_m,
        TILES=tiles_per_program,
        num_warps=4,
        **FUSE,
    )
    return do, dweight
