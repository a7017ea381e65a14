"""The query-chunked path: outputs and every gradient against float64 definitions, its masks, rounding and memory."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diff_llama_by_definition import attention_by_definition
from torch import nn

from modeling_diff import diff_attention_chunked, diff_attention_chunked_blocks, diff_attention_reference
from modeling_diff.diff_attention_chunked import FEW_QUERIES, chunked_attention_forward
from modeling_diff.diff_attention_chunked_blocks import BLOCK_ROWS, split_keys


CAUSAL = SimpleNamespace(is_causal=True)


def random_inputs(
    variant, num_key_value_heads, groups, num_queries, num_keys, dtype=torch.float64, map_dim=6, batch_size=2
):
    """query (B, 2H, T, d), key and value (B, K, S, D), lambda, in the memory order in which the model makes them."""
    torch.manual_seed(num_queries + num_keys)
    num_heads = num_key_value_heads * groups
    head_dim = 2 * map_dim if variant == "v1" else map_dim
    query = torch.randn(batch_size, num_queries, 2 * num_heads, map_dim, dtype=torch.float64).transpose(1, 2)
    key = torch.randn(batch_size, num_keys, num_key_value_heads, head_dim, dtype=torch.float64).transpose(1, 2)
    value = torch.randn(batch_size, num_keys, num_key_value_heads, head_dim, dtype=torch.float64).transpose(1, 2)
    diff_lambda = torch.rand(() if variant == "v1" else (batch_size, num_queries, num_heads), dtype=torch.float64)
    return [tensor.to(dtype).requires_grad_() for tensor in (query, key, value, diff_lambda)]


def visible_keys(kind, num_queries, num_keys, batch_size=2):
    """Boolean (B, 1, T, S): causal to the bottom right, the second row also padded on the left."""
    visible = torch.ones(batch_size, 1, num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    if kind == "padded" and num_queries > 1:
        visible[1, :, :, :3] = False
        visible[1, :, :3, 0] = True  # rows of padding see something, so that float64 has a value to compare
    return visible


def as_additive(visible):
    """The same mask to add to scores."""
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, float("-inf"))


def assert_gives_the_reference(inputs, mask, additive):
    """Output and every gradient under `mask`, against the reference under the same mask as `additive`."""
    expected = diff_attention_reference(*inputs, scaling=0.4, attention_mask=additive)
    grad_output = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, inputs, grad_output)
    query, key, value, diff_lambda = inputs
    output, maps = chunked_attention_forward(CAUSAL, query, key, value, mask, 0.4, diff_lambda)
    gradients = torch.autograd.grad(output, inputs, grad_output)

    assert maps is None
    # float64: sums of up to 257 terms near 1 lose two of 16 digits.
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    for name, ours, theirs in zip(("query", "key", "value", "lambda"), gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mask_kind", ["causal", "padded", "additive"])
@pytest.mark.parametrize(
    ("num_queries", "num_keys"),
    [(1, 1), (1, 37), (FEW_QUERIES, 21), (FEW_QUERIES + 1, 30), (63, 63), (2 * BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 1)],
)
@pytest.mark.parametrize(("num_key_value_heads", "groups"), [(2, 1), (1, 3)])
def test_chunked_gives_outputs_and_gradients_of_the_reference(
    variant, num_key_value_heads, groups, num_queries, num_keys, mask_kind
):
    inputs = random_inputs(variant, num_key_value_heads, groups, num_queries, num_keys)
    visible = visible_keys("padded" if mask_kind == "padded" else "causal", num_queries, num_keys)
    additive = as_additive(visible)
    needs_mask = mask_kind != "causal" or num_queries not in (1, num_keys)
    mask = additive if mask_kind == "additive" else visible if needs_mask else None

    assert_gives_the_reference(inputs, mask, additive)


@pytest.mark.parametrize("mask_kind", ["causal", "padded"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block_scores", [1, 400, 700, 1500], ids=lambda scores: f"{scores} scores a block")
def test_chunked_blocks_of_any_size_give_the_same(variant, block_scores, threads, mask_kind, monkeypatch):
    """
    Three rows of three key-value heads, of which each has 2 x 2 queries x 2 maps x 20 keys = 160 scores in the largest
    blocks: blocks of one head, of two and a rest, of one row, of several and a rest.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    visible = visible_keys(mask_kind, 20, 20, batch_size=3)
    additive = as_additive(visible)
    monkeypatch.setattr(diff_attention_chunked_blocks, "BLOCK_ROWS", 4)
    monkeypatch.setattr(diff_attention_chunked_blocks, "BLOCK_SCORES", block_scores)
    mask = visible if mask_kind == "padded" else None
    assert_gives_the_reference(random_inputs(variant, 3, 2, 20, 20, batch_size=3), mask, additive)


def test_chunked_blocks_are_larger_for_more_threads_and_for_long_texts(monkeypatch):
    """Every thread works on heads of its own, as many as one thread alone has at once; and rows double."""

    def shapes_of_blocks():
        query, key, value, diff_lambda = random_inputs("v1", 4, 2, 64, 64)
        blocks = diff_attention_chunked_blocks.Blocks(query, key, value, diff_lambda, None, 0.4, True)
        return {(block.heads.stop - block.heads.start, block.queries.stop - block.queries.start) for block in blocks}

    monkeypatch.setattr(diff_attention_chunked_blocks, "BLOCK_SCORES", 1)
    monkeypatch.setattr(diff_attention_chunked_blocks, "BLOCK_ROWS", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert shapes_of_blocks() == {(1, 8)}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert shapes_of_blocks() == {(2, 8)}
    monkeypatch.setattr(diff_attention_chunked_blocks, "LONG_TEXT", 64)
    assert shapes_of_blocks() == {(2, 16)}


def test_chunked_attends_everywhere_where_the_module_is_not_causal(variant):
    query, key, value, diff_lambda = random_inputs(variant, 2, 2, 11, 11)
    output, _ = chunked_attention_forward(SimpleNamespace(is_causal=False), query, key, value, None, 0.4, diff_lambda)
    expected = attention_by_definition(query, key, value, diff_lambda, 0.4)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_chunked_skips_an_empty_static_cache_beyond_the_prompt(variant):
    """A prompt in a longer static cache comes without a mask: query t sees keys 0 to t, not the zeros after."""
    query, key, value, diff_lambda = random_inputs(variant, 1, 2, 20, 50)
    output, _ = chunked_attention_forward(CAUSAL, query, key, value, None, 0.4, diff_lambda)
    hidden = torch.ones(20, 50, dtype=torch.bool).triu(1)
    additive = torch.zeros(2, 20, 50, dtype=torch.float64).masked_fill(hidden, -1e30)
    expected = attention_by_definition(query, key, value, diff_lambda, 0.4, additive)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [5, 9])
def test_chunked_gradients_pass_gradcheck(variant, length):
    inputs = random_inputs(variant, 1, 2, length, length, map_dim=4)

    def attend(query, key, value, diff_lambda):
        return chunked_attention_forward(CAUSAL, query, key, value, None, 0.5, diff_lambda)[0]

    assert torch.autograd.gradcheck(attend, inputs)


def test_chunked_refuses_second_derivatives(variant):
    inputs = random_inputs(variant, 1, 2, FEW_QUERIES + 1, FEW_QUERIES + 1)
    output, _ = chunked_attention_forward(CAUSAL, *inputs[:3], None, 0.5, inputs[3])
    gradients = torch.autograd.grad(output.sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        sum(gradient.square().sum() for gradient in gradients).backward()


@pytest.mark.parametrize("num_queries", [FEW_QUERIES - 2, FEW_QUERIES + 3])
@pytest.mark.parametrize("additive", [True, False], ids=["additive", "boolean"])
@pytest.mark.parametrize(
    "shape", [(2, 1, 1), (1, 1, None), (2, 12, None), (1, 12, 1)], ids=["a row", "a batch", "each map", "a map's row"]
)
def test_chunked_reads_masks_of_every_shape_that_broadcasts(variant, shape, additive, num_queries):
    inputs = random_inputs(variant, 2, 3, num_queries, 20)
    mask = torch.randn(*shape[:2], shape[2] or num_queries, 20, dtype=torch.float64)
    if not additive:
        mask = mask > -0.5
        mask[..., 7] = True  # no row sees nothing
    added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf")) if not additive else mask
    assert_gives_the_reference(inputs, mask, added)


@pytest.mark.parametrize("num_queries", [FEW_QUERIES - 2, FEW_QUERIES + 3])
def test_chunked_gives_a_learned_mask_its_gradient(variant, num_queries):
    inputs = random_inputs(variant, 2, 3, num_queries, 20)
    mask = torch.randn(1, 12, num_queries, 20, dtype=torch.float64, requires_grad=True)
    query, key, value, diff_lambda = inputs
    expected = diff_attention_reference(*inputs, scaling=0.4, attention_mask=mask)
    output, _ = chunked_attention_forward(CAUSAL, query, key, value, mask, 0.4, diff_lambda)
    grad_output = torch.randn_like(output)
    ours, theirs = (torch.autograd.grad(tensor, mask, grad_output)[0] for tensor in (output, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_chunked_refuses_a_mask_of_integers(variant):
    query, key, value, diff_lambda = random_inputs(variant, 1, 2, 12, 12)
    mask = torch.ones(2, 1, 12, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"torch\.int64: it must be boolean"):
        chunked_attention_forward(CAUSAL, query, key, value, mask, 0.4, diff_lambda)


@pytest.mark.parametrize("additive", [True, False], ids=["additive", "boolean"])
@pytest.mark.parametrize("length", [FEW_QUERIES, FEW_QUERIES + 4])
def test_chunked_leaves_padding_rows_finite(variant, length, additive):
    query, key, value, diff_lambda = random_inputs(variant, 1, 1, length, length, dtype=torch.float32)
    visible = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    visible[1, :, :, :4] = False  # rows 0 to 3 see nothing at all
    mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf")) if additive else visible
    output, _ = chunked_attention_forward(CAUSAL, query, key, value, mask, 0.5, diff_lambda)
    gradients = torch.autograd.grad(output.sum(), (query, key, value, diff_lambda))
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))


@pytest.mark.parametrize("mask_kind", ["causal", "padded"])
@pytest.mark.parametrize("length", [FEW_QUERIES, FEW_QUERIES + 4])
def test_chunked_hides_scores_that_overflow(variant, length, mask_kind):
    """Infinite scores of the last key reach the last query alone, who sees it; added to, they would stay infinite."""
    query, key, value, diff_lambda = random_inputs(variant, 2, 1, length, length, dtype=torch.float32)
    mask = visible_keys("padded", length, length) if mask_kind == "padded" else None
    outputs = []
    for last in (1.0, torch.finfo(torch.float32).max):
        with torch.no_grad():
            query.abs_()  # no sum is of infinities of both signs
            key[:, :, -1] = last
        outputs.append(chunked_attention_forward(CAUSAL, query, key, value, mask, 4.0, diff_lambda)[0])
    usual, overflown = outputs
    assert overflown[:, -1].isnan().any()
    assert torch.equal(overflown[:, :-1], usual[:, :-1])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 2e-6),  # 24 bits, sums of 150 terms
        (torch.bfloat16, 3e-2),  # scores, weights and outputs are each rounded to 8 bits: 3 x 2^-9 of values near 2
        (torch.float16, 4e-3),  # the same with 11 bits
    ],
    ids=str,
)
def test_chunked_rounds_as_its_dtype_allows(variant, dtype, tolerance):
    inputs = [tensor.to(dtype) for tensor in random_inputs(variant, 2, 2, 150, 150)]
    inputs[3] = inputs[3].float()  # lambda is float32 under any dtype
    query, key, value, diff_lambda = inputs
    output, _ = chunked_attention_forward(CAUSAL, query, key, value, None, 0.4, diff_lambda)
    visible = visible_keys("causal", 150, 150)
    additive = as_additive(visible)
    expected = diff_attention_reference(*(tensor.double() for tensor in inputs), 0.4, additive)
    assert output.dtype == dtype
    assert (output.double() - expected).abs().max() < tolerance


def trained_inputs(variant, dtype, attended, first_keys):
    """
    As `random_inputs`, but each query scores about 50, as in a trained LLaMA, with three keys: those from the first of
    its sequence on, of which `first_keys` lists row and position, or its own and the two before.
    """
    query, key, value, diff_lambda = (tensor.detach() for tensor in random_inputs(variant, 2, 2, 300, 300, map_dim=64))
    if attended == "near":
        keys = split_keys(key, 64).unsqueeze(2).expand(-1, -1, 2, 2, -1, -1).flatten(1, 3)  # (B, 2H, S, d)
        query += 6 * sum(keys.roll(past, dims=2) for past in range(3))
    else:
        query[..., 0] = key[..., ::64] = 0
        for row, position in first_keys:
            query[row, :, position:, 0] = 20
            key[row, :, position : position + 3, ::64] = 20
    return [tensor.to(dtype) for tensor in (query, key, value)] + [diff_lambda.float()]


def two_calls(query, key, value, diff_lambda, mask):
    """One flash call per map and a subtraction: (B, T, H, D)."""
    map_dim = query.shape[-1]
    keys = key.repeat_interleave(2, 1)
    first, second = (
        nn.functional.scaled_dot_product_attention(
            query[:, number::2], keys[..., start:][..., :map_dim], value.repeat_interleave(2, 1), mask
        ).transpose(1, 2)
        for number, start in enumerate((0, key.shape[-1] - map_dim))
    )
    return (first - (diff_lambda if diff_lambda.dim() == 0 else diff_lambda.unsqueeze(-1)) * second).to(query.dtype)


@pytest.mark.parametrize("mask_kind", ["causal", "padded", "packed", "additive", "static cache"])
@pytest.mark.parametrize("attended", ["first", "near"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_large_scores_keep_the_precision_of_two_flash_calls(variant, dtype, attended, mask_kind):
    """A score of 50 alone is off by up to 0.13 in bfloat16; less the largest that a query has, it is not."""
    first_keys = [(0, 0), (1, 40 if mask_kind == "padded" else 0)]
    if mask_kind == "packed":
        first_keys += [(0, 150), (1, 150)]
    inputs = trained_inputs(variant, dtype, attended, first_keys)
    visible = torch.ones(2, 1, 300, 300, dtype=torch.bool).tril()
    if mask_kind == "padded":
        visible[1, :, :, :40] = False
        visible[1, :, :40, 0] = True
    elif mask_kind == "packed":
        visible[..., 150:, :150] = False
    elif mask_kind == "static cache":  # the queries stand before the end of it
        inputs[0] = inputs[0][:, :, 50:250]
        inputs[3] = inputs[3] if variant == "v1" else inputs[3][:, 50:250]
        visible = visible[..., 50:250, :]
    additive = as_additive(visible)
    grad_output = torch.randn(2, inputs[0].shape[2], 4, inputs[2].shape[-1])

    def output_and_gradients(attention, wide=False):
        leaves = [(tensor.double() if wide else tensor.clone()).requires_grad_() for tensor in inputs]
        output = attention(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))

    def chunked(query, key, value, diff_lambda):
        mask = {"causal": None, "additive": additive.to(dtype)}.get(mask_kind, visible)
        return chunked_attention_forward(CAUSAL, query, key, value, mask, 0.125, diff_lambda)[0]

    def errors(attention):
        pairs = zip(output_and_gradients(attention), expected, strict=True)
        return [((found - right).norm() / right.norm()).item() for found, right in pairs]

    expected = output_and_gradients(lambda *leaves: diff_attention_reference(*leaves, 0.125, additive), wide=True)
    of_output, *of_gradients = errors(chunked)
    of_two_calls, *_ = errors(lambda *leaves: two_calls(*leaves, visible))
    assert of_output < 2 * of_two_calls  # 7 to 20 times as much with scores rounded as they are
    assert max(of_gradients) < 2 * torch.finfo(dtype).eps  # 5 to 27


def test_in_16_bits_there_may_be_more_queries_than_keys(variant):
    inputs = [tensor.to(torch.bfloat16) for tensor in random_inputs(variant, 2, 2, 30, 20)]
    expected = diff_attention_reference(*(tensor.double() for tensor in inputs), 0.4)
    query, key, value, diff_lambda = inputs
    visible = torch.ones(2, 1, 30, 20, dtype=torch.bool)
    output, _ = chunked_attention_forward(CAUSAL, query, key, value, visible, 0.4, diff_lambda)
    assert (output.double() - expected).abs().max() < 3e-2  # as in test_chunked_rounds_as_its_dtype_allows


def test_chunked_under_autocast_computes_in_its_dtype(variant):
    query, key, value, diff_lambda = random_inputs(variant, 2, 2, 40, 40, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = chunked_attention_forward(CAUSAL, query, key, value, None, 0.4, diff_lambda)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert all(tensor.grad.dtype == torch.float32 for tensor in (query, key, value, diff_lambda))


PEAK_MEMORY = """
import resource, sys, torch
from types import SimpleNamespace
from modeling_diff.diff_attention_chunked import chunked_attention_forward
length = int(sys.argv[1])
inputs = [torch.randn(1, heads, length, dim, requires_grad=True) for heads, dim in ((4, 16), (2, 32), (2, 32))]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(2):
    output, _ = chunked_attention_forward(SimpleNamespace(is_causal=True), *inputs, None, 0.25, torch.tensor(0.3))
    output.sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_chunked_training_memory_grows_with_the_length_and_not_its_square():
    """Four maps of 8192 x 8192 scores would be 1 GiB in float32; inputs, outputs and gradients are 16 MiB."""
    result = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, "8192"], capture_output=True, text=True, check=True, timeout=300
    )
    assert int(result.stdout) < 200 * 2**20


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_compilers_are_told_what_the_operators_give(variant):
    """Sizes and strides: inductor asserts both, so that a training step would end otherwise."""
    inputs = [tensor.detach() for tensor in random_inputs(variant, 2, 2, 9, 9)]
    grad_output = torch.randn(2, 9, 4, inputs[2].shape[-1], dtype=torch.float64)
    operators = (diff_attention_chunked._forward_op, ()), (diff_attention_chunked._backward_op, (grad_output,))
    for operator, given in operators:
        torch.library.opcheck(operator, (*given, *inputs, None, 0.4, True), test_utils="test_faketensor")
