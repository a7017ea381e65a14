"""Tokenizers of whole words or of single bytes, and the trained tiny LLaMA of the examples. Not a test module."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


TINY_LLAMA = Path(__file__).parents[1] / "examples" / "assets" / "tiny-llama"


def word_tokenizer(words: Iterable[str], unknown: str, **options: Any) -> PreTrainedTokenizerFast:
    """A word is the token of its place in `words`, and any other word is `unknown`."""
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte is a token, and nothing stands before or after a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: place for place, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
