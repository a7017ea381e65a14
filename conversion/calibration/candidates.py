"""
Candidates for a layer, judged from heads' outputs that are computed once: all candidates have the same attention
maps, and the norm, o_proj and the MLP follow from these outputs.

N tokens, H heads, F of which are differential, D head_dim, C hidden.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from conversion.calibration.problem import AttentionInputs, LayerProblem
from conversion.calibration.refit import NormalEquations, ridge_refit
from conversion.calibration.streams import NEUTRAL_RATIO, LayerWeights, precision
from conversion.options import STRICT_EPS


RIDGES = (1e-5, 1e-3, 1e-1)


@dataclass(frozen=True)
class HeadOutputs:
    """Outputs of differential heads before the norm (N, F D), with their targets and weights.

    Where other heads stay LLaMA's, what enters o_proj (N, H D) is there as well, for theirs.

    Attributes:
        fitted: Of the sample that a candidate is fitted on.
        judging: Of the held-back sequences, which judge it.
    """

    fitted: AttentionInputs
    judging: AttentionInputs

    @classmethod
    def gather(cls, problem: LayerProblem, weights: LayerWeights) -> "HeadOutputs":
        """Computes the outputs of the heads that `weights` make."""
        parts = []
        for rows in (problem.sample_rows, problem.validation_rows):
            chunks = list(problem.attend(weights, rows, *outputs_to_read(weights)))
            inputs = {name: torch.cat([chunk.inputs[name] for chunk in chunks]) for name in chunks[0].inputs}
            inputs["sub_norm"] = of_differential(weights, inputs["sub_norm"])
            targets = torch.cat([chunk.targets for chunk in chunks])
            token_weights = torch.cat([chunk.token_weights for chunk in chunks])
            parts.append(AttentionInputs(inputs, targets, token_weights))
        return cls(*parts)

    @property
    def mean_square(self) -> float:
        """Mean square of the outputs on the sample, over tokens and components."""
        outputs = self.fitted.inputs["sub_norm"]
        return float(outputs.square().sum(-1).double().sum()) / outputs.numel()

    def mixed(self, other: "HeadOutputs", share: float) -> "HeadOutputs":
        """Returns (1 - share) times these outputs plus `share` times the other's."""

        def mix(ours: AttentionInputs, theirs: AttentionInputs) -> AttentionInputs:
            outputs = torch.lerp(ours.inputs["sub_norm"], theirs.inputs["sub_norm"], share)
            return ours._replace(inputs={**ours.inputs, "sub_norm": outputs})

        return HeadOutputs(mix(self.fitted, other.fitted), mix(self.judging, other.judging))

    def scaled(self, scale: torch.Tensor) -> "HeadOutputs":
        """Returns the outputs with the components of differential heads scaled by `scale` (F, D)."""

        def multiplied(part: AttentionInputs) -> AttentionInputs:
            return part._replace(inputs={**part.inputs, "sub_norm": part.inputs["sub_norm"] * scale.flatten()})

        return replace(self, fitted=multiplied(self.fitted), judging=multiplied(self.judging))


def with_norm(problem: LayerProblem, weights: LayerWeights, mean_square: float) -> LayerWeights:
    """Returns the weights with a `sub_norm.weight` for which heads keep their mean square.

    N(u) = u sqrt((eps + s^2) / (eps + ms(u))), s^2 the mean square; with eps >> s^2 this is the identity. The weight
    also undoes 1 - lambda_init, and 1 - lambda, by which the output of two equal maps shrinks.

    Args:
        problem: The layer.
        weights: Its attention.
        mean_square: s^2 of the differential heads' outputs before the norm.
    """
    mean_square = max(mean_square, 1e-12)
    eps = NEUTRAL_RATIO * mean_square if problem.norm == "neutral" else STRICT_EPS
    scale = (eps + mean_square) ** 0.5 / (1 - weights.lambda_init) ** 2
    return weights.replaced(
        sub_norm_eps=eps, tensors={"sub_norm.weight": torch.full_like(weights.tensors["sub_norm.weight"], scale)}
    )


@torch.no_grad()
def left_over(problem: LayerProblem, weights: LayerWeights, outputs: HeadOutputs, refit: bool) -> float:
    """Returns `LayerProblem.distance` on the held-back sequences.

    Args:
        problem: The layer.
        weights: Its attention.
        outputs: Outputs of its heads before the norm.
        refit: Whether o_proj is first fitted to the sample.
    """
    layer = problem.diff_layer(weights)
    attention: Any = layer.self_attn
    head_dim = len(weights.tensors["sub_norm.weight"])

    def normalized(part: AttentionInputs) -> torch.Tensor:
        heads = attention.normalize(part.inputs["sub_norm"].unflatten(-1, (-1, head_dim))).flatten(-2)
        return all_heads(weights, heads, part.inputs.get("o_proj"))

    if refit:
        parts = [[(normalized(part), part.targets, part.token_weights)] for part in (outputs.fitted, outputs.judging)]
        attention.o_proj.weight.copy_(refitted(weights, *parts))
    states = problem.streams.converted[problem.validation_rows]
    with precision(problem.llama.device):
        after_attention = states + attention.o_proj(normalized(outputs.judging)).view_as(states)
        reached = after_attention + layer.mlp(layer.post_attention_layernorm(after_attention))
    return problem.distance(reached.float(), problem.validation_rows)


def outputs_to_read(weights: LayerWeights) -> tuple[str, ...]:
    """Returns the modules whose inputs are heads' outputs: before the norm, and of heads that stay LLaMA's."""
    return ("sub_norm", "o_proj") if weights.kept_heads else ("sub_norm",)


def of_differential(weights: LayerWeights, outputs: torch.Tensor) -> torch.Tensor:
    """Returns the part (N, F D) of all heads' outputs (N, H D) that is of differential heads."""
    if not weights.kept_heads:
        return outputs
    return outputs.unflatten(-1, (weights.pairing.num_heads, -1))[..., list(weights.heads or ()), :].flatten(-2)


def all_heads(weights: LayerWeights, differential: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Returns all heads' outputs (N, H D).

    Args:
        weights: The attention.
        differential: Those of differential heads (N, F D).
        kept: Those of all heads (N, H D), of which the heads that stay LLaMA's are taken; None if there are none.
    """
    if not weights.kept_heads:
        return differential
    assert kept is not None
    heads = kept.unflatten(-1, (weights.pairing.num_heads, -1)).clone()
    heads[:, list(weights.heads or ())] = differential.unflatten(-1, (-1, heads.shape[-1]))
    return heads.flatten(-2)


Tokens = Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # features (N, H D), targets (N, C), weights (N,)


def refitted(weights: LayerWeights, fitted: Tokens, judging: Tokens) -> torch.Tensor:
    """Returns o_proj (C, H D) by ridge least squares; the old one if no ridge does better on `judging`.

    Args:
        weights: The attention that has the old one.
        fitted: Tokens to fit, chunk by chunk.
        judging: Tokens that choose the ridge.
    """
    old = weights.tensors["o_proj.weight"]
    bias = weights.tensors.get("o_proj.bias", 0.0)
    sums = []
    for tokens in (fitted, judging):
        equations = NormalEquations(old.shape[1], old.shape[0], old.device)
        for features, targets, token_weights in tokens:
            equations.add(features, targets - bias, token_weights)
        sums.append(equations)
    solution, _ = ridge_refit(sums[0], sums[1], old.t(), RIDGES)
    return solution.t().to(old.dtype).contiguous()
