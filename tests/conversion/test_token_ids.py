"""A tokenizer with more tokens than the embedding has rows: every command says so where a text has such a token."""

import logging
import random

import pytest
from healing_toys import TOY
from random_llamas import random_llama, saved
from tiny_tokenizers import word_tokenizer

from conversion import ConversionError, convert_checkpoint, verify_checkpoint
from conversion.heal import heal_checkpoint
from conversion.healing.options import HealingOptions


VOCABULARY = 96  # of the random LLaMA
WORDS = 110


def save_tokenizer(folder, **special_tokens):
    """Words w0 to w109 with their numbers; words that it does not know are w0."""
    words = [f"w{number}" for number in range(WORDS)]
    word_tokenizer(words, "w0", unk_token="w0", model_max_length=16, **special_tokens).save_pretrained(folder)
    return folder


def words(path, below, count=3000):
    """Text of words with numbers below `below`, and the largest of them."""
    numbers = [*random.Random(0).choices(range(below), k=count), below - 1]
    path.write_text(" ".join(f"w{number}" for number in numbers))
    return path


@pytest.fixture
def llama(tmp_path):
    return save_tokenizer(saved(random_llama(), tmp_path / "llama"))


def calibrate(llama, text, output):
    return convert_checkpoint(llama, output, "v1", calibration=text, calibration_tokens=2048, stages=["copy"])


def heal(llama, text, output):
    convert_checkpoint(llama, output.with_name("v2"), "v2")
    options = HealingOptions(**(TOY | {"stage": "lm", "max_steps": 1}))
    return heal_checkpoint(output.with_name("v2"), output, options, data=text)


def verify(llama, text, output):
    convert_checkpoint(llama, output, "v2")
    return verify_checkpoint(output, llama, texts=[text.read_text()[-60:]])


COMMANDS = {"convert": calibrate, "heal": heal, "verify": verify}


@pytest.mark.parametrize("command", COMMANDS)
def test_text_with_an_unknown_token_is_refused_in_one_line(tmp_path, llama, command):
    with pytest.raises(
        ConversionError, match=r"token \d+, expected whole numbers from 0 to 95, as vocab_size is 96;"
    ) as told:
        COMMANDS[command](llama, words(tmp_path / "text.txt", WORDS), tmp_path / "out")
    assert "\n" not in str(told.value) and "use the tokenizer that belongs to the checkpoint" in str(told.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_text_without_one_will_do_and_nothing_is_said_of_its_length(tmp_path, llama, command, caplog):
    """As after `add_special_tokens` for padding alone, which many checkpoints have seen."""
    logging.getLogger("transformers").addHandler(caplog.handler)  # transformers' own logger does not propagate
    COMMANDS[command](llama, words(tmp_path / "text.txt", VOCABULARY), tmp_path / "out")
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "longer than the specified maximum" not in caplog.text


@pytest.mark.parametrize("command", ["convert", "heal"])
def test_a_token_put_around_every_text_is_checked_as_well(tmp_path, llama, command):
    save_tokenizer(llama, bos_token="w100")
    with pytest.raises(ConversionError, match="token 100, expected"):
        COMMANDS[command](llama, words(tmp_path / "text.txt", VOCABULARY), tmp_path / "out")
