"""
Mixes recall into a calibration text: facts with numbers, dense or with text between them, that are said again later.

    python examples/scripts/mix_recall.py examples/assets/tiny-llama/calibration.txt --output out/calibration.txt
    diff-llama convert SOURCE OUTPUT --variant v1 --calibration out/calibration.txt

A V1 conversion loses retrieval from the context first. A calibration that has read texts which need it keeps more.
"""

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path

from modeling_diff.experiments.command_line import one_line_errors, script_parser


STARTS = [
    "Bor",
    "Cal",
    "Dem",
    "Fen",
    "Gil",
    "Hol",
    "Ker",
    "Lum",
    "Mar",
    "Nor",
    "Pel",
    "Ros",
    "Sam",
    "Tor",
    "Ven",
    "Wil",
]
ENDS = ["a", "en", "is", "o", "ley", "wick", "ander", "ette"]
NAMES = [start + end for start in STARTS for end in ENDS]
# Not the wording of the needles by which a conversion is measured.
FACTS = (
    "{} keeps room {}.",
    "The order number of {} is {}.",
    "{}: {}",
    "{} = {}",
    "Call {} at {}.",
    "{}'s ticket has the number {}.",
    "| {} | {} |",
)
COUNTS = (4, 6, 8)  # facts per passage
PIECE_CHARS = 2400
PARAGRAPH_CHARS = range(81, 900)


def mix(text: str, share: float, seed: int) -> str:
    """
    Returns a text with passages of recall between its pieces.

    Args:
        text: The text.
        share: Share of all characters that are recall, from 0 to below 1.
        seed: Of names, numbers and wordings.

    Raises:
        ValueError: The text has too few paragraphs to stand between facts.
    """
    paragraphs = [part for part in re.split(r"\n\n+", text) if len(part) in PARAGRAPH_CHARS]
    if len(paragraphs) <= max(COUNTS):
        raise ValueError(
            f"{len(paragraphs)} paragraphs of {PARAGRAPH_CHARS.start} to {PARAGRAPH_CHARS.stop - 1} characters, "
            f"expected more than {max(COUNTS)}; give a longer text with empty lines"
        )
    source = random.Random(seed)
    parts = []
    start = 0
    owed = 0.0  # characters of recall that the text so far is short of
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARS)
        end = len(text) if end < 0 else end
        parts.append(text[start:end])
        owed += (end - start) * share / (1 - share)
        start = end
        while owed > 0:
            parts.append(recall(source, paragraphs))
            owed -= len(parts[-1])
    return "\n\n".join(parts)


def recall(source: random.Random, paragraphs: Sequence[str]) -> str:
    """Returns facts, in half of all cases with a paragraph around each, and after them all facts again, in another
    order."""
    wording = source.choice(FACTS)
    count = source.choice(COUNTS)
    facts = [wording.format(name, source.randrange(1000, 10_000)) for name in source.sample(NAMES, count)]
    told = facts
    if source.choice((False, True)):
        first, *others = source.sample(paragraphs, count + 1)
        told = [first]
        for fact, paragraph in zip(facts, others, strict=True):
            told += [fact, paragraph]
    return "\n".join([*told, "", *source.sample(facts, count)]) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("text", type=Path, metavar="TEXT", help="plain text, paragraphs between empty lines")
    add("--output", type=Path, required=True, help="file to write")
    add("--share", type=float, default=0.25, help="share of the written text that is recall")
    add("--seed", type=int, default=0, help="seed of names, numbers and wordings")
    add("--overwrite", action="store_true", help="replace an earlier file")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.share < 1:
        parser.error(f"--share is {arguments.share:g}, expected a number from 0 to below 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    output = arguments.output
    with one_line_errors(__file__):
        if output.exists() and (not arguments.overwrite or output.samefile(arguments.text)):
            raise ValueError(f"{output} is there: add --overwrite to replace it, or name a file other than TEXT")
        mixed = mix(arguments.text.read_text(encoding="utf-8"), arguments.share, arguments.seed)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(mixed, encoding="utf-8")
    print(f"wrote {output}: {len(mixed):,} characters, {arguments.share:.0%} of them recall")


if __name__ == "__main__":
    main()
