"""A certificate: what a conversion has kept of its source by a fixed suite, as one JSON that can be checked again."""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from conversion.checkpoint.output_folder import replace_text
from conversion.errors import ConversionError, FilesError, typed
from conversion.evaluation.behavior import first_divergences
from conversion.evaluation.metrics import TextMetrics
from conversion.evaluation.performance import NEW_TOKENS, Performance, repeated_line_rate
from conversion.evaluation.verification import Check
from conversion.record import CERTIFICATE, literature_text, measure_text, read_certificate


JUDGED = "facts, judged"
TASKS = ("lookup", "needles", "facts", JUDGED)
# Of a conversion that is not exact: the least share of the source's score. 0.90 of a KL is 0.105 nats/token, 0.95 of a
# loss 0.051. How soon continuations part says little of their worth, and twelve prompts little of one length.
THRESHOLDS = {
    "held-out loss": 0.95,
    "KL": 0.90,
    "greedy agreement": 0.90,
    "win and tie": 0.90,
    "repeated lines": 0.95,
    **dict.fromkeys(TASKS, 0.90),
}
LEAST_SOURCE = 0.5  # of a task; a source that fails it itself cannot show what its conversion has lost
PASSAGE_TOKENS = 64
TOLERANCE_NATS = 0.05
# A second run in the same environment repeats every digit that is shown. In another one sums are rounded otherwise,
# and a near-tie decided otherwise changes all of a continuation that follows: how soon two part says nothing there.
SAME = 1e-6
NEAR_SHARE = 0.05
FOLLOWING = ("relative", "threshold", "outcome")
COMPARED = ("unit", "source", "model", *FOLLOWING)
NEAR = {"held-out loss": 1e-3, "KL": 1e-3}
LITERATURE = [
    {"what": f"RADLADS, linear attention after 350 to 700M tokens, {task}", "relative": share, "source": source}
    for task, share, source in (("LAMBADA", 0.983, "arXiv:2505.03005"), ("MMLU", 0.924, "arXiv:2505.03005"))
]


@dataclass(frozen=True)
class Measure:
    """One measure of both models.

    Attributes:
        threshold: The least `relative` that passes; None where it is not judged.
        details: Numbers that belong to it.
    """

    name: str
    unit: str
    source: float
    model: float
    threshold: float | None = None
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def relative(self) -> float | None:
        """The share of the source's score that the model has; None where the source has none.

        Of nats per token, the geometric mean of what the model gives each token, in shares of what the source gives.
        """
        if self.unit == "nats/token":
            return math.exp(self.source - self.model)
        if self.name == "repeated lines":
            return _ratio(1 - self.source, 1 - self.model)
        return _ratio(self.source, self.model)

    @property
    def outcome(self) -> Literal["passed", "failed", "measured"]:
        if self.relative is None or self.threshold is None:
            return "measured"
        return "passed" if self.relative >= self.threshold else "failed"

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return asdict(self) | {"relative": self.relative, "outcome": self.outcome}


@dataclass(frozen=True)
class Certificate:
    """What was measured, of what, on what and with what.

    Attributes:
        content: The certificate as JSON.
    """

    content: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether no measure is below its threshold."""
        return not self.content["failed"]

    def checks(self) -> Iterator[Check]:
        """Yields each measure as a check, and the literature's scores for scale."""
        for measure in self.content["measures"]:
            values = {key: measure[key] for key in ("source", "model", "relative") if measure[key] is not None}
            yield Check(measure["name"], measure["outcome"], measure_text(measure), values)
        yield Check("for scale", "measured", literature_text(self.content["literature"]))

    def write(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes it, whole or not at all.

        Args:
            path: The file. As certificate.json in the checkpoint's folder, `push` uploads and shows it.
            overwrite: Replace an earlier certificate.

        Raises:
            FilesError: The file exists, or cannot be written.
        """
        check_file(Path(path), overwrite)
        replace_text(Path(path), json.dumps(self.content, indent=2) + "\n")


def check_file(path: Path, overwrite: bool, source: Path | None = None) -> None:
    """Refuses a file that a certificate cannot be written to.

    Raises:
        FilesError: Its folder is missing or in the folder `source`, or it exists without `overwrite` or is no
            certificate.
    """
    if source is not None and path.resolve().is_relative_to(source.resolve()):
        raise FilesError(f"{path}: is inside the source {source}, which is never changed; choose another file")
    if not path.parent.is_dir():
        raise FilesError(f"{path}: {path.parent} is no folder; create it, or choose another file")
    if path.is_dir():
        raise FilesError(f"{path}: is a folder, expected a file or a new name, such as {path / CERTIFICATE}")
    if not path.exists():
        return
    if not overwrite:
        raise FilesError(f"{path}: exists; choose another file, or overwrite it ({typed('overwrite', True)})")
    try:
        read_certificate(path, any_suite=True)
    except ConversionError as error:
        raise FilesError(f"{path}: exists and is no certificate; choose another file") from error


def measures(
    metrics: TextMetrics,
    win_and_tie: float,
    *,
    source: Performance,
    model: Performance,
    exact: bool,
    judged: tuple[float, float] | None = None,
) -> list[Measure]:
    """Returns all measures of a suite, judged.

    Args:
        metrics: Of the held-out text.
        win_and_tie: Of its passages.
        source: What the source does.
        model: What the conversion does.
        exact: Whether the same bits were promised, and nothing less than all of the source's scores passes.
        judged: The judge's mean score of the answers of source and model.
    """
    found = [*_of_text(metrics, win_and_tie), *_of_continuations(source, model)]
    found.append(_task("lookup", _share(source.lookups), _share(model.lookups), answers=len(model.lookups)))
    found.append(_task("needles", _share(source.needles.values()), _share(model.needles.values())))
    for length, share in source.needles.items():
        found.append(_task(f"needles, {length} tokens", share, model.needles[length]))
    found.append(_task("facts", _share(source.facts), _share(model.facts), answers=len(model.facts)))
    if judged:
        found.append(_task(JUDGED, *judged, answers=len(model.facts)))
    return [replace(measure, threshold=_threshold(measure, exact)) for measure in found]


def _of_text(metrics: TextMetrics, win_and_tie: float) -> Iterator[Measure]:
    source_loss = metrics.source_loss_nats
    kl = metrics.kl_nats
    agreement = metrics.greedy_agreement
    assert source_loss is not None and kl is not None and agreement is not None
    yield Measure("held-out loss", "nats/token", source=source_loss, model=metrics.loss_nats)
    yield Measure("KL", "nats/token", source=0.0, model=kl)
    yield Measure("greedy agreement", "share", source=1.0, model=agreement)
    rule = {"passage_tokens": PASSAGE_TOKENS, "tolerance_nats": TOLERANCE_NATS}
    yield Measure("win and tie", "share", source=1.0, model=win_and_tie, details=rule)


def _of_continuations(source: Performance, model: Performance) -> Iterator[Measure]:
    same = first_divergences(source.continuations, model.continuations)
    details = {"min": min(same), "continuations": len(same)}
    yield Measure("first divergence", "tokens", source=NEW_TOKENS, model=statistics.median(same), details=details)
    repeats = [repeated_line_rate(performance.texts) for performance in (source, model)]
    yield Measure("repeated lines", "share", source=repeats[0], model=repeats[1])


def _task(name: str, source: float, model: float, **details: float) -> Measure:
    return Measure(name, "share", source=source, model=model, details=details)


def _share(right: Iterable[float]) -> float:
    return statistics.fmean(right)


def _ratio(source: float, model: float) -> float | None:
    if source == model:
        return 1.0
    return model / source if source else None


def _threshold(measure: Measure, exact: bool) -> float | None:
    if exact:
        return 1.0
    return None if measure.name in TASKS and measure.source < LEAST_SOURCE else THRESHOLDS.get(measure.name)


def compare_certificates(filed: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Check]:
    """Yields what a certificate says against what was found when its suite was run again.

    Args:
        filed: The certificate.
        found: A new one, of the same weights and tasks.
    """
    there = filed["environment"]
    here = found["environment"]
    changed = [f"{name} {there.get(name)}, here {here[name]}" for name in here if there.get(name) != here[name]]
    yield Check("environment", "measured", f"certified with {'; '.join(changed)}" if changed else "as certified")
    stated = _statements(filed)
    true = _statements(found)
    wrong = [name for name in stated.keys() | true.keys() if stated.get(name) != true.get(name)]
    detail = f"{min(wrong)} is {stated.get(min(wrong))!r}, found {true.get(min(wrong))!r}" if wrong else "as certified"
    yield Check("statements", "failed" if wrong else "passed", detail)
    certified = {measure["name"]: measure for measure in filed["measures"]}
    measured = {measure["name"]: measure for measure in found["measures"]}
    for name in dict.fromkeys([*certified, *measured]):
        if name == JUDGED and filed.get("judge") != found.get("judge"):
            yield Check(name, "skipped", "another judge, or none; check_certificate takes one in Python")
        elif name not in certified or name not in measured:
            yield Check(name, "failed", "missing in the certificate" if name in measured else "not a measure")
        else:
            exact = found["model"]["promise"] == "bit-exact"
            yield _compared(certified[name], measured[name], near=bool(changed), exact=exact)


def _statements(content: Mapping[str, Any]) -> dict[str, Any]:
    """All that does not depend on a run; a folder's name may change, and older certificates say less of the config."""
    varying = ("measures", "environment", "judge", "passed", "failed", "model")
    free = ("name", "config_fields")
    stated = {name: value for name, value in content.items() if name not in varying}
    return stated | {f"model.{name}": value for name, value in content["model"].items() if name not in free}


def _compared(certified: Mapping[str, Any], measured: Mapping[str, Any], *, near: bool, exact: bool) -> Check:
    name = measured["name"]
    there, here = (
        {**measure["details"], **{key: measure[key] for key in COMPARED}} for measure in (certified, measured)
    )
    for key in sorted(there.keys() | here.keys()):
        if near and _is_free(name, key, exact):
            continue
        slack = NEAR.get(name, NEAR_SHARE) if near and key in ("source", "model") else SAME
        if not _equal(there.get(key), here.get(key), slack):
            return _differs(name, key, there.get(key), f"{_shown(here.get(key))} here")
    if not near:
        return Check(name, "passed", f"as certified: {measure_text(measured)}")
    following = _judged_again(certified, exact)
    for key in FOLLOWING:
        if not _equal(there[key], following[key], SAME):
            return _differs(name, key, there[key], f"{_shown(following[key])} by its own source and model")
    said = f"as certified up to rounding: {measure_text(measured)}"
    if there["outcome"] != here["outcome"]:
        said += f"; {there['outcome']} when certified, {here['outcome']} here"
    return Check(name, "passed", said)


def _is_free(name: str, key: str, exact: bool) -> bool:
    """Whether another environment may have any other value: by rounding, or as it follows from scores that may differ.

    Of a weak source one answer is much of the relative score, and two continuations part at the first near-tie. That a
    conversion equals its source to the last bit is no matter of rounding.
    """
    if key == "outcome":
        return not exact
    return key in FOLLOWING or (name == "first divergence" and key in ("model", "min"))


def _judged_again(measure: Mapping[str, Any], exact: bool) -> dict[str, Any]:
    """A measure with what follows from its two scores."""
    scores = Measure(measure["name"], measure["unit"], source=measure["source"], model=measure["model"])
    return replace(scores, threshold=_threshold(scores, exact)).to_dict()


def _differs(name: str, key: str, certified: Any, found: str) -> Check:
    return Check(name, "failed", f"{key} is {_shown(certified)} in the certificate, and {found}")


def _equal(one: Any, other: Any, slack: float) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) <= slack
    return one == other


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
