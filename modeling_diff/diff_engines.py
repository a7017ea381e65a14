"""
Inference engines that run this code through transformers' attention interface: vLLM and SGLang.

No engine is imported here; its modules are looked up in its own processes only.
"""

import sys
from typing import Any

from .diff_adapters import MODEL_TYPE


# What their transformers backends set as `_attn_implementation`.
ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
VLLM_CONVERTORS = "vllm.transformers_utils.model_arch_config_convertor"


def count_both_maps(base: type) -> type:
    """Returns vLLM's reader of configs with the attention call's count of heads, two per differential head."""

    class DiffLlamaConfigConvertor(base):  # type: ignore[valid-type]
        def get_total_num_attention_heads(self) -> int:
            return 2 * super().get_total_num_attention_heads()

        def get_head_size(self) -> int:
            return self.hf_text_config.head_dim

        def get_total_num_kv_heads(self) -> int:
            return self.hf_text_config.num_key_value_heads

    return DiffLlamaConfigConvertor


def register_with_vllm() -> None:
    """
    Makes vLLM count 2H heads, as the one attention call has; `num_attention_heads` is H in every saved config.

    vLLM reads a config's heads right after it has built the config, which calls this.
    """
    module = sys.modules.get(VLLM_CONVERTORS)
    convertors = getattr(module, "MODEL_ARCH_CONFIG_CONVERTORS", None)
    base = getattr(module, "ModelArchConfigConvertorBase", None)
    if isinstance(convertors, dict) and hasattr(base, "get_total_num_attention_heads"):
        convertors.setdefault(MODEL_TYPE, count_both_maps(base))


def prepare_for_engine(config: Any) -> None:
    """
    Prepares a config for the engine that builds a model of it, and checks that the engine can run that model.

    The tensor parallel plan keeps only styles of linear layers: SGLang refuses any other, and no engine trains.

    Args:
        config: The model's config, changed in place.

    Raises:
        ValueError: Its layers differ in their number of heads, which engines do not allow.
    """
    engine = ENGINES.get(config._attn_implementation)
    if engine is None:
        return
    config.base_model_tp_plan = {
        name: style for name, style in (config.base_model_tp_plan or {}).items() if style in ("colwise", "rowwise")
    }
    if config.variant == "v1" or all(config.is_differential(layer) for layer in range(config.num_hidden_layers)):
        return
    raise ValueError(
        f"differential_layers={config.differential_layers}: {engine}'s transformers backend runs V2 only where every "
        "layer is differential; in vLLM, `pip install diff-llama` brings a model that runs this one, too."
    )


def check_engine_heads(attention_instances: Any, layer_idx: int, num_heads: int) -> None:
    """
    Checks that an engine made room for both maps of every head.

    Args:
        attention_instances: The engine's attention layers, by layer; None outside engines.
        layer_idx: Index of the layer.
        num_heads: Heads that the attention call brings, 2H or a rank's share of them.

    Raises:
        ValueError: The engine counted another number; its table of model types is not where it was, or it has none.
    """
    if attention_instances is None:
        return
    instance = attention_instances[layer_idx]
    found = getattr(instance, "num_heads", getattr(instance, "tp_q_head_num", None))  # of vLLM, of SGLang
    if found != num_heads:
        raise ValueError(
            f"the engine counts {found} attention heads in layer {layer_idx}, and the attention call has {num_heads}: "
            f"it does not read {VLLM_CONVERTORS}.MODEL_ARCH_CONFIG_CONVERTORS; docs/serving.md of diff-llama says "
            "which engines were tested."
        )
