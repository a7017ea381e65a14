"""
Self-check of the fused kernels: once per process, they are compared with the definition.

Triton compiles them on the user's machine, for GPUs and by versions that no test has seen. The default path must not
depend on that, so `diff_auto` checks first; `diff_triton` asked for by name is used unchecked.

B batch, T queries, S keys, H heads, K key-value heads, d map_dim, D head_dim.
"""

import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from .diff_attention import diff_attention_reference
from .diff_attention_triton import diff_attention_triton, triton_can_run


logger = logging.getLogger(__name__)

# Relative to the norm of what is compared. bfloat16 keeps 8 bits of operands and probabilities, for which the tests
# allow 0.015; one wrong query of the 272 is worth 0.06.
TOLERANCE = 0.05
NUM_TOKENS = 272  # several tiles of any kernel, the last one in part


@torch.compiler.assume_constant_result
def kernels_agree(
    device: torch.device, dtype: torch.dtype, map_dim: int, key_dim: int, head_dim: int, num_maps: int, training: bool
) -> bool:
    """
    Compares the kernels with the definition: output and a decode step, or output and gradients.

    The first call compiles them, which takes seconds. A warning gives the reason if they are not used, except where
    triton cannot run at all.

    Args:
        device: Where the kernels are to run.
        dtype: Dtype of queries, keys and values.
        map_dim: Width of queries.
        key_dim: Width of keys.
        head_dim: Width of values.
        num_maps: Maps per head, 2 where the layer is differential.
        training: Whether gradients are needed.

    Returns:
        Whether they compile and agree.
    """
    case = _Case(device, dtype, map_dim, key_dim=key_dim, head_dim=head_dim, num_maps=num_maps, training=training)
    return _kernels_agree(case)


@dataclass(frozen=True)
class _Case:
    device: torch.device
    dtype: torch.dtype
    map_dim: int
    key_dim: int
    head_dim: int
    num_maps: int
    training: bool

    def normal(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Draws from the standard normal distribution, equally on every device."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(self.device, dtype or self.dtype)


@functools.lru_cache
def _kernels_agree(case):
    if triton_can_run(case.device) is not None:
        return False
    # In a thread of its own there is no autocast, inference mode, or hook of activation checkpointing.
    with ThreadPoolExecutor(1) as thread:
        disagreement = thread.submit(_disagreement, case).result()
    if disagreement is not None:
        logger.warning(
            f"The fused kernels are not used for attention {case.map_dim} wide in {case.dtype} on {case.device}, but "
            f'the one standard call: {disagreement}. attn_implementation="sdpa" asks for it without this check.'
        )
    return disagreement is None


def _disagreement(case):
    """Returns what is wrong with the kernels in words, or None."""
    inputs = _inputs(case)
    grad_output = case.normal(2, NUM_TOKENS, 4, case.head_dim, seed=1)
    in_float64 = {name: tensor.double() for name, tensor in inputs.items()}
    expected = _outputs(_defined, in_float64, grad_output.double(), training=case.training)
    try:
        ours = _outputs(_fused, inputs, grad_output, training=case.training)
    except Exception as error:  # whatever triton, its compiler or the driver may raise
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    for name, tensor in expected.items():
        error = ((ours[name].double() - tensor).norm() / tensor.norm()).item()
        if not error <= TOLERANCE:  # NaN, too
            return f"their {name} is off by {error:.3g} of its size"
    return None


def _inputs(case):
    """
    Draws inputs of two sequences, four heads and two key-value heads: no size is 1, for which triton specializes.

    Scores are about 50 and the first key is attended to, as in a trained model, so that an overflowing softmax shows.
    """
    inputs = {
        "query": case.normal(2, 4 * case.num_maps, NUM_TOKENS, case.map_dim, seed=2),
        "key": case.normal(2, 2, NUM_TOKENS, case.key_dim, seed=3),
        "value": case.normal(2, 2, NUM_TOKENS, case.head_dim, seed=4),
    }
    shared = (50 * case.map_dim**0.5) ** 0.5
    inputs["query"][..., 0] = shared
    inputs["key"][..., :: case.map_dim] = shared
    inputs["key"][:, :, 0, :: case.map_dim] *= 1.08
    if case.num_maps == 2 and case.key_dim == case.map_dim:
        inputs["diff_lambda"] = case.normal(2, NUM_TOKENS, 4, seed=5, dtype=torch.float32).sigmoid()
    elif case.num_maps == 2:
        inputs["diff_lambda"] = torch.tensor(0.5, dtype=torch.float32, device=case.device)
        inputs["norm_weight"] = case.normal(case.head_dim, seed=6, dtype=torch.float32)
    return inputs


def _outputs(attention, inputs, grad_output, *, training):
    """Returns what is compared, by name. The gradient of V1's one lambda is not: it is a sum that cancels."""
    leaves = {name: tensor.detach().requires_grad_(training) for name, tensor in inputs.items()}
    output = attention(**leaves)
    if training:
        output.backward(grad_output)
        names = [name for name, tensor in leaves.items() if tensor.dim() > 0]
        return {"output": output.detach()} | {f"gradient of {name}": leaves[name].grad for name in names}
    last = {name: tensor[:, :, -1:] if name == "query" else tensor for name, tensor in inputs.items()}
    if inputs.get("diff_lambda", grad_output.new_empty(())).dim() > 0:
        last["diff_lambda"] = inputs["diff_lambda"][:, -1:]
    return {"output": output, "decode step": attention(**last)}


def _fused(query, key, value, diff_lambda=None, norm_weight=None):
    scaling = query.shape[-1] ** -0.5
    return diff_attention_triton(
        query,
        key,
        value,
        diff_lambda=diff_lambda,
        scaling=scaling,
        norm_weight=norm_weight,
        norm_eps=1e-5,
        norm_scale=0.8,
    )


def _defined(query, key, value, diff_lambda=None, norm_weight=None):
    num_queries = query.shape[2]
    num_keys = key.shape[2]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    if diff_lambda is None:
        query = query.repeat_interleave(2, dim=1)
        diff_lambda = query.new_zeros(())
    output = diff_attention_reference(
        query, key, value, diff_lambda=diff_lambda, scaling=query.shape[-1] ** -0.5, attention_mask=visible[None, None]
    )
    if norm_weight is None:
        return output
    return 0.8 * nn.functional.rms_norm(output, norm_weight.shape, weight=norm_weight, eps=1e-5)
