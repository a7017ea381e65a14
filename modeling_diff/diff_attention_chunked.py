"""
Differential attention in blocks of queries: exact, from plain matrix products, and memory linear in the length.

B batch, T queries, S keys, H heads, K key-value heads, G = H / K heads per key-value head, d map_dim, D head_dim.
A block has N key-value heads, of one or more sequences, and R queries of each, those of G heads.

For one block both maps' scores are computed against every key that the block can see, softmaxed in float32,
subtracted, and multiplied with V once: as many multiplications as LLaMA's two heads, and no score outlives its block.
Training keeps only its inputs and computes each block's maps again for the gradient.
"""

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .diff_attention import (
    attends_causally,
    cast_for_autocast,
    operator_namespace,
    place_queries,
    subtract_maps,
    warn_without_maps,
)
from .diff_attention_chunked_blocks import Blocks, mask_scores, split_keys


# Up to here keys are read from the cache unchanged, by queries padded with zeros; beyond, splitting them is cheaper.
FEW_QUERIES = 8
# Operators are named after the module: a bundle copy of this file and the package can then live in one process.
NAMESPACE = operator_namespace("diff_chunked", __name__)


def chunked_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    diff_lambda: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Computes O = (A1 - lambda A2) V before any norm, for AttentionInterface.

    In half precision the scores are rounded before the softmax, minus about the largest of their query.

    Args:
        module: The attention module.
        query: (B, 2H, T, d).
        key: (B, K, S, D).
        value: (B, K, S, D).
        attention_mask: As for `sdpa`, boolean or additive: (B, 1, T, S), or (B, 2H, T, S) with one per map. None for
            query t attending to keys 0 to t.
        scaling: Factor of the scores.
        diff_lambda: lambda, () in V1 or (B, T, H) in V2. None for plain attention, in layers that kept LLaMA's.
        is_causal: Defaults to the module's.
        kwargs: What other implementations read.

    Returns:
        Outputs of heads, (B, T, H, D), and None for attention weights.

    Raises:
        ValueError: The mask is neither boolean nor of floating-point numbers.
    """
    if diff_lambda is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
        )
    warn_without_maps("diff_chunked", kwargs.get("output_attentions"))
    query, key, value = cast_for_autocast(query, key, value)
    num_queries = query.shape[2]
    is_causal = bool(attends_causally(module, is_causal) and attention_mask is None and num_queries > 1)
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
            raise ValueError(
                f"attention_mask of four dimensions is {attention_mask.dtype}: it must be boolean (True for visible) "
                "or a floating-point number that is added to the scores."
            )
        attention_mask = attention_mask.expand(-1, -1, num_queries, key.shape[2])
    inputs = (query, key, value, diff_lambda, attention_mask, scaling, is_causal)
    if num_queries <= FEW_QUERIES or (attention_mask is not None and attention_mask.requires_grad):
        return attend_few_queries(*inputs), None  # a learned mask is as large as the scores, so may they be kept
    return _forward_op(*inputs), None


def attend_few_queries(query, key, value, diff_lambda, attention_mask, scaling, is_causal) -> torch.Tensor:
    """
    Computes the same for a decode step: all heads of a key-value head in one product, and nothing cached is copied.

    It has few operations rather than few multiplications, as the number of operations decides how long a decode step
    takes. In float32 or wider, two products, with the keys on the left as they are stored, take sdpa's time for 1,024
    keys and 0.7 of it for 4,096.
    """
    batch_size, num_key_value_heads, num_keys, head_dim = key.shape
    num_queries = query.shape[2]
    rows = place_queries(query, head_dim).reshape(batch_size, num_key_value_heads, -1, head_dim)  # (B, K, 2 G T, D)
    if is_causal:
        attention_mask = query.new_ones(1, 1, num_queries, num_keys, dtype=torch.bool).tril()
    if attention_mask is not None:
        num_maps = rows.shape[2] // num_queries  # of a key-value head, 2 G
        attention_mask = attention_mask.expand(-1, max(attention_mask.shape[1], num_maps), -1, -1)
        attention_mask = attention_mask.reshape(len(attention_mask), -1, rows.shape[2], num_keys)  # (B, K or 1, ., S)
    if query.dtype in (torch.float16, torch.bfloat16):
        outputs = nn.functional.scaled_dot_product_attention(rows, key, value, attention_mask, scale=scaling)
    else:
        scores = torch.bmm(key.flatten(0, 1), (scaling * rows).flatten(0, 1).transpose(1, 2))  # (B K, S, 2 G T)
        if attention_mask is not None:
            mask_scores(scores.transpose(1, 2).unflatten(0, (batch_size, -1)), attention_mask)
        outputs = torch.bmm(scores.transpose(1, 2).softmax(-1), value.flatten(0, 1))
    return subtract_maps(outputs.view(batch_size, -1, num_queries, head_dim).transpose(1, 2), diff_lambda)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    diff_lambda: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
) -> torch.Tensor:
    """Computes the outputs block by block."""
    blocks = Blocks(query, key, value, diff_lambda, attention_mask, scaling, is_causal)
    output = _forward_empty(query, key, value)
    output_by_head = blocks.by_head(output)
    for block in blocks:
        weights = blocks.weights(block, blocks.maps(block))
        output_block = block.of_heads(output_by_head)
        output_block.copy_(torch.bmm(weights, blocks.values(block)).view_as(output_block))
    return output


def _forward_empty(query, key, value, *_):
    return value.new_empty(query.shape[0], query.shape[2], query.shape[1] // 2, value.shape[-1])


def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    diff_lambda: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes gradients block by block; dP = dO V^T is the same for both maps."""
    blocks = Blocks(query, key, value, diff_lambda, attention_mask, scaling, is_causal)
    grad_query, grad_key, grad_value, grad_lambda = _backward_empty(grad_output, query, key, value, diff_lambda)
    grad_lambda.zero_()
    # Sums over blocks, so not narrower than float32.
    keys = split_keys(key, query.shape[-1]).contiguous()  # (B, K, 2 or 1, S, d)
    grad_keys = torch.zeros_like(keys, dtype=blocks.wide)
    grad_values = torch.zeros_like(blocks.all_values, dtype=blocks.wide)
    for block in blocks:
        maps = blocks.maps(block)
        values = blocks.values(block)
        grad_rows = blocks.head_rows(grad_output, block)
        grad_weights = blocks.scratch("grad_weights", query.dtype, len(values), grad_rows.shape[1], block.num_keys)
        torch.bmm(grad_rows, values.transpose(1, 2), out=grad_weights)
        grad_scores = blocks.scratch("grad_scores", blocks.wide, *maps.shape)  # (N, 2, R, S)
        torch.mul(maps, grad_weights.unsqueeze(1), out=grad_scores)
        row_sums = grad_scores.sum(-1, keepdim=True)  # (N, 2, R, 1)
        grad_scores.addcmul_(maps, row_sums, value=-1)
        grad_scores[:, 1] *= -blocks.lambda_rows(block)
        blocks.add_lambda_gradient(grad_lambda, row_sums[:, 1], block)

        weights = blocks.weights(block, maps)
        _add_product(blocks.values(block, grad_values), weights.transpose(1, 2), grad_rows)
        key_rows = blocks.key_rows(block, keys)
        grad_scores = blocks.narrow("scores", grad_scores).view(len(key_rows), -1, block.num_keys)
        grad_key_rows = blocks.key_rows(block, grad_keys)
        _add_product(grad_key_rows, grad_scores.transpose(1, 2), blocks.query_rows(block), scaling=scaling)
        grad_block = block.of_maps(blocks.by_map(grad_query))
        grad_block.copy_(torch.bmm(grad_scores, key_rows).mul_(scaling).view_as(grad_block))
    split_keys(grad_key, query.shape[-1]).copy_(grad_keys)
    return grad_query, grad_key, grad_value.copy_(grad_values), grad_lambda


def _backward_empty(grad_output, *inputs):
    """Returns empty gradients with the inputs' strides, which compilers rely on."""
    return tuple(torch.empty_like(tensor) for tensor in inputs[:4])


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]  # scaling, is_causal


def _differentiate(ctx, grad_output):
    gradients = _backward_op(grad_output, *ctx.saved_tensors, *ctx.options)
    return *gradients, None, None, None


def _refuse_second_derivatives(ctx, *_):
    raise RuntimeError('diff_chunked has no second derivatives: they need set_attn_implementation("eager")')


# Opaque operators: a compiler that saw the loop would unroll it, and fix the length.
_forward_op = torch.library.custom_op(f"{NAMESPACE}::forward", _forward, mutates_args=())
_backward_op = torch.library.custom_op(f"{NAMESPACE}::backward", _backward, mutates_args=())
_forward_op.register_fake(_forward_empty)
_backward_op.register_fake(_backward_empty)
_forward_op.register_autograd(_differentiate, setup_context=_save_inputs)
_backward_op.register_autograd(_refuse_second_derivatives)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, scaling: float = 1.0) -> None:
    """Adds scaling * left @ right to `total`, in its dtype."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right, alpha=scaling)
    else:
        total.add_(torch.bmm(left, right), alpha=scaling)
