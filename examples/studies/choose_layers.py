"""
What each layer of a LLaMA costs to convert to V1, and what a choice of layers costs: by cost, evenly spaced, the last.

    python examples/studies/choose_layers.py --model LLAMA --text TEXT
    python examples/studies/choose_layers.py --model out/smollm2 --text TEXT --pad-heads --output out/layers
    python examples/studies/choose_layers.py --smoke

Costs are KL from the LLaMA in nats per token, on sequences that no layer was fitted on, after the quick stages
(pairing, refit) alone: what `diff-llama convert --share` and `--max-kl` choose by.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conversion.calibration.layer_choice import LayerTrials, num_chosen
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from conversion.checkpoint.companions import read_tokenizer
from conversion.data.text import read_calibration
from conversion.source import open_source
from conversion.source.config import check_pairs
from modeling_diff.experiments.command_line import add_device, one_line_errors, script_parser, typed_command
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.output_files import add_output, output_folder
from modeling_diff.experiments.plots import pyplot_for


TINY_LLAMA = Path(__file__).parents[1] / "assets" / "tiny-llama"
SHARES = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 1.0)
RESULTS = ("layers.json", "layers.png")


def choices(count: int, order: Sequence[int]) -> dict[str, list[int]]:
    """Returns `count` layers chosen in each way, of layers in the `order` of their costs."""
    num_layers = len(order)
    return {
        "cheapest": sorted(order[:count]),
        "even": [int((number + 0.5) * num_layers / count) for number in range(count)],
        "last": list(range(num_layers - count, num_layers)),
    }


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = open_source(arguments.model)
    config = source.model.config
    if not arguments.pad_heads:
        check_pairs(config.num_attention_heads, config.num_key_value_heads)
    length = min(config.max_position_embeddings, arguments.length)
    tokens = read_calibration(
        arguments.text, read_tokenizer(source.folder), arguments.tokens, length, config.vocab_size
    )
    trials = LayerTrials(source.reader, config, tokens, device=arguments.device, work_folder=folder)
    order = trials.cheapest_first
    rows = []
    for share in SHARES:
        count = num_chosen(share, len(order))
        if any(row["layers"] == count for row in rows):
            continue
        kl = {name: trials.together(layers) for name, layers in choices(count, order).items()}
        rows.append({"layers": count, "sum": sum(sorted(trials.costs)[:count]), "kl": kl})
    return {"costs": trials.costs, "judged_tokens": trials.tokens, "choices": rows}


def show(found: dict[str, Any]) -> None:
    ways = ("cheapest", "even", "last")
    table = Table("layers", "sum of costs", *ways, title="KL from the LLaMA, nats per token")
    for row in found["choices"]:
        cells = [f"{row['kl'][way]:.4f}" for way in ways]
        table.add_row(f"{row['layers']} of {len(found['costs'])}", f"{row['sum']:.4f}", *cells)
    Console(width=100).print(table)


def plot(found: dict[str, Any], path: Path) -> None:
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    figure, (costs, curve) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    costs.bar(range(len(found["costs"])), found["costs"])
    costs.set(xlabel="layer", ylabel="KL, nats per token", title="one layer converted")
    for way, style in (("cheapest", "o-"), ("even", "s--"), ("last", "^:")):
        shares = [row["layers"] / len(found["costs"]) for row in found["choices"]]
        curve.plot(shares, [row["kl"][way] for row in found["choices"]], style, label=way)
    curve.set(xlabel="share of the layers", ylabel="KL, nats per token", title="several layers converted")
    curve.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", help="folder or Hub id of the LLaMA")
    add("--text", type=Path, help="text to fit and to judge on, as for `diff-llama convert --calibration`")
    add("--tokens", type=int, default=10240, help="number of tokens to read")
    add("--length", type=int, default=1024, help="tokens per sequence")
    add("--pad-heads", action="store_true", help="add idle heads where heads do not pair")
    add_device(parser)
    add_output(parser, "layers.json and layers.png")
    add("--smoke", action="store_true", help="2,560 tokens of the small LLaMA of this repository")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.model = arguments.model or str(TINY_LLAMA)
        arguments.text = arguments.text or TINY_LLAMA / "calibration.txt"
        arguments.tokens = 2560
        arguments.length = 512
    if arguments.model is None or arguments.text is None:
        parser.error("--model and --text are needed, or --smoke")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    logging.disable_progress_bar()
    inputs = [arguments.model, arguments.text]
    with one_line_errors(__file__), output_folder(arguments, RESULTS, inputs) as output:
        with tempfile.TemporaryDirectory() as work:
            found = measure(arguments, Path(work))
        record = {"command": typed_command(__file__, argv), "environment": environment(arguments.device), **found}
        (output / "layers.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        plot(found, output / "layers.png")
    show(found)


if __name__ == "__main__":
    main()
