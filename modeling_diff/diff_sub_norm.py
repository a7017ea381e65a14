"""The norm over a head's output in V1: RMSNorm (arXiv:2410.05258, eq. 3) that saves little for its gradient."""

import torch
from torch import nn


def inverse_root_mean_square(hidden_states: torch.Tensor, eps: float) -> torch.Tensor:
    """Computes 1 / sqrt(mean of squares + eps) over the last dimension, which is kept; float32 or wider."""
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    norms = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=wide)
    return (norms.square() / hidden_states.shape[-1] + eps).rsqrt()


def normalize_heads(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Applies RMSNorm in the heads' dtype, whatever the weight's, in fewer passes than torch's on a CPU."""
    normalized = hidden_states * inverse_root_mean_square(hidden_states, eps)
    return normalized.to(hidden_states.dtype) * weight  # a new tensor: torch 2.11 compiles others into wrong gradients


class NormalizeHeads(torch.autograd.Function):
    """Applies `normalize_heads` and saves only its input for the gradient, not the normalized heads as torch does."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden_states, weight, eps):
        return normalize_heads(hidden_states, weight, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden_states, weight, ctx.eps = inputs
        ctx.save_for_backward(hidden_states, weight)

    @staticmethod
    def backward(ctx, grad_output):
        hidden_states, weight = ctx.saved_tensors
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        inverse_rms = inverse_root_mean_square(wide, ctx.eps)
        normalized = wide * inverse_rms
        grad_normalized = grad_output * weight
        along = (grad_normalized * normalized).mean(-1, keepdim=True)
        grad_states = (grad_normalized - normalized * along) * inverse_rms
        grad_weight = (grad_output * normalized).reshape(-1, len(weight)).sum(0)
        return grad_states.to(hidden_states.dtype), grad_weight.to(weight.dtype), None


class SubNorm(nn.RMSNorm):
    """RMSNorm over a head's output in the dtype of its input, float32 or wider, whatever the weight's dtype."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():  # in a decode step, a Function takes longer than the norm
            return normalize_heads(hidden_states, self.weight, self.eps)
        return NormalizeHeads.apply(hidden_states, self.weight, self.eps)
