"""
Many-shot in-context classification, and how much it depends on the order of the demonstrations.

Demonstrations name a label for each of some words; the model is to say the label of one of these words again, so that
what it is asked stands in its context and nothing must be known beforehand. The same demonstrations are given in many
orders (arXiv:2410.05258, section 3.5).

S demonstrations, Q queries, L labels, R rows, T tokens, V vocabulary.
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
    `shots` demonstrations over `labels` classes, `orders` orders of each of `sets` sets, `queries` questions in each.

    `random` orders put the classes anywhere; `alternate` ones take them in turn, as in the paper's second figure.
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
    """`accuracies[set][order]`; chance is 1 / labels."""

    shots: int
    labels: int
    arrangement: str
    accuracies: tuple[tuple[float, ...], ...]

    @property
    def accuracy(self) -> float:
        return statistics.fmean(statistics.fmean(orders) for orders in self.accuracies)

    @property
    def spread(self) -> float:
        """Best minus worst order, mean over sets."""
        return statistics.fmean(max(orders) - min(orders) for orders in self.accuracies)

    @property
    def std(self) -> float:
        """Standard deviation over orders (of the population), mean over sets."""
        return statistics.fmean(statistics.pstdev(orders) for orders in self.accuracies)


def draw_demonstrations(task: OrderTask, source: random.Random) -> Demonstrations:
    """Labels are numbers of four digits, and as many words have each as division allows."""
    labels = [str(number) for number in source.sample(range(1000, 10_000), task.labels)]
    words = source.sample(sorted(set(task.words)), task.shots)
    pairs = tuple((word, labels[i % task.labels]) for i, word in enumerate(words))
    queries = source.sample(pairs, min(task.queries, task.shots))
    return Demonstrations(pairs, tuple(labels), tuple(queries))


def arrange(drawn: Demonstrations, arrangement: str, source: random.Random) -> list[tuple[str, str]]:
    """One order of the demonstrations."""
    pairs = source.sample(drawn.pairs, len(drawn.pairs))
    if arrangement == "random":
        return pairs
    by_label = [
        [pair for pair in pairs if pair[1] == label] for label in source.sample(drawn.labels, len(drawn.labels))
    ]
    return [group[i] for i in range(max(map(len, by_label))) for group in by_label if i < len(group)]


def _common_length(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows have in common from the first on."""
    shortest = min(map(len, rows))
    return next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)


@torch.no_grad()
def label_log_probs(
    model: Any, tokenizer: Any, context: str, questions: Sequence[str], labels: Sequence[str], batch_size: int = 32
) -> torch.Tensor:
    """
    Sums of the log-probabilities, in nats, of each label's tokens after `context` and each question: (Q, L) float32.

    What all rows have in common is read once, and its cache repeated for `batch_size` rows at a time.
    """
    prompts = [context + question for question in questions]
    rows = [tokenizer(f"{prompt} {label}", verbose=False).input_ids for prompt in prompts for label in labels]
    bare = [tokenizer(prompt, verbose=False).input_ids for prompt in prompts for _ in labels]
    starts = [_common_length(pair) for pair in zip(bare, rows, strict=True)]
    check_context(model, max(map(len, rows)), "demonstrations and a question")
    for row in rows:
        check_token_ids(model, row, "demonstrations and a question")
    # The token before a label is read with the rest: it predicts the label's first.
    shared = min(_common_length(rows), *starts) - 1
    cache = DynamicCache(config=model.config)
    model(torch.tensor([rows[0][:shared]], device=model.device), logits_to_keep=1, **cache_argument(cache))
    sums: list[torch.Tensor] = []
    for chosen in torch.arange(len(rows)).split(batch_size):
        part = [(starts[i] - shared, rows[i][shared:]) for i in chosen.tolist()]
        length = max(len(row) for _, row in part)
        ids = torch.tensor([row + [0] * (length - len(row)) for _, row in part], device=model.device)  # (R, T)
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(len(part))
        log_probs = model(ids, **cache_argument(repeated)).logits.float().log_softmax(-1)  # (R, T, V)
        chosen_log_probs = log_probs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)  # (R, T - 1)
        sums += [chosen_log_probs[i, start - 1 : len(row) - 1].sum() for i, (start, row) in enumerate(part)]
    return torch.stack(sums).view(len(questions), len(labels)).cpu()


def measure_order(model: Any, tokenizer: Any, task: OrderTask) -> OrderResult:
    """
    Accuracy of each order, by the label of the highest log-probability.

    Every model with the same tokenizer gets the same prompts. Raises `ValueError` where they do not fit the context.
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
            chosen = label_log_probs(model, tokenizer, context, questions, drawn.labels).argmax(-1)
            orders.append((chosen == truth).double().mean().item())
        accuracies.append(tuple(orders))
    return OrderResult(task.shots, task.labels, task.arrangement, tuple(accuracies))


def measure_shots(model: Any, tokenizer: Any, task: OrderTask, shots: Sequence[int]) -> Iterator[OrderResult]:
    """Many-shot: the same task with each number of demonstrations."""
    for count in shots:
        yield measure_order(model, tokenizer, replace(task, shots=count))
