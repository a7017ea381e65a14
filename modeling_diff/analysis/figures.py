"""
Attention and head scores as figures, PNG or SVG, through matplotlib (the extra `viz`).

H heads, Q queries, S keys.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm, LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure

from .aggregate import MAP_KINDS, MapKind, weights_of
from .maps import LayerMaps


POSITIVE = LinearSegmentedColormap.from_list("positive", ["#ffffff", "#bed7f0", "#4285c8", "#08306b"])
NEGATIVE = LinearSegmentedColormap.from_list("negative", ["#ffffff", "#fdd0a2", "#e66214", "#7a2404"])
DIFFERENCE = LinearSegmentedColormap.from_list(
    "difference", ["#7a2404", "#e66214", "#fdd0a2", "#ffffff", "#bed7f0", "#4285c8", "#08306b"]
)
COLOURS = {"positive": POSITIVE, "negative": NEGATIVE, "difference": DIFFERENCE}
MASKED = "#eceef1"
SIGNED_ROOT = (lambda x: numpy.sign(x) * numpy.sqrt(numpy.abs(x)), lambda x: numpy.sign(x) * numpy.square(x))
LABELLED_TOKENS = 48  # more would not be legible
KIND_LABELS = {"positive": "A1", "negative": "A2", "difference": "A1 - lambda A2"}


def draw_map(
    axes: Axes,
    weights: torch.Tensor,
    labels: Sequence[str] | None = None,
    kind: MapKind = "positive",
    title: str = "",
    top: float | None = None,
) -> Any:
    """
    One map (Q, S) of the last Q of S tokens; colours are full at `top`, by default `full_colour`.

    The difference's scale is symmetrical, zero is white, and keys after a query are grey. Tokens are written out up
    to 48. Returns the image, for a colour bar.
    """
    num_queries, num_keys = weights.shape
    if labels is not None and len(labels) != num_keys:
        raise ValueError(f"{len(labels)} labels for {num_keys} keys: give one a token.")
    values = weights.detach().float().cpu()
    top = full_colour(values) if top is None else top
    future = torch.arange(num_keys) > torch.arange(num_keys - num_queries, num_keys)[:, None]
    image = axes.imshow(
        values.masked_fill(future, torch.nan).numpy(),
        cmap=COLOURS[kind],
        norm=FuncNorm(SIGNED_ROOT, -top, top) if kind == "difference" else PowerNorm(0.5, 0, top),
        interpolation="nearest" if num_keys <= 256 else "antialiased",
        aspect="equal" if num_queries == num_keys else "auto",
    )
    axes.set_facecolor(MASKED)
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(length=0, labelsize=7)
    if labels is not None and num_keys <= LABELLED_TOKENS:
        words = [plain_label(label) for label in labels]
        axes.set_xticks(range(num_keys), words, rotation=90)
        axes.set_yticks(range(num_queries), words[num_keys - num_queries :])
        axes.xaxis.tick_top()
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def full_colour(weights: torch.Tensor) -> float:
    """The weight that four rows of five do not exceed: the first rows, with few keys, would drown the rest."""
    return weights.float().abs().amax(-1).quantile(0.8).item() or 1.0


def plain_label(label: str, length: int = 12) -> str:
    """
    A token fit to be written beside an axis: line ends, runs of spaces and what cannot be printed, or be in an SVG,
    visible, nothing read as mathematics.
    """
    word = (label.removeprefix(" ") or "_").replace("    ", "_").replace("$", r"\$")
    word = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in word)
    return word if len(word) <= length else word[: length - 2] + ".."


def map_figure(
    weights: Mapping[str, torch.Tensor], labels: Sequence[str] | None = None, kind: MapKind = "difference"
) -> Figure:
    """Maps (Q, S) side by side under their names, as those of two models, in the same colours."""
    if not weights:
        raise ValueError("weights is empty: give at least one map.")
    top = max(map(full_colour, weights.values()))
    if not any((one < 0).any() for one in weights.values()):
        kind = "positive" if kind == "difference" else kind
    figure = Figure(figsize=(5.6 * len(weights), 5.6), layout="constrained")
    for axes, (name, one) in zip(_row(figure, len(weights)), weights.items(), strict=True):
        image = draw_map(axes, one, labels, kind, name, top)
        figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02, extend="both" if kind == "difference" else "max")
    return figure


def heads_figure(maps: LayerMaps, kind: MapKind = "difference", columns: int = 4, text: int = 0) -> Figure:
    """Every chosen head of a layer, of one text of the batch."""
    weights = weights_of(maps, kind)[text]
    shown = kind if maps.second is not None else "positive"
    rows = -(-len(weights) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.75 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, head, one in zip(grid, maps.heads.tolist(), weights, strict=False):
        draw_map(axes, one, kind=shown, title=f"layer {maps.layer} head {head}")
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in grid[len(weights) :]:
        axes.set_visible(False)
    return figure


def pair_figure(maps: LayerMaps, head: int, labels: Sequence[str] | None = None, text: int = 0) -> Figure:
    """A1, A2 and A1 - lambda A2 of one head, side by side. ValueError for a layer that subtracts nothing."""
    chosen = maps.heads.tolist()
    if head not in chosen:
        raise ValueError(f"head={head}: the maps hold heads {chosen}.")
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    for axes, kind in zip(_row(figure, 3), MAP_KINDS, strict=True):
        weights = weights_of(maps, kind)[text, chosen.index(head)]
        image = draw_map(axes, weights, labels, kind, f"layer {maps.layer} head {head}: {KIND_LABELS[kind]}")
        figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02, extend="both" if kind == "difference" else "max")
    return figure


def score_figure(scores: Mapping[str, torch.Tensor], title: str = "") -> Figure:
    """Heat maps of scores over layers (down) and heads (across), (L, H) each; NaN where a layer has no such head."""
    if not scores:
        raise ValueError("scores is empty: give at least one score.")
    num_layers, num_heads = next(iter(scores.values())).shape
    size = (max(2.6, 0.36 * num_heads + 1.2) * len(scores), max(2.2, 0.36 * num_layers + 1.1))
    figure = Figure(figsize=size, layout="constrained")
    for axes, (name, values) in zip(_row(figure, len(scores)), scores.items(), strict=True):
        largest = values[values.isfinite()].max().item() if values.isfinite().any() else 1.0
        image = axes.imshow(
            values.float().cpu().numpy(), cmap=POSITIVE, vmin=0, vmax=max(largest, 1e-9), aspect="auto"
        )
        axes.set_facecolor(MASKED)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel("head", fontsize=8)
        axes.set_xticks(range(0, num_heads, max(1, num_heads // 8)))
        axes.set_yticks(range(0, num_layers, max(1, num_layers // 8)))
        axes.tick_params(labelsize=7, length=0)
        figure.colorbar(image, ax=axes, pad=0.02).ax.tick_params(labelsize=7)
    figure.axes[0].set_ylabel("layer", fontsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a figure as its name ends, .png or .svg (text as text). ValueError for another ending."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: figures are written as .png or .svg.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "maps"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)
    return path


def _row(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])
