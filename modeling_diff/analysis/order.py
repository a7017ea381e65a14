"""
Many-shot in-context classification, and how much it depends on the order of the demonstrations.

Demonstrations name a label for each of some words; the model is asked for the label of one of these words, so that
the answer is in its context and no knowledge is needed. The same demonstrations are given in many orders
(arXiv:2410.05258, section 3.5).

Q queries, L labels, B batch, T tokens, V vocabulary.
"""

import copy
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import DynamicCache

from modeling_diff.diff_transformers_compat import cache_argument

from .needle_runs import check_context
from .needles import CITIES
from .tokens import check_token_ids


@dataclass(frozen=True)
class OrderTask:
    """
    A classification task and how often it is measured.

    Attributes:
        shots: Number of demonstrations.
        labels: Number of classes, 2 to `shots`.
        queries: Questions per order.
        orders: Orders per set.
        sets: Sets of demonstrations.
        arrangement: "random" for classes anywhere, "alternate" to take them in turn, as in the paper's second figure.
        seed: Seed of words, labels and orders.
        demonstration: Wording with {word} and {label}.
        question: Wording with {word}.
        words: Distinct words to draw from, `shots` or more.

    Raises:
        ValueError: A field is out of range.
    """

    shots: int
    labels: int = 4
    queries: int = 8
    orders: int = 8
    sets: int = 4
    arrangement: Literal["random", "alternate"] = "random"
    seed: int = 0
    demonstration: str = "{word}: {label}\n"
    question: str = "{word}:"
    words: tuple[str, ...] = CITIES

    def __post_init__(self):
        if not 2 <= self.labels <= self.shots:
            raise ValueError(f"labels={self.labels}: 2 to shots={self.shots}, so that every label is shown")
        if self.shots > len(set(self.words)):
            raise ValueError(f"shots={self.shots}: more than the {len(set(self.words))} different words; give more")
        if self.arrangement not in ("random", "alternate"):
            raise ValueError(f"arrangement={self.arrangement!r}: 'random' or 'alternate'")
        if min(self.queries, self.orders, self.sets) < 1:
            raise ValueError(f"queries={self.queries}, orders={self.orders}, sets={self.sets}: at least 1 each")


@dataclass(frozen=True)
class Demonstrations:
    """Words with their labels, and the words to be asked for again."""

    pairs: tuple[tuple[str, str], ...]
    labels: tuple[str, ...]
    queries: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class OrderResult:
    """
    Accuracies over sets and orders; chance is 1 / labels.

    Attributes:
        shots: Number of demonstrations.
        labels: Number of classes.
        arrangement: "random" or "alternate".
        accuracies: Shares of right answers, `accuracies[set][order]`.
    """

    shots: int
    labels: int
    arrangement: str
    accuracies: tuple[tuple[float, ...], ...]

    @property
    def accuracy(self) -> float:
        """Returns the mean over orders and sets."""
        return statistics.fmean(statistics.fmean(orders) for orders in self.accuracies)

    @property
    def spread(self) -> float:
        """Returns best minus worst order, as a mean over sets."""
        return statistics.fmean(max(orders) - min(orders) for orders in self.accuracies)

    @property
    def std(self) -> float:
        """Returns the standard deviation over orders (of the population), as a mean over sets."""
        return statistics.fmean(statistics.pstdev(orders) for orders in self.accuracies)


def draw_demonstrations(task: OrderTask, source: random.Random) -> Demonstrations:
    """
    Draws words, and labels of four digits; every label has equally many words, as far as division allows.

    Args:
        task: What is drawn: how many labels, demonstrations and queries, and from which words.
        source: Generator of random numbers.

    Returns:
        The demonstrations, in no order that matters, and the queries among them.
    """
    labels = [str(number) for number in source.sample(range(1000, 10_000), task.labels)]
    words = source.sample(sorted(set(task.words)), task.shots)
    pairs = tuple((word, labels[i % task.labels]) for i, word in enumerate(words))
    queries = source.sample(pairs, min(task.queries, task.shots))
    return Demonstrations(pairs, tuple(labels), tuple(queries))


def arrange(drawn: Demonstrations, arrangement: str, source: random.Random) -> list[tuple[str, str]]:
    """
    Returns one order of the demonstrations.

    Args:
        drawn: The demonstrations.
        arrangement: "random", or any other for labels that take turns.
        source: Generator of random numbers.

    Returns:
        Pairs of a word and its label.
    """
    pairs = source.sample(drawn.pairs, len(drawn.pairs))
    if arrangement == "random":
        return pairs
    by_label = [
        [pair for pair in pairs if pair[1] == label] for label in source.sample(drawn.labels, len(drawn.labels))
    ]
    return [group[i] for i in range(max(map(len, by_label))) for group in by_label if i < len(group)]


def _common_length(sequences: Sequence[list[int]]) -> int:
    """Returns how many tokens all sequences have in common from the first on."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({sequence[i] for sequence in sequences}) > 1), shortest)


@torch.no_grad()
def label_log_probs(
    model: Any, tokenizer: Any, context: str, questions: Sequence[str], labels: Sequence[str], batch_size: int = 32
) -> torch.Tensor:
    """
    Computes the log-probability of each label after `context` and each question, summed over the label's tokens.

    What all sequences have in common is read once, and its cache is repeated for each batch.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        context: The demonstrations.
        questions: Questions to append.
        labels: Labels to score.
        batch_size: Sequences per batch.

    Returns:
        Log-probabilities in nats, (Q, L), float32.

    Raises:
        ValueError: A sequence does not fit the context, or has a token outside the vocabulary.
    """
    prompts = [context + question for question in questions]
    sequences = [tokenizer(f"{prompt} {label}", verbose=False).input_ids for prompt in prompts for label in labels]
    unlabeled = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts for _ in labels]
    starts = [_common_length(pair) for pair in zip(unlabeled, sequences, strict=True)]
    check_context(model, max(map(len, sequences)), "demonstrations and a question")
    for sequence in sequences:
        check_token_ids(model, sequence, "demonstrations and a question")
    # The token before a label is read with the rest: it predicts the label's first.
    shared = min(_common_length(sequences), *starts) - 1
    cache = DynamicCache(config=model.config)
    model(torch.tensor([sequences[0][:shared]], device=model.device), logits_to_keep=1, **cache_argument(cache))
    sums: list[torch.Tensor] = []
    for chosen in torch.arange(len(sequences)).split(batch_size):
        batch = [(starts[i] - shared, sequences[i][shared:]) for i in chosen.tolist()]
        length = max(len(tokens) for _, tokens in batch)
        ids = torch.tensor([tokens + [0] * (length - len(tokens)) for _, tokens in batch], device=model.device)
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(len(batch))
        log_probs = model(ids, **cache_argument(repeated)).logits.float().log_softmax(-1)  # (B, T, V)
        token_log_probs = log_probs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T - 1)
        sums += [token_log_probs[i, start - 1 : len(tokens) - 1].sum() for i, (start, tokens) in enumerate(batch)]
    return torch.stack(sums).view(len(questions), len(labels)).cpu()


def measure_order(model: Any, tokenizer: Any, task: OrderTask) -> OrderResult:
    """
    Measures the accuracy of each order; the answer is the label of highest log-probability.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer. Models with the same tokenizer get the same prompts.
        task: The task.

    Returns:
        Accuracies over sets and orders.

    Raises:
        ValueError: The tokenizer is None, or a prompt does not fit the context.
    """
    if tokenizer is None:
        raise ValueError("tokenizer: missing; load the model's own and pass it")
    accuracies = []
    for number in range(task.sets):
        source = random.Random(f"{task.seed} {number} {task.shots} {task.labels}")
        drawn = draw_demonstrations(task, source)
        questions = [task.question.format(word=word) for word, _ in drawn.queries]
        truth = torch.tensor([drawn.labels.index(label) for _, label in drawn.queries])
        orders = []
        for _ in range(task.orders):
            pairs = arrange(drawn, task.arrangement, source)
            context = "".join(task.demonstration.format(word=word, label=label) for word, label in pairs)
            log_probs = label_log_probs(model, tokenizer, context, questions=questions, labels=drawn.labels)
            orders.append((log_probs.argmax(-1) == truth).double().mean().item())
        accuracies.append(tuple(orders))
    return OrderResult(
        shots=task.shots, labels=task.labels, arrangement=task.arrangement, accuracies=tuple(accuracies)
    )


def measure_shots(model: Any, tokenizer: Any, task: OrderTask, shots: Sequence[int]) -> Iterator[OrderResult]:
    """
    Measures one task with different numbers of demonstrations.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        task: The task; its own number of shots is not used.
        shots: Numbers of demonstrations.

    Yields:
        One result per number.

    Raises:
        ValueError: As `measure_order`.
    """
    for count in shots:
        yield measure_order(model, tokenizer, replace(task, shots=count))
