"""The story of a conversion: find the source, check it, settle every tensor and file, then write them in a stream."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from conversion.calibration.calibrate import Progress as CalibrationProgress
from conversion.calibration.head_choice import num_chosen
from conversion.calibration.head_trials import value_groups
from conversion.calibration.step import (
    Calibration,
    calibrated_plan,
    calibration_work,
    log_estimate,
    prepare_calibration,
    run_calibration,
    run_choice,
    with_calibrated_promise,
    with_text,
)
from conversion.checkpoint import check_target
from conversion.checkpoint.output_folder import check_room, record_text, replace_text
from conversion.checkpoint.writer import SMALL_FILES_BYTES
from conversion.errors import ConversionError
from conversion.evaluation.measurement import Measurement, measure_output, plan_measurement
from conversion.hub.bundle import code_files
from conversion.hub.model_card import model_card
from conversion.mapping.lambdas import not_differential, starting_lambdas
from conversion.mapping.stream import Plan, Progress, planned_config, write_plan
from conversion.options import (
    ConversionConfig,
    config_of,
    parse_size,
)
from conversion.planning.adapt_converted import adapt_converted, check_nothing_else, is_converted
from conversion.planning.adapter_output import AdapterOutput
from conversion.planning.plan import plan_conversion
from conversion.planning.variants import UNCALIBRATED, check_uncalibrated, variant_of_import
from conversion.record import RECORD, ConversionReport
from conversion.source import Source, open_source
from conversion.source.adapter import read_adapter
from conversion.source.architectures import plain_config
from conversion.source.config import check_pairs, read_source_model
from conversion.source.location import locate_source


@dataclass(frozen=True)
class Settled:
    """A conversion of which nothing has been written: all that it takes, and what the user is told."""

    source: Source
    config: ConversionConfig
    plan: Plan
    calibration: Calibration | None
    measurement: Measurement | None
    notes: list[str]
    plan_with: Callable[[ConversionConfig], tuple[Plan, list[str]]]  # the same conversion with other options


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    variant: Literal["v1", "v2"] | None = None,
    *,
    config: ConversionConfig | None = None,
    progress: Progress | None = None,
    before_calibration: Callable[[Calibration], None] = log_estimate,
    calibration_progress: CalibrationProgress = lambda layer, num_layers, stage, done: None,
    **options: Any,
) -> ConversionReport:
    """Converts a LLaMA, Mistral, Qwen or transformers DiffLlama checkpoint; the output appears whole or not at all.

    A LLaMA needs `variant`, and V1 either `calibration`, text on which it is fitted layer by layer, or
    `uncalibrated`, for the plain copy; a source that is differential already needs neither.

    Args:
        source: Folder, GGUF file or Hub id.
        output: Folder to create; with `adapter`, where `source` is converted already, the folder of the adapter.
        variant: "v2" for the same function exactly, "v1" for the same size.
        config: All other choices in one object; or give its fields as keyword arguments, such as
            `calibration="text.txt"`.
        progress: Called with bytes written so far, and bytes in all.
        before_calibration: Called with what the calibration will take; may raise to stop it.
        calibration_progress: Called with layer, number of layers, stage, and how much of the stage is done (0 to 1).
            While heads are chosen the stage is "choice", and one layer more is counted, in which KL is measured.
        options: Fields of `ConversionConfig`.

    Returns:
        What was written, or would be (`dry_run`), with notes for the user.

    Raises:
        ConversionError: Bad input.
        FilesError: The disk or the target folder.
    """
    if variant is not None:
        options["variant"] = variant
    config = config_of(ConversionConfig, config, options)
    target = Path(output)
    if config.adapter is not None and is_converted(source):
        return _adapt(Path(source), target, config)
    settled = _settle(source, target, config)
    if config.dry_run:
        return _dry_report(settled, target)
    calibration = settled.calibration
    if calibration:
        before_calibration(calibration)
    with calibration_work(target) if calibration else nullcontext(Path()) as work_folder:
        if calibration:
            settled = _calibrated(settled, calibration, work_folder, calibration_progress)
        settled = replace(settled, plan=_with_card_and_code(settled.source, settled.plan))
        record = write_plan(
            settled.plan,
            target,
            settled.source.folder,
            overwrite=config.overwrite,
            resume=config.resume,
            progress=progress,
        )
    if settled.measurement:
        record = _write_measured(settled.measurement, settled.source, settled.plan, target, record)
    return _report(settled, target, record, settled.notes)


def _adapt(source: Path, output: Path, config: ConversionConfig) -> ConversionReport:
    """Writes an adapter of the LLaMA for a checkpoint that was converted from it before."""
    check_nothing_else(source, config)
    assert config.adapter is not None  # or this would be a conversion
    adapted = adapt_converted(
        source,
        output,
        config.adapter,
        allow_pickle=config.allow_pickle,
        allow_nonfinite=config.allow_nonfinite,
        overwrite=config.overwrite,
        dry_run=config.dry_run,
    )
    return ConversionReport(output, *adapted)


def _settle(source: str | Path, output: Path, config: ConversionConfig) -> Settled:
    """Finds and checks the source, the target and every choice; reads no weights and writes nothing."""
    check_uncalibrated(config)
    text = config.calibration_text
    if config.variant != "v2":
        # A Hub source is asked for its config alone, before gigabytes come down.
        described = locate_source(source, config.revision, config_only=True)
        found = read_source_model(described.folder, config.source_layout, config.backbone_only)
        if config.variant is None or (config.calibration is None and not config.uncalibrated):
            # Only an import needs no choice.
            config = replace(config, variant=variant_of_import(found.kind, config.variant))
        if not config.pad_heads:
            check_pairs(found.sizes.num_heads, found.sizes.num_kv_heads)
    opened = open_source(
        source,
        revision=config.revision,
        layout=config.source_layout,
        backbone_only=config.backbone_only,
        allow_pickle=config.allow_pickle,
        adapter=config.adapter,
    )
    check_target(output, source=opened.folder, overwrite=config.overwrite)
    carried = None
    if config.adapter is not None:
        if opened.model.kind != "llama":
            raise ConversionError(
                f"--adapter {config.adapter}: adapters are carried over from a LLaMA, and this is {opened.model.kind}"
            )
        lora = read_adapter(
            config.adapter,
            opened.model.sizes,
            allow_pickle=config.allow_pickle,
            allow_nonfinite=config.allow_nonfinite,
        )
        carried = AdapterOutput(lora, merged=text is not None, base=str(output))
    plan_with = partial(plan_conversion, opened, max_shard_bytes=parse_size(config.max_shard_size), adapter=carried)
    plan, notes = plan_with(config)
    opened = replace(opened, reader=plan.reader)
    calibration = prepare_calibration(opened, config, text) if text else None
    if not calibration and config.variant == "v1" and opened.model.kind == "llama":
        notes.append(f"uncalibrated: {UNCALIBRATED}")
    work_bytes = calibration.estimate.disk_bytes if calibration else 0
    check_room(output.resolve(), plan.num_bytes + plan.num_blob_bytes + SMALL_FILES_BYTES + work_bytes)
    held_out = None if config.held_out is None else Path(config.held_out)
    measurement = plan_measurement(opened, plan, held_out) if config.measure else None
    return Settled(
        source=opened,
        config=config,
        plan=plan,
        calibration=calibration,
        measurement=measurement,
        notes=notes,
        plan_with=plan_with,
    )


def _calibrated(
    settled: Settled, calibration: Calibration, work_folder: Path, progress: CalibrationProgress
) -> Settled:
    """The same with fitted layers in its plan; before that, the heads are chosen if they are to be."""
    source = settled.source
    config = settled.config
    calibration = with_text(calibration, source, config, work_folder, config.resume)
    choice = None
    if config.share is not None or config.max_kl is not None:
        choice = run_choice(calibration, source, config, work_folder, config.resume, progress)
        config = choice.options(config)
        plan, _ = settled.plan_with(config)
        settled = replace(settled, plan=plan, notes=[*settled.notes, choice.note])
    fitted = run_calibration(calibration, source, config, work_folder, config.resume, progress)
    plan = calibrated_plan(settled.plan, calibration.text, fitted)
    if choice:
        asked = {"share": settled.config.share, "max_kl": settled.config.max_kl}
        plan = replace(plan, record={**plan.record, "head_choice": asked | choice.record()})
    return replace(settled, plan=plan)


def _report(settled: Settled, output: Path, record: Mapping[str, Any], notes: list[str]) -> ConversionReport:
    return ConversionReport(output, record, notes + _warnings(settled), settled.plan.num_bytes)


def _dry_report(settled: Settled, output: Path) -> ConversionReport:
    """What would be written, and what a calibration would take."""
    if settled.calibration is None:
        return _report(settled, output, settled.plan.record, settled.notes)
    notes = [*settled.notes, settled.calibration.note]
    if (share := settled.config.share) is not None:
        groups = value_groups(plain_config(settled.source.model.config)) * settled.source.model.sizes.num_layers
        num_heads = num_chosen(share, len(groups)) * len(groups[0])
        notes.append(
            f"{num_heads} of {len(groups) * len(groups[0])} heads would become differential, those that cost least"
        )
    return _report(settled, output, with_calibrated_promise(settled.plan.record), notes)


def _with_card_and_code(source: Source, plan: Plan) -> Plan:
    card = model_card(source.folder, planned_config(plan), plan.record)
    return replace(plan, texts={**plan.texts, "README.md": card}, files={**plan.files, **code_files()})


def _warnings(settled: Settled) -> list[str]:
    """Returns what the user should know of the lambdas that are written, and of prompts without a bos."""
    if settled.source.model.kind != "llama":
        return []
    warnings = []
    if settled.calibration and (bos := settled.calibration.omitted_bos):
        warnings.append(
            "the tokenizer puts no bos before a text, and v1 is calibrated after one: begin prompts with "
            f"{bos}, or they are further from the source; verify measures both"
        )
    if warning := not_differential(starting_lambdas(planned_config(settled.plan), settled.plan.record)):
        warnings.append(warning)
    return warnings


def _write_measured(
    measurement: Measurement, source: Source, plan: Plan, output: Path, record: dict[str, Any]
) -> dict[str, Any]:
    """Measures a finished conversion, and adds the numbers to the record, to conversion.json and to the card."""
    record = {**record, "measured": measure_output(measurement, source, output, record)}
    replace_text(output / RECORD, record_text(record))
    replace_text(output / "README.md", model_card(source.folder, planned_config(plan), record))
    return record
