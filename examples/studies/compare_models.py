"""What a LLaMA and differential models attend to, retrieve and withstand, side by side in one report.

Needle retrieval, attention to the answer, outliers, quantized attention, order of demonstrations and scores of heads,
measured alike on every model; the tokenizer and the text are the first model's.

    python examples/studies/compare_models.py --model examples/assets/tiny-llama out/v1 out/v2 --output out/compared
    python examples/studies/compare_models.py --model LLAMA DIFF --output out/compared --text book.txt --samples 50
    python examples/studies/compare_models.py --smoke      # this repository's model, converted

A model of this repository's size takes about a minute on one thread. Writes report.html, its numbers as
report.json and its plots in `figures`; with `--work`, finished cells of the needle grid are kept, and the same command
continues from them.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import modeling_diff  # noqa: F401 (registers the models)
from conversion.convert import convert_checkpoint
from modeling_diff.analysis.needles import library_text
from modeling_diff.analysis.report_measurements import default_effort, kind_of, measure_model
from modeling_diff.experiments.command_line import add_device, one_line_errors, script_parser
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.loading import load_tokenizer
from modeling_diff.experiments.output_files import add_output, output_folder


try:
    from modeling_diff.analysis.report import render, save_figures
except ImportError as error:
    sys.exit(f"compare_models: {error}")


EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny-llama"
SMOKE = {
    "lengths_tokens": (128, 160),
    "depths": (0.0, 1.0),
    "counts": ((1, 1), (2, 2)),
    "samples": 1,
    "attention_samples": 1,
    "text_rows": 2,
    "head_rows": 1,
    "head_prompts": 1,
    "bits": (8, 4),
    "quantized_prompts": 1,
    "shots": (4, 8),
    "sets": 1,
    "orders": 2,
}


def read_text(folder, path):
    """Returns the text given, or heldout.txt next to the first model, or the standard library's sources."""
    path = path or (folder / "heldout.txt" if (folder / "heldout.txt").exists() else None)
    return path.read_text(encoding="utf-8") if path else library_text()


def load_model(folder, args):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    heads = getattr(model.config, "num_attention_heads", 0)
    numbers = {"kind": kind_of(model), "parameters": model.num_parameters(), "heads_per_layer": heads}
    return model, numbers | {"layers": model.config.num_hidden_layers}


def measure(folder, label, tokenizer, text, effort, args):
    """All of one model's numbers."""
    began = time.monotonic()
    model, numbers = load_model(folder, args)
    numbers = {"label": label, **numbers}
    needle_file = args.work / f"needles-{label}.jsonl" if args.work else None
    for section, found in measure_model(model, tokenizer, text, effort, label=label, needle_file=needle_file):
        numbers[section] = found
        print(f"{label}: {section}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return numbers | {"seconds": time.monotonic() - began}


def labels_of(folders):
    """Names of folders, with their parents where names alone are not different."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    return [f"{folder.resolve().parent.name}-{folder.resolve().name}" for folder in folders]


def compare(folders, args):
    """The numbers of every model, and what they were measured with."""
    tokenizer = load_tokenizer(str(folders[0]))
    text = read_text(folders[0], args.text)
    contexts = [json.loads((f / "config.json").read_text())["max_position_embeddings"] for f in folders]
    given = {"samples": args.samples, "seed": args.seed, "batch_size": args.batch_size}
    given |= {"lengths_tokens": tuple(args.lengths)} if args.lengths else {}
    effort = default_effort(min(contexts), tokenizer, **(given | (SMOKE if args.smoke else {})))
    labels = args.labels or labels_of(folders)
    models = [measure(*pair, tokenizer, text, effort, args) for pair in zip(folders, labels, strict=True)]
    return {"environment": environment(args.device), "dtype": args.dtype, "effort": asdict(effort), "models": models}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", type=Path, nargs="+", default=[], help="folders: a LLaMA, then differential models")
    add_output(parser, "report.html, report.json and figures", "compare_models")
    add("--labels", nargs="+", help="what to call the models (default: their folders' names)")
    add("--text", type=Path, help="text that needles lie in (default: heldout.txt of the first model)")
    add("--lengths", type=int, nargs="+", help="tokens of a needle prompt (default: shares of the context)")
    add("--samples", type=int, default=6, help="needle prompts per cell (the paper has 50)")
    add("--batch-size", type=int, default=8, help="prompts per forward pass")
    add("--work", type=Path, help="folder for finished needle cells")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="dtype of the models")
    add_device(parser)
    add("--seed", type=int, default=0, help="seed of the prompts")
    add("--smoke", action="store_true", help="a few prompts; without --model, conversions of the small LLaMA")
    args = parser.parse_args(argv)
    if not args.model and not args.smoke:
        parser.error("--model is needed, a LLaMA and one or more differential models, or --smoke")
    missing = [str(folder) for folder in args.model if not (folder / "config.json").is_file()]
    if missing:
        parser.error(f"{', '.join(missing)}: no config.json there; give folders of checkpoints")
    if args.labels and len(set(args.labels)) != len(args.model):
        parser.error(f"--labels: {len(args.model)} different names, one per model")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    results = ["report.html", "report.json", "figures"]
    with (
        one_line_errors(__file__),
        output_folder(args, results, args.model) as output,
        tempfile.TemporaryDirectory() as converted,
    ):
        folders = args.model
        if not folders:
            folders = [EMBEDDED, Path(converted) / "v1-copy", Path(converted) / "v2-exact"]
            convert_checkpoint(EMBEDDED, folders[1], "v1", uncalibrated=True, measure=False)
            convert_checkpoint(EMBEDDED, folders[2], "v2", measure=False)
        data = compare(folders, args)
        (output / "report.json").write_text(json.dumps(data) + "\n", encoding="utf-8")
        (output / "report.html").write_text(render(data), encoding="utf-8")
        save_figures(data["models"], output / "figures")
    print(args.output / "report.html")


if __name__ == "__main__":
    main()
