"""
The main job from end to end: a LLaMA becomes a DIFF V1 and a DIFF V2 checkpoint; all are verified and compared.

    python examples/quickstart.py
    python examples/quickstart.py --source meta-llama/Llama-3.2-1B --output out/llama-3.2-1b --text my_text.txt

Without options it takes the small trained LLaMA in examples/assets/tiny-llama and its texts, needs no network, about a
minute on two cores, and writes the checkpoints to out/quickstart. It can be repeated at will. V1 comes twice: as a
copy, and with its heads paired and o_proj refit on 16K tokens of calibration text (`--calibration` for another
source).
"""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import modeling_diff  # noqa: F401  registers the models with the auto classes
from conversion import convert_checkpoint, verify_checkpoint
from conversion.behaviour import Behaviour, greedy_agreement, kl_nats, loss_nats


ASSETS = Path(__file__).parent / "assets" / "tiny-llama"
PROMPT = "def read_lines(path):\n"
COLUMNS = ("model", "parameters", "MiB", "loss (nats)", "KL (nats)", "greedy agreement", "verified", "seconds")


def held_out_windows(tokenizer: PreTrainedTokenizerBase, text: Path, windows: int, length: int) -> list[torch.Tensor]:
    """`windows` evenly spaced stretches of the text, each (1, length) token ids."""
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < windows * length:
        raise SystemExit(f"{text}: {ids.shape[1]} tokens, and {windows * length} are needed; give a longer text")
    step = ids.shape[1] // windows
    return [ids[:, start : start + length] for start in range(0, windows * step, step)]


@torch.no_grad()
def read_text(model: PreTrainedModel, windows: list[torch.Tensor]) -> Behaviour:
    return Behaviour([model(ids).logits[0].float() for ids in windows], [])


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=str(ASSETS), help="folder or Hub id of a LLaMA")
    parser.add_argument("--output", type=Path, default=Path("out/quickstart"), help="where v1 and v2 are written")
    parser.add_argument("--text", type=Path, default=ASSETS / "heldout.txt", help="text for loss, KL and agreement")
    parser.add_argument("--calibration", type=Path, help="text on which V1 is fitted; the small LLaMA has its own")
    parser.add_argument("--windows", type=int, default=16, help="stretches of the text that are read")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    arguments = parser.parse_args()

    logging.disable_progress_bar()
    console = Console(soft_wrap=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.source)
    windows = held_out_windows(tokenizer, arguments.text, arguments.windows, arguments.length)
    table = Table(title="One LLaMA and what becomes of it", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    generated, original = {}, None
    if arguments.calibration is None and arguments.source == str(ASSETS):
        arguments.calibration = ASSETS / "calibration.txt"
    fit = {"calibration": arguments.calibration, "calibration_tokens": 16384, "stages": ("pairing", "refit")}
    conversions: list[tuple[str, str, dict]] = [("LLaMA", "", {}), ("DIFF V2, exact", "v2", {})]
    conversions += [("DIFF V1, copy", "v1", {"uncalibrated": True})]
    conversions += [("DIFF V1, paired and refit", "v1-fitted", fit)] if arguments.calibration else []
    for name, folder_name, options in conversions:
        start = time.perf_counter()
        folder, verdict = arguments.source, "-"
        if folder_name:
            folder = arguments.output / folder_name
            convert_checkpoint(arguments.source, folder, folder_name[:2], overwrite=True, **options)
            report = verify_checkpoint(folder, against=arguments.source)
            verdict = "yes" if report.passed else "FAILED"
            for check in report.checks:
                console.print(
                    f"{folder_name} {check.name}: {check.outcome}, {check.detail}", style="dim", highlight=False
                )
        seconds = time.perf_counter() - start
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        behaviour = read_text(model, windows)
        original = original or behaviour
        num_bytes = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
        table.add_row(
            name,
            f"{model.num_parameters():,}",
            f"{num_bytes:.1f}",
            f"{loss_nats(behaviour, windows):.3f}",
            f"{kl_nats(original, behaviour):.4f}",
            f"{greedy_agreement(original, behaviour):.1%}",
            verdict,
            f"{seconds:.1f}",
        )
        generated[name] = generate(model, tokenizer, PROMPT)
    Console(width=max(console.width, 124)).print(table)
    for name, text in generated.items():
        console.rule(name, align="left")
        console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
