"""The text on which a conversion is measured: a standard one, which comes with this package, or the user's own."""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

from conversion.data.text import leaves_bos_out, token_ids, with_bos
from conversion.errors import ConversionError
from modeling_diff.training.documents import Tokenizer


STANDARD_TEXT = Path(__file__).with_name("held_out.txt")
STANDARD_NAME = "the standard held-out text (heads of Python library files)"
WINDOWS = 16
WINDOW_TOKENS = 256
# The standard text has 37,000 to 51,000 tokens in the vocabularies of LLaMA 3 and of tiny-llama.
READ_TOKENS = 100_000


@dataclass(frozen=True)
class HeldOut:
    """Token ids (1, T) of evenly spaced windows of a text.

    Attributes:
        name: What text they are of.
        windows: Each after a bos if there is one.
        without_bos: The same without it, where the tokenizer puts none before a text; none otherwise.
    """

    name: str
    windows: list[torch.Tensor]
    without_bos: list[torch.Tensor] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(ids.numel() for ids in self.windows)


def read_held_out(
    tokenizer: Tokenizer | None, vocab_size: int, max_positions: int, text: Path | None = None
) -> HeldOut:
    """Returns 16 windows of 256 tokens of the standard text, or of `text`; fewer where it, or the model, is shorter.

    Args:
        text: Text, JSON lines or a datasets folder, as for a calibration.

    Raises:
        ConversionError: A text that cannot be read, is too short, or has tokens that the model does not know.
    """
    path = text or STANDARD_TEXT
    bos = tokenizer.bos_token_id if tokenizer is not None else None
    body = min(WINDOW_TOKENS, max_positions) - (bos is not None)
    ids = torch.tensor(list(islice(token_ids(path, tokenizer, vocab_size), READ_TOKENS)))
    if len(ids) < 2 or body < 2:
        raise ConversionError(
            f"{path}: {len(ids)} tokens, windows of {body}, expected two at least; give a longer text"
        )
    largest = max(int(ids.max()), bos or 0)
    if largest >= vocab_size:
        raise ConversionError(
            f"{path}: the source's tokenizer gives token {largest}, but config.json says vocab_size {vocab_size}; get "
            "the tokenizer that belongs to it"
        )
    count = max(1, min(WINDOWS, len(ids) // body))
    starts = [number * (len(ids) // count) for number in range(count)]
    windows = [with_bos(ids[start : start + body][None], bos) for start in starts]
    without_bos = [ids[:, 1:] for ids in windows] if leaves_bos_out(tokenizer) else []
    return HeldOut(STANDARD_NAME if text is None else path.name, windows, without_bos)
