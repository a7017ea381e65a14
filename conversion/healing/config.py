"""TrainingArguments of a healing."""

from dataclasses import dataclass, field, fields

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from conversion.healing.options import TrainerOptions
from conversion.options import with_field_help


KEPT_CHECKPOINTS = 2


@with_field_help
@dataclass
class HealingConfig(TrainerOptions, TrainingArguments):
    """
    Configures a `HealingTrainer`: transformers' TrainingArguments with the options of a healing.

    Listed are the options that TrainingArguments do not have, and those of theirs that have another default here.
    `optim` and its like are AdamW's, which all parameters have with `optimizer="adamw"`, and all but the matrices of
    the layers with "muon".

    Raises:
        ConversionError: An option of the healing is out of range, or has a name of earlier versions.
        ValueError: TrainingArguments refuse one of theirs.
    """

    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of epochs, where max_steps is -1."})
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta2."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Whether to compute in bfloat16. By default on a GPU."}
    )
    logging_steps: float = field(
        default=0.02, metadata={"help": "Number of steps between logs; below 1, a share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave out NaN from the logged loss, which then cannot stop the training."}
    )
    save_total_limit: int | None = field(default=KEPT_CHECKPOINTS, metadata={"help": "Number of checkpoints to keep."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Remove columns that the model does not take; rows have their number in one."}
    )
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Leave out a last batch that is not full."})

    def __post_init__(self) -> None:
        """Checks the options, settles those whose default depends on others, then does what TrainingArguments do."""
        TrainerOptions.__post_init__(self)
        self.learning_rate = self.rate
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available()
        self._settle_checkpointing()
        TrainingArguments.__post_init__(self)

    def _settle_checkpointing(self) -> None:
        # transformers 5.23 renamed the argument and deprecates the name that earlier releases have.
        names = {argument.name for argument in fields(TrainingArguments)}
        name = "gradient_checkpointing"
        if "activation_checkpointing" in names:
            name = "activation_checkpointing"
            self.activation_checkpointing = bool(self.activation_checkpointing or self.gradient_checkpointing)
            self.gradient_checkpointing = None  # type: ignore[assignment]
        if getattr(self, name) and getattr(self, f"{name}_kwargs") is None:
            setattr(self, f"{name}_kwargs", {"use_reentrant": False})
