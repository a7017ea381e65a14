"""The source as transformers' own class builds and loads it, whatever its config.json says of attention."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from conversion.checkpoint import CheckpointReader
from conversion.errors import ConversionError, quote
from conversion.source.architectures import ARCHITECTURES, Architecture
from conversion.source.config_fields import ATTENTION_FIELDS
from modeling_diff import DiffLlamaForCausalLM
from modeling_diff.diff_llama_fields import LLAMA_FIELDS


# What building a config raises for values of the wrong type or that do not go together, and what a model adds to it.
CONFIG_ERRORS = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError)
BUILD_ERRORS = (*CONFIG_ERRORS, AssertionError, RuntimeError, ImportError, IndexError)


def original_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """Returns the config that transformers makes of the file, without its choice of attention.

    Args:
        raw: The source's config.json, of one of `ARCHITECTURES`.

    Raises:
        ConversionError: transformers cannot build the config or, on the meta device, a model of one layer from it.
            Names the field without which it could, if there is one.
    """
    acting = {field: value for field, value in raw.items() if field not in ATTENTION_FIELDS}
    architecture = ARCHITECTURES[raw["model_type"]]
    try:
        return _build(acting, architecture)
    except BUILD_ERRORS as error:
        reason = one_line(error)
        # LLaMA's fields first: of two that do not go together, the other one may be foreign
        fields = sorted(acting, key=lambda field: (field not in LLAMA_FIELDS, field))
        at_fault = next((field for field in fields if _can_build(acting, architecture, field)), None)
        if at_fault is None:
            raise ConversionError(
                f"config.json: transformers cannot build this {raw['model_type']} model: {reason}"
            ) from error
        raise ConversionError(
            f"config.json: {at_fault} is {quote(acting[at_fault])}, with which transformers cannot build the model "
            f"({reason}); correct it"
        ) from error


def load_original(folder: Path, config: PreTrainedConfig, model_class: Any = None, **options: Any) -> Any:
    """Loads the source's weights alone into transformers' own class, with sdpa and without its generation settings.

    Args:
        folder: The checkpoint.
        config: What `original_config` made of its config.json.
        model_class: By default the one for language models of the config's type.
        options: For `from_pretrained`; without `dtype` the model has the one that any user gets.
    """
    loader = model_class or ARCHITECTURES[config.model_type].model_class
    loaded = loader.from_pretrained(
        folder,
        config=deepcopy(config),
        attn_implementation="sdpa",
        generation_config=GenerationConfig(),  # not the checkpoint's own, which may sample or ask for several answers
        trust_remote_code=False,
        **options,
    )
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    for module in model.modules():
        if hasattr(module, "enable_adapters") and not isinstance(module, PreTrainedModel):
            # PEFT's layers, of an adapter next to the weights
            module.enable_adapters(False)
    return loaded


def load_converted(folder: Path, **options: Any) -> DiffLlamaForCausalLM:
    """Loads a checkpoint of ours with the code of this package and without its generation settings.

    Args:
        folder: The checkpoint.
        options: For `from_pretrained`; without any the model is the one that any user gets.
    """
    settings = GenerationConfig()
    return DiffLlamaForCausalLM.from_pretrained(folder, generation_config=settings, trust_remote_code=False, **options)


def default_dtype(config: Any, reader: CheckpointReader) -> torch.dtype:
    """Returns the dtype in which `from_pretrained` loads a checkpoint: its config's, else that of the first tensor."""
    if config.dtype is not None:
        return config.dtype
    first_file = min(info.file for info in reader.tensors.values())
    dtypes = (info.dtype for _, info in sorted(reader.tensors.items()) if info.file == first_file)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def build_on_meta(build: Callable[[], Any]) -> Any:
    """Builds a model without memory for its weights."""
    with torch.device("meta"):
        return build()


def one_line(error: Exception) -> str:
    """Returns the message of an error of transformers', which may have several lines or none, as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _build(raw: Mapping[str, Any], architecture: Architecture) -> PreTrainedConfig:
    config = architecture.config_class.from_dict(deepcopy(dict(raw)))
    if architecture.model_class is not None:
        # One layer: they are alike, and their number is checked against the weights.
        small = deepcopy(config)
        small.num_hidden_layers = 1
        build_on_meta(lambda: architecture.model_class(small))
    return config


def _can_build(raw: Mapping[str, Any], architecture: Architecture, left_out: str) -> bool:
    try:
        _build({field: value for field, value in raw.items() if field != left_out}, architecture)
    except BUILD_ERRORS:
        return False
    return True
