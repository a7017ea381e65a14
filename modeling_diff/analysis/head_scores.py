"""
What each head does, as numbers: previous token, first token, entropy, induction, retrieval.

Of every map by itself: LLaMA's A; A1, A2 and A1 - lambda A2 of a differential head. Scores of a difference are of its
signed weights; its entropy is that of their absolute values, on a row sum of 1.

B batch, T tokens, H heads, Q queries, S keys.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from .aggregate import MapKind, normalise, weights_of
from .maps import LayerMaps, visit_maps
from .needles import NeedlePrompt
from .tokens import check_token_ids, token_span


SCORES = ("previous_token", "first_token", "entropy_nats", "induction", "retrieval")
Key = tuple[int, int, str]  # layer, head, map


@dataclass(frozen=True)
class HeadScore:
    """One map of one head. None is what was not measured."""

    layer: int
    head: int
    map: str  # "attention" of LLaMA; "positive", "negative", "difference"
    previous_token: float | None = None
    first_token: float | None = None
    entropy_nats: float | None = None
    induction: float | None = None
    retrieval: float | None = None


@dataclass(frozen=True)
class RetrievalPrompt:
    """Token ids that end where a needle said earlier is to be said again; where it was said: first, one past last."""

    input_ids: list[int]
    needle: tuple[int, int]


def needle_retrieval(tokenizer: Any, prompts: Sequence[NeedlePrompt]) -> list[RetrievalPrompt]:
    """
    Prompts of `needles.make_prompts` for `score_retrieval`: the needle is the number of the first city asked for, and
    the space before it, which some tokenizers make a token of.
    """
    retrievals = []
    for prompt in prompts:
        start, end = prompt.asked[0].number_span
        span = token_span(tokenizer, prompt.text, (start - (prompt.text[start - 1] == " "), end))
        retrievals.append(RetrievalPrompt(tokenizer(prompt.text, verbose=False).input_ids, span))
    return retrievals


def map_kinds(maps: LayerMaps) -> dict[str, MapKind]:
    """The names under which a layer's maps are scored, and what each is for `weights_of`."""
    if maps.second is None:
        return {"attention": "positive"}
    return {"positive": "positive", "negative": "negative", "difference": "difference"}


def pattern_scores(weights: torch.Tensor, queries: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Sums over queries, (H,) each, of maps (B, H, Q, S): attention to the token before, to the first token, entropy in
    nats.
    """
    absolute = normalise(weights.abs(), "sum")
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
    Mean attention to the previous and the first token and mean entropy (nats), over texts (B, T) without padding.

    Means are over `queries`, all by default, but the first two tokens, which see so little that every head would
    score. `choices` are those of `visit_maps`. ValueError where no query is left.
    """
    asked = range(input_ids.shape[-1]) if queries is None else queries
    late = [int(query) for query in asked if query not in (0, 1)]
    if not late:
        raise ValueError(
            f"queries {list(asked)} of {input_ids.shape[-1]} tokens: patterns show from the third token on; give "
            "longer texts or later queries."
        )
    return _summed(model, input_ids, pattern_scores, len(input_ids) * len(late), queries=late, **choices)


def repeated_tokens(
    vocabulary: Sequence[int], length: int, repeats: int, batch_size: int, first: int | None, seed: int
) -> torch.Tensor:
    """Random different tokens said `repeats` times over, behind `first` if given: (B, length repeats (+ 1))."""
    if len(vocabulary) < length:
        raise ValueError(f"length={length}: the vocabulary has {len(vocabulary)} tokens to draw from; choose fewer.")
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(vocabulary), generator=generator)[:length] for _ in range(batch_size)]
    rows = torch.tensor(list(vocabulary))[torch.stack(drawn)].repeat(1, repeats)
    return rows if first is None else torch.cat([torch.full((batch_size, 1), first), rows], dim=1)


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
    Prefix matching: mean attention from a token to those that followed it before, on repeated random tokens.

    25 tokens four times over, as in arXiv:2209.11895. `vocabulary` is what tokens are drawn from (the whole one by
    default), `first` stands before them, as a bos. Raises ValueError for repeats below 2.
    """
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: induction shows from the second time on; choose at least 2.")
    config: Any = model.config
    vocabulary = range(config.vocab_size) if vocabulary is None else vocabulary
    input_ids = repeated_tokens(vocabulary, length, repeats, batch_size, first, seed)
    start = input_ids.shape[1] - length * repeats
    queries = range(start + length, input_ids.shape[1])

    def followers(weights: torch.Tensor, asked: torch.Tensor) -> dict[str, torch.Tensor]:
        keys = torch.arange(weights.shape[-1], device=asked.device)
        back = asked[:, None] - keys  # (Q, S)
        follows = (back >= 0) & ((back + 1) % length == 0) & (keys > start)
        return {"induction": (weights * follows).sum((0, 2, 3))}

    return _summed(model, input_ids, followers, batch_size * len(queries), queries=queries)


def score_retrieval(model: Any, prompts: Sequence[RetrievalPrompt]) -> dict[Key, dict[str, float]]:
    """
    Share of a needle's tokens that a head copies, mean over prompts (arXiv:2404.15574, section 2).

    The model goes on greedily for as many tokens as the needle has. A head copies a token where what is generated is
    in the needle and the head attends, most of all, to a needle token equal to it.
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
            said = output[0, maps.queries + 1]  # (Q,)
            for name, kind in map_kinds(maps).items():
                places = weights_of(maps, kind)[0].argmax(-1)  # (H, Q)
                hits = (places >= first) & (places < last) & (output[0, places] == said)
                for head, row in zip(maps.heads.tolist(), hits, strict=True):
                    copied.setdefault((maps.layer, head, name), set()).update(said[row].tolist())

        visit_maps(model, output, look, queries=queries)
        for key, tokens in copied.items():
            totals[key] = totals.get(key, 0.0) + len(tokens & needle) / len(needle)
    return {key: {"retrieval": total / len(prompts)} for key, total in totals.items()}


@torch.no_grad()
def greedy(model: Any, input_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The prompt (1, T) and `num_tokens` greedy ones after it, an end of text among them or not."""
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
    """What several functions found, one entry a map, by layer, head and map."""
    together: dict[Key, dict[str, float]] = {}
    for scores in measured:
        for key, values in scores.items():
            together.setdefault(key, {}).update(values)
    return [HeadScore(layer, head, name, **values) for (layer, head, name), values in sorted(together.items())]


def score_heads(
    model: Any,
    input_ids: torch.Tensor,
    prompts: Sequence[RetrievalPrompt] = (),
    *,
    vocabulary: Sequence[int] | None = None,
    first: int | None = None,
    seed: int = 0,
) -> list[HeadScore]:
    """Every score of every map: patterns on texts (B, T), induction, and retrieval where prompts are given."""
    length = min(25, (model.config.max_position_embeddings - 1) // 4)
    measured = [
        score_patterns(model, input_ids),
        score_induction(model, vocabulary=vocabulary, length=length, first=first, seed=seed),
    ]
    return joined_scores(*measured, *([score_retrieval(model, prompts)] if prompts else []))


def _summed(
    model: nn.Module,
    input_ids: torch.Tensor,
    measure: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]],
    count: int,
    **choices: Any,
) -> dict[Key, dict[str, float]]:
    """What `measure` finds in each block of each map, added up and divided by `count`."""
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


def score_grid(scores: Sequence[HeadScore], name: str, map_name: str | None = None) -> torch.Tensor:
    """One score as (layers, heads), of one kind of map (LLaMA's own where a layer has no other), NaN where none is."""
    wanted = [score for score in scores if map_name is None or score.map in (map_name, "attention")]
    if name not in SCORES or not wanted:
        raise ValueError(
            f"name={name!r}, map_name={map_name!r}: scores are {', '.join(SCORES)}, of maps that were read."
        )
    size = (max(score.layer for score in scores) + 1, max(score.head for score in wanted) + 1)
    grid = torch.full(size, torch.nan)
    for score in wanted:
        value = getattr(score, name)
        grid[score.layer, score.head] = torch.nan if value is None else value
    return grid


def score_table(scores: Sequence[HeadScore], title: str = "Heads", sort_by: str | None = None, rows: int = 0) -> Table:
    """A rich table; by `sort_by`, largest first, at most `rows` of them if given."""
    if sort_by is not None:
        scores = sorted(scores, key=lambda score: getattr(score, sort_by) or 0.0, reverse=True)
    table = Table(title=title, title_justify="left")
    for column in ("layer", "head", "map", *SCORES):
        table.add_column(column.replace("_", " "), justify="left" if column == "map" else "right")
    for score in list(scores)[: rows or None]:
        values = (getattr(score, name) for name in SCORES)
        cells = ("-" if value is None else f"{value:.3f}" for value in values)
        table.add_row(str(score.layer), str(score.head), score.map, *cells)
    return table


def write_scores(scores: Sequence[HeadScore], path: str | Path) -> None:
    """JSON: a list of objects, one a map."""
    Path(path).write_text(json.dumps([asdict(score) for score in scores], indent=1) + "\n", encoding="utf-8")
