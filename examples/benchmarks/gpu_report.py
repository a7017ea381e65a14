"""
Everything worth doing on a GPU, in one command and under nine minutes: tests, accuracy, speed, fine-tuning.

    python examples/benchmarks/gpu_report.py --output examples/results/gpu

1. `pytest -m gpu`, in several processes where pytest-xdist is installed, as most of its time is compilation: the
   kernels' outputs and gradients against float64, and what of transformers needs a GPU.
2. attention.py and model.py in bfloat16: each checks correctness before it prints any time. Their ratios stand next to
   the limits that were counted for them.
3. LoRA and full fine-tuning of a model of Llama-3.2-1B's shape with random weights, on Python's standard library read
   as bytes: loss, tokens per second and peak memory of DIFF V1, exact V2 and LLaMA. Every loss is to fall.
4. compare_lora.py: what LoRA learns on the trained LLaMA of this repository and on its conversions.

Prints a table and writes report.json after every part, next to the folder `parts` with the results and logs of each;
parts that failed say so and do not stop the others, and none takes more than its share of the time that is left.
`--parts` chooses. `--smoke` tries all of it on a CPU in a few
minutes with tiny models, where its times mean nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import get_peft_model
from timing import synchronize
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM
from modeling_diff.experiments.command_line import add_device, one_line_errors, script_parser
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.output_files import add_output, output_folder
from modeling_diff.training import lora_config


EXAMPLES = Path(__file__).parents[1]
# The parts in their order, and what share of the time they may take.
SHARES = {"tests": 5, "attention": 5, "model": 2, "compiled": 3, "memory": 2, "lora": 2, "fine_tuning": 2}
# Of V1 over LLaMA: time, counted from products, exponentials and bytes; for whole models tokens per second.
ATTENTION_LIMITS = {"forward": 1.5, "backward": 1.1, "decode": 1.05}
MODEL_LIMITS = {"prefill": 0.95, "decode": 0.97, "compiled decode": 0.97, "training": 0.97}
ONE_BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "heads": 32, "kv_heads": 8}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "heads": 4, "kv_heads": 2}


def build(name: str, shape: dict[str, int], dtype: torch.dtype, device: str, implementation: str | None):
    """LLaMA, or DIFF of its parameter count (V1) or converted shape (V2), reading bytes."""
    heads, kv_heads = shape["heads"], shape["kv_heads"]
    sizes = {key: value for key, value in shape.items() if key not in ("heads", "kv_heads")}
    sizes |= {"vocab_size": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    torch.manual_seed(0)
    if name == "llama":
        config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, **sizes)
        return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").to(device)
    if name == "v1":
        heads, kv_heads = heads // 2, kv_heads // 2
    config = DiffLlamaConfig(variant=name, num_attention_heads=heads, num_key_value_heads=kv_heads, **sizes)
    chosen = {} if implementation is None else {"attn_implementation": implementation}
    return DiffLlamaForCausalLM._from_config(config, dtype=dtype, **chosen).to(device)


def read_bytes(num_bytes: int) -> torch.Tensor:
    """The first bytes of the standard library's sources, as token ids (N,)."""
    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= num_bytes:
            break
    return torch.frombuffer(bytearray(text[:num_bytes]), dtype=torch.uint8).long()


def fine_tune(
    model: PreTrainedModel, ids: torch.Tensor, batch_size: int, length: int, steps: int, learning_rate: float
) -> dict[str, float]:
    """Loss at the first and over the last steps, tokens per second after the first step, peak bytes (CUDA)."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model.train()
    losses = []
    for step in range(steps):
        starts = torch.randint(len(ids) - length, (batch_size,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([ids[start : start + length] for start in starts]).to(device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step == 0:
            synchronize(device.type)
            start_time = time.perf_counter()
    synchronize(device.type)
    seconds = time.perf_counter() - start_time
    return {
        "first_loss": losses[0].item(),
        "last_loss": torch.stack(losses[-5:]).mean().item(),
        "tokens_per_second": (steps - 1) * batch_size * length / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def fine_tuning(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """LoRA and full fine-tuning of each model; DIFF by its default, the fused kernels, and by the standard call."""
    shape, dtype = (TINY, torch.float32) if arguments.smoke else (ONE_BILLION, torch.bfloat16)
    batch_size, length, steps = (2, 64, 8) if arguments.smoke else (4, 2048, 25)
    ids = read_bytes(200_000 if arguments.smoke else 8_000_000)
    results = {}
    for method in ("lora", "full"):
        for name, implementation in arguments.models:
            model = build(name, shape, dtype, arguments.device, implementation)
            model.gradient_checkpointing_enable()
            if method == "lora":
                model.enable_input_require_grads()
                model = get_peft_model(model, lora_config(model))
            label = f"{method} {name} {implementation or 'default'}"
            rate = 1e-3 if method == "lora" or arguments.smoke else 2e-5
            results[label] = fine_tune(model, ids, batch_size, length, steps, rate)
            results[label]["loss_fell"] = results[label]["last_loss"] < results[label]["first_loss"]
            del model
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
    return results


def run(command: list[str], log: Path, seconds: float) -> str:
    """Runs a part in a process of its own, its output kept in `log`. Returns "ok" or how it ended."""
    with open(log, "w") as file:
        # A session of its own, so that what it has started ends with it.
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = stop(process)
    print(log.read_text()[-6000:], flush=True)
    return "ok" if code == 0 else f"stopped after {seconds:.0f} s" if code is None else f"failed with exit code {code}"


def stop(process: subprocess.Popen) -> None:
    """Interrupts the process and all that it started, ten seconds before it kills them."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def against_limits(folder: Path) -> list[str]:
    """Returns a line for each ratio of times with a limit: the least and largest of all shapes, and the verdict."""
    found: dict[str, tuple[list[float], float]] = {}
    for path in sorted(folder.glob("attention_*.json")):
        rows = [row for row in json.loads(path.read_text())["rows"] if row["form"] == "triton"]
        for phase, limit in ATTENTION_LIMITS.items():
            ratios = [row["ratio_to_same_kernel"] for row in rows if row["phase"] == phase]
            found[f"attention, {phase}, over LLaMA through the same kernel"] = ratios, limit
        ratios = [row["ratio_to_llama"] for row in rows if row["phase"] == "forward"]
        found["attention, forward, over LLaMA's fastest backend"] = ratios, 2.0
    for path in (*sorted(folder.glob("model_compiled_*.json")), *sorted(folder.glob("model_time_*.json"))):
        for phase, times in json.loads(path.read_text())["seconds"].items():
            found[f"model, {phase}, over LLaMA"] = [times["v1"] / times["llama"]], 1 / MODEL_LIMITS[phase]
            found[f"model, {phase}, over transformers' DiffLlama"] = [times["v1"] / times["stock diffllama"]], 1.0
    lines = []
    for name, (ratios, limit) in found.items():
        if ratios:
            verdict = "kept" if max(ratios) <= limit else "MISSED"
            lines.append(f"{name}: {min(ratios):.3f} to {max(ratios):.3f}, limit {limit:.3f}: {verdict}")
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add_output(parser, "report.json and the results of every part", "gpu_report")
    add_device(parser)
    parser.add_argument("--minutes", type=float, default=9, help="time for all parts together")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES), help="parts to run")
    parser.add_argument("--smoke", action="store_true", help="tiny models, on a CPU as well")
    parser.add_argument("--fine-tune-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.models = [("llama", None), ("v1", None), ("v2", None)]
    if arguments.device == "cuda":
        arguments.models += [("v1", "sdpa"), ("v2", "sdpa")]
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.device == "cpu" and not arguments.smoke:
        sys.exit("gpu_report: there is no CUDA GPU here; --smoke tries the script on a CPU")
    results = ["fine_tuning.json"] if arguments.fine_tune_only else ["report.json", "parts"]
    with one_line_errors(__file__), output_folder(arguments, results) as folder:
        if arguments.fine_tune_only:
            (folder / "fine_tuning.json").write_text(json.dumps(fine_tuning(arguments), indent=1) + "\n")
            return
        record = run_parts(arguments, folder)
    report(record)


def run_parts(arguments: argparse.Namespace, folder: Path) -> dict:
    """Runs the parts one after another; returns the record, which report.json has after every one."""
    parts = folder / "parts"
    parts.mkdir()
    commands = part_commands(arguments, parts)
    deadline = time.monotonic() + 60 * arguments.minutes
    record: dict = {"environment": environment(arguments.device), "parts": {}, "seconds": {}, "fine_tuning": {}}
    for index, name in enumerate(arguments.parts):
        share = SHARES[name] / sum(SHARES[later] for later in arguments.parts[index:])
        start = time.monotonic()
        record["parts"][name] = run(commands[name], parts / f"{name}.log", share * (deadline - start))
        record["seconds"][name] = time.monotonic() - start
        record["limits"] = against_limits(parts)
        if name == "fine_tuning" and record["parts"][name] == "ok":
            record["fine_tuning"] = json.loads((parts / "fine_tuning.json").read_text())
        (folder / "report.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def part_commands(arguments: argparse.Namespace, output: Path) -> dict[str, list[str]]:
    """Returns what python runs for each part, with `output` for the results."""
    out = ["--output", str(output), "--device", arguments.device]
    if arguments.smoke:
        out.append("--smoke")
    dtype = ["--dtype", "float32" if arguments.smoke else "bfloat16"]
    model = [str(EXAMPLES / "benchmarks/model.py"), *dtype, *out, "--length", "4096"]
    attention = [str(EXAMPLES / "benchmarks/attention.py"), *dtype, *out, "--rounds", "5"]
    in_parallel = ["-n", str(min(12, os.cpu_count() or 1))] if find_spec("xdist") else []
    return {
        "tests": ["-m", "pytest", "-q", "-m", "gpu", *in_parallel, str(EXAMPLES.parent / "tests")],
        "attention": [*attention, "--lengths", "4096", "16384", "1024"],  # in this order, should time run out
        "model": model,
        "compiled": [*model, "--compile"],
        "memory": [*model, "--memory"],
        "lora": [str(EXAMPLES / "studies/compare_lora.py"), *out],
        "fine_tuning": [__file__, "--fine-tune-only", *out],
    }


def report(record: dict) -> None:
    """The tables, and exit code 1 if a part failed or a loss did not fall. Limits are for the reader."""
    print(f"{'':>24} {'first loss':>10} {'last loss':>10} {'tokens/s':>10} {'peak GiB':>9}")
    for label, r in record["fine_tuning"].items():
        print(
            f"{label:>24} {r['first_loss']:10.3f} {r['last_loss']:10.3f} {r['tokens_per_second']:10.0f} "
            f"{r['peak_bytes'] / 2**30:9.2f}"
        )
    print(*record["limits"], sep="\n")
    for name, outcome in record["parts"].items():
        print(f"{name}: {outcome}, {record['seconds'][name]:.0f} s")
    failed = [name for name, outcome in record["parts"].items() if outcome != "ok"]
    failed += [label for label, r in record["fine_tuning"].items() if not r["loss_fell"]]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
