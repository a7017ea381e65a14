"""
Gradient descent on one layer's attention parameters, against LLaMA's hidden states after that layer.

R sequences, T tokens per sequence, C hidden.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import nn

from conversion.calibration.problem import LayerProblem
from conversion.calibration.streams import LayerWeights, fast_precision
from conversion.options import LAMBDA_FLOOR
from modeling_diff.diff_attention_modules import DiffLambda
from modeling_diff.modeling_diff_llama import DiffLlamaDecoderLayer


# Share of the full rate. tiny-llama, 16K tokens: half batches above 0.5, and steps skipped for less than 1 % of
# progress, ended 0.0037 nats above float32 and full batches without checks; these defaults end 0.0002 below.
HIGH_RATE = 0.75
# Learning rates that are tried, from that of the options downwards. tiny-llama's layers take the first one, those of
# SmolLM2-135M-Instruct, which are nearer to LLaMA before the descent, a tenth of it.
RATES = 4
RATE_STEP = 3.0


@dataclass(frozen=True)
class LocalFit:
    """Configures the gradient stage of a calibration.

    Attributes:
        steps: Length of the schedule, of which checks may skip a part.
        batch_tokens: Tokens per batch; half as many while the learning rate is high.
        learning_rate: Highest peak to try, relative to the root mean square of a matrix's median row; a tenth of it
            for vectors.
        lambda_learning_rate: The same for the lambda vectors, absolute, as they start at 0.1.
        warmup_steps: Steps of linear warmup.
        check_steps: Steps between checks of the held-back sequences.
        worth_going_on: Share by which their loss must have fallen, or `check_steps` steps are skipped.
        lambda_floor: Lowest lambda, in every stage of a calibration.
    """

    steps: int = 200
    batch_tokens: int = 4096
    learning_rate: float = 0.3
    lambda_learning_rate: float = 2e-3
    warmup_steps: int = 10
    check_steps: int = 20
    worth_going_on: float = 0.0
    lambda_floor: float = LAMBDA_FLOOR


def fit_layer(
    problem: LayerProblem, weights: LayerWeights, options: LocalFit, progress: Callable[[int], None]
) -> LayerWeights:
    """Returns a layer's weights after gradient descent, or as they were if no learning rate gets the layer nearer.

    Layers that start near the LLaMA are stable with smaller steps only: a learning rate that is too high is divided by
    `RATE_STEP`, and the descent starts again.

    Args:
        problem: The layer.
        weights: Those to start from.
        options: How long and how fast.
        progress: Called after each step with the number of steps done, the highest of all starts.
    """
    allowed = held_back_loss(problem, problem.diff_layer(weights), options)
    furthest = 0

    def forward(position: int) -> None:
        nonlocal furthest
        furthest = max(furthest, position)
        progress(furthest)

    for attempt in range(RATES):
        slower = RATE_STEP**-attempt
        rates = {name: getattr(options, name) * slower for name in ("learning_rate", "lambda_learning_rate")}
        fitted = descend(problem, weights, replace(options, **rates), allowed, forward)
        if fitted is not None:
            return fitted
    return weights


def descend(
    problem: LayerProblem,
    weights: LayerWeights,
    options: LocalFit,
    allowed: float,
    progress: Callable[[int], None],
) -> LayerWeights | None:
    """Returns a layer's weights after gradient descent; lambda is held at its floor.

    The lambda that was reached becomes the constant part, and the lambda vectors are those of the start, whose
    exponentials cancel: the fit leaves them with very unequal lengths, and healing would move lambda by leaps.

    Args:
        problem: The layer.
        weights: Those to start from.
        options: How long and how fast.
        allowed: Loss of the held-back sequences at the start.
        progress: Called with the number of steps done.

    Returns:
        The weights; None if the rate proves to be too high, by `is_too_fast`.
    """
    # Imported here, as its package takes seconds.
    from modeling_diff.training.lambda_values import hold_lambda, layer_lambda

    layer = problem.diff_layer(weights)
    attention = layer.self_attn.requires_grad_(True)
    diff_lambda = attention.get_submodule("diff_lambda")
    assert isinstance(diff_lambda, DiffLambda)
    optimizers = build_optimizers(attention, options)
    order = row_order(problem, torch.Generator().manual_seed(problem.seed))
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    least = math.inf
    position = 0  # in the schedule
    while position < options.steps:
        factor = rate_factor(position, options)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        rows = list(islice(order, batch_size(problem, factor, options)))
        batch_loss(problem, layer, torch.tensor(rows)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        hold_lambda(diff_lambda, options.lambda_floor)
        position += 1
        if position % options.check_steps == 0:
            reached = held_back_loss(problem, layer, options)
            if is_too_fast(reached, allowed, position, options):
                return None
            position += steps_to_skip(reached, least, options)
            least = min(least, reached)
        progress(min(position, options.steps))
    tensors = {name: tensor.detach().clone() for name, tensor in attention.state_dict().items()}
    lambda_init = layer_lambda(diff_lambda)
    if not 0 <= lambda_init < 1:
        return weights.replaced(tensors)
    tensors |= {name: tensor for name, tensor in weights.tensors.items() if name.startswith("diff_lambda")}
    tensors["sub_norm.weight"] *= (1 - weights.lambda_init) / (1 - lambda_init)
    return weights.replaced(tensors, lambda_init=lambda_init)


def is_too_fast(reached: float, allowed: float, position: int, options: LocalFit) -> bool:
    """Returns whether a descent is to start again at a lower rate.

    Large steps raise the loss before the schedule's decay lowers it. Half above the start is the most that was seen
    to come back, and after a third of the schedule what is still above the start did not get below it.

    Args:
        reached: Loss of the held-back sequences now.
        allowed: Their loss at the start.
        position: Number of steps done.
        options: How long and how fast.
    """
    early = 3 * position < options.steps
    return not reached <= (1.5 if early else 1.0) * allowed


def build_optimizers(attention: nn.Module, options: LocalFit) -> list[torch.optim.Optimizer]:
    """Returns Muon for matrices, which got further in equal steps than Adam at any rate, and Adam for the rest."""
    lambdas = list(attention.get_submodule("diff_lambda").parameters())
    vectors = [{"params": lambdas, "lr": options.lambda_learning_rate}]
    matrices = []
    for name, parameter in attention.named_parameters():
        if name.startswith("diff_lambda"):
            continue
        # The median row: the carrier rows of `refit_values` are larger than the rest.
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
    """Returns the share of the full rate at a step: linear warmup, then a cosine to zero."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def steps_to_skip(reached: float, least: float, options: LocalFit) -> int:
    """Returns how many steps of the schedule a check skips; its decay then ends sooner.

    Args:
        reached: Loss of the held-back sequences now.
        least: Least loss of any check before.
        options: How long and how fast.
    """
    return 0 if reached < (1 - options.worth_going_on) * least else options.check_steps


def batch_size(problem: LayerProblem, factor: float, options: LocalFit) -> int:
    """Returns the sequences of a batch: half as many at a high rate, which is noisier than a small batch."""
    num_rows, num_tokens = problem.streams.converted.shape[:2]
    tokens = options.batch_tokens // 2 if factor > HIGH_RATE else options.batch_tokens
    return min(num_rows - problem.num_validation_rows, max(1, tokens // num_tokens))


def row_order(problem: LayerProblem, generator: torch.Generator) -> Iterator[int]:
    """Yields indices of training sequences, in a new order every epoch, without end."""
    rows = torch.arange(len(problem.streams.converted))[problem.training_rows]
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator)].tolist()


@torch.no_grad()
def held_back_loss(problem: LayerProblem, layer: DiffLlamaDecoderLayer, options: LocalFit) -> float:
    """Returns the `batch_loss` of as many held-back sequences as a batch holds."""
    count = max(1, options.batch_tokens // problem.streams.converted.shape[1])
    return batch_loss(problem, layer, torch.arange(min(count, problem.num_validation_rows))).item()


def batch_loss(problem: LayerProblem, layer: DiffLlamaDecoderLayer, rows: torch.Tensor) -> torch.Tensor:
    """Returns the mean square distance to LLaMA's hidden states after the layer, relative per token."""
    with fast_precision(problem.llama.device):
        reached = problem.llama.run(layer, problem.streams.converted[rows])
    error = (reached - problem.streams.after_layer[rows]).square().mean(-1)
    return (error * problem.token_weights[rows]).mean()
