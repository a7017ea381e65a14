"""
What a dtype and an attention implementation do to a model's logits, next to float64 and to another model's.

    python examples/studies/compare_precision.py out/v2 --against examples/assets/tiny-llama
    python examples/studies/compare_precision.py out/v2 --attention sdpa diff_triton --dtypes bfloat16 --device cuda
    TRITON_INTERPRET=1 python examples/studies/compare_precision.py out/v2 --attention diff_triton --dtypes float16

A row for each: the largest difference of logits from those of the same model in float64 through `sdpa` (with norms in
float32, as LLaMA's are in any dtype), KL in nats a token, the share of equal greedy tokens; and the same next to
`--against` in that dtype and implementation, or in `sdpa` where it lacks it. On text of the Python standard library.
"""

import argparse
import json
import sys
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
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.loading import load_tokenizer
from modeling_diff.experiments.output_files import add_overwrite, make_room


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
    found, expected = found.double(), expected.double()
    distributions = (found.log_softmax(-1), expected.log_softmax(-1))
    return {
        "largest": (found - expected).abs().max().item(),
        # Rounding alone may leave a mean of nothing below 0.
        "kl_nats": max(0.0, nn.functional.kl_div(*distributions, log_target=True, reduction="batchmean").item()),
        "greedy_agreement": (found.argmax(-1) == expected.argmax(-1)).double().mean().item(),
    }


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    ids = read_ids(arguments.checkpoint, arguments.text, arguments.tokens)
    folders = [folder for folder in (arguments.against, arguments.checkpoint) if folder]
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("--against", help="a LLaMA that it was converted from")
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager", "diff_auto"])
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--text", type=Path, help="UTF-8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    add_overwrite(parser)
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        if arguments.output:
            make_room([arguments.output], arguments.overwrite)
        rows = compare(arguments)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"compare_precision: {error}")
    show(rows)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        record = {"environment": environment(arguments.device), "tokens": arguments.tokens, "rows": rows}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
