"""
What a model loses without a head: its output replaced by zero or by its mean, and the loss and recall that follow.

B batch, T tokens, H heads, D width of a head's output.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .maps import AttentionLayer, attention_layers
from .tokens import check_token_ids


Means = Mapping[int, torch.Tensor]  # layer -> (H, D)


@dataclass(frozen=True)
class AblationEffect:
    """What changes without some heads, as (layer, head): loss in nats a token, and recall if it was measured."""

    heads: tuple[tuple[int, int], ...]
    loss_change_nats: float
    recall_change: float | None = None


@torch.no_grad()
def mean_head_outputs(model: nn.Module, input_ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Each head's output, what o_proj reads of it, in the mean over texts (B, T): (H, D) a layer."""
    check_token_ids(model, input_ids, "texts")
    means: dict[int, torch.Tensor] = {}
    with ExitStack() as hooks:
        for layer in attention_layers(model):

            def hook(module, args, layer=layer):
                means[layer.index] = args[0].float().mean((0, 1)).view(layer.num_heads, -1)

            hooks.callback(layer.module.o_proj.register_forward_pre_hook(hook).remove)
        model(input_ids=input_ids, use_cache=False)
    return means


@contextmanager
def ablated_heads(
    model: nn.Module,
    heads: Mapping[int, Sequence[int]],
    mode: Literal["zero", "mean"] = "zero",
    means: Means | None = None,
) -> Iterator[None]:
    """
    Within this context, the chosen heads of each layer give o_proj zero, or their mean output.

    A differential head is ablated whole, after its subtraction and norm. Works for any forward pass, generation
    included. Raises ValueError for heads that are not there, and for "mean" without `means` (`mean_head_outputs`).
    """
    if mode not in ("zero", "mean"):
        raise ValueError(f"mode={mode!r}: there are zero and mean.")
    if (mode == "mean") != (means is not None):
        raise ValueError(
            f"mode={mode!r} with means {'missing' if means is None else 'given'}: means belong to 'mean'."
        )
    layers = {layer.index: layer for layer in attention_layers(model)}
    with ExitStack() as hooks:
        for index, chosen in heads.items():
            if index not in layers:
                raise ValueError(f"layer {index}: there are {len(layers)} layers, counted from 0.")
            layer = layers[index]
            if any(not 0 <= head < layer.num_heads for head in chosen):
                raise ValueError(f"heads {list(chosen)} of layer {index}: there are {layer.num_heads}, from 0.")
            hook = _replacing(layer, list(chosen), None if means is None else means[index])
            hooks.callback(layer.module.o_proj.register_forward_pre_hook(hook).remove)
        yield


def _replacing(layer: AttentionLayer, heads: list[int], means: torch.Tensor | None) -> Callable:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        outputs = args[0].unflatten(-1, (layer.num_heads, -1)).clone()  # (B, T, H, D)
        outputs[..., heads, :] = 0 if means is None else means[heads].to(outputs)
        return (outputs.flatten(-2), *args[1:])

    return hook


@torch.no_grad()
def loss_nats(model: Any, input_ids: torch.Tensor) -> float:
    """Mean cross entropy of the next token over texts (B, T) without padding, one text at a time."""
    check_token_ids(model, input_ids, "texts")
    losses = [model(input_ids=row[None], labels=row[None], use_cache=False).loss.float() for row in input_ids]
    return torch.stack(losses).mean().item()


def ablation_effects(
    model: Any,
    input_ids: torch.Tensor,
    groups: Sequence[Sequence[tuple[int, int]]] | None = None,
    *,
    mode: Literal["zero", "mean"] = "zero",
    recall: Callable[[Any], float] | None = None,
) -> list[AblationEffect]:
    """
    The change in loss on texts (B, T) without each group of (layer, head), by default every head by itself.

    `recall` measures anything else of the model, as a share of questions answered. "mean" takes each head's mean over
    the same texts.
    """
    if groups is None:
        groups = [[(layer.index, head)] for layer in attention_layers(model) for head in range(layer.num_heads)]
    means = mean_head_outputs(model, input_ids) if mode == "mean" else None
    whole_loss, whole_recall = loss_nats(model, input_ids), None if recall is None else recall(model)
    effects = []
    for group in groups:
        by_layer: dict[int, list[int]] = {}
        for layer, head in group:
            by_layer.setdefault(layer, []).append(head)
        with ablated_heads(model, by_layer, mode, means):
            loss_change = loss_nats(model, input_ids) - whole_loss
            recall_change = None if recall is None or whole_recall is None else recall(model) - whole_recall
        effects.append(AblationEffect(tuple(group), loss_change, recall_change))
    return effects
