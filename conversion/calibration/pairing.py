"""
Which LLaMA heads become one differential head: the cost of every pair, and the matching that costs least.

H LLaMA heads, K LLaMA KV heads, P partners of a head, N tokens, T tokens a row, d map_dim, C hidden.
"""

from typing import NamedTuple

import networkx
import numpy
import torch

from conversion.mapping.heads import HeadPairing, padded_counts


def match_heads(costs: torch.Tensor, num_kv_heads: int) -> HeadPairing:
    """
    The pairing of least total cost; `costs[i, j]` (H, H) is that of head i as positive and j as subtracted map.

    KV heads form pairs by a minimum-weight perfect matching, exact because costs add up. The cost of a KV pair is
    that of the best assignment of its query heads, and its role (which of the two is subtracted) the cheaper one.
    With as many KV heads as heads this is a matching of heads.
    """
    num_heads = len(costs)
    group = num_heads // num_kv_heads
    blocks = costs.double().cpu().numpy().reshape(num_kv_heads, group, num_kv_heads, group)
    graph = networkx.Graph()
    assigned = {}
    for first in range(num_kv_heads):
        for second in range(first + 1, num_kv_heads):
            roles = [_assign(blocks[a, :, b], a, b) for a, b in ((first, second), (second, first))]
            assigned[first, second] = min(roles, key=lambda role: role.cost)
            graph.add_edge(first, second, weight=assigned[first, second].cost)
    kv_heads: list[int] = []
    query_heads: list[int] = []
    for first, second in sorted((min(edge), max(edge)) for edge in networkx.min_weight_matching(graph)):
        role = assigned[first, second]
        kv_heads += [role.positive, role.subtracted]
        for row, column in enumerate(role.columns):
            query_heads += [role.positive * group + row, role.subtracted * group + column]
    return HeadPairing(tuple(query_heads), tuple(kv_heads))


class _Role(NamedTuple):
    """Two KV heads, which of them is subtracted, and the query head of that one for each of the other."""

    cost: float
    positive: int
    subtracted: int
    columns: list[int]


def _assign(block: numpy.ndarray, positive: int, subtracted: int) -> _Role:
    group = len(block)
    graph = networkx.Graph()
    graph.add_weighted_edges_from((i, group + j, float(block[i, j])) for i in range(group) for j in range(group))
    matched = sorted((min(edge), max(edge)) for edge in networkx.min_weight_matching(graph))
    columns = [place - group for _, place in matched]
    return _Role(float(block[range(group), columns].sum()), positive, subtracted, columns)


class PairCosts:
    """
    Least-squares cost of every ordered pair of heads, from Gram matrices gathered row by row of the calibration text.

    With U_ik = A_i V_k, what the pair gives in LLaMA is E W, E = [U_i,k(i), U_j,k(j)] (N, 2d) and W = [W_i; W_j]
    (2d, C); what a differential head offers is F = [U_i,k(i) - lambda U_j,k(i), U_i,k(j) - lambda U_j,k(j)] (N, 2d),
    under the strict norm divided by its own rms, token by token. Cost: min over B of |E W - F B|^2.

    Where KV heads are odd in number, one idle KV head joins them. Its heads have the map and the values of whatever
    head they pair with, and W_j = 0, so a head costs the same with any of them.
    """

    def __init__(
        self, output_weight: torch.Tensor, num_heads: int, num_kv_heads: int, diff_lambda: float, strict: bool
    ):
        """`output_weight` is LLaMA's o_proj.weight (C, H d)."""
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.diff_lambda, self.strict = diff_lambda, strict
        self.weights = output_weight.double().t().unflatten(0, (num_heads, -1))  # (H, d, C)
        self.num_padded, _ = padded_counts(num_heads, num_kv_heads)
        width = 4 * self.weights.shape[1]
        shape = (num_heads, num_heads + self.has_idle, width, width)  # the last one is with an idle head
        self.grams = torch.zeros(shape, dtype=torch.float64, device=output_weight.device)  # of [E, F]

    def partners(self, head: int) -> torch.Tensor:
        """The heads that read another KV head."""
        group = self.num_heads // self.num_kv_heads
        others = [other for other in range(self.num_heads) if other // group != head // group]
        return torch.tensor(others, device=self.grams.device)

    def add(self, maps: torch.Tensor, values: torch.Tensor, token_weights: torch.Tensor) -> None:
        """One row of text: LLaMA's `maps` (H, T, T), `values` (K, T, d), and the weight of each token (T,)."""
        group = self.num_heads // self.num_kv_heads
        outputs = torch.einsum("hts,ksd->hktd", maps, values)  # (H, K, T, d)
        for i in range(self.num_heads):
            j = self.partners(i)  # (P,)
            own, other = i // group, j // group
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
            # a row in float32, the sum of rows in float64
            self.grams[i, self._with_idle(j)] += (both * token_weights[:, None]).transpose(1, 2) @ both

    def costs(self, ridge: float = 1e-6) -> torch.Tensor:
        """(H, H), idle heads last; infinite for a head with itself or with one of its own KV head."""
        costs = torch.full((self.num_padded, self.num_padded), torch.inf, dtype=torch.float64)
        half = self.grams.shape[-1] // 2
        for i in range(self.num_heads):
            j = self.partners(i)
            gram = self.grams[i, self._with_idle(j)]
            exact, cross, offered = gram[:, :half, :half], gram[:, :half, half:], gram[:, half:, half:]
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
        return self.num_padded > self.num_heads

    def _with_idle(self, partners: torch.Tensor) -> torch.Tensor:
        return torch.cat((partners, partners.new_tensor([self.num_heads]))) if self.has_idle else partners
