"""
What a dtype and an attention implementation do to a model's logits, next to float64 and to another model's.

    python examples/studies/compare_precision.py --model out/v2 --against examples/assets/tiny-llama
    python examples/studies/compare_precision.py --smoke
    python examples/studies/compare_precision.py --model out/v2 --attention diff_triton --dtypes bfloat16 --device cuda
    TRITON_INTERPRET=1 python examples/studies/compare_precision.py --model out/v2 --attention diff_triton

A row for each: the largest difference of logits from those of the same model in float64 through `sdpa` (with norms in
float32, as LLaMA's are in any dtype), KL in nats/token, the share of equal greedy tokens; and the same next to
`--against` in that dtype and implementation, or in `sdpa` where it lacks it. On text of the Python standard library.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import modeling_diff  # noqa: F401  registers the models with the auto classes
from modeling_diff.analysis.needles import library_text
from modeling_diff.experiments.command_line import add_device, one_line_errors, script_parser
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.loading import load_tokenizer
from modeling_diff.experiments.output_files import add_output, output_folder


TINY_LLAMA = Path(__file__).parents[1] / "assets" / "tiny-llama"


def read_ids(checkpoint: str, text: Path | None, num_tokens: int) -> torch.Tensor:
    """(1, T) token ids."""
    content = library_text() if text is None else text.read_text(encoding="utf-8")
    ids = load_tokenizer(checkpoint)(content[: 40 * num_tokens], return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < num_tokens:
        raise ValueError(f"--tokens={num_tokens}: the text has {ids.shape[1]}; give a longer one")
    return ids[:, :num_tokens]


@torch.no_grad()
def logits_of(checkpoint: str, attention: str, dtype: torch.dtype, ids: torch.Tensor, device: str) -> torch.Tensor:
    """(T, V)."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()(input_ids=ids.to(device), use_cache=False).logits[0].cpu()


def differences(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    found = found.double()
    expected = expected.double()
    distributions = (found.log_softmax(-1), expected.log_softmax(-1))
    return {
        "largest": (found - expected).abs().max().item(),
        # Rounding alone may leave a mean of nothing below 0.
        "kl_nats": max(0.0, nn.functional.kl_div(*distributions, log_target=True, reduction="batchmean").item()),
        "greedy_agreement": (found.argmax(-1) == expected.argmax(-1)).double().mean().item(),
    }


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    ids = read_ids(arguments.model, arguments.text, arguments.tokens)
    folders = [folder for folder in (arguments.against, arguments.model) if folder]
    theirs: dict[tuple[str, str], torch.Tensor] = {}
    rows = []
    for folder in folders:
        exact = logits_of(folder, "sdpa", torch.float64, ids, arguments.device)
        for dtype in arguments.dtypes:
            for attention in arguments.attention:
                if folder == arguments.against and attention.startswith("diff_"):
                    continue
                found = logits_of(folder, attention, getattr(torch, dtype), ids, arguments.device)
                row = {"model": Path(folder).name, "dtype": dtype, "attention": attention}
                row["from float64"] = differences(found, exact)
                if folder == arguments.against:
                    theirs[dtype, attention] = found
                elif arguments.against:
                    other = theirs.get((dtype, attention), theirs.get((dtype, "sdpa")))
                    row["from --against"] = None if other is None else differences(found, other)
                rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("model", "dtype", "attention", title="logits, largest difference / KL (nats) / equal greedy tokens")
    columns = [name for name in ("from float64", "from --against") if any(name in row for row in rows)]
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        cells = [
            f"{found['largest']:.1e} / {found['kl_nats']:.1e} / {found['greedy_agreement']:.1%}" if found else "-"
            for found in map(row.get, columns)
        ]
        table.add_row(row["model"], row["dtype"], row["attention"], *cells)
    Console(width=120).print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", help="folder or Hub id")
    add("--against", help="folder or Hub id of the LLaMA that it was converted from")
    add("--attention", nargs="+", default=["sdpa", "eager", "diff_auto"], help="attention implementations")
    dtypes = ["float32", "bfloat16", "float16"]
    add("--dtypes", nargs="+", choices=dtypes, default=dtypes[:2], help="dtypes of the weights and the arithmetic")
    add("--tokens", type=int, default=512, help="number of tokens to read")
    add("--text", type=Path, help="UTF-8 text to read (default: Python's standard library)")
    add_device(parser)
    add_output(parser, "precision.json")
    add("--smoke", action="store_true", help="64 tokens of the small LLaMA of this repository")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.model = arguments.model or str(TINY_LLAMA)
        arguments.tokens = 64
    if arguments.model is None:
        parser.error("--model is needed, or --smoke")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    logging.disable_progress_bar()
    inputs = [arguments.model, arguments.against]
    with one_line_errors(__file__), output_folder(arguments, ["precision.json"], inputs) as output:
        rows = compare(arguments)
        record = {"environment": environment(arguments.device), "tokens": arguments.tokens, "rows": rows}
        (output / "precision.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    show(rows)


if __name__ == "__main__":
    main()
