"""
transformers' Trainer with the losses of a healing, and a held-out measure in its log.

B batch, T tokens a row, C hidden size, V vocabulary.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback

from conversion.errors import ConversionError, FilesError
from conversion.healing.data import Rows
from conversion.healing.losses import distillation_loss, stream_distance
from conversion.healing.measures import measure
from conversion.healing.optimizer import MuonWithAdamW, muon_groups
from conversion.healing.options import HealingOptions, HealOptimizer, HealStage
from conversion.healing.streams import LayerStreams
from conversion.healing.teacher import LiveTeacher, Teacher
from conversion.healing.work import last_checkpoint
from modeling_diff.training.lambda_values import differential_attentions, full_tensor, layer_lambda, trained_module
from modeling_diff.training.trainer import DiffTrainer


class HealingTrainer(DiffTrainer):
    """A student `model`, its `teacher` (None in the stage LM), and rows to train and to measure on."""

    def __init__(
        self,
        model: Any,
        teacher: Teacher | None,
        options: HealingOptions,
        train_rows: torch.Tensor,
        held_out_rows: torch.Tensor,
        **arguments: Any,
    ):
        super().__init__(
            model,
            train_dataset=Rows(train_rows),
            eval_dataset=Rows(held_out_rows),
            lambda_factor=options.lambda_learning_rate / options.rate,
            **arguments,
        )
        if self.is_fsdp_enabled and (options.optimizer == HealOptimizer.MUON or options.lora):
            raise ConversionError(
                "under FSDP matrices are in shards, which neither Muon nor the merging of adapters takes here; choose "
                "--optimizer adamw and leave out --lora"
            )
        self.options, self.teacher = options, teacher
        self.measured, self.first_measured = Rows(held_out_rows), len(train_rows)
        if isinstance(teacher, LiveTeacher):
            teacher.place(self.accelerator)
        wants_streams = options.stage == HealStage.LOCAL or bool(options.hidden_weight)
        self.streams = LayerStreams(model) if wants_streams else None

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The stage's loss of rows (B, T): nats a token, or a share of the stream's mean square (LOCAL)."""
        ids, numbers = inputs["input_ids"], inputs["row"]
        if self.options.stage == HealStage.LOCAL:
            return self._local_loss(model, ids)
        targets, wanted = None, None
        if self.options.hidden_weight:
            assert isinstance(self.teacher, LiveTeacher)
            targets, wanted = self.teacher.targets_and_states(ids)
        elif self.options.stage == HealStage.KL:
            assert self.teacher is not None
            targets = self.teacher.targets(ids, numbers)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = distillation_loss(logits, ids, targets, self.options.cross_entropy_weight)
        if wanted is not None:
            assert self.streams is not None
            loss = loss + self.options.hidden_weight * stream_distance(self.streams.take()[1:], wanted[1:])
        return loss

    def _local_loss(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.teacher, LiveTeacher) and self.streams is not None
        wanted = self.teacher.states(ids)
        self.streams.given = wanted  # until the next batch: gradient checkpointing reads it again in backward
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return stream_distance(self.streams.take()[1:], wanted[1:])

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.options.optimizer == HealOptimizer.MUON:
            student: Any = self.model if model is None else model
            groups = muon_groups(
                student,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                lambda_factor=self.lambda_factor,
            )
            self.optimizer = MuonWithAdamW(groups)
        return super().create_optimizer(model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """FilesError for the disk, of which safetensors and torch tell by errors of their own."""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise FilesError(
                f"{self.args.output_dir}: step {self.state.global_step} could not be saved "
                f"({' '.join(str(error).split())}); free space there and run again with --resume"
            ) from error

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, KL, greedy agreement, what is recovered, and lambda a layer (V1), into the log."""
        if self.streams is not None:
            self.streams.given = None
        batch_rows = self.args.per_device_eval_batch_size
        student: Any = self.model  # not the one that came: FSDP2 puts its own in the place
        reached = measure(student, self.teacher, self.measured, self.first_measured, batch_rows)
        logged = {f"{metric_key_prefix}_{name}": value for name, value in asdict(reached).items() if value is not None}
        start = next((log["eval_loss"] for log in self.state.log_history if "eval_loss" in log), reached.loss)
        if (recovered := reached.recovered(start)) is not None:
            logged[f"{metric_key_prefix}_recovered"] = recovered
        for layer, value in lambda_by_layer(student).items():
            logged[f"{metric_key_prefix}_lambda_layer_{layer}"] = value
        self.log(logged)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logged)
        return logged


def lambda_by_layer(model: nn.Module) -> dict[int, float]:
    """V1's lambda of every differential layer; nothing in V2, where it is one a token."""
    return {
        layer: layer_lambda(trained_module(attention.get_submodule("diff_lambda")))
        for layer, attention in differential_attentions(model).items()
        if hasattr(attention, "diff_lambda")
    }


class MeasureAtStart(TrainerCallback):
    """Measures before the first step, on the model as the Trainer has placed it; a resumed run has that in its log."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        if state.global_step == 0:
            self.trainer.evaluate()


class StopOnNonFinite(TrainerCallback):
    """
    Stops before an optimiser step that would spoil the weights.

    A loss that is NaN or infinite has such gradients; after clipping all ranks have the same.
    Raises ConversionError, and the last checkpoint stays.
    """

    def __init__(self, checkpoints: Path):
        self.checkpoints = checkpoints

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        norm = nn.utils.get_total_norm([p.grad for p in kwargs["model"].parameters() if p.grad is not None])
        if bool(torch.isfinite(full_tensor(norm))):
            return
        kept = ""
        if last_checkpoint(self.checkpoints):
            kept = f". What was saved before stays in {self.checkpoints}; another rate begins anew (--no-resume)"
        raise ConversionError(
            f"step {state.global_step + 1}: the loss or its gradient is NaN or infinite; lower the learning rate "
            f"(--learning-rate) or look for NaN in the checkpoint{kept}"
        )


class Progress(TrainerCallback):
    """Tells steps done and in all."""

    def __init__(self, tell: Any):
        self.tell = tell

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell(state.global_step, state.max_steps)
