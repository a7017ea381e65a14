"""The kernels compiled for GPUs that are not there: registers, shared memory, spills, tensor cores.

A spill outside the innermost loops is paid once a program; inside, once a tile of keys. The second must be none,
or few.
"""

import os
import re
import subprocess

import pytest
import torch

from modeling_diff import diff_attention_triton_launches as launches
from modeling_diff import diff_attention_triton_tiles as tables


triton = pytest.importorskip("triton", reason="triton is not installed, so there is nothing to compile")
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
pytestmark = [
    pytest.mark.skipif(not os.path.exists(CUOBJDUMP), reason="this triton brings no cuobjdump"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"),
]
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MAX_REGISTERS = 255
# KiB of shared memory that one program may ask for; sm_86 has sm_89's, and the same instructions.
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
# Spilled stores outside the innermost loops. With one accumulator the epilogue of fwd holds both maps' outputs once.
MAX_SPILLS = 160
MAX_SPILLS_ONE_ACCUMULATOR = 700
# And inside them, on sm_90, of the kernels that hold two tiles of scores while exponentials are taken.
MAX_SPILLS_INSIDE_SM_90 = {"fwd": 12, "dq": 2}
IN_MODEL_DTYPE = {"q", "k", "v", "out", "o", "o2", "do", "dk", "dv", "dq", "grad", "weight"}


MASKS = {"start_ptr", "length_ptr", "ranges_ptr", "window"}
SIZES = {"B", "H", "K", "G", "T", "S", "SPLITS"}


def compile_kernel(
    name, variant, map_dim, dtype, masks=(), dk=True, dv=True, maps=2, ones=(), causal=True, architecture=90, rows=16
):
    """One shipped configuration, with pointers and strides that are multiples of 16, as torch's tensors have them.

    masks: those in use. ones: sizes that are 1, which triton makes constants of. rows: of a decode step.
    """
    kernel = getattr(launches, {"dkdv": "bwd_dkdv", "dq": "bwd_dq"}.get(name, name) + "_kernel")
    share_k, norm = variant == "v2", variant == "v1"
    head_dim = map_dim if share_k else 2 * map_dim
    block_d, block_D = tables.padded_widths(map_dim, head_dim)
    flags = {"SHARE_K": share_k, "BLOCK_d": block_d}
    tiles, one_accumulator = tables.choose_tiles(flags, dtype, sm_90=architecture == 90)
    constants = {
        "MAPS": maps,
        "SHARE_K": share_k,
        "LAM_ROW": share_k and maps == 2,
        "CAUSAL": causal,
        "LOWER": bool(MASKS - {"length_ptr"} & set(masks)),
        "d": map_dim,
        "D": head_dim,
        "BLOCK_d": block_d,
        "BLOCK_D": block_D,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "TWO_PASS": one_accumulator and maps == 2,
        "DK": dk,
        "DV": dv,
        "BLOCK_S": 16,
        "TILES": 8,
        "BLOCK_M": rows,
    }
    warps = 4
    stages = 3
    if name in tiles:
        *blocks, warps, stages = tiles[name]
        constants |= dict(zip(("BLOCK_N", "BLOCK_M"), reversed(blocks), strict=False))
    constants |= dict.fromkeys(ones, 1)
    absent = MASKS - set(masks)
    absent |= set() if maps == 2 else {"lam_ptr", "o2_ptr"}
    absent |= set() if norm else {"weight_ptr", "rstd_ptr", "dweight_ptr"} | ({"o_ptr"} if name == "fwd" else set())
    absent |= set() if one_accumulator else {"scratch_ptr"}
    signature = {}
    values = {}
    attributes = {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants or argument in absent:
            signature[argument], values[argument] = "constexpr", constants.get(argument)
        elif argument.endswith("_ptr"):
            stem = argument.removesuffix("_ptr")
            element = DTYPES[dtype] if stem in IN_MODEL_DTYPE else "i32" if argument in MASKS else "fp32"
            signature[argument] = "*" + element
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif argument in ("scale", "scaling", "eps", "norm_scale"):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32"
            if argument.startswith("stride_"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        triton.compiler.ASTSource(kernel, signature, values, attributes),
        target=triton.backends.compiler.GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


def dump(compiled, tmp_path, option):
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return subprocess.run([CUOBJDUMP, option, str(cubin)], capture_output=True, text=True, check=True).stdout


def resources(compiled, tmp_path):
    """Registers and shared bytes, from the cubin."""
    registers = int(re.search(r"REG:(\d+)", dump(compiled, tmp_path, "-res-usage"))[1])
    return {"registers": registers, "shared_bytes": compiled.metadata.shared}


def instructions(compiled, tmp_path):
    """Spilled stores by place and tensor-core instructions, from the disassembly, which takes half a second."""
    disassembly = dump(compiled, tmp_path, "-sass")
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", disassembly)]
    branches = [(at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, text in code]
    loops = [(int(target[1], 16), at) for at, target in branches if target and int(target[1], 16) < at]
    inner = [(begin, end) for begin, end in loops if not any(begin <= at < end and at != begin for at, _ in loops)]
    spills = [at for at, text in code if re.search(r"\bSTL\b", text)]
    inside = sum(any(begin <= at <= end for begin, end in inner) for at in spills)
    return {
        "spills_outside": len(spills) - inside,
        "spills_inside": inside,
        "hgmma": sum("HGMMA" in text for _, text in code),
        "hmma": sum(" HMMA" in f" {text}" for _, text in code),
        "inner_loops": len(inner),
    }


SHAPES = [("v1", 64), ("v1", 128), ("v2", 64), ("v2", 128)]
KERNELS = ["fwd", "dkdv", "dq", "decode", "bwd_pre", "combine"]
SLOW_SHAPES = [("v1", 32), ("v1", 96), ("v2", 96), ("v2", 256)]


def check(name, variant, map_dim, dtype, masks, tmp_path, architecture=90):
    one_accumulator = (variant, tables.padded_widths(map_dim, 1)[0]) in tables.ONE_ACCUMULATOR
    halves = [(True, False), (False, True)] if name == "dkdv" and one_accumulator else [(True, True)]
    for dk, dv in halves:
        compiled = compile_kernel(name, variant, map_dim, dtype, masks, dk, dv, architecture=architecture)
        found = resources(compiled, tmp_path)
        if dtype != torch.float32:
            found |= instructions(compiled, tmp_path)
        print(f"sm_{architecture} {name} {variant} d={map_dim} {DTYPES[dtype]} {masks=} {dk=} {dv=}: {found}")
        assert found["registers"] <= MAX_REGISTERS
        assert found["shared_bytes"] <= SHARED_KIB[architecture] * 1024
        if dtype == torch.float32:
            assert found["registers"] > 32  # what ptxas falls back to when it gives up: thousands of spills
            continue  # three products for one: it spills, and is there to be exact
        if name in ("fwd", "dkdv", "dq"):
            assert found["inner_loops"] > 0
        if architecture == 90 and name in ("fwd", "dkdv", "dq"):
            assert found["hgmma"] > 0 and found["hmma"] == 0
        elif architecture != 100 and name in ("fwd", "dkdv", "dq", "decode"):  # sm_100 has instructions of its own
            assert found["hmma"] > 0  # in decode on sm_90, too: 16 rows are too few for a warp group
        assert found["spills_outside"] <= (MAX_SPILLS_ONE_ACCUMULATOR if one_accumulator else MAX_SPILLS)
        if (variant, map_dim, name, architecture) != ("v2", 256, "dq", 90):  # 64 rows twice 256 wide do not quite fit
            assert found["spills_inside"] <= (MAX_SPILLS_INSIDE_SM_90.get(name, 0) if architecture == 90 else 0)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("variant", "map_dim"), SHAPES)
def test_kernel_fits_sm_90(name, variant, map_dim, tmp_path):
    check(name, variant, map_dim, torch.bfloat16, (), tmp_path)


@pytest.mark.parametrize("architecture", [89, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("variant", "map_dim"), [("v1", 64), ("v1", 128), ("v2", 128), ("v2", 256)])
def test_decode_of_as_many_rows_as_it_takes_fits(variant, map_dim, dtype, architecture, tmp_path):
    head_dim = map_dim if variant == "v2" else 2 * map_dim
    rows = max(16, tables.DECODE_MAX_BYTES // (head_dim * dtype.itemsize))
    compiled = compile_kernel("decode", variant, map_dim, dtype, architecture=architecture, rows=rows)
    found = resources(compiled, tmp_path)
    print(f"sm_{architecture} decode {variant} d={map_dim} {DTYPES[dtype]} {rows=}: {found}")
    assert found["registers"] > 32  # what ptxas falls back to when it gives up
    assert found["shared_bytes"] <= SHARED_KIB[architecture] * 1024


@pytest.mark.parametrize("kernel", ["fwd", "bwd_pre", "bwd_dkdv", "bwd_dq", "decode", "combine"])
def test_no_kernel_is_compiled_anew_for_the_length_of_a_cache_or_a_batch(kernel):
    """What changes from step to step of generation, and from batch to batch; a compilation takes seconds."""
    parameters = getattr(launches, f"{kernel}_kernel").params
    changing = [parameter for parameter in parameters if parameter.name in ("B", "S", "SPLITS", "N_ROWS")]
    assert changing and all(parameter.do_not_specialize for parameter in changing)


OPTIONS = {
    "packed": {"masks": ("ranges_ptr", "window")},
    "static cache": {"masks": ("start_ptr", "length_ptr"), "causal": False},
    "one map": {"maps": 1},
    "sizes of one": {"masks": ("length_ptr", "window"), "ones": SIZES},
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_compiles(name, option, tmp_path):
    variant = "v2" if option == "one map" else "v1"
    found = resources(compile_kernel(name, variant, 64, torch.bfloat16, **OPTIONS[option]), tmp_path)
    assert found["shared_bytes"] <= SHARED_KIB[90] * 1024


@pytest.mark.parametrize("name", ["fwd", "dkdv", "dq", "decode"])
@pytest.mark.parametrize(("variant", "map_dim"), SHAPES)
def test_kernel_fits_the_shared_memory_of_consumer_gpus(name, variant, map_dim, tmp_path):
    check(name, variant, map_dim, torch.bfloat16, (), tmp_path, architecture=89)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 100, 120])
@pytest.mark.parametrize("name", ["fwd", "dkdv", "dq", "decode"])
@pytest.mark.parametrize(("variant", "map_dim"), [("v1", 128), ("v2", 128), ("v2", 256)])
def test_wide_kernel_fits_other_gpus(name, variant, map_dim, architecture, tmp_path):
    check(name, variant, map_dim, torch.bfloat16, (), tmp_path, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fwd", "dkdv", "dq", "decode"])
@pytest.mark.parametrize(("variant", "map_dim"), [*SLOW_SHAPES, *SHAPES])
def test_kernel_with_left_padding_or_another_width_fits_sm_90(name, variant, map_dim, tmp_path):
    check(name, variant, map_dim, torch.float16, ("start_ptr",), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fwd", "dkdv", "dq", "decode"])
@pytest.mark.parametrize("architecture", [89, 90])
def test_float32_kernel_fits(name, architecture, tmp_path):
    check(name, "v1", 128, torch.float32, (), tmp_path, architecture)
