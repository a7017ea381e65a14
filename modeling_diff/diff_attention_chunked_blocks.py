"""
Blocks of queries for `diff_chunked`: the inputs laid out for the products of one block, and these products.

B batch, T queries, S keys, H heads, K key-value heads, G = H / K heads per key-value head, d map_dim, D head_dim.
A block has N key-value heads, of one or more sequences, and R queries of each, those of G heads.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch


# Rows of queries per block: enough for products to run at full speed, and twice as many in half precision, whose
# products are faster, and for long texts, where fewer sums over blocks gain more than is computed beyond the diagonal.
BLOCK_ROWS = 128
LONG_TEXT = 2048
# Scores per block and thread: its maps, of 2 MiB, stay in a CPU's caches. Twice as many in half precision, by
# measurement.
BLOCK_SCORES = 2**19


@dataclass
class Block:
    """
    What is computed at once.

    Attributes:
        sequences: Slice of the batch.
        heads: Slice of the key-value heads; all of them if there are several sequences.
        queries: Slice of the queries.
        num_keys: Number of keys, from the first on, that hold all that the block can see.
    """

    sequences: slice
    heads: slice
    queries: slice
    num_keys: int

    def of_maps(self, by_map: torch.Tensor) -> torch.Tensor:
        """Returns the block's part of (B, K, 2, G, T, d), a view."""
        return by_map[self.sequences, self.heads, :, :, self.queries]

    def of_heads(self, by_head: torch.Tensor) -> torch.Tensor:
        """Returns the block's part of (B, K, G, T, D), a view."""
        return by_head[self.sequences, self.heads, :, self.queries]


class Blocks:
    """The inputs laid out for the products of one block, and these products. The keys of V1 are split into maps'."""

    def __init__(self, query, key, value, diff_lambda, attention_mask, scaling, is_causal):
        self.batch_size, self.num_key_value_heads, self.num_keys, _ = key.shape
        self.num_queries = query.shape[2]
        self.diff_lambda = diff_lambda
        self.scaling = scaling
        self.is_causal = is_causal
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
        self.causal_limits = _score_limits(past, query.dtype)
        self._scratch: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[Block]:
        """Yields blocks, the longest first, so that the scratch memory hardly has to grow."""
        for start in reversed(range(0, self.num_queries, self.queries_at_once)):
            queries = slice(start, min(start + self.queries_at_once, self.num_queries))
            longest = queries.stop if self.is_causal else self.num_keys
            heads = self._heads_at_once(2 * self.query.shape[3] * (queries.stop - start) * longest)
            heads_at_once = min(heads, self.num_key_value_heads)
            sequences_at_once = heads // heads_at_once
            for first in range(0, self.batch_size, sequences_at_once):
                sequences = slice(first, min(first + sequences_at_once, self.batch_size))
                num_keys = longest if self.is_causal else self._num_visible_keys(sequences, queries)
                for head in range(0, self.num_key_value_heads, heads_at_once):
                    yield Block(sequences, slice(head, head + heads_at_once), queries, num_keys=num_keys)

    def _heads_at_once(self, num_scores: int) -> int:
        """Returns how many key-value heads, of `num_scores` each, make a block: equally many for each thread."""
        if self.query.device.type != "cpu":  # no such caches
            return self.batch_size * self.num_key_value_heads
        block_scores = 2 * BLOCK_SCORES if self.is_narrow else BLOCK_SCORES
        return torch.get_num_threads() * max(1, block_scores // num_scores)

    def _likely_keys(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns each query's first visible key, and its own if the last query sees its own: (B, K, 2 or 1, T, d)."""
        past = 0
        first_keys = keys[:, :, :, :1].expand(-1, -1, -1, self.num_queries, -1)
        if self.attention_mask is not None:
            mask = self.attention_mask[:, 0]
            first = (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).argmax(-1)  # (B, T)
            batch = torch.arange(self.batch_size, device=keys.device).unsqueeze(1)
            first_keys = keys[batch, :, :, first].permute(0, 2, 3, 1, 4)
            past = max(0, self._num_visible_keys(slice(None), slice(-1, None)) - self.num_queries)
        own_keys = keys[:, :, :, past : past + self.num_queries] if self.num_queries <= self.num_keys else first_keys
        return first_keys, own_keys

    def _num_visible_keys(self, sequences: slice, queries: slice) -> int:
        mask = self.attention_mask
        if mask is None or mask.dtype != torch.bool:
            return self.num_keys
        visible = mask[sequences, :, queries].flatten(0, 2).any(0).nonzero()
        return int(visible[-1]) + 1 if len(visible) else 1

    def scratch(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Returns memory that blocks share: the first touch of fresh pages takes longer than their softmax."""
        size = math.prod(shape)
        if name not in self._scratch or len(self._scratch[name]) < size:
            self._scratch[name] = self.query.new_empty(size, dtype=dtype)
        return self._scratch[name][:size].view(shape)

    def narrow(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensor in the inputs' dtype."""
        if tensor.dtype == self.query.dtype:
            return tensor
        return self.scratch(name, self.query.dtype, *tensor.shape).copy_(tensor)

    def by_map(self, query: torch.Tensor) -> torch.Tensor:
        """Views (B, 2H, T, d) as (B, K, 2, G, T, d)."""
        return query.unflatten(1, (self.num_key_value_heads, -1, 2)).transpose(2, 3)

    def by_head(self, output: torch.Tensor) -> torch.Tensor:
        """Views (B, T, H, D) as (B, K, G, T, D)."""
        return output.unflatten(2, (self.num_key_value_heads, -1)).permute(0, 2, 3, 1, 4)

    def key_columns(self, block: Block) -> torch.Tensor:
        """Returns keys as columns, (2N, d, S) in V1, (N, d, S) in V2: scores take 0.7 (half precision) to 0.95 of the
        time that they take by rows."""
        return self.all_keys[block.sequences, block.heads].flatten(0, 2)[..., : block.num_keys]

    def key_rows(self, block: Block, tensor: torch.Tensor) -> torch.Tensor:
        """Views a block of (B, K, 2 or 1, S, d) as (2N, S, d) in V1, (N, S, d) in V2."""
        return tensor[block.sequences, block.heads].flatten(0, 2)[:, : block.num_keys]

    def values(self, block: Block, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """Views the values, or a tensor of their shape, as (N, S, D)."""
        tensor = self.all_values if tensor is None else tensor
        return tensor[block.sequences, block.heads].flatten(0, 1)[:, : block.num_keys]

    def query_rows(self, block: Block) -> torch.Tensor:
        """Returns queries, (2N, R, d) in V1, (N, 2R, d) in V2."""
        queries = block.of_maps(self.query)
        return queries.reshape(queries.shape[:2].numel() * self.all_keys.shape[2], -1, queries.shape[-1])

    def head_rows(self, tensor: torch.Tensor, block: Block) -> torch.Tensor:
        """Returns a block of (B, T, H, D) as (N, R, D)."""
        heads = block.of_heads(self.by_head(tensor))
        return heads.reshape(heads.shape[:2].numel(), -1, heads.shape[-1])

    def mask(self, block: Block) -> torch.Tensor:
        """Returns the mask, (sequences, 1, R, S), or with one per map (sequences, maps, R, S)."""
        if self.attention_mask.shape[1] == 1:
            return self.attention_mask[block.sequences, :, block.queries, : block.num_keys]
        return block.of_maps(self.by_map(self.attention_mask))[..., : block.num_keys].flatten(1, 3)

    def lambda_rows(self, block: Block) -> torch.Tensor:
        """Returns lambda, () in V1, (N, R, 1) in V2."""
        if self.diff_lambda.dim() == 0:
            return self.diff_lambda.to(self.wide)
        return self.head_rows(self.diff_lambda.unsqueeze(-1), block).to(self.wide)

    def add_lambda_gradient(self, grad_lambda: torch.Tensor, row_sums: torch.Tensor, block: Block) -> None:
        """Subtracts sums of dP A2 over keys, `row_sums` (N, R, 1), which are summed further in V1."""
        if grad_lambda.dim() == 0:
            grad_lambda -= row_sums.sum()
        else:
            grad_block = block.of_heads(self.by_head(grad_lambda.unsqueeze(-1)))
            grad_block -= row_sums.view_as(grad_block)

    def references(self, block: Block, rows: torch.Tensor) -> torch.Tensor:
        """
        Returns about the largest score of each query, which is subtracted from its scores: (2N, R, 1) or (N, 2R, 1).

        In bfloat16 a score of 50 is off by up to 0.13, and its key's weight by as much. Minus the largest, scores of
        keys with weight are near 0. In trained models the score of a query's first key, an attention sink, or of its
        own key is close to the largest.
        """
        scores = []
        for keys in self.likely_keys:
            keys = keys[block.sequences, block.heads, :, block.queries].unsqueeze(3)  # (., ., 2 or 1, 1, queries, d)
            scores.append((rows.view(*keys.shape[:3], -1, *keys.shape[4:]) * keys).sum(-1, dtype=self.wide))
        return torch.maximum(*scores).mul_(self.scaling).view(len(rows), -1, 1)

    def maps(self, block: Block) -> torch.Tensor:
        """Computes both softmax maps of a block, (N, 2, R, S) in float32 or wider."""
        rows = self.query_rows(block)
        scores = self.scratch("scores", rows.dtype, *rows.shape[:2], block.num_keys)
        if self.is_narrow:
            scores.copy_(self.references(block, rows))  # the difference is rounded, once
        scores.baddbmm_(rows, self.key_columns(block), beta=-1 if self.is_narrow else 0, alpha=self.scaling)
        num_queries = block.queries.stop - block.queries.start
        if self.is_causal:
            by_query = scores.view(-1, num_queries, block.num_keys)
            by_query[..., block.queries].clamp_(max=self.causal_limits[:num_queries, :num_queries])
        elif self.attention_mask is not None:
            mask = self.mask(block)
            mask_scores(scores.view(len(mask), -1, num_queries, block.num_keys), mask)
        scores = scores.view(-1, 2, self.query.shape[3] * num_queries, block.num_keys)
        if self.is_narrow:
            scores = self.scratch("wide scores", self.wide, *scores.shape).copy_(scores)
        return torch.softmax(scores, -1, out=scores)  # in place: less memory to write takes 0.95 of the time

    def weights(self, block: Block, maps: torch.Tensor) -> torch.Tensor:
        """Computes A1 - lambda A2 of a block, (N, R, S) in the values' dtype; overwrites A1."""
        positive, negative = maps.unbind(1)
        return self.narrow("weights", positive.addcmul_(self.lambda_rows(block), negative, value=-1))


def split_keys(key: torch.Tensor, map_dim: int) -> torch.Tensor:
    """Views (B, K, S, D) as (B, K, 2, S, d) in V1, as (B, K, 1, S, d) in V2."""
    return key.unflatten(-1, (-1, map_dim)).transpose(2, 3)


def _score_limits(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Returns the largest score of each key: the lowest number where it is hidden, not -inf, as a query may see nothing.

    Clamping scores to it takes a third (half precision) to a seventh of the time of `masked_fill_` on a CPU.
    """
    limits = torch.full(mask.shape, math.inf, dtype=dtype, device=mask.device)
    return limits.masked_fill_(~mask, torch.finfo(dtype).min)


def mask_scores(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hides keys from `scores` in place."""
    if mask.dtype == torch.bool:
        return scores.clamp_(max=_score_limits(mask, scores.dtype))
    return scores.add_(mask).clamp_(min=torch.finfo(scores.dtype).min)
