"""
Needle retrieval on a grid of depths and lengths, by greedy generation: batched, and resumable through a file.

B batch, T tokens.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .needles import CITIES, NeedlePrompt, NeedleTask, Template, make_prompts, read_number, score
from .tokens import check_token_ids


# arXiv:2410.05258, table 2 and table 3: 3B parameters, 4K tokens; for scale next to one's own.
PUBLISHED_ACCURACY = {
    "Transformer": {(1, 1): 1.00, (2, 2): 0.85, (4, 2): 0.62, (6, 2): 0.55},
    "DIFF": {(1, 1): 1.00, (2, 2): 0.92, (4, 2): 0.84, (6, 2): 0.85},
}
PUBLISHED_ATTENTION = {
    "Transformer": {"answer": (0.03, 0.09), "noise": (0.49, 0.54)},
    "DIFF": {"answer": (0.27, 0.40), "noise": (0.01, 0.02)},
}


@dataclass(frozen=True)
class NeedleGrid:
    """
    A grid of measurements: every length with every depth and every (needles, asked).

    Attributes:
        lengths_tokens: Lengths of prompts, in tokens.
        depths: Depths of the asked needles, 0 to 1; None for anywhere.
        counts: Pairs of (needles, asked).
        samples: Prompts per cell.
        seed: Seed of the prompts.
        digits: Digits of a number.
        template: Wording of facts and questions.
        cities: Names to draw from.
    """

    lengths_tokens: tuple[int, ...]
    depths: tuple[float | None, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    counts: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (4, 2), (6, 2))
    samples: int = 50
    seed: int = 0
    digits: int = 4
    template: Template = field(default_factory=Template)
    cities: tuple[str, ...] = CITIES

    def tasks(self) -> Iterator[NeedleTask]:
        """Yields the cells of the grid in their order."""
        for (needles, asked), length, depth in itertools.product(self.counts, self.lengths_tokens, self.depths):
            yield NeedleTask(
                length_tokens=length,
                depth=depth,
                needles=needles,
                asked=asked,
                digits=self.digits,
                template=self.template,
                cities=self.cities,
            )


@dataclass(frozen=True)
class CellResult:
    """
    The result of one cell.

    Attributes:
        needles: Needles in a prompt.
        asked: Needles asked for.
        length_tokens: Length of a prompt, in tokens.
        depth: Depth of the asked needles, 0 to 1; None for anywhere.
        right: Answers that are exact to the last digit.
        answers: All answers.
    """

    needles: int
    asked: int
    length_tokens: int
    depth: float | None
    right: int
    answers: int

    @property
    def cell(self) -> tuple[int, int, int, float | None]:
        """Returns (needles, asked, length_tokens, depth)."""
        return self.needles, self.asked, self.length_tokens, self.depth

    @property
    def accuracy(self) -> float:
        """Returns the share of right answers."""
        return self.right / self.answers


def left_padded(sequences: Sequence[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pads token ids on the left.

    Args:
        sequences: Token ids, at least one sequence.
        pad_token_id: Id of the padding.

    Returns:
        Token ids and their mask, 1 where a token is no padding, (B, T) each.
    """
    length = max(map(len, sequences))
    ids = torch.tensor([[pad_token_id] * (length - len(sequence)) + sequence for sequence in sequences])
    mask = torch.tensor([[0] * (length - len(sequence)) + [1] * len(sequence) for sequence in sequences])
    return ids, mask


def check_context(model: Any, num_tokens: int, what: str) -> None:
    """Raises `ValueError` for more tokens than the model has positions; `what` they are begins the message."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and num_tokens > context:
        raise ValueError(f"{what}: {num_tokens} tokens, but max_position_embeddings is {context}; shorten the prompt")


@torch.no_grad()
def generate_replies(model: Any, tokenizer: Any, texts: Sequence[str], max_new_tokens: int) -> list[str]:
    """
    Continues a batch of texts greedily.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: The texts, all in one batch.
        max_new_tokens: The largest number of tokens to add to each.

    Returns:
        The continuations, without special tokens.

    Raises:
        ValueError: A text with its continuation does not fit the context, or has a token outside the vocabulary.
    """
    sequences = [tokenizer(text, verbose=False).input_ids for text in texts]
    check_context(model, max(map(len, sequences)) + max_new_tokens, "needle prompts with their answers")
    for sequence in sequences:
        check_token_ids(model, sequence, "needle prompts")
    usable = range(model.config.vocab_size)  # a padding token added to the tokenizer alone has no embedding
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token in usable), 0)
    ids, mask = left_padded(sequences, pad)
    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
    )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def answer_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[NeedlePrompt], batch_size: int = 8
) -> list[list[str | None]]:
    """
    Asks for each prompt's cities, one after another; each question follows the answers before it, right or wrong.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Prompts of `make_prompts`.
        batch_size: Prompts per batch.

    Returns:
        The numbers that the model answered for each prompt; None where an answer holds no number.

    Raises:
        ValueError: As `generate_replies`.
    """
    # One more than the number takes, so that a number that goes on is not taken for right.
    numbers = {needle.number for prompt in prompts for needle in prompt.asked}
    max_new_tokens = 2 + max(len(tokenizer(f" {number}", add_special_tokens=False).input_ids) for number in numbers)
    answers: list[list[str | None]] = [[] for _ in prompts]
    for batch in torch.arange(len(prompts)).split(batch_size):
        for _ in prompts[int(batch[0])].asked:
            texts = [prompts[i].transcript(answers[i]) for i in batch.tolist()]
            replies = generate_replies(model, tokenizer, texts, max_new_tokens=max_new_tokens)
            for i, reply in zip(batch.tolist(), replies, strict=True):
                answers[i].append(read_number(reply))
    return answers


def run_grid(
    model: Any,
    tokenizer: Any,
    filler: str,
    grid: NeedleGrid,
    *,
    batch_size: int = 8,
    path: Path | None = None,
    label: str | None = None,
    progress: Callable[[CellResult], None] | None = None,
) -> list[CellResult]:
    """
    Measures every cell of a grid.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        filler: The text that needles are placed in.
        grid: What to measure.
        batch_size: Prompts per batch.
        path: A file for finished cells, one JSON line each, which are not measured again. Its first line holds the
            label, the grid and the filler's digest.
        label: Name of the model in that file. Defaults to the model's name or path.
        progress: Called with each cell that was measured.

    Returns:
        One result per cell, in the order of the grid.

    Raises:
        ValueError: A prompt does not fit the context, or the file holds results of other settings.
    """
    for task in grid.tasks():
        check_context(model, task.length_tokens + 1, f"length_tokens={task.length_tokens} and an answer")
    settings = _settings(model, filler, grid, label)
    done = _read_results(path, settings) if path else {}
    results = []
    for task in grid.tasks():
        cell = (task.needles, task.asked, task.length_tokens, task.depth)
        if cell not in done:
            prompts = make_prompts(task, tokenizer, filler, count=grid.samples, seed=grid.seed)
            answers = answer_prompts(model, tokenizer, prompts, batch_size=batch_size)
            right = sum(score(given, prompt.asked) for given, prompt in zip(answers, prompts, strict=True))
            done[cell] = CellResult(*cell, right=right, answers=grid.samples * task.asked)
            if path:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(done[cell])) + "\n")
            if progress:
                progress(done[cell])
        results.append(done[cell])
    return results


def _settings(model: Any, filler: str, grid: NeedleGrid, label: str | None) -> dict[str, Any]:
    """Returns what must be equal for cells of two runs to be of one table. Lengths, depths and counts may grow."""
    kept = ("samples", "seed", "digits", "template", "cities")
    settings = {name: value for name, value in asdict(grid).items() if name in kept}
    settings["cities"] = list(settings["cities"])
    name = label or getattr(model.config, "name_or_path", "") or type(model).__name__
    return {"model": name, **settings, "filler_sha256": hashlib.sha256(filler.encode()).hexdigest()}


def _read_results(path: Path, settings: dict[str, Any]) -> dict[tuple, CellResult]:
    """Reads the cells in `path`. Creates the file if there is none, and cuts off a line that was half written."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    complete = [line for line in lines if line.endswith("\n")]
    if not complete:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return {}
    try:
        found, *rows = (json.loads(line) for line in complete)
        results = [CellResult(**row) for row in rows]
        different = sorted(name for name in settings if found.get(name) != settings[name])
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of needle results ({error}); name another") from None
    if different:
        raise ValueError(f"{path}: holds results of another {', '.join(different)}; name another file or remove it")
    if len(complete) < len(lines):
        path.write_text("".join(complete), encoding="utf-8")
    return {result.cell: result for result in results}
