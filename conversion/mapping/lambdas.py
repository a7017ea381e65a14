"""Lambda per layer, as a checkpoint has it, and whether it leaves a layer differential."""

from collections.abc import Mapping
from typing import Any

import torch

from conversion.checkpoint import CheckpointReader
from conversion.errors import ConversionError
from conversion.mapping.rules import LAMBDA_VECTORS


def not_differential(lambdas: Mapping[int, float]) -> str | None:
    """Returns a warning of layers whose lambda is 0, at which the negative map has no effect; None without any.

    Args:
        lambdas: lambda by layer.
    """
    layers = [str(layer) for layer, value in sorted(lambdas.items()) if round(value, 6) == 0]
    if not layers:
        return None
    where = "every layer" if len(layers) == len(lambdas) else f"layer {', '.join(layers)}"
    return f"lambda is 0: not differential ({where})"


def differential_layers(config: Any) -> list[int]:
    """Returns the indices of the layers that are differential, ascending."""
    return [layer for layer in range(config.num_hidden_layers) if config.is_differential(layer)]


def differential_heads(config: Any) -> list[list[int]]:
    """Returns the differential heads of each layer, ascending."""
    return [config.differential_heads_of(layer) for layer in range(config.num_hidden_layers)]


def read_lambdas(config: Any, reader: CheckpointReader) -> dict[int, float]:
    """Reads lambda by layer; V2's depends on the token, and the mean over heads for a token of zeros is taken.

    Args:
        config: Ours.
        reader: The weights.

    Returns:
        lambda by index of the differential layers.

    Raises:
        ConversionError: A tensor is missing, or of another shape.
    """
    lambdas = {}
    prefix = "model." if any(name.startswith("model.") for name in reader.tensors) else ""
    for layer in differential_layers(config):
        attention = f"{prefix}layers.{layer}.self_attn"
        if config.variant == "v1":
            q1, k1, q2, k2 = (
                _read_vector(reader, f"{attention}.diff_lambda.{name}", config.map_dim) for name in LAMBDA_VECTORS
            )
            value = (q1 @ k1).exp() - (q2 @ k2).exp() + config.lambda_init[layer]
        elif config.lambda_bias:
            bias = _read_vector(reader, f"{attention}.lambda_proj.bias", config.num_attention_heads)
            value = bias.sigmoid().mean()
        else:
            value = torch.tensor(0.5)
        lambdas[layer] = round(value.item(), 6)
    return lambdas


def _read_vector(reader: CheckpointReader, name: str, size: int) -> torch.Tensor:
    """Reads a tensor of the shape (size,), in float32; ConversionError without it."""
    info = reader.tensors.get(name)
    if info is None or info.shape != (size,):
        found = f"has shape {info.shape}" if info else "is missing"
        raise ConversionError(f"tensor {name} {found}, expected ({size},); get the complete checkpoint")
    return reader.read(name).float()


def starting_lambdas(config: Any, record: Mapping[str, Any]) -> dict[int, float]:
    """Returns lambda by differential layer before any training: V1's vectors cancel, V2 starts at one value."""
    layers = differential_layers(config)
    if config.variant == "v1":
        return {layer: float((config.lambda_init or ())[layer]) for layer in layers}
    return dict.fromkeys(layers, float(record["options"].get("lambda_start", 0.5)))
