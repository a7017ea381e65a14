"""What happens around the steps of a healing: a first measurement, a stop at NaN, progress."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from conversion.errors import ConversionError, typed
from conversion.healing.work_folder import last_checkpoint
from modeling_diff.training.lambda_values import full_tensor


class MeasureAtStart(TrainerCallback):
    """Measures before the first step, on the model as the Trainer has placed it; a resumed run has that in its log."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and self.trainer is not None:
            self.trainer.evaluate()


class StopOnNonFinite(TrainerCallback):
    """
    Stops before an optimizer step that would spoil the weights.

    A loss that is NaN or infinite has such gradients; after clipping all ranks have the same. The last checkpoint
    stays.

    Raises:
        ConversionError: A gradient is NaN or infinite.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        norm = nn.utils.get_total_norm([p.grad for p in kwargs["model"].parameters() if p.grad is not None])
        if bool(torch.isfinite(full_tensor(norm))):
            return
        kept = ""
        if last_checkpoint(Path(args.output_dir)):
            kept = f". What was saved before stays in {args.output_dir}"
        raise ConversionError(
            f"step {state.global_step + 1}: the loss or its gradient is NaN or infinite; lower the learning rate "
            f"({typed('learning_rate')}) or look for NaN in the checkpoint{kept}"
        )


class Progress(TrainerCallback):
    """Tells steps done and in all, in one of several processes."""

    def __init__(self, tell: Any):
        self.tell = tell

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.tell(state.global_step, state.max_steps)
