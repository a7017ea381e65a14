"""What a language model does on a set of texts, and how two models' doings compare.

B batch, T tokens, V vocabulary.
"""

import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from conversion.checkpoint.companions import read_tokenizer
from conversion.errors import ConversionError
from modeling_diff import DiffLlamaForCausalLM
from modeling_diff.analysis.tokens import token_fault
from modeling_diff.diff_transformers_compat import cache_argument


MAX_TOKENS = 128
MIN_TOKENS = 16
NEW_TOKENS = 16
# Prose, code, lists and recall: whatever a LLaMA was trained on, some of it is near.
TEXTS = (
    "The lighthouse keeper wrote down the weather every morning. On the third of May he noted a calm sea, light wind "
    "from the south-west and a sail on the horizon. In the evening the sail had not moved.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n\n"
    "def variance(values):\n    centre = mean(values)\n    return mean([(value - centre) ** 2 for value in values])\n",
    "Return the number of bytes written. If the file is closed, a ValueError is raised. The default encoding depends "
    "on the platform; pass it explicitly where the result has to be the same everywhere.",
    "Anna lives in Oslo. Boris lives in Lima. Chen lives in Perth. Dora lives in Kyiv. Anna lives in Oslo. "
    "Chen lives in",
    "Water boils at 100 degrees Celsius at sea level. On a mountain of 3000 metres it boils at about 90 degrees, "
    "because the pressure of the air is lower there.",
    "import json\n\nwith open('settings.json') as file:\n    settings = json.load(file)\nfor name, value in "
    "sorted(settings.items()):\n    print(f'{name}: {value}')\n",
)


@dataclass(frozen=True)
class Behavior:
    """Logits (T, V) in float32 and a greedy continuation, for each text."""

    logits: list[torch.Tensor]
    continuations: list[list[int]]


def encode_texts(folder: Path, vocab_size: int, max_positions: int, texts: Sequence[str] | None) -> list[torch.Tensor]:
    """Returns token ids (1, T) of each text; random ones, from a fixed seed, for a checkpoint without a tokenizer.

    Args:
        folder: The checkpoint.
        vocab_size: Number of tokens that the model knows.
        max_positions: Number of positions that it can read; longer texts are cut.
        texts: The texts; built-in ones if None.

    Raises:
        ConversionError: The tokenizer does not fit, or no text is two tokens long.
    """
    # No fewer than a few, whatever the config says: LLaMA does not mind positions beyond its longest.
    length = max(MIN_TOKENS, min(MAX_TOKENS, max_positions - NEW_TOKENS))
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(vocab_size, (1, min(length, 64)), generator=generator) for _ in TEXTS]
    encoded = (tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :length] for text in texts or TEXTS)
    inputs = [ids for ids in encoded if ids.shape[1] > 1]
    if not inputs:
        raise ConversionError("none of the texts is two tokens long, expected one at least; give longer texts")
    if fault := token_fault(torch.cat(inputs, dim=1), vocab_size):
        raise ConversionError(f"{folder}: its tokenizer gives {fault}")
    return inputs


@torch.no_grad()
def observe(model: Any, inputs: Sequence[torch.Tensor]) -> Behavior:
    """Runs the model on every input."""
    logits = []
    continuations = []
    for ids in inputs:
        logits.append(model(ids).logits[0].float())
        continuations += greedy_continuations(model, ids, NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return Behavior(logits, continuations)


def greedy_continuations(model: Any, ids: torch.Tensor, num_tokens: int, **settings: Any) -> list[list[int]]:
    """Returns the tokens that a model appends to each sequence, the most likely one each time.

    Args:
        model: A causal language model.
        ids: Token ids (B, T), without padding.
        num_tokens: Number of tokens to append at most.
        settings: Others of `generate`.
    """
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        **settings,
    )
    return generated[:, ids.shape[1] :].tolist()


@torch.no_grad()
def observe_logits(model: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns logits (T, V) of every input, in the model's own dtype."""
    return [model(ids).logits[0] for ids in inputs]


def compare_logits(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Returns the largest difference, infinite where only one is finite, and the largest logit; both over all inputs.

    Entries where both are NaN or infinite alike, as a model overflows in float16, count as equal.
    """
    differences = [0.0]
    scales = [0.0]
    for one, other in zip(expected, found, strict=True):
        finite = one.isfinite() & other.isfinite()
        same = torch.isclose(one, other, rtol=0, atol=0, equal_nan=True)
        differences.append((one.double() - other.double())[finite].abs().max().item() if finite.any() else 0.0)
        differences.append(0.0 if (finite | same).all() else float("inf"))
        scales.append(one.double()[finite].abs().max().item() if finite.any() else 0.0)
    return max(differences), max(scales)


def generation_agreement(original: Behavior, other: Behavior) -> float:
    """Returns the share of a greedy continuation up to the first difference, as errors add up when generating."""
    same = first_divergences(original.continuations, other.continuations)
    return sum(place / len(tokens) for place, tokens in zip(same, original.continuations, strict=True)) / len(same)


def first_divergences(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> list[int]:
    """Returns how many tokens two continuations of each prompt have alike before they part."""
    return [
        next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        for one, other in zip(first, second, strict=True)
    ]


def largest_difference(original: Behavior, other: Behavior) -> float:
    return max((p - q).abs().max().item() for p, q in zip(original.logits, other.logits, strict=True))


@torch.no_grad()
def cache_difference(model: Any, ids: torch.Tensor) -> float:
    """Returns the largest difference of logits between reading `ids` (1, T) at once and one by one with the cache."""
    whole = model(ids).logits[0].float()
    cache = DynamicCache(config=model.config)
    steps = []
    for step in ids[0]:
        output = model(step.view(1, 1), use_cache=True, **cache_argument(cache))
        steps.append(output.logits[0, -1].float())
    return (whole - torch.stack(steps)).abs().max().item()


def cacheable_length(config: Any) -> int:
    """Returns how many tokens LLaMA computes alike at once and one by one; fewer than 2 if there is no such length.

    Rotary frequencies that change with the length leave the keys before the change in the cache as they were. A
    bidirectional model (is_causal false) sees later tokens only if they are there.
    """
    if not getattr(config, "is_causal", True):
        return 0
    lengths = {
        "dynamic": config.max_position_embeddings - 1,  # at that length, frequencies grown before are kept
        "longrope": config.rope_parameters.get("original_max_position_embeddings", config.max_position_embeddings),
    }
    return lengths.get(config.rope_parameters["rope_type"], sys.maxsize)


@contextmanager
def shuffled_pairs(model: DiffLlamaForCausalLM):  # type: ignore[no-untyped-def]
    """Makes a deliberately wrong conversion, undone at the end: every o_proj reads its neighbor's slice, as if rows
    and columns had not moved together."""
    layers = [layer.self_attn for layer in model.model.layers]
    try:
        for attention in layers:
            attention.o_proj.weight.data = attention.o_proj.weight.data.roll(attention.map_dim, dims=1)
        yield
    finally:
        for attention in layers:
            attention.o_proj.weight.data = attention.o_proj.weight.data.roll(-attention.map_dim, dims=1)


def dead_parameters(model: DiffLlamaForCausalLM, ids: torch.Tensor) -> list[str]:
    """Returns names of tensors new to LLaMA, in V2 the doubled queries as well, whose gradient is zero throughout."""
    marks = ("diff_lambda", "sub_norm", "lambda_proj", *(("q_proj",) if model.config.variant == "v2" else ()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(mark in name for mark in marks))
    model(ids, labels=ids).loss.backward()
    live = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    dead = [name for name, p in model.named_parameters() if p.requires_grad and name not in live]
    model.zero_grad(set_to_none=True)
    return dead
