"""
What a model loses without a head: its output is replaced by zero or by its mean, then loss and recall are measured.

B batch, T tokens, H heads, D head_dim.
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
    """
    What changes without some heads.

    Attributes:
        heads: The ablated heads as (layer, head).
        loss_change_nats: Loss without them minus loss with them, in nats/token.
        recall_change: Likewise for `recall`; None if it was not measured.
    """

    heads: tuple[tuple[int, int], ...]
    loss_change_nats: float
    recall_change: float | None = None


@torch.no_grad()
def mean_head_outputs(model: nn.Module, input_ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """
    Computes each head's mean output, as o_proj reads it.

    Args:
        model: A LLaMA-like or differential model.
        input_ids: Texts without padding, (B, T).

    Returns:
        Means over all tokens by layer, (H, D) each.

    Raises:
        ValueError: A token is outside the vocabulary, or the model is none of these.
    """
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
    Replaces the outputs of chosen heads within a context, in any forward pass, generation included.

    A differential head is ablated as one, after its subtraction and norm.

    Args:
        model: A LLaMA-like or differential model.
        heads: The heads to ablate, by layer.
        mode: "zero", or "mean" for each head's mean output.
        means: For "mean", what `mean_head_outputs` returned.

    Yields:
        Nothing; the model is changed within the context only.

    Raises:
        ValueError: A head does not exist, or `means` does not go with `mode`.
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
            hook = _replacement_hook(layer, list(chosen), None if means is None else means[index])
            hooks.callback(layer.module.o_proj.register_forward_pre_hook(hook).remove)
        yield


def _replacement_hook(layer: AttentionLayer, heads: list[int], means: torch.Tensor | None) -> Callable:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        outputs = args[0].unflatten(-1, (layer.num_heads, -1)).clone()  # (B, T, H, D)
        outputs[..., heads, :] = 0 if means is None else means[heads].to(outputs)
        return (outputs.flatten(-2), *args[1:])

    return hook


@torch.no_grad()
def loss_nats(model: Any, input_ids: torch.Tensor) -> float:
    """
    Computes the mean cross entropy of the next token, one text at a time.

    Args:
        model: A causal language model.
        input_ids: Texts without padding, (B, T).

    Returns:
        The loss in nats/token.

    Raises:
        ValueError: A token is outside the vocabulary.
    """
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
    Measures what is lost without each group of heads.

    Args:
        model: A LLaMA-like or differential causal language model.
        input_ids: Texts without padding, (B, T), on which the loss is measured and, for "mean", the means are taken.
        groups: The heads to ablate together, as (layer, head). Defaults to every head by itself.
        mode: "zero" or "mean", see `ablated_heads`.
        recall: A second measure of the model, such as the share of questions answered; larger is better.

    Returns:
        One effect per group, in the order of `groups`.

    Raises:
        ValueError: A head does not exist, or a token is outside the vocabulary.
    """
    if groups is None:
        groups = [[(layer.index, head)] for layer in attention_layers(model) for head in range(layer.num_heads)]
    means = mean_head_outputs(model, input_ids) if mode == "mean" else None
    full_loss = loss_nats(model, input_ids)
    full_recall = None if recall is None else recall(model)
    effects = []
    for group in groups:
        by_layer: dict[int, list[int]] = {}
        for layer, head in group:
            by_layer.setdefault(layer, []).append(head)
        with ablated_heads(model, by_layer, mode, means):
            loss_change = loss_nats(model, input_ids) - full_loss
            recall_change = None if recall is None or full_recall is None else recall(model) - full_recall
        effects.append(AblationEffect(tuple(group), loss_change, recall_change))
    return effects
