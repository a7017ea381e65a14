"""One healing, settled and run: student, teacher and Trainer put together, trained, measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from conversion.checkpoint import CheckpointReader
from conversion.healing.cache import cache_path, fill_cache, open_cache
from conversion.healing.data import Rows
from conversion.healing.measures import measure
from conversion.healing.options import HealingOptions, LambdaMode
from conversion.healing.schedule import Annealing, layer_paths
from conversion.healing.student import (
    enable_checkpointing,
    final_config,
    load_student,
    merged,
    prepare_student,
    round_weights,
)
from conversion.healing.teacher import Teacher, load_teacher
from conversion.healing.trainer import HealingTrainer, MeasureAtStart, Progress, StopOnNonFinite, lambda_by_layer
from conversion.healing.work import KEPT_CHECKPOINTS, TRAINER, last_checkpoint, processes
from conversion.source.location import SourceFolder
from modeling_diff import DiffLlamaConfig
from modeling_diff.training.callbacks import LambdaCallback


@dataclass(frozen=True)
class HealingRun:
    """What from, with what, how long, in which portions. Rows are (R, T)."""

    folder: Path
    work: Path
    reader: CheckpointReader
    options: HealingOptions
    teacher: SourceFolder | None
    train_rows: torch.Tensor = field(repr=False)
    held_out_rows: torch.Tensor = field(repr=False)
    steps: int
    micro_rows: int
    cache_folder: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of the Trainer's checkpoints."""
        return self.work / TRAINER


@dataclass(frozen=True)
class HealedStudent:
    """Weights by name (on the main process), the config they belong to, lambda by layer (V1), the held-out table."""

    state: Mapping[str, torch.Tensor] = field(repr=False)
    config: DiffLlamaConfig
    lambdas: Mapping[int, float]
    table: list[dict[str, Any]]


def train_student(
    run: HealingRun, model: Any, callbacks: Sequence[TrainerCallback], progress: Callable[[int, int], None]
) -> HealedStudent:
    """Trains `model`, or the checkpoint's weights, from the last Trainer checkpoint if there is one.

    Raises ConversionError for a loss that is not finite.
    """
    options = run.options
    student = load_student(run.folder) if model is None else model.float()
    end = final_config(student.config, options)
    sample = run.held_out_rows[:1].long().to(student.device)
    annealing = Annealing(layer_paths(student, student.config, end, sample), options.norm_share)
    annealing.begin(student)
    if options.gradient_checkpointing:
        enable_checkpointing(student)
    trained = prepare_student(student, options)
    start = MeasureAtStart()
    watching = [annealing, start, StopOnNonFinite(run.checkpoints), Progress(progress)]
    trainer = HealingTrainer(
        trained, _teacher(run), options, run.train_rows, run.held_out_rows, args=training_arguments(run),
        callbacks=[*_lambda_callback(student.config, options), *watching, *callbacks],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    start.trainer = trainer
    checkpoint = last_checkpoint(run.checkpoints)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    placed: Any = trainer.model
    annealing.end(placed)
    healed = merged(placed)
    round_weights(healed, run.reader, options.dtype)
    table = _table(trainer, healed, run)
    state = trainer.accelerator.get_state_dict(healed) if trainer.is_fsdp_enabled else healed.state_dict()
    return HealedStudent(state, end, lambda_by_layer(healed), table)


def _teacher(run: HealingRun) -> Teacher | None:
    if run.teacher is None:
        return None
    num_kept = run.options.cached_logits
    if num_kept is None:
        return load_teacher(run.teacher.folder, run.options)
    rows = torch.cat((run.train_rows, run.held_out_rows))
    path = cache_path(run.cache_folder, run.teacher.folder, rows, num_kept, run.options.teacher_dtype)
    if processes().is_main_process and not path.exists():
        teacher = load_teacher(run.teacher.folder, run.options)
        teacher.model.to(processes().device)
        fill_cache(path, teacher, rows, num_kept, run.micro_rows)
    processes().wait_for_everyone()
    return open_cache(path, (*rows.shape, num_kept))


def _lambda_callback(config: DiffLlamaConfig, options: HealingOptions) -> list[TrainerCallback]:
    """Logs lambda a layer, and in V1 holds it at its floor, unless it is left free."""
    if config.differential_layers == []:
        return []
    held = config.variant == "v1" and options.lambda_mode != LambdaMode.FREE
    return [LambdaCallback(floor=options.lambda_floor if held else None)]


def training_arguments(run: HealingRun) -> TrainingArguments:
    """The Trainer's own arguments for a run."""
    options, on_gpu = run.options, torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=run.steps,
        per_device_train_batch_size=run.micro_rows,
        per_device_eval_batch_size=run.micro_rows,
        gradient_accumulation_steps=options.batch_rows // (run.micro_rows * processes().num_processes),
        learning_rate=options.rate,
        weight_decay=options.weight_decay,
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        warmup_steps=round(options.warmup_share * run.steps),
        logging_steps=max(1, run.steps // 50),
        logging_nan_inf_filter=False,  # it would hide what StopOnNonFinite is to find
        eval_strategy="steps",
        eval_steps=-(-run.steps // options.evaluations),
        save_strategy="steps",
        save_steps=-(-run.steps // options.checkpoints),
        save_total_limit=KEPT_CHECKPOINTS,
        seed=options.seed,
        data_seed=options.seed,
        bf16=on_gpu,
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=on_gpu,
        report_to="none",
        disable_tqdm=True,
    )


def _table(trainer: HealingTrainer, healed: Any, run: HealingRun) -> list[dict[str, Any]]:
    """Held-out measures by tokens; the last row is of the weights as they are written."""
    batch_tokens = run.options.batch_rows * run.train_rows.shape[1]
    table: list[dict[str, Any]] = []
    for log in trainer.state.log_history:
        if "eval_loss" in log and log["step"] < run.steps:
            measured = {name: log.get(f"eval_{name}") for name in ("loss", "kl", "greedy_agreement", "recovered")}
            lambdas = [value for name, value in log.items() if name.startswith("eval_lambda_layer_")]
            table.append({"step": log["step"], **measured, "lambda": lambdas})
    rows = Rows(run.held_out_rows)
    reached = measure(healed, trainer.teacher, rows, len(run.train_rows), run.micro_rows)
    last = {**asdict(reached), "recovered": reached.recovered(table[0]["loss"])}
    table.append({"step": run.steps, **last, "lambda": list(lambda_by_layer(healed).values())})
    return [{**row, "tokens": row["step"] * batch_tokens} for row in table]
