"""
Tiles of the fused kernels, by variant, width, dtype and GPU.

T queries, G heads per key-value head, d map_dim, D head_dim. BLOCK_d and BLOCK_D are d and D rounded up to powers of
two.
"""

from typing import Any

import torch


DECODE_MAX_QUERIES = 8
DECODE_MAX_BYTES = 16384  # of one decode tile, T * G rows of head_dim: what registers and shared memory hold
# What each kernel runs with, (BLOCK_M, BLOCK_N, warps, stages), by variant (V1 has a key for each map and values 2d
# wide, V2 shared keys and values d wide) and BLOCK_d. On sm_90, where groups of four warps multiply out of shared
# memory, the tile whose fp32 accumulators stay in registers (BLOCK_M in fwd and dq, BLOCK_N in dkdv) has 16 rows per
# warp: fewer, and two groups repeat each other's scores and exponentials; more do not fit into 255 registers.
TILES_SM_90 = {
    ("v1", 32): {"fwd": (128, 64, 8, 3), "dkdv": (64, 128, 8, 3), "dq": (128, 64, 8, 3), "decode": (64, 4, 3)},
    ("v1", 64): {"fwd": (128, 64, 8, 3), "dkdv": (32, 128, 8, 3), "dq": (128, 64, 8, 3), "decode": (64, 4, 3)},
    ("v1", 128): {"fwd": (128, 64, 8, 3), "dkdv": (32, 128, 8, 3), "dq": (128, 32, 8, 3), "decode": (32, 4, 3)},
    ("v2", 32): {"fwd": (128, 64, 8, 3), "dkdv": (64, 128, 8, 3), "dq": (128, 64, 8, 3), "decode": (64, 4, 3)},
    ("v2", 64): {"fwd": (128, 64, 8, 3), "dkdv": (32, 128, 8, 3), "dq": (128, 64, 8, 3), "decode": (64, 4, 3)},
    ("v2", 128): {"fwd": (128, 64, 8, 3), "dkdv": (32, 128, 8, 2), "dq": (128, 64, 8, 3), "decode": (64, 4, 3)},
    ("v2", 256): {"fwd": (128, 32, 8, 2), "dkdv": (32, 128, 8, 2), "dq": (64, 32, 8, 3), "decode": (32, 4, 3)},
}
# Everywhere else operands of a product are in registers, too, and consumer GPUs have 99 KiB of shared memory per
# program instead of 227: where the tiles are wide, others fit both, without spills in the loops over keys.
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


def padded_widths(map_dim: int, head_dim: int) -> tuple[int, int]:
    """Returns BLOCK_d and BLOCK_D: powers of two, and at least 16 because tl.dot requires it."""
    return max(16, 1 << (map_dim - 1).bit_length()), max(16, 1 << (head_dim - 1).bit_length())


def choose_tiles(flags: dict[str, Any], dtype: torch.dtype, *, sm_90: bool) -> tuple[dict[str, tuple], bool]:
    """Returns the row of the table for SHARE_K and BLOCK_d, and whether only one accumulator fits."""
    shape = ("v2" if flags["SHARE_K"] else "v1", max(32, flags["BLOCK_d"]))
    table = TILES_SM_90 if sm_90 else TILES
    return TILES_FP32 if dtype == torch.float32 else table[shape], shape in ONE_ACCUMULATOR
