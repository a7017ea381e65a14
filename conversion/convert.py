"""The story of a conversion: find the source, check it, settle every tensor and file, then write them in a stream."""

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from conversion.adapter import read_adapter
from conversion.adapter_base import adapt_converted, check_nothing_else, is_converted
from conversion.adapter_output import AdapterOutput
from conversion.calibrate import CalibrationResult
from conversion.calibrate import Progress as CalibrationProgress
from conversion.calibrated import (
    Calibration,
    calibrated_rules,
    calibration_record,
    calibration_work,
    log_estimate,
    prepare_calibration,
    run_calibration,
)
from conversion.checkpoint import CheckpointReader, check_target
from conversion.choices import chosen, parse_size
from conversion.companions import code_files, companion_files
from conversion.errors import ConversionError, typed
from conversion.generation_settings import GENERATION, generation_settings
from conversion.lambdas import not_differential
from conversion.layout import HeadPairing
from conversion.measurement import Measurement, measure_output, plan_measurement, planned_config
from conversion.model_card import model_card, starting_lambdas
from conversion.options import CALIBRATION_TOKENS, LAMBDA_FLOOR, CalibrationText, ConversionOptions
from conversion.output_config import check_loadable, output_config
from conversion.source import SourceFolder, locate_source
from conversion.source_config import SourceModel, check_against_weights, check_pairs, read_source_model
from conversion.source_tensors import match_tensors
from conversion.stream import RECORD, Plan, Progress, write_plan
from conversion.target import check_room, record_text, replace_text
from conversion.variants import UNCALIBRATED, check_uncalibrated, promise, rules_and_fields, variant_of_import
from conversion.writer import SMALL_FILES_BYTES
from modeling_diff import DiffLlamaConfig


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
    variant: Literal["v1", "v2"] | None = None,
    *,
    uncalibrated: bool = False,
    layers: Sequence[int] | None = None,
    lambda_init: Literal["paper"] | float | Sequence[float] | None = None,
    norm: Literal["strict", "neutral"] = "strict",
    lambda_start: float = 0.5,
    pairings: Mapping[int, HeadPairing] | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    stages: Sequence[str] | None = None,
    lambda_floor: float = LAMBDA_FLOOR,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    seed: int = 0,
    adapter: str | Path | None = None,
    source_layout: Literal["auto", "unilm"] = "auto",
    backbone_only: bool = False,
    allow_nonfinite: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    resume: bool | None = None,
    dry_run: bool = False,
    measure: bool = True,
    held_out: str | Path | None = None,
    progress: Progress | None = None,
    before_calibration: Callable[[Calibration], None] = log_estimate,
    calibration_progress: CalibrationProgress = lambda layer, num_layers, stage, done: None,
) -> ConversionReport:
    """Converts a LLaMA or transformers DiffLlama checkpoint, folder or Hub id; the output appears whole or not at all.

    `ConversionOptions` says what the choices mean. A LLaMA needs `variant`, and V1 either `calibration`, text on which
    it is fitted layer by layer in `stages` of `calibrate.Stage` (all by default), or `uncalibrated`, for the plain
    copy; a source that is differential already needs neither. No stage takes lambda below `lambda_floor`.
    `before_calibration` is given what the calibration will take, and may raise.
    `adapter` is a folder with a LoRA of the LLaMA. It is carried over exactly, to the folder `adapter` in the output;
    where the layers are calibrated it is merged first. Where `source` is converted already, `output` is the adapter.
    `resume`: None continues the work of the same run, if one was stopped, and refuses to lose layers of another; True
    refuses shards of another as well, False discards all of it.
    The record says what was measured at the end (`measure`), on a standard text or on `held_out`.
    Raises ConversionError for bad input, FilesError for the target.
    """
    if adapter is not None and is_converted(source):
        check_nothing_else(source, (variant, calibration, layers, lambda_init, pairings, dtype, uncalibrated or None))
        adapted = adapt_converted(
            Path(source),
            Path(output),
            adapter,
            allow_pickle=allow_pickle,
            allow_nonfinite=allow_nonfinite,
            overwrite=overwrite,
            dry_run=dry_run,
        )
        return ConversionReport(Path(output), *adapted)
    variant = None if variant is None else chosen("variant", variant, ("v1", "v2"))  # type: ignore[assignment]
    check_uncalibrated(variant, calibration is not None, uncalibrated)
    if variant is None or (variant == "v1" and calibration is None and not uncalibrated):
        # Only an import needs no choice. A Hub source is asked for its config alone, before gigabytes come down.
        described = locate_source(source, revision, config_only=True).folder
        variant = variant_of_import(read_source_model(described, source_layout, backbone_only).kind, variant)
    options = ConversionOptions(
        variant, layers, lambda_init, norm, lambda_start, pairings, dtype, seed, source_layout, backbone_only,
        allow_nonfinite,
    )  # fmt: skip
    text = (
        None if calibration is None else CalibrationText(Path(calibration), calibration_tokens, stages, lambda_floor)
    )
    given = {"stages": stages, "calibration_tokens": calibration_tokens, "lambda_floor": lambda_floor}
    defaults = {"stages": None, "calibration_tokens": CALIBRATION_TOKENS, "lambda_floor": LAMBDA_FLOOR}
    if text is None and (changed := [name for name in given if given[name] != defaults[name]]):
        raise ConversionError(f"{typed(changed[0])} needs text to calibrate on; give it ({typed('calibration')})")
    max_shard_bytes = parse_size(max_shard_size)
    found = locate_source(source, revision, allow_pickle)
    model = read_source_model(found.folder, source_layout, backbone_only)
    if options.variant == "v1":
        check_pairs(model.sizes.num_heads, model.sizes.num_kv_heads)
    check_target(Path(output), source=found.folder, overwrite=overwrite)
    next_to_weights = adapter is not None and Path(adapter).resolve() == found.folder.resolve()
    reader = CheckpointReader(found.folder, allow_pickle=allow_pickle, with_adapter=next_to_weights)
    carried = None
    if adapter is not None:
        lora = read_adapter(adapter, model, allow_pickle=allow_pickle, allow_nonfinite=allow_nonfinite)
        carried = AdapterOutput(lora, merged=text is not None, base=str(output))
    plan, notes = plan_conversion(found, model, reader, options, max_shard_bytes, adapter=carried)
    ready = prepare_calibration(found, model, plan.reader, options, text) if text else None
    if ready and dry_run:
        notes.append(ready.note)
    if not ready and options.variant == "v1" and model.kind == "llama":
        notes.append(f"uncalibrated: {UNCALIBRATED}")
    work_bytes = ready.estimate.disk_bytes if ready else 0
    check_room(
        Path(output).resolve(), plan.num_bytes + SMALL_FILES_BYTES + work_bytes + sum(map(len, plan.blobs.values()))
    )
    text_path = None if held_out is None else Path(held_out)
    measurement = plan_measurement(found, model, plan, Path(output), text_path) if measure else None
    if dry_run:
        return ConversionReport(Path(output), plan.record, notes, plan.num_bytes)
    if ready:
        before_calibration(ready)
    with calibration_work(Path(output)) if ready else nullcontext(Path()) as work_folder:
        if ready:
            fitted = run_calibration(ready, model, plan.reader, options, work_folder, resume, calibration_progress)
            plan, notes = plan_conversion(
                found, model, reader, options, max_shard_bytes, (ready.text, fitted), carried
            )
        record = write_plan(plan, Path(output), found.folder, overwrite=overwrite, resume=resume, progress=progress)
    if measurement:
        record = _write_measured(measurement, found, model, plan, Path(output), record)
    return ConversionReport(Path(output), record, notes, plan.num_bytes)


def plan_conversion(
    found: SourceFolder,
    model: SourceModel,
    reader: CheckpointReader,
    options: ConversionOptions,
    max_shard_bytes: int,
    calibrated: tuple[CalibrationText, CalibrationResult] | None = None,
    adapter: AdapterOutput | None = None,
) -> tuple[Plan, list[str]]:
    """Everything that will be written, and notes for the user. ConversionError where source and options do not fit."""
    check_against_weights(model.sizes, reader.tensors)
    rules, fields = rules_and_fields(model, reader, options)
    if calibrated:
        rules = calibrated_rules(rules, calibrated[1])
        lambda_init, epsilons = calibrated[1].lambda_init, calibrated[1].sub_norm_eps
        fields |= {"lambda_init": list(lambda_init), "sub_norm_eps": list(epsilons)}
    matched = match_tensors(
        rules,
        reader,
        model.sizes.num_layers,
        tied=model.config.tie_word_embeddings,
        backbone_only=options.backbone_only,
    )
    files, notes = companion_files(found.folder)
    notes += matched.notes
    if model.raw.get("auto_map") and model.kind != "unilm":
        notes.append(
            "config.json names model code of its own (auto_map), which is not copied: converted is what transformers' "
            "own class computes"
        )
    config, field_notes = output_config(model, fields, reader, options)
    read = list(matched.reader.tensors.values())
    record = {
        "format": 1,
        "source": {"name": found.name, "hub_id": found.hub_id, "revision": found.revision, "kind": model.kind},
        "options": options.recorded(),
        "layout": "paired",
        "pairing": _pairing(config, options, calibrated is not None),
        "calibration": calibration_record(*calibrated) if calibrated else None,
        "promise": promise(model, options, {info.dtype for info in read}, calibrated is not None),
        "measured": None,
        "versions": versions(),
        "left_out": list(matched.left_out),
        "parameters": {
            "source": sum(torch.Size(info.shape).numel() for info in read),
            "output": sum(torch.Size(rule.shape).numel() for rule in rules),
        },
    }
    if adapter is not None:
        record["adapter"] = adapter.record
        notes.append(adapter.note)
    texts = {"config.json": config.to_json_string(), "README.md": model_card(found, config, record)}
    check_loadable(texts["config.json"], rules)
    if settings := generation_settings(found.folder, model.raw, config.to_diff_dict()):
        texts[GENERATION] = settings
        notes.append(f"config.json: its settings of generate are written to {GENERATION}")
    plan = Plan(
        matched.reader, rules, options.torch_dtype, options.allow_nonfinite, max_shard_bytes, record, texts,
        files | code_files(),
    )  # fmt: skip
    warning = not_differential(starting_lambdas(config, record)) if model.kind == "llama" else None
    plan = plan if adapter is None else adapter.place(plan)
    return plan, notes + field_notes + ([warning] if warning else [])


def _write_measured(
    measurement: Measurement,
    found: SourceFolder,
    model: SourceModel,
    plan: Plan,
    output: Path,
    record: dict[str, Any],
) -> dict[str, Any]:
    """The record of a finished conversion with what was measured; so do conversion.json and the card have it."""
    record = {**record, "measured": measure_output(measurement, found, model, output, record)}
    replace_text(output / RECORD, record_text(record))
    replace_text(output / "README.md", model_card(found, planned_config(plan), record))
    return record


def versions() -> dict[str, str]:
    """What a conversion was made with."""
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return packages | {"python": platform.python_version()}


def _pairing(config: DiffLlamaConfig, options: ConversionOptions, calibrated: bool) -> str | None:
    if config.variant == "v2":
        return None
    return "calibrated" if calibrated else "given" if options.pairings else "adjacent"
