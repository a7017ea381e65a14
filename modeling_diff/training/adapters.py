"""Adapters: what peft is to know of these models, and the LoRA that is recommended for them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from ..diff_adapters import LORA_TARGETS, NEW_MODULES, check_adapter_fits, read_adapter


if TYPE_CHECKING:
    from peft import LoraConfig


# Left out of quantisation: what trains whole, also the heads that peft adds to it.
NOT_QUANTISED = ["lm_head", "score", "qa_outputs", "lambda_proj"]
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TASK_TYPES = {
    "Model": "FEATURE_EXTRACTION",
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def lora_config(
    model_or_config: PreTrainedModel | PretrainedConfig, servable: bool = False, **overrides: Any
) -> "LoraConfig":
    """
    LoRA on every projection, with lambda, and V1's norm over heads, trained whole next to it (`modules_to_save`).

    Without differential layers, as in a LLaMA, there is nothing to train whole, and nothing is named.

    Args:
        model_or_config: A model of this project or a LLaMA, or its config.
        servable: Whether vLLM is to serve the adapter next to the base. It takes LoRA alone: V2's `lambda_proj`
            becomes a target, V1's lambda and norm stay as they are.
        overrides: LoraConfig's own arguments: `r` (16 here), `lora_alpha` (32), `use_dora`, `use_rslora`, ...

    Raises:
        ValueError: The model is neither, its modules to train whole are quantized, or an override is
            nothing that vLLM serves.
        ImportError: peft is missing.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("lora_config needs the package peft: pip install peft") from error
    config: Any = getattr(model_or_config, "config", model_or_config)
    if config.model_type not in ("diff_llama", "llama"):
        raise ValueError(
            f"model_type={config.model_type!r}: lora_config is for diff_llama and llama; use peft's LoraConfig."
        )
    layers = getattr(config, "differential_layers", [])  # None for all of them; a LLaMA has none
    differential = layers is None or bool(layers)
    class_name = type(model_or_config).__name__
    defaults: dict[str, Any] = {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": list(LORA_TARGETS),
        "modules_to_save": list(NEW_MODULES[config.variant]) if differential else None,
        "task_type": next((task for suffix, task in TASK_TYPES.items() if class_name.endswith(suffix)), "CAUSAL_LM"),
    }
    if servable:
        defaults["modules_to_save"] = None
        if differential and config.variant == "v2":
            defaults["target_modules"] += NEW_MODULES["v2"]
    lora = LoraConfig(**(defaults | overrides))
    if servable:
        check_servable(lora)
    if isinstance(model_or_config, PreTrainedModel):
        check_not_quantised(model_or_config, lora.modules_to_save or [])
    return lora


def check_servable(lora: "LoraConfig") -> None:
    """
    Checks that an adapter holds nothing but what vLLM serves.

    Raises:
        ValueError: Names the first argument that it does not.
    """
    for name, served in (("modules_to_save", [None, ["score"]]), ("use_dora", [False]), ("bias", ["none"])):
        if (found := getattr(lora, name)) not in served:
            raise ValueError(
                f"{name}={found!r}: vLLM serves LoRA alone; leave it out, or leave out servable=True and serve the "
                "merged model."
            )


def check_not_quantised(model: PreTrainedModel, names: list[str]) -> None:
    """Raises `ValueError` if a module of these names holds weights of bitsandbytes, which cannot be trained whole."""
    for name, module in model.named_modules():
        weights = module.parameters() if name.rpartition(".")[2] in names else ()
        if any(not weight.is_floating_point() or hasattr(weight, "quant_state") for weight in weights):
            raise ValueError(
                f"{name}: is quantised, and is to be trained whole; load the base with four_bit_config(), or with "
                f"llm_int8_skip_modules={NOT_QUANTISED} in its BitsAndBytesConfig."
            )


def four_bit_config(compute_dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> BitsAndBytesConfig:
    """
    A base in NF4 for QLoRA, all but heads and what `lora_config` trains whole: 4-bit weights could not be trained.

    `overrides` are BitsAndBytesConfig's own arguments.
    """
    defaults = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute_dtype,
        "llm_int8_skip_modules": list(NOT_QUANTISED),
    }
    return BitsAndBytesConfig(**(defaults | overrides))


def check_adapter(model: PreTrainedModel, folder: Path | str) -> None:
    """Raises `ValueError`, before anything is loaded, if the adapter in `folder` was trained on another model."""
    if not any((Path(folder) / name).is_file() for name in ADAPTER_WEIGHTS):
        raise ValueError(f"{folder}: no {ADAPTER_WEIGHTS[0]} there; give the folder that save_pretrained wrote.")
    check_adapter_fits(model, str(folder), *read_adapter(str(folder)))
