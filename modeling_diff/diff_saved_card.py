"""The card and the record of a conversion, in a folder into which `save_pretrained` saves other weights."""

import re
from pathlib import Path


CARD = "README.md"
GENERATED = "<!-- Written by diff-llama"
RECORD = "conversion.json"
EARLIER_RECORD = "conversion_of_earlier_weights.json"
BLOCK = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
MEASURED = re.compile(r"^model-index:.*\n(?:[ -].*\n)*", re.MULTILINE)
TEXT = """
These weights were saved by `save_pretrained` in place of those of a conversion by `diff-llama`, after training or
another change. What was promised and measured of the conversion is not known of them. How it was made stands in
`conversion_of_earlier_weights.json`. Write here what you know of these weights.
"""


def retire_card(folder: Path) -> None:
    """
    Replaces the text of the card that `diff-llama` wrote into a folder, and renames the record of the conversion.

    The card keeps its metadata (license, base model) without results; one written by a user is unchanged.

    Args:
        folder: The folder to save into.
    """
    record = folder / RECORD
    card = folder / CARD
    if not record.is_file():
        return
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        if GENERATED in text:
            block = BLOCK.match(text)
            metadata = f"---\n{MEASURED.sub('', block[1])}---\n" if block else ""
            card.write_text(metadata + TEXT, encoding="utf-8")
    record.replace(folder / EARLIER_RECORD)
