"""What `verify` found, check by check."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What it is, such as "logits".
        outcome: "passed" or "failed" for a promise, "measured" for numbers about which nothing was promised.
        detail: What was found, in one line.
        values: The numbers, by name; `_nats` is nats/token.
        text: Name of the text that the numbers are of; empty where they are of none.
    """

    name: str
    outcome: Literal["passed", "failed", "measured", "skipped"]
    detail: str
    values: Mapping[str, float] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True)
class VerificationReport:
    """All checks of one checkpoint.

    Attributes:
        output: Name of the checkpoint's folder.
        promise: "bit-exact", "equal" or "parity": what its conversion promised of the function.
        checks: What was looked at, in order.
    """

    output: str
    promise: str
    checks: Sequence[Check]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.outcome != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as `verify --json` prints it."""
        return asdict(self) | {"passed": self.passed}
