"""What a checkpoint folder is, read from its config, headers and few small tensors."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from conversion.checkpoint import CheckpointReader
from conversion.checkpoint.companions import read_object
from conversion.hub.bundle import read_code
from conversion.mapping.heads import heads_in_words
from conversion.mapping.lambdas import differential_heads, differential_layers, not_differential, read_lambdas
from conversion.record import RECORD
from conversion.source.architectures import plain_config
from conversion.source.config import read_config, read_source_model
from conversion.source.converted import read_our_config


CALIBRATION_FIELDS = ("text", "tokens", "effort", "stages", "lambda_floor")  # what of its record fits on a line


def calibration_summary(calibration: Any) -> dict[str, Any] | None:
    """Returns on what and how a conversion was calibrated, without what was found for every layer."""
    if not isinstance(calibration, dict):
        return None
    return {name: calibration[name] for name in CALIBRATION_FIELDS if name in calibration}


def describe_checkpoint(folder: str | Path, allow_pickle: bool = False) -> dict[str, Any]:
    """Describes a checkpoint without computing anything.

    Args:
        folder: Folder of a LLaMA, diffllama or diff_llama checkpoint.
        allow_pickle: Also read pytorch_model.bin, of which only the tensors are taken.

    Returns:
        Model type, heads and widths, parameters, bytes, lambda per layer, and which conversion made it, as JSON.

    Raises:
        ConversionError: The folder is no sound checkpoint of these kinds.
    """
    path = Path(folder)
    raw = read_config(path)
    ours = raw["model_type"] == "diff_llama"
    config: Any = read_our_config(path) if ours else plain_config(read_source_model(path, backbone_only=True).config)
    reader = CheckpointReader(path, allow_pickle=allow_pickle)
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in reader.tensors.values())
    description: dict[str, Any] = {
        "folder": path.resolve().name,
        "model_type": raw["model_type"],
        "variant": config.variant if ours else None,
        "layers": config.num_hidden_layers,
        "differential_layers": differential_layers(config) if ours else None,
        "differential_heads": heads_in_words(differential_heads(config), config.num_attention_heads) if ours else None,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "map_dim": config.map_dim if ours else config.head_dim,
        "parameters": sum(torch.Size(info.shape).numel() for info in reader.tensors.values()),
        "bytes": sum(info.num_bytes for info in reader.tensors.values()),
        "files": len(reader.files),
        "dtypes": dict(dtypes.most_common()),
        "lambda": read_lambdas(config, reader) if ours else None,
    }
    if ours and (warning := not_differential(description["lambda"])):
        description["warning"] = warning
    if ours:
        description["code"] = read_code(path).described()
    if record := read_object(path / RECORD):
        description["conversion"] = {
            **{key: record.get(key) for key in ("source", "options", "promise", "versions", "measured")},
            "calibration": calibration_summary(record.get("calibration")),
        }
    return description
