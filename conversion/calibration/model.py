"""A converted model put together in memory, to be measured before anything is written."""

from typing import Any

from conversion.calibration.calibrate import CalibrationResult
from conversion.mapping.heads import paired_fields
from conversion.source.architectures import plain_config, shared_fields
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


def calibrated_model(llama: Any, result: CalibrationResult) -> DiffLlamaForCausalLM:
    """Returns a LLaMA with the attention of every layer replaced by the calibrated one.

    Args:
        llama: transformers' LLaMA.
        result: A calibration of all of its layers.
    """
    pairing = result.pairings[0]
    heads = paired_fields(len(pairing.query_heads), len(pairing.kv_heads), plain_config(llama.config).head_dim)
    config = DiffLlamaConfig(
        **(shared_fields(llama.config) | heads),
        lambda_init=list(result.lambda_init),
        sub_norm_eps=list(result.sub_norm_eps),
    )
    model = DiffLlamaForCausalLM(config).eval()
    kept = {name: tensor for name, tensor in llama.state_dict().items() if ".self_attn." not in name}
    model.load_state_dict(kept | {name: result[name] for name in result.names})
    return model.to(llama.device)
