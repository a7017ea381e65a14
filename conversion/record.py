"""conversion.json and the report of `verify --json`, read back: every field that is taken from them is checked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.errors import ConversionError
from conversion.small_files import quote, read_json
from conversion.stream import RECORD
from conversion.variants import PROMISES


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
    "calibration": Maybe({"text": str, "tokens": int, "stages": [str]}),
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
                "tokens": Maybe(int),
                "data": Maybe([str]),
                "start": Maybe(Named(NUMBER)),
                "end": Maybe(Named(NUMBER)),
            }
        ]
    ),
    "parameters": {"source": int, "output": int},
    "versions": Named(str),
    "sha256": Named(str),
}
REPORT_FORM: Mapping[str, Any] = {
    "promise": str,
    "passed": bool,
    "checks": [{"name": str, "outcome": str, "detail": str, "values": Named(NUMBER), "text": Maybe(str)}],
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


def _unlike(value: Any, form: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Where a value does not have its form, and what is there (... for nothing)."""
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
