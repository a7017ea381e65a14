"""
Which LLaMA heads become one differential head: the cost of every pair, and the matching that costs least.

H LLaMA heads, K LLaMA KV heads, P partners of a head, N tokens, T tokens per sequence, d map_dim, C hidden.
"""

from typing import NamedTuple

import networkx
import numpy
import torch

from conversion.mapping.heads import HeadPairing
from modeling_diff.diff_llama_fields import padded_counts


def match_heads(costs: torch.Tensor, num_kv_heads: int) -> HeadPairing:
    """Returns the pairing of least total cost.

    KV heads form pairs by a minimum-weight perfect matching, exact because costs add up. The cost of a KV pair is
    that of the best assignment of its query heads, with the cheaper of the two as negative map. With as many KV heads
    as heads this is a matching of heads.

    Args:
        costs: (H, H); `costs[i, j]` is that of head i as positive map and head j as negative map.
        num_kv_heads: K.
    """
    num_heads = len(costs)
    group = num_heads // num_kv_heads
    blocks = costs.double().cpu().numpy().reshape(num_kv_heads, group, num_kv_heads, group)
    graph = networkx.Graph()
    assigned: dict[tuple[int, int], _Assignment] = {}
    for first in range(num_kv_heads):
        for second in range(first + 1, num_kv_heads):
            both = [_assign(blocks[a, :, b], a, b) for a, b in ((first, second), (second, first))]
            assigned[first, second] = min(both, key=lambda assignment: assignment.cost)
            graph.add_edge(first, second, weight=assigned[first, second].cost)
    kv_heads: list[int] = []
    query_heads: list[int] = []
    for first, second in sorted((min(edge), max(edge)) for edge in networkx.min_weight_matching(graph)):
        pair = assigned[first, second]
        kv_heads += [pair.positive, pair.negative]
        for i, j in enumerate(pair.partners):
            query_heads += [pair.positive * group + i, pair.negative * group + j]
    return HeadPairing(tuple(query_heads), tuple(kv_heads))


class _Assignment(NamedTuple):
    """Two KV heads, and for each query head of the positive one its partner, a query head of the negative one."""

    cost: float
    positive: int
    negative: int
    partners: list[int]


def _assign(block: numpy.ndarray, positive: int, negative: int) -> _Assignment:
    group = len(block)
    graph = networkx.Graph()
    graph.add_weighted_edges_from((i, group + j, float(block[i, j])) for i in range(group) for j in range(group))
    matched = sorted((min(edge), max(edge)) for edge in networkx.min_weight_matching(graph))
    partners = [place - group for _, place in matched]
    cost = float(block[range(group), partners].sum())
    return _Assignment(cost=cost, positive=positive, negative=negative, partners=partners)


class PairCosts:
    """
    Least-squares cost of every ordered pair of heads, from Gram matrices that are gathered sequence by sequence.

    With U_ik = A_i V_k, the output of the pair in LLaMA is E W, E = [U_i,k(i), U_j,k(j)] (N, 2d) and W = [W_i; W_j]
    (2d, C). A differential head has F = [U_i,k(i) - lambda U_j,k(i), U_i,k(j) - lambda U_j,k(j)] (N, 2d); the strict
    norm divides it by its own root mean square, per token. Cost: min over B of |E W - F B|^2.

    If the number of KV heads is odd, one idle KV head joins them. Its heads have the map and the values of the head
    that they pair with, and W_j = 0, so a head costs the same with any of them.

    Args:
        output_weight: LLaMA's o_proj.weight (C, H d).
        num_heads: H.
        num_kv_heads: K.
        diff_lambda: The lambda at which pairs are compared.
        strict: Whether the norm over heads is the paper's.
    """

    def __init__(
        self, output_weight: torch.Tensor, num_heads: int, num_kv_heads: int, diff_lambda: float, strict: bool
    ):
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.diff_lambda = diff_lambda
        self.strict = strict
        self.weights = output_weight.double().t().unflatten(0, (num_heads, -1))  # (H, d, C)
        self.num_padded, _ = padded_counts(num_heads, num_kv_heads)
        width = 4 * self.weights.shape[1]
        shape = (num_heads, num_heads + self.has_idle, width, width)  # the last one is with an idle head
        self.grams = torch.zeros(shape, dtype=torch.float64, device=output_weight.device)  # of [E, F]

    def partners(self, head: int) -> torch.Tensor:
        """Returns the heads (P,) that read another KV head than `head`."""
        group = self.num_heads // self.num_kv_heads
        others = [other for other in range(self.num_heads) if other // group != head // group]
        return torch.tensor(others, dtype=torch.long, device=self.grams.device)  # none where all read one

    def add(self, maps: torch.Tensor, values: torch.Tensor, token_weights: torch.Tensor) -> None:
        """Adds one sequence.

        Args:
            maps: LLaMA's attention maps (H, T, T).
            values: Its values (K, T, d).
            token_weights: Weight of each token (T,).
        """
        group = self.num_heads // self.num_kv_heads
        outputs = torch.einsum("hts,ksd->hktd", maps, values)  # (H, K, T, d)
        for i in range(self.num_heads):
            j = self.partners(i)  # (P,)
            own = i // group
            other = j // group  # (P,)
            exact = torch.cat((outputs[i, own].expand(len(j), -1, -1), outputs[j, other]), dim=-1)  # (P, T, 2d)
            first = outputs[i, own] - self.diff_lambda * outputs[j, own]
            second = outputs[i, other] - self.diff_lambda * outputs[j, other]
            offered = torch.cat((first, second), dim=-1)
            if self.has_idle:
                alone = outputs[i, own].repeat(1, 1, 2)  # (1, T, 2d)
                exact = torch.cat((exact, alone))
                offered = torch.cat((offered, (1 - self.diff_lambda) * alone))
            if self.strict:
                offered = offered / offered.square().mean(-1, keepdim=True).add(1e-5).sqrt()
            both = torch.cat((exact, offered), dim=-1)  # (P, T, 4d)
            # A sequence in float32, the sum over sequences in float64.
            self.grams[i, self._with_idle(j)] += (both * token_weights[:, None]).transpose(1, 2) @ both

    def costs(self, ridge: float = 1e-6) -> torch.Tensor:
        """Returns the costs (H, H), idle heads last; infinite for two heads of one KV head.

        Args:
            ridge: Of the least squares, over the mean of the Gram matrix's diagonal.
        """
        costs = torch.full((self.num_padded, self.num_padded), torch.inf, dtype=torch.float64)
        half = self.grams.shape[-1] // 2
        for i in range(self.num_heads):
            j = self.partners(i)
            gram = self.grams[i, self._with_idle(j)]
            exact = gram[:, :half, :half]
            cross = gram[:, :half, half:]
            offered = gram[:, half:, half:]
            floor = ridge * offered.diagonal(dim1=1, dim2=2).mean(-1) + torch.finfo(gram.dtype).tiny
            damped = offered + floor[:, None, None] * torch.eye(half).to(gram)
            explained = cross @ torch.linalg.solve(damped, cross.transpose(1, 2))
            others = self.weights[j]
            if self.has_idle:
                others = torch.cat((others, torch.zeros_like(self.weights[:1])))
            weights = torch.cat((self.weights[i].expand(len(others), -1, -1), others), dim=1)  # (P, 2d, C)
            unexplained = (exact - explained) * (weights @ weights.transpose(1, 2))
            found = unexplained.sum((1, 2)).clamp_min(0).cpu()
            costs[i, j.cpu()] = found[: len(j)]
            if self.has_idle:
                costs[i, self.num_heads :] = costs[self.num_heads :, i] = found[-1]
        return costs

    @property
    def has_idle(self) -> bool:
        """Whether an idle KV head is added."""
        return self.num_padded > self.num_heads

    def _with_idle(self, partners: torch.Tensor) -> torch.Tensor:
        return torch.cat((partners, partners.new_tensor([self.num_heads]))) if self.has_idle else partners
