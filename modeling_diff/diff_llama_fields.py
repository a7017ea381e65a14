"""
Fields of a config of ours: what those of a LLaMA or a relative become, the heads that its heads make, and the check of
which heads are differential.
"""

from collections.abc import Mapping
from typing import Any

from .diff_adapters import MODEL_TYPE


# Copied under their own names. A test derives from transformers' code what LLaMA reads, and fails for a field that is
# neither here nor in the lists of `conversion/source/config_fields.py`.
LLAMA_FIELDS = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rope_parameters",
        "initializer_range",
        "rms_norm_eps",
        "attention_bias",
        "attention_dropout",
        "mlp_bias",
        "tie_word_embeddings",
        "is_causal",
        "use_cache",
        "output_hidden_states",
        "tie_last_hidden_states",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "pretraining_tp",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
    ]
)
# What relatives add to LLaMA, as fields of a config of ours.
RELATIVE_FIELDS = frozenset(["attention_out_bias", "use_qk_norm"])
# By model_type, the fields of ours that a model's layers fix; whatever its config says of them is not read.
FIXED_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    "qwen3": {"mlp_bias": False, "use_qk_norm": True},
    "diffllama": {},
    MODEL_TYPE: {},
}


def shared_fields(config: Any) -> dict[str, Any]:
    """
    Returns the fields that a model has in common with ours, by our names; counts of heads are its own.

    Args:
        config: Its config, as transformers' own class reads it.

    Raises:
        ValueError: Its layers compute something else than LLaMA's; names the model type.
    """
    if config.model_type not in FIXED_FIELDS:
        raise ValueError(
            f"model_type={config.model_type!r}: its layers compute something else than LLaMA's, so that no "
            f"differential model can be made of it; expected one of {', '.join(FIXED_FIELDS)}."
        )
    # Other classes keep whatever stands in a config.json under the names of ours, and read none of it.
    kept = LLAMA_FIELDS | RELATIVE_FIELDS if config.model_type == MODEL_TYPE else LLAMA_FIELDS
    fields = {name: value for name, value in config.to_dict().items() if name in kept}
    if fields.get("is_causal", True):
        fields.pop("is_causal", None)  # the default; written out, it would be an argument of every attention call
    return fields | dict(FIXED_FIELDS[config.model_type])


def padded_counts(num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """
    Returns the numbers of heads and KV heads that can be paired: an odd number of KV heads gets one idle one more.

    An idle KV head has as many heads as every other one. Idle heads have the last indices.

    Args:
        num_heads: LLaMA's heads.
        num_kv_heads: LLaMA's KV heads.
    """
    kv_heads = num_kv_heads + num_kv_heads % 2
    return num_heads // num_kv_heads * kv_heads, kv_heads


def head_fields(config: Any, variant: str, *, pad_heads: bool) -> dict[str, int]:
    """
    Returns the counts and the width of the heads that a model's heads make; of a differential one, its maps count.

    Args:
        config: The model's config.
        variant: In "v1" two heads make one, twice as wide; in "v2" they are as before.
        pad_heads: Whether idle heads are added in V1 where heads do not pair.

    Raises:
        ValueError: They do not pair.
    """
    num_heads = config.num_attention_heads
    num_kv_heads = config.num_key_value_heads
    map_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads  # Qwen2's has none
    if getattr(config, "variant", None) == "v1":
        num_heads *= 2
        num_kv_heads *= 2
        map_dim = config.map_dim
    paired = 1
    if variant == "v1":
        if num_kv_heads % 2 and not pad_heads:
            raise ValueError(
                f"num_key_value_heads={num_kv_heads}: V1 makes one head of two, and an odd number does not pair; "
                'pad_heads=True adds an idle one, and variant="v2" takes any number.'
            )
        paired = 2
        num_heads, num_kv_heads = padded_counts(num_heads, num_kv_heads)
    return {
        "num_attention_heads": num_heads // paired,
        "num_key_value_heads": num_kv_heads // paired,
        "head_dim": paired * map_dim,
    }


def check_differential_heads(config: Any) -> None:
    """
    Checks the fields that say which layers, or which heads of each layer, are differential.

    Args:
        config: A config of ours, with checked counts of layers and heads.

    Raises:
        ValueError: They do not fit the counts, the variant or each other; names the field and the way out.
    """
    layers = config.differential_layers
    if layers is not None and not _ascends(layers, config.num_hidden_layers):
        raise ValueError(
            f"differential_layers={layers}: list each layer once, in ascending order, counted from 0 and below "
            f"num_hidden_layers={config.num_hidden_layers}; leave it out for all layers."
        )
    if config.differential_heads is None:
        return
    if config.variant == "v2":
        raise ValueError(
            "differential_heads: V2 computes its LLaMA exactly with all heads differential, so that none has to be "
            'left out; use variant="v1", or differential_layers.'
        )
    if layers is not None:
        raise ValueError(
            f"differential_layers={layers} next to differential_heads, which says the same of every head: give one of "
            "them, and None for the other."
        )
    if len(config.differential_heads) != config.num_hidden_layers:
        raise ValueError(
            f"differential_heads has {len(config.differential_heads)} lists for "
            f"num_hidden_layers={config.num_hidden_layers}: give one per layer, [] where no head is differential."
        )
    for layer_idx, heads in enumerate(config.differential_heads):
        if not _ascends(heads, config.num_attention_heads):
            raise ValueError(
                f"differential_heads[{layer_idx}]={heads}: list each head once, in ascending order, counted from 0 "
                f"and below num_attention_heads={config.num_attention_heads}."
            )


def _ascends(indices: list[int], count: int) -> bool:
    return sorted(set(indices)) == list(indices) and all(0 <= index < count for index in indices)
