"""Everything that a conversion will write, settled before the first byte of data is read."""

from typing import Any

import torch

from conversion.checkpoint.companions import companion_files
from conversion.mapping.stream import Plan
from conversion.options import ConversionOptions
from conversion.planning.adapter_output import AdapterOutput
from conversion.planning.output_config import check_loadable, output_config
from conversion.planning.variants import padding, padding_note, promise, rules_and_fields
from conversion.record import versions
from conversion.source import Source
from conversion.source.config import check_against_weights
from conversion.source.generation_settings import GENERATION, generation_settings
from conversion.source.tensors import match_tensors
from modeling_diff.diff_llama_fields import FIXED_FIELDS


def plan_conversion(
    source: Source, options: ConversionOptions, max_shard_bytes: int, adapter: AdapterOutput | None = None
) -> tuple[Plan, list[str]]:
    """Returns all that will be written but model card and code, and notes for the user.

    Raises:
        ConversionError: Source and options do not fit together.
    """
    model = source.model
    check_against_weights(model.sizes, source.reader.tensors)
    rules, fields = rules_and_fields(model, source.reader, options)
    matched = match_tensors(
        rules,
        source.reader,
        model.sizes.num_layers,
        tied=model.config.tie_word_embeddings,
        backbone_only=options.backbone_only,
        fixed_fields=FIXED_FIELDS[model.config.model_type],
    )
    files, notes = companion_files(source.folder)
    notes += matched.notes
    if model.raw.get("auto_map") and model.kind != "unilm":
        notes.append(
            "config.json names model code of its own (auto_map), which is not copied: converted is what transformers' "
            "own class computes"
        )
    config, field_notes = output_config(model, fields, source.reader, options)
    read = list(matched.reader.tensors.values())
    record: dict[str, Any] = {
        "format": 1,
        "source": {
            "name": source.location.name,
            "hub_id": source.location.hub_id,
            "revision": source.location.revision,
            "kind": model.kind,
            "model_type": model.config.model_type,
        },
        "options": options.recorded(),
        "layout": "paired",
        "pairing": _pairing(options) if config.variant == "v1" else None,
        "padding": padding(model.sizes) if options.pad_heads else None,
        "calibration": None,
        "promise": promise(model, options, {info.dtype for info in read}),
        "measured": None,
        "versions": versions(),
        "left_out": list(matched.left_out),
        "parameters": {
            "source": sum(torch.Size(info.shape).numel() for info in read),
            "output": sum(torch.Size(rule.shape).numel() for rule in rules),
        },
    }
    if unpacked := source.location.unpacked:
        record["source"]["gguf"] = dict(unpacked.record)
        notes += unpacked.notes
    if options.pad_heads:
        notes.append(padding_note(model.sizes))
    if adapter is not None:
        record["adapter"] = adapter.record
        notes.append(adapter.note)
    texts = {"config.json": config.to_json_string()}
    check_loadable(texts["config.json"], rules)
    if settings := generation_settings(source.folder, model.raw, config.to_diff_dict()):
        texts[GENERATION] = settings
        notes.append(f"config.json: its settings of generate are written to {GENERATION}")
    plan = Plan(
        reader=matched.reader,
        rules=rules,
        dtype=options.torch_dtype,
        allow_nonfinite=options.allow_nonfinite,
        max_shard_bytes=max_shard_bytes,
        record=record,
        texts=texts,
        files=files,
    )
    return (plan if adapter is None else adapter.place(plan)), notes + field_notes


def _pairing(options: ConversionOptions) -> str:
    return "given" if options.pairings else "adjacent"
