"""
What a calibration of V1 takes and reaches: CPU time by stage, peak memory, loss and KL on held-out text.

    python examples/benchmarks/calibration.py --tokens 16384 --output out/calibration
    python examples/benchmarks/calibration.py --model out/smollm2 --text text.txt --held-out other.txt --layers 28,29
    python examples/benchmarks/calibration.py --effort thorough
    python examples/benchmarks/calibration.py --random-layers 3 --stages pairing,refit,values

Against another commit, here the one before calibrations were made faster:

    git worktree add out/before 5dc5cd9
    python examples/benchmarks/calibration.py --tokens 16384 --against out/before

Each run is a process of its own with one thread, and its CPU time counts, which other work on the machine changes
little. Checkouts take turns, medians are reported, and times are compared only if no checkout ends at a worse loss.
Both results are measured by this checkout on the same text. The estimate is that of `diff-llama convert --dry-run`.

R sequences, T tokens per sequence.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conversion.checkpoint.companions import read_tokenizer
from conversion.data.text import read_calibration
from conversion.evaluation.measurement import load_in_float32
from conversion.evaluation.metrics import text_metrics, window_logits
from conversion.options import EFFORTS, STAGES, parse_layers, parse_stages
from conversion.options.calibration import SELF
from conversion.source import open_source
from modeling_diff.experiments.command_line import one_line_errors, script_parser, typed_command
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.output_files import add_output, output_folder


RESULT = "calibration.json"
HERE = Path(__file__).resolve().parents[2]
EMBEDDED = HERE / "examples" / "assets" / "tiny-llama"
TOKENS = 16_384
TOLERANCE_NATS = 0.003  # of held-out loss, by which a faster calibration may end above the slower one
HELD_OUT_ROW = 512
SHAPE = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
SMOKE_SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
METRICS = ("loss_nats", "source_loss_nats", "kl_nats", "greedy_agreement")


def write_random(folder: Path, num_layers: int, shape: dict[str, int]) -> Path:
    """Writes a LLaMA of random weights with tiny-llama's tokenizer and texts, and returns its folder."""
    torch.manual_seed(0)
    embedded = LlamaConfig.from_pretrained(EMBEDDED)
    config = LlamaConfig(
        **shape,
        num_hidden_layers=num_layers,
        vocab_size=embedded.vocab_size,
        max_position_embeddings=embedded.max_position_embeddings,
        bos_token_id=embedded.bos_token_id,
        eos_token_id=embedded.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "calibration.txt", "heldout.txt"):
        shutil.copyfile(EMBEDDED / name, folder / name)
    return folder


def run(checkout: Path, source: Path, target: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Converts `source` to `target` in a process of its own, by the code of `checkout`; returns what it took."""
    script = Path(__file__).with_name("calibration_run.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(source), str(target), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        raise ValueError(f"{checkout}: its conversion failed: {finished.stderr.strip().rpartition(os.linesep)[2]}")
    result = json.loads(finished.stdout.splitlines()[-1])
    if Path(result.pop("package")).resolve() != checkout.resolve():
        raise ValueError(f"{checkout}: has no package `conversion`; give the root of a checkout of this repository")
    return result


class HeldOutText:
    """A source's logits on held-out text, and how near to them a conversion of it comes."""

    def __init__(self, source: Path, text: Path, num_tokens: int):
        opened = open_source(source)
        config = opened.model.config
        row_tokens = min(config.max_position_embeddings, HELD_OUT_ROW)
        rows = read_calibration(
            text, read_tokenizer(opened.folder), num_tokens, row_tokens, config.vocab_size, whole_if_shorter=True
        )
        self.windows = list(rows.split(1))
        self.source_logits = list(window_logits(load_in_float32(opened.folder, None, config), self.windows))

    def measure(self, converted: Path) -> dict[str, torch.Tensor]:
        """Returns each of METRICS for every window (R,)."""
        logits = window_logits(load_in_float32(converted, None), self.windows)
        found = [
            text_metrics([ours], [ids], [theirs])
            for ours, ids, theirs in zip(logits, self.windows, self.source_logits, strict=True)
        ]
        return {name: torch.tensor([getattr(metrics, name) for metrics in found]) for name in METRICS}


def summary(runs: Sequence[dict[str, Any]], metrics: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Returns medians over the runs of one checkout, and means over windows of what its result was measured to be."""
    seconds = statistics.median(run["seconds"] for run in runs)
    stages = {stage: statistics.median(run["stages"][stage] for run in runs) for stage in runs[0]["stages"]}
    stages["streams and files"] = seconds - sum(stages.values())
    result = {
        "stages": stages,
        "seconds": seconds,
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "left_out": runs[0]["left_out"],
    }
    if "estimated_seconds" in runs[0]:
        result["estimated_seconds"] = statistics.median(run["estimated_seconds"] for run in runs)
        result["estimated_peak_bytes"] = runs[0]["estimated_peak_bytes"]
        result["estimate_over_measured"] = result["estimated_seconds"] / seconds
    return result | {name: values.mean().item() for name, values in metrics.items()}


def loss_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Returns how far our loss is above theirs, and the standard error of that over windows, which both read."""
    differences = ours["loss_nats"] - theirs["loss_nats"]
    error = differences.std() / len(differences) ** 0.5 if len(differences) > 1 else torch.tensor(float("nan"))
    return {"nats": differences.mean().item(), "standard_error": error.item()}


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Runs every checkout in every round, and returns the record."""
    source = arguments.model
    if arguments.random_layers:
        shape = SMOKE_SHAPE if arguments.smoke else SHAPE
        source = write_random(work / "random", arguments.random_layers, shape)
    options = conversion_options(arguments, source)
    held_out = HeldOutText(source, arguments.held_out or source / "heldout.txt", arguments.held_out_tokens)
    checkouts = {"this checkout": HERE}
    if arguments.against:
        checkouts["against"] = arguments.against
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    metrics = {}
    for number in range(arguments.rounds):
        for name, checkout in checkouts.items():
            target = work / f"{name.replace(' ', '-')}-{number}"
            runs[name].append(run(checkout, source, target, options))
            print(f"round {number + 1}, {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
            if number == 0:  # the others end at the same bits
                metrics[name] = held_out.measure(target)
            shutil.rmtree(target)
    found = {name: summary(runs[name], metrics[name]) for name in checkouts}
    record = {
        "command": typed_command(__file__, arguments.argv),
        "environment": environment("cpu"),
        "options": options | {"calibration": Path(options["calibration"]).name},
        "held_out_tokens": sum(ids.numel() for ids in held_out.windows),
        "checkouts": found,
    }
    if arguments.against:
        record["loss_above_against"] = loss_difference(metrics["this checkout"], metrics["against"])
        record["share_of_time"] = found["this checkout"]["seconds"] / found["against"]["seconds"]
    return record


def conversion_options(arguments: argparse.Namespace, source: Path) -> dict[str, Any]:
    """Returns the arguments of `convert_checkpoint`: those that every checkout has to know, and those asked for."""
    text = arguments.text or str(source / "calibration.txt")
    options = {"calibration": text if text == SELF else str(Path(text).resolve()), "measure": False}
    asked = {
        "effort": arguments.effort,
        "calibration_tokens": arguments.tokens or (None if arguments.effort else TOKENS),
        "stages": arguments.stages,
        "layers": arguments.layers,
        "lambda_floor": arguments.lambda_floor,
        "pad_heads": arguments.pad_heads or None,
    }
    return options | {name: value for name, value in asked.items() if value is not None}


def print_table(record: dict[str, Any]) -> None:
    """Prints a column per checkout: what it reached, then what it took if the two may be compared."""
    checkouts = record["checkouts"]
    print(f"{'':>20}" + "".join(f" {name:>14}" for name in checkouts))
    for name in METRICS:
        print_row(name, [f"{found[name]:.4f}" for found in checkouts.values()])
    for name, found in checkouts.items():
        if found["left_out"]:
            print(f"{name} does not know, and ran without: {', '.join(found['left_out'])}")
    if difference := record.get("loss_above_against"):
        nats = difference["nats"]
        error = difference["standard_error"]
        print(f"loss above that of --against: {nats:.4f} nats/token, standard error {error:.4f}")
        if not nats <= TOLERANCE_NATS:
            sys.exit(f"That is more than {TOLERANCE_NATS} nats/token: times are not compared.")
    ours = checkouts["this checkout"]
    for stage in ours["stages"]:
        times = [found["stages"].get(stage, 0.0) for found in checkouts.values()]
        print_row(f"{stage} (s)", [f"{seconds:.1f}" for seconds in times], share_of(times))
    totals = [found["seconds"] for found in checkouts.values()]
    print_row("all (s)", [f"{seconds:.1f}" for seconds in totals], share_of(totals))
    peaks = [found["peak_bytes"] / 1e6 for found in checkouts.values()]
    print_row("peak memory (MB)", [f"{peak:.0f}" for peak in peaks], share_of(peaks))
    print(f"estimated: {ours['estimated_seconds']:.1f} s, {ours['estimate_over_measured']:.2f} of the time measured")


def share_of(numbers: Sequence[float]) -> str:
    """Returns the first number over the second, if there are two."""
    return f"{numbers[0] / numbers[1]:.2f}" if len(numbers) > 1 and numbers[1] else ""


def print_row(name: str, cells: Sequence[str], share: str = "") -> None:
    print(f"{name:>20}" + "".join(f" {cell:>14}" for cell in cells) + f" {share:>6}", flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", type=Path, default=EMBEDDED, help="folder of a LLaMA")
    add("--random-layers", type=int, help="a random LLaMA of a 0.5B model's shape with so many layers, not --model")
    add("--text", help="calibration text, or `self` (default: calibration.txt next to the model)")
    add("--effort", choices=list(EFFORTS), help="how much is done, in place of --tokens and --stages")
    add("--tokens", type=int, help=f"number of calibration tokens to read (default: {TOKENS}, or --effort's)")
    add("--held-out", type=Path, help="text to measure on (default: heldout.txt next to the model)")
    add("--held-out-tokens", type=int, default=24_576, help="number of held-out tokens to measure on")
    add("--stages", type=parse_stages, metavar=",".join(STAGES), help="stages to run (default: all)")
    add("--layers", type=parse_layers, metavar="0,4-7", help="layers to calibrate (default: all)")
    add("--lambda-floor", type=float, help="lowest lambda of any layer (default: the conversion's)")
    add("--pad-heads", action="store_true", help="add idle heads until heads and key-value heads pair")
    add("--against", type=Path, help="root of another checkout of this repository to compare with")
    add("--rounds", type=int, default=1, help="rounds of which the medians are taken")
    add_output(parser, RESULT)
    add("--smoke", action="store_true", help="a toy of a model, few tokens, no gradient stage")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.random_layers = 2
        arguments.tokens = 2048
        arguments.held_out_tokens = 1024
        arguments.stages = ["pairing", "refit"]
    arguments.argv = argv
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    with one_line_errors(__file__), output_folder(arguments, [RESULT], [arguments.model, arguments.text]) as folder:
        with TemporaryDirectory(prefix="calibration-") as work:
            record = measure(arguments, Path(work))
        (folder / RESULT).write_text(json.dumps(record, indent=1) + "\n")
        print_table(record)


if __name__ == "__main__":
    main()
