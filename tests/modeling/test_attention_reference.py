"""The attention function of every path against the papers' definition, in float64, with its gradients."""

from types import SimpleNamespace

import pytest
import torch
from diff_llama_by_definition import attention_by_definition
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_diff import diff_attention_reference
from modeling_diff.diff_attention import eager_attention_forward, place_queries, subtract_maps


# float64 keeps 16 digits; sums over at most 13 keys of values near 1 lose two of them.
FLOAT64_ATOL = 1e-13


def run_reference(query, key, value, diff_lambda, scaling, mask):
    return diff_attention_reference(query, key, value, diff_lambda, scaling, mask)


def run_eager(query, key, value, diff_lambda, scaling, mask):
    return eager_attention_forward(None, query, key, value, mask, scaling, diff_lambda)[0]


def run_standard_call(attention_interface):
    def run(query, key, value, diff_lambda, scaling, mask):
        module = SimpleNamespace(
            num_key_value_groups=query.shape[1] // key.shape[1], is_causal=False, training=False, layer_idx=0
        )
        placed = place_queries(query, value.shape[-1])
        outputs, _ = attention_interface(module, placed, key, value, mask, scaling=scaling, dropout=0.0)
        return subtract_maps(outputs, diff_lambda)

    return run


def flex_interface(module, query, key, value, mask, scaling, **kwargs):
    """torch's uncompiled FlexAttention: transformers compiles it, and compiled it knows no float64 on the CPU."""

    def score_mod(score, batch, head, query_idx, key_idx):
        return score if mask is None else score + mask[batch, 0, query_idx, key_idx]

    output = flex_attention(query, key, value, score_mod=score_mod, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


PATHS = {
    "reference": run_reference,
    "eager": run_eager,
    "standard_sdpa": run_standard_call(sdpa_attention_forward),
}


@pytest.fixture
def attention_inputs(variant):
    def build(num_heads, num_key_value_heads, num_queries, num_keys, masking):
        torch.manual_seed(num_heads + 10 * num_keys)
        options = {"dtype": torch.float64}
        head_dim, map_dim = (4, 2) if variant == "v1" else (2, 2)
        query = torch.randn(2, 2 * num_heads, num_queries, map_dim, **options)
        key = torch.randn(2, num_key_value_heads, num_keys, head_dim, **options)
        value = torch.randn(2, num_key_value_heads, num_keys, head_dim, **options)
        diff_lambda = torch.tensor(0.63, **options) if variant == "v1" else torch.rand(2, num_queries, num_heads)
        mask = None
        if masking != "none":
            hidden = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1)
            hidden = hidden.expand(2, -1, -1).clone()
            if masking == "left_padding":
                hidden[1, :, : num_keys // 3] = True
            mask = torch.zeros(hidden.shape, **options).masked_fill(hidden, torch.finfo(torch.float64).min)[:, None]
        return query, key, value, diff_lambda.double(), map_dim**-0.5, mask

    return build


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("masking", ["none", "causal", "left_padding"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 7), (5, 5), (7, 13)])
@pytest.mark.parametrize(("num_heads", "num_key_value_heads"), [(2, 2), (4, 2), (3, 1)])
def test_attention_equals_the_definition(
    attention_inputs, num_heads, num_key_value_heads, num_queries, num_keys, masking, path
):
    inputs = attention_inputs(num_heads, num_key_value_heads, num_queries, num_keys, masking)
    query, key, value, diff_lambda, scaling, mask = inputs
    expected = attention_by_definition(
        query, key, value, diff_lambda, scaling, None if mask is None else mask.squeeze(1)
    )
    torch.testing.assert_close(PATHS[path](*inputs), expected, rtol=0, atol=FLOAT64_ATOL)


@pytest.mark.parametrize("masking", ["none", "left_padding"])
def test_flex_attention_equals_the_definition(attention_inputs, masking):
    query, key, value, diff_lambda, scaling, mask = attention_inputs(4, 2, 7, 13, masking)
    expected = attention_by_definition(
        query, key, value, diff_lambda, scaling, None if mask is None else mask.squeeze(1)
    )
    output = run_standard_call(flex_interface)(query, key, value, diff_lambda, scaling, mask)
    torch.testing.assert_close(output, expected, rtol=0, atol=FLOAT64_ATOL)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("masking", ["none", "left_padding"])
@pytest.mark.parametrize(("num_heads", "num_key_value_heads"), [(2, 2), (4, 2)])
def test_attention_gradients_equal_finite_differences(attention_inputs, num_heads, num_key_value_heads, masking, path):
    *differentiable, scaling, mask = attention_inputs(num_heads, num_key_value_heads, 3, 5, masking)
    for tensor in differentiable:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *tensors: PATHS[path](*tensors, scaling, mask), differentiable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_computes_narrow_inputs_in_float32(attention_inputs, dtype):
    inputs = attention_inputs(4, 2, 5, 5, "causal")
    query, key, value, diff_lambda, scaling, mask = inputs
    mask = torch.zeros_like(mask).masked_fill(mask < 0, torch.finfo(dtype).min).to(dtype)
    diff_lambda = diff_lambda.float()
    narrow = diff_attention_reference(query.to(dtype), key.to(dtype), value.to(dtype), diff_lambda, scaling, mask)
    rounded = [tensor.to(dtype).double() for tensor in (query, key, value)]
    expected = attention_by_definition(*rounded, diff_lambda.double(), scaling, mask.double().squeeze(1))
    assert narrow.dtype == torch.float32
    # Scores are rounded to the dtype before the softmax: half a unit in the last place of scores up to 4.
    atol = {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(narrow.double(), expected, rtol=0, atol=atol)
