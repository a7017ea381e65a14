"""
One self-contained HTML page that shows attention: no server, no network, opens from disk.

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
QUANTIZATION = (
    "Maps are stored as 8 bits per weight, round(255 sqrt(w)): a weight w shown is within sqrt(w)/255 of the model's, "
    "0.002 at 0.25, and below 0.000004 it is 0. lambda is float32. Differences and means are computed in the page "
    "from these numbers."
)


@dataclass(frozen=True)
class StoredLayer:
    """
    One layer's maps as the page gets them.

    Attributes:
        layer: The layer, from 0.
        heads: The heads, H of them.
        is_differential: Whether a head has two maps.
        maps: The lower triangles of `quantize`d maps row by row, (H, M, T (T + 1) / 2), uint8.
        outside: `quantize`d weights on tokens before the first shown, (H, M, T), uint8.
        diff_lambda: lambda, (H, T), float32; None where the layer subtracts nothing.
    """

    layer: int
    heads: list[int]
    is_differential: bool
    maps: numpy.ndarray
    outside: numpy.ndarray
    diff_lambda: numpy.ndarray | None


@dataclass(frozen=True)
class AttentionView:
    """
    One model's attention over one text, for `write_html`.

    Attributes:
        name: Name of the model.
        tokens: The shown tokens as text.
        start: Position of the first of them.
        num_tokens: Tokens of the whole text.
        layers: The shown layers.
        left_out: Notes on what is not shown.
    """

    name: str
    tokens: list[str]
    start: int
    num_tokens: int
    layers: list[StoredLayer]
    left_out: list[str] = field(default_factory=list)


def quantize(weights: torch.Tensor) -> numpy.ndarray:
    """Returns weights in [0, 1] as uint8, round(255 sqrt(w))."""
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
    Collects the maps of one text for a page. What does not fit is listed in the view and in the page.

    Args:
        model: A LLaMA-like or differential model.
        input_ids: One text, (1, T). The model reads all of it.
        labels: Its tokens as text.
        name: Name of the model.
        layers: The layers. Defaults to all.
        heads: The heads of every layer, or a mapping from layer to its heads. Defaults to all.
        start: Position of the first token to show. Defaults to showing the last tokens.
        max_tokens: The largest number of tokens to show.
        max_bytes: The largest size of all maps, in bytes. Above it, evenly spaced layers are kept, then heads.

    Returns:
        The view.

    Raises:
        ValueError: There is more than one text, or `visit_maps` refuses an argument.
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
    """Returns the chosen heads of each chosen layer; `visit_maps` names those that are out of range."""
    known = {layer.index: layer for layer in attention_layers(model)}
    if layers is not None:
        wanted = list(layers)
    elif isinstance(heads, Mapping):
        wanted = list(heads)
    else:
        wanted = list(known)
    if not wanted or any(index not in known for index in wanted):
        raise ValueError(f"layers={wanted}: there are {len(known)} layers, counted from 0; choose among them.")
    of_layer = {index: heads.get(index) if isinstance(heads, Mapping) else heads for index in wanted}
    return {
        index: (known[index], list(known[index].heads_with_maps if chosen is None else chosen))
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
    """Keeps evenly spaced layers, then evenly spaced heads of them, whose maps fit; notes what was left out."""
    map_bytes = num_shown * (num_shown + 1) // 2

    def size(layers: Sequence[int], num_heads: int) -> int:
        return sum(min(num_heads, len(chosen[i][1])) * (1 + chosen[i][0].is_differential) for i in layers) * map_bytes

    layers = list(chosen)
    num_heads = max(len(heads) for _, heads in chosen.values())
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
        notes.append(f"All but {num_heads} heads per layer, {limit}. Means are over those kept.")
    return kept, notes


def _spread(items: list[int], count: int) -> list[int]:
    """Returns `count` of the items, evenly spaced, with the first and the last; all if there are no more."""
    if count >= len(items):
        return items
    return [items[round(index)] for index in numpy.linspace(0, len(items) - 1, count)]


def _empty(maps: LayerMaps, num_shown: int) -> StoredLayer:
    num_heads = len(maps.heads)
    num_maps = 1 if maps.negative is None else 2
    return StoredLayer(
        layer=maps.layer,
        heads=maps.heads.tolist(),
        is_differential=maps.negative is not None,
        maps=numpy.zeros((num_heads, num_maps, num_shown * (num_shown + 1) // 2), numpy.uint8),
        outside=numpy.zeros((num_heads, num_maps, num_shown), numpy.uint8),
        diff_lambda=None if maps.diff_lambda is None else numpy.zeros((num_heads, num_shown), numpy.float32),
    )


def _store_rows(stored: StoredLayer, maps: LayerMaps, start: int) -> None:
    pair = [maps.positive] if maps.negative is None else [maps.positive, maps.negative]
    weights = torch.stack([part[0] for part in pair], dim=1)  # (H, M, Q, S)
    quantized = quantize(weights)
    outside = quantize(weights[..., :start].sum(-1))
    for query, position in enumerate(maps.queries.tolist()):
        row = position - start  # of the page
        first = row * (row + 1) // 2
        stored.maps[:, :, first : first + row + 1] = quantized[:, :, query, start : position + 1]
        stored.outside[:, :, row] = outside[:, :, query]
        if stored.diff_lambda is not None:
            stored.diff_lambda[:, row] = maps.diff_lambda[0, :, query, 0].float().cpu().numpy()


def write_html(
    views: Sequence[AttentionView], path: str | Path, title: str = "Attention", mark: tuple[int, int] | None = None
) -> Path:
    """
    Writes one page with one model, or two side by side.

    Args:
        views: One or two views.
        path: The file to write. Missing folders are created.
        title: Title of the page.
        mark: First and last token of a marked span, counted from the first shown, whose share of attention the page
            shows when it opens.

    Returns:
        The path.

    Raises:
        ValueError: There is no view or more than two, or the mark is out of range.
    """
    if not 1 <= len(views) <= 2:
        raise ValueError(f"{len(views)} views: a page shows one model, or two side by side.")
    if mark is not None and not 0 <= mark[0] <= mark[1] < min(len(view.tokens) for view in views):
        raise ValueError(f"mark={mark}: first and last shown token, counted from 0.")
    payload = {
        "quantization": QUANTIZATION,
        "mark": mark,
        "models": [_payload(view) for view in views],
    }
    data = json.dumps(payload, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (TEMPLATES / "view.html").read_text(encoding="utf-8")
    parts = {name: (TEMPLATES / file).read_text(encoding="utf-8") for name, file in PARTS.items()}
    parts |= {"TITLE": html.escape(title), "DATA": data}
    pieces = page.split("@@")  # text, name, text, name, ..., text: what is inserted is not searched for names
    pieces[1::2] = [parts[name] for name in pieces[1::2]]
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
