"""What a LLaMA and differential models attend to, retrieve and withstand, side by side in one report.

Needle retrieval, attention to the answer, outliers, quantized attention, order of demonstrations and scores of heads,
measured alike on every model; the tokenizer and the text are the first model's.

    python examples/studies/compare_models.py examples/assets/tiny-llama out/v1 out/v2 --report out/report.html
    python examples/studies/compare_models.py LLAMA DIFF --report out/report.html --text book.txt --samples 50
    python examples/studies/compare_models.py --smoke      # this repository's model, converted

A model of this repository's size takes about a minute on one thread. Beside the report lie its numbers as JSON; with
`--work`, finished cells of the needle grid are kept, and the same command goes on from them.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import modeling_diff  # noqa: F401 (registers the models)
from conversion.convert import convert_checkpoint
from modeling_diff.analysis.needles import library_text
from modeling_diff.analysis.report_measurements import default_effort, kind_of, measure_model
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.loading import load_tokenizer
from modeling_diff.experiments.output_files import add_overwrite, room_or_exit


try:
    from modeling_diff.analysis.report import render, save_figures
except ImportError as error:
    sys.exit(f"compare_models: {error}")


EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny-llama"
SMOKE = {
    "lengths_tokens": (128, 160), "depths": (0.0, 1.0), "counts": ((1, 1), (2, 2)), "samples": 1,
    "attention_samples": 1, "text_rows": 2, "head_rows": 1, "head_prompts": 1, "bits": (8, 4),
    "quantized_prompts": 1, "shots": (4, 8), "sets": 1, "orders": 2,
}  # fmt: skip


def read_text(folder, path):
    """The text given, or what lies beside the first model, or the standard library's sources."""
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


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="folders: a LLaMA, then differential models")
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("out/compare_models.html"),
        help="HTML file to write, with its numbers next to it as JSON (default: %(default)s)",
    )
    add_overwrite(parser)
    parser.add_argument("--labels", nargs="+", help="what to call the models (default: their folders' names)")
    parser.add_argument("--text", type=Path, help="what needles lie in (default: heldout.txt of the first model)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="tokens of a needle prompt (default: shares of the context)"
    )
    parser.add_argument("--samples", type=int, default=6, help="needle prompts a cell (the paper has 50)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--work", type=Path, help="folder for finished needle cells")
    parser.add_argument("--figures", type=Path, help="folder for the plots as PNG files, too")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a few prompts; without models, the embedded one converted"
    )
    args = parser.parse_args(argv)
    if not args.models and not args.smoke:
        parser.error("name a LLaMA and one or more differential models, or --smoke")
    missing = [str(folder) for folder in args.models if not (folder / "config.json").is_file()]
    if missing:
        parser.error(f"{', '.join(missing)}: no config.json there; give folders of checkpoints")
    if args.labels and len(set(args.labels)) != len(args.models):
        parser.error(f"--labels: {len(args.models)} different names, one a model")
    return args


def main(argv=None):
    args = parse_args(argv)
    room_or_exit([args.report, args.report.with_suffix(".json")], args.overwrite or not args.models)
    with tempfile.TemporaryDirectory() as converted:
        folders = args.models
        if not folders:
            folders = [EMBEDDED, Path(converted) / "v1-copy", Path(converted) / "v2-exact"]
            convert_checkpoint(EMBEDDED, folders[1], "v1", uncalibrated=True, measure=False)
            convert_checkpoint(EMBEDDED, folders[2], "v2", measure=False)
        try:
            args.report.parent.mkdir(parents=True, exist_ok=True)
            data = compare(folders, args)
        except (OSError, ValueError) as error:
            sys.exit(f"compare_models: {error}")
    args.report.with_suffix(".json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    args.report.write_text(render(data), encoding="utf-8")
    if args.figures:
        save_figures(data["models"], args.figures)
    print(f"{args.report} and {args.report.with_suffix('.json')}")


if __name__ == "__main__":
    main()
