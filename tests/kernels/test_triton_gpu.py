"""The kernels on a GPU: against float64 and against two separate attention calls; graphs; long tensors."""

import dataclasses

import pytest
import torch
from attention_float64 import Case, errors, expected

from modeling_diff.diff_attention_triton import diff_attention_triton, triton_can_run


pytestmark = pytest.mark.gpu

# Relative, per tensor. Operands, probabilities and outputs are rounded to 8 (bf16) or 11 (fp16) bits; fp32 runs as
# three tf32 products of 11 bits each.
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 2e-5}
CASES = {
    "v1": Case(B=2, H=4, K=2, T=333, S=333, d=64, norm=True),
    "v1 128": Case(H=4, K=2, T=257, S=300, d=128, norm=True),
    "v1 32": Case(T=127, S=127, d=32, norm=True),
    "v1 96": Case(T=130, S=130, d=96, norm=True),
    "v1 full": Case(T=65, S=200, d=64, is_causal=False),
    "v2": Case("v2", B=2, H=4, K=2, T=333, S=333, d=64),
    "v2 128": Case("v2", H=4, K=2, T=300, S=300, d=128),
    "v2 256": Case("v2", T=130, S=130, d=256),
    "v1 trained": Case(B=2, H=4, K=2, T=333, S=333, d=64, norm=True, trained=True),
    "v2 trained": Case("v2", B=2, H=4, K=2, T=333, S=333, d=64, trained=True),
    "one map": Case("one_map", T=300, S=300, d=64),
    "left padding": Case(B=2, key_start=(0, 150), T=300, S=300, d=64, norm=True),
    "left padding 128": Case(B=2, key_start=(0, 150), T=300, S=300, d=128, norm=True),
    "key length": Case("v2", B=2, key_length=(130, 400), T=100, S=500, d=128),
    "window": Case(sliding_window=100, T=400, S=400, d=64),
    "packed": Case(cu_seqlens=(0, 1, 130, 300, 400), T=420, S=420, d=64, norm=True),
    "packed rows": Case(B=2, boundaries=((0, 1, 130, 420), (0, 300, 400, 420)), T=420, S=420, d=64, norm=True),
}


@pytest.fixture(autouse=True)
def can_run():
    reason = triton_can_run("cuda")
    if reason is not None:
        pytest.fail(reason)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient_match_float64(name, dtype):
    case = dataclasses.replace(CASES[name], dtype=dtype)
    found = errors(case, diff_attention_triton, "cuda", poison=case.key_length is not None)
    bad = {tensor: error for tensor, error in found.items() if not error <= case.tolerance(TOLERANCE)}
    assert not bad, bad


@pytest.mark.parametrize("length", [1, 63, 65, 127])
@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("map_dim", [64, 128])
def test_odd_lengths_match_float64(length, variant, map_dim):
    case = Case(variant, T=length, S=length, d=map_dim, dtype=torch.bfloat16)
    found = errors(case, diff_attention_triton, "cuda")
    assert max(found.values()) <= TOLERANCE[torch.bfloat16], found


@pytest.mark.parametrize(
    "name", ["v1", "v1 128", "v1 trained", "v2", "v2 128", "v2 trained", "one map", "window", "key length"]
)
@pytest.mark.parametrize("queries", [1, 4])
def test_decode_matches_float64(name, queries):
    case = dataclasses.replace(CASES[name], T=queries, S=3000, dtype=torch.bfloat16)
    tensors = case.tensors("cuda")
    want, sizes = expected(case, tensors, case.gradient("cuda"))
    with torch.no_grad():
        output = diff_attention_triton(
            tensors["query"],
            tensors["key"],
            tensors["value"],
            tensors.get("diff_lambda"),
            norm_weight=tensors.get("norm_weight"),
            **case.options("cuda"),
        )
    assert (output.double() - want["output"]).norm() <= case.tolerance(TOLERANCE) * sizes["output"]


@pytest.mark.parametrize("map_dim", [64, 128])
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_bfloat16_error_is_no_larger_than_that_of_two_calls_and_a_subtraction(variant, map_dim):
    case = Case(variant, B=2, H=4, T=512, S=512, d=map_dim, dtype=torch.bfloat16)

    def two_calls(query, key, value, diff_lambda, **_):
        key, value = (tensor.repeat_interleave(case.H // case.K, dim=1) for tensor in (key, value))
        first, second = (
            torch.nn.functional.scaled_dot_product_attention(query[:, m::2], keys, value, is_causal=True)
            for m, keys in enumerate((key[..., :map_dim], key[..., -map_dim:]))
        )
        diff_lambda = diff_lambda if variant == "v1" else diff_lambda.transpose(1, 2)[..., None]
        return (first - diff_lambda.to(first.dtype) * second).transpose(1, 2)

    ours, theirs = errors(case, diff_attention_triton, "cuda"), errors(case, two_calls, "cuda")
    assert all(ours[name] <= 1.05 * theirs[name] for name in ours), (ours, theirs)


def test_backward_gives_the_same_bits_every_time():
    case = CASES["v1"]
    runs = []
    for _ in range(3):
        tensors = case.tensors("cuda")
        diff_attention_triton(
            tensors["query"],
            tensors["key"],
            tensors["value"],
            tensors["diff_lambda"],
            norm_weight=tensors["norm_weight"],
            **case.options("cuda"),
        ).backward(case.gradient("cuda"))
        runs.append([tensor.grad for tensor in tensors.values()])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_full_graph_compiles(name):
    case = dataclasses.replace(CASES[name], dtype=torch.bfloat16)
    found = errors(case, torch.compile(diff_attention_triton, fullgraph=True), "cuda")
    assert max(found.values()) <= TOLERANCE[case.dtype], found


def test_a_captured_decode_step_follows_the_cache_length():
    case = Case(B=2, H=4, T=1, S=1024, d=64, norm=True, dtype=torch.bfloat16)
    tensors = {name: tensor.detach() for name, tensor in case.tensors("cuda").items()}
    length = torch.tensor([1, 1], dtype=torch.int32, device="cuda")
    options = case.options("cuda") | {"key_length": length, "norm_weight": tensors.pop("norm_weight")}
    diff_attention_triton(*tensors.values(), **options)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = diff_attention_triton(*tensors.values(), **options)
    for lengths in ((1, 1024), (700, 3)):
        length.copy_(torch.tensor(lengths))
        graph.replay()
        torch.testing.assert_close(output, diff_attention_triton(*tensors.values(), **options), rtol=0, atol=0)
        now = dataclasses.replace(case, key_length=lengths)
        want, sizes = expected(now, now.tensors("cuda"), now.gradient("cuda"))
        assert (output.double() - want["output"]).norm() <= case.tolerance(TOLERANCE) * sizes["output"]


def test_offsets_past_two_to_the_31_elements_are_read_right():
    keys = 2**31 // 256 + 4096
    width = 256
    key = torch.zeros(1, 1, keys, width, dtype=torch.bfloat16, device="cuda")
    value = torch.zeros_like(key)
    key[:, :, -300:].normal_()
    value[:, :, -300:].normal_()
    query = torch.randn(1, 2, 64, 128, dtype=torch.bfloat16, device="cuda")
    for queries in (1, 64):  # decode, forward
        now = query[:, :, -queries:]
        options = {"scaling": 128**-0.5, "sliding_window": 200}
        diff_lambda = torch.tensor(0.5, device="cuda")
        output = diff_attention_triton(now, key, value, diff_lambda, **options)
        short = diff_attention_triton(now, key[:, :, -300:], value[:, :, -300:], diff_lambda, **options)
        torch.testing.assert_close(output, short, rtol=1e-2, atol=1e-2)
        assert output.abs().max() > 0.1
