"""
Scores of what each head does: previous token, first token, entropy, induction, retrieval.

Every map has scores of its own: LLaMA's A; A1, A2 and A1 - lambda A2 of a differential head. Scores of a difference
are of its signed weights; its entropy is that of their absolute values, normalized to sum to 1.

B batch, T tokens, H heads, Q queries, S keys.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .aggregate import MapKind, normalize, weights_of
from .maps import LayerMaps, visit_maps
from .needles import NeedlePrompt
from .tokens import check_token_ids, repeated_tokens, token_span


SCORES = ("previous_token", "first_token", "entropy_nats", "induction", "retrieval")
Key = tuple[int, int, str]  # layer, head, map


@dataclass(frozen=True)
class HeadScore:
    """
    Scores of one map of one head; None where a score was not measured.

    Attributes:
        layer: The layer, from 0.
        head: The head, from 0.
        map: "attention" for LLaMA's A, else "positive", "negative" or "difference".
        previous_token: Mean attention to the previous token.
        first_token: Mean attention to the first token.
        entropy_nats: Mean entropy, in nats.
        induction: Mean attention to the token after an earlier occurrence of the query's.
        retrieval: Share of a needle's tokens that the head copies, 0 to 1.
    """

    layer: int
    head: int
    map: str
    previous_token: float | None = None
    first_token: float | None = None
    entropy_nats: float | None = None
    induction: float | None = None
    retrieval: float | None = None


@dataclass(frozen=True)
class RetrievalPrompt:
    """
    A prompt that ends where a needle that it holds is to be repeated.

    Attributes:
        input_ids: The prompt's token ids.
        needle: Positions [start, end) of the needle's tokens.
    """

    input_ids: list[int]
    needle: tuple[int, int]


def needle_retrieval(tokenizer: Any, prompts: Sequence[NeedlePrompt]) -> list[RetrievalPrompt]:
    """
    Prepares needle prompts for `score_retrieval`.

    The needle is the number of the first city asked for with the space before it, which is a token of its own for
    some tokenizers.

    Args:
        tokenizer: The model's fast tokenizer.
        prompts: Prompts of `make_prompts`.

    Returns:
        One retrieval prompt per prompt.

    Raises:
        ValueError: The tokenizer is a slow one.
    """
    retrievals = []
    for prompt in prompts:
        start, end = prompt.asked[0].number_span
        span = token_span(tokenizer, prompt.text, (start - (prompt.text[start - 1] == " "), end))
        retrievals.append(RetrievalPrompt(tokenizer(prompt.text, verbose=False).input_ids, span))
    return retrievals


def map_kinds(maps: LayerMaps) -> dict[str, MapKind]:
    """Returns the names under which a layer's maps are scored, with the kind that `weights_of` takes for each."""
    if maps.negative is None:
        return {"attention": "positive"}
    return {"positive": "positive", "negative": "negative", "difference": "difference"}


def pattern_scores(weights: torch.Tensor, queries: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Sums scores of maps over texts and queries.

    Args:
        weights: Weights of the maps, (B, H, Q, S).
        queries: Positions of the queries, (Q,), from 1.

    Returns:
        Sums by score, (H,) each: weight of the previous and of the first token, and entropy in nats.
    """
    absolute = normalize(weights.abs(), "sum")
    previous = weights.gather(-1, (queries - 1)[None, None, :, None].expand(*weights.shape[:3], 1))
    return {
        "previous_token": previous.sum((0, 2, 3)),
        "first_token": weights[..., 0].sum((0, 2)),
        "entropy_nats": torch.special.entr(absolute).sum((0, 2, 3)),
    }


def score_patterns(
    model: nn.Module, input_ids: torch.Tensor, *, queries: Sequence[int] | None = None, **choices: Any
) -> dict[Key, dict[str, float]]:
    """
    Measures mean attention to the previous and the first token, and mean entropy.

    Args:
        model: A LLaMA-like or differential model.
        input_ids: Texts without padding, (B, T).
        queries: Positions to average over. Defaults to all; the first two are left out, as they see so few keys that
            every head would score.
        choices: Keyword arguments of `visit_maps`.

    Returns:
        Scores by (layer, head, map).

    Raises:
        ValueError: No query is left, or `visit_maps` refuses an argument.
    """
    chosen = range(input_ids.shape[-1]) if queries is None else queries
    late = [int(query) for query in chosen if query not in (0, 1)]
    if not late:
        raise ValueError(
            f"queries {list(chosen)} of {input_ids.shape[-1]} tokens: patterns show from the third token on; give "
            "longer texts or later queries."
        )
    count = len(input_ids) * len(late)
    return _mean_scores(model, input_ids, pattern_scores, count=count, queries=late, **choices)


def score_induction(
    model: nn.Module,
    *,
    vocabulary: Sequence[int] | None = None,
    length: int = 25,
    repeats: int = 4,
    batch_size: int = 4,
    first: int | None = None,
    seed: int = 0,
) -> dict[Key, dict[str, float]]:
    """
    Measures prefix matching: attention from a token to the tokens that followed its earlier occurrences.

    The texts are repeated random tokens; the defaults are those of arXiv:2209.11895.

    Args:
        model: A LLaMA-like or differential model.
        vocabulary: Token ids to draw from. Defaults to all.
        length: Number of distinct tokens.
        repeats: How often they are repeated, at least 2.
        batch_size: Number of texts.
        first: A token id to begin each text with, such as the bos.
        seed: Seed of the random tokens.

    Returns:
        Scores by (layer, head, map).

    Raises:
        ValueError: `repeats` is below 2, or the vocabulary has fewer than `length` tokens.
    """
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: induction shows from the second time on; choose at least 2.")
    config: Any = model.config
    vocabulary = range(config.vocab_size) if vocabulary is None else vocabulary
    input_ids = repeated_tokens(
        vocabulary, length=length, repeats=repeats, batch_size=batch_size, first=first, seed=seed
    )
    start = input_ids.shape[1] - length * repeats
    queries = range(start + length, input_ids.shape[1])

    def followers(weights: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        keys = torch.arange(weights.shape[-1], device=positions.device)
        distance = positions[:, None] - keys  # (Q, S)
        follows = (distance >= 0) & ((distance + 1) % length == 0) & (keys > start)
        return {"induction": (weights * follows).sum((0, 2, 3))}

    return _mean_scores(model, input_ids, followers, count=batch_size * len(queries), queries=queries)


def score_retrieval(model: Any, prompts: Sequence[RetrievalPrompt]) -> dict[Key, dict[str, float]]:
    """
    Measures the share of a needle's tokens that a head copies (arXiv:2404.15574, section 2).

    The model generates as many tokens as the needle has, greedily. A head copies a token if the generated token is in
    the needle and the head's largest weight is on an equal token of the needle.

    Args:
        model: A LLaMA-like or differential causal language model.
        prompts: Prompts of `needle_retrieval`.

    Returns:
        Scores by (layer, head, map), as means over prompts.

    Raises:
        ValueError: There is no prompt, or a needle is out of range.
    """
    if not prompts:
        raise ValueError("prompts is empty: retrieval is measured on at least one needle.")
    totals: dict[Key, float] = {}
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids], device=model.device)
        first, last = prompt.needle
        if not 0 <= first < last <= ids.shape[1]:
            raise ValueError(f"needle={prompt.needle}: a span within the prompt's {ids.shape[1]} tokens.")
        output = greedy(model, ids, last - first)
        needle = set(prompt.input_ids[first:last])
        copied: dict[Key, set[int]] = {}
        queries = range(ids.shape[1] - 1, output.shape[1] - 1)

        def look(maps: LayerMaps, output=output, first=first, last=last, needle=needle, copied=copied) -> None:
            generated = output[0, maps.queries + 1]  # (Q,)
            for name, kind in map_kinds(maps).items():
                keys = weights_of(maps, kind)[0].argmax(-1)  # (H, Q)
                hits = (keys >= first) & (keys < last) & (output[0, keys] == generated)
                for head, head_hits in zip(maps.heads.tolist(), hits, strict=True):
                    copied.setdefault((maps.layer, head, name), set()).update(generated[head_hits].tolist())

        visit_maps(model, output, look, queries=queries)
        for key, tokens in copied.items():
            totals[key] = totals.get(key, 0.0) + len(tokens & needle) / len(needle)
    return {key: {"retrieval": total / len(prompts)} for key, total in totals.items()}


@torch.no_grad()
def greedy(model: Any, input_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Continues a prompt greedily, also past an end of text.

    Args:
        model: A causal language model.
        input_ids: The prompt, (1, T).
        num_tokens: Number of tokens to add.

    Returns:
        The prompt with them, (1, T + num_tokens).

    Raises:
        ValueError: A token is outside the vocabulary.
    """
    check_token_ids(model, input_ids, "prompt")
    return model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )


def joined_scores(*measured: Mapping[Key, Mapping[str, float]]) -> list[HeadScore]:
    """
    Joins the scores of several functions.

    Args:
        measured: What `score_patterns`, `score_induction` or `score_retrieval` returned.

    Returns:
        One entry per map, by layer, head and map.
    """
    joined: dict[Key, dict[str, float]] = {}
    for scores in measured:
        for key, values in scores.items():
            joined.setdefault(key, {}).update(values)
    return [HeadScore(layer, head, name, **values) for (layer, head, name), values in sorted(joined.items())]


def score_heads(
    model: Any,
    input_ids: torch.Tensor,
    prompts: Sequence[RetrievalPrompt] = (),
    *,
    vocabulary: Sequence[int] | None = None,
    first: int | None = None,
    seed: int = 0,
) -> list[HeadScore]:
    """
    Measures every score of every map.

    Args:
        model: A LLaMA-like or differential causal language model.
        input_ids: Texts without padding, (B, T), for `score_patterns`.
        prompts: Prompts for `score_retrieval`; without any, retrieval is None.
        vocabulary: See `score_induction`.
        first: See `score_induction`.
        seed: See `score_induction`.

    Returns:
        One entry per map, by layer, head and map.

    Raises:
        ValueError: The model's maps are not known, or an argument is out of range.
    """
    length = min(25, (model.config.max_position_embeddings - 1) // 4)
    measured = [
        score_patterns(model, input_ids),
        score_induction(model, vocabulary=vocabulary, length=length, first=first, seed=seed),
    ]
    if prompts:
        measured.append(score_retrieval(model, prompts))
    return joined_scores(*measured)


def _mean_scores(
    model: nn.Module,
    input_ids: torch.Tensor,
    measure: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]],
    *,
    count: int,
    **choices: Any,
) -> dict[Key, dict[str, float]]:
    """Adds up what `measure` returns for each block of each map, and divides by `count`."""
    device = next(model.parameters()).device
    totals: dict[Key, dict[str, float]] = {}

    def add(maps: LayerMaps) -> None:
        for name, kind in map_kinds(maps).items():
            for score, values in measure(weights_of(maps, kind), maps.queries).items():
                for head, value in zip(maps.heads.tolist(), values.tolist(), strict=True):
                    of_head = totals.setdefault((maps.layer, head, name), {})
                    of_head[score] = of_head.get(score, 0.0) + value / count

    visit_maps(model, input_ids.to(device), add, **choices)
    return totals
