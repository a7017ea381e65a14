"""What a user can ask of a healing, checked before anything is opened."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from conversion.errors import ConversionError, typed
from conversion.options import chosen, chosen_dtype


class HealStage(StrEnum):
    """
    What the student is trained on.

    LOCAL: every layer gets the teacher's stream before it and is to give the teacher's stream after it.
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


class Trained(StrEnum):
    """Which parameters learn; the stage LOCAL always trains attention alone."""

    ALL = "all"
    ATTENTION = "attention"


@dataclass(frozen=True)
class HealingOptions:
    """
    Choices that change what is learnt; all of them are recorded in conversion.json.

    tokens, steps: how long, one of them; without either, once through the data.
    context: tokens a row; None: 1024, or what the model can read if that is less.
    batch_rows: rows a step, over all devices; micro_rows: rows a device takes at once. None: as many as
        divide its share of a step, up to 8,192 tokens.
    learning_rate: its peak, reached after `warmup_share` of the steps; it falls to 0 by a cosine. None: RATES.
    norm_share: share of the steps in which a large `sub_norm_eps` falls to the paper's 1e-5, geometrically.
    hidden_weight: weight of the distance between the streams behind each layer, beside KL.
    cross_entropy_weight: its share of the loss of the stage KL.
    cached_logits: the teacher's most likely tokens kept a position, on disk, in place of the teacher in memory.
    lora: rank of adapters that are trained in place of the matrices, and merged at the end.
    held_out_rows: rows to measure on. None: 32, or one row in five where the run has fewer than 160.
    dtype: of the output; None: each tensor keeps its own. teacher_dtype: None: bfloat16 on a GPU, float32 on a CPU.
    """

    stage: HealStage = HealStage.KL
    tokens: int | None = None
    steps: int | None = None
    context: int | None = None
    batch_rows: int = 8
    micro_rows: int | None = None
    optimizer: HealOptimizer = HealOptimizer.MUON
    learning_rate: float | None = None
    lambda_learning_rate: float = 5e-5
    weight_decay: float = 0.0
    warmup_share: float = 0.05
    train: Trained = Trained.ALL
    lambda_mode: LambdaMode = LambdaMode.FLOOR
    lambda_floor: float = 0.02
    norm_share: float = 0.5
    hidden_weight: float = 0.0
    cross_entropy_weight: float = 0.0
    teacher_dtype: str | None = None
    cached_logits: int | None = None
    lora: int | None = None
    gradient_checkpointing: bool = False
    held_out_rows: int | None = None
    evaluations: int = 4
    checkpoints: int = 4
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        enumerations: dict[str, Any] = {
            "stage": HealStage, "optimizer": HealOptimizer, "train": Trained, "lambda_mode": LambdaMode,
        }  # fmt: skip
        for field, choices in enumerations.items():
            object.__setattr__(self, field, choices(chosen(field, getattr(self, field), list(choices))))
        for field in ("dtype", "teacher_dtype"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, chosen_dtype(field, getattr(self, field)))
        self._check_counts()
        self._check_shares()
        self._check_together()

    @property
    def rate(self) -> float:
        """The peak learning rate, chosen or by default."""
        return self.learning_rate or RATES[self.optimizer]

    def recorded(self) -> dict[str, Any]:
        """As JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"learning_rate": self.rate}

    def _check_counts(self) -> None:
        optional = ("tokens", "steps", "context", "micro_rows", "cached_logits", "lora", "held_out_rows")
        for field in ("batch_rows", "evaluations", "checkpoints", *optional):
            value = getattr(self, field)
            if value is None and field in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConversionError(f"{typed(field)} is {value!r}, expected a whole number above 0")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ConversionError(f"{typed('seed')} is {self.seed!r}, expected a whole number from 0 to {2**32 - 1}")
        if self.tokens is not None and self.steps is not None:
            raise ConversionError(
                f"{typed('tokens')} {self.tokens} and {typed('steps')} {self.steps} both say how long; give one"
            )

    def _check_shares(self) -> None:
        for field in ("warmup_share", "norm_share", "cross_entropy_weight"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConversionError(f"{typed(field)} is {getattr(self, field)}, expected a share from 0 to 1")
        for field in ("learning_rate", "lambda_learning_rate"):
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConversionError(f"{typed(field)} is {value}, expected a number above 0")
        for field in ("weight_decay", "hidden_weight"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) >= 0):
                raise ConversionError(f"{typed(field)} is {getattr(self, field)}, expected a number of at least 0")
        if not (math.isfinite(self.lambda_floor) and self.lambda_floor < 1):
            raise ConversionError(f"{typed('lambda_floor')} is {self.lambda_floor}, expected a number below 1")

    def _check_together(self) -> None:
        if self.stage != HealStage.KL and (self.hidden_weight or self.cross_entropy_weight):
            raise ConversionError(
                f"{typed('hidden_weight')} and {typed('cross_entropy_weight')} belong to the stage kl, not to "
                f"{self.stage}; leave them out"
            )
        if self.cached_logits and (self.stage == HealStage.LOCAL or self.hidden_weight):
            raise ConversionError(
                f"{typed('cached_logits')} keeps logits, and hidden states are needed (stage local, "
                f"{typed('hidden_weight')}): leave it out"
            )
        if self.lora and self.stage == HealStage.LOCAL:
            raise ConversionError(f"{typed('lora')} with the stage local trains little of little; leave it out there")


def existing_paths(paths: Sequence[str | Path] | str | Path) -> list[Path]:
    """One path or several. ConversionError for none, or one that is not there."""
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise ConversionError(f"{typed('data')}: no file was given; expected text, JSON lines or a datasets folder")
    found = [Path(path) for path in given]
    for path in found:
        if not path.exists():
            raise ConversionError(f"{path}: does not exist, expected training text; check the path")
    return found
