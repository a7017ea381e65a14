"""
Whether the fused kernels are to be trusted here: once a process, they are compared with the definition.

Triton compiles them on the user's machine, for GPUs and by versions that no test has seen. A call by default must not
depend on that, so `diff_auto` asks first; who asks for `diff_triton` by name gets it.
"""

import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from .diff_attention import diff_attention_reference
from .diff_attention_triton import diff_attention_triton, triton_can_run


logger = logging.getLogger(__name__)

# Relative to the norm of what is compared. bfloat16 keeps 8 bits of operands and probabilities, for which the tests
# allow 0.015; one wrong row of the 272 is worth 0.06.
TOLERANCE = 0.05
NUM_TOKENS = 272  # several tiles of any kernel, the last one in part


@torch.compiler.assume_constant_result
def kernels_agree(
    device: torch.device, dtype: torch.dtype, map_dim: int, key_dim: int, head_dim: int, num_maps: int, training: bool
) -> bool:
    """
    Whether the kernels compile for `device` and agree with the definition: output and decoding, or gradients.

    The first call compiles them, which takes seconds. A warning says why not, but for where triton cannot run at all.
    """
    return _kernels_agree(device, dtype, map_dim, key_dim, head_dim, num_maps, training)


@functools.lru_cache
def _kernels_agree(device, dtype, map_dim, key_dim, head_dim, num_maps, training):
    if triton_can_run(device) is not None:
        return False
    # In a thread of its own there is no autocast, inference mode, or hook of activation checkpointing.
    with ThreadPoolExecutor(1) as thread:
        disagreement = thread.submit(
            _disagreement, device, dtype, map_dim, key_dim, head_dim, num_maps, training
        ).result()
    if disagreement is not None:
        logger.warning(
            "The fused kernels are not used for attention %d wide in %s on %s, but the one standard call: %s. "
            'attn_implementation="sdpa" asks for it without this check.', map_dim, dtype, device, disagreement
        )  # fmt: skip
    return disagreement is None


def _disagreement(device, dtype, map_dim, key_dim, head_dim, num_maps, training):
    """What is wrong with the kernels in words, or None."""
    inputs = _inputs(device, dtype, map_dim, key_dim, head_dim, num_maps)
    grad_output = _normal(device, dtype, 2, NUM_TOKENS, 4, head_dim, seed=1)
    in_float64 = {name: tensor.double() for name, tensor in inputs.items()}
    expected = _outputs(_defined, in_float64, grad_output.double(), training)
    try:
        ours = _outputs(_fused, inputs, grad_output, training)
    except Exception as error:  # whatever triton, its compiler or the driver may raise
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    for name, tensor in expected.items():
        error = ((ours[name].double() - tensor).norm() / tensor.norm()).item()
        if not error <= TOLERANCE:  # NaN, too
            return f"their {name} is off by {error:.3g} of its size"
    return None


def _normal(device, dtype, *shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)


def _inputs(device, dtype, map_dim, key_dim, head_dim, num_maps):
    """
    Two rows, four heads, two key-value heads: no size is 1, which triton would compile for.

    Scores as a trained model's: about 50, and a first key that is attended to. A softmax that overflows shows by them.
    """
    wide = torch.float32  # of lambda and the norm's weight
    inputs = {
        "query": _normal(device, dtype, 2, 4 * num_maps, NUM_TOKENS, map_dim, seed=2),
        "key": _normal(device, dtype, 2, 2, NUM_TOKENS, key_dim, seed=3),
        "value": _normal(device, dtype, 2, 2, NUM_TOKENS, head_dim, seed=4),
    }
    shared = (50 * map_dim**0.5) ** 0.5
    inputs["query"][..., 0] = shared
    inputs["key"][..., ::map_dim] = shared
    inputs["key"][:, :, 0, ::map_dim] *= 1.08
    if num_maps == 2 and key_dim == map_dim:
        inputs["diff_lambda"] = _normal(device, wide, 2, NUM_TOKENS, 4, seed=5).sigmoid()
    elif num_maps == 2:
        inputs |= {
            "diff_lambda": torch.tensor(0.5, dtype=wide, device=device),
            "norm_weight": _normal(device, wide, head_dim, seed=6),
        }
    return inputs


def _outputs(attention, inputs, grad_output, training):
    """What is compared, by name. Not the gradient of V1's one lambda, a sum that cancels over all that is compared."""
    leaves = {name: tensor.detach().requires_grad_(training) for name, tensor in inputs.items()}
    output = attention(**leaves)
    if training:
        output.backward(grad_output)
        names = [name for name, tensor in leaves.items() if tensor.dim() > 0]
        return {"output": output.detach()} | {f"gradient of {name}": leaves[name].grad for name in names}
    last = {name: tensor[:, :, -1:] if name == "query" else tensor for name, tensor in inputs.items()}
    if inputs.get("diff_lambda", grad_output.new_empty(())).dim() > 0:
        last["diff_lambda"] = inputs["diff_lambda"][:, -1:]
    return {"output": output, "step of decoding": attention(**last)}


def _fused(query, key, value, diff_lambda=None, norm_weight=None):
    scaling = query.shape[-1] ** -0.5
    return diff_attention_triton(
        query, key, value, diff_lambda, scaling=scaling, norm_weight=norm_weight, norm_eps=1e-5, norm_scale=0.8
    )


def _defined(query, key, value, diff_lambda=None, norm_weight=None):
    num_queries, num_keys = query.shape[2], key.shape[2]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    if diff_lambda is None:
        query, diff_lambda = query.repeat_interleave(2, dim=1), query.new_zeros(())
    output = diff_attention_reference(query, key, value, diff_lambda, query.shape[-1] ** -0.5, visible[None, None])
    return (
        output if norm_weight is None else 0.8 * nn.functional.rms_norm(output, norm_weight.shape, norm_weight, 1e-5)
    )
