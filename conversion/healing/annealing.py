"""
What changes by the step while a V1 model is healed: lambda's constant part and the norm's epsilon.

Both are reached without a jump: the model starts with the final config, and what that changes in its function is made
up for by a factor on the norm's output that goes to 1. So the weights are those of the final model all the time, and
the state of the path is a function of the step alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from modeling_diff.diff_sub_norm import SubNorm
from modeling_diff.training.lambda_values import differential_attentions


class AnnealedNorm(SubNorm):
    """A norm over heads with another norm's weight, and a factor after it."""

    def __init__(self, norm: SubNorm):
        super().__init__(norm.normalized_shape, eps=norm.eps)
        self.weight = norm.weight
        self.factor = 1.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * self.factor


@dataclass(frozen=True)
class LayerPath:
    """Where one layer starts and ends. `mean_square`: of a head's output before the norm, on training text."""

    layer: int
    lambda_init: tuple[float, float]
    eps: tuple[float, float]
    mean_square: float

    def lambda_init_at(self, done: float) -> float:
        """Returns lambda_init at the share `done` of the run; linear."""
        start, end = self.lambda_init
        return start + done * (end - start)

    def eps_at(self, done: float) -> float:
        """Returns epsilon; geometric, as the norm takes hold where epsilon passes the mean square."""
        start, end = self.eps
        return math.exp((1 - done) * math.log(start) + done * math.log(end))

    def factor_at(self, lambda_done: float, norm_done: float) -> float:
        """
        Returns what keeps heads' outputs as large as they were.

        The norm divides by sqrt(eps + mean square), and its output is multiplied by 1 - lambda_init.
        """
        size = math.sqrt((self.eps_at(norm_done) + self.mean_square) / (self.eps[1] + self.mean_square))
        return size * (1 - self.lambda_init[1]) / (1 - self.lambda_init_at(lambda_done))


def layer_paths(model: nn.Module, start: Any, end: Any, ids: torch.Tensor) -> list[LayerPath]:
    """Returns the paths of those layers of a V1 model that have a way to go.

    Args:
        model: The model, of the config `start`.
        start: The config that it has.
        end: The config that it is to have.
        ids: Text to measure on, (B, T).
    """
    if start.variant != "v1":
        return []
    moving = [
        layer
        for layer in differential_attentions(model)
        if (start.lambda_init[layer], start.layer_sub_norm_eps(layer))
        != (end.lambda_init[layer], end.layer_sub_norm_eps(layer))
    ]
    if not moving:
        return []
    mean_squares = head_mean_squares(model, ids)
    return [
        LayerPath(
            layer,
            lambda_init=(start.lambda_init[layer], end.lambda_init[layer]),
            eps=(start.layer_sub_norm_eps(layer), end.layer_sub_norm_eps(layer)),
            mean_square=mean_squares[layer],
        )
        for layer in moving
    ]


@torch.no_grad()
def head_mean_squares(model: Any, ids: torch.Tensor) -> dict[int, float]:
    """Returns the mean square of heads' outputs before their norm, by layer, on ids (B, T)."""
    found: dict[int, float] = {}
    handles = []
    for layer, attention in differential_attentions(model).items():

        def note(module: nn.Module, args: tuple[torch.Tensor], layer: int = layer) -> None:
            found[layer] = float(args[0].double().square().mean())

        handles.append(attention.get_submodule("sub_norm").register_forward_pre_hook(note))
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found


class Annealing(TrainerCallback):
    """Moves every layer along its path; `norm_share` of the run for epsilon, all of it for lambda_init."""

    def __init__(self, paths: Sequence[LayerPath], norm_share: float):
        self.paths = {path.layer: path for path in paths}
        self.norm_share = norm_share

    def begin(self, model: nn.Module) -> None:
        """Folds into the norms' weights what the final config changes, and stands at the start of the path."""
        attentions: dict[int, Any] = differential_attentions(model)
        for path in self.paths.values():
            attention = attentions[path.layer]
            attention.sub_norm = AnnealedNorm(attention.sub_norm)
            with torch.no_grad():
                attention.sub_norm.weight /= path.factor_at(0, 0)
        self.move(model, 0)

    def move(self, model: nn.Module, done: float) -> None:
        """Moves the model to the share `done` of the run."""
        norm_done = min(1.0, done / self.norm_share) if self.norm_share else 1.0
        for layer, attention in differential_attentions(model).items():
            if (path := self.paths.get(layer)) is None:
                continue
            for module in attention.modules():  # peft keeps a copy of what it trains: both
                if isinstance(module, AnnealedNorm):
                    module.eps = path.eps_at(norm_done)
                    module.factor = path.factor_at(done, norm_done)
                elif hasattr(module, "lambda_init") and hasattr(module, "lambda_q1"):
                    module.lambda_init = path.lambda_init_at(done)

    def end(self, model: nn.Module) -> None:
        """Gives the model plain norms again, of the final epsilon; the factor is 1 there. The path is done with."""
        self.move(model, 1)
        for attention in differential_attentions(model).values():
            for owner in list(attention.modules()):
                for name, module in list(owner.named_children()):
                    if isinstance(module, AnnealedNorm):
                        plain = SubNorm(module.normalized_shape, eps=module.eps)
                        plain.weight = module.weight
                        owner.add_module(name, plain)
        self.paths = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.move(kwargs["model"], state.global_step / state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.move(kwargs["model"], state.global_step / state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end(kwargs["model"])
