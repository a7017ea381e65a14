"""
Where the loss of a whole V1 conversion comes from: one cause more in every row, and one choice changed at a time.

    python examples/studies/trace_loss.py
    python examples/studies/trace_loss.py --model out/smollm2 --tokens 8192 --held-out-tokens 8192 --output out/trace
    python examples/studies/trace_loss.py --smoke

Half of the maps are gone in V1. The first row has this cause alone: lambda is 0, and the norm over heads hardly
differs from the identity. Then come the norm of the paper and the lowest lambda. The other rows change one thing of a
conversion as it is by default, but without its last two stages: more text, text of another kind (`--other-text`), the
order of heads, stages. KL is from the LLaMA, in nats per token of heldout.txt; layers are fitted one after the other.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM
from transformers.utils import logging

from conversion.calibration.calibrate import Stage, calibrate
from conversion.calibration.gradient_fit import LocalFit
from conversion.calibration.model import calibrated_model
from conversion.checkpoint.companions import read_tokenizer
from conversion.data.text import read_calibration
from conversion.evaluation.metrics import text_metrics, window_logits
from conversion.source import open_source
from modeling_diff.experiments.command_line import add_device, one_line_errors, script_parser, typed_command
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.output_files import add_output, output_folder


TINY_LLAMA = Path(__file__).parents[1] / "assets" / "tiny-llama"
RESULT = "trace.json"
HELD_OUT_ROW = 512
CLOSED_FORM = (Stage.PAIRING, Stage.REFIT)
NO_FLOOR = LocalFit(lambda_floor=0.0)


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, Path, int, dict[str, Any]]]:
    """Yields a name, the text, the number of its tokens and the arguments of `calibrate`, per row of the table."""
    text = arguments.text
    count = arguments.tokens
    without_lambda = {"stages": CLOSED_FORM, "lambda_init": 0.0, "local": NO_FLOOR}
    yield "half of the maps", text, count, without_lambda | {"norm": "neutral"}
    yield "+ the paper's norm", text, count, without_lambda
    yield "+ lambda of 0.02 or more", text, count, {"stages": CLOSED_FORM}
    yield "lambda from 0", text, count, {"stages": CLOSED_FORM, "local": NO_FLOOR}
    yield "heads next to each other", text, count, {"stages": (Stage.REFIT,)}
    yield "o_proj not fitted", text, count, {"stages": (Stage.PAIRING,)}
    yield "twice the text", text, 2 * count, {"stages": CLOSED_FORM}
    if arguments.other_text:
        yield f"text of {arguments.other_text.name}", arguments.other_text, count, {"stages": CLOSED_FORM}
    yield "values fitted as well", text, count, {"stages": (*CLOSED_FORM, Stage.VALUES)}
    if arguments.gradient:
        yield "all stages", text, count, {"stages": tuple(Stage)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Calibrates once per row, and returns the record."""
    source = open_source(arguments.model)
    config = source.model.config
    tokenizer = read_tokenizer(source.folder)

    def rows_of(text: Path, count: int, length: int) -> torch.Tensor:
        length = min(length, config.max_position_embeddings)
        return read_calibration(text, tokenizer, count, length, config.vocab_size)

    windows = list(rows_of(arguments.held_out, arguments.held_out_tokens, HELD_OUT_ROW).split(1))
    llama = LlamaForCausalLM.from_pretrained(source.folder, dtype=torch.float32).to(arguments.device).eval()
    source_logits = list(window_logits(llama, windows))
    rows = []
    for name, text, count, options in cases(arguments):
        began = time.process_time()
        result = calibrate(
            source.reader,
            config,
            rows_of(text, count, arguments.length),
            pad_heads=arguments.pad_heads,
            device=arguments.device,
            **options,
        )
        seconds = time.process_time() - began
        found = text_metrics(window_logits(calibrated_model(llama, result), windows), windows, source_logits)
        rows.append({"case": name, "tokens": count, **found.to_dict(), "cpu_seconds": seconds})
        print(json.dumps(rows[-1]), flush=True)
    return {"held_out_tokens": sum(ids.numel() for ids in windows), "rows": rows}


def show(found: dict[str, Any]) -> None:
    """Prints the table."""
    table = Table("", "tokens", "loss", "KL", "greedy agreement", title="V1 from the LLaMA, nats per token")
    table.add_row("LLaMA", "", f"{found['rows'][0]['source_loss_nats']:.4f}", "", "")
    for row in found["rows"]:
        numbers = [f"{row['loss_nats']:.4f}", f"{row['kl_nats']:.4f}", f"{row['greedy_agreement']:.1%}"]
        table.add_row(row["case"], f"{row['tokens']:,}", *numbers)
    Console(width=100).print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", type=Path, default=TINY_LLAMA, help="folder of a LLaMA")
    add("--text", type=Path, help="calibration text (default: calibration.txt next to the model)")
    add("--other-text", type=Path, help="text of another kind to calibrate on in one row")
    add("--tokens", type=int, default=16_384, help="number of calibration tokens to read")
    add("--length", type=int, default=1024, help="tokens per sequence")
    add("--held-out", type=Path, help="text to measure on (default: heldout.txt next to the model)")
    add("--held-out-tokens", type=int, default=24_576, help="number of held-out tokens to measure on")
    add("--pad-heads", action="store_true", help="add idle heads where heads do not pair")
    add("--gradient", action="store_true", help="a last row with all stages, which takes longer than all others")
    add_device(parser)
    add_output(parser, RESULT)
    add("--smoke", action="store_true", help="2,048 tokens of the small LLaMA of this repository")
    arguments = parser.parse_args(argv)
    arguments.text = arguments.text or arguments.model / "calibration.txt"
    arguments.held_out = arguments.held_out or arguments.model / "heldout.txt"
    if arguments.smoke:
        arguments.tokens = 2048
        arguments.held_out_tokens = 1024
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    logging.disable_progress_bar()
    inputs = [arguments.model, arguments.text, arguments.other_text]
    with one_line_errors(__file__), output_folder(arguments, [RESULT], inputs) as output:
        found = measure(arguments)
        record = {"command": typed_command(__file__, argv), "environment": environment(arguments.device), **found}
        (output / RESULT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    show(found)


if __name__ == "__main__":
    main()
