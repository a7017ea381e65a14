"""The story of a healing: check, pack the text, train the student, write a plain checkpoint."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from conversion.checkpoint import CheckpointReader, check_target
from conversion.checkpoint.companions import COMPANIONS, companion_files, matching_names, read_tokenizer
from conversion.checkpoint.file_identity import content_identity
from conversion.checkpoint.kept_work import healing_folder
from conversion.data.text import existing_paths
from conversion.errors import ConversionError, typed
from conversion.healing.options import HealingOptions, HealStage, LambdaMode
from conversion.healing.output import PROMISE, healed_config, healing_entry, stored_tensors, write_healed
from conversion.healing.rows import sequence_length
from conversion.healing.student import check_student
from conversion.healing.teacher import find_teacher, is_recorded_source, weight_files
from conversion.healing.training_run import HealedStudent, HealingRun, rows_per_step, train_student
from conversion.healing.work_folder import least_bytes, opened, packed_rows, processes
from conversion.hub.bundle import code_files
from conversion.hub.model_card import model_card
from conversion.options import parse_size
from conversion.record import read_record
from conversion.source.converted import read_our_config
from conversion.source.location import SourceFolder
from modeling_diff import DiffLlamaConfig


WORK_FORMAT = 2  # of the kept work: 1 had options of other names


@dataclass(frozen=True)
class HealingReport:
    """What a healing has written.

    Attributes:
        output: The folder.
        record: Content of its conversion.json.
        table: Measurements of the held-out text, one per evaluation: tokens so far, loss and KL in nats/token, greedy
            agreement, the recovered share, lambda per layer.
        notes: What the user should know.
    """

    output: Path
    record: Mapping[str, Any]
    table: Sequence[Mapping[str, Any]]
    notes: Sequence[str]


def heal_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    options: HealingOptions | None = None,
    *,
    data: Sequence[str | Path] | str | Path,
    teacher: str | Path | None = None,
    held_out: str | Path | None = None,
    model: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    cache_folder: str | Path | None = None,
    allow_pickle: bool = False,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    resume: bool | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HealingReport:
    """Distills a LLaMA into a converted checkpoint, one stage per run; the output appears whole or not at all.

    A run that was stopped continues from its last Trainer checkpoint, to the same weights. Under `accelerate launch`
    every process calls this.

    Args:
        checkpoint: Folder of the converted checkpoint.
        output: Folder to create.
        options: What is learned, and how.
        data: Text files, JSON lines or folders that `datasets` saved, to train on.
        teacher: Folder or Hub id of the LLaMA; the stage LM needs none, and is measured against it if there is one.
        held_out: The same as `data`, to measure on; without it, the first rows of the data.
        model: A student in memory, trained in place of the checkpoint's weights.
        callbacks: Callbacks of the Trainer, in addition to its own.
        cache_folder: Folder for the teacher's logits, where they are kept. By default next to the output.
        allow_pickle: Whether pickled weights may be read.
        max_shard_size: Largest size of a weight file.
        overwrite: Whether to replace an existing output.
        resume: True and None continue the work of the same run and refuse that of another, False discards it.
        progress: Called with the number of steps done and in all.

    Returns:
        What was written, and its measures.

    Raises:
        ConversionError: The input is bad, or the loss not finite.
        FilesError: The target cannot be written, or the kept work is another run's.
    """
    began = time.monotonic()
    options = options or HealingOptions()
    output = Path(output)
    folder = Path(checkpoint)
    config = read_our_config(folder)
    record = read_record(folder)
    reader = CheckpointReader(folder, allow_pickle=allow_pickle)
    paths = existing_paths(data)
    measured = [] if held_out is None else existing_paths(held_out)
    max_shard_bytes = parse_size(max_shard_size)
    work = healing_folder(check_target(output, source=folder, overwrite=overwrite))
    length = sequence_length(config, options.max_length)
    _check_teacher_given(teacher, options)
    check_student(folder, config, options)
    source = None if teacher is None else find_teacher(teacher, config, folder, options, allow_pickle=allow_pickle)
    if source is not None:
        check_target(output, source=source.folder, overwrite=overwrite)
    teacher_is_source = None if source is None else is_recorded_source(source, folder, record)
    companion_files(folder)  # a broken one is refused now, and not when the training is done
    steps = _steps(options, length)
    identity = partial(_identity, options, reader, data=paths, held_out=measured, teacher=source)
    with opened(work, identity, resume, least_bytes(reader, options, steps)):
        train_rows, held_out_rows = packed_rows(
            work,
            paths,
            measured,
            read_tokenizer(folder),
            row_tokens=length,
            vocab_size=config.vocab_size,
            max_rows=None if steps is None else steps * rows_per_step(options),  # more are never read
            held_out_rows=options.held_out_rows,
        )
        whole_batches = _whole_batches(options, train_rows.shape)
        run = HealingRun(
            folder=folder,
            work=work,
            reader=reader,
            options=options,
            teacher=source,
            train_rows=train_rows[: whole_batches * rows_per_step(options)],
            held_out_rows=held_out_rows,
            steps=steps or whole_batches,
            cache_folder=Path(cache_folder or output.absolute().parent / ".teacher-logits"),
        )
        healed = train_student(run, model, callbacks, progress)
        entry = healing_entry(
            options,
            teacher=source,
            teacher_is_source=teacher_is_source,
            data=paths,
            steps=run.steps,
            tokens=run.steps * run.step_tokens,
            seconds=time.monotonic() - began,
            table=healed.table,
            held_out=measured,
            held_out_rows=len(held_out_rows),
        )
        record = {**record, "measured": None, "promise": PROMISE, "healing": [*(record.get("healing") or []), entry]}
        if processes().is_main_process:
            record = _write(
                run, healed, record, output=output, config=config, max_shard_bytes=max_shard_bytes, overwrite=overwrite
            )
            shutil.rmtree(work, ignore_errors=True)
        processes().wait_for_everyone()
    notes = [f"the teacher's logits stay in {run.cache_folder} for later runs"] if options.cached_logits else []
    return HealingReport(output, record, healed.table, notes + _risen(options, healed.table, config, healed.config))


def _risen(
    options: HealingOptions, table: Sequence[Mapping[str, Any]], start: DiffLlamaConfig, end: DiffLlamaConfig
) -> list[str]:
    """Returns a note if the run ended further from the teacher than it began, by more than is rounded away."""
    before = table[0]["kl"]
    after = table[-1]["kl"]
    if options.stage == HealStage.LM or before is None or after <= before or f"{before:.4f}" == f"{after:.4f}":
        return []
    rose = f"KL on the held-out text rose from {before:.4f} to {after:.4f} nats/token"
    if moved := _moved_lambda(options, table[0]["lambda"], start, end):
        return [f"{rose}: {moved}, which leads away from the teacher; give more text, or leave lambda where it is"]
    return [
        f"{rose}: the learning rate of {options.rate:g} may be too high for so near a start and so short a run; try "
        f"{typed('learning_rate', options.rate / 10)}, or more text"
    ]


def _moved_lambda(
    options: HealingOptions, lambdas: Sequence[float], start: DiffLlamaConfig, end: DiffLlamaConfig
) -> str | None:
    """Returns how an option has moved V1's lambda from what it was at the start, `lambdas` by layer; None if not."""
    if options.lambda_mode == LambdaMode.PAPER and start.lambda_init != end.lambda_init:
        return f"lambda was moved to the paper's schedule ({typed('lambda_mode', 'paper')})"
    held = options.lambda_mode != LambdaMode.FREE
    if held and any(round(value, 3) < options.lambda_floor for value in lambdas):  # as the table shows it
        return f"lambda was raised to its floor ({typed('lambda_floor', options.lambda_floor)})"
    return None


def _write(
    run: HealingRun,
    healed: HealedStudent,
    record: Mapping[str, Any],
    *,
    output: Path,
    config: DiffLlamaConfig,
    max_shard_bytes: int,
    overwrite: bool,
) -> dict[str, Any]:
    written = healed_config(config, healed.config, run.options.dtype)
    return write_healed(
        output,
        run.folder,
        written,
        tensors=stored_tensors(run.reader, healed.state, run.options.dtype),
        record=record,
        card=model_card(run.folder, written, record, healed.lambdas),
        code=code_files(),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def _check_teacher_given(teacher: str | Path | None, options: HealingOptions) -> None:
    if teacher is None and options.stage != HealStage.LM:
        raise ConversionError(
            f"stage {options.stage} learns from a teacher; give the LLaMA that was converted (--teacher), or choose lm"
        )


def _identity(
    options: HealingOptions,
    checkpoint: CheckpointReader,
    *,
    data: Sequence[Path],
    held_out: Sequence[Path],
    teacher: SourceFolder | None,
) -> dict[str, Any]:
    """Returns what a run has to have in common with the one that was stopped; reads every byte of it."""
    tokenizer = matching_names(checkpoint.folder, COMPANIONS["tokenizer"])
    small = [checkpoint.folder / name for name in ("config.json", *tokenizer)]
    return {
        "format of the kept work": WORK_FORMAT,
        "options": options.recorded(),
        "checkpoint": content_identity([*checkpoint.files, *small]),
        "data": content_identity(data),
        "held-out text": content_identity(held_out),
        "teacher": teacher and content_identity([*weight_files(teacher.folder), teacher.folder / "config.json"]),
        "number of processes": processes().num_processes,
    }


def _steps(options: HealingOptions, length: int) -> int | None:
    """Returns the number of steps, None for once through the data."""
    if options.tokens is None:
        return None if options.max_steps == -1 else options.max_steps
    return -(-options.tokens // (rows_per_step(options) * length))


def _whole_batches(options: HealingOptions, shape: Sequence[int]) -> int:
    """Returns the batches in once through the data of shape (R, T); what does not fill one is left out."""
    taken = rows_per_step(options)
    if shape[0] < taken:
        raise ConversionError(
            f"the data leave {shape[0]} sequences of {shape[1]} tokens to train on, and a step takes {taken}; give "
            f"more text, take fewer per step ({typed('per_device_train_batch_size')}), or measure on other text "
            "(--held-out)"
        )
    return shape[0] // taken
