"""A converted model put together in memory, to be measured before anything is written."""

from typing import Any

from conversion.calibration.calibrate import CalibrationResult
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


def calibrated_model(llama: Any, result: CalibrationResult) -> DiffLlamaForCausalLM:
    """Returns a LLaMA with the attention of every layer replaced by the calibrated one.

    Args:
        llama: transformers' LLaMA.
        result: A calibration of all of its layers.
    """
    config = DiffLlamaConfig.from_llama(
        llama.config,
        variant="v1",
        pad_heads=True,
        lambda_init=list(result.lambda_init),
        sub_norm_eps=list(result.sub_norm_eps),
    )
    model = DiffLlamaForCausalLM(config).eval()
    kept = {name: tensor for name, tensor in llama.state_dict().items() if ".self_attn." not in name}
    model.load_state_dict(kept | {name: result[name] for name in result.names})
    return model.to(llama.device)
