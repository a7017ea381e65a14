"""Matchings against brute force, costs against least squares solved outright."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.calibration.pairing import PairCosts, match_heads


def all_pairings(num_kv_heads):
    """Every way to put KV heads into ordered pairs."""
    seen = set()
    for order in permutations(range(num_kv_heads)):
        pairs = tuple(sorted(zip(order[::2], order[1::2], strict=True)))
        if pairs not in seen:
            seen.add(pairs)
            yield pairs


def least_total(costs, num_kv_heads):
    """The cheapest pairing by trying all of them."""
    group = len(costs) // num_kv_heads
    totals = []
    for pairs in all_pairings(num_kv_heads):
        total = 0.0
        for first, second in pairs:
            rows = range(first * group, (first + 1) * group)
            columns = range(second * group, (second + 1) * group)
            total += min(sum(float(costs[r, c]) for r, c in zip(rows, p, strict=True)) for p in permutations(columns))
        totals.append(total)
    return min(totals)


@settings(max_examples=25, deadline=None)
@given(shape=st.sampled_from([(2, 2), (4, 4), (6, 6), (4, 2), (8, 4), (6, 2)]), seed=st.integers(0, 2**31))
def test_matching_costs_as_little_as_any_pairing(shape, seed):
    num_heads, num_kv_heads = shape
    costs = torch.rand(num_heads, num_heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairing = match_heads(costs, num_kv_heads)  # HeadPairing itself refuses queries away from their KV heads
    heads = pairing.query_heads
    total = sum(float(costs[heads[i], heads[i + 1]]) for i in range(0, num_heads, 2))
    assert total == pytest.approx(least_total(costs, num_kv_heads))


def test_matching_takes_the_cheaper_role():
    costs = torch.ones(2, 2)
    costs[1, 0] = 0.5
    assert match_heads(costs, 2).query_heads == (1, 0)
    costs[0, 1] = 0.25
    assert match_heads(costs, 2).query_heads == (0, 1)


def test_matching_pairs_eight_kv_heads_as_planted():
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3)).view(4, 2).tolist()
    costs = torch.ones(32, 32)
    for first, second in order:
        costs[4 * first : 4 * first + 4, 4 * second : 4 * second + 4] = 0.9
    found = match_heads(costs, 8).kv_heads
    assert {frozenset(found[i : i + 2]) for i in range(0, 8, 2)} == {frozenset(pair) for pair in order}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_cost_is_the_residual_of_least_squares(num_kv_heads, strict):
    torch.manual_seed(0)
    heads = 4
    tokens = 40
    width = 3
    hidden = 10
    diff_lambda = 0.1
    output_weight = torch.randn(hidden, heads * width)
    maps = torch.randn(heads, tokens, tokens).tril().softmax(-1)
    values = torch.randn(num_kv_heads, tokens, width)
    token_weights = torch.rand(tokens) + 0.5
    gathered = PairCosts(output_weight, heads, num_kv_heads, diff_lambda, strict)
    gathered.add(maps, values, token_weights)
    costs = gathered.costs(ridge=1e-12)

    i = 1
    j = 2
    kv = (i * num_kv_heads // heads, j * num_kv_heads // heads)
    both_values = torch.cat((values[kv[0]], values[kv[1]]), dim=-1)
    offered = (maps[i] - diff_lambda * maps[j]) @ both_values
    if strict:
        offered = offered / (offered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    blocks = output_weight.t().reshape(heads, width, hidden)
    wanted = maps[i] @ values[kv[0]] @ blocks[i] + maps[j] @ values[kv[1]] @ blocks[j]
    scale = token_weights.sqrt()[:, None].double()
    solution = torch.linalg.lstsq(scale * offered.double(), scale * wanted.double()).solution
    residual = (scale * (offered.double() @ solution - wanted.double())).pow(2).sum()
    assert costs[i, j].item() == pytest.approx(residual.item(), rel=1e-3)
    own = [costs[head, head] for head in range(heads)]
    assert all(torch.isinf(torch.stack(own)))
