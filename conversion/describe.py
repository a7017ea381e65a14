"""What a checkpoint folder is, read from its config, headers and few small tensors."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from conversion.checkpoint import CheckpointReader
from conversion.companions import read_object
from conversion.errors import ConversionError
from conversion.export import read_our_config
from conversion.rules import LAMBDA_VECTORS
from conversion.source_config import read_config, read_source_model
from conversion.stream import RECORD


def describe_checkpoint(folder: str | Path, allow_pickle: bool = False) -> dict[str, Any]:
    """Model type, heads and widths, parameters, bytes, lambda a layer, and which conversion made it, as JSON.

    Raises ConversionError for a folder that is no sound LLaMA, diffllama or diff_llama checkpoint.
    """
    path = Path(folder)
    raw = read_config(path)
    ours = raw["model_type"] == "diff_llama"
    config: Any = read_our_config(path) if ours else read_source_model(path, backbone_only=True).config
    reader = CheckpointReader(path, allow_pickle=allow_pickle)
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in reader.tensors.values())
    description: dict[str, Any] = {
        "folder": path.resolve().name,
        "model_type": raw["model_type"],
        "variant": config.variant if ours else None,
        "layers": config.num_hidden_layers,
        "differential_layers": _differential_layers(config) if ours else None,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "map_dim": config.map_dim if ours else config.head_dim,
        "parameters": sum(torch.Size(info.shape).numel() for info in reader.tensors.values()),
        "bytes": sum(info.num_bytes for info in reader.tensors.values()),
        "files": len(reader.files),
        "dtypes": dict(dtypes.most_common()),
        "lambda": _lambda_by_layer(config, reader) if ours else None,
    }
    if record := read_object(path / RECORD):
        description["conversion"] = {key: record.get(key) for key in ("source", "options", "promise", "versions")}
    return description


def _differential_layers(config: Any) -> list[int]:
    return [layer for layer in range(config.num_hidden_layers) if config.is_differential(layer)]


def _lambda_by_layer(config: Any, reader: CheckpointReader) -> dict[int, float]:
    """V1: the layer's lambda. V2, where it depends on the token: the mean over heads of a zero token's."""
    lambdas = {}
    prefix = "model." if any(name.startswith("model.") for name in reader.tensors) else ""
    for layer in _differential_layers(config):
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
    """In float32. ConversionError unless the tensor is there in the shape (size,)."""
    info = reader.tensors.get(name)
    if info is None or info.shape != (size,):
        found = f"has shape {info.shape}" if info else "is missing"
        raise ConversionError(f"tensor {name} {found}, expected ({size},); get the complete checkpoint")
    return reader.read(name).float()
