"""
How much attention goes to the answer, and how much to noise (arXiv:2410.05258, table 3).

B batch, H heads, Q queries, S keys, L layers, M regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .maps import LayerMaps, visit_maps
from .needles import NeedlePrompt


# What a key can belong to. `rest` is everything around the text: the first token, the question, the answer so far.
REGIONS = ("answer", "wording", "distractors", "text", "rest")


@dataclass(frozen=True)
class AttentionMass:
    """
    Attention on each region, as a mean over heads, the digits of the answer, and prompts.

    The views are `positive` and `negative` for A1 and A2 (LLaMA has only `positive`). Of the difference
    D = A1 - lambda A2, `clamped` is max(D, 0) and `absolute` is |D|, each divided by its sum per query; `signed` is D,
    whose sum per query is 1 - lambda.

    Attributes:
        by_layer: Shares by view, (L, M) each; NaN where a layer does not have the view.
    """

    by_layer: dict[str, torch.Tensor]

    def share(self, view: str, region: str) -> float:
        """Returns the mean over layers, leaving out layers without the view (LLaMA's in a mixed model)."""
        return self.by_layer[view][:, REGIONS.index(region)].nanmean().item()

    def answer(self, view: str) -> float:
        """Returns the share on the digits of the number asked for."""
        return self.share(view, "answer")

    def noise(self, view: str) -> float:
        """Returns the share on the text and on other cities' needles."""
        return self.share(view, "text") + self.share(view, "distractors")


def token_regions(tokenizer: Any, prompt: NeedlePrompt, text: str) -> tuple[list[int], torch.Tensor]:
    """
    Tokenizes a text and finds the region of the prompt that each token lies in.

    Args:
        tokenizer: The checkpoint's fast tokenizer.
        prompt: The prompt, whose first asked needle is the answer.
        text: Text that begins with the prompt's.

    Returns:
        Token ids, and their regions as indices of REGIONS, (S,).

    Raises:
        ValueError: The tokenizer is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: {type(tokenizer).__name__} does not tell where tokens stand; load the fast one")
    asked = prompt.asked[0]
    spans = [("text", prompt.body)]
    spans += [("distractors", needle.span) for needle in prompt.needles if needle is not asked]
    spans += [("wording", asked.span), ("answer", asked.number_span)]
    chars = [REGIONS.index("rest")] * len(text)
    for region, (start, end) in spans:
        chars[start:end] = [REGIONS.index(region)] * (end - start)
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    # A token that reaches into two regions counts for the first of REGIONS.
    regions = [min(chars[start:end], default=REGIONS.index("rest")) for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], torch.tensor(regions)


def views_of(maps: LayerMaps) -> dict[str, torch.Tensor]:
    """
    Returns a layer's maps in each view, (B, H, Q, S) each.

    Args:
        maps: The layer's maps; where it subtracts nothing, "positive" is the one view.
    """
    if maps.negative is None:
        return {"positive": maps.positive}
    difference = maps.difference()
    clamped = difference.clamp_min(0)
    absolute = difference.abs()
    tiny = torch.finfo(difference.dtype).tiny
    return {
        "positive": maps.positive,
        "negative": maps.negative,
        "clamped": clamped / clamped.sum(-1, keepdim=True).clamp_min(tiny),
        "absolute": absolute / absolute.sum(-1, keepdim=True).clamp_min(tiny),
        "signed": difference,
    }


def region_shares(weights: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """
    Sums weights over the keys of each region, and averages over everything else.

    Args:
        weights: Weights of the maps, (B, H, Q, S).
        regions: Region of each key as an index of REGIONS, (S,).

    Returns:
        One share for each of REGIONS, (M,), in float64.
    """
    by_key = weights.double().mean((0, 1, 2))
    return by_key.new_zeros(len(REGIONS)).index_add_(0, regions.to(by_key.device), by_key)


def measure_attention(model: Any, tokenizer: Any, prompts: Sequence[NeedlePrompt]) -> AttentionMass:
    """
    Measures attention where each digit of the first asked number is predicted, given the right digits before it.

    Args:
        model: A LLaMA-like or differential causal language model.
        tokenizer: Its fast tokenizer.
        prompts: Prompts of `make_prompts`.

    Returns:
        Shares of attention by view, layer and region.

    Raises:
        ValueError: The tokenizer is a slow one, or the model's maps are not known.
    """
    sums: dict[str, dict[int, torch.Tensor]] = {}
    for prompt in prompts:
        text = f"{prompt.text} {prompt.asked[0].number}"
        ids, regions = token_regions(tokenizer, prompt, text)
        offsets = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        digits = [i for i, (_, end) in enumerate(offsets) if end > len(prompt.text) + 1]

        def visit(maps: LayerMaps, regions: torch.Tensor = regions) -> None:
            for view, weights in views_of(maps).items():
                layers = sums.setdefault(view, {})
                layers[maps.layer] = layers.get(maps.layer, 0) + region_shares(weights, regions) / len(prompts)

        queries = [digit - 1 for digit in digits]
        visit_maps(model, torch.tensor([ids], device=model.device), visit, queries=queries, block=len(queries))
    num_layers = 1 + max(layer for layers in sums.values() for layer in layers)
    missing = torch.full((len(REGIONS),), torch.nan, dtype=torch.float64)
    return AttentionMass(
        {view: torch.stack([layers.get(i, missing).cpu() for i in range(num_layers)]) for view, layers in sums.items()}
    )
