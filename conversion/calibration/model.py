"""A converted model put together in memory, to be measured before anything is written."""

from collections.abc import Sequence
from typing import Any

import torch

from conversion.calibration.calibrate import CalibrationResult
from conversion.calibration.streams import LayerWeights, copied_weights
from conversion.mapping.heads import HeadPairing
from conversion.source.architectures import plain_config
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM
from modeling_diff.diff_llama_fields import padded_counts


def calibrated_model(llama: Any, result: CalibrationResult) -> DiffLlamaForCausalLM:
    """Returns a LLaMA with the attention of the calibrated layers.

    Args:
        llama: transformers' LLaMA.
        result: Its calibration.
    """
    device = torch.device("cpu")
    kept = [result.store.load(index, None, device) for index in range(llama.config.num_hidden_layers)]
    return converted_model(llama, [found and found[0] for found in kept])


def converted_model(llama: Any, layers: Sequence[LayerWeights | None]) -> DiffLlamaForCausalLM:
    """Returns a LLaMA with converted attention in some layers.

    Args:
        llama: transformers' LLaMA.
        layers: The attention of each layer; None for LLaMA's own.
    """
    plain = plain_config(llama.config)
    counts = padded_counts(plain.num_attention_heads, plain.num_key_value_heads)
    tensors = {name: tensor for name, tensor in llama.state_dict().items() if ".self_attn." not in name}
    attention = []
    for index, converted in enumerate(layers):
        prefix = f"model.layers.{index}."
        found = converted
        if found is None:
            own = llama.model.layers[index].state_dict()
            found = copied_weights(own, plain, HeadPairing.adjacent(*counts), 0.0, seed=0, heads=())
        attention.append(found)
        new = ("diff_lambda", "sub_norm") if converted is None else ()
        tensors |= {
            f"{prefix}self_attn.{name}": tensor for name, tensor in found.tensors.items() if not name.startswith(new)
        }
    config = DiffLlamaConfig.from_llama(
        llama.config,
        variant="v1",
        pad_heads=True,
        lambda_init=[found.lambda_init for found in attention],
        sub_norm_eps=[found.sub_norm_eps for found in attention],
        differential_heads=[
            list(range(counts[0] // 2) if found.heads is None else found.heads) for found in attention
        ],
    )
    model = DiffLlamaForCausalLM(config).eval()
    model.load_state_dict(tensors)
    return model.to(llama.device)
