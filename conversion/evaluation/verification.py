"""What `verify` found, check by check."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Check:
    """One thing looked at; `outcome` "measured" reports numbers about which nothing was promised."""

    name: str
    outcome: Literal["passed", "failed", "measured", "skipped"]
    detail: str
    values: Mapping[str, float] = field(default_factory=dict)
    text: str = ""  # what text the values are of, where they are of one


@dataclass(frozen=True)
class VerificationReport:
    """All checks of one checkpoint."""

    output: str
    promise: str
    checks: Sequence[Check]

    @property
    def passed(self) -> bool:
        return all(check.outcome != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"passed": self.passed}
