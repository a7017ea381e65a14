"""Quantized checkpoints in the native vLLM model, without vLLM (.ci/serving runs them)."""

import pytest
import torch

from modeling_diff.serving.quantized_weights import with_whole_lambda


PREFIX = "model.layers.0.self_attn"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_projections_around_a_whole_lambda_pass_unchanged(dtype):
    weights = {
        f"{PREFIX}.q_proj.weight": torch.ones(2, 2, dtype=torch.int8),
        f"{PREFIX}.q_proj.weight_scale": torch.ones(2, 1),
        f"{PREFIX}.lambda_proj.weight": torch.ones(1, 2, dtype=dtype),
        f"{PREFIX}.lambda_proj.bias": torch.ones(1, dtype=dtype),
        f"{PREFIX}.diff_lambda.lambda_q1": torch.ones(2),
    }
    assert dict(with_whole_lambda(weights.items())) == weights


# The first tensor of lambda_proj that each format writes: int8, FP8, packed by compressed-tensors, GPTQ and AWQ, NF4.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("weight", torch.int8),
        ("weight", torch.float8_e4m3fn),
        ("weight_packed", torch.int32),
        ("weight_scale", torch.float32),
        ("qweight", torch.int32),
        ("weight.absmax", torch.float32),
    ],
)
def test_a_quantized_lambda_is_refused_in_one_line(name, dtype):
    weights = [(f"{PREFIX}.lambda_proj.{name}", torch.ones(1).to(dtype))]
    with pytest.raises(ValueError, match=rf"self_attn\.lambda_proj\.{name}: lambda_proj is quantized") as error:
        list(with_whole_lambda(weights))
    assert "\n" not in str(error.value)
    assert "ignore=['lm_head', 're:.*lambda_proj']" in str(error.value)
