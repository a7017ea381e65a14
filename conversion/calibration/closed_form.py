"""
The stages of one layer that have a closed form: pairing, lambda, norm, o_proj, and values that carry the norm.

R rows, T tokens a row, N tokens, C hidden, H differential heads, K KV heads, d map_dim, D = 2d head_dim.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from conversion.calibration.pairing import PairCosts, match_heads
from conversion.calibration.refit import NormalEquations, ridge_refit
from conversion.calibration.streams import (
    NEUTRAL_EPS,
    STRICT_EPS,
    LayerWeights,
    LlamaLayers,
    Streams,
    chunks,
    copied_weights,
    inputs_of,
    precision,
)
from conversion.mapping.heads import HeadPairing, padded_counts
from modeling_diff.modeling_diff_llama import DiffLlamaDecoderLayer


Norm = Literal["strict", "neutral"]
LAMBDA_GRID = (0.0, 0.02, 0.05, 0.1, 0.2)
PAIRING_LAMBDA = 0.05
RIDGES = (1e-5, 1e-3, 1e-1)
SAMPLE_TOKENS = 8192  # enough for a choice among a few candidates
CARRIER_SHARES = (4.0, 25.0, 100.0)  # mean square of the carrier over that of the rest of the head's output


@dataclass
class LayerProblem:
    """One layer to be fitted: LLaMA's layer and tensors, the streams around it, and which rows judge the outcome."""

    index: int
    llama: LlamaLayers
    tensors: Mapping[str, torch.Tensor]
    layer: LlamaDecoderLayer
    streams: Streams
    seed: int
    norm: Norm
    lambdas: tuple[float, ...]
    num_validation_rows: int
    token_weights: torch.Tensor = field(init=False)  # (R, T): one over the mean square, as the next norm divides by it

    def __post_init__(self) -> None:
        self.token_weights = 1 / self.streams.after_layer.square().mean(-1).add(1e-6)

    @property
    def training_rows(self) -> slice:
        return slice(self.num_validation_rows, None)

    @property
    def validation_rows(self) -> slice:
        return slice(0, self.num_validation_rows)

    @property
    def sample_rows(self) -> slice:
        num_tokens = self.streams.converted.shape[1]
        return slice(self.num_validation_rows, self.num_validation_rows + max(2, SAMPLE_TOKENS // num_tokens))

    def diff_layer(self, weights: LayerWeights) -> DiffLlamaDecoderLayer:
        return self.llama.diff_layer(self.index, self.tensors, weights)

    def start(self, pairing: HeadPairing, lambda_init: float) -> LayerWeights:
        """The permuted copy, its norm calibrated."""
        weights = copied_weights(self.tensors, self.llama.config, pairing, lambda_init, self.seed * 1000 + self.index)
        return calibrate_norm(self, weights)

    @torch.no_grad()
    def attend(
        self, weights: LayerWeights, rows: slice, module: str
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """
        What enters `module` of the converted attention, in chunks: inputs (N, F), targets (N, C), weights (N,).

        The target is what the attention must add to the converted stream to end where LLaMA's is.
        """
        layer = self.diff_layer(weights)
        states, after = self.streams.converted[rows], self.streams.after_attention[rows]
        token_weights = self.token_weights[rows]
        positions = torch.arange(states.shape[1], device=states.device)[None]
        rotated = self.llama.rotary(states[:1], positions)
        with inputs_of(layer.self_attn.get_submodule(module)) as inputs, precision(self.llama.device):
            for part in chunks(*states.shape[:2]):
                layer.self_attn(layer.input_layernorm(states[part]), position_embeddings=rotated)
                seen, target = inputs(), after[part] - states[part]
                yield (
                    seen.reshape(target.numel() // target.shape[-1], -1),
                    target.flatten(0, 1),
                    token_weights[part].flatten(),
                )

    @torch.no_grad()
    def residual(self, weights: LayerWeights, rows: slice | None = None) -> float:
        """Mean square distance of the converted stream to LLaMA's after the layer, relative, token by token."""
        layer = self.diff_layer(weights)
        rows = self.validation_rows if rows is None else rows
        states, target, token_weights = (
            tensor[rows] for tensor in (self.streams.converted, self.streams.after_layer, self.token_weights)
        )
        total = 0.0
        for part in chunks(*states.shape[:2]):
            error = self.llama.run(layer, states[part]) - target[part]
            total += float((error.square().mean(-1) * token_weights[part]).double().sum())
        return total / token_weights.numel()


def calibrate_norm(problem: LayerProblem, weights: LayerWeights) -> LayerWeights:
    """
    `sub_norm.weight` such that heads keep their mean square s^2, and a pair of equal maps its output.

    N(u) = u sqrt((eps + s^2) / (eps + ms(u))); with eps >> s^2 this is the identity. The weight undoes
    1 - lambda_init as well, and 1 - lambda, by which equal maps shrink.
    """
    square, count = 0.0, 0
    for outputs, _, _ in problem.attend(weights, problem.sample_rows, "sub_norm"):
        square += float(outputs.double().square().sum())
        count += outputs.numel()
    mean_square = max(square / count, 1e-12)
    eps = NEUTRAL_EPS * mean_square if problem.norm == "neutral" else STRICT_EPS
    scale = (eps + mean_square) ** 0.5 / (1 - weights.lambda_init) ** 2
    return weights.replaced(
        sub_norm_eps=eps, tensors={"sub_norm.weight": torch.full_like(weights.tensors["sub_norm.weight"], scale)}
    )


def choose_pairing(problem: LayerProblem) -> HeadPairing:
    """The heads that cost least together on a sample of the text (`PairCosts`)."""
    config = problem.llama.config
    costs = PairCosts(
        problem.tensors["self_attn.o_proj.weight"],
        config.num_attention_heads,
        config.num_key_value_heads,
        min(problem.lambdas, key=lambda value: abs(value - PAIRING_LAMBDA)),
        problem.norm == "strict",
    )
    attention = problem.layer.self_attn
    with torch.no_grad():
        for row in range(*problem.sample_rows.indices(len(problem.streams.original))):
            states = problem.streams.original[row : row + 1]
            maps = problem.llama.attention_maps(problem.layer, states)[0]
            values = attention.v_proj(problem.layer.input_layernorm(states))[0].unflatten(-1, (-1, config.head_dim))
            costs.add(maps, values.transpose(0, 1), problem.token_weights[row])
    return match_heads(costs.costs(), padded_counts(config.num_attention_heads, config.num_key_value_heads)[1])


def choose_lambda(problem: LayerProblem, pairing: HeadPairing, refit: bool) -> LayerWeights:
    """The permuted copy with the lambda that leaves least: after a refit of o_proj on a sample, or without one."""

    def left_over(weights: LayerWeights) -> float:
        tried = refit_outputs(problem, weights, problem.sample_rows) if refit else weights
        return problem.residual(tried)

    starts = [problem.start(pairing, value) for value in problem.lambdas]
    return min(starts, key=left_over) if len(starts) > 1 else starts[0]


def refit_outputs(problem: LayerProblem, weights: LayerWeights, rows: slice | None = None) -> LayerWeights:
    """o_proj by ridge least squares on the converted stream; the old one stays where nothing better generalises."""
    old = weights.tensors["o_proj.weight"]  # (C, H D)
    fitted, judging = (NormalEquations(old.shape[1], old.shape[0], old.device) for _ in range(2))
    bias = weights.tensors.get("o_proj.bias", 0.0)
    for equations, part in ((fitted, rows or problem.training_rows), (judging, problem.validation_rows)):
        for features, targets, token_weights in problem.attend(weights, part, "o_proj"):
            equations.add(features, targets - bias, token_weights)
    solution, _ = ridge_refit(fitted, judging, old.t(), RIDGES)
    return weights.replaced(tensors={"o_proj.weight": solution.t().to(old.dtype).contiguous()})


def refit_values(problem: LayerProblem, weights: LayerWeights) -> LayerWeights:
    """
    Values in a basis in which the norm hardly bends the output, then o_proj once more.

    The norm divides a head's output by its length and so forgets it. The least important of the D directions of a
    value is given up for a carrier: the combination of the layer's input that comes closest to a constant. Averaged
    by any map it stays constant, it outweighs the rest in the head's length, and the norm is nearly linear. By how
    much it should outweigh depends on how constant it is, and is tried out on a sample. With a bias it is constant.
    """
    values = weights.tensors["v_proj.weight"]  # (K D, C)
    bias = weights.tensors.get("v_proj.bias")
    head_dim = len(weights.tensors["sub_norm.weight"])
    moments = _second_moments(problem, weights, head_dim)
    if bias is None:
        carrier = _constant_direction(problem, weights)  # (C,)
    else:
        values = torch.cat((values, bias[:, None]), dim=1)  # (K D, C + 1)
        carrier = torch.zeros_like(values[0], dtype=torch.float64)
        carrier[-1] = 1
    linear = _linear_outputs(problem, weights)  # (C, H D): o_proj if there were no norm
    rows = values.unflatten(0, (-1, head_dim))
    group = linear.shape[1] // head_dim // len(rows)
    importance = linear.double().t().unflatten(0, (len(rows), group, head_dim))  # (K, G, D, C)
    kept = [_kept_directions(moment, importance[head]) for head, moment in enumerate(moments)]

    def carried(share: float) -> LayerWeights:
        new_rows = []
        for head, (basis, power) in enumerate(kept):
            level = (share * power) ** 0.5
            new_rows.append(torch.cat((basis.t() @ rows[head].double(), level * carrier[None])))
        new = torch.stack(new_rows).flatten(0, 1).to(values.dtype)
        tensors = {"v_proj.weight": new}
        if bias is not None:
            tensors = {"v_proj.weight": new[:, :-1].contiguous(), "v_proj.bias": new[:, -1].clone()}
        return calibrate_norm(problem, weights.replaced(tensors=tensors))

    tried = [carried(share) for share in CARRIER_SHARES]
    best = min(tried, key=lambda weights: problem.residual(refit_outputs(problem, weights, problem.sample_rows)))
    return refit_outputs(problem, best)


def _second_moments(problem: LayerProblem, weights: LayerWeights, head_dim: int) -> torch.Tensor:
    """Mean of o o' over tokens and the heads of each KV head, before the norm: (K, D, D)."""
    num_kv_heads = len(weights.tensors["v_proj.weight"]) // head_dim
    total = torch.zeros(num_kv_heads, head_dim, head_dim, dtype=torch.float64, device=problem.llama.device)
    count = 0
    for seen, _, token_weights in problem.attend(weights, problem.training_rows, "sub_norm"):
        heads = seen.double().reshape(len(token_weights), num_kv_heads, -1, head_dim)  # (N, K, G, D)
        total += torch.einsum("nkgd,nkge,n->kde", heads, heads, token_weights.double())
        count += heads.shape[0] * heads.shape[2]
    return total / count


def _constant_direction(problem: LayerProblem, weights: LayerWeights) -> torch.Tensor:
    """u (C,) for which u . x is as near to 1 as can be, x what enters the projections."""
    num_features = weights.tensors["v_proj.weight"].shape[1]
    sums = NormalEquations(num_features, 1, problem.llama.device)
    for seen, _, token_weights in problem.attend(weights, problem.training_rows, "v_proj"):
        sums.add(seen, torch.ones(len(seen), 1, device=seen.device), torch.ones_like(token_weights))
    return sums.solve(1e-4)[:, 0]


def _linear_outputs(problem: LayerProblem, weights: LayerWeights) -> torch.Tensor:
    old = weights.tensors["o_proj.weight"]
    sums = NormalEquations(old.shape[1], old.shape[0], old.device)
    for seen, targets, token_weights in problem.attend(weights, problem.training_rows, "sub_norm"):
        sums.add(
            seen.reshape(len(token_weights), -1), targets - weights.tensors.get("o_proj.bias", 0.0), token_weights
        )
    return sums.solve(1e-3).t()


def _kept_directions(moment: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, float]:
    """
    Basis (D, D - 1) of the outputs that matter most, each scaled by what it matters, and their mean square sum.

    With S = E[o o'] (D, D) and Q the sum of W W' over the heads, o -> W' o loses least, in the mean square, if the
    smallest eigenvalue of S^1/2 Q S^1/2 is given up.
    """
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(values[-1] * 1e-10)
    root = vectors * values.sqrt() @ vectors.t()
    inverse_root = vectors / values.sqrt() @ vectors.t()
    matters, directions = torch.linalg.eigh(root @ torch.einsum("gdc,gec->de", outputs, outputs) @ root)
    scale = matters[1:].clamp_min(matters[-1] * 1e-6).sqrt()
    basis = inverse_root @ (directions[:, 1:] * scale)
    return basis, float(scale.square().sum())
