"""
All measurements of the report, of one model, as plain numbers.

B batch, T tokens, S keys.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .attention_mass import REGIONS, AttentionMass, measure_attention, token_regions, views_of
from .head_scores import needle_retrieval, score_heads
from .maps import LayerMaps, attention_layers, visit_maps
from .needle_runs import NeedleGrid, answer_prompts, run_grid
from .needles import CITIES, NeedlePrompt, NeedleTask, Template, count_tokens, make_prompts, score
from .order import OrderTask, measure_order, measure_shots
from .outliers import Magnitudes, mean_loss, measure_outliers, quantized_scores


@dataclass(frozen=True)
class Effort:
    """
    How much is measured.

    Attributes:
        lengths_tokens: Lengths of needle prompts, in tokens; they must fit the context of every model.
        depths: Depths of the asked needles, 0 to 1.
        counts: Pairs of (needles, asked).
        samples: Prompts per cell of the needle grid.
        attention_samples: Prompts per depth for attention to the answer.
        attention_needles: Needles in each of these.
        text_rows: Texts for outliers and loss.
        bits: Bits of quantized attention logits.
        quantized_prompts: Prompts for the accuracy with each of these.
        head_rows: Texts for scores of heads.
        head_prompts: Prompts for retrieval scores of heads.
        shots: Numbers of demonstrations; they must fit the context of every model.
        sets: Sets of demonstrations.
        orders: Orders per set.
        batch_size: Prompts per batch.
        seed: Seed of everything that is drawn.
    """

    lengths_tokens: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    counts: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (4, 2), (6, 2))
    samples: int = 6
    attention_samples: int = 4
    attention_needles: int = 4
    text_rows: int = 12
    bits: tuple[int, ...] = (8, 6, 4)
    quantized_prompts: int = 24
    head_rows: int = 4
    head_prompts: int = 8
    shots: tuple[int, ...] = (8, 16, 24)
    sets: int = 4
    orders: int = 6
    batch_size: int = 8
    seed: int = 0

    def grid(self) -> NeedleGrid:
        """Returns the grid of needle retrieval."""
        return NeedleGrid(
            lengths_tokens=self.lengths_tokens,
            depths=self.depths,
            counts=self.counts,
            samples=self.samples,
            seed=self.seed,
        )


def default_effort(context: int, tokenizer: Any, **overrides: Any) -> Effort:
    """
    Chooses how much to measure: lengths of 3/8, 5/8 and nine tenths of the context, and as many shots as fit.

    Args:
        context: The shortest context of the models, in tokens; at most 4096 are used.
        tokenizer: The models' tokenizer.
        overrides: Fields of `Effort`.

    Returns:
        The effort.

    Raises:
        ValueError: Six needles do not fit the context.
    """
    context = min(context, 4096)
    lengths = tuple(context * share // 32 for share in (12, 20, 29))
    fact = max(count_tokens(tokenizer, Template().fact.format(city=city, number=1234)) for city in CITIES)
    if "lengths_tokens" not in overrides and 7 * fact > lengths[0]:
        raise ValueError(f"context of {context} tokens: six needles do not fit its shortest prompt of {lengths[0]}")
    line = count_tokens(tokenizer, OrderTask(8).demonstration.format(word="Copenhagen", label=1234))
    shots = tuple(count for count in (8, 16, 24, 32, 48, 64) if (count + 2) * line <= context) or (4,)
    return Effort(**({"lengths_tokens": lengths, "shots": shots[-4:]} | overrides))


def text_rows(tokenizer: Any, text: str, num_tokens: int, count: int) -> torch.Tensor:
    """Cuts a text into `count` sequences of token ids (B, T), each beginning with the tokenizer's bos, if any."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = num_tokens - len(bos)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    rows = [bos + ids[start : start + step] for start in range(0, len(ids) - step + 1, step)][:count]
    if not rows:
        raise ValueError(f"text: {len(ids)} tokens, fewer than one row of {num_tokens}; give a longer text")
    return torch.tensor(rows)


def kind_of(model: Any) -> str:
    """Returns "LLaMA", "DIFF V1" or "DIFF V2"."""
    variant = getattr(model.config, "variant", None)
    return f"DIFF {variant.upper()}" if variant in ("v1", "v2") else "LLaMA"


def measure_model(
    model: Any, tokenizer: Any, text: str, effort: Effort, *, label: str, needle_file: Path | None = None
) -> Iterator[tuple[str, Any]]:
    """
    Measures one model for the report.

    Args:
        model: A LLaMA-like or differential causal language model.
        tokenizer: Its fast tokenizer.
        text: The text to measure on and to place needles in.
        effort: How much to measure.
        label: Name of the model.
        needle_file: A file for finished cells of the needle grid, see `run_grid`.

    Yields:
        (section, numbers) as soon as they are measured: needles, attention, profile, heads, outliers, quantized,
        order.

    Raises:
        ValueError: The model's maps are not known, or a prompt does not fit.
    """
    attention_layers(model)
    grid = effort.grid()
    cells = run_grid(model, tokenizer, text, grid, batch_size=effort.batch_size, path=needle_file, label=label)
    yield "needles", [asdict(cell) for cell in cells]
    yield "attention", _attention(model, tokenizer, text, effort=effort)
    yield "profile", attention_profile(model, tokenizer, _attention_prompts(tokenizer, text, effort, depth=0.5)[0])
    input_ids = text_rows(tokenizer, text, num_tokens=max(effort.lengths_tokens), count=effort.text_rows)
    yield "heads", _heads(model, tokenizer, text, input_ids=input_ids, effort=effort)
    outliers = measure_outliers(model, input_ids)
    yield "outliers", {name: _magnitudes(getattr(outliers, name)) for name in ("attention_logits", "hidden_states")}
    yield "quantized", list(_quantized(model, tokenizer, text, input_ids=input_ids, effort=effort))
    yield "order", list(_orders(model, tokenizer, effort))


def _attention_prompts(tokenizer: Any, text: str, effort: Effort, *, depth: float) -> list[NeedlePrompt]:
    task = NeedleTask(max(effort.lengths_tokens), depth, needles=effort.attention_needles)
    return make_prompts(task, tokenizer, text, count=effort.attention_samples, seed=effort.seed)


def _attention(model: Any, tokenizer: Any, text: str, *, effort: Effort) -> list[dict[str, Any]]:
    """Returns for each depth and view the share of each region and, for the answer, of each layer."""
    rows = []
    for depth in effort.depths:
        prompts = _attention_prompts(tokenizer, text, effort, depth=depth)
        mass: AttentionMass = measure_attention(model, tokenizer, prompts)
        for view, by_layer in mass.by_layer.items():
            shares = {region: mass.share(view, region) for region in REGIONS}
            shares["noise"] = mass.noise(view)
            rows.append({"depth": depth, "view": view, **shares, "answer_by_layer": by_layer[:, 0].tolist()})
    return rows


def attention_profile(model: Any, tokenizer: Any, prompt: NeedlePrompt) -> dict[str, Any]:
    """Measures the attention to every token of one prompt where the answer's first digit is predicted, (S,) per view,
    as a mean over heads and layers; with the tokens' regions."""
    text = f"{prompt.text} {prompt.asked[0].number[0]}"
    ids, regions = token_regions(tokenizer, prompt, text)
    profile: dict[str, list[torch.Tensor]] = {}

    def visit(maps: LayerMaps) -> None:
        for view, weights in views_of(maps).items():
            profile.setdefault(view, []).append(weights.double().mean((0, 1, 2)).cpu())

    visit_maps(model, torch.tensor([ids[:-1]], device=model.device), visit, queries=[len(ids) - 2])
    kept = {view: torch.stack(layers).mean(0).tolist() for view, layers in profile.items()}
    return {"regions": regions[:-1].tolist(), "views": kept}


def _heads(model: Any, tokenizer: Any, text: str, *, input_ids: torch.Tensor, effort: Effort) -> list[dict[str, Any]]:
    """Measures every score of every map of every head; retrieval is that of one needle's number."""
    task = NeedleTask(max(effort.lengths_tokens))
    prompts = make_prompts(task, tokenizer, text, count=effort.head_prompts, seed=effort.seed)
    special = set(tokenizer.all_special_ids)
    scores = score_heads(
        model,
        input_ids[: effort.head_rows],
        needle_retrieval(tokenizer, prompts),
        vocabulary=[i for i in range(min(len(tokenizer), model.config.vocab_size)) if i not in special],
        first=tokenizer.bos_token_id,
        seed=effort.seed,
    )
    return [asdict(score) for score in scores]


def _magnitudes(found: Magnitudes) -> dict[str, float]:
    ranks = {f"top_{rank}": found.top(rank) for rank in (1, 2, 3, 10, 100)}
    return {**ranks, "median": found.median(), "count": found.count}


def _quantized(
    model: Any, tokenizer: Any, text: str, *, input_ids: torch.Tensor, effort: Effort
) -> Iterator[dict[str, float | None]]:
    """Measures loss on text and needle accuracy, at full precision (bits None) and with quantized attention logits."""
    task = NeedleTask(max(effort.lengths_tokens))
    prompts = make_prompts(task, tokenizer, text, count=effort.quantized_prompts, seed=effort.seed)

    def measure(bits: int | None) -> dict[str, float | None]:
        answers = answer_prompts(model, tokenizer, prompts, batch_size=effort.batch_size)
        right = sum(score(given, prompt.asked) for given, prompt in zip(answers, prompts, strict=True))
        return {"bits": bits, "loss": mean_loss(model, input_ids), "accuracy": right / len(prompts)}

    yield measure(None)
    for bits in effort.bits:
        with quantized_scores(model, bits):
            yield measure(bits)


def _orders(model: Any, tokenizer: Any, effort: Effort) -> Iterator[dict[str, Any]]:
    """Measures random orders for each number of shots, and orders that alternate labels for the largest."""
    task = OrderTask(effort.shots[-1], orders=effort.orders, sets=effort.sets, seed=effort.seed)
    random_orders = measure_shots(model, tokenizer, task, effort.shots)
    for result in (*random_orders, measure_order(model, tokenizer, replace(task, arrangement="alternate"))):
        numbers = {name: getattr(result, name) for name in ("accuracy", "spread", "std")}
        yield asdict(result) | numbers
