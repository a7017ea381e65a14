"""The config of a checkpoint that is ours already."""

from pathlib import Path

from conversion.errors import ConversionError
from conversion.source.config import check_sizes, read_config
from conversion.source.model import CONFIG_ERRORS, one_line
from modeling_diff import DiffLlamaConfig


def read_our_config(folder: Path) -> DiffLlamaConfig:
    """Returns the config of a checkpoint of ours.

    Raises:
        ConversionError: The folder has another model, or none.
    """
    raw = read_config(folder)
    if raw["model_type"] != "diff_llama":
        raise ConversionError(
            f"{folder / 'config.json'}: model_type is {raw['model_type']!r}, expected 'diff_llama'; convert it first"
        )
    check_sizes(raw)
    try:
        return DiffLlamaConfig.from_dict(raw)
    except CONFIG_ERRORS as error:
        raise ConversionError(f"{folder / 'config.json'}: {one_line(error)}") from error
