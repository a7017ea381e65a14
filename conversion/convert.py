"""The story of a conversion: find the source, check it, settle every tensor and file, then write them in a stream."""

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaConfig

from conversion.calibrate import CalibrationResult
from conversion.calibrate import Progress as CalibrationProgress
from conversion.calibrated import (
    calibrated_rules,
    calibration_record,
    check_calibration,
    remove_work_folder,
    run_calibration,
    work_folder_of,
)
from conversion.checkpoint import CheckpointReader, check_target, parse_size
from conversion.companions import code_files, companion_files
from conversion.errors import ConversionError
from conversion.layout import HeadPairing
from conversion.model_card import model_card
from conversion.options import CALIBRATION_TOKENS, CalibrationText, ConversionOptions
from conversion.rules import (
    Rule,
    check_tensors,
    diffllama_rules,
    llama_v1_rules,
    llama_v2_rules,
    rename_sources,
    unilm_rules,
)
from conversion.source import SourceFolder, locate_source
from conversion.source_config import SourceModel, check_pairs, read_source_model
from conversion.stream import Plan, Progress, write_plan
from modeling_diff import DiffLlamaConfig


LAMBDA_STD = 0.1  # the paper's
PROMISES = {
    "bit-exact": "the same logits to the last bit in float32 as {source}, and the same tokens",
    "equal": "the same function as {source} up to rounding",
    "parity": "the source's size and its weights, paired; not its function: to be healed before use",
}
# Said anew, or in one spelling (rope_parameters, lambda_init_std) where LLaMA's configs know several.
RESTATED_FIELDS = frozenset(
    [
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "model_type",
        "_name_or_path",
        "rope_scaling",
        "rope_theta",
        "lambda_std_dev",
    ]
)


@dataclass(frozen=True)
class ConversionReport:
    """What was written, or would be: the record (conversion.json), notes for the user, bytes of weights."""

    output: Path
    record: Mapping[str, Any]
    notes: Sequence[str]
    num_bytes: int


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    variant: Literal["v1", "v2"] = "v1",
    *,
    layers: Sequence[int] | None = None,
    lambda_init: Literal["paper"] | float | Sequence[float] | None = None,
    norm: Literal["strict", "neutral"] = "strict",
    lambda_start: float = 0.5,
    pairings: Mapping[int, HeadPairing] | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    stages: Sequence[str] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    seed: int = 0,
    source_layout: Literal["auto", "unilm"] = "auto",
    backbone_only: bool = False,
    allow_nonfinite: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    calibration_progress: CalibrationProgress = lambda layer, num_layers, stage, done: None,
) -> ConversionReport:
    """Converts a LLaMA or transformers DiffLlama checkpoint, folder or Hub id; the output appears whole or not at all.

    `ConversionOptions` says what the choices mean. `calibration` is text on which a V1 conversion is fitted layer by
    layer, in `stages` of `calibrate.Stage` (all by default).
    Raises ConversionError for bad input, FilesError for the target.
    """
    options = ConversionOptions(
        variant, layers, lambda_init, norm, lambda_start, pairings, dtype, seed, source_layout, backbone_only,
        allow_nonfinite,
    )  # fmt: skip
    max_shard_bytes = parse_size(max_shard_size)
    found = locate_source(source, revision, allow_pickle)
    model = read_source_model(found.folder, source_layout, backbone_only)
    if options.variant == "v1":
        check_pairs(model.sizes.num_heads, model.sizes.num_kv_heads)
    check_target(Path(output), source=found.folder, overwrite=overwrite)
    reader = CheckpointReader(found.folder, allow_pickle=allow_pickle)
    plan, notes = plan_conversion(found, model, reader, options, max_shard_bytes)
    work_folder = None
    if calibration is not None:
        text = CalibrationText(Path(calibration), calibration_tokens, stages)
        notes.append(_check_calibration(model, reader, options, text))
        if not dry_run:
            work_folder = work_folder_of(Path(output)) if resume else None
            fitted = run_calibration(found, model, reader, options, text, work_folder, calibration_progress)
            plan, _ = plan_conversion(found, model, reader, options, max_shard_bytes, (text, fitted))
    if dry_run:
        return ConversionReport(Path(output), plan.record, notes, plan.num_bytes)
    record = write_plan(plan, Path(output), found.folder, overwrite=overwrite, resume=resume, progress=progress)
    remove_work_folder(work_folder)
    return ConversionReport(Path(output), record, notes, plan.num_bytes)


def _check_calibration(
    model: SourceModel, reader: CheckpointReader, options: ConversionOptions, text: CalibrationText
) -> str:
    if model.kind != "llama" or options.variant != "v1" or options.pairings:
        raise ConversionError(
            "calibration fits a LLaMA to variant v1 and finds the pairings itself; leave it out for v2, for imports, "
            "and where pairings are given"
        )
    return check_calibration(model, reader, text)


def plan_conversion(
    found: SourceFolder,
    model: SourceModel,
    reader: CheckpointReader,
    options: ConversionOptions,
    max_shard_bytes: int,
    calibrated: tuple[CalibrationText, CalibrationResult] | None = None,
) -> tuple[Plan, list[str]]:
    """Everything that will be written, and notes for the user. ConversionError where source and options do not fit."""
    rules, fields = _rules_and_fields(model, reader, options)
    if calibrated:
        rules = calibrated_rules(rules, calibrated[1])
        lambda_init, epsilons = calibrated[1].lambda_init, calibrated[1].sub_norm_eps
        fields |= {"lambda_init": list(lambda_init), "sub_norm_eps": list(epsilons)}
    rules, dropped = _match(rules, model, reader, options.backbone_only)
    files, notes = companion_files(found.folder)
    notes += [f"left out: {name}" for name in dropped]
    shared, field_notes = _shared_fields(model)
    architecture = "DiffLlamaModel" if options.backbone_only else "DiffLlamaForCausalLM"
    config = DiffLlamaConfig(
        **(shared | fields), architectures=[architecture], dtype=options.torch_dtype or main_dtype(reader)
    )
    promise = _promise(model, options)
    record = {
        "format": 1,
        "source": {"name": found.name, "hub_id": found.hub_id, "revision": found.revision, "kind": model.kind},
        "options": options.recorded(),
        "layout": "paired",
        "pairing": _pairing(config, options, calibrated is not None),
        "calibration": calibration_record(*calibrated) if calibrated else None,
        "promise": {"kind": promise, "text": PROMISES[promise].format(source=_promised_of(rules, reader, options))},
        "versions": versions(),
        "left_out": dropped,
        "parameters": {
            "source": sum(torch.Size(reader.tensors[name].shape).numel() for name in _read_names(rules)),
            "output": sum(torch.Size(rule.shape).numel() for rule in rules),
        },
    }
    texts = {"config.json": config.to_json_string(), "README.md": model_card(found, config, record)}
    plan = Plan(
        reader, rules, options.torch_dtype, options.allow_nonfinite, max_shard_bytes, record, texts,
        files | code_files(),
    )  # fmt: skip
    return plan, notes + field_notes


def _rules_and_fields(
    model: SourceModel, reader: CheckpointReader, options: ConversionOptions
) -> tuple[list[Rule], dict[str, Any]]:
    """The tensors' rules and the config fields that LLaMA does not have."""
    if model.kind == "llama":
        return _llama_v1(model, options) if options.variant == "v1" else _llama_v2(model, reader, options)
    if options != replace(options, variant="v1", layers=None, lambda_init=None, norm="strict", pairings=None):
        raise ConversionError(f"the source is {model.kind}, differential already: it is taken over whole, as it is")
    if model.kind == "unilm":
        ours = {name: getattr(model.config, name) for name in ("lambda_init", "lambda_init_std", "sub_norm_eps")}
        return unilm_rules(model.sizes), ours
    config = model.config
    fields = _pair_fields(model) | {"lambda_init_std": config.lambda_std_dev, "sub_norm_eps": config.rms_norm_eps}
    return diffllama_rules(model.sizes), fields


def _llama_v1(model: SourceModel, options: ConversionOptions) -> tuple[list[Rule], dict[str, Any]]:
    sizes = model.sizes
    layers = options.differential_layers(sizes.num_layers)
    lambda_init = options.lambda_init_list(sizes.num_layers)
    weights = options.norm_weights(lambda_init)
    rules = llama_v1_rules(sizes, options.layer_pairings(sizes), layers, weights, LAMBDA_STD, options.seed)
    fields = _pair_fields(model) | {
        "lambda_init": lambda_init,
        "lambda_init_std": LAMBDA_STD,
        "sub_norm_eps": options.sub_norm_eps(),
        "differential_layers": None if len(layers) == sizes.num_layers else layers,
    }
    return rules, fields


def _pair_fields(model: SourceModel) -> dict[str, Any]:
    """Two LLaMA heads make one of ours, twice as wide."""
    sizes = model.sizes
    return {
        "variant": "v1",
        "num_attention_heads": sizes.num_heads // 2,
        "num_key_value_heads": sizes.num_kv_heads // 2,
        "head_dim": 2 * sizes.map_dim,
    }


def _llama_v2(
    model: SourceModel, reader: CheckpointReader, options: ConversionOptions
) -> tuple[list[Rule], dict[str, Any]]:
    sizes = model.sizes
    layers = options.differential_layers(sizes.num_layers)
    bias = None
    if options.lambda_start != 0.5:
        logit = torch.logit(torch.tensor(options.lambda_start, dtype=torch.float64))
        # Rounded first: o_proj is scaled by what the stored bias gives, not by what was asked for. One for all layers,
        # so that all of the dtypes it is stored in can hold it.
        for dtype in [options.torch_dtype] if options.torch_dtype else _query_dtypes(reader):
            logit = logit.to(dtype)
        bias = logit.item()
    fields = {
        "variant": "v2",
        "lambda_bias": bias is not None,
        "differential_layers": None if len(layers) == sizes.num_layers else layers,
    }
    return llama_v2_rules(sizes, layers, bias), fields


def _query_dtypes(reader: CheckpointReader) -> list[torch.dtype]:
    return [info.dtype for name, info in reader.tensors.items() if name.endswith("q_proj.weight")]


def main_dtype(reader: CheckpointReader) -> torch.dtype:
    """The dtype most of the checkpoint is in, which `from_pretrained` loads it in by default."""
    counts: Counter[torch.dtype] = Counter()
    for info in reader.tensors.values():
        counts[info.dtype] += info.num_bytes
    return counts.most_common(1)[0][0]


def versions() -> dict[str, str]:
    """What a conversion was made with."""
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return packages | {"python": platform.python_version()}


def _read_names(rules: Sequence[Rule]) -> list[str]:
    return sorted({name for rule in rules for name, _ in rule.sources})


def _match(
    rules: list[Rule], model: SourceModel, reader: CheckpointReader, backbone_only: bool
) -> tuple[list[Rule], list[str]]:
    """Rules under the names the source uses, and the names left out. ConversionError for what does not fit."""
    found = {name: info.shape for name, info in reader.tensors.items()}
    if not any(name.startswith("model.") for name in found):
        rules = rename_sources(rules, lambda name: name.removeprefix("model."))
    dropped = []
    if model.config.tie_word_embeddings and "lm_head.weight" in found and not backbone_only:
        _check_tied(reader)
        dropped.append("lm_head.weight")
        del found["lm_head.weight"]
    return rules, dropped + check_tensors(rules, found, model.sizes.num_layers, backbone_only)


def _check_tied(reader: CheckpointReader) -> None:
    head = reader.read("lm_head.weight")
    if not torch.equal(head, reader.read("model.embed_tokens.weight")):
        raise ConversionError(
            "config.json: tie_word_embeddings is true, but lm_head.weight is not the embedding; set it to false to "
            "keep the head, or remove the head from the weights"
        )


def _shared_fields(model: SourceModel) -> tuple[dict[str, Any], list[str]]:
    """LLaMA's fields as they are, and notes on fields of the source that have no place here."""
    known = LlamaConfig().to_dict().keys() - RESTATED_FIELDS
    shared = {name: value for name, value in model.config.to_dict().items() if name in known}
    not_kept = sorted(model.raw.keys() - known - RESTATED_FIELDS - DiffLlamaConfig().to_dict().keys())
    notes = [f"config.json: {name} is not kept" for name in not_kept]
    if shared.get("attention_dropout"):
        notes.append(
            f"config.json: attention_dropout {shared['attention_dropout']} becomes 0, undefined on differences"
        )
        shared["attention_dropout"] = 0.0
    return shared, notes


def _pairing(config: DiffLlamaConfig, options: ConversionOptions, calibrated: bool) -> str | None:
    if config.variant == "v2":
        return None
    return "calibrated" if calibrated else "given" if options.pairings else "adjacent"


def _promise(model: SourceModel, options: ConversionOptions) -> str:
    if model.kind != "llama":
        return "equal"
    if options.variant == "v1":
        return "parity"
    return "bit-exact" if options.lambda_start == 0.5 else "equal"


def _promised_of(rules: Sequence[Rule], reader: CheckpointReader, options: ConversionOptions) -> str:
    """The source, or what the dtype asked for makes of it where that cannot hold all of its numbers."""
    stored = {reader.tensors[name].dtype for name in _read_names(rules)}
    if options.torch_dtype is None or all(
        torch.promote_types(dtype, options.torch_dtype) == options.torch_dtype for dtype in stored
    ):
        return "the source"
    return f"the source rounded to {options.dtype}"
