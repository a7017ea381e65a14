"""The certificate in a checkpoint's folder: whether it is of this model, and what the model card shows of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.checkpoint.file_identity import file_sha256
from conversion.errors import ConversionError
from conversion.hub.markdown import markdown
from conversion.record import (
    CERTIFICATE,
    RECORD,
    config_changed,
    config_fields,
    literature_text,
    read_certificate,
    read_record,
    shown_number,
)


def certificate_of(folder: Path, files: Mapping[str, Path]) -> dict[str, Any]:
    """Returns the certificate of a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        files: What it holds, by name; the certificate and all weights are among them.

    Raises:
        ConversionError: It is no certificate, or of other weights or another config.
    """
    found = read_certificate(files[CERTIFICATE])
    weights = {name: file_sha256(file) for name, file in files.items() if file.suffix == ".safetensors"}
    if found["model"]["weights"] != weights:
        raise ConversionError(f"{CERTIFICATE} is of other weights; certify these")
    if certified := found["model"].get("config_fields"):
        changed = certified != config_fields(folder)
    else:  # an older one, of the config that the record is of
        changed = RECORD in files and config_changed(folder, read_record(folder))
    if changed:
        raise ConversionError(f"{CERTIFICATE} is of another config.json; put that back as it was, or certify again")
    return found


def certificate_section(certificate: Mapping[str, Any]) -> str:
    """Returns the card's section of a certificate: the verdict, each measure, and how to check it again."""
    names = markdown(", ".join(certificate["failed"]))
    verdict = f"**Below its threshold: {names}.**" if names else "Every measure that is judged reaches its threshold."
    rows = [f"| {' | '.join(_cells(measure))} |" for measure in certificate["measures"]]
    table = "| measure | source | model | relative | at least |\n|---|---|---|---|---|\n" + "\n".join(rows)
    return (
        f"## Certificate\n\n{verdict}\n\n{table}\n\n"
        f"Other conversions, for scale: {markdown(literature_text(certificate['literature']))}.\n\n"
        f"`{CERTIFICATE}` has hashes, seeds and versions; `diff-llama verify FOLDER --against SOURCE --check "
        f"FOLDER/{CERTIFICATE}` runs it again."
    )


def _cells(measure: Mapping[str, Any]) -> list[str]:
    unit = "" if measure["unit"] == "share" else f" ({measure['unit']})"
    relative = measure["relative"]
    threshold = measure["threshold"]
    return [
        markdown(measure["name"] + unit),
        shown_number(measure, "source"),
        shown_number(measure, "model"),
        "-" if relative is None else f"{relative:.1%}",
        "not judged" if threshold is None else f"{threshold:.0%}",
    ]
