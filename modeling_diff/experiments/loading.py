"""Loading for scripts, with one line where it fails."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """
    Returns the tokenizer of a checkpoint.

    Args:
        checkpoint: Folder or Hub id.

    Raises:
        ValueError: It has none; names it, which transformers' own error without a network does not.
    """
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{checkpoint}: no tokenizer can be loaded from there ({reason})") from error
