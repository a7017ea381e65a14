"""Calibration as a step of a conversion: what it is asked, where it keeps its work, and what becomes of its result."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from conversion.calibrate import DEFAULT_STAGES, CalibrationResult, Progress, Stage, calibrate
from conversion.calibration_data import read_calibration
from conversion.calibration_estimate import estimate_calibration
from conversion.checkpoint import CheckpointReader
from conversion.companions import read_tokenizer
from conversion.errors import ConversionError
from conversion.options import CalibrationText, ConversionOptions
from conversion.rules import Rule
from conversion.source import SourceFolder
from conversion.source_config import SourceModel


ROW_TOKENS = 1024  # or what the model can read, if that is less


def run_calibration(
    found: SourceFolder,
    model: SourceModel,
    reader: CheckpointReader,
    options: ConversionOptions,
    text: CalibrationText,
    work_folder: Path | None,
    progress: Progress,
) -> CalibrationResult:
    """Reads the text and fits the layers, on a GPU if there is one. ConversionError for text that will not do."""
    tokens = read_calibration(
        text.path, read_tokenizer(found.folder), text.tokens, _row_tokens(model), model.sizes.vocab_size
    )
    return calibrate(
        reader,
        model.config,
        tokens,
        stages=_stages(text),
        lambda_init="grid" if options.lambda_init is None else options.lambda_init,
        norm=options.norm,
        layers=options.differential_layers(model.sizes.num_layers),
        dtype=options.torch_dtype,
        seed=options.seed,
        device=_device(),
        work_folder=work_folder,
        progress=progress,
    )


def check_calibration(model: SourceModel, reader: CheckpointReader, text: CalibrationText) -> str:
    """What the calibration will take, as a note. ConversionError for a source that cannot be calibrated."""
    if not any(name.startswith("model.layers.") for name in reader.tensors):
        raise ConversionError("the source is a backbone without a language model; convert it without --calibration")
    device, gigabyte = _device(), 10**9
    estimate = estimate_calibration(model.config, text.tokens, _row_tokens(model), stages=_stages(text), device=device)
    return (
        f"calibration on {text.tokens} tokens: about {estimate.seconds / 60:.0f} minutes on this machine's {device}, "
        f"{estimate.memory_bytes / gigabyte:.1f} GB of memory, {estimate.disk_bytes / gigabyte:.1f} GB of disk"
    )


def calibrated_rules(rules: Sequence[Rule], result: CalibrationResult) -> list[Rule]:
    """The same tensors, those of the calibrated layers' attention as fitted."""
    return [
        replace(rule, build=lambda *_, name=rule.target: result[name]) if rule.target in result.names else rule
        for rule in rules
    ]


def calibration_record(text: CalibrationText, result: CalibrationResult) -> dict[str, Any]:
    """For conversion.json: the text by name, and what every stage reached in every layer."""
    return {
        "text": text.path.name,
        "tokens": text.tokens,
        "stages": [str(stage) for stage in _stages(text)],
        "pairings": [
            {"query_heads": pairing.query_heads, "kv_heads": pairing.kv_heads} for pairing in result.pairings
        ],
        "layers": list(result.records),
    }


def work_folder_of(output: Path) -> Path:
    """Where a calibration that may be resumed keeps its finished layers: beside the target."""
    return output.absolute().parent / f".{output.name}.calibration"


def remove_work_folder(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _stages(text: CalibrationText) -> tuple[Stage, ...]:
    return DEFAULT_STAGES if text.stages is None else tuple(Stage(stage) for stage in text.stages)


def _row_tokens(model: SourceModel) -> int:
    return min(model.config.max_position_embeddings, ROW_TOKENS)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
