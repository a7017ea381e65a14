"""The student: which of its parameters learn, where lambda and the norm are to end, what is left of it at the end."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conversion.checkpoint import CheckpointReader
from conversion.errors import ConversionError, typed
from conversion.healing.completeness import check_whole
from conversion.healing.options import HealingOptions, HealStage, LambdaMode, Trained, TrainerOptions
from conversion.healing.output import stored_specs
from conversion.options import STRICT_EPS
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM
from modeling_diff.configuration_diff_llama import paper_lambda_init
from modeling_diff.training.lambda_values import differential_attentions


def check_student(folder: Path, config: DiffLlamaConfig, options: HealingOptions) -> None:
    """Checks a checkpoint that is to be trained; no weights are read.

    Args:
        folder: Its folder.
        config: Its config.
        options: The healing's options.

    Raises:
        ConversionError: It has no head, is not whole, or has a vocabulary that the options forbid.
    """
    if config.architectures == ["DiffLlamaModel"]:
        raise ConversionError(
            f"{folder / 'config.json'}: architectures is {config.architectures}, a backbone, and a language model is "
            "trained; convert without --backbone-only"
        )
    check_whole(folder, DiffLlamaForCausalLM)
    if options.cached_logits and options.cached_logits > config.vocab_size:
        raise ConversionError(
            f"{typed('cached_logits')} is {options.cached_logits}, expected at most vocab_size, {config.vocab_size}; "
            "keep fewer"
        )


def load_student(folder: Path) -> Any:
    """Loads a student in float32, whatever it is stored in: small steps are lost on bfloat16 weights."""
    return DiffLlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)


def check_differential(model: Any) -> None:
    """Raises ConversionError unless a model is one of this package with a language model's head."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "diff_llama" or not hasattr(model, "lm_head"):
        raise ConversionError(
            f"model is a {type(model).__name__}, expected a DiffLlamaForCausalLM; convert a LLaMA first, and load it "
            "with AutoModelForCausalLM"
        )


def final_config(config: DiffLlamaConfig, options: TrainerOptions) -> DiffLlamaConfig:
    """Returns what a V1 model is to end with: the strict norm, and in the mode PAPER the paper's schedule."""
    end = deepcopy(config)
    if config.variant != "v1":
        return end
    layers = range(config.num_hidden_layers)
    # Only what differs: a checkpoint with an epsilon below the paper's keeps it.
    epsilons = [min(config.layer_sub_norm_eps(layer), STRICT_EPS) for layer in layers]
    end.sub_norm_eps = epsilons[0] if len(set(epsilons)) == 1 else epsilons
    if options.lambda_mode == LambdaMode.PAPER:
        end.lambda_init = [
            paper_lambda_init(layer) if config.is_differential(layer) else config.lambda_init[layer]  # type: ignore[index]
            for layer in layers
        ]
    return end


def trainable_student(model: Any, options: TrainerOptions, peft_config: Any = None) -> Any:
    """Returns the model with `requires_grad` where it learns; with adapters, inside a PEFT model.

    Args:
        model: The student.
        options: What of it is trained.
        peft_config: PEFT's config of adapters, or None.

    Raises:
        ConversionError: Nothing would learn.
    """
    if peft_config is not None:
        from peft import get_peft_model

        return get_peft_model(model, peft_config)
    attentions = differential_attentions(model)
    whole_model = options.stage != HealStage.LOCAL and options.train == Trained.ALL
    model.requires_grad_(whole_model)
    if not whole_model and not attentions:
        raise ConversionError("the checkpoint has no differential layer, and attention alone was to be trained")
    for attention in attentions.values():
        attention.requires_grad_(True)
    return model


def adapter_config(model: Any, rank: int | None) -> Any:
    """Returns PEFT's config of adapters of a rank on a student; None without a rank.

    Raises:
        ConversionError: PEFT is not installed.
    """
    if rank is None:
        return None
    from modeling_diff.training.adapters import lora_config

    try:
        return lora_config(model, r=rank, lora_alpha=2 * rank)
    except ImportError as error:
        raise ConversionError(
            f"{typed('lora_r')} needs the package peft: pip install peft, or leave it out"
        ) from error


def merged(model: Any) -> Any:
    """Returns the model without adapters: their products are added to the matrices that they are on."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


@torch.no_grad()
def round_weights(model: nn.Module, reader: CheckpointReader, dtype: str | None) -> None:
    """Rounds weights to the values that will be stored, so that what is measured is what is written."""
    specs = stored_specs(reader, dtype)
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        if name in specs:
            parameter.copy_(parameter.to(specs[name].dtype))
