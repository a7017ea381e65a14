"""One healing, settled and run: student, teacher and Trainer put together, trained, measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from conversion.checkpoint import CheckpointReader
from conversion.healing.callbacks import Progress
from conversion.healing.config import HealingConfig
from conversion.healing.held_out_metrics import measure
from conversion.healing.options import HealingOptions, TrainerOptions
from conversion.healing.rows import Rows
from conversion.healing.student import adapter_config, load_student, merged, round_weights
from conversion.healing.teacher import Teacher, load_teacher
from conversion.healing.teacher_cache import cache_path, fill_cache, open_cache
from conversion.healing.trainer import HealingTrainer, lambda_by_layer
from conversion.healing.work_folder import TRAINER, last_checkpoint, processes
from conversion.source.location import SourceFolder
from modeling_diff import DiffLlamaConfig


@dataclass(frozen=True, kw_only=True)
class HealingRun:
    """What from, with what, how long. Rows are (R, T)."""

    folder: Path
    work: Path
    reader: CheckpointReader
    options: HealingOptions
    teacher: SourceFolder | None
    train_rows: torch.Tensor = field(repr=False)
    held_out_rows: torch.Tensor = field(repr=False)
    steps: int
    cache_folder: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of the Trainer's checkpoints."""
        return self.work / TRAINER

    @property
    def step_tokens(self) -> int:
        """Number of tokens per step, over all devices."""
        return rows_per_step(self.options) * self.train_rows.shape[1]


@dataclass(frozen=True)
class HealedStudent:
    """Weights by name (on the main process), the config they belong to, lambda by layer (V1), the held-out table."""

    state: Mapping[str, torch.Tensor] = field(repr=False)
    config: DiffLlamaConfig
    lambdas: Mapping[int, float]
    table: list[dict[str, Any]]


def rows_per_step(options: HealingOptions) -> int:
    """Returns how many sequences an optimizer step takes, over all devices."""
    per_device = options.per_device_train_batch_size * options.gradient_accumulation_steps
    return per_device * processes().num_processes


def train_student(
    run: HealingRun, model: Any, callbacks: Sequence[TrainerCallback], progress: Callable[[int, int], None]
) -> HealedStudent:
    """Trains `model`, or the checkpoint's weights, from the last Trainer checkpoint if there is one.

    Args:
        run: What to train, on what.
        model: A student in memory to train in place of the checkpoint's weights, or None.
        callbacks: The caller's callbacks of the Trainer.
        progress: Called with the number of steps done and in all.

    Returns:
        The student, rounded to what will be stored, and its measures.

    Raises:
        ConversionError: The loss or its gradient is not finite, or nothing is to be trained.
    """
    student = load_student(run.folder) if model is None else model
    trainer = HealingTrainer(
        student,
        _teacher(run),
        healing_config(run),
        train_dataset=Rows(run.train_rows),
        eval_dataset=Rows(run.held_out_rows, first=len(run.train_rows)),
        callbacks=[Progress(progress), *callbacks],
        peft_config=adapter_config(student, run.options.lora_r),
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(run.checkpoints)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    healed = merged(trainer.model)
    round_weights(healed, run.reader, run.options.dtype)
    table = _table(trainer, healed, run)
    state = trainer.accelerator.get_state_dict(healed) if trainer.is_fsdp_enabled else healed.state_dict()
    return HealedStudent(state, student.config, lambda_by_layer(healed), table)


def _teacher(run: HealingRun) -> Teacher | None:
    if run.teacher is None:
        return None
    num_kept = run.options.cached_logits
    if num_kept is None:
        return load_teacher(run.teacher.folder, run.options)
    rows = (run.train_rows, run.held_out_rows)
    path = cache_path(run.cache_folder, run.teacher.folder, *rows, num_kept=num_kept, dtype=run.options.teacher_dtype)
    if processes().is_main_process and not path.exists():
        teacher = load_teacher(run.teacher.folder, run.options)
        teacher.model.to(processes().device)
        fill_cache(path, teacher, *rows, num_kept=num_kept, batch_rows=run.options.per_device_train_batch_size)
    processes().wait_for_everyone()
    return open_cache(path, (*run.train_rows.shape, num_kept))


def healing_config(run: HealingRun) -> HealingConfig:
    """Returns the Trainer's configuration of a run."""
    options = run.options
    shared = {option.name: getattr(options, option.name) for option in fields(TrainerOptions)}
    shared |= {"max_steps": run.steps, "max_length": run.train_rows.shape[1]}
    return HealingConfig(
        **shared,
        output_dir=str(run.checkpoints),
        per_device_eval_batch_size=options.per_device_train_batch_size,
        eval_strategy="steps",
        data_seed=options.seed,
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
        disable_tqdm=True,
    )


def _table(trainer: HealingTrainer, healed: Any, run: HealingRun) -> list[dict[str, Any]]:
    """Returns held-out measures by tokens; the last ones are of the weights that are written."""
    table: list[dict[str, Any]] = []
    for log in trainer.state.log_history:
        if "eval_loss" in log and log["step"] < run.steps:
            measured = {name: log.get(f"eval_{name}") for name in ("loss", "kl", "greedy_agreement", "recovered")}
            lambdas = [value for name, value in log.items() if name.startswith("eval_lambda_layer_")]
            table.append({"step": log["step"], **measured, "lambda": lambdas})
    assert trainer.held_out is not None
    reached = measure(healed, trainer.teacher, trainer.held_out, run.options.per_device_train_batch_size)
    last = {**asdict(reached), "recovered": reached.recovered(table[0]["loss"])}
    table.append({"step": run.steps, **last, "lambda": list(lambda_by_layer(healed).values())})
    return [{**row, "tokens": row["step"] * run.step_tokens} for row in table]
