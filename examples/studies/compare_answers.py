"""
What several models answer to the same questions, side by side, to be read: greedy answers, and how many repeat lines.

    python examples/studies/compare_answers.py --model out/smollm2 out/smollm2-v2 out/smollm2-v1 \
        --questions out/smollm2/eval.jsonl --output out/answers
    python examples/studies/compare_answers.py --smoke

Questions are conversations (`messages`) in JSON lines, of which the last answer is left to the models, or documents
(`text`), of which they read the first half. The first model is compared with: `equal` counts the tokens of an answer
before the first that differs from its own.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import modeling_diff  # noqa: F401 (registers the models)
from conversion.evaluation.behavior import first_divergences, greedy_continuations
from conversion.evaluation.performance import repeated_line_rate
from modeling_diff.experiments.command_line import add_device, one_line_errors, script_parser, typed_command
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.loading import load_tokenizer
from modeling_diff.experiments.output_files import add_output, output_folder


TINY_LLAMA = Path(__file__).parents[1] / "assets" / "tiny-llama"
RESULTS = ("answers.json", "answers.md")
SMOKE = ("def mean(values):\n    return sum(values) / len(values)\n", "import os\nimport sys\n")


def read_records(questions: Path | None, count: int) -> list[dict[str, Any]]:
    """Returns the first `count` questions of a file, or those of --smoke."""
    if questions is None:
        return [{"text": text} for text in SMOKE]
    with questions.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, count)]
    if not records or any(not {"messages", "text"} & record.keys() for record in records):
        raise ValueError(f"{questions}: expected JSON lines with messages or text")
    return records


def prompt_of(record: dict[str, Any], tokenizer: Any) -> str:
    """Returns the text that the models continue."""
    if "messages" not in record:
        return record["text"][: len(record["text"]) // 2]
    return tokenizer.apply_chat_template(record["messages"][:-1], tokenize=False, add_generation_prompt=True)


def answer(folder: str, prompts: Sequence[str], tokenizer: Any, arguments: argparse.Namespace) -> list[list[int]]:
    """Returns the tokens of a model's greedy answers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(arguments.device).eval()
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(arguments.device)
        answers += greedy_continuations(model, ids, arguments.max_new_tokens)
    return answers


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Asks every model, and returns the record."""
    tokenizer = load_tokenizer(arguments.model[0])
    records = read_records(arguments.questions, arguments.samples)
    prompts = [prompt_of(record, tokenizer) for record in records]
    tokens = [answer(folder, prompts, tokenizer, arguments) for folder in arguments.model]
    names = [Path(folder).name for folder in arguments.model]
    # Answers end at different lengths; a missing token is one that differs.
    most = arguments.max_new_tokens
    padded = [[ids + [-1] * (most - len(ids)) for ids in answers] for answers in tokens]
    models = []
    for number, (name, answers) in enumerate(zip(names, tokens, strict=True)):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        equal = first_divergences(padded[0], padded[number])
        found = {"model": name, "equal": equal, "repeated": repeated_line_rate(texts)}
        models.append(found | {"answers": texts})
    return {"prompts": prompts, "max_new_tokens": most, "models": models}


def page(found: dict[str, Any]) -> str:
    """Returns the answers as a page of Markdown."""
    most = found["max_new_tokens"]
    lines = ["# Answers side by side", "", f"Greedy, at most {most} tokens.", ""]
    lines += ["| model | equal tokens, mean | repeated lines |", "|---|---|---|"]
    for model in found["models"]:
        mean = sum(model["equal"]) / len(model["equal"])
        lines.append(f"| {model['model']} | {mean:.0f} of {most} | {model['repeated']:.0%} |")
    for number, prompt in enumerate(found["prompts"]):
        lines += ["", f"## Question {number + 1}", "", "````text", prompt.rstrip("\n"), "````"]
        for model in found["models"]:
            lines += ["", f"**{model['model']}** ({model['equal'][number]} equal tokens)", ""]
            lines += ["````text", model["answers"][number].strip("\n"), "````"]
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", nargs="+", help="folders or Hub ids; the first one's tokenizer is used for all")
    add("--questions", type=Path, help="JSON lines with messages or text")
    add("--samples", type=int, default=8, help="number of questions")
    add("--max-new-tokens", type=int, default=96, help="tokens per answer at most")
    add_device(parser)
    add_output(parser, "answers.json and answers.md")
    add("--smoke", action="store_true", help="two short questions to the small LLaMA of this repository")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.model = arguments.model or [str(TINY_LLAMA)] * 2
        arguments.max_new_tokens = 8
    if not arguments.model or not (arguments.questions or arguments.smoke):
        parser.error("--model and --questions are needed, or --smoke")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    logging.disable_progress_bar()
    inputs = [*arguments.model, arguments.questions]
    with one_line_errors(__file__), output_folder(arguments, RESULTS, inputs) as output:
        found = compare(arguments)
        record = {"command": typed_command(__file__, argv), "environment": environment(arguments.device), **found}
        (output / "answers.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (output / "answers.md").write_text(page(found), encoding="utf-8")
    print("\n".join(page(found).split("\n## ")[0].splitlines()[4:]))


if __name__ == "__main__":
    main()
