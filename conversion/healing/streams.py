"""
The hidden states between a model's layers, seen and, for layer-local training, replaced, by hooks on its layers.

Hooks, not calls of single layers: FSDP2 gathers a layer's weights only within a call of the whole model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order, whatever wraps the model (peft, DDP, FSDP2)."""
    found = [module for name, module in model.named_modules() if name.split(".")[-1] == "layers"]
    assert isinstance(found[0], nn.ModuleList)
    return list(found[0])


class LayerStreams:
    """
    Within a call of the model: `states[0]` before the first layer, `states[l + 1]` behind layer l, each (B, T, C).

    With `given` set, to as many states, every layer reads its state from there and not from the layer before it.
    """

    def __init__(self, model: nn.Module):
        self.states: dict[int, torch.Tensor] = {}
        self.given: Sequence[torch.Tensor] | None = None
        self.handles = []
        self.num_layers = len(layers := decoder_layers(model))
        for index, layer in enumerate(layers):
            before, behind = _Before(self, index), _Behind(self, index)
            self.handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(behind)]

    def take(self) -> list[torch.Tensor]:
        """The states of the last call, in order, which are then forgotten."""
        states, self.states = self.states, {}
        return [states[index] for index in range(self.num_layers + 1)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class _Before:
    def __init__(self, streams: LayerStreams, index: int):
        self.streams, self.index = streams, index

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.index == 0:
            self.streams.states[0] = args[0]
        if self.streams.given is None:
            return None
        return (self.streams.given[self.index].to(args[0].dtype), *args[1:])


class _Behind:
    def __init__(self, streams: LayerStreams, index: int):
        self.streams, self.index = streams, index

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.streams.states[self.index + 1] = output
