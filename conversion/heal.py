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
from conversion.errors import ConversionError
from conversion.healing.options import HealingOptions, HealStage, existing_paths
from conversion.healing.output import PROMISE, healed_config, healing_entry, stored_tensors, write_healed
from conversion.healing.run import HealingRun, train_student
from conversion.healing.student import check_student
from conversion.healing.teacher import find_teacher, weight_files
from conversion.healing.work import least_bytes, opened, packed_rows, processes
from conversion.hub.bundle import code_files
from conversion.hub.model_card import model_card
from conversion.options import parse_size
from conversion.record import read_record
from conversion.source.converted import read_our_config
from conversion.source.location import SourceFolder
from modeling_diff import DiffLlamaConfig


CONTEXT_TOKENS = 1024  # or what the model can read, if that is less
MICRO_TOKENS = 8192


@dataclass(frozen=True)
class HealingReport:
    """What was written: its record (conversion.json), the held-out table of this healing, and notes for the user."""

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
    """Distils a LLaMA into a converted checkpoint, one stage a run; the output appears whole or not at all.

    `HealingOptions` says what the choices mean. `data` are text files, JSON lines or datasets folders, `teacher` a
    folder or Hub id (the stage LM needs none, and is measured against it if there is one), `held_out` a file to be
    measured on (without it, the first rows of the data). `model`: a student loaded by the caller, trained in place of
    the checkpoint's weights; `callbacks` are the Trainer's. Under `accelerate launch` every process calls this.
    A run that was stopped continues from its last Trainer checkpoint, to the same weights. `resume`: True and None
    continue the work of the same run and refuse that of another, False discards it.
    Raises ConversionError for bad input and a loss that is not finite, FilesError for the target.
    """
    options, output, folder, began = options or HealingOptions(), Path(output), Path(checkpoint), time.monotonic()
    config = read_our_config(folder)
    record, reader = read_record(folder), CheckpointReader(folder, allow_pickle=allow_pickle)
    paths, measured = existing_paths(data), [] if held_out is None else existing_paths(held_out)
    max_shard_bytes = parse_size(max_shard_size)
    work = healing_folder(check_target(output, source=folder, overwrite=overwrite))
    context, micro_rows = _context(config, options), _micro_rows(config, options)
    _check_teacher_given(teacher, options)
    check_student(folder, config, options)
    source = None if teacher is None else find_teacher(teacher, config, folder, options, allow_pickle)
    if source is not None:
        check_target(output, source=source.folder, overwrite=overwrite)
    companion_files(folder)  # a broken one is refused now, and not when the training is done
    num_bytes = least_bytes(reader, options, _steps(options, context))
    identity = partial(_identity, options, reader, paths, measured, source)
    with opened(work, identity, resume, num_bytes):
        train_rows, held_out_rows = packed_rows(
            work, paths, measured, read_tokenizer(folder), row_tokens=context, vocab_size=config.vocab_size,
            max_rows=_max_rows(options, context), held_out_rows=options.held_out_rows,
        )  # fmt: skip
        whole_batches = _whole_batches(options, train_rows.shape)
        run = HealingRun(
            folder, work, reader, options, source, train_rows[: whole_batches * options.batch_rows], held_out_rows,
            _steps(options, context) or whole_batches, micro_rows,
            Path(cache_folder or output.absolute().parent / ".teacher-logits"),
        )  # fmt: skip
        healed = train_student(run, model, callbacks, progress)
        entry = healing_entry(
            options, teacher=source, data=paths, steps=run.steps, tokens=run.steps * options.batch_rows * context,
            seconds=time.monotonic() - began, table=healed.table, held_out=measured, held_out_rows=len(held_out_rows),
        )  # fmt: skip
        record = {**record, "measured": None, "promise": PROMISE, "healing": [*(record.get("healing") or []), entry]}
        if processes().is_main_process:
            written = healed_config(config, healed.config, options.dtype)
            tensors = stored_tensors(reader, healed.state, options.dtype)
            record = write_healed(
                output,
                folder,
                written,
                tensors,
                record,
                card=model_card(folder, written, record, healed.lambdas),
                code=code_files(),
                max_shard_bytes=max_shard_bytes,
                overwrite=overwrite,
            )
            shutil.rmtree(work, ignore_errors=True)
        processes().wait_for_everyone()
    notes = [f"the teacher's logits stay in {run.cache_folder} for later runs"] if options.cached_logits else []
    return HealingReport(output, record, healed.table, notes)


def _context(config: DiffLlamaConfig, options: HealingOptions) -> int:
    longest = config.max_position_embeddings
    context = options.context or min(longest, CONTEXT_TOKENS)
    if context > longest:
        raise ConversionError(
            f"context {context}: the model reads at most {longest} tokens (max_position_embeddings); ask for fewer"
        )
    if context < 2:
        raise ConversionError(f"context {context}: a row holds a token and one that follows; ask for more")
    return context


def _check_teacher_given(teacher: str | Path | None, options: HealingOptions) -> None:
    if teacher is None and options.stage != HealStage.LM:
        raise ConversionError(
            f"stage {options.stage} learns from a teacher; give the LLaMA that was converted (--teacher), or choose lm"
        )


def _identity(
    options: HealingOptions,
    checkpoint: CheckpointReader,
    data: Sequence[Path],
    held_out: Sequence[Path],
    teacher: SourceFolder | None,
) -> dict[str, Any]:
    """What a run has to have in common with the one that was stopped; reads every byte of it."""
    tokenizer = matching_names(checkpoint.folder, COMPANIONS["tokenizer"])
    small = [checkpoint.folder / name for name in ("config.json", *tokenizer)]
    return {
        "options": options.recorded(),
        "checkpoint": content_identity([*checkpoint.files, *small]),
        "data": content_identity(data),
        "held-out text": content_identity(held_out),
        "teacher": teacher and content_identity([*weight_files(teacher.folder), teacher.folder / "config.json"]),
        "number of processes": processes().num_processes,
    }


def _steps(options: HealingOptions, context: int) -> int | None:
    """None for once through the data."""
    if options.tokens is None:
        return options.steps
    return -(-options.tokens // (options.batch_rows * context))


def _max_rows(options: HealingOptions, context: int) -> int | None:
    """More are never read."""
    steps = _steps(options, context)
    return None if steps is None else steps * options.batch_rows


def _whole_batches(options: HealingOptions, shape: Sequence[int]) -> int:
    """Batches in once through the data of shape (R, T); what does not fill one is left out."""
    if shape[0] < options.batch_rows:
        raise ConversionError(
            f"the data leave {shape[0]} rows of {shape[1]} tokens to train on, and a step takes {options.batch_rows}; "
            "give more text, take fewer rows per step (--batch-rows), or measure on other text (--held-out)"
        )
    return shape[0] // options.batch_rows


def _micro_rows(config: DiffLlamaConfig, options: HealingOptions) -> int:
    """Rows a device takes at once: as asked for, or as many as divide its share and stay within MICRO_TOKENS."""
    count = processes().num_processes
    share, left = divmod(options.batch_rows, count)
    if left or (options.micro_rows and share % options.micro_rows):
        portions = f" in portions of {options.micro_rows}" if options.micro_rows else ""
        raise ConversionError(
            f"batch_rows {options.batch_rows} on {count} devices{portions} does not divide evenly; choose a multiple"
        )
    most = max(1, MICRO_TOKENS // _context(config, options))
    return options.micro_rows or max(rows for rows in range(1, share + 1) if share % rows == 0 and rows <= most)
