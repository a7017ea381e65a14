"""
Differential attention in blocks of queries: exact, from plain matrix products, and memory linear in the length.

B batch, T queries, S keys, H heads, K key-value heads, G = H / K heads a key-value head, d map_dim, D head_dim.
A block has N key-value heads, of one or more rows of the batch, and R queries of each, those of G heads.

For one block both maps' scores are computed against every key that the block can see, softmaxed in float32,
subtracted, and multiplied with V once: as many multiplications as LLaMA's two heads, and no score outlives its block.
Training keeps only its inputs and computes each block's maps again for the gradient.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

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


# Rows of queries a block: enough for products to run at full speed, and twice as many in 16 bits, whose products are
# faster, and for long texts, where sums over fewer blocks win more than is computed beyond the diagonal.
BLOCK_ROWS = 128
LONG_TEXT = 2048
# Scores a block and thread: its maps, of 2 MiB, stay in a CPU's caches. Twice as many in 16 bits, by measurement.
BLOCK_SCORES = 2**19
# Up to here keys are read as they lie in the cache, by queries padded with zeros; beyond, splitting them is cheaper.
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
    O = (A1 - lambda A2) V as (B, T, H, D), before any norm, and no maps.

    `query` (B, 2H, T, d), `key` and `value` (B, K, S, D), `diff_lambda` () or (B, T, H), `attention_mask` as for
    `sdpa`: boolean or additive (B, 1, T, S), or (B, 2H, T, S) for each map, or None for query t attending to keys 0 to
    t. In 16 bits the scores are rounded before the softmax, less about the largest of their query. Without
    `diff_lambda` it is plain attention, for layers that kept LLaMA's.
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
    The same for a step of decoding: the heads of a key-value head ask together, and nothing cached is copied.

    Written for few operations rather than few multiplications, as a step of decoding is as long as its list of them.
    Not narrower than float32, two products, with the keys on the left as they lie, take sdpa's time for 1,024 keys and
    0.7 of it for 4,096.
    """
    batch_size, num_key_value_heads, num_keys, head_dim = key.shape
    num_queries = query.shape[2]
    rows = place_queries(query, head_dim).reshape(batch_size, num_key_value_heads, -1, head_dim)  # (B, K, 2 G T, D)
    if is_causal:
        attention_mask = query.new_ones(1, 1, num_queries, num_keys, dtype=torch.bool).tril()
    if attention_mask is not None:
        rows_of_a_head = rows.shape[2] // num_queries
        attention_mask = attention_mask.expand(-1, max(attention_mask.shape[1], rows_of_a_head), -1, -1)
        attention_mask = attention_mask.reshape(len(attention_mask), -1, rows.shape[2], num_keys)  # (B, K or 1, ., S)
    if query.dtype in (torch.float16, torch.bfloat16):
        outputs = nn.functional.scaled_dot_product_attention(rows, key, value, attention_mask, scale=scaling)
    else:
        scores = torch.bmm(key.flatten(0, 1), (scaling * rows).flatten(0, 1).transpose(1, 2))  # (B K, S, 2 G T)
        if attention_mask is not None:
            _mask(scores.transpose(1, 2).unflatten(0, (batch_size, -1)), attention_mask)
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
    """The loop over blocks."""
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
    """Its gradients in the shared form: dP = dO V^T serves both maps."""
    blocks = Blocks(query, key, value, diff_lambda, attention_mask, scaling, is_causal)
    grad_query, grad_key, grad_value, grad_lambda = _backward_empty(grad_output, query, key, value, diff_lambda)
    grad_lambda.zero_()
    # Sums over blocks, so not narrower than float32.
    keys = split_keys(key, query.shape[-1]).contiguous()  # (B, K, 2 or 1, S, d)
    grad_keys = torch.zeros_like(keys, dtype=blocks.wide)
    grad_values = torch.zeros_like(blocks.all_values, dtype=blocks.wide)
    for block in blocks:
        maps, values = blocks.maps(block), blocks.values(block)
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
        _add_product(grad_key_rows, grad_scores.transpose(1, 2), blocks.query_rows(block), scaling)
        grad_block = block.of_maps(blocks.by_map(grad_query))
        grad_block.copy_(torch.bmm(grad_scores, key_rows).mul_(scaling).view_as(grad_block))
    split_keys(grad_key, query.shape[-1]).copy_(grad_keys)
    return grad_query, grad_key, grad_value.copy_(grad_values), grad_lambda


def _backward_empty(grad_output, *inputs):
    """In the inputs' strides, with which compilers reckon."""
    return tuple(torch.empty_like(tensor) for tensor in inputs[:4])


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.scaling, ctx.is_causal = inputs[5:]


def _differentiate(ctx, grad_output):
    gradients = _backward_op(grad_output, *ctx.saved_tensors, ctx.scaling, ctx.is_causal)
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


@dataclass
class Block:
    """What is computed at once."""

    rows: slice  # of the batch
    heads: slice  # of the key-value heads; all of them where there are several rows
    queries: slice
    num_keys: int  # from the first on, which hold all that the block can see

    def of_maps(self, by_map: torch.Tensor) -> torch.Tensor:
        """Its part of (B, K, 2, G, T, d), a view."""
        return by_map[self.rows, self.heads, :, :, self.queries]

    def of_heads(self, by_head: torch.Tensor) -> torch.Tensor:
        """Its part of (B, K, G, T, D), a view."""
        return by_head[self.rows, self.heads, :, self.queries]


class Blocks:
    """The inputs laid out for the products of one block, and these products. The keys of V1 are split into maps'."""

    def __init__(self, query, key, value, diff_lambda, attention_mask, scaling, is_causal):
        self.batch_size, self.num_key_value_heads, self.num_keys, _ = key.shape
        self.num_queries = query.shape[2]
        self.diff_lambda, self.scaling, self.is_causal = diff_lambda, scaling, is_causal
        self.attention_mask = None if attention_mask is None else attention_mask.expand(self.batch_size, -1, -1, -1)
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.is_narrow = query.dtype != self.wide
        self.query = self.by_map(query)
        self.all_values = value.contiguous()  # (B, K, S, D)
        keys = split_keys(key, query.shape[-1])
        self.all_keys = keys.transpose(3, 4).contiguous()  # (B, K, 2 or 1, d, S)
        if self.is_narrow:
            self.likely_keys = self._likely_keys(keys)
        block_rows = 2 * BLOCK_ROWS if self.is_narrow or self.num_queries >= LONG_TEXT else BLOCK_ROWS
        self.queries_at_once = max(1, block_rows // self.query.shape[3])
        past = query.new_ones(self.queries_at_once, self.queries_at_once, dtype=torch.bool).tril_()
        self.causal_bounds = _bounds(past, query.dtype)
        self._scratch: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[Block]:
        """The longest blocks come first, so that the scratch memory hardly has to grow."""
        for start in reversed(range(0, self.num_queries, self.queries_at_once)):
            queries = slice(start, min(start + self.queries_at_once, self.num_queries))
            longest = queries.stop if self.is_causal else self.num_keys
            heads = self._heads_at_once(2 * self.query.shape[3] * (queries.stop - start) * longest)
            heads_at_once = min(heads, self.num_key_value_heads)
            rows_at_once = heads // heads_at_once
            for row in range(0, self.batch_size, rows_at_once):
                rows = slice(row, min(row + rows_at_once, self.batch_size))
                num_keys = longest if self.is_causal else self._num_visible_keys(rows, queries)
                for head in range(0, self.num_key_value_heads, heads_at_once):
                    yield Block(rows, slice(head, head + heads_at_once), queries, num_keys)

    def _heads_at_once(self, num_scores: int) -> int:
        """How many key-value heads, of `num_scores` each, make a block: equally many for each thread."""
        if self.query.device.type != "cpu":  # no such caches
            return self.batch_size * self.num_key_value_heads
        block_scores = 2 * BLOCK_SCORES if self.is_narrow else BLOCK_SCORES
        return torch.get_num_threads() * max(1, block_scores // num_scores)

    def _likely_keys(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of (B, K, 2 or 1, T, d): each query's first visible key, and its own, if the last query sees its own."""
        past, first_keys = 0, keys[:, :, :, :1].expand(-1, -1, -1, self.num_queries, -1)
        if self.attention_mask is not None:
            mask = self.attention_mask[:, 0]
            first = (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).argmax(-1)  # (B, T)
            rows = torch.arange(self.batch_size, device=keys.device).unsqueeze(1)
            first_keys = keys[rows, :, :, first].permute(0, 2, 3, 1, 4)
            past = max(0, self._num_visible_keys(slice(None), slice(-1, None)) - self.num_queries)
        own_keys = keys[:, :, :, past : past + self.num_queries] if self.num_queries <= self.num_keys else first_keys
        return first_keys, own_keys

    def _num_visible_keys(self, rows: slice, queries: slice) -> int:
        mask = self.attention_mask
        if mask is None or mask.dtype != torch.bool:
            return self.num_keys
        visible = mask[rows, :, queries].flatten(0, 2).any(0).nonzero()
        return int(visible[-1]) + 1 if len(visible) else 1

    def scratch(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Memory that every block writes anew: the first touch of fresh pages takes longer than their softmax."""
        size = math.prod(shape)
        if name not in self._scratch or len(self._scratch[name]) < size:
            self._scratch[name] = self.query.new_empty(size, dtype=dtype)
        return self._scratch[name][:size].view(shape)

    def narrow(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the inputs' dtype."""
        if tensor.dtype == self.query.dtype:
            return tensor
        return self.scratch(name, self.query.dtype, *tensor.shape).copy_(tensor)

    def by_map(self, query: torch.Tensor) -> torch.Tensor:
        """(B, 2H, T, d) seen as (B, K, 2, G, T, d)."""
        return query.unflatten(1, (self.num_key_value_heads, -1, 2)).transpose(2, 3)

    def by_head(self, output: torch.Tensor) -> torch.Tensor:
        """(B, T, H, D) seen as (B, K, G, T, D)."""
        return output.unflatten(2, (self.num_key_value_heads, -1)).permute(0, 2, 3, 1, 4)

    def key_columns(self, block: Block) -> torch.Tensor:
        """(2N, d, S) in V1, (N, d, S) in V2: by columns the scores take 0.7 (16 bits) to 0.95 of the time by rows."""
        return self.all_keys[block.rows, block.heads].flatten(0, 2)[..., : block.num_keys]

    def key_rows(self, block: Block, tensor: torch.Tensor) -> torch.Tensor:
        """(2N, S, d) in V1, (N, S, d) in V2, seen in (B, K, 2 or 1, S, d)."""
        return tensor[block.rows, block.heads].flatten(0, 2)[:, : block.num_keys]

    def values(self, block: Block, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """(N, S, D): a view of the values, or of what has their shape."""
        tensor = self.all_values if tensor is None else tensor
        return tensor[block.rows, block.heads].flatten(0, 1)[:, : block.num_keys]

    def query_rows(self, block: Block) -> torch.Tensor:
        """(2N, R, d) in V1, (N, 2R, d) in V2."""
        queries = block.of_maps(self.query)
        return queries.reshape(queries.shape[:2].numel() * self.all_keys.shape[2], -1, queries.shape[-1])

    def head_rows(self, tensor: torch.Tensor, block: Block) -> torch.Tensor:
        """(N, R, D) of (B, T, H, D)."""
        heads = block.of_heads(self.by_head(tensor))
        return heads.reshape(heads.shape[:2].numel(), -1, heads.shape[-1])

    def mask(self, block: Block) -> torch.Tensor:
        """(rows, 1, R, S), or with a map's own (rows, maps, R, S)."""
        if self.attention_mask.shape[1] == 1:
            return self.attention_mask[block.rows, :, block.queries, : block.num_keys]
        return block.of_maps(self.by_map(self.attention_mask))[..., : block.num_keys].flatten(1, 3)

    def lambda_rows(self, block: Block) -> torch.Tensor:
        """() in V1, (N, R, 1) in V2."""
        if self.diff_lambda.dim() == 0:
            return self.diff_lambda.to(self.wide)
        return self.head_rows(self.diff_lambda.unsqueeze(-1), block).to(self.wide)

    def add_lambda_gradient(self, grad_lambda: torch.Tensor, row_sums: torch.Tensor, block: Block) -> None:
        """dlambda = -sum of dP A2 over keys: `row_sums` (N, R, 1), summed further in V1."""
        if grad_lambda.dim() == 0:
            grad_lambda -= row_sums.sum()
        else:
            grad_block = block.of_heads(self.by_head(grad_lambda.unsqueeze(-1)))
            grad_block -= row_sums.view_as(grad_block)

    def references(self, block: Block, rows: torch.Tensor) -> torch.Tensor:
        """
        (2N, R, 1) in V1, (N, 2R, 1) in V2: about the largest score of each of `rows`, which is subtracted from them.

        In bfloat16 a score of 50 is off by up to 0.13, and its key's weight by as much. Less the largest the scores of
        keys that weigh are near 0. In trained models a query's first key, where attention rests, or its own is close.
        """
        scores = []
        for keys in self.likely_keys:
            keys = keys[block.rows, block.heads, :, block.queries].unsqueeze(3)  # (rows, heads, 2 or 1, 1, queries, d)
            scores.append((rows.view(*keys.shape[:3], -1, *keys.shape[4:]) * keys).sum(-1, dtype=self.wide))
        return torch.maximum(*scores).mul_(self.scaling).view(len(rows), -1, 1)

    def maps(self, block: Block) -> torch.Tensor:
        """Both softmax maps of a block, (N, 2, R, S) in float32 or wider."""
        rows = self.query_rows(block)
        scores = self.scratch("scores", rows.dtype, *rows.shape[:2], block.num_keys)
        if self.is_narrow:
            scores.copy_(self.references(block, rows))  # the difference is rounded, once
        scores.baddbmm_(rows, self.key_columns(block), beta=-1 if self.is_narrow else 0, alpha=self.scaling)
        num_queries = block.queries.stop - block.queries.start
        if self.is_causal:
            by_query = scores.view(-1, num_queries, block.num_keys)
            by_query[..., block.queries].clamp_(max=self.causal_bounds[:num_queries, :num_queries])
        elif self.attention_mask is not None:
            mask = self.mask(block)
            _mask(scores.view(len(mask), -1, num_queries, block.num_keys), mask)
        scores = scores.view(-1, 2, self.query.shape[3] * num_queries, block.num_keys)
        if self.is_narrow:
            scores = self.scratch("wide scores", self.wide, *scores.shape).copy_(scores)
        return torch.softmax(scores, -1, out=scores)  # in place: less memory to write takes 0.95 of the time

    def weights(self, block: Block, maps: torch.Tensor) -> torch.Tensor:
        """A1 - lambda A2 of a block, (N, R, S) in the values' dtype; overwrites the first map."""
        first, second = maps.unbind(1)
        return self.narrow("weights", first.addcmul_(self.lambda_rows(block), second, value=-1))


def split_keys(key: torch.Tensor, map_dim: int) -> torch.Tensor:
    """(B, K, S, D) seen as (B, K, 2, S, d) in V1, as (B, K, 1, S, d) in V2."""
    return key.unflatten(-1, (-1, map_dim)).transpose(2, 3)


def _bounds(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    The largest score of each key: the lowest number, not -inf, where it is hidden, as rows may see nothing.

    To clamp scores to it takes a third (16 bits) to a seventh of the time of `masked_fill_` on a CPU.
    """
    bounds = torch.full(mask.shape, math.inf, dtype=dtype, device=mask.device)
    return bounds.masked_fill_(~mask, torch.finfo(dtype).min)


def _mask(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hides keys from `scores` in place."""
    if mask.dtype == torch.bool:
        return scores.clamp_(max=_bounds(mask, scores.dtype))
    return scores.add_(mask).clamp_(min=torch.finfo(scores.dtype).min)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float = 1.0) -> None:
    """total += scaling * left @ right, the sum in `total`'s dtype."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right, alpha=scaling)
    else:
        total.add_(torch.bmm(left, right), alpha=scaling)
