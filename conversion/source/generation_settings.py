"""The settings of `generate` that a source has, wherever it keeps them; transformers reads them with the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from conversion.errors import ConversionError
from conversion.source.model import BUILD_ERRORS, one_line


GENERATION = "generation_config.json"
ORIGIN = ("_from_model_config", "transformers_version")


def generation_settings(folder: Path, raw: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """Returns what a generation_config.json has to say so that the output decodes as the source does.

    Args:
        folder: The source, whose own generation_config.json is only checked: it travels as it is.
        raw: The source's config.json, from which transformers takes the settings if there is no such file.
        ours: The config.json of the output, from which it would take them there.

    Returns:
        The text of the file, None where none is needed.

    Raises:
        ConversionError: transformers cannot load the settings, and so not the source.
    """
    if (folder / GENERATION).is_file():
        try:
            GenerationConfig.from_pretrained(folder)
        except (*BUILD_ERRORS, OSError) as error:
            raise ConversionError(
                f"{GENERATION}: transformers cannot load it ({one_line(error)}); correct or remove it"
            ) from error
        return None
    try:
        theirs = GenerationConfig.from_model_config(dict(raw))
    except BUILD_ERRORS as error:
        raise ConversionError(f"config.json: no settings of generate can be made of it ({one_line(error)})") from error
    if _settings(theirs) == _settings(GenerationConfig.from_model_config(dict(ours))):
        return None
    return GenerationConfig(**_settings(theirs)).to_json_string()


def _settings(config: GenerationConfig) -> dict[str, Any]:
    """Returns settings that differ from transformers' defaults, without what says where they come from."""
    return {name: value for name, value in config.to_diff_dict().items() if name not in ORIGIN}
