"""
lm-evaluation-harness on converted checkpoints and LLaMA alike, through its Python API (`pip install lm-eval`).

    python examples/studies/evaluate_models.py --model out/v2 examples/assets/tiny-llama    # two tasks, offline
    python examples/studies/evaluate_models.py --model out/v2 --tasks hellaswag arc_easy --output out/evaluation
    python examples/studies/evaluate_models.py --smoke

Without --tasks: `recall`, multiple choice (which of four numbers said in the text belongs to a name; chance is 25 %),
and `held_out`, perplexity of a text file (lm-eval counts the bos that LLaMA tokenizers put before each document, too,
about 1 % here). lm-eval's own tasks are downloaded by it.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

import modeling_diff  # noqa: F401  registers the models with the auto classes
from modeling_diff.experiments.command_line import one_line_errors, script_parser
from modeling_diff.experiments.loading import load_tokenizer
from modeling_diff.experiments.output_files import add_output, output_folder


ASSETS = Path(__file__).parents[1] / "assets" / "tiny-llama"
NAMES = ("Oslo", "Lima", "Turin", "Boston", "Dakar", "Lisbon", "Kabul", "Sapporo", "Milan", "Tunis")
CHOICES = 4
PIECE_LINES = 40


def recall_documents(text: str, count: int, lines: int, seed: int) -> list[dict]:
    """Pieces of `lines` lines of text, in which four names get numbers; one is asked for, and the four are offered."""
    source = [line for line in text.splitlines() if line.strip()]
    draw = random.Random(seed)
    if len(source) < lines:
        raise ValueError(f"--text has {len(source)} lines that are not empty; {lines} are needed (--lines)")
    documents = []
    for _ in range(count):
        start = draw.randrange(len(source) - lines + 1)
        piece = source[start : start + lines]
        names = draw.sample(NAMES, CHOICES)
        numbers = [str(number) for number in draw.sample(range(1000, 10_000), CHOICES)]
        for name, number in zip(names, numbers, strict=True):
            piece.insert(draw.randrange(len(piece) + 1), f"The magic number of {name} is {number}.")
        answer = draw.randrange(CHOICES)
        prompt = "\n".join([*piece, f"The magic number of {names[answer]} is"])
        documents.append({"prompt": prompt, "choices": numbers, "answer": answer})
    return documents


def text_documents(text: str) -> list[dict]:
    lines = text.splitlines(keepends=True)
    return [{"text": "".join(lines[i : i + PIECE_LINES])} for i in range(0, len(lines), PIECE_LINES)]


def local_tasks(folder: Path, arguments: argparse.Namespace) -> list[dict]:
    """lm-eval's configurations of two tasks over JSON lines that are written to `folder`."""
    text = arguments.text.read_text(encoding="utf-8")
    documents = {
        "recall": recall_documents(text, arguments.documents, arguments.lines, arguments.seed),
        "held_out": text_documents(text)[: arguments.documents],
    }
    tasks = []
    for name, records in documents.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        files = {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")}
        tasks.append({"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"})
    tasks[0] |= {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    metrics = {"byte_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}
    tasks[1] |= {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in metrics.items()
        ],
    }
    return tasks


def evaluate(name: str, tokenizer: PreTrainedTokenizerBase, tasks: list, arguments: argparse.Namespace) -> dict:
    """{task: {metric: value}} of one model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype)).to(device).eval()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size)
    results = simple_evaluate(
        model=harness, tasks=tasks, limit=arguments.limit, bootstrap_iters=0, log_samples=False, verbosity="ERROR"
    )
    return {
        task: {key.split(",")[0]: value for key, value in numbers.items() if is_metric(key, value)}
        for task, numbers in results["results"].items()
    }


def is_metric(key: str, value: object) -> bool:
    return isinstance(value, int | float) and "," in key and "stderr" not in key


def print_table(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """As Markdown, a row a task and metric, a column a model."""
    models = list(results)
    print("| task | metric | " + " | ".join(models) + " |\n|" + "---|" * (2 + len(models)))
    for task, metrics in results[models[0]].items():
        for metric in metrics:
            values = [f"{results[model][task][metric]:.4f}" for model in models]
            print(f"| {task} | {metric} | " + " | ".join(values) + " |")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", nargs="+", help="folders or Hub ids")
    add("--tasks", nargs="+", help="tasks of lm-eval, instead of those made here")
    add("--text", type=Path, default=ASSETS / "heldout.txt", help="text for the tasks made here")
    add("--documents", type=int, default=200, help="documents of each task made here")
    add("--lines", type=int, default=16, help="lines of text around the four numbers")
    add("--limit", type=int, help="documents per task")
    add("--batch-size", type=int, default=8, help="documents per forward pass")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="dtype of the models")
    add_output(parser, "evaluation.json")
    add("--seed", type=int, default=0, help="seed of the tasks made here")
    add("--smoke", action="store_true", help="the small LLaMA on a few documents")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.model = arguments.model or [str(ASSETS)]
        arguments.documents = 4
    if not arguments.model:
        parser.error("--model is needed, or --smoke")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        sys.exit("evaluate_models: lm-evaluation-harness is not installed: pip install lm-eval")
    logging.set_verbosity_error()
    with (
        one_line_errors(__file__),
        output_folder(arguments, ["evaluation.json"], arguments.model) as output,
        tempfile.TemporaryDirectory() as folder,
    ):
        tasks = arguments.tasks or local_tasks(Path(folder), arguments)
        tokenizers = {name: load_tokenizer(name) for name in arguments.model}
        results = {name: evaluate(name, tokenizer, tasks, arguments) for name, tokenizer in tokenizers.items()}
        (output / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_table(results)


if __name__ == "__main__":
    main()
