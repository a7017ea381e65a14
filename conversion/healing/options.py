"""What a user can ask of a healing, checked before anything is opened. The command line is made from the fields."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from conversion.errors import ConversionError, typed
from conversion.options import chosen, chosen_dtype, dtype_option, option, with_field_help


class HealStage(StrEnum):
    """
    What the student is trained on.

    LOCAL: every layer gets the teacher's hidden states before it, and is to give the teacher's after it.
    KL: the teacher's distribution of the next token.
    LM: the next token itself, no teacher needed.
    """

    LOCAL = "local"
    KL = "kl"
    LM = "lm"


class LambdaMode(StrEnum):
    """What becomes of V1's lambda: left FREE, held at or above a FLOOR, or held and moved to PAPER's schedule."""

    FREE = "free"
    FLOOR = "floor"
    PAPER = "paper"


class HealOptimizer(StrEnum):
    """AdamW for everything, or MUON for the matrices of the layers and AdamW for the rest."""

    ADAMW = "adamw"
    MUON = "muon"


# Calibrated V1 of examples/assets/tiny-llama, KL 0.061 on held-out rows: Muon at 1e-3 makes it 0.084 in 0.2 M tokens
# and 0.046 in 2.0 M; in 0.13 M it is 0.061 still at 3e-4, and 0.059 by AdamW at 1e-4. Longer, AdamW is not measured.
RATES = {HealOptimizer.ADAMW: 2e-4, HealOptimizer.MUON: 1e-3}

MAX_LENGTH = 1024  # by default, or what the model can read if that is less


class Trained(StrEnum):
    """Which parameters learn; the stage LOCAL always trains attention alone."""

    ALL = "all"
    ATTENTION = "attention"


# Options of earlier versions by their names in Python, and what to give now.
RENAMED = {
    "steps": ("max_steps",),
    "context": ("max_length",),
    "batch_rows": ("per_device_train_batch_size", "gradient_accumulation_steps"),
    "micro_rows": ("per_device_train_batch_size",),
    "warmup_share": ("warmup_steps",),
    "evaluations": ("eval_steps",),
    "checkpoints": ("save_steps",),
    "lora": ("lora_r",),
}
MEANINGS = {
    "batch_rows": "their product, times the number of devices, is the number of sequences per step",
    "micro_rows": "the number of sequences that a device computes at once",
    "warmup_share": "below 1 it is a share of the steps, as before",
    "evaluations": "0.25, a share of the steps, gives four evaluations",
    "checkpoints": "0.25, a share of the steps, gives four checkpoints",
}


def refuse_renamed(name: str) -> None:
    """Refuses an option of earlier versions.

    Args:
        name: An option that was given, by its name in Python.

    Raises:
        ConversionError: It has another name now; the message says which.
    """
    if name in RENAMED:
        now = " and ".join(map(typed, RENAMED[name]))
        meaning = f": {MEANINGS[name]}" if name in MEANINGS else ""
        raise ConversionError(f"{typed(name)} is called {now} now{meaning}")


@with_field_help
@dataclass(kw_only=True)
class TrainerOptions:
    """Configures the training of a healing; names are those of TrainingArguments. `HealingConfig` has them as well.

    Raises:
        ConversionError: An option is out of range, or two do not go together.
    """

    stage: HealStage = option(
        HealStage.KL,
        help="What is learned from. local: the teacher, layer by layer. kl: its logits. lm: the text alone.",
    )
    max_steps: int = option(-1, help="Number of optimizer steps. -1, the default, goes once through the data.")
    max_length: int | None = option(
        None, help="Tokens per sequence. 1024 by default, or what the model can read if that is less."
    )
    per_device_train_batch_size: int = option(8, help="Number of sequences that a device computes at once.")
    gradient_accumulation_steps: int = option(1, help="Number of batches per optimizer step.")
    optimizer: HealOptimizer = option(
        HealOptimizer.MUON, help="muon: Muon for the matrices of the layers, AdamW for the rest. adamw: AdamW for all."
    )
    learning_rate: float | None = option(None, help="Peak learning rate. By default 1e-3 with muon, 2e-4 with adamw.")
    lambda_learning_rate: float = option(5e-5, help="Learning rate of lambda.")
    weight_decay: float = option(0.0, help="Weight decay, never applied to lambda, norms and biases.")
    warmup_steps: float = option(
        0.05, help="Number of steps in which the learning rate rises to its peak; below 1, a share of all steps."
    )
    train: Trained = option(Trained.ALL, help="What is trained: all parameters, or attention alone.")
    lambda_mode: LambdaMode = option(
        LambdaMode.FLOOR,
        help="v1: lambda is free, held at or above a floor, or annealed to the paper's schedule.",
        flag="--lambda",
    )
    lambda_floor: float = option(0.02, help="v1: the least value of lambda where it is held.")
    norm_share: float = option(
        0.5, help="v1: share of the steps in which a neutral norm is annealed to the paper's, from 0 to 1."
    )
    hidden_weight: float = option(0.0, help="Stage kl: weight of the distance between hidden states in the loss.")
    cross_entropy_weight: float = option(
        0.0, help="Stage kl: weight of the next token of the text in the loss, from 0 to 1."
    )
    gradient_checkpointing: bool = option(False, help="Recompute activations: less memory, about a third more time.")
    eval_steps: float = option(0.25, help="Number of steps between evaluations; below 1, a share of all steps.")
    save_steps: float = option(0.25, help="Number of steps between checkpoints; below 1, a share of all steps.")
    seed: int = option(0, help="Seed of the order of the sequences.")

    def __new__(cls, *args: Any, **given: Any) -> Any:
        """Refuses what earlier versions called otherwise, before Python calls it unexpected."""
        for name in given:
            refuse_renamed(name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Checks every option.

        Raises:
            ConversionError: One is out of range, or two do not go together.
        """
        enumerations: dict[str, Any] = {
            "stage": HealStage,
            "optimizer": HealOptimizer,
            "train": Trained,
            "lambda_mode": LambdaMode,
        }
        for name, choices in enumerations.items():
            setattr(self, name, choices(chosen(name, getattr(self, name), list(choices))))
        self._check_counts()
        self._check_steps()
        self._check_numbers()
        self._check_together()

    @property
    def rate(self) -> float:
        """The peak learning rate, chosen or by default."""
        return self.learning_rate or RATES[self.optimizer]

    @property
    def compares_hidden_states(self) -> bool:
        """Whether the loss compares hidden states with the teacher's."""
        return self.stage == HealStage.LOCAL or bool(self.hidden_weight)

    def _check_counts(self) -> None:
        if self.max_steps != -1:
            _check_count("max_steps", self.max_steps, ", or -1 for once through the data")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            _check_count(name, getattr(self, name))
        if self.max_length is not None:
            _check_count("max_length", self.max_length)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ConversionError(f"{typed('seed')} is {self.seed!r}, expected a whole number from 0 to {2**32 - 1}")

    def _check_steps(self) -> None:
        for name in ("warmup_steps", "eval_steps", "save_steps"):
            value = getattr(self, name)
            positive = value > 0 or (value == 0 and name == "warmup_steps")
            if not (math.isfinite(value) and positive and (value < 1 or value == int(value))):
                raise ConversionError(
                    f"{typed(name)} is {value}, expected a number of steps, or below 1 a share of all steps"
                )

    def _check_numbers(self) -> None:
        for name in ("norm_share", "cross_entropy_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConversionError(f"{typed(name)} is {getattr(self, name)}, expected a share from 0 to 1")
        for name in ("learning_rate", "lambda_learning_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConversionError(f"{typed(name)} is {value}, expected a number above 0")
        for name in ("weight_decay", "hidden_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConversionError(f"{typed(name)} is {getattr(self, name)}, expected a number of at least 0")
        if not (math.isfinite(self.lambda_floor) and self.lambda_floor < 1):
            raise ConversionError(f"{typed('lambda_floor')} is {self.lambda_floor}, expected a number below 1")

    def _check_together(self) -> None:
        if self.stage != HealStage.KL and (self.hidden_weight or self.cross_entropy_weight):
            raise ConversionError(
                f"{typed('hidden_weight')} and {typed('cross_entropy_weight')} belong to the stage kl, not to "
                f"{self.stage}; leave them out"
            )


@with_field_help
@dataclass(kw_only=True)
class HealingOptions(TrainerOptions):
    """Configures what a healing learns: the options of `diff-llama heal`, recorded in conversion.json.

    Raises:
        ConversionError: An option is out of range, or two do not go together.
    """

    tokens: int | None = option(None, help="Number of tokens to train on, in place of a number of steps.")
    held_out_rows: int | None = option(
        None, help="Number of sequences to measure on. By default 32, or one in five where the run has fewer than 160."
    )
    teacher_dtype: str | None = dtype_option(
        "teacher_dtype", "Precision of the teacher in memory. bfloat16 on a GPU and float32 on a CPU by default."
    )
    cached_logits: int | None = option(
        None,
        help="Store this many of the teacher's likeliest tokens per position on disk, 8 bytes each, and unload the "
        "teacher. Held-out text is measured against all tokens: its hidden states and the output matrix are stored, "
        "too.",
    )
    lora_r: int | None = option(None, help="Train adapters of this rank, merged at the end.")
    dtype: str | None = dtype_option()

    def __post_init__(self) -> None:
        """Checks every option.

        Raises:
            ConversionError: One is out of range, or two do not go together.
        """
        super().__post_init__()
        for name in ("tokens", "held_out_rows", "cached_logits", "lora_r"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name in ("dtype", "teacher_dtype"):
            if getattr(self, name) is not None:
                setattr(self, name, chosen_dtype(name, getattr(self, name)))
        if self.tokens is not None and self.max_steps != -1:
            raise ConversionError(
                f"{typed('tokens')} {self.tokens} and {typed('max_steps')} {self.max_steps} both say how long; "
                "give one"
            )
        if self.cached_logits and self.compares_hidden_states:
            raise ConversionError(
                f"{typed('cached_logits')} keeps logits, and hidden states are needed (stage local, "
                f"{typed('hidden_weight')}): leave it out"
            )
        if self.lora_r and self.stage == HealStage.LOCAL:
            raise ConversionError(f"{typed('lora_r')} with the stage local trains little of little; leave it out")

    def recorded(self) -> dict[str, Any]:
        """Returns the options as JSON, with the learning rate that is used."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"learning_rate": self.rate}


def _check_count(name: str, value: Any, or_else: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConversionError(f"{typed(name)} is {value!r}, expected a whole number above 0{or_else}")
