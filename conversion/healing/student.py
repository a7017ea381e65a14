"""The student: which of its parameters learn, where lambda and the norm are to end, what is left of it at the end."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conversion.checkpoint import CheckpointReader
from conversion.errors import ConversionError, typed
from conversion.healing.options import HealingOptions, HealStage, LambdaMode, Trained
from conversion.healing.output import stored_specs
from conversion.healing.whole import check_whole
from conversion.options import STRICT_EPS
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM
from modeling_diff.configuration_diff_llama import paper_lambda_init
from modeling_diff.training.lambda_values import differential_attentions


def check_student(folder: Path, config: DiffLlamaConfig, options: HealingOptions) -> None:
    """ConversionError for a checkpoint without a head, or not whole, and for options that its vocabulary forbids."""
    if config.architectures == ["DiffLlamaModel"]:
        raise ConversionError(
            f"{folder / 'config.json'}: architectures is {config.architectures}, a backbone, and a language model is "
            "trained; convert without --backbone-only"
        )
    check_whole(folder, DiffLlamaForCausalLM)
    if options.cached_logits and options.cached_logits > config.vocab_size:
        raise ConversionError(
            f"cached_logits is {options.cached_logits}, expected at most vocab_size, {config.vocab_size}; keep fewer"
        )


def load_student(folder: Path) -> Any:
    """In float32, whatever it is stored in: small steps are lost on bfloat16 weights."""
    return DiffLlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)


def final_config(config: DiffLlamaConfig, options: HealingOptions) -> DiffLlamaConfig:
    """What a V1 model is to end with: the strict norm, and in the mode PAPER the paper's schedule."""
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


def prepare_student(model: Any, options: HealingOptions) -> Any:
    """
    The model with `requires_grad` where it learns; with LoRA, inside a peft model.

    Raises ConversionError where nothing would learn, and without peft.
    """
    if options.lora:
        return _with_adapters(model, options.lora)
    attentions = differential_attentions(model)
    whole_model = options.stage != HealStage.LOCAL and options.train == Trained.ALL
    model.requires_grad_(whole_model)
    if not whole_model and not attentions:
        raise ConversionError("the checkpoint has no differential layer, and attention alone was to be trained")
    for attention in attentions.values():
        attention.requires_grad_(True)
    return model


def _with_adapters(model: Any, rank: int) -> Any:
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ConversionError(f"{typed('lora')} needs the package peft: pip install peft, or leave it out") from error
    from modeling_diff.training.adapters import lora_config

    return get_peft_model(model, lora_config(model, r=rank, lora_alpha=2 * rank))


def enable_checkpointing(model: Any) -> None:
    """Activations are computed again in backward, under whichever name this transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def merged(model: Any) -> Any:
    """Without adapters: their products added to the matrices that they are on."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


@torch.no_grad()
def round_weights(model: nn.Module, reader: CheckpointReader, dtype: str | None) -> None:
    """To the values that will be stored, so that what is measured is what is written."""
    specs = stored_specs(reader, dtype)
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        if name in specs:
            parameter.copy_(parameter.to(specs[name].dtype))
