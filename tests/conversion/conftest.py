"""The LLaMA that most tests of the conversion start from."""

import pytest
from random_llamas import random_llama, saved


@pytest.fixture
def llama(tmp_path):
    """Four heads in two layers, float32, without a tokenizer."""
    return saved(random_llama(), tmp_path / "llama")
