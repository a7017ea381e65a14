"""
One self-contained HTML page to look at attention with: no server, no network, opens from disk.

B batch (1 here), H heads, M maps of a head (2 where the layer subtracts, else 1), T shown tokens.
"""

import base64
import html
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from .maps import AttentionLayer, Heads, LayerMaps, attention_layers, visit_maps


TEMPLATES = Path(__file__).parent / "templates"
PARTS = {"STYLE": "view.css", "NUMBERS": "view_numbers.js", "VIEW": "view.js", "PAGE": "view_page.js"}
MAX_TOKENS = 512
MAX_BYTES = 32_000_000
QUANTISATION = (
    "Maps are stored as 8 bits a weight, round(255 sqrt(w)): a weight w shown is within sqrt(w)/255 of the model's, "
    "0.002 at 0.25, and below 0.000004 it is 0. lambda is float32. Differences and means are computed in the page "
    "from these numbers."
)


@dataclass(frozen=True)
class StoredLayer:
    """One layer's maps as the page gets them: `quantise`d, the lower triangle row by row."""

    layer: int
    heads: list[int]
    is_differential: bool
    maps: numpy.ndarray  # (H, M, T (T + 1) / 2) uint8
    outside: numpy.ndarray  # (H, M, T) uint8, weight on tokens before the first shown
    diff_lambda: numpy.ndarray | None  # (H, T) float32


@dataclass(frozen=True)
class AttentionView:
    """One model's attention over one text, ready to be written."""

    name: str
    tokens: list[str]
    start: int  # position of the first shown token
    num_tokens: int  # of the whole text
    layers: list[StoredLayer]
    left_out: list[str] = field(default_factory=list)


def quantise(weights: torch.Tensor) -> numpy.ndarray:
    """Weights in [0, 1] as uint8, round(255 sqrt(w))."""
    return (255 * weights.clamp(0, 1).sqrt()).round().to(torch.uint8).cpu().numpy()


def view_attention(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: Sequence[str],
    name: str,
    *,
    layers: Sequence[int] | None = None,
    heads: Heads | None = None,
    start: int | None = None,
    max_tokens: int = MAX_TOKENS,
    max_bytes: int = MAX_BYTES,
) -> AttentionView:
    """
    Collects the maps of one text (1, T) for a page; `labels` are its tokens as text.

    At most `max_tokens` are shown, from position `start` on (by default the last ones): the model still reads them
    all. Evenly spaced layers, then heads, are kept where all would be more than `max_bytes`. What was left out is
    listed in the view, and in the page. Raises ValueError as `visit_maps` does, and for more than one text.
    """
    if input_ids.dim() != 2 or len(input_ids) != 1 or len(labels) != input_ids.shape[1]:
        raise ValueError(f"input_ids of shape {tuple(input_ids.shape)} with {len(labels)} labels: give one text.")
    num_tokens = len(labels)
    if max_tokens < 1 or (start is not None and not 0 <= start < num_tokens):
        raise ValueError(f"start={start}, max_tokens={max_tokens}: show at least one of the {num_tokens} tokens.")
    start = max(0, num_tokens - max_tokens) if start is None else start
    shown = range(start, min(num_tokens, start + max_tokens))
    left_out = _token_note(shown, num_tokens, max_tokens)
    kept, notes = _fit(_chosen(model, layers, heads), len(shown), max_bytes)
    stored: dict[int, StoredLayer] = {}

    def store(maps: LayerMaps) -> None:
        if maps.layer not in stored:
            stored[maps.layer] = _empty(maps, len(shown))
        _store_rows(stored[maps.layer], maps, start)

    visit_maps(model, input_ids, store, heads=kept, queries=shown, block=64)
    ordered = [stored[layer] for layer in sorted(stored)]
    return AttentionView(name, [labels[p] for p in shown], start, num_tokens, ordered, left_out + notes)


def _chosen(
    model: nn.Module, layers: Sequence[int] | None, heads: Heads | None
) -> dict[int, tuple[AttentionLayer, list[int]]]:
    """The chosen heads of each chosen layer; what is out of range is left for `visit_maps` to name."""
    known = {layer.index: layer for layer in attention_layers(model)}
    wanted = (heads if isinstance(heads, Mapping) else known) if layers is None else layers
    if not wanted or any(index not in known for index in wanted):
        raise ValueError(f"layers={list(wanted)}: there are {len(known)} layers, counted from 0; choose among them.")
    of_layer = {index: heads.get(index) if isinstance(heads, Mapping) else heads for index in wanted}
    return {
        index: (known[index], list(range(known[index].num_heads)) if chosen is None else list(chosen))
        for index, chosen in of_layer.items()
    }


def _token_note(shown: range, num_tokens: int, max_tokens: int) -> list[str]:
    if len(shown) == num_tokens:
        return []
    return [
        f"{num_tokens - len(shown)} of {num_tokens} tokens: shown are {shown.start} to {shown.stop - 1}, as a page "
        f"holds {max_tokens} (max_tokens). The model read them all; attention to tokens before the first shown is "
        "counted as outside."
    ]


def _fit(
    chosen: dict[int, tuple[AttentionLayer, list[int]]], num_shown: int, max_bytes: int
) -> tuple[dict[int, list[int]], list[str]]:
    """Evenly spaced layers, then evenly spaced heads of them, whose maps fit; and what had to go."""
    map_bytes = num_shown * (num_shown + 1) // 2

    def size(layers: Sequence[int], num_heads: int) -> int:
        return sum(min(num_heads, len(chosen[i][1])) * (1 + chosen[i][0].is_differential) for i in layers) * map_bytes

    layers, num_heads = list(chosen), max(len(heads) for _, heads in chosen.values())
    while len(layers) > 1 and size(layers, num_heads) > max_bytes:
        layers = _spread(list(chosen), len(layers) - 1)
    while num_heads > 1 and size(layers, num_heads) > max_bytes:
        num_heads -= 1
    notes = []
    limit = f"as a page holds {max_bytes / 1e6:g} MB of maps (max_bytes)"
    if dropped := [layer for layer in chosen if layer not in layers]:
        notes.append(f"Layers {', '.join(map(str, dropped))}: every few are kept, {limit}. Means are over those kept.")
    kept = {layer: _spread(chosen[layer][1], num_heads) for layer in layers}
    if any(len(kept[layer]) < len(chosen[layer][1]) for layer in layers):
        notes.append(f"All but {num_heads} heads of a layer, {limit}. Means are over those kept.")
    return kept, notes


def _spread(items: list[int], count: int) -> list[int]:
    """`count` of the items, evenly spaced, first and last among them; all if there are no more."""
    if count >= len(items):
        return items
    return [items[round(place)] for place in numpy.linspace(0, len(items) - 1, count)]


def _empty(maps: LayerMaps, num_shown: int) -> StoredLayer:
    num_heads, num_maps = len(maps.heads), 1 if maps.second is None else 2
    return StoredLayer(
        maps.layer,
        maps.heads.tolist(),
        maps.second is not None,
        numpy.zeros((num_heads, num_maps, num_shown * (num_shown + 1) // 2), numpy.uint8),
        numpy.zeros((num_heads, num_maps, num_shown), numpy.uint8),
        None if maps.diff_lambda is None else numpy.zeros((num_heads, num_shown), numpy.float32),
    )


def _store_rows(stored: StoredLayer, maps: LayerMaps, start: int) -> None:
    both = [maps.first] if maps.second is None else [maps.first, maps.second]
    weights = torch.stack([part[0] for part in both], dim=1)  # (H, M, Q, S)
    quantised, outside = quantise(weights), quantise(weights[..., :start].sum(-1))
    for row, position in enumerate(maps.queries.tolist()):
        place = position - start
        first = place * (place + 1) // 2
        stored.maps[:, :, first : first + place + 1] = quantised[:, :, row, start : position + 1]
        stored.outside[:, :, place] = outside[:, :, row]
        if stored.diff_lambda is not None:
            stored.diff_lambda[:, place] = maps.diff_lambda[0, :, row, 0].float().cpu().numpy()


def write_html(
    views: Sequence[AttentionView], path: str | Path, title: str = "Attention", mark: tuple[int, int] | None = None
) -> Path:
    """
    Writes one page with one model, or two side by side.

    `mark` is a span of shown tokens (first, last), counted within the page, whose share of attention is shown from
    the start. Raises ValueError for no view, or more than two.
    """
    if not 1 <= len(views) <= 2:
        raise ValueError(f"{len(views)} views: a page shows one model, or two side by side.")
    if mark is not None and not 0 <= mark[0] <= mark[1] < min(len(view.tokens) for view in views):
        raise ValueError(f"mark={mark}: first and last shown token, counted from 0.")
    payload = {
        "quantisation": QUANTISATION,
        "mark": mark,
        "models": [_payload(view) for view in views],
    }
    data = json.dumps(payload, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (TEMPLATES / "view.html").read_text(encoding="utf-8")
    texts = {place: (TEMPLATES / name).read_text(encoding="utf-8") for place, name in PARTS.items()}
    parts = texts | {"TITLE": html.escape(title), "DATA": data}
    pieces = page.split("@@")  # text, place, text, place, ..., text: what is put in is not looked at again
    pieces[1::2] = [parts[place] for place in pieces[1::2]]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(pieces), encoding="utf-8")
    return path


def _payload(view: AttentionView) -> dict[str, Any]:
    return {
        "name": view.name,
        "tokens": view.tokens,
        "start": view.start,
        "numTokens": view.num_tokens,
        "leftOut": view.left_out,
        "layers": [
            {
                "layer": layer.layer,
                "heads": layer.heads,
                "differential": layer.is_differential,
                "maps": _packed(layer.maps),
                "outside": _packed(layer.outside),
                "lambda": None if layer.diff_lambda is None else _packed(layer.diff_lambda.astype("<f4")),
            }
            for layer in view.layers
        ],
    }


def _packed(array: numpy.ndarray) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 6)).decode()
