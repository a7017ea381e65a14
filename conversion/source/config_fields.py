"""What transformers' LLaMA reads of a config.json, and what becomes of each field; all other fields change nothing."""

from collections.abc import Collection, Mapping
from typing import Any

from conversion.errors import ConversionError, quote
from modeling_diff.diff_llama_fields import LLAMA_FIELDS


# A test derives from transformers' code what LLaMA reads, and fails for a field that is neither in LLAMA_FIELDS, which
# are copied, nor in the lists of this module.

# Written again, or in one spelling where LLaMA's configs know several.
RESTATED_FIELDS = frozenset(
    [
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "model_type",
        "_name_or_path",
        "name_or_path",
        "rope_scaling",
        "rope_theta",
        "num_labels",
        "lambda_std_dev",
    ]
)
# How attention is computed is the choice of whoever loads a model: never what a file says.
ATTENTION_FIELDS = frozenset(["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
WINDOWS = "it hides keys from LLaMA while decoding, and LLaMA was not trained with windows; this is another model"
NESTED = "transformers then looks for the model's settings in there; give the checkpoint of the language model alone"
# field: values with which LLaMA computes what it computes without the field, and what another value does to it
NEUTRAL_VALUES: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((True, False), "LLaMA knows true and false alone"),
    "output_attentions": (
        (False, None),
        "no attention but eager returns its maps; remove it, callers can ask for them",
    ),
    "_output_attentions": ((False, None), "only eager returns its maps; remove it, callers can ask for them"),
    "return_dict": ((True,), "LLaMA cannot run with it; remove it, callers can ask for tuples"),
    "partial_rotary_factor": ((None, 1, 1.0), "LLaMA turns whole heads"),
    "sliding_window": ((None,), WINDOWS),
    "attention_chunk_size": ((None,), WINDOWS),
    "per_layer_config": ((None, {}), "layers that differ from one another cannot be converted"),
    "_heterogeneity_spec": ((), "layers that differ from one another cannot be converted"),
    "kv_sharing_modes": ((None,), "LLaMA's layers share no keys; this is another model"),
    "num_kv_shared_layers": ((), "LLaMA's layers share no keys; this is another model"),
    "is_encoder_decoder": ((False,), "LLaMA is a decoder; remove it"),
    "attribute_map": (({},), "it gives fields the values of others; write the values themselves, and remove it"),
    "configuration_files": (
        (None, [], ["config.json"]),
        "transformers then reads another file; rename that one to config.json",
    ),
    "transformers_weights": ((None,), "transformers then reads another weight file; remove it"),
    "fusion_config": ((None, {}), "it changes LLaMA's modules; remove it"),
    "default_rope_type": (("default",), "it changes the rotary embedding; write rope_parameters"),
    "_rope_type_labels": ((None, [], {}), "it changes what rope_parameters mean; remove it"),
    "text_config": ((None,), NESTED),
    "text_encoder": ((None,), NESTED),
    "decoder": ((None,), NESTED),
    "generator": ((None,), NESTED),
}
FULL_ATTENTION = ("full_attention", "attention")  # today's name and the one before


def check_neutral(raw: Mapping[str, Any], own_fields: Collection[str] = ()) -> None:
    """Checks fields that change what LLaMA computes.

    Args:
        raw: The source's config.json.
        own_fields: Fields that mean something in the source's architecture, which are checked elsewhere.

    Raises:
        ConversionError: The output could not say what one of them says.
    """
    for field, (values, reason) in NEUTRAL_VALUES.items():
        if field not in raw or field in own_fields:
            continue
        if not any(raw[field] == value and type(raw[field]) is type(value) for value in values):
            raise ConversionError(f"config.json: {field} is {quote(raw[field])}: {reason}")
    layer_types = None if "layer_types" in own_fields else raw.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind not in FULL_ATTENTION for kind in layer_types)
    ):
        raise ConversionError(
            f"config.json: layer_types is {quote(layer_types)}, expected full_attention throughout: {WINDOWS}"
        )


def not_kept(raw: Mapping[str, Any], ours: Mapping[str, Any], own_fields: Collection[str] = ()) -> list[str]:
    """Returns the source's fields that mean nothing to its architecture and are in none of `ours`, sorted."""
    neutral = NEUTRAL_VALUES.keys() | {"layer_types"} | set(own_fields)
    return sorted(raw.keys() - LLAMA_FIELDS - RESTATED_FIELDS - neutral - ours.keys())
