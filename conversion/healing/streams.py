"""
Hidden states between a model's layers, seen and, for layer-local training, replaced, by hooks on its layers.

Hooks, not calls of single layers: FSDP2 gathers a layer's weights only within a call of the whole model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the decoder layers in order, whatever wraps the model (peft, DDP, FSDP2)."""
    found = [module for name, module in model.named_modules() if name.split(".")[-1] == "layers"]
    assert isinstance(found[0], nn.ModuleList)
    return list(found[0])


class LayerStreams:
    """
    Within a call of the model: `states[0]` before the first layer, `states[l + 1]` after layer l, each (B, T, C).

    With `given` set, to as many states, every layer reads its state from there and not from the layer before it.
    """

    def __init__(self, model: nn.Module):
        self.states: dict[int, torch.Tensor] = {}
        self.given: Sequence[torch.Tensor] | None = None
        self.handles = []
        layers = decoder_layers(model)
        self.num_layers = len(layers)
        for index, layer in enumerate(layers):
            self.handles.append(layer.register_forward_pre_hook(_Before(self, index)))
            self.handles.append(layer.register_forward_hook(_After(self, index)))

    def take(self) -> list[torch.Tensor]:
        """Returns the states of the last call, in order, and forgets them."""
        states = self.states
        self.states = {}
        return [states[index] for index in range(self.num_layers + 1)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class _Before:
    def __init__(self, streams: LayerStreams, index: int):
        self.streams = streams
        self.index = index

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.index == 0:
            self.streams.states[0] = args[0]
        if self.streams.given is None:
            return None
        return (self.streams.given[self.index].to(args[0].dtype), *args[1:])


class _After:
    def __init__(self, streams: LayerStreams, index: int):
        self.streams = streams
        self.index = index

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.streams.states[self.index + 1] = output
