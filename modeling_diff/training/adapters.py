"""Adapters: the recommended LoRA, a 4-bit base for it, and the check that an adapter belongs to a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from ..diff_adapters import LORA_TARGETS, NEW_MODULES, check_adapter_fits, read_adapter


if TYPE_CHECKING:
    from peft import LoraConfig


# Never quantized: what `lora_config` trains in full, also the heads that PEFT adds to it.
NOT_QUANTIZED = ["lm_head", "score", "qa_outputs", "lambda_proj"]
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
    Configures LoRA on every projection; lambda, and V1's norm over heads, are trained in full (`modules_to_save`).

    Without differential layers, as in a LLaMA, there is nothing to train in full, and `modules_to_save` is empty.

    Args:
        model_or_config: A model of this project or a LLaMA, or its config.
        servable: Whether vLLM is to serve the adapter next to the base. It takes LoRA alone: V2's `lambda_proj`
            becomes a target, V1's lambda and norm are unchanged.
        overrides: LoraConfig's own arguments: `r` (16 here), `lora_alpha` (32), `use_dora`, `use_rslora`, ...

    Returns:
        PEFT's LoraConfig.

    Raises:
        ValueError: The model is neither, modules to train in full are quantized, or vLLM does not serve an override.
        ImportError: PEFT is missing.
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
    layers = range(config.num_hidden_layers)
    differential = config.model_type == "diff_llama" and any(config.is_differential(layer) for layer in layers)
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
        check_not_quantized(model_or_config, lora.modules_to_save or [])
    return lora


def check_servable(lora: "LoraConfig") -> None:
    """
    Checks that vLLM serves an adapter.

    Args:
        lora: The adapter's config.

    Raises:
        ValueError: It does not; names the first argument at fault.
    """
    for name, served in (("modules_to_save", [None, ["score"]]), ("use_dora", [False]), ("bias", ["none"])):
        if (found := getattr(lora, name)) not in served:
            raise ValueError(
                f"{name}={found!r}: vLLM serves LoRA alone; leave it out, or leave out servable=True and serve the "
                "merged model."
            )


def check_not_quantized(model: PreTrainedModel, names: list[str]) -> None:
    """Raises `ValueError` if a module of these names holds bitsandbytes weights, which cannot be trained in full."""
    for name, module in model.named_modules():
        weights = module.parameters() if name.rpartition(".")[2] in names else ()
        if any(not weight.is_floating_point() or hasattr(weight, "quant_state") for weight in weights):
            raise ValueError(
                f"{name}: is quantized, and is to be trained in full; load the base with four_bit_config(), or with "
                f"llm_int8_skip_modules={NOT_QUANTIZED} in its BitsAndBytesConfig."
            )


def four_bit_config(compute_dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> BitsAndBytesConfig:
    """
    Configures an NF4 base for QLoRA; heads and what `lora_config` trains in full are not quantized.

    Args:
        compute_dtype: Dtype of matrix products.
        overrides: BitsAndBytesConfig's own arguments.

    Returns:
        transformers' BitsAndBytesConfig.
    """
    defaults = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute_dtype,
        "llm_int8_skip_modules": list(NOT_QUANTIZED),
    }
    return BitsAndBytesConfig(**(defaults | overrides))


def check_adapter(model: PreTrainedModel, folder: Path | str) -> None:
    """
    Checks that a saved adapter was trained on a model like this one, before anything is loaded.

    Args:
        model: The base model.
        folder: The folder that `save_pretrained` wrote.

    Raises:
        ValueError: The adapter was trained on another model, or the folder holds no adapter.
    """
    if not any((Path(folder) / name).is_file() for name in ADAPTER_WEIGHTS):
        raise ValueError(f"{folder}: no {ADAPTER_WEIGHTS[0]} there; give the folder that save_pretrained wrote.")
    check_adapter_fits(model, str(folder), *read_adapter(str(folder)))
