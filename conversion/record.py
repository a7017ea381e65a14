"""conversion.json, certificates and reports of `verify --json`, read back: every field that is taken is checked."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from conversion.checkpoint.file_identity import fields_sha256, file_sha256
from conversion.checkpoint.json_files import read_json
from conversion.checkpoint.writer import CONFIG, RECORD
from conversion.errors import ConversionError, quote


# Why what was computed is not compared with the source, in the words of `convert`, `verify` and certificates.
ADAPTER_MERGED = "an adapter was merged first, and the source is without it"
PROMISES = {
    "bit-exact": "the same logits to the last bit in float32 (both sdpa, or eager) as {source}, and the same tokens",
    "equal": "the same function as {source} up to rounding",
    "parity": "the source's weights, paired; not its function: to be healed before use",
}

CALIBRATED = "attention fitted to the source's on text, near its function and not equal"

VALUES_TEXT = {
    "loss_nats": "loss {:.3f} nats/token",
    "source_loss_nats": "the source's loss {:.3f}",
    "kl_nats": "KL {:.4f} nats/token",
    "greedy_agreement": "greedy agreement {:.1%}",
}


@dataclass(frozen=True)
class Maybe:
    """A form that may be left out, or null."""

    form: Any


@dataclass(frozen=True)
class Named:
    """An object with any names, of values of one form."""

    form: Any


# A form is a type, a set of texts, a list of one form, an object of forms by name, or one of the classes above.
NUMBER = int | float
RECORD_FORM: Mapping[str, Any] = {
    "source": {
        "name": str,
        "hub_id": str | None,
        "revision": str | None,
        "kind": str,
        "gguf": Maybe({"bits_per_weight": NUMBER}),
        "sha256": Named(str),
    },
    "options": {
        "dtype": str | None,
        "source_layout": str,
        "norm": Maybe(str),
        "lambda_start": Maybe(NUMBER),
    },
    "promise": {"kind": set(PROMISES), "text": str},
    "pairing": Maybe(str),
    "calibration": Maybe({"text": str, "tokens": int, "effort": Maybe(str), "stages": [str]}),
    "measured": Maybe(
        {
            "not_measured": Maybe(str),
            "text": Maybe(str),
            "tokens": Maybe(int),
            "values": Maybe(Named(NUMBER)),
            "lambda": Maybe(Named(NUMBER)),
        }
    ),
    "healing": Maybe(
        [
            {
                "stage": Maybe(str),
                "teacher": Maybe(str),
                "teacher_is_source": Maybe(bool),
                "tokens": Maybe(int),
                "data": Maybe([str]),
                "start": Maybe(Named(NUMBER)),
                "end": Maybe(Named(NUMBER)),
            }
        ]
    ),
    "parameters": {"source": int, "output": int},
    "versions": Named(str),
    "config_fields": Maybe(str),
    "sha256": Named(str),
}
REPORT_FORM: Mapping[str, Any] = {
    "promise": str,
    "passed": bool,
    "checks": [{"name": str, "outcome": str, "detail": str, "values": Named(NUMBER), "text": Maybe(str)}],
}
CERTIFICATE = "certificate.json"  # in the folder of a checkpoint, whose upload and card then take it along
CERTIFICATE_FORMAT = "diff-llama certificate"
SUITE = 1  # of a certificate: another number wherever prompts, scores or thresholds become others
CERTIFICATE_FORM: Mapping[str, Any] = {
    "passed": bool,
    "failed": [str],
    "model": {
        "name": str,
        "variant": str,
        "promise": set(PROMISES),
        "weights": Named(str),
        "config_fields": Maybe(str),
    },
    "source": {"name": str, "hub_id": Maybe(str), "revision": Maybe(str), "weights": Named(str)},
    "measures": [
        {
            "name": str,
            "unit": str,
            "source": NUMBER,
            "model": NUMBER,
            "relative": Maybe(NUMBER),
            "threshold": Maybe(NUMBER),
            "details": Named(NUMBER),
            "outcome": {"passed", "failed", "measured"},
        }
    ],
    "literature": [{"what": str, "relative": NUMBER, "source": str}],
    "judge": Maybe(str),
    "seed": int,
    "data": Named(str),
    "environment": Named(str | int),
}


def read_record(folder: Path) -> dict[str, Any]:
    """Returns conversion.json of a converted checkpoint.

    Raises:
        ConversionError: It is missing, or not what `convert` and `heal` write.
    """
    path = folder / RECORD
    if not path.is_file():
        raise ConversionError(
            f"{path}: missing; only checkpoints made by `convert` or `heal` can be verified or healed"
        )
    record = read_json(path)
    for place, value in _unlike(record, RECORD_FORM, ""):
        found = "missing" if value is ... else quote(value)
        raise ConversionError(f"{path}: {place} is {found}; get the file as it was written, or convert again")
    return record


def read_report(path: Path) -> dict[str, Any]:
    """Returns a report that `verify --json` printed.

    Raises:
        ConversionError: It is missing, or another file.
    """
    if not path.is_file():
        raise ConversionError(f"{path}: missing; make it with `diff-llama verify FOLDER --against SOURCE --json`")
    report = read_json(path)
    for place, value in _unlike(report, REPORT_FORM, ""):
        found = "missing" if value is ... else quote(value)
        raise ConversionError(f"{path}: not a report of `verify --json` ({place} is {found}); make it again")
    return report


def read_certificate(path: Path, *, any_suite: bool = False) -> dict[str, Any]:
    """Returns a certificate that `verify --certificate` wrote.

    Args:
        path: The file.
        any_suite: Whether one of another suite is taken, of which nothing but that is known.

    Raises:
        ConversionError: It is missing, another file, of another suite, or says two different things.
    """
    if not path.is_file():
        raise ConversionError(
            f"{path}: missing; make it with `diff-llama verify FOLDER --against SOURCE --certificate FILE`"
        )
    found = read_json(path)
    if found.get("format") != CERTIFICATE_FORMAT:
        raise ConversionError(
            f"{path}: not a certificate (format is {quote(found.get('format'))}); give the right file"
        )
    if any_suite:
        return found
    if found.get("suite") != SUITE:
        raise ConversionError(
            f"{path}: of suite {quote(found.get('suite'))}, and this diff-llama runs suite {SUITE}; take the release "
            "that its environment names, or certify again"
        )
    for place, value in _unlike(found, CERTIFICATE_FORM, ""):
        shown = "missing" if value is ... else quote(value)
        raise ConversionError(f"{path}: {place} is {shown}; get the file as it was written, or certify again")
    failed = [measure["name"] for measure in found["measures"] if measure["outcome"] == "failed"]
    if found["failed"] != failed or found["passed"] == bool(failed):
        raise ConversionError(
            f"{path}: passed is {found['passed']} and failed is {quote(found['failed'])}, but its measures say "
            f"{quote(failed)}; get the file as it was written, or certify again"
        )
    return found


def _unlike(value: Any, form: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yields where a value does not have its form, and what is there (... for nothing)."""
    if isinstance(form, Maybe):
        if value is not None and value is not ...:
            yield from _unlike(value, form.form, place)
    elif isinstance(form, Mapping | Named):
        if value is ... and isinstance(form, Mapping):
            value = {}  # its first field is what is missing
        if not isinstance(value, dict):
            yield place, value
            return
        forms = dict.fromkeys(value, form.form) if isinstance(form, Named) else form
        for name, part in forms.items():
            yield from _unlike(value.get(name, ...), part, f"{place}.{name}".removeprefix("."))
    elif isinstance(form, list):
        if not isinstance(value, list):
            yield place, value
            return
        for number, part in enumerate(value):
            yield from _unlike(part, form[0], f"{place}[{number}]")
    elif isinstance(form, set):
        if not isinstance(value, str) or value not in form:
            yield place, value
    # bool is an int in Python, and no number in a file
    elif not isinstance(value, form) or (isinstance(value, bool) and form is not bool):
        yield place, value


def versions() -> dict[str, str]:
    """Returns the releases of the packages and of Python that a conversion is made with."""
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return packages | {"python": platform.python_version()}


@dataclass(frozen=True)
class ConversionReport:
    """What was written, or would be.

    Attributes:
        output: The folder.
        record: Content of its conversion.json.
        notes: What the user should know.
        num_bytes: Bytes of the weights.
    """

    output: Path
    record: Mapping[str, Any]
    notes: Sequence[str]
    num_bytes: int


def adapter_merged(record: Mapping[str, Any]) -> bool:
    """Returns whether an adapter was merged before the conversion, so that the source computes something else."""
    return bool((record.get("adapter") or {}).get("merged"))


def changed_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Returns the names of files whose recorded SHA-256 is not theirs, sorted. Old records lack config and code.

    Args:
        folder: A checkpoint, or the source of one.
        record: Its conversion.json, or the entry `source` of that.
    """
    return sorted(name for name, digest in record["sha256"].items() if recorded_sha256(folder / name) != digest)


def config_fields(folder: Path) -> str:
    """Returns the SHA-256 of the fields of a folder's config.json that numbers depend on.

    Raises:
        ConversionError: The file is missing, or not a JSON object.
    """
    return fields_sha256(read_json(folder / CONFIG, nonfinite=True))


def config_changed(folder: Path, record: Mapping[str, Any]) -> bool:
    """Returns whether numbers may depend on what has changed in config.json since a record was written.

    Older records have the SHA-256 of the file alone, by which any change may be one, and the oldest not even that.
    """
    if (recorded := record.get("config_fields")) is not None:
        return config_fields(folder) != recorded
    return record["sha256"].get(CONFIG) not in (None, recorded_sha256(folder / CONFIG))


def recorded_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as records have it, an empty text for one that is not there."""
    return file_sha256(path) if path.is_file() else ""


def measured_text(measured: Mapping[str, Any] | None) -> str | None:
    """Returns what `measure_output` found as one sentence, the text named; None without a measurement."""
    if not measured:
        return None
    values = measured.get("values") or {}
    if not values:
        return f"not measured: {measured.get('not_measured') or 'no reason is recorded'}"
    if (difference := values.get("largest_difference")) is not None:
        said = ["logits equal bit for bit" if difference == 0 else f"logits equal up to {difference:.2g}"]
    else:
        said = [form.format(values[name]) for name, form in VALUES_TEXT.items() if name in values]
    said[-1] += f" on {measured.get('text')}, {measured.get('tokens') or 0:,} tokens"
    lambdas = " ".join(f"{value:.3f}" for value in (measured.get("lambda") or {}).values())
    return ", ".join(said) + (f"; lambda per layer {lambdas}" if lambdas else "")


def measure_text(measure: Mapping[str, Any]) -> str:
    """Returns a measure of a certificate in one line."""
    unit = "" if measure["unit"] == "share" else f" {measure['unit']}"
    relative = "none in the source" if measure["relative"] is None else f"relative {measure['relative']:.1%}"
    threshold = "not judged" if measure["threshold"] is None else f"at least {measure['threshold']:.0%}"
    details = "".join(f", {name.replace('_', ' ')} {value:g}" for name, value in measure["details"].items())
    numbers = f"source {shown_number(measure, 'source')}, model {shown_number(measure, 'model')}{unit}"
    return f"{numbers}; {relative} ({threshold}){details}"


def shown_number(measure: Mapping[str, Any], name: str) -> str:
    """Returns the number of one model in a measure, without its unit unless that is a percent sign."""
    forms = {"share": "{:.1%}", "nats/token": "{:.3f}"}
    return forms.get(measure["unit"], "{:g}").format(measure[name])


def literature_text(literature: Sequence[Mapping[str, Any]]) -> str:
    """Returns other conversions' scores in one line."""
    return "; ".join(f"{one['what']}: {one['relative']:.1%} ({one['source']})" for one in literature)
