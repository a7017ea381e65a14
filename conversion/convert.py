"""The story of a conversion: find the source, check it, settle every tensor and file, then write them in a stream."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from conversion.calibration.calibrate import Progress as CalibrationProgress
from conversion.calibration.step import (
    Calibration,
    calibrated_plan,
    calibration_work,
    log_estimate,
    prepare_calibration,
    run_calibration,
)
from conversion.checkpoint import check_target
from conversion.checkpoint.output_folder import check_room, record_text, replace_text
from conversion.checkpoint.writer import SMALL_FILES_BYTES
from conversion.errors import ConversionError, typed
from conversion.evaluation.measurement import Measurement, measure_output, plan_measurement
from conversion.hub.bundle import code_files
from conversion.hub.model_card import model_card
from conversion.mapping.heads import HeadPairing
from conversion.mapping.lambdas import not_differential, starting_lambdas
from conversion.mapping.stream import Plan, Progress, planned_config, write_plan
from conversion.options import CALIBRATION_TOKENS, LAMBDA_FLOOR, CalibrationText, ConversionOptions, chosen, parse_size
from conversion.planning.adapt_converted import adapt_converted, check_nothing_else, is_converted
from conversion.planning.adapter_output import AdapterOutput
from conversion.planning.plan import plan_conversion
from conversion.planning.variants import UNCALIBRATED, check_uncalibrated, variant_of_import
from conversion.record import RECORD, ConversionReport
from conversion.source import Source, open_source
from conversion.source.adapter import read_adapter
from conversion.source.config import check_pairs, read_source_model
from conversion.source.location import locate_source


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
    opened = open_source(
        source,
        revision=revision,
        layout=source_layout,
        backbone_only=backbone_only,
        allow_pickle=allow_pickle,
        adapter=adapter,
    )
    if options.variant == "v1":
        check_pairs(opened.model.sizes.num_heads, opened.model.sizes.num_kv_heads)
    check_target(Path(output), source=opened.folder, overwrite=overwrite)
    carried = None
    if adapter is not None:
        if opened.model.kind != "llama":
            raise ConversionError(
                f"--adapter {adapter}: adapters are carried over from a LLaMA, and this is {opened.model.kind}"
            )
        lora = read_adapter(adapter, opened.model.sizes, allow_pickle=allow_pickle, allow_nonfinite=allow_nonfinite)
        carried = AdapterOutput(lora, merged=text is not None, base=str(output))
    plan, notes = plan_conversion(opened, options, max_shard_bytes, carried)
    opened = replace(opened, reader=plan.reader)
    ready = prepare_calibration(opened, options, text) if text else None
    if ready and dry_run:
        notes.append(ready.note)
    if not ready and options.variant == "v1" and opened.model.kind == "llama":
        notes.append(f"uncalibrated: {UNCALIBRATED}")
    work_bytes = ready.estimate.disk_bytes if ready else 0
    check_room(
        Path(output).resolve(), plan.num_bytes + SMALL_FILES_BYTES + work_bytes + sum(map(len, plan.blobs.values()))
    )
    text_path = None if held_out is None else Path(held_out)
    measurement = plan_measurement(opened, plan, text_path) if measure else None
    if dry_run:
        return ConversionReport(Path(output), plan.record, notes + _warnings(opened, plan), plan.num_bytes)
    if ready:
        before_calibration(ready)
    with calibration_work(Path(output)) if ready else nullcontext(Path()) as work_folder:
        if ready:
            fitted = run_calibration(ready, opened, options, work_folder, resume, calibration_progress)
            plan = calibrated_plan(plan, ready.text, fitted)
        plan = _with_card_and_code(opened, plan)
        record = write_plan(plan, Path(output), opened.folder, overwrite=overwrite, resume=resume, progress=progress)
    if measurement:
        record = _write_measured(measurement, opened, plan, Path(output), record)
    return ConversionReport(Path(output), record, notes + _warnings(opened, plan), plan.num_bytes)


def _with_card_and_code(source: Source, plan: Plan) -> Plan:
    card = model_card(source.folder, planned_config(plan), plan.record)
    return replace(plan, texts={**plan.texts, "README.md": card}, files={**plan.files, **code_files()})


def _warnings(source: Source, plan: Plan) -> list[str]:
    """What the user should know of the lambdas that are written."""
    if source.model.kind != "llama":
        return []
    warning = not_differential(starting_lambdas(planned_config(plan), plan.record))
    return [warning] if warning else []


def _write_measured(
    measurement: Measurement, source: Source, plan: Plan, output: Path, record: dict[str, Any]
) -> dict[str, Any]:
    """The record of a finished conversion with what was measured; so do conversion.json and the card have it."""
    record = {**record, "measured": measure_output(measurement, source, output, record)}
    replace_text(output / RECORD, record_text(record))
    replace_text(output / "README.md", model_card(source.folder, planned_config(plan), record))
    return record
