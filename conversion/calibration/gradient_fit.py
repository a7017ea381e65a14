"""
Gradient descent on one layer's attention parameters, against LLaMA's stream after that layer.

R rows, T tokens a row, C hidden.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from conversion.calibration.closed_form import LayerProblem
from conversion.calibration.streams import LayerWeights
from conversion.options import LAMBDA_FLOOR
from modeling_diff.modeling_diff_llama import DiffLambda, DiffLlamaDecoderLayer


@dataclass(frozen=True)
class LocalFit:
    """
    How long, how fast, and how far down lambda may go.

    Rates are relative to the root mean square of a parameter's median row (a tenth of that for vectors), so they suit
    any model; that of the lambda vectors is absolute, as they start at 0.1. `lambda_floor` holds in every stage of a
    calibration, in this one after every step.
    """

    steps: int = 200
    batch_tokens: int = 4096
    learning_rate: float = 0.3
    lambda_learning_rate: float = 2e-3
    warmup_steps: int = 10
    lambda_floor: float = LAMBDA_FLOOR


def fit_layer(
    problem: LayerProblem, weights: LayerWeights, options: LocalFit, progress: Callable[[int], None]
) -> LayerWeights:
    """
    The weights after `options.steps` steps, lambda held at its floor; whether they are better, the caller sees.

    What lambda became is its new constant part, and its vectors are those of the start, whose exponentials cancel:
    the fit leaves them of very unequal lengths, and healing would move lambda by leaps.
    """
    # Its package takes seconds to import.
    from modeling_diff.training.lambda_values import hold_lambda, layer_lambda

    layer = problem.diff_layer(weights)
    attention = layer.self_attn.requires_grad_(True)
    diff_lambda = attention.get_submodule("diff_lambda")
    assert isinstance(diff_lambda, DiffLambda)
    optimizers = build_optimizers(attention, options)
    generator = torch.Generator().manual_seed(problem.seed)
    batches = row_batches(problem, options.batch_tokens, generator)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    for step in range(options.steps):
        factor = rate_factor(step, options)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = batch_loss(problem, layer, next(batches))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        hold_lambda(diff_lambda, options.lambda_floor)
        progress(step + 1)
    tensors = {name: tensor.detach().clone() for name, tensor in attention.state_dict().items()}
    lambda_init = layer_lambda(diff_lambda)
    if not 0 <= lambda_init < 1:
        return weights.replaced(tensors)
    tensors |= {name: tensor for name, tensor in weights.tensors.items() if name.startswith("diff_lambda")}
    tensors["sub_norm.weight"] *= (1 - weights.lambda_init) / (1 - lambda_init)
    return weights.replaced(tensors, lambda_init=lambda_init)


def build_optimizers(attention: nn.Module, options: LocalFit) -> list[torch.optim.Optimizer]:
    """Muon for matrices, which got further in equally many steps than Adam at any rate; Adam for the rest."""
    lambdas = list(attention.get_submodule("diff_lambda").parameters())
    vectors = [{"params": lambdas, "lr": options.lambda_learning_rate}]
    matrices = []
    for name, parameter in attention.named_parameters():
        if name.startswith("diff_lambda"):
            continue
        # The median row, as the rows of a value that carry its norm are larger than the rest.
        rows = parameter.detach().flatten(1) if parameter.dim() > 1 else parameter.detach()[None]
        rate = options.learning_rate * max(float(rows.square().mean(1).sqrt().median()), 1e-4)
        if parameter.dim() == 2:
            matrices.append({"params": [parameter], "lr": rate})
        else:
            vectors.append({"params": [parameter], "lr": rate / 10})
    return [
        torch.optim.Adam(vectors, betas=(0.9, 0.95)),
        torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    ]


def rate_factor(step: int, options: LocalFit) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def row_batches(problem: LayerProblem, batch_tokens: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices of training rows, in a new order every epoch, without end."""
    num_rows, num_tokens = problem.streams.converted.shape[:2]
    rows = torch.arange(num_rows)[problem.training_rows]
    size = min(len(rows), max(1, batch_tokens // num_tokens))
    while True:
        order = rows[torch.randperm(len(rows), generator=generator)]
        yield from order.split(size)[: len(rows) // size]


def batch_loss(problem: LayerProblem, layer: DiffLlamaDecoderLayer, rows: torch.Tensor) -> torch.Tensor:
    """Mean square distance to LLaMA's stream after the layer, each token relative to its own mean square."""
    reached = problem.llama.run(layer, problem.streams.converted[rows])
    error = (reached - problem.streams.after_layer[rows]).square().mean(-1)
    return (error * problem.token_weights[rows]).mean()
