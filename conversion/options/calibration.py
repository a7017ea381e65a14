"""What a user can ask of a calibration: the text, and how much is done with it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from conversion.errors import ConversionError, typed
from conversion.options.values import chosen


SELF = "self"  # as calibration text
# Left alone lambda falls to 0 in most layers of a calibration, where the second map gets no gradient any more.
LAMBDA_FLOOR = 0.02
STAGES = ("copy", "pairing", "refit", "values", "local")  # of `calibrate.Stage`
CHOICE = "choice"  # the stage that a progress callback is told of while heads are chosen


@dataclass(frozen=True)
class Effort:
    """One recipe of a calibration.

    Attributes:
        stages: Calibration stages that are run.
        tokens: Number of tokens to read, or all of a shorter text.
        steps: Gradient steps per layer, where stage `local` is run.
    """

    stages: tuple[str, ...]
    tokens: int
    steps: int = 200


DEFAULT_EFFORT = "standard"
EFFORTS = {
    "quick": Effort(stages=("pairing", "refit"), tokens=16_384),
    "standard": Effort(stages=STAGES, tokens=65_536),
    "thorough": Effort(stages=STAGES, tokens=262_144, steps=400),
}


@dataclass(frozen=True)
class CalibrationText:
    """Text on which V1 is fitted, and how.

    Attributes:
        path: Text, JSON lines or a datasets folder; None for text that the source writes itself.
        tokens: Number of tokens to read. By default the effort's, or all of a shorter text.
        stages: Calibration stages to run, in place of an effort.
        lambda_floor: Lowest lambda of any calibrated layer; 0 allows layers that are not differential.
        effort: One of EFFORTS; DEFAULT_EFFORT where nothing is given, None where the stages are.

    Raises:
        ConversionError: A value is out of range, no such stage or effort, or both are given.
    """

    path: Path | None
    tokens: int | None = None
    stages: Sequence[str] | None = None
    lambda_floor: float = LAMBDA_FLOOR
    effort: str | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and (not isinstance(self.tokens, int) or self.tokens < 1):
            raise ConversionError(f"{typed('calibration_tokens')} is {self.tokens!r}, expected a whole number above 0")
        if not isinstance(self.lambda_floor, int | float) or not 0 <= self.lambda_floor < 1:
            raise ConversionError(
                f"{typed('lambda_floor')} is {self.lambda_floor!r}, expected a number from 0 to below 1"
            )
        for stage in self.stages or ():
            chosen("stages", stage, STAGES)
        if self.stages is not None and self.effort is not None:
            raise ConversionError(
                f"{typed('effort')} and {typed('stages')} both say what is done to each layer; give one of them"
            )
        if self.stages is None:
            object.__setattr__(self, "effort", chosen("effort", self.effort or DEFAULT_EFFORT, EFFORTS))

    @property
    def recipe(self) -> Effort:
        """What is done: that of the effort, with the stages or the number of tokens that were given."""
        recipe = EFFORTS[self.effort or DEFAULT_EFFORT]
        stages = recipe.stages if self.stages is None else tuple(self.stages)
        return replace(recipe, stages=stages, tokens=self.tokens or recipe.tokens)


def parse_calibration(text: str) -> str | Path:
    """Returns what a user typed as calibration text: SELF, or a path; ./self is the file of that name."""
    return SELF if text == SELF else Path(text)


def parse_stages(text: str) -> list[str]:
    """Returns the calibration stages that a text names.

    Args:
        text: Names out of `STAGES`, separated by commas.

    Returns:
        The names, in the order given.

    Raises:
        ConversionError: It names another stage.
    """
    return [chosen("stages", part, STAGES) for part in text.split(",")]
