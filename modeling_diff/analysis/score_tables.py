"""Scores of heads as a grid of layers and heads, as a table for the terminal, and as a JSON file."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from .head_scores import SCORES, HeadScore


def score_grid(scores: Sequence[HeadScore], name: str, map_name: str | None = None) -> torch.Tensor:
    """
    Arranges one score by layer and head.

    Args:
        scores: Scores of `score_heads`.
        name: The score, one of `SCORES`.
        map_name: The map; LLaMA's own counts where a layer has no other. Defaults to all.

    Returns:
        The score, (L, H); NaN where there is none.

    Raises:
        ValueError: The score or the map is unknown.
    """
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
    """
    Lists scores in a table.

    Args:
        scores: Scores of `score_heads`.
        title: Text above the table.
        sort_by: The score to sort by, largest first. Defaults to the order given.
        rows: The largest number of rows; 0 for all.

    Returns:
        A rich table with one row per map.
    """
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
    """
    Writes scores as a JSON list of objects, one per map.

    Args:
        scores: Scores of `score_heads`.
        path: The file to write.
    """
    Path(path).write_text(json.dumps([asdict(score) for score in scores], indent=1) + "\n", encoding="utf-8")
