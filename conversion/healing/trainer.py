"""
transformers' Trainer with the losses of a healing, and a held-out measurement in its log.

B batch, T tokens per sequence, C hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback, default_data_collator

from conversion.errors import ConversionError, FilesError, typed
from conversion.healing.annealing import Annealing, layer_paths
from conversion.healing.callbacks import MeasureAtStart, StopOnNonFinite
from conversion.healing.config import HealingConfig
from conversion.healing.held_out_metrics import measure
from conversion.healing.losses import distillation_loss, stream_distance
from conversion.healing.optimizer import MuonWithAdamW, muon_groups
from conversion.healing.options import HealOptimizer, HealStage, LambdaMode
from conversion.healing.rows import Rows, dataset_rows, sequence_length
from conversion.healing.streams import LayerStreams
from conversion.healing.student import check_differential, final_config, trainable_student
from conversion.healing.teacher import LiveTeacher, Teacher, check_fit
from modeling_diff.training.callbacks import LambdaCallback
from modeling_diff.training.lambda_values import differential_attentions, layer_lambda, trained_module
from modeling_diff.training.trainer import DiffTrainer


class HealingTrainer(DiffTrainer):
    """
    Trains a differential student towards the LLaMA that it was made from.

    The student's weights are float32 from here on: small steps are lost on bfloat16 weights. A neutral norm is
    annealed to the paper's, and lambda held or moved, as `args` say; after `train()` the model is a plain one of its
    config. A checkpoint in `args.output_dir` is continued by `train(resume_from_checkpoint=...)` with the student that
    the first run began with. The log has loss, KL, greedy agreement and recovered share of the evaluation text, and
    lambda.

    Args:
        model: A DiffLlamaForCausalLM.
        teacher: The LLaMA, a causal language model of the same vocabulary; the stage LM needs none.
        args: Configuration; the stage among it.
        train_dataset: Records with `text` or `input_ids`, which are joined in one stream, documents of text between
            bos and eos, and cut into sequences of `args.max_length` tokens.
        eval_dataset: The same, to measure on.
        processing_class: Tokenizer, for records with `text`; saved with the model.
        callbacks: Callbacks in addition to those of the healing.
        peft_config: PEFT's config of adapters to train in place of the weights.
        arguments: Other keyword arguments of the Trainer.

    Raises:
        ConversionError: Student, teacher, data and config do not go together.
    """

    args: HealingConfig

    def __init__(
        self,
        model: Any,
        teacher: Any = None,
        args: HealingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        callbacks: Sequence[TrainerCallback] | None = None,
        peft_config: Any = None,
        **arguments: Any,
    ):
        args = HealingConfig() if args is None else args
        check_differential(model)
        if teacher is None and args.stage != HealStage.LM:
            raise ConversionError(f"stage {args.stage} learns from a teacher; give the LLaMA, or choose lm")
        if isinstance(teacher, nn.Module):
            check_fit(teacher.config, model.config, args, "teacher")
            teacher = LiveTeacher(teacher, args.compares_hidden_states)
        self.teacher: Teacher | None = teacher
        self.row_tokens = sequence_length(model.config, args.max_length)
        self.vocab_size: int = model.config.vocab_size
        most = None if args.max_steps == -1 else args.max_steps * sequences_per_step(args)
        train_rows = self._rows(train_dataset, "train_dataset", processing_class, most)
        self.held_out = self._rows(eval_dataset, "eval_dataset", processing_class)
        annealing = self._anneal(model, args, self.held_out or train_rows)
        student = trainable_student(model, args, peft_config)
        start = MeasureAtStart()
        own = [*lambda_callbacks(model.config, args), annealing, start, StopOnNonFinite()]
        arguments.setdefault("data_collator", default_data_collator)
        super().__init__(
            student,
            args,
            train_dataset=train_rows,
            eval_dataset=self.held_out,
            processing_class=processing_class,
            callbacks=[*own, *(callbacks or [])],
            lambda_factor=args.lambda_learning_rate / args.rate,
            **arguments,
        )
        if self.is_fsdp_enabled and (args.optimizer == HealOptimizer.MUON or peft_config is not None):
            raise ConversionError(
                "under FSDP matrices are in shards, which neither Muon nor the merging of adapters takes here; choose "
                f"{typed('optimizer', 'adamw')} and train no adapters"
            )
        if isinstance(teacher, LiveTeacher):
            teacher.place(self.accelerator)
        self.streams = LayerStreams(student) if args.compares_hidden_states else None
        if args.eval_strategy != "no":
            start.trainer = self

    def _rows(self, dataset: Any, name: str, tokenizer: Any, most: int | None = None) -> Rows | None:
        if dataset is None or isinstance(dataset, Rows):
            return dataset
        return dataset_rows(
            dataset, name, tokenizer, row_tokens=self.row_tokens, vocab_size=self.vocab_size, max_rows=most
        )

    @staticmethod
    def _anneal(model: Any, args: HealingConfig, rows: Rows | None) -> Annealing:
        """Gives the model the config that it is to end with, and what makes up for it."""
        end = final_config(model.config, args)
        if not getattr(model, "is_quantized", False):
            model.float()
        paths = []
        if rows is not None:
            sample = rows.rows[:1].long().to(model.device)
            paths = layer_paths(model, model.config, end, sample)
        annealing = Annealing(paths, args.norm_share)
        annealing.begin(model)
        for name in ("sub_norm_eps", "lambda_init"):
            setattr(model.config, name, getattr(end, name))
        return annealing

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Returns the stage's loss of sequences (B, T): nats/token, or a share of hidden states' mean square (LOCAL).

        Args:
            model: The student, as the Trainer has wrapped it.
            inputs: `input_ids` (B, T), and `row`, their numbers (B,).
            return_outputs: Not used: there is nothing to return but the loss.
            num_items_in_batch: Not used: every sequence has as many tokens.
        """
        ids = inputs["input_ids"]
        if self.args.stage == HealStage.LOCAL:
            return self._local_loss(model, ids)
        targets = None
        wanted = None
        if self.args.hidden_weight:
            assert isinstance(self.teacher, LiveTeacher)
            targets, wanted = self.teacher.targets_and_states(ids)
        elif self.args.stage == HealStage.KL:
            assert self.teacher is not None
            targets = self.teacher.targets(ids, inputs["row"])
        logits = model(input_ids=ids, use_cache=False).logits
        loss = distillation_loss(logits, ids, targets, self.args.cross_entropy_weight)
        if wanted is not None:
            assert self.streams is not None
            loss = loss + self.args.hidden_weight * stream_distance(self.streams.take()[1:], wanted[1:])
        return loss

    def _local_loss(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.teacher, LiveTeacher) and self.streams is not None
        wanted = self.teacher.states(ids)
        self.streams.given = wanted  # until the next batch: gradient checkpointing reads it again in backward
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return stream_distance(self.streams.take()[1:], wanted[1:])

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Builds Muon with AdamW, or AdamW alone, with lambda's own learning rate.

        Args:
            model: The model to optimize. Defaults to the Trainer's.
        """
        if self.optimizer is None and self.args.optimizer == HealOptimizer.MUON:
            student: Any = self.model if model is None else model
            groups = muon_groups(
                student,
                learning_rate=self.args.rate,
                weight_decay=self.args.weight_decay,
                lambda_factor=self.lambda_factor,
            )
            self.optimizer = MuonWithAdamW(groups)
        return super().create_optimizer(model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Raises FilesError for the disk, of which safetensors and torch tell by errors of their own."""
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
        """Measures loss, KL, greedy agreement, the recovered share, and lambda per layer (V1), into the log.

        Args:
            eval_dataset: Text to measure on, as the Trainer's; by default the Trainer's.
            ignore_keys: Not used: nothing but the logits is read.
            metric_key_prefix: What the names of the measures begin with.

        Returns:
            The measures by name.

        Raises:
            ConversionError: There is no text to measure on.
        """
        rows = (
            self.held_out if eval_dataset is None else self._rows(eval_dataset, "eval_dataset", self.processing_class)
        )
        if rows is None:
            raise ConversionError("eval_dataset is None, expected text to measure on; give it here or to the Trainer")
        if self.streams is not None:
            self.streams.given = None
        student: Any = self.model  # not the one that came: FSDP2 puts its own in the place
        reached = measure(student, self.teacher, rows, self.args.per_device_eval_batch_size)
        logged = {f"{metric_key_prefix}_{name}": value for name, value in asdict(reached).items() if value is not None}
        loss = f"{metric_key_prefix}_loss"
        start = next((log[loss] for log in self.state.log_history if loss in log), reached.loss)
        if (recovered := reached.recovered(start)) is not None:
            logged[f"{metric_key_prefix}_recovered"] = recovered
        for layer, value in lambda_by_layer(student).items():
            logged[f"{metric_key_prefix}_lambda_layer_{layer}"] = value
        self.log(logged)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logged)
        return logged


def sequences_per_step(args: HealingConfig) -> int:
    """Returns how many sequences an optimizer step takes, over all devices."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def lambda_callbacks(config: Any, args: HealingConfig) -> list[TrainerCallback]:
    """Returns what logs lambda per layer, and in V1 holds it at its floor, unless it is left free."""
    if not any(config.is_differential(layer) for layer in range(config.num_hidden_layers)):
        return []
    held = config.variant == "v1" and args.lambda_mode != LambdaMode.FREE
    return [LambdaCallback(floor=args.lambda_floor if held else None)]


def lambda_by_layer(model: nn.Module) -> dict[int, float]:
    """Returns V1's lambda of every differential layer; nothing in V2, where it is one per token."""
    return {
        layer: layer_lambda(trained_module(attention.get_submodule("diff_lambda")))
        for layer, attention in differential_attentions(model).items()
        if hasattr(attention, "diff_lambda")
    }
