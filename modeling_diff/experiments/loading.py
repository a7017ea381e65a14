"""What examples load the same way, and say in one line where it cannot."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """Of a folder or Hub id; `ValueError` names it, which transformers' own error without a network does not."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{checkpoint}: no tokenizer can be loaded from there ({reason})") from error
