"""Which roles a V1 conversion paired: a LLaMA's head scores, two heads at a time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .head_scores import SCORES, HeadScore


@dataclass(frozen=True)
class PairScores:
    """The two LLaMA heads of one differential head: the ones that became its positive and its negative map."""

    layer: int
    head: int
    positive: HeadScore
    negative: HeadScore


def paired_scores(scores: Sequence[HeadScore], converted: str | Path) -> list[PairScores]:
    """
    Groups a LLaMA's head scores by the pairs that a V1 conversion made of its heads.

    Args:
        scores: The LLaMA's scores, of every head.
        converted: Folder of the conversion, which records the pairs.

    Returns:
        One entry per differential head, by layer and head.

    Raises:
        ValueError: The folder holds no V1 conversion of a LLaMA, or the scores are of other heads.
    """
    folder = Path(converted)
    record, config = read_conversion(folder)
    by_head = {(score.layer, score.head): score for score in scores if score.map == "attention"}
    count = 2 * config["num_attention_heads"] - (record.get("padding") or {}).get("heads", 0)
    if set(by_head) != {(layer, head) for layer in range(config["num_hidden_layers"]) for head in range(count)}:
        raise ValueError(
            f"{folder}: {count} heads in each of {config['num_hidden_layers']} layers were paired, and the scores are "
            f"of {len(by_head)} heads; score every head of the LLaMA that it was made from."
        )
    pairs = []
    for layer in range(config["num_hidden_layers"]):
        order = query_order(record, config, layer)
        for head in range(len(order) // 2):
            pair = order[2 * head : 2 * head + 2]
            # An idle head, of a number that LLaMA does not have, was given its partner's maps.
            positive, negative = (by_head[layer, role if role < count else min(pair)] for role in pair)
            pairs.append(PairScores(layer, head, positive=positive, negative=negative))
    return pairs


def read_conversion(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Reads conversion.json and config.json of a V1 conversion.

    Args:
        folder: Folder that `diff-llama convert` wrote.

    Returns:
        What either file holds.

    Raises:
        ValueError: The folder is no V1 conversion of a LLaMA.
    """
    record, config = (_read(folder / name) for name in ("conversion.json", "config.json"))
    if config.get("variant") != "v1" or record["source"]["kind"] != "llama":
        raise ValueError(f"{folder}: pairs no heads of a LLaMA; give a V1 conversion of one.")
    return record, config


def query_order(record: dict[str, Any], config: dict[str, Any], layer: int) -> list[int]:
    """
    Returns LLaMA's heads in the order of V1's maps: entry 2 i + m became map m of head i.

    Args:
        record: What conversion.json holds.
        config: What config.json holds.
        layer: The layer, from 0.
    """
    calibration = record["calibration"]
    if calibration is not None and calibration["pairings"]:
        return calibration["pairings"][layer]["query_heads"]
    given = record["options"]["pairings"] or {}
    if str(layer) in given:
        return given[str(layer)]["query_heads"]
    # Neighboring KV heads, their query heads one with one: the converter's default.
    num_heads = config["num_attention_heads"]
    group = num_heads // config["num_key_value_heads"]
    return [(2 * (i // group) + m) * group + i % group for i in range(num_heads) for m in (0, 1)]


def pair_table(pairs: Sequence[PairScores], title: str = "Paired heads") -> Table:
    """
    Lists pairs in a table, each score as positive / negative.

    Args:
        pairs: Pairs of `paired_scores`.
        title: Text above the table.

    Returns:
        A rich table with one row per pair.
    """
    table = Table(title=title, title_justify="left")
    for column in ("layer", "head", "LLaMA heads", *SCORES):
        table.add_column(column.replace("_", " "), justify="right")
    for pair in pairs:
        values = [(getattr(pair.positive, name), getattr(pair.negative, name)) for name in SCORES]
        cells = ("-" if None in both else "{:.3f} / {:.3f}".format(*both) for both in values)
        table.add_row(str(pair.layer), str(pair.head), f"{pair.positive.head}, {pair.negative.head}", *cells)
    return table


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: not there; give a folder that `diff-llama convert` wrote.")
    return json.loads(path.read_text(encoding="utf-8"))
