"""The norm over heads' outputs: values and gradients against its definition in float64, and what it keeps for them."""

import pytest
import torch

from modeling_diff.diff_sub_norm import NormalizeHeads, SubNorm


EPS = 0.3


def random_heads(dtype=torch.float64, weight_dtype=None):
    """Heads (B, T, H, D) and a weight (D)."""
    torch.manual_seed(0)
    heads = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    return heads.to(dtype).requires_grad_(), weight.to(weight_dtype or dtype).requires_grad_()


def norm_by_definition(heads, weight):
    return heads / torch.sqrt(heads.pow(2).mean(-1, keepdim=True) + EPS) * weight


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-13),  # sums of up to 30 terms
        (torch.float32, torch.float32, 1e-5),  # the same with 24 bits
        (torch.float32, torch.bfloat16, 6e-2),  # the weight's gradient of up to 15 is rounded to 8 bits
        (torch.bfloat16, torch.bfloat16, 6e-2),
        (torch.float16, torch.float16, 1e-2),
    ],
    ids=str,
)
def test_sub_norm_gives_values_and_gradients_of_its_definition(dtype, weight_dtype, tolerance):
    inputs = random_heads(dtype, weight_dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output = NormalizeHeads.apply(*inputs, EPS)
    expected = norm_by_definition(*exact)
    grad_output = torch.randn_like(output)
    gradients = torch.autograd.grad(output, inputs, grad_output)
    expected_gradients = torch.autograd.grad(expected, exact, grad_output.double())
    assert output.dtype == dtype
    assert [gradient.dtype for gradient in gradients] == [dtype, weight_dtype]
    for ours, theirs in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)


def test_sub_norm_passes_gradcheck_twice():
    inputs = random_heads()
    assert torch.autograd.gradcheck(NormalizeHeads.apply, (*inputs, EPS))
    assert torch.autograd.gradgradcheck(NormalizeHeads.apply, (*inputs, EPS))


def test_sub_norm_keeps_its_input_and_nothing_of_its_size_beside():
    heads, _ = random_heads()
    norm = SubNorm(8, eps=EPS, dtype=torch.float64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(heads)
    assert {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() >= heads.numel()} == {
        heads.untyped_storage().data_ptr()
    }


def test_kernels_leave_a_wrapped_norm_to_its_module(tiny_model):
    """Tensor parallelism and offloading wrap `forward`; a kernel that took the weight would pass them by."""
    attention = tiny_model("v1").model.layers[0].self_attn
    assert attention.fusable_norm()["norm_weight"] is attention.sub_norm.weight
    forward = attention.sub_norm.forward
    attention.sub_norm.forward = lambda hidden_states: forward(hidden_states)
    assert attention.fusable_norm() == {}
