"""The certificate in a checkpoint's folder: whether it is of these weights, and what the model card shows of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.checkpoint.file_identity import file_sha256
from conversion.errors import ConversionError
from conversion.hub.markdown import markdown
from conversion.record import CERTIFICATE, literature_text, read_certificate, shown_number


def certificate_of(weights: Mapping[str, Path], path: Path) -> dict[str, Any]:
    """Returns a certificate.

    Args:
        weights: The weight files that it has to be of, by name.
        path: The certificate.

    Raises:
        ConversionError: It is no certificate, or of other weights.
    """
    found = read_certificate(path)
    if found["model"]["weights"] != {name: file_sha256(file) for name, file in weights.items()}:
        raise ConversionError(f"{path.name} is of other weights; certify these")
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
