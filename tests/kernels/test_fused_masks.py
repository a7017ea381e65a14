"""The key ranges that the kernels read, made from what transformers passes: the same pairs see each other."""

import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_config
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import causal_mask_function, create_causal_mask

from modeling_diff.diff_attention_triton_interface import fused_attention_mask, mask_of_key_ranges
from modeling_diff.diff_transformers_compat import cache_argument


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
PADDING = {
    "none": None,
    "ones": [[1] * 9, [1] * 9],
    "left": [[1] * 9, [0] * 4 + [1] * 5],
    "right": [[1] * 9, [1] * 5 + [0] * 4],
    "both sides": [[0, 0] + [1] * 6 + [0], [1] * 9],
    "a row of nothing": [[0] * 9, [1] * 9],
}


def config(is_causal=True):
    config = tiny_config("v1", **HEADS, num_hidden_layers=1, attn_implementation="diff_triton")
    config.is_causal = is_causal
    return config


def filled_cache(kind, num_seen):
    """A cache of two rows after `num_seen` tokens."""
    if kind == "none":
        return None
    room = {"static": 12, "full static": 9}
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=config(), max_cache_len=room[kind])
    if num_seen:
        cache.update(torch.zeros(2, 1, num_seen, 32), torch.zeros(2, 1, num_seen, 32), 0)
    return cache


def causal_mask(attention_mask=None, cache=None, num_queries=9, is_causal=True, **options):
    """What transformers makes of a batch of two for the kernels; each release has the cache under its own name."""
    embeddings = torch.zeros(2, num_queries, 32)
    return create_causal_mask(
        config(is_causal=is_causal), embeddings, attention_mask, **cache_argument(cache), **options
    )


def assert_key_ranges_are(visible, mask, num_queries, queries_that_count, is_causal=True):
    """`visible` (B, T, S) boolean. Rows of padding may see anything, as nothing of them reaches a token."""
    num_keys = visible.shape[2]
    if mask is None:  # everything: to the last query all keys
        mask = torch.tensor([0, num_keys], dtype=torch.int32).expand(2, 1, 1, 2)
    assert mask.dtype == torch.int32
    ours = mask_of_key_ranges(mask, num_queries, num_keys, is_causal)[:, 0]
    assert torch.equal(ours[queries_that_count], visible[queries_that_count])


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(
    ("kind", "num_seen"),
    [("none", 0), *((kind, seen) for kind in ("dynamic", "static", "full static") for seen in (0, 1, 6, 8))],
)
def test_causal_key_ranges_are_the_pairs_that_see_each_other(padding, num_seen, kind):
    num_queries = 9 - num_seen
    attention_mask = None if PADDING[padding] is None else torch.tensor(PADDING[padding])
    mask = causal_mask(
        attention_mask, filled_cache(kind, num_seen), num_queries, position_ids=torch.arange(num_seen, 9)[None]
    )
    is_token = torch.ones(2, 9, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    visible = torch.zeros(2, num_queries, 12 if kind == "static" else 9, dtype=torch.bool)
    for row in range(2):
        for query in range(num_queries):
            for key in range(num_seen + query + 1):
                visible[row, query, key] = is_token[row, key]
    assert_key_ranges_are(visible, mask, num_queries, is_token[:, num_seen:])


@pytest.mark.parametrize("padding", PADDING)
def test_bidirectional_key_ranges_end_before_padding(padding):
    attention_mask = None if PADDING[padding] is None else torch.tensor(PADDING[padding])
    mask = causal_mask(attention_mask, is_causal=False)
    is_token = torch.ones(2, 9, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    assert_key_ranges_are(is_token[:, None].expand(-1, 9, -1), mask, 9, is_token, is_causal=False)


@pytest.mark.parametrize("lengths", [[[9], [9]], [[4, 5], [4, 5]], [[1, 1, 7], [8, 1]]], ids=str)
def test_packed_key_ranges_are_sequences(lengths):
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    mask = causal_mask(position_ids=positions)
    bounds = torch.zeros(2, 1, 9, 2, dtype=torch.int32)
    for row, of_row in enumerate(lengths):
        start = 0
        for length in of_row:
            bounds[row, 0, start : start + length] = torch.tensor([start, start + length])
            start += length
    if lengths == [[9], [9]]:
        assert mask is None  # transformers finds no packing
        mask = fused_attention_mask(
            2, 9, 9, mask_function=causal_mask_function, allow_is_causal_skip=False
        )  # but cannot look while it compiles
    assert torch.equal(mask, bounds)


def test_mask_of_ones_costs_the_kernels_nothing():
    mask = torch.ones(2, 9, dtype=torch.long)
    assert causal_mask(mask) is None
    assert causal_mask(mask, filled_cache("dynamic", 8), num_queries=1) is None


def test_left_padding_is_read_where_transformers_wants_a_mask_in_any_case():
    attention_mask = torch.tensor(PADDING["left"]).bool()
    mask = fused_attention_mask(
        2, 9, 9, mask_function=causal_mask_function, attention_mask=attention_mask, allow_is_causal_skip=False
    )
    assert mask.tolist() == [[[[0, 9]]], [[[4, 9]]]]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padding_between_tokens_is_refused_with_every_cache(kind):
    attention_mask = torch.tensor([[1] * 9, [1, 1, 0] + [1] * 6])
    with pytest.raises(ValueError, match=r'padding between tokens of a sequence.*use attn_implementation="sdpa"'):
        causal_mask(attention_mask, filled_cache(kind, 8), num_queries=1)


def test_mask_function_of_a_caller_is_refused():
    with pytest.raises(ValueError, match="a custom mask function"):
        causal_mask(and_mask_function=lambda b, h, q, k: q - k < 3)


COMPILED = """
import torch
from modeling_diff.diff_attention_triton_interface import fused_attention_mask

compiled = torch.compile(fused_attention_mask, backend="aot_eager", fullgraph=True)
left = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
assert torch.equal(compiled(2, 9, 9, attention_mask=left), fused_attention_mask(2, 9, 9, attention_mask=left))
print("left padding is read")
compiled(2, 9, 9, attention_mask=torch.tensor([[1] * 9, [1, 1, 0] + [1] * 6]))
print("padding between tokens passed")
"""


def test_padding_between_tokens_stops_a_compiled_call_too():
    """By an assertion in the graph, which ends a process, as it would on a GPU."""
    process = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300)
    assert process.stdout == "left padding is read\n"
    assert process.returncode != 0 and "padding between tokens of a sequence" in process.stderr
