"""
The stages of one layer that have a closed form: pairing, lambda, norm, o_proj, and values that carry the norm.

N tokens, C hidden, H differential heads, K KV heads, G heads per KV head, d map_dim, D = 2d head_dim.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from conversion.calibration.candidates import (
    HeadOutputs,
    Tokens,
    all_heads,
    left_over,
    of_differential,
    outputs_to_read,
    refitted,
    with_norm,
)
from conversion.calibration.pairing import PairCosts, match_heads
from conversion.calibration.problem import LayerProblem
from conversion.calibration.refit import NormalEquations
from conversion.calibration.streams import LayerWeights
from conversion.errors import ConversionError
from conversion.mapping.heads import HeadPairing
from modeling_diff.configuration_diff_llama import paper_lambda_init
from modeling_diff.diff_llama_fields import padded_counts


LAMBDA_GRID = (0.0, 0.02, 0.05, 0.1, 0.2)
PAIRING_LAMBDA = 0.05
OTHER_LAMBDA = 0.5  # next to 0: far enough that outputs of both, float32, tell the two maps apart
CARRIER_SHARES = (4.0, 25.0, 100.0)  # mean square of the carrier over that of the rest of the head's output
IDLE_SHARE = 1e-10  # of a value's largest mean square: directions below are of rounding alone
LINEAR_RIDGE = 1e-3
CONSTANT_RIDGE = 1e-4


def lambdas_to_try(
    choice: Literal["grid", "paper"] | float | Sequence[float], index: int, floor: float
) -> tuple[float, ...]:
    """Returns the values of lambda_init from which a layer's is chosen.

    Args:
        choice: As `calibrate` has it.
        index: Index of the layer.
        floor: Lowest value.

    Raises:
        ConversionError: A number is not from 0 to below 1, or is below `floor`.
    """
    if choice == "grid":
        return (floor, *(value for value in LAMBDA_GRID if value > floor))
    if choice == "paper":
        return (paper_lambda_init(index),)
    value = choice[index] if isinstance(choice, Sequence) else choice
    if isinstance(value, str) or not 0 <= value < 1:
        raise ConversionError(
            f'lambda_init {value!r}: expected "grid", "paper" or numbers from 0 to below 1, one for all layers or each'
        )
    if value < floor:
        raise ConversionError(
            f"--lambda-init {value} is below --lambda-floor {floor}, which keeps every layer of a calibrated V1 "
            f"differential; choose a larger one, or --lambda-floor {value} as well"
        )
    return (float(value),)


def choose_pairing(problem: LayerProblem) -> HeadPairing:
    """Returns the pairing of least cost on a sample of the text, by `PairCosts`, unless one is given."""
    if problem.pairing is not None:
        return problem.pairing
    config = problem.llama.config
    costs = PairCosts(
        problem.tensors["self_attn.o_proj.weight"],
        config.num_attention_heads,
        config.num_key_value_heads,
        diff_lambda=min(problem.lambdas, key=lambda value: abs(value - PAIRING_LAMBDA)),
        strict=problem.norm == "strict",
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
    """Returns the permuted copy with the lambda of `problem.lambdas` that leaves least.

    Heads' outputs are linear in lambda, so those of two lambdas give those of all.

    Args:
        problem: The layer.
        pairing: Which heads become one.
        refit: Whether o_proj is fitted to a sample before a lambda is judged.
    """
    start = problem.start(pairing, problem.lambdas[0])
    if len(problem.lambdas) == 1:
        return with_norm(problem, start, HeadOutputs.gather(problem, start).mean_square)
    without = HeadOutputs.gather(problem, start.replaced({}, lambda_init=0.0))
    other = HeadOutputs.gather(problem, start.replaced({}, lambda_init=OTHER_LAMBDA))
    best = start
    least = math.inf
    for value in problem.lambdas:
        outputs = without.mixed(other, value / OTHER_LAMBDA)
        tried = with_norm(problem, start.replaced({}, lambda_init=value), outputs.mean_square)
        left = left_over(problem, tried, outputs, refit)
        if left < least:
            best = tried
            least = left
    return best


def refit_outputs(problem: LayerProblem, weights: LayerWeights) -> LayerWeights:
    """Returns the weights with o_proj fitted by ridge least squares on all training sequences."""

    def tokens(rows: slice) -> Tokens:
        for chunk in problem.attend(weights, rows, "o_proj"):
            yield chunk.inputs["o_proj"], chunk.targets, chunk.token_weights

    solution = refitted(weights, tokens(problem.training_rows), tokens(problem.validation_rows))
    return weights.replaced(tensors={"o_proj.weight": solution})


def refit_values(problem: LayerProblem, weights: LayerWeights) -> LayerWeights:
    """
    Returns the weights with values in a basis in which the norm is nearly linear, and o_proj fitted again.

    The norm divides a head's output by its length, which is then lost. The least important of the D directions of a
    value is replaced by a carrier: the combination of the layer's input that is closest to a constant. Averaged by
    any map it stays constant; where it dominates the head's length, the norm is nearly linear. How far it should
    dominate depends on how constant it is, and is chosen on a sample. With a bias it is constant.

    Only values that differential heads alone read can change their basis: of LLaMA's heads each needs its own half.
    """
    differential = set(range(weights.pairing.num_heads)) - set(weights.kept_heads)
    groups = weights.pairing.groups
    carried = [kv_head for kv_head, heads in enumerate(groups) if differential.issuperset(heads)]
    if not carried:
        return weights
    values = weights.tensors["v_proj.weight"]  # (K D, C)
    bias = weights.tensors.get("v_proj.bias")
    head_dim = len(weights.tensors["sub_norm.weight"])
    linear, carrier = _linear_and_constant(problem, weights)
    if bias is not None:
        values = torch.cat((values, bias[:, None]), dim=1)  # (K D, C + 1)
        carrier = torch.zeros_like(values[0], dtype=torch.float64)
        carrier[-1] = 1
    rows = values.unflatten(0, (-1, head_dim))
    group = len(groups[0])
    # What o_proj would be without a norm: it weighs the directions of a value.
    importance = linear.solve(LINEAR_RIDGE).unflatten(0, (len(rows), group, head_dim))  # (K, G, D, C)
    num_outputs = problem.streams.converted[problem.training_rows][..., 0].numel() * group
    moments = head_moments(linear, len(rows), head_dim) / num_outputs
    new = rows.double()  # (K, D, C)
    carried = [head for head in carried if moments[head].any()]  # a value that is always 0 loses nothing as it is
    if not carried:
        return weights
    for head in carried:
        basis, power = kept_directions(moments[head], importance[head])
        # The carrier last, with as much power as the rest of the value.
        new[head] = torch.cat((basis.t() @ new[head], power**0.5 * carrier[None]))
    outputs = HeadOutputs.gather(problem, _with_values(weights, new.flatten(0, 1)))
    best = weights
    least = math.inf
    for share in CARRIER_SHARES:
        scale = torch.ones(len(groups), head_dim, dtype=new.dtype, device=new.device)  # (K, D)
        scale[carried, -1] = share**0.5
        by_head = scale.repeat_interleave(group, 0)[sorted(differential)]  # (F, D)
        scaled = outputs.scaled(by_head.float())
        scaled_rows = (new * scale[..., None]).flatten(0, 1)
        tried = with_norm(problem, _with_values(weights, scaled_rows), scaled.mean_square)
        left = left_over(problem, tried, scaled, refit=True)
        if left < least:
            best = tried
            least = left
    return refit_outputs(problem, best)


def _with_values(weights: LayerWeights, values: torch.Tensor) -> LayerWeights:
    """Returns the weights with `values` (K D, C), or (K D, C + 1) with the bias as the last column."""
    values = values.to(weights.tensors["v_proj.weight"].dtype)
    if "v_proj.bias" not in weights.tensors:
        return weights.replaced({"v_proj.weight": values})
    return weights.replaced({"v_proj.weight": values[:, :-1].contiguous(), "v_proj.bias": values[:, -1].clone()})


def _linear_and_constant(problem: LayerProblem, weights: LayerWeights) -> tuple[NormalEquations, torch.Tensor]:
    """
    Returns sums over heads' outputs, those of differential heads before the norm, and the u (C,) for which u . x is
    nearest to 1, where x is the input of the projections.
    """
    hidden, width = weights.tensors["o_proj.weight"].shape
    linear = NormalEquations(width, hidden, problem.llama.device)
    constant = NormalEquations(weights.tensors["v_proj.weight"].shape[1], 1, problem.llama.device)
    bias = weights.tensors.get("o_proj.bias", 0.0)
    for chunk in problem.attend(weights, problem.training_rows, "v_proj", *outputs_to_read(weights)):
        differential = of_differential(weights, chunk.inputs["sub_norm"])
        outputs = all_heads(weights, differential, chunk.inputs.get("o_proj"))
        linear.add(outputs, chunk.targets - bias, chunk.token_weights)
        ones = torch.ones_like(chunk.token_weights)
        constant.add(chunk.inputs["v_proj"], ones[:, None], ones)
    return linear, constant.solve(CONSTANT_RIDGE)[:, 0]


def head_moments(sums: NormalEquations, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """Returns the sum of o o' over tokens and the heads of each KV head (K, D, D).

    Args:
        sums: Over heads' outputs; the result adds blocks on the diagonal of its Gram matrix.
        num_kv_heads: K.
        head_dim: D.
    """
    blocks = sums.gram.unflatten(1, (-1, head_dim)).unflatten(0, (-1, head_dim)).diagonal(dim1=0, dim2=2)  # (D, D, H)
    return blocks.permute(2, 0, 1).unflatten(0, (num_kv_heads, -1)).sum(1)


def kept_directions(moment: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Chooses the directions of a value that matter most.

    With S = E[o o'] and Q the sum of W W' over the heads, o -> W' o loses least, in the mean square, if the direction
    of the smallest eigenvalue of S^1/2 Q S^1/2 is dropped. Directions in which no value varies, as next to an idle
    head, get columns of zeros: what rounding leaves there would come back through a huge o_proj.

    Args:
        moment: S, (D, D).
        outputs: W of each head, (G, D, C).

    Returns:
        A basis (D, D - 1), each direction scaled by its importance, and the sum of their mean squares.
    """
    values, vectors = torch.linalg.eigh(moment)
    varies = values > values[-1] * IDLE_SHARE
    root = vectors[:, varies] * values[varies].sqrt()  # (D, R), S = root root'
    inverse_root = vectors[:, varies] / values[varies].sqrt()
    matters, directions = torch.linalg.eigh(root.t() @ torch.einsum("gdc,gec->de", outputs, outputs) @ root)
    num_kept = min(len(matters), len(values) - 1)
    scale = matters[-num_kept:].clamp_min(matters[-1] * 1e-6).sqrt()
    basis = inverse_root @ (directions[:, -num_kept:] * scale)
    idle = basis.new_zeros(len(values), len(values) - 1 - num_kept)
    return torch.cat((idle, basis), dim=1), float(scale.square().sum())
