"""
The main job from end to end: a LLaMA becomes a DIFF V1 and a DIFF V2 checkpoint; all are verified and compared.

    python examples/scripts/quickstart.py
    python examples/scripts/quickstart.py --smoke      # few tokens, seconds
    python examples/scripts/quickstart.py --model meta-llama/Llama-3.2-1B --output out/llama-3.2-1b \\
        --calibration my_text.txt

Without options it takes the small trained LLaMA in examples/assets/tiny-llama and its calibration text, needs no
network, about a minute on two cores, and writes the checkpoints to out/quickstart.
V1 comes twice: as a plain copy, and calibrated on 16K tokens of text (`--calibration` for another source) with
`--effort quick`; `diff-llama convert --calibration` does more by default. Loss, KL and greedy agreement are those of
the standard held-out text, or of `--held-out`. The exit code is 1 if a check fails.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import modeling_diff  # noqa: F401  registers the models with the auto classes
from conversion import convert_checkpoint, verify_checkpoint
from conversion.data.held_out import read_held_out
from conversion.evaluation.metrics import text_metrics, window_logits
from modeling_diff.experiments.command_line import one_line_errors, script_parser
from modeling_diff.experiments.output_files import add_output, output_folder


ASSETS = Path(__file__).parents[1] / "assets" / "tiny-llama"
RESULTS = ("v1", "v1-copy", "v2")
PROMPT = "def read_lines(path):\n"
COLUMNS = ("model", "parameters", "MiB", "loss (nats)", "KL (nats)", "greedy agreement", "λ", "verified", "seconds")


def convert(
    arguments: argparse.Namespace, output: Path, console: Console
) -> Iterator[tuple[str, str | Path, str, float]]:
    """Yields each model's name, its folder, the verdict of `verify` and the seconds taken; the LLaMA first."""
    yield "LLaMA", arguments.model, "-", 0.0
    calibration = {
        "calibration": arguments.calibration,
        "calibration_tokens": arguments.calibration_tokens,
        "effort": "quick",
    }
    conversions: list[tuple[str, str, str, dict[str, Any]]] = [
        ("DIFF V2, exact", "v2", "v2", {}),
        ("DIFF V1, plain copy", "v1-copy", "v1", {"uncalibrated": True}),
    ]
    if arguments.calibration:
        conversions.append(("DIFF V1, calibrated", "v1", "v1", calibration))
    for name, folder_name, variant, options in conversions:
        start = time.perf_counter()
        folder = output / folder_name
        convert_checkpoint(arguments.model, folder, variant, measure=False, **options)
        report = verify_checkpoint(folder, against=arguments.model, held_out=arguments.held_out)
        for check in report.checks:
            console.print(f"{folder_name} {check.name}: {check.outcome}, {check.detail}", style="dim", highlight=False)
        yield name, folder, "yes" if report.passed else "FAILED", time.perf_counter() - start


def smallest_and_largest_lambda(model: PreTrainedModel) -> str:
    """Returns what λ of a V1's layers is, "-" for other models; V2's depends on the token."""
    attentions = [layer.self_attn for layer in model.model.layers if hasattr(layer.self_attn, "diff_lambda")]
    lambdas = [attention.diff_lambda().item() for attention in attentions]
    return f"{min(lambdas):.3f} to {max(lambdas):.3f}" if lambdas else "-"


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def smoke(arguments: argparse.Namespace, folder: Path) -> None:
    """Fills in few tokens of calibration, and a short held-out text."""
    arguments.calibration_tokens = min(arguments.calibration_tokens, 2048)
    if arguments.held_out is None:
        arguments.held_out = folder / "heldout.txt"
        arguments.held_out.write_text((ASSETS / "heldout.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    parser.add_argument("--model", default=str(ASSETS), help="folder or Hub id of a LLaMA")
    add_output(parser, "the checkpoints v1, v1-copy and v2", "quickstart")
    parser.add_argument("--held-out", type=Path, help="text for loss, KL and agreement, instead of the standard one")
    parser.add_argument("--calibration", type=Path, help="text on which V1 is fitted; the small LLaMA has its own")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="number of its tokens to read")
    parser.add_argument("--smoke", action="store_true", help="few tokens of calibration and of held-out text")
    arguments = parser.parse_args(argv)
    if arguments.calibration is None and arguments.model == str(ASSETS):
        arguments.calibration = ASSETS / "calibration.txt"
    return arguments


def compare(arguments: argparse.Namespace, output: Path) -> None:
    """Converts, and prints the table of the models and how each continues the prompt."""
    console = Console(soft_wrap=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    table = Table(title_justify="left", title_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    generated = {}
    failed = []
    held_out = None
    original = None
    for name, folder, verdict, seconds in convert(arguments, output, console):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if held_out is None:
            config = model.config
            held_out = read_held_out(tokenizer, config.vocab_size, config.max_position_embeddings, arguments.held_out)
            table.title = f"One LLaMA and what becomes of it, on {held_out.name}, {held_out.num_tokens:,} tokens"
        logits = list(window_logits(model, held_out.windows))
        original = original or logits
        metrics = text_metrics(logits, held_out.windows, original)
        table.add_row(
            name,
            f"{model.num_parameters():,}",
            f"{sum(parameter.nbytes for parameter in model.parameters()) / 2**20:.1f}",
            f"{metrics.loss_nats:.3f}",
            f"{metrics.kl_nats:.4f}",
            f"{metrics.greedy_agreement:.1%}",
            smallest_and_largest_lambda(model),
            verdict,
            f"{seconds:.1f}",
        )
        generated[name] = generate(model, tokenizer, PROMPT)
        failed += [name] if verdict == "FAILED" else []
    Console(width=max(console.width, 140)).print(table)
    for name, text in generated.items():
        console.rule(name, align="left")
        console.print(text, markup=False, highlight=False)
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}; the check that failed stands above the table")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    logging.disable_progress_bar()
    inputs = [arguments.model, arguments.calibration, arguments.held_out]
    with (
        one_line_errors(__file__),
        tempfile.TemporaryDirectory() as folder,
        output_folder(arguments, RESULTS, inputs) as output,
    ):
        if arguments.smoke:
            smoke(arguments, Path(folder))
        compare(arguments, output)


if __name__ == "__main__":
    main()
