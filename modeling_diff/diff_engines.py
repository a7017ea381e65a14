"""
Inference engines that run this code through transformers' attention interface: what vLLM is to be told of it.

vLLM is never imported here: what is looked up is there only in its own processes.
"""

import sys
from typing import Any

from .diff_adapters import MODEL_TYPE


VLLM_ATTENTION = "vllm"  # the name of vLLM's attention in configs, set by its transformers backend
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
    Lets vLLM count 2H heads, as the one attention call asks with; `num_attention_heads` is H in every saved config.

    vLLM reads a config's heads right after it has built the config, which calls this.
    """
    module = sys.modules.get(VLLM_CONVERTORS)
    convertors = getattr(module, "MODEL_ARCH_CONFIG_CONVERTORS", None)
    base = getattr(module, "ModelArchConfigConvertorBase", None)
    if isinstance(convertors, dict) and hasattr(base, "get_total_num_attention_heads"):
        convertors.setdefault(MODEL_TYPE, count_both_maps(base))


def check_engine(config: Any) -> None:
    """
    Checks that vLLM's transformers backend can run a model of this config.

    Raises:
        ValueError: Its layers differ in their number of heads, which that backend does not allow.
    """
    if config._attn_implementation != VLLM_ATTENTION or config.variant == "v1":
        return
    if not all(config.is_differential(layer_idx) for layer_idx in range(config.num_hidden_layers)):
        raise ValueError(
            f"differential_layers={config.differential_layers}: vLLM's transformers backend runs V2 only where every "
            "layer is differential; `pip install diff-llama` next to vLLM brings a model that runs this one, too."
        )


def check_engine_heads(attention_instances: Any, layer_idx: int, num_heads: int) -> None:
    """
    Checks that vLLM made room for both maps of every head.

    Args:
        attention_instances: vLLM's attention layers, by layer; None outside vLLM.
        layer_idx: Index of the layer.
        num_heads: Heads that the attention call brings, 2H or a rank's share of them.

    Raises:
        ValueError: vLLM counted another number; its table of model types is not where it was.
    """
    if attention_instances is None:
        return
    found = attention_instances[layer_idx].num_heads
    if found != num_heads:
        raise ValueError(
            f"vLLM counts {found} attention heads in layer {layer_idx}, and {num_heads} are asked with: this vLLM "
            f"does not read {VLLM_CONVERTORS}.MODEL_ARCH_CONFIG_CONVERTORS; `pip install diff-llama` says which "
            "versions were tested."
        )
