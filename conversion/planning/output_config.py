"""The config.json of a converted checkpoint: LLaMA's fields from the source, ours from the rules, and built once."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import GenerationConfig

from conversion.checkpoint import CheckpointReader
from conversion.checkpoint.json_files import parse_json
from conversion.errors import ConversionError, quote
from conversion.mapping.rules import Rule
from conversion.options import ConversionOptions
from conversion.source.config import SourceModel
from conversion.source.config_fields import not_kept
from conversion.source.model import BUILD_ERRORS, build_on_meta, default_dtype, one_line
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM, DiffLlamaModel
from modeling_diff.diff_llama_fields import shared_fields


MAX_NOTES = 8  # of one kind; a config can have thousands of fields that nobody reads


def output_config(
    model: SourceModel, ours: Mapping[str, Any], reader: CheckpointReader, options: ConversionOptions
) -> tuple[DiffLlamaConfig, list[str]]:
    """Makes the config of the output.

    Args:
        model: The source, whose LLaMA fields are kept as they are.
        ours: `variant` and the other fields that LLaMA does not have.
        reader: The source's tensors.
        options: `dtype`, `backbone_only` and `pad_heads` matter here.

    Returns:
        The config, and notes for the user on fields that are not kept or mean something unusual.

    Raises:
        ConversionError: The fields do not go together.
    """
    architecture = "DiffLlamaModel" if options.backbone_only else "DiffLlamaForCausalLM"
    dtype = options.torch_dtype or default_dtype(model.config, reader)
    try:
        config = DiffLlamaConfig.from_llama(
            model.config, pad_heads=options.pad_heads, architectures=[architecture], dtype=dtype, **ours
        )
    except BUILD_ERRORS as error:
        raise ConversionError(f"config.json: no differential model can have it: {one_line(error)}") from error
    return config, _field_notes(model)


def check_loadable(text: str, rules: Iterable[Rule]) -> None:
    """Builds the model of a config.json on the meta device, as `from_pretrained` will.

    Args:
        text: The file that will be written.
        rules: One for each tensor that will be written.

    Raises:
        ConversionError: The model cannot be built, or has other tensors than those that will be written.
    """
    raw = parse_json(text.encode(), "config.json of the output")
    backbone = raw["architectures"] == ["DiffLlamaModel"]
    model_class = DiffLlamaModel if backbone else DiffLlamaForCausalLM
    try:
        model = build_on_meta(lambda: model_class(DiffLlamaConfig.from_dict(raw)))
    except BUILD_ERRORS as error:
        raise ConversionError(f"config.json: no differential model can be built with it: {one_line(error)}") from error
    prefix = "model." if backbone else ""
    needed = {prefix + name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    written = {rule.target: rule.shape for rule in rules}
    differing = sorted(name for name in needed.keys() | written.keys() if needed.get(name) != written.get(name))
    if differing:
        name = differing[0]
        raise ConversionError(
            f"config.json: it makes tensor {name} {needed.get(name, 'unknown')}, which would be written as "
            f"{written.get(name, 'nothing')}; a hidden_act with weights of its own cannot be converted"
        )


def _field_notes(model: SourceModel) -> list[str]:
    """Returns notes on fields of the source that have no place here, or mean something unusual."""
    shared = shared_fields(model.config)
    ours = DiffLlamaConfig().to_dict() | GenerationConfig().to_dict()
    unread = [_printable(name) for name in not_kept(model.raw, ours, model.architecture.own_fields)]
    notes = [f"config.json: {name} is not kept" for name in unread[:MAX_NOTES]]
    if rest := len(unread[MAX_NOTES:]):
        notes.append(f"config.json: {rest} more fields that LLaMA does not read are not kept")
    if "is_causal" in shared:
        notes.append("config.json: is_causal is false: every token attends to all others, in the output as in LLaMA")
    if shared.get("attention_dropout"):
        notes.append(
            f"config.json: attention_dropout {shared['attention_dropout']} becomes 0, undefined on differences"
        )
    return notes


def _printable(name: str) -> str:
    return name if name.isidentifier() and name.isascii() else quote(name)
