"""
Attention and head scores as figures, PNG or SVG, through matplotlib (the extra `viz`).

H heads, Q queries, S keys.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from .aggregate import MAP_KINDS, MapKind, weights_of
from .maps import LayerMaps


try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.colors import FuncNorm, LinearSegmentedColormap, PowerNorm
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("Figures need matplotlib: pip install matplotlib") from error


POSITIVE = LinearSegmentedColormap.from_list("positive", ["#ffffff", "#bed7f0", "#4285c8", "#08306b"])
NEGATIVE = LinearSegmentedColormap.from_list("negative", ["#ffffff", "#fdd0a2", "#e66214", "#7a2404"])
DIFFERENCE = LinearSegmentedColormap.from_list(
    "difference", ["#7a2404", "#e66214", "#fdd0a2", "#ffffff", "#bed7f0", "#4285c8", "#08306b"]
)
COLORS = {"positive": POSITIVE, "negative": NEGATIVE, "difference": DIFFERENCE}
MASKED = "#eceef1"
SIGNED_ROOT = (lambda x: numpy.sign(x) * numpy.sqrt(numpy.abs(x)), lambda x: numpy.sign(x) * numpy.square(x))
LABELED_TOKENS = 48  # more would not be legible
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
    Draws one map; keys after a query are gray, and zero is white.

    Args:
        axes: Where to draw.
        weights: Attention of the last Q of S tokens, (Q, S).
        labels: The S tokens as text, written out where there are at most 48.
        kind: Which map it is; the difference gets a symmetric scale.
        title: Text above the map.
        top: The weight from which on colors are full. Defaults to `full_color`.

    Returns:
        matplotlib's image, for a color bar.

    Raises:
        ValueError: There are not S labels.
    """
    num_queries, num_keys = weights.shape
    if labels is not None and len(labels) != num_keys:
        raise ValueError(f"{len(labels)} labels for {num_keys} keys: give one per token.")
    values = weights.detach().float().cpu()
    top = full_color(values) if top is None else top
    future = torch.arange(num_keys) > torch.arange(num_keys - num_queries, num_keys)[:, None]
    image = axes.imshow(
        values.masked_fill(future, torch.nan).numpy(),
        cmap=COLORS[kind],
        norm=FuncNorm(SIGNED_ROOT, -top, top) if kind == "difference" else PowerNorm(0.5, 0, top),
        interpolation="nearest" if num_keys <= 256 else "antialiased",
        aspect="equal" if num_queries == num_keys else "auto",
    )
    axes.set_facecolor(MASKED)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("key (attended to)", fontsize=9)
    axes.set_ylabel("query", fontsize=9)
    axes.tick_params(length=0, labelsize=7)
    if labels is not None and num_keys <= LABELED_TOKENS:
        words = [plain_label(label) for label in labels]
        axes.set_xticks(range(num_keys), words, rotation=90)
        axes.set_yticks(range(num_queries), words[num_keys - num_queries :])
        axes.xaxis.tick_top()
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def full_color(weights: torch.Tensor) -> float:
    """
    Returns the weight that four rows of five do not exceed: the first rows, with few keys, would drown the rest.

    Args:
        weights: Weights of a map, (..., Q, S).

    Returns:
        The weight, or 1 where all are 0.
    """
    return weights.float().abs().amax(-1).quantile(0.8).item() or 1.0


def plain_label(label: str, length: int = 12) -> str:
    """
    Returns a token as an axis label: line ends, runs of spaces and unprintable characters are made visible, and
    nothing is read as mathematics.

    Args:
        label: Text of the token.
        length: Largest number of characters; what is longer ends in two dots.
    """
    word = (label.removeprefix(" ") or "_").replace("    ", "_").replace("$", r"\$")
    word = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in word)
    return word if len(word) <= length else word[: length - 2] + ".."


def map_figure(
    weights: Mapping[str, torch.Tensor], labels: Sequence[str] | None = None, kind: MapKind = "difference"
) -> Figure:
    """
    Draws maps side by side on one scale, such as those of two models.

    Args:
        weights: Maps by name, (Q, S) each.
        labels: The S tokens as text.
        kind: Which map they are.

    Returns:
        The figure.

    Raises:
        ValueError: There is no map.
    """
    if not weights:
        raise ValueError("weights is empty: give at least one map.")
    top = max(map(full_color, weights.values()))
    if not any((one < 0).any() for one in weights.values()):
        kind = "positive" if kind == "difference" else kind
    figure = Figure(figsize=(5.6 * len(weights), 5.6), layout="constrained")
    for axes, (name, one) in zip(_row(figure, len(weights)), weights.items(), strict=True):
        image = draw_map(axes, one, labels, kind, name, top)
    _add_scale(figure, image, kind)
    return figure


def heads_figure(maps: LayerMaps, kind: MapKind = "difference", columns: int = 4, text: int = 0) -> Figure:
    """
    Draws every collected head of a layer.

    Args:
        maps: A layer's maps.
        kind: Which map; A1 where the layer has no other.
        columns: Heads per row.
        text: Index of the text in the batch.

    Returns:
        The figure.
    """
    weights = weights_of(maps, kind)[text]
    shown = kind if maps.negative is not None else "positive"
    rows = -(-len(weights) // columns)
    top = max(map(full_color, weights))  # one scale, so that heads compare
    figure = Figure(figsize=(2.4 * columns + 0.8, 2.6 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, head, one in zip(grid, maps.heads.tolist(), weights, strict=False):
        image = draw_map(axes, one, kind=shown, title=f"layer {maps.layer} head {head}", top=top)
        axes.set(xlabel="", ylabel="", xticks=[], yticks=[])
    for axes in grid[len(weights) :]:
        axes.set_visible(False)
    figure.supxlabel("key (attended to)", fontsize=9)
    figure.supylabel("query", fontsize=9)
    _add_scale(figure, image, shown)
    return figure


def pair_figure(maps: LayerMaps, head: int, labels: Sequence[str] | None = None, text: int = 0) -> Figure:
    """
    Draws A1, A2 and A1 - lambda A2 of one head on one scale.

    Args:
        maps: A differential layer's maps.
        head: The head.
        labels: The S tokens as text.
        text: Index of the text in the batch.

    Returns:
        The figure.

    Raises:
        ValueError: The head was not collected, or the layer subtracts nothing.
    """
    chosen = maps.heads.tolist()
    if head not in chosen:
        raise ValueError(f"head={head}: the maps hold heads {chosen}.")
    shown = {kind: weights_of(maps, kind)[text, chosen.index(head)] for kind in MAP_KINDS}
    top = max(map(full_color, shown.values()))
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    for axes, (kind, weights) in zip(_row(figure, 3), shown.items(), strict=True):
        title = f"layer {maps.layer} head {head}: {KIND_LABELS[kind]}"
        image = draw_map(axes, weights, labels, "difference", title, top)
    _add_scale(figure, image, "difference")
    return figure


def _add_scale(figure: Figure, image: Any, kind: MapKind) -> None:
    """One color bar for all maps of the figure, which share its scale."""
    extend = "both" if kind == "difference" else "max"
    bar = figure.colorbar(image, ax=list(figure.axes), shrink=0.7, pad=0.01, extend=extend)
    bar.set_label("attention weight", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def score_figure(scores: Mapping[str, torch.Tensor], title: str = "") -> Figure:
    """
    Draws scores over layers (down) and heads (across).

    Shares, from 0 to 1, have one scale and one color bar. A score in another unit, as `entropy_nats`, has its own.

    Args:
        scores: Scores by name, (L, H) each as from `score_grid`; NaN where a layer has no such head.
        title: Text above the figure.

    Returns:
        The figure.

    Raises:
        ValueError: There is no score.
    """
    if not scores:
        raise ValueError("scores is empty: give at least one score.")
    scores = dict(sorted(scores.items(), key=lambda item: _is_share(item[1])))  # shares together, next to their bar
    shares = [values for values in scores.values() if _is_share(values)]
    num_layers, num_heads = next(iter(scores.values())).shape
    size = (max(1.7, 0.2 * num_heads + 0.6) * len(scores) + 1.2, max(2.6, 0.16 * num_layers + 1.2))
    figure = Figure(figsize=size, layout="constrained")
    shared = []
    for axes, (name, values) in zip(_row(figure, len(scores)), scores.items(), strict=True):
        largest = max(_largest(one) for one in shares) if _is_share(values) else _largest(values)
        image = axes.imshow(
            values.float().cpu().numpy(), cmap=POSITIVE, vmin=0, vmax=max(largest, 1e-9), aspect="auto"
        )
        axes.set_facecolor(MASKED)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel("head", fontsize=8)
        axes.set_ylabel("layer", fontsize=8)
        axes.set_xticks(range(0, num_heads, max(1, num_heads // 8)))
        axes.set_yticks(range(0, num_layers, max(1, num_layers // 8)))
        axes.tick_params(labelsize=7, length=0)
        if _is_share(values):
            shared.append((axes, image))
        else:
            figure.colorbar(image, ax=axes, pad=0.02).ax.tick_params(labelsize=7)
    if shared:
        bar = figure.colorbar(shared[-1][1], ax=[axes for axes, _ in shared], pad=0.02)
        bar.set_label("share", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def _largest(values: torch.Tensor) -> float:
    return values[values.isfinite()].max().item() if values.isfinite().any() else 1.0


def _is_share(values: torch.Tensor) -> bool:
    return _largest(values) <= 1


def save_figure(figure: Figure, path: str | Path) -> Path:
    """
    Writes a figure in the format of the file's ending.

    Args:
        figure: The figure.
        path: A file ending in .png or .svg, where text stays text. Missing folders are created.

    Returns:
        The path.

    Raises:
        ValueError: The ending is another one.
    """
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
