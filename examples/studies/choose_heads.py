"""
What heads of a LLaMA cost to convert to V1, and what a share of them costs: the cheapest heads, the cheapest layers,
evenly spaced layers.

    python examples/studies/choose_heads.py --needles 100 --output out/heads
    python examples/studies/choose_heads.py --model out/smollm2 --text TEXT --pad-heads --length 512 --output out/heads
    python examples/studies/choose_heads.py --smoke

Costs are KL from the LLaMA in nats per token, on sequences that no layer was fitted on, after the quick stages
(pairing, refit) alone: what `diff-llama convert --share` and `--max-kl` choose by. Heads that share a key-value head
are chosen together.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compare_conversions import recall_rows
from rich.console import Console
from rich.table import Table
from train_tiny_llama import recall_accuracy
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from conversion.calibration.head_choice import num_chosen
from conversion.calibration.head_trials import HeadsByLayer, HeadTrials
from conversion.calibration.model import converted_model
from conversion.checkpoint.companions import read_tokenizer
from conversion.data.text import read_calibration
from conversion.source import open_source
from conversion.source.config import check_pairs
from modeling_diff.experiments.command_line import add_device, one_line_errors, script_parser, typed_command
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.output_files import add_output, output_folder
from modeling_diff.experiments.plots import pyplot_for


TINY_LLAMA = Path(__file__).parents[1] / "assets" / "tiny-llama"
SHARES = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 1.0)  # of the layers, at least one; as many heads are chosen one by one
RESULTS = ("heads.json", "heads.png")
WAYS = {"heads": "o-", "layers": "s--", "even": "^:"}
LABELS = {"heads": "cheapest heads", "layers": "cheapest layers", "even": "evenly spaced layers"}


def choices(count: int, by_head: HeadTrials, by_layer: HeadTrials) -> dict[str, HeadsByLayer]:
    """Returns as many heads as `count` layers have, chosen in each way."""
    num_layers = len(by_layer.costs)
    even = [(int((number + 0.5) * num_layers / count), 0) for number in range(count)]
    return {
        "heads": by_head.heads(by_head.cheapest_first[: count * len(by_head.units)]),
        "layers": by_layer.heads(by_layer.cheapest_first[:count]),
        "even": by_layer.heads(even),
    }


class Needles:
    """Recall of needles never trained on, in text never trained on: of examples/assets/tiny-llama and its sisters."""

    def __init__(self, folder: Path, count: int):
        self.llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.rows = recall_rows(folder, read_tokenizer(folder), self.llama.config.max_position_embeddings)
        self.count = count

    @torch.no_grad()
    def recalled(self, trials: HeadTrials, heads: HeadsByLayer) -> float:
        """Returns the share of needles that the model with these heads converted gets right."""
        layers = [trials.weights(layer, chosen) if chosen else None for layer, chosen in enumerate(heads)]
        return recall_accuracy(converted_model(self.llama, layers), self.rows["needle"][: self.count])


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = open_source(arguments.model)
    config = source.model.config
    if not arguments.pad_heads:
        check_pairs(config.num_attention_heads, config.num_key_value_heads)
    length = min(config.max_position_embeddings, arguments.length)
    tokens = read_calibration(
        arguments.text, read_tokenizer(source.folder), arguments.tokens, length, config.vocab_size
    )
    needles = Needles(source.folder, arguments.needles) if arguments.needles else None
    by_head = HeadTrials(source.reader, config, tokens, device=arguments.device, work_folder=folder)
    every = sorted(head for unit in by_head.units for head in unit)
    by_layer = HeadTrials(
        source.reader, config, tokens, units=[every], device=arguments.device, work_folder=folder, resume=True
    )
    num_layers = len(by_layer.costs)
    rows = []
    for count in dict.fromkeys(num_chosen(share, num_layers) for share in SHARES):
        chosen = choices(count, by_head, by_layer)
        row: dict[str, Any] = {"layers": count, "heads": count * len(every)}
        row["kl"] = {way: by_head.together(heads) for way, heads in chosen.items()}
        if needles:
            row["recall"] = {way: needles.recalled(by_head, heads) for way, heads in chosen.items()}
        rows.append(row | {"chosen": [list(heads) for heads in chosen["heads"]]})
    found = {"units": by_head.units, "costs": by_head.costs, "layer_costs": [cost for (cost,) in by_layer.costs]}
    return {**found, "judged_tokens": by_head.tokens, "choices": rows}


def show(found: dict[str, Any]) -> None:
    total = found["choices"][-1]["heads"]
    for name, title in (("kl", "KL from the LLaMA, nats per token"), ("recall", "share of needles recalled")):
        if name not in found["choices"][0]:
            continue
        table = Table("heads", *LABELS.values(), title=title)
        for row in found["choices"]:
            table.add_row(f"{row['heads']} of {total}", *[f"{row[name][way]:.4f}" for way in WAYS])
        Console(width=100).print(table)


def plot(found: dict[str, Any], path: Path) -> None:
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    rows = found["choices"]
    names = ["kl", "recall"] if "recall" in rows[0] else ["kl"]
    figure, (costs, *curves) = pyplot.subplots(
        1, 1 + len(names), figsize=(5 + 5 * len(names), 4), layout="constrained"
    )
    by_layer = torch.tensor(found["costs"])
    width = 0.8 / by_layer.shape[1]
    for unit in range(by_layer.shape[1]):
        places = torch.arange(len(by_layer)) + (unit - (by_layer.shape[1] - 1) / 2) * width
        costs.bar(places.tolist(), by_layer[:, unit].tolist(), width, label=f"key-value head {unit}")
    costs.plot(found["layer_costs"], "k_", markersize=12, label="the whole layer")
    costs.set(xlabel="layer", ylabel="KL, nats per token", title="heads of one key-value head converted")
    costs.legend(ncols=2 if by_layer.shape[1] < 4 else 4, fontsize="small")
    for name, curve in zip(names, curves, strict=True):
        for way, style in WAYS.items():
            shares = [row["heads"] / rows[-1]["heads"] for row in rows]
            curve.plot(shares, [row[name][way] for row in rows], style, label=LABELS[way])
        label = "KL, nats per token" if name == "kl" else "share of needles recalled"
        curve.set(xlabel="share of all heads", ylabel=label, title="several converted", ylim=(0, None))
        curve.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", default=str(TINY_LLAMA), help="folder or Hub id of the LLaMA")
    add("--text", type=Path, help="text to fit and to judge on, as for `diff-llama convert --calibration`")
    add("--tokens", type=int, default=10240, help="number of tokens to read")
    add("--length", type=int, default=1024, help="tokens per sequence")
    add("--pad-heads", action="store_true", help="add idle heads where heads do not pair")
    add(
        "--needles", type=int, default=0, help="number of needles to ask for, where the model's folder has heldout.txt"
    )
    add_device(parser)
    add_output(parser, "heads.json and heads.png")
    add("--smoke", action="store_true", help="2,560 tokens of the small LLaMA of this repository")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.tokens = 2560
        arguments.length = 512
    if arguments.text is None and arguments.model == str(TINY_LLAMA):
        arguments.text = TINY_LLAMA / "calibration.txt"
    if arguments.text is None:
        parser.error("--text is needed for a model other than that of this repository")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    logging.disable_progress_bar()
    inputs = [arguments.model, arguments.text]
    with one_line_errors(__file__), output_folder(arguments, RESULTS, inputs) as output:
        with tempfile.TemporaryDirectory() as work:
            found = measure(arguments, Path(work))
        record = {"command": typed_command(__file__, argv), "environment": environment(arguments.device), **found}
        (output / "heads.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        plot(found, output / "heads.png")
    show(found)


if __name__ == "__main__":
    main()
