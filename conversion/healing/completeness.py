"""Whether a checkpoint has all that its model is made of: what is missing would be random, and not noticed."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from conversion.errors import ConversionError


def check_whole(folder: Path, model_class: Any, config: PreTrainedConfig | None = None) -> None:
    """Checks that a checkpoint has the tensors of a model, all of them and no others; reads headers, no weights.

    Args:
        folder: Its folder.
        model_class: The class of transformers that loads it.
        config: A config in place of the folder's own.

    Raises:
        ConversionError: A tensor is missing, unknown or of another shape.
    """
    _, report = model_class.from_pretrained(
        folder,
        config=config,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
    )
    faults = {
        "is missing": report["missing_keys"],
        "is unknown": report["unexpected_keys"],
        "has another shape than config.json says": [name for name, *_ in report["mismatched_keys"]],
    }
    for fault, names in faults.items():
        if names:
            raise ConversionError(
                f"{folder}: tensor {min(names)} {fault} ({len(names)} in all), expected the tensors of a whole "
                f"{model_class.__name__}; get the complete checkpoint"
            )
