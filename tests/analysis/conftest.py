"""The tokenizer and the held-out text of the trained tiny LLaMA."""

import pytest
from tiny_tokenizers import TINY_LLAMA
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


@pytest.fixture(scope="session")
def filler():
    return (TINY_LLAMA / "heldout.txt").read_text()
