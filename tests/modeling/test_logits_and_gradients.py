"""Whole-model logits and the gradient of every parameter against the definition, for each implementation."""

import pytest
import torch
from diff_llama_by_definition import logits_by_definition
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_eager_attention_forward


# LLaMA's eager attention under a name of its own: asked for by "eager", the model computes its own.
STANDARD = "test_standard_eager"
IMPLEMENTATIONS = ["eager", "sdpa", "diff_chunked", STANDARD]

# Of logits up to about 2. float64: LLaMA rounds norms, rotary angles and softmax to float32. The others: about three
# times what was measured, which grows as the dtype's step, 2^-23, 2^-10 and 2^-7.
LOGITS_ATOL = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2.5e-2, torch.bfloat16: 2e-1}
# Relative to a gradient's largest entry.
GRADIENTS_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}
# lambda's gradient is one sum over all tokens and heads of terms of both signs, which cancel a digit.
LAMBDA_GRADIENTS_FACTOR = 5


@pytest.fixture(autouse=True)
def standard_eager():
    AttentionInterface.register(STANDARD, llama_eager_attention_forward)
    AttentionMaskInterface.register(STANDARD, eager_mask)
    yield
    AttentionInterface._global_mapping.pop(STANDARD)
    AttentionMaskInterface._global_mapping.pop(STANDARD)


# Biases as in Qwen2 and norms as in Qwen3, which no model has both of.
SHAPES = {
    "gqa": {"num_key_value_heads": 2},
    "mha, biases, norms": {"attention_bias": True, "attention_out_bias": False, "use_qk_norm": True},
}


@pytest.fixture(params=SHAPES)
def shape(request):
    return {"num_key_value_heads": 4} | SHAPES[request.param]


@pytest.fixture
def model(tiny_model, shape, heads):
    return tiny_model(**heads, **shape, initializer_range=0.15)


def visible_tokens(batch_size, num_tokens, padding):
    visible = torch.ones(batch_size, num_tokens, dtype=torch.long)
    if padding == "right":
        visible[1, -4:] = 0
    if padding == "left":
        visible[1, :4] = 0
    return visible


def cross_entropy(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())


@pytest.mark.parametrize("dtype", LOGITS_ATOL, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_equal_the_definition(model, random_ids, implementation, dtype):
    model = model.to(dtype)
    model.set_attn_implementation(implementation)
    input_ids = random_ids(2, 13)
    expected = logits_by_definition(model.state_dict(), model.config, input_ids)
    logits = model(input_ids).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=LOGITS_ATOL[dtype])


# LLaMA's eager softmax, which layers with LLaMA's heads call, is float32 throughout: float64's lowest number overflows
# in it where all keys are padding.
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("eager", torch.float64), ("sdpa", torch.float64), ("diff_chunked", torch.float64), (STANDARD, torch.float32)],
)
def test_logits_of_padded_batches_equal_the_definition(model, random_ids, implementation, dtype, padding):
    if implementation == "eager" and model.config.differential_heads is not None:
        dtype = torch.float32
    model = model.to(dtype)
    model.set_attn_implementation(implementation)
    input_ids = random_ids(2, 13)
    visible = visible_tokens(2, 13, padding)
    expected = logits_by_definition(model.state_dict(), model.config, input_ids, visible)
    logits = model(input_ids, attention_mask=visible).logits
    kept = visible.bool()
    torch.testing.assert_close(logits[kept].double(), expected[kept], rtol=0, atol=LOGITS_ATOL[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["none", "left"])
def test_flex_attention_logits_equal_the_definition(tiny_model, heads, random_ids, padding):
    model = tiny_model(**heads, initializer_range=0.15, attn_implementation="flex_attention")
    input_ids = random_ids(2, 13)
    visible = visible_tokens(2, 13, padding)
    expected = logits_by_definition(model.state_dict(), model.config, input_ids, visible)
    with torch.no_grad():  # compiled FlexAttention has no backward on the CPU, and no float64
        logits = model(input_ids, attention_mask=visible).logits
    kept = visible.bool()
    torch.testing.assert_close(logits[kept].double(), expected[kept], rtol=0, atol=LOGITS_ATOL[torch.float32])


@pytest.mark.parametrize("dtype", GRADIENTS_TOLERANCE, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_every_parameter_equal_the_definition(model, random_ids, implementation, dtype):
    model = model.to(dtype)
    model.set_attn_implementation(implementation)
    input_ids = random_ids(2, 13)
    weights = {name: weight.detach().double().requires_grad_() for name, weight in model.named_parameters()}
    cross_entropy(logits_by_definition(weights, model.config, input_ids), input_ids).backward()
    cross_entropy(model(input_ids).logits, input_ids).backward()
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        assert expected.abs().max() > 0, name
        tolerance = GRADIENTS_TOLERANCE[dtype] * expected.abs().max().item()
        if "diff_lambda" in name:
            tolerance *= LAMBDA_GRADIENTS_FACTOR
        torch.testing.assert_close(
            parameter.grad.double(), expected, rtol=0, atol=tolerance, msg=lambda message, n=name: f"{n}: {message}"
        )
