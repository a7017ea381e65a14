"""The tasks of a certificate: prompts with their right answers, made of texts that come with this package.

T tokens.
"""

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.checkpoint.file_identity import file_sha256
from conversion.data.held_out import STANDARD_TEXT, HeldOut, read_held_out
from conversion.errors import ConversionError
from modeling_diff.analysis.needles import NeedlePrompt, NeedleTask, make_prompts


SEED = 0
FACTS_TEXT = STANDARD_TEXT.with_name("facts.jsonl")
MIN_CONTEXT = 512  # of which the longest question takes 300 tokens in the vocabulary of tiny-llama
NEEDLE_TOKENS = (128, 256, 512, 1024, 2048)
NEEDLE_ROOM_TOKENS = 64  # the first answer, the second question and its answer
NEEDLES = 4
ASKED = 2
NEEDLE_PROMPTS = 12
LOOKUPS = 48
PAIRS = 8
# One text with two questions, so that a model without chat training sees what an answer is.
EXAMPLE = (
    "The clock of Ilmen was made by Jonas Reik in 1811. It strikes only at noon.\n"
    "Question: Who made the clock?\nAnswer: Jonas Reik\nQuestion: When does the clock strike?\nAnswer: at noon\n\n"
)


@dataclass(frozen=True)
class Question:
    """A prompt and its right answer; of a question on a text, the two of them as well."""

    prompt: str
    answer: str
    question: str = ""
    context: str = ""


@dataclass(frozen=True)
class Suite:
    """All that both models are asked.

    Attributes:
        held_out: Windows (1, T) of the standard text.
        lookups: Tables of words and numbers, of which one word is asked for.
        needles: Prompts by their length in tokens.
        facts: Questions on a given text.
    """

    held_out: HeldOut
    lookups: Sequence[Question]
    needles: Mapping[int, Sequence[NeedlePrompt]]
    facts: Sequence[Question]

    def digests(self) -> dict[str, str]:
        """Returns the SHA-256 of each text file and of what was made of it for this tokenizer and context."""
        needles = {length: [prompt.text for prompt in prompts] for length, prompts in self.needles.items()}
        return {
            STANDARD_TEXT.name: file_sha256(STANDARD_TEXT),
            FACTS_TEXT.name: file_sha256(FACTS_TEXT),
            "set of token windows": _digest([ids.tolist() for ids in self.held_out.windows]),
            "set of lookup prompts": _digest([[question.prompt, question.answer] for question in self.lookups]),
            "set of needle prompts": _digest(needles),
            "set of fact prompts": _digest([[question.prompt, question.answer] for question in self.facts]),
        }


def build_suite(folder: Path, tokenizer: Any, vocab_size: int, context: int) -> Suite:
    """Returns the tasks for a tokenizer and a context; the same for the same arguments on every machine.

    Args:
        folder: The checkpoint, for messages.
        tokenizer: Its tokenizer, None if it has none.
        vocab_size: Number of tokens that the model knows.
        context: Its max_position_embeddings.

    Raises:
        ConversionError: No tokenizer or one that does not fit, or a context that is too short.
    """
    if tokenizer is None:
        raise ConversionError(f"{folder}: has no tokenizer, and a certificate is of text; put the source's next to it")
    if context < MIN_CONTEXT:
        raise ConversionError(
            f"{folder / 'config.json'}: max_position_embeddings is {context}, and the prompts of a certificate need "
            f"{MIN_CONTEXT}; `verify` without --certificate measures shorter models"
        )
    text = STANDARD_TEXT.read_text(encoding="utf-8")
    try:
        needles = {
            length: make_prompts(
                NeedleTask(length_tokens=length, needles=NEEDLES, asked=ASKED), tokenizer, text, NEEDLE_PROMPTS, SEED
            )
            for length in needle_lengths(context)
        }
    except ValueError as error:
        raise ConversionError(f"{folder}: no needle prompts for its tokenizer ({error})") from error
    return Suite(read_held_out(tokenizer, vocab_size, context), _lookups(text), needles, _facts())


def needle_lengths(context: int) -> list[int]:
    """Returns the lengths of needle prompts for a model of so many positions, the longest as long as it allows."""
    longest = min(context - NEEDLE_ROOM_TOKENS, NEEDLE_TOKENS[-1])
    return sorted({length for length in NEEDLE_TOKENS if length < longest} | {longest})


def _lookups(text: str) -> list[Question]:
    """Tables of words of the text and four digits each, then one of the words again."""
    words = sorted({word.capitalize() for word in re.findall(r"\b[a-z]{5,8}\b", text)})
    source = random.Random(SEED)
    questions = []
    for _ in range(LOOKUPS):
        keys = source.sample(words, PAIRS)
        numbers = [str(number) for number in source.sample(range(1000, 10000), PAIRS)]
        table = "".join(f"{key}: {number}\n" for key, number in zip(keys, numbers, strict=True))
        asked = source.randrange(PAIRS)
        questions.append(Question(f"{table}{keys[asked]}:", numbers[asked]))
    return questions


def _facts() -> list[Question]:
    passages = [json.loads(line) for line in FACTS_TEXT.read_text(encoding="utf-8").splitlines()]
    return [
        Question(f"{EXAMPLE}{passage['text']}\nQuestion: {question}\nAnswer:", answer, question, passage["text"])
        for passage in passages
        for question, answer in passage["questions"]
    ]


def _digest(prompts: Any) -> str:
    return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()
