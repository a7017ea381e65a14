"""The report's plots, from its numbers, for light and for dark pages. Needs matplotlib (the `viz` extra)."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .attention_mass import REGIONS


try:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("Figures need matplotlib: pip install matplotlib") from error


@dataclass(frozen=True)
class Palette:
    """Colors of a page; `heat` are a heat map's at 0 and at 1, `heat_text` those of text on them."""

    page: str
    ink: str
    muted: str
    grid: str
    answer: str
    series: tuple[str, ...]
    heat: tuple[str, str]
    heat_text: tuple[str, str]


LIGHT = Palette(
    page="#ffffff",
    ink="#1d2330",
    muted="#5d6677",
    grid="#e3e6ec",
    answer="#d1495b",
    series=("#4c5a73", "#1f77c9", "#e08a1e", "#2a9d6f", "#8a5cc9", "#c94f7c"),
    heat=("#f0f4fa", "#1b5fa8"),
    heat_text=("#1d2330", "#ffffff"),
)
DARK = Palette(
    page="#171b24",
    ink="#e6e9f0",
    muted="#9aa4b8",
    grid="#2d3443",
    answer="#ff7b8a",
    series=("#a9b4c9", "#5aa9f5", "#f2ab4c", "#4fcf9c", "#b795f0", "#f285ab"),
    heat=("#232a38", "#5aa9f5"),
    heat_text=("#e6e9f0", "#10141c"),
)
SCORE_TITLES = {
    "retrieval": "retrieval",
    "induction": "induction",
    "previous_token": "previous token",
    "first_token": "first token",
    "entropy_nats": "entropy (nats)",
}

Models = Sequence[dict[str, Any]]
Draw = Callable[[Models, Palette], Figure]


def view_shown(model: dict[str, Any]) -> str:
    """Returns the view shown of a model where there is one number: A of LLaMA, max(A1 - lambda A2, 0) of DIFF."""
    return "positive" if model["kind"] == "LLaMA" else "clamped"


def new_figure(rows: int, columns: int, palette: Palette, *, size: tuple[float, float], **options: Any) -> tuple:
    """Returns a figure and its axes (rows, columns), in a page's colors; `size` is in inches."""
    figure = Figure(figsize=size, facecolor=palette.page, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.set_facecolor(palette.page)
        ax.tick_params(colors=palette.muted, labelsize=8, length=0)
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set(color=palette.muted, fontsize=8.5)
        ax.grid(True, axis="y", color=palette.grid, linewidth=0.8)
        ax.set_axisbelow(True)
        for side, spine in ax.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(palette.grid)
    return figure, axes


def set_title(ax: Axes, title: str, palette: Palette, *, loc: Literal["left", "center"] = "center") -> None:
    """Writes a title above one plot."""
    ax.set_title(title, loc=loc, color=palette.ink, fontsize=9.5)


def add_legend(figure: Figure, ax: Axes, palette: Palette) -> None:
    """Writes the legend of one plot below all of them."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, len(labels)),
        frameon=False,
        fontsize=8.5,
        labelcolor=palette.ink,
    )


def draw_heat_map(ax: Axes, cells: Sequence[dict[str, Any]], palette: Palette) -> None:
    """Draws accuracy over depth (down) and length (across) for one (needles, asked)."""
    lengths = sorted({cell["length_tokens"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells}, key=lambda depth: (depth is None, depth))
    found = {(cell["depth"], cell["length_tokens"]): cell["right"] / cell["answers"] for cell in cells}
    values = [[found.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    colors = LinearSegmentedColormap.from_list("accuracy", palette.heat)
    ax.imshow(values, vmin=0, vmax=1, cmap=colors, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            color = palette.heat_text[value > 0.55]
            ax.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
    ax.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    ax.set_yticks(range(len(depths)), ["any" if depth is None else f"{depth:.0%}" for depth in depths])
    ax.grid(False)


def needle_heat_maps(models: Models, palette: Palette) -> Figure:
    """Draws accuracy over depth and length, one row per model and one column per (needles, asked)."""
    counts = sorted({(cell["needles"], cell["asked"]) for cell in models[0]["needles"]})
    size = (max(3.4, 2.35 * len(counts)), 0.5 + 1.75 * len(models))
    figure, axes = new_figure(len(models), len(counts), palette, size=size)
    for row, model in zip(axes, models, strict=True):
        for ax, count in zip(row, counts, strict=True):
            draw_heat_map(ax, [c for c in model["needles"] if (c["needles"], c["asked"]) == count], palette)
            if model is models[0]:
                set_title(ax, f"{count[0]} needle{'s' * (count[0] > 1)}, {count[1]} asked", palette)
            if model is models[-1]:
                ax.set_xlabel("length (tokens)")
        row[0].set_ylabel(f"{model['label']}\ndepth")
    return figure


def attention_by_depth(models: Models, palette: Palette) -> Figure:
    """Draws attention to the answer and to noise, one group of bars per depth and one bar per model."""
    figure, axes = new_figure(1, 2, palette, size=(9, 2.9), sharey=True)
    for ax, what in zip(axes[0], ("answer", "noise"), strict=True):
        for i, model in enumerate(models):
            rows = [row for row in model["attention"] if row["view"] == view_shown(model)]
            width = 0.8 / len(models)
            centers = [x + (i - (len(models) - 1) / 2) * width for x in range(len(rows))]
            shares = [row[what] for row in rows]
            ax.bar(centers, shares, width * 0.92, color=palette.series[i % 6], label=model["label"])
        ax.set_xticks(range(len(rows)), [f"{row['depth']:.0%}" for row in rows])
        ax.set_xlabel("depth of the answer")
        ax.set_ylabel("share of attention")
        set_title(ax, f"attention to {'the answer' if what == 'answer' else 'noise'}", palette)
    add_legend(figure, axes[0, 0], palette)
    return figure


def attention_profiles(models: Models, palette: Palette) -> Figure:
    """Draws attention over one prompt's tokens where the answer begins, with the answer's digits marked."""
    size = (9, 0.5 + 1.35 * len(models))
    figure, axes = new_figure(len(models), 1, palette, size=size, sharex=True, sharey=True)
    highest = 0.0
    for i, (ax, model) in enumerate(zip(axes[:, 0], models, strict=True)):
        shares = model["profile"]["views"][view_shown(model)]
        names = [REGIONS[region] for region in model["profile"]["regions"]]
        shades = {"answer": palette.answer, "rest": palette.grid}
        colors = [shades.get(name, palette.series[i % 6]) for name in names]
        ax.bar(range(len(shares)), shares, 1.0, color=colors)
        span = [position for position, name in enumerate(names) if name == "answer"]
        ax.annotate(
            "answer",
            xy=(sum(span) / len(span), max(shares[position] for position in span)),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=palette.answer,
        )
        highest = max(highest, *(share for share, name in zip(shares, names, strict=True) if name != "rest"))
        set_title(ax, model["label"], palette, loc="left")
        ax.set_ylabel("share of attention")
    axes[0, 0].set_ylim(0, highest * 1.35)
    axes[-1, 0].set_xlabel("token of the prompt")
    return figure


def quantized_lines(models: Models, palette: Palette) -> Figure:
    """Draws what quantized attention logits cost in loss, and what accuracy remains."""
    figure, axes = new_figure(1, 2, palette, size=(9, 2.9))
    for i, model in enumerate(models):
        rows = sorted(model["quantized"], key=lambda row: -(row["bits"] or 99))
        names = ["full" if row["bits"] is None else str(row["bits"]) for row in rows]
        # The first is the widest, so that overlapping lines are all visible.
        width = 1.4 + 1.6 * (len(models) - 1 - i)
        style = {"color": palette.series[i % 6], "marker": "o", "markersize": 2.5 + width, "linewidth": width}
        axes[0, 0].plot(names, [row["loss"] - rows[0]["loss"] for row in rows], label=model["label"], **style)
        axes[0, 1].plot(names, [row["accuracy"] for row in rows], **style)
    axes[0, 0].set_ylabel("loss above full precision (nats/token)")
    axes[0, 1].set_ylabel("accuracy, one needle")
    axes[0, 1].set_ylim(-0.03, 1.03)
    for ax in axes[0]:
        ax.set_xlabel("bits of an attention logit")
    add_legend(figure, axes[0, 0], palette)
    return figure


def order_bands(models: Models, palette: Palette) -> Figure:
    """Draws accuracy over the number of demonstrations: mean, and the band between worst and best random order."""
    figure, axes = new_figure(1, len(models), palette, size=(9, 2.7), sharey=True)
    for i, (ax, model) in enumerate(zip(axes[0], models, strict=True)):
        rows = [row for row in model["order"] if row["arrangement"] == "random"]
        color = palette.series[i % 6]
        shots = [row["shots"] for row in rows]
        worst, best = (
            [statistics.fmean(pick(orders) for orders in row["accuracies"]) for row in rows] for pick in (min, max)
        )
        ax.fill_between(shots, worst, best, color=color, alpha=0.22, linewidth=0)
        ax.plot(shots, [row["accuracy"] for row in rows], color=color, marker="o", markersize=4, linewidth=1.6)
        ax.axhline(1 / rows[0]["labels"], color=palette.muted, linewidth=1, linestyle=":")
        ax.set_xticks(shots)
        ax.set_ylim(0, 1.03)
        set_title(ax, model["label"], palette)
        ax.set_xlabel("demonstrations")
    axes[0, 0].set_ylabel("accuracy")
    return figure


def head_dots(models: Models, palette: Palette) -> Figure:
    """Draws one dot per head, one column per model and one panel per score."""
    figure, axes = new_figure(1, len(SCORE_TITLES), palette, size=(9, 2.6))
    for ax, (name, title) in zip(axes[0], SCORE_TITLES.items(), strict=True):
        for i, model in enumerate(models):
            heads = [head for head in model["heads"] if head["map"] in ("attention", "difference")]
            values = [head[name] for head in heads if head[name] is not None]
            # Side by side, in the order of layers.
            columns = [i + 0.5 * (order / max(1, len(values) - 1) - 0.5) for order in range(len(values))]
            ax.scatter(columns, values, s=9, color=palette.series[i % 6], label=model["label"], linewidths=0)
        set_title(ax, title, palette)
        ax.set_xticks([])
        ax.set_xlabel("heads by layer")
        ax.margins(x=0.12)
    axes[0, 0].set_ylabel("score of a head")
    add_legend(figure, axes[0, 0], palette)
    return figure
