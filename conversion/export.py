"""V1 checkpoints to transformers' own `diffllama`, which loads without custom code: lossless, or refused."""

import math
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from conversion.checkpoint import CheckpointReader, check_target
from conversion.choices import DTYPES, chosen, chosen_dtype, parse_size
from conversion.companions import companion_files
from conversion.config_fields import KEPT_FIELDS
from conversion.convert import ConversionReport, versions
from conversion.errors import ConversionError
from conversion.layout import Sizes
from conversion.model_card import export_card
from conversion.original_model import CONFIG_ERRORS, default_dtype, one_line
from conversion.rules import diffllama_export_rules
from conversion.source import SourceFolder
from conversion.source_config import check_sizes, read_config
from conversion.source_tensors import match_tensors
from conversion.stream import Plan, Progress, write_plan
from modeling_diff import DiffLlamaConfig
from modeling_diff.configuration_diff_llama import paper_lambda_init


def export_checkpoint(
    source: str | Path,
    output: str | Path,
    format: Literal["diffllama"] = "diffllama",
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    resume: bool | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Writes a V1 checkpoint of ours as transformers' DiffLlama.

    The weight of the norm over heads is multiplied into o_proj, rounded once in the dtype written: give float32 to
    keep a bfloat16 model's trained norm without that rounding. Raises ConversionError for what cannot be said there.
    """
    format = chosen("format", format, ("diffllama",))  # type: ignore[assignment]
    dtype = None if dtype is None else chosen_dtype("dtype", dtype)  # type: ignore[assignment]
    found = SourceFolder(Path(source))
    config = read_our_config(found.folder)
    _refuse_unsayable(config)
    check_target(Path(output), source=found.folder, overwrite=overwrite)
    reader = CheckpointReader(found.folder)
    sizes = map_sizes(config)
    rules = diffllama_export_rules(sizes)
    matched = match_tensors(rules, reader, sizes.num_layers, tied=config.tie_word_embeddings)
    files, notes = companion_files(found.folder)
    notes += matched.notes
    torch_dtype = DTYPES[dtype] if dtype else None
    fields = _diffllama_fields(config, torch_dtype or default_dtype(config, reader))
    record: dict[str, Any] = {
        "format": 1,
        "source": {"name": found.name, "hub_id": None, "revision": None, "kind": "diff_llama"},
        "options": {"format": format, "dtype": dtype},
        "layout": "halves",
        "promise": {"kind": "equal", "text": "the same function as the source up to rounding"},
        "versions": versions(),
    }
    texts = {
        "config.json": transformers.DiffLlamaConfig(**fields).to_json_string(),
        "README.md": export_card(found),
    }
    plan = Plan(matched.reader, rules, torch_dtype, False, parse_size(max_shard_size), record, texts, files)
    written = write_plan(plan, Path(output), found.folder, overwrite=overwrite, resume=resume, progress=progress)
    return ConversionReport(Path(output), written, notes, plan.num_bytes)


def read_our_config(folder: Path) -> DiffLlamaConfig:
    """The config of a checkpoint of ours. ConversionError for any other model."""
    raw = read_config(folder)
    if raw["model_type"] != "diff_llama":
        raise ConversionError(
            f"{folder / 'config.json'}: model_type is {raw['model_type']!r}, expected 'diff_llama'; convert it first"
        )
    check_sizes(raw)
    try:
        return DiffLlamaConfig.from_dict(raw)
    except CONFIG_ERRORS as error:
        raise ConversionError(f"{folder / 'config.json'}: {one_line(error)}") from error


def map_sizes(config: Any) -> Sizes:
    """Sizes of a V1 model with heads counted as maps."""
    return Sizes(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=2 * config.num_attention_heads,
        num_kv_heads=2 * config.num_key_value_heads,
        map_dim=config.map_dim,
        lm_head=not config.tie_word_embeddings,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


def _refuse_unsayable(config: Any) -> None:
    """ConversionError for a model that transformers' DiffLlama cannot compute, naming the field."""
    if config.variant != "v1":
        raise ConversionError("config.json: variant is 'v2', and transformers' DiffLlama is v1; it cannot be exported")
    if config.architectures not in (None, ["DiffLlamaForCausalLM"]):
        raise ConversionError(
            f"config.json: architectures is {config.architectures}, expected ['DiffLlamaForCausalLM']: only a whole "
            "language model can be exported; convert the source without --backbone-only"
        )
    layers = range(config.num_hidden_layers)
    if not all(config.is_differential(layer) for layer in layers):
        raise ConversionError(
            f"config.json: differential_layers is {config.differential_layers}, and transformers' DiffLlama subtracts "
            "in every layer; it cannot be exported"
        )
    if config.mlp_bias:
        raise ConversionError("config.json: mlp_bias is true, and transformers' DiffLlama has none")
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
    known = KEPT_FIELDS - {"mlp_bias", "pretraining_tp"}
    return {name: value for name, value in config.to_dict().items() if name in known} | {
        "num_attention_heads": 2 * config.num_attention_heads,
        "num_key_value_heads": 2 * config.num_key_value_heads,
        "head_dim": config.map_dim,
        "lambda_std_dev": config.lambda_init_std,
        "architectures": ["DiffLlamaForCausalLM"],
        "dtype": dtype,
    }
