"""
Differential attention in blocks of queries: exact, from plain matrix products, and memory linear in the length.

B batch, T queries, S keys, H heads, K key-value heads, G = H / K heads a key-value head, d map_dim, D head_dim;
N = B K, and R the rows of a block: its queries for each of G heads.

For one block both maps' scores are computed against every key that the block can see, softmaxed in float32,
subtracted, and multiplied with V once: as many multiplications as LLaMA's two heads, and no score outlives its block.
Training keeps only its inputs and computes each block's maps again for the gradient.
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .diff_attention import cast_for_autocast, place_queries, subtract_maps


# Rows a block: its scores stay in a CPU's caches, and the loop costs little beside its products.
BLOCK_ROWS = 128
# Up to here keys are read as they lie in the cache, by queries padded with zeros; beyond, splitting them is cheaper.
FEW_QUERIES = 8


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
    `sdpa`: boolean or additive (B, 1, T, S), or None for query t attending to keys 0 to t. In bfloat16 the scores are
    rounded to bfloat16 before the softmax, as in `eager`. Without `diff_lambda` it is plain attention, for layers that
    kept LLaMA's.
    """
    if diff_lambda is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
        )
    query, key, value = cast_for_autocast(query, key, value)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = bool(is_causal and attention_mask is None and query.shape[2] > 1)
    if query.shape[2] <= FEW_QUERIES:
        return attend_few_queries(query, key, value, diff_lambda, attention_mask, scaling, is_causal), None
    return ChunkedDiffAttention.apply(query, key, value, diff_lambda, attention_mask, scaling, is_causal), None


def attend_few_queries(query, key, value, diff_lambda, attention_mask, scaling, is_causal) -> torch.Tensor:
    """
    The same for a step of decoding: the heads of a key-value head ask together, and nothing cached is copied.

    Written for few operations rather than few multiplications, as a step of decoding is as long as its list of them.
    Not narrower than float32, two products take 0.7 of sdpa's time, with the keys on the left, as they lie.
    """
    batch_size, num_key_value_heads, num_keys, head_dim = key.shape
    num_queries = query.shape[2]
    rows = place_queries(query, head_dim).reshape(batch_size, num_key_value_heads, -1, head_dim)  # (B, K, 2 G T, D)
    if is_causal:
        attention_mask = query.new_ones(1, 1, num_queries, num_keys, dtype=torch.bool).tril()
    if attention_mask is not None:
        attention_mask = attention_mask.repeat(1, 1, rows.shape[2] // num_queries, 1)
    if query.dtype in (torch.float16, torch.bfloat16):
        outputs = nn.functional.scaled_dot_product_attention(rows, key, value, attention_mask, scale=scaling)
    else:
        scores = torch.matmul(key, (scaling * rows).transpose(2, 3)).transpose(2, 3)  # (B, K, 2 G T, S)
        if attention_mask is not None:
            scores = _mask(scores, attention_mask)
        outputs = torch.matmul(scores.softmax(-1), value)
    return subtract_maps(outputs.view(batch_size, -1, num_queries, head_dim).transpose(1, 2), diff_lambda)


class ChunkedDiffAttention(torch.autograd.Function):
    """The loop over blocks, and its gradient in the shared form: dP = dO V^T serves both maps."""

    @staticmethod
    def forward(ctx, query, key, value, diff_lambda, attention_mask, scaling, is_causal):
        ctx.save_for_backward(query, key, value, diff_lambda, attention_mask)
        ctx.scaling, ctx.is_causal = scaling, is_causal
        blocks = QueryBlocks(query, key, value, diff_lambda, attention_mask, scaling, is_causal)
        output = value.new_empty(query.shape[0], query.shape[2], query.shape[1] // 2, value.shape[-1])
        output_by_head = blocks.by_head(output)
        for queries, num_keys in blocks:
            weights = blocks.weights(blocks.maps(queries, num_keys), queries)
            product = torch.bmm(weights, blocks.value[:, :num_keys])  # (N, R, D)
            output_by_head[:, :, :, queries] = product.view_as(output_by_head[:, :, :, queries])
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, diff_lambda, attention_mask = ctx.saved_tensors
        blocks = QueryBlocks(query, key, value, diff_lambda, attention_mask, ctx.scaling, ctx.is_causal)
        grad_query, grad_lambda = torch.empty_like(query), torch.zeros_like(diff_lambda)
        # Sums over blocks, so not narrower than float32.
        grad_keys = torch.zeros_like(blocks.keys, dtype=blocks.wide)
        grad_value = torch.zeros_like(blocks.value, dtype=blocks.wide)
        for queries, num_keys in blocks:
            maps = blocks.maps(queries, num_keys)  # (N, 2, R, S)
            grad_rows = blocks.by_head(grad_output)[:, :, :, queries].reshape(len(blocks.value), -1, value.shape[-1])
            grad_weights = torch.bmm(grad_rows, blocks.value[:, :num_keys].transpose(1, 2))  # (N, R, S)
            grad_scores = maps * grad_weights.unsqueeze(1)
            row_sums = grad_scores.sum(-1, keepdim=True)  # (N, 2, R, 1)
            grad_scores.addcmul_(maps, row_sums, value=-1)
            grad_scores[:, 1] *= -blocks.lambda_rows(queries)
            blocks.add_lambda_gradient(grad_lambda, row_sums[:, 1], queries)

            weights = blocks.weights(maps, queries)
            _add_product(grad_value[:, :num_keys], weights.transpose(1, 2), grad_rows)
            grad_scores = grad_scores.to(query.dtype).view(len(blocks.keys), -1, num_keys)
            _add_product(grad_keys[:, :num_keys], grad_scores.transpose(1, 2), blocks.query_rows(queries), ctx.scaling)
            grad_rows = torch.bmm(grad_scores, blocks.keys[:, :num_keys]).mul_(ctx.scaling)
            grad_block = blocks.by_map(grad_query)[..., queries, :]
            grad_block.copy_(grad_rows.view_as(grad_block))
        grad_key = blocks.join_keys(grad_keys).to(key.dtype)
        return grad_query, grad_key, grad_value.view_as(value).to(value.dtype), grad_lambda, None, None, None


class QueryBlocks:
    """The inputs laid out for the products of one block, and these products. The keys of V1 are split into maps'."""

    def __init__(self, query, key, value, diff_lambda, attention_mask, scaling, is_causal):
        self.num_queries, self.num_keys, self.num_key_value_heads = query.shape[2], key.shape[2], key.shape[1]
        self.diff_lambda, self.attention_mask = diff_lambda, attention_mask
        self.scaling, self.is_causal = scaling, is_causal
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.value = value.flatten(0, 1)  # (N, S, D)
        self.keys = key.unflatten(-1, (-1, query.shape[-1])).transpose(2, 3).flatten(0, 2)  # (2N in V1 or N, S, d)
        self.query = self.by_map(query)

    def __iter__(self) -> Iterator[tuple[slice, int]]:
        """Each block's queries, and the number of keys from the first on that hold all it can see."""
        step = max(1, BLOCK_ROWS // self.query.shape[3])
        for start in range(0, self.num_queries, step):
            stop = min(start + step, self.num_queries)
            yield slice(start, stop), stop if self.is_causal else self._num_visible_keys(slice(start, stop))

    def _num_visible_keys(self, queries: slice) -> int:
        mask = self.attention_mask
        if (
            mask is None
            or mask.dtype != torch.bool
            or self.num_queries <= FEW_QUERIES
            or torch.compiler.is_compiling()
        ):
            return self.num_keys
        visible = mask[:, :, queries].flatten(0, 2).any(0).nonzero()
        return int(visible[-1]) + 1 if len(visible) else 1

    def by_map(self, query: torch.Tensor) -> torch.Tensor:
        """(B, 2H, T, d) seen as (B, K, 2, G, T, d)."""
        return query.unflatten(1, (self.num_key_value_heads, -1, 2)).transpose(2, 3)

    def by_head(self, output: torch.Tensor) -> torch.Tensor:
        """(B, T, H, D) seen as (B, K, G, T, D)."""
        return output.unflatten(2, (self.num_key_value_heads, -1)).permute(0, 2, 3, 1, 4)

    def join_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """(2N or N, S, d) back to (B, K, S, D)."""
        keys = keys.view(-1, self.num_key_value_heads, len(keys) // len(self.value), *keys.shape[1:])
        return keys.transpose(2, 3).flatten(3)

    def query_rows(self, queries: slice) -> torch.Tensor:
        """(2N, R, d) in V1, (N, 2R, d) in V2."""
        return self.query[..., queries, :].reshape(len(self.keys), -1, self.keys.shape[-1])

    def lambda_rows(self, queries: slice) -> torch.Tensor:
        """() in V1, (N, R, 1) in V2."""
        if self.diff_lambda.dim() == 0:
            return self.diff_lambda.to(self.wide)
        rows = self.by_head(self.diff_lambda.unsqueeze(-1))[:, :, :, queries]
        return rows.reshape(len(self.value), -1, 1).to(self.wide)

    def add_lambda_gradient(self, grad_lambda: torch.Tensor, row_sums: torch.Tensor, queries: slice) -> None:
        """dlambda = -sum of dP A2 over keys: `row_sums` (N, R, 1), summed further in V1."""
        if grad_lambda.dim() == 0:
            grad_lambda -= row_sums.sum()
        else:
            rows = self.by_head(grad_lambda.unsqueeze(-1))[:, :, :, queries]
            rows -= row_sums.view_as(rows)

    def maps(self, queries: slice, num_keys: int) -> torch.Tensor:
        """Both softmax maps of a block, (N, 2, R, S) in float32 or wider."""
        rows, keys = self.query_rows(queries), self.keys[:, :num_keys].transpose(1, 2)
        scores = torch.baddbmm(rows.new_empty(()), rows, keys, beta=0, alpha=self.scaling)
        num_rows = queries.stop - queries.start
        by_query = scores.view(-1, *self.query.shape[1:4], num_rows, num_keys)  # (B, K, 2, G, queries, S)
        if self.is_causal:
            _mask(by_query[..., queries], scores.new_ones(num_rows, num_rows, dtype=torch.bool).tril_())
        elif self.attention_mask is not None:
            _mask(by_query, self.attention_mask[:, :, None, None, queries, :num_keys])
        return scores.view(len(self.value), 2, -1, num_keys).softmax(-1, dtype=self.wide)

    def weights(self, maps: torch.Tensor, queries: slice) -> torch.Tensor:
        """A1 - lambda A2 of a block, (N, R, S) in the values' dtype; overwrites the first map."""
        first, second = maps.unbind(1)
        return first.addcmul_(self.lambda_rows(queries), second, value=-1).to(self.value.dtype)


def _mask(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hides keys from `scores` in place; the lowest number, not -inf, keeps rows that see nothing finite."""
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return scores.add_(mask)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float = 1.0) -> None:
    """total += scaling * left @ right, the sum in `total`'s dtype."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right, alpha=scaling)
    else:
        total.add_(torch.bmm(left, right), alpha=scaling)
