"""Plan of an export: a V1 checkpoint of ours as transformers' own `diffllama`, lossless or refused."""

import math
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from conversion.checkpoint import CheckpointReader
from conversion.checkpoint.companions import companion_files
from conversion.errors import ConversionError
from conversion.mapping.heads import Sizes, heads_in_words
from conversion.mapping.lambdas import differential_heads
from conversion.mapping.rules import diffllama_export_rules
from conversion.mapping.stream import Plan
from conversion.options import chosen_dtype, parse_size, torch_dtype
from conversion.record import versions
from conversion.source.converted import read_our_config
from conversion.source.location import SourceFolder
from conversion.source.model import default_dtype
from conversion.source.tensors import match_tensors
from modeling_diff.configuration_diff_llama import paper_lambda_init
from modeling_diff.diff_llama_fields import LLAMA_FIELDS


def plan_export(
    folder: Path,
    card: str,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str | int = "5GB",
) -> tuple[Plan, list[str]]:
    """Returns all that an export will write, and notes for the user.

    Args:
        folder: A V1 checkpoint of ours.
        card: Its model card.
        dtype: Of the weights; by default each tensor keeps its own.
        max_shard_size: Largest size of a weight file, such as "5GB", or bytes.

    Raises:
        ConversionError: A checkpoint that transformers' DiffLlama cannot compute.
    """
    config = read_our_config(folder)
    _refuse_unsayable(config)
    name = None if dtype is None else chosen_dtype("dtype", dtype)
    stored = None if name is None else torch_dtype(name)
    reader = CheckpointReader(folder)
    sizes = map_sizes(config)
    rules = diffllama_export_rules(sizes)
    matched = match_tensors(rules, reader, sizes.num_layers, tied=config.tie_word_embeddings)
    files, notes = companion_files(folder)
    fields = _diffllama_fields(config, stored or default_dtype(config, reader))
    record: dict[str, Any] = {
        "format": 1,
        "source": {"name": SourceFolder(folder).name, "hub_id": None, "revision": None, "kind": "diff_llama"},
        "options": {"format": "diffllama", "dtype": name},
        "layout": "halves",
        "promise": {"kind": "equal", "text": "the same function as the source up to rounding"},
        "versions": versions(),
    }
    plan = Plan(
        reader=matched.reader,
        rules=rules,
        dtype=stored,
        allow_nonfinite=False,
        max_shard_bytes=parse_size(max_shard_size),
        record=record,
        texts={"config.json": transformers.DiffLlamaConfig(**fields).to_json_string(), "README.md": card},
        files=files,
    )
    return plan, [*notes, *matched.notes]


def map_sizes(config: Any) -> Sizes:
    """Returns the sizes of a V1 model with heads counted as maps."""
    return Sizes.from_fields(
        config.to_dict(),
        num_heads=2 * config.num_attention_heads,
        num_kv_heads=2 * config.num_key_value_heads,
        map_dim=config.map_dim,
        lm_head=not config.tie_word_embeddings,
    )


def _refuse_unsayable(config: Any) -> None:
    """Refuses a model that transformers' DiffLlama cannot compute, by field (ConversionError)."""
    if config.variant != "v1":
        raise ConversionError("config.json: variant is 'v2', and transformers' DiffLlama is v1; it cannot be exported")
    if config.architectures not in (None, ["DiffLlamaForCausalLM"]):
        raise ConversionError(
            f"config.json: architectures is {config.architectures}, expected ['DiffLlamaForCausalLM']: only a whole "
            "language model can be exported; convert the source without --backbone-only"
        )
    layers = range(config.num_hidden_layers)
    heads = differential_heads(config)
    if any(len(found) < config.num_attention_heads for found in heads):
        field = "differential_layers" if config.differential_heads is None else "differential_heads"
        raise ConversionError(
            f"config.json: {field} says {heads_in_words(heads, config.num_attention_heads)} heads, and transformers' "
            "DiffLlama subtracts in every head; it cannot be exported"
        )
    for field in ("mlp_bias", "use_qk_norm"):
        if getattr(config, field):
            raise ConversionError(f"config.json: {field} is true, and transformers' DiffLlama has none")
    if config.attention_out_bias != config.attention_bias:
        raise ConversionError(
            f"config.json: attention_out_bias is {config.attention_out_bias} next to attention_bias "
            f"{config.attention_bias}, and transformers' DiffLlama has one for both; it cannot be exported"
        )
    for layer in layers:
        if not math.isclose(config.lambda_init[layer], paper_lambda_init(layer), rel_tol=1e-6):
            raise ConversionError(
                f"config.json: lambda_init[{layer}] is {config.lambda_init[layer]}, and transformers' DiffLlama "
                f"always takes the paper's schedule ({paper_lambda_init(layer):.6f}); convert with --lambda-init paper"
            )
        if config.layer_sub_norm_eps(layer) != config.rms_norm_eps:
            raise ConversionError(
                f"config.json: sub_norm_eps of layer {layer} is {config.layer_sub_norm_eps(layer)}, and transformers' "
                f"DiffLlama takes rms_norm_eps ({config.rms_norm_eps}) for it"
            )


def _diffllama_fields(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    known = LLAMA_FIELDS - {"mlp_bias", "pretraining_tp"}
    return {name: value for name, value in config.to_dict().items() if name in known} | {
        "num_attention_heads": 2 * config.num_attention_heads,
        "num_key_value_heads": 2 * config.num_key_value_heads,
        "head_dim": config.map_dim,
        "lambda_std_dev": config.lambda_init_std,
        "architectures": ["DiffLlamaForCausalLM"],
        "dtype": dtype,
    }
