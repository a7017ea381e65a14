"""What a model does on the tasks of a certificate, and how each answer is scored.

B batch, T tokens.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from conversion.evaluation.behavior import greedy_continuations
from conversion.evaluation.suite import ASKED, Question, Suite
from modeling_diff.analysis.needle_runs import answer_prompts, generate_replies
from modeling_diff.analysis.needles import read_number, score


Progress = Callable[[str], None]
BATCH_SIZE = 8
PROMPT_TOKENS = 64
NEW_TOKENS = 96
NUMBER_TOKENS = 8
ANSWER_TOKENS = 24
ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class Performance:
    """Answers of one model.

    Attributes:
        continuations: Greedy tokens after the head of each held-out window.
        texts: The same as text.
        lookups: Whether each number was looked up right.
        needles: Share of right answers by length in tokens.
        answers: The first line said to each question on a text.
        facts: Whether each of them names the fact.
    """

    continuations: Sequence[Sequence[int]]
    texts: Sequence[str]
    lookups: Sequence[bool]
    needles: Mapping[int, float]
    answers: Sequence[str]
    facts: Sequence[bool]


def perform(model: Any, tokenizer: Any, suite: Suite, progress: Progress) -> Performance:
    """Runs all tasks that are generated, greedily.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        suite: The tasks.
        progress: Called with the name of each task before it begins.

    Raises:
        ValueError: A prompt that does not fit the context or has a token that the model does not know.
    """
    progress("continuations")
    continuations = _continuations(model, suite)
    progress("lookups")
    lookups = _replies(model, tokenizer, suite.lookups, NUMBER_TOKENS)
    needles = {}
    for length, prompts in suite.needles.items():
        progress(f"needles in {length} tokens")
        answers = answer_prompts(model, tokenizer, prompts, BATCH_SIZE)
        right = sum(score(given, prompt.asked) for given, prompt in zip(answers, prompts, strict=True))
        needles[length] = right / (ASKED * len(prompts))
    progress("facts")
    said = [_first_line(reply) for reply in _replies(model, tokenizer, suite.facts, ANSWER_TOKENS)]
    return Performance(
        continuations=continuations,
        texts=[tokenizer.decode(tokens, skip_special_tokens=True) for tokens in continuations],
        lookups=[read_number(reply) == task.answer for reply, task in zip(lookups, suite.lookups, strict=True)],
        needles=needles,
        answers=said,
        facts=[names_fact(answer, task.answer) for answer, task in zip(said, suite.facts, strict=True)],
    )


def _continuations(model: Any, suite: Suite) -> list[list[int]]:
    heads = torch.cat([ids[:, :PROMPT_TOKENS] for ids in suite.held_out.windows]).to(model.device)  # (B, T)
    return [tokens for ids in heads.split(BATCH_SIZE) for tokens in greedy_continuations(model, ids, NEW_TOKENS)]


def _replies(model: Any, tokenizer: Any, tasks: Sequence[Question], max_new_tokens: int) -> list[str]:
    replies: list[str] = []
    for start in range(0, len(tasks), BATCH_SIZE):
        prompts = [task.prompt for task in tasks[start : start + BATCH_SIZE]]
        replies += generate_replies(model, tokenizer, prompts, max_new_tokens)
    return replies


def _first_line(reply: str) -> str:
    return reply.strip().partition("\n")[0].strip()


def names_fact(answer: str, fact: str) -> bool:
    """Whether the words of a fact stand in an answer, one after another, whatever their case and articles."""
    said, wanted = (
        [word for word in re.findall(r"\w+", text.lower()) if word not in ARTICLES] for text in (answer, fact)
    )
    return any(said[start : start + len(wanted)] == wanted for start in range(len(said) - len(wanted) + 1))


def repeated_line_rate(texts: Sequence[str]) -> float:
    """Returns the share of lines that are equal to the line before; empty lines and a text's last, cut one are not
    counted."""
    repeated = 0
    lines = 0
    for text in texts:
        kept = [line.rstrip() for line in text.split("\n")[:-1] if line.strip()]
        repeated += sum(line == before for before, line in pairwise(kept))
        lines += len(kept)
    return repeated / lines if lines else 0.0


def win_and_tie_rate(
    losses: Sequence[torch.Tensor], source_losses: Sequence[torch.Tensor], passage_tokens: int, tolerance_nats: float
) -> float:
    """Returns the share of passages whose mean loss is not above the source's by more than the tolerance.

    Args:
        losses: The model's loss of each token, one tensor (T,) per window.
        source_losses: The source's, alike.
        passage_tokens: Tokens per passage; a window's last passage may be shorter.
        tolerance_nats: In nats per token.
    """
    excess = [
        (part.double().mean() - other.double().mean()).item()
        for window, source in zip(losses, source_losses, strict=True)
        for part, other in zip(window.split(passage_tokens), source.split(passage_tokens), strict=True)
    ]
    return statistics.fmean(difference <= tolerance_nats for difference in excess)
