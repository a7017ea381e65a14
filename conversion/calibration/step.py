"""Calibration as a step of a conversion: its checks before the start, its work folder, and its result in the plan."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from conversion.calibration.calibrate import (
    CalibrationResult,
    Progress,
    Stage,
    calibrate,
    check_enough,
    check_tokens,
)
from conversion.calibration.closed_form import lambdas_to_try
from conversion.calibration.estimate import CalibrationEstimate, duration_text, estimate_calibration
from conversion.calibration.gradient_fit import LocalFit
from conversion.calibration.head_choice import HeadChoice, choose_heads, num_chosen
from conversion.calibration.head_trials import HeadTrials, value_groups
from conversion.calibration.self_text import SELF_TEXT, check_self_text, has_text, self_text
from conversion.calibration.store import has_results
from conversion.checkpoint.companions import read_tokenizer
from conversion.checkpoint.kept_work import calibration_folder, keep_note
from conversion.checkpoint.output_folder import locked, parents_made
from conversion.data.text import leaves_bos_out, read_calibration
from conversion.errors import ConversionError, typed
from conversion.mapping.stream import Plan, planned_config
from conversion.options import CalibrationText, ConversionOptions
from conversion.record import CALIBRATED
from conversion.source import Source
from conversion.source.architectures import plain_config


logger = logging.getLogger(__name__)
ROW_TOKENS = 1024  # per sequence, or what the model can read if that is less


@dataclass(frozen=True)
class Calibration:
    """A calibration that passed its checks and can start.

    Attributes:
        text: The text, with the number of tokens in whole sequences.
        rows: Its token ids (R, T); None if the source is to write them.
        row_tokens: T, tokens per sequence.
        estimate: What the calibration takes.
        whole: Whether all of the text is read, as it is shorter than the effort asks for.
        omitted_bos: The bos that the sequences begin with and the tokenizer does not put before a text, if so.
    """

    text: CalibrationText
    rows: torch.Tensor | None
    row_tokens: int
    estimate: CalibrationEstimate
    whole: bool = False
    omitted_bos: str | None = None

    @property
    def note(self) -> str:
        """What the calibration takes, as one sentence."""
        gigabyte = 10**9
        of = ""
        if self.whole:
            of = " (all of the text)"
        elif self.rows is None:
            of = " that the source writes"
        effort = f", effort {self.text.effort}" if self.text.effort else ""
        return (
            f"calibration on {self.text.tokens:,} tokens{of}{effort}: about {duration_text(self.estimate.seconds)} on "
            f"this machine's {_device()}, {self.estimate.memory_bytes / gigabyte:.1f} GB of memory, "
            f"{self.estimate.disk_bytes / gigabyte:.1f} GB of disk"
        )


def prepare_calibration(source: Source, options: ConversionOptions, text: CalibrationText) -> Calibration:
    """Checks all that a calibration needs, and reads the text unless the source is to write it.

    Args:
        source: The LLaMA.
        options: Choices of the conversion.
        text: The text, and how it is used.

    Returns:
        The calibration, with an estimate of what it takes.

    Raises:
        ConversionError: Text, options or source with which the calibration would fail.
    """
    model = source.model
    if model.kind != "llama" or options.variant != "v1":
        raise ConversionError("calibration fits a LLaMA to variant v1; leave it out for v2, and for imports")
    if not getattr(model.config, "is_causal", True):
        raise ConversionError(
            "config.json: is_causal is false, and calibration fits causal attention alone; leave it out "
            "(--uncalibrated), or convert to v2, which is exact (--variant v2)"
        )
    chosen = options.share is not None or options.max_kl is not None
    if chosen and Stage.REFIT not in _stages(text):
        asked_by = typed("max_kl" if options.share is None else "share")
        raise ConversionError(
            f"{asked_by} chooses heads by what they cost after a refit, which {typed('stages')} "
            f"{','.join(_stages(text))} leaves out; add refit, or name the heads' {typed('layers')}"
        )
    layers = options.differential_layers(model.sizes.num_layers)
    for layer in layers:
        lambdas_to_try(_lambda_choice(options), layer, text.lambda_floor)
    config = plain_config(model.config)
    row_tokens = min(config.max_position_embeddings, ROW_TOKENS)
    asked = text.recipe.tokens
    rows = None
    tokenizer = read_tokenizer(source.folder)
    if text.path is None:
        check_self_text(source)
    else:
        rows = read_calibration(
            text.path,
            tokenizer,
            asked,
            row_tokens,
            model.sizes.vocab_size,
            whole_if_shorter=text.tokens is None,
        )
        check_tokens(config, rows, _stages(text))
    num_rows = asked // row_tokens if rows is None else len(rows)
    check_enough(config, num_rows, row_tokens, _stages(text))
    num_tokens = num_rows * row_tokens
    # At most: those of one layer are often chosen together.
    num_units = num_chosen(options.share or 1.0, len(layers) * len(value_groups(config)))
    estimate = estimate_calibration(
        config,
        num_tokens,
        row_tokens,
        stages=_stages(text),
        local=_local(text),
        device=_device(),
        num_layers=min(len(layers), num_units) if chosen else len(layers),
        written=rows is None,
        chosen=chosen,
    )
    whole = num_tokens < asked // row_tokens * row_tokens
    return Calibration(
        replace(text, tokens=num_tokens),
        rows,
        row_tokens,
        estimate,
        whole=whole,
        omitted_bos=tokenizer.bos_token if leaves_bos_out(tokenizer) else None,
    )


def log_estimate(calibration: Calibration) -> None:
    """Logs what a calibration takes, before it starts."""
    logger.info(calibration.note)


def with_text(
    calibration: Calibration, source: Source, options: ConversionOptions, work_folder: Path, resume: bool | None
) -> Calibration:
    """Returns the calibration with its token ids: the source writes them now, if it is to.

    Args:
        calibration: What was checked.
        source: The LLaMA.
        options: Choices of the conversion.
        work_folder: Where the text is kept.
        resume: What to do with work that is there: `conversion.checkpoint.kept_work`.
    """
    if calibration.rows is not None:
        return calibration
    num_tokens = calibration.text.tokens or 0
    rows = self_text(source, work_folder, num_tokens, calibration.row_tokens, options.seed, _device(), resume)
    return replace(calibration, rows=rows)


def run_choice(
    calibration: Calibration,
    source: Source,
    options: ConversionOptions,
    work_folder: Path,
    resume: bool | None,
    progress: Progress,
) -> HeadChoice:
    """Chooses the heads to convert, for `share` or `max_kl`. Arguments as for `run_calibration`."""
    assert calibration.rows is not None
    trials = HeadTrials(
        source.reader,
        source.model.config,
        calibration.rows,
        paired=Stage.PAIRING in _stages(calibration.text),
        lambda_floor=calibration.text.lambda_floor,
        work_folder=choice_folder(work_folder),
        resume=resume,
        progress=progress,
        **_fit_choices(options),
    )
    return choose_heads(trials, share=options.share, max_kl=options.max_kl)


def run_calibration(
    calibration: Calibration,
    source: Source,
    options: ConversionOptions,
    work_folder: Path,
    resume: bool | None,
    progress: Progress,
) -> CalibrationResult:
    """Fits the layers, on a GPU if there is one.

    Args:
        calibration: What was checked, with its text.
        source: The LLaMA.
        options: Choices of the conversion.
        work_folder: Where finished layers are kept.
        resume: What to do with work that is there: `conversion.checkpoint.kept_work`.
        progress: As `calibrate` has it.

    Returns:
        The fitted attention, by layer.
    """
    assert calibration.rows is not None
    return calibrate(
        source.reader,
        source.model.config,
        calibration.rows,
        stages=_stages(calibration.text),
        layers=options.differential_layers(source.model.sizes.num_layers),
        heads=options.mixed_heads(source.model.sizes),
        pad_heads=options.pad_heads,
        local=_local(calibration.text),
        work_folder=work_folder,
        resume=resume,
        progress=progress,
        **_fit_choices(options),
    )


def calibrated_plan(plan: Plan, text: CalibrationText, result: CalibrationResult) -> Plan:
    """Returns a plan in which the attention of the calibrated layers is the fitted one, in config and record as well.

    Args:
        plan: The plan of the uncalibrated conversion.
        text: The text that was used.
        result: The fitted attention.
    """
    rules = [
        replace(rule, build=lambda *_, name=rule.target: result[name]) if rule.target in result.names else rule
        for rule in plan.rules
    ]
    config = planned_config(plan)
    config.lambda_init = list(result.lambda_init)
    config.sub_norm_eps = list(result.sub_norm_eps)
    record = {
        **with_calibrated_promise(plan.record),
        "pairing": "calibrated",
        "calibration": calibration_record(text, result),
    }
    return replace(plan, rules=rules, texts={**plan.texts, "config.json": config.to_json_string()}, record=record)


def with_calibrated_promise(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of a plan with what is promised of a calibrated conversion."""
    return {**record, "promise": {**record["promise"], "text": CALIBRATED}}


def calibration_record(text: CalibrationText, result: CalibrationResult) -> dict[str, Any]:
    """Returns the entry of conversion.json: the text by name, and what every stage reached in every layer."""
    return {
        "text": SELF_TEXT if text.path is None else text.path.name,
        "tokens": text.tokens,
        "effort": text.effort,
        "lambda_floor": text.lambda_floor,
        "stages": [str(stage) for stage in _stages(text)],
        "pairings": [
            {"query_heads": pairing.query_heads, "kv_heads": pairing.kv_heads} for pairing in result.pairings
        ],
        "layers": list(result.records),
    }


@contextmanager
def calibration_work(output: Path) -> Iterator[Path]:
    """Yields the folder of a calibration's finished layers: locked, and removed when the output is written.

    Whatever stops the run leaves them there.

    Args:
        output: The target of the conversion.

    Raises:
        FilesError: Another run has the folder.
    """
    folder = calibration_folder(output.resolve())
    with parents_made(folder), locked(folder):
        try:
            yield folder
        except BaseException as error:
            if has_results(folder) or has_results(choice_folder(folder)) or has_text(folder):
                keep_note(error, folder)
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def choice_folder(work_folder: Path) -> Path:
    """Returns where a choice of heads keeps what it has fitted."""
    return work_folder / "choice"


def _stages(text: CalibrationText) -> tuple[Stage, ...]:
    return tuple(Stage(stage) for stage in text.recipe.stages)


def _local(text: CalibrationText) -> LocalFit:
    return LocalFit(steps=text.recipe.steps, lambda_floor=text.lambda_floor)


def _fit_choices(options: ConversionOptions) -> dict[str, Any]:
    """What a choice of heads and the calibration that follows have to agree on."""
    return {
        "lambda_init": _lambda_choice(options),
        "norm": options.norm,
        "pairings": options.pairings,
        "dtype": options.torch_dtype,
        "seed": options.seed,
        "device": _device(),
    }


def _lambda_choice(options: ConversionOptions) -> Any:
    return "grid" if options.lambda_init is None else options.lambda_init


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
