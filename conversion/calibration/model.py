"""A converted model put together in memory, to be measured before anything is written."""

from copy import deepcopy
from typing import Any

from transformers import LlamaForCausalLM

from conversion.calibration.calibrate import CalibrationResult
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "rope_parameters",
)


def calibrated_model(llama: LlamaForCausalLM, result: CalibrationResult) -> DiffLlamaForCausalLM:
    """
    LLaMA with the attention of every layer replaced by what was calibrated; the calibration must be of all layers.
    """
    shared = {name: deepcopy(getattr(llama.config, name)) for name in SHARED_FIELDS}
    maps: Any = llama.config  # LlamaConfig declares as optional what it always fills in
    config = DiffLlamaConfig(
        **shared,
        num_attention_heads=maps.num_attention_heads // 2,
        num_key_value_heads=maps.num_key_value_heads // 2,
        head_dim=2 * maps.head_dim,
        lambda_init=list(result.lambda_init),
        sub_norm_eps=list(result.sub_norm_eps),
    )
    model = DiffLlamaForCausalLM(config).eval()
    kept = {name: tensor for name, tensor in llama.state_dict().items() if ".self_attn." not in name}
    model.load_state_dict(kept | {name: result[name] for name in result.names})
    return model.to(llama.device)
