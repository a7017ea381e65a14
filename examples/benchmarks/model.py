"""
Whole-model time and memory: ours, LLaMA of the same size, and transformers' own DiffLlama.

    python examples/benchmarks/model.py --dtype float32 --output out/model

Prefill, decode of one token after it, and a training step, each in milliseconds and as a ratio to LLaMA through its
best stock attention (sdpa), rounds interleaved in one process. `v1 sdpa` is our model through one standard call,
what every backend of transformers gives; `v1` takes the default path of the device. On a CPU a model of four layers
reads one prompt; on a GPU one of eight layers of Llama-3.2-1B's width reads four. `--compile` measures decode with a
static cache instead, compiled, on a GPU in CUDA graphs, as `generate` does it there.

Before any time is printed, logits and gradients of every path are compared with the definition (`eager`) in float32,
in which the fused kernels run when asked by name; if they differ, no speed is printed.
Weights of equal shape are the same tensors in all models: where they lie in memory is worth 5 % of a decoding step.
`--memory` measures the peak of a training step, each model in a process of its own.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from timing import keep_freed_memory, time_interleaved
from transformers import DiffLlamaConfig as StockDiffLlamaConfig
from transformers import DiffLlamaForCausalLM as StockDiffLlama
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM
from modeling_diff.diff_attention_triton import triton_can_run
from modeling_diff.diff_transformers_compat import cache_argument, output_cache
from modeling_diff.experiments.command_line import add_device, one_line_errors, script_parser
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.output_files import add_output, output_folder


SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "max_position_embeddings": 65536,
}
GPU_SHAPE = SHAPE | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8}
SMOKE_SHAPE = SHAPE | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
DECODED = 4  # tokens a round
Seconds = dict[str, dict[str, float]]  # by phase and model
MODELS = ["llama", "v1", "v2", "v1 sdpa", "stock diffllama"]


def build(name: str, shape: dict[str, int], dtype: torch.dtype, device: str) -> PreTrainedModel:
    """LLaMA with heads of 64 and two queries per key, and the others at its parameter count (V2 has more queries)."""
    heads = shape["hidden_size"] // 64
    torch.manual_seed(0)
    if name == "llama":
        config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=heads // 2, **shape)
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
    elif name == "stock diffllama":
        config = StockDiffLlamaConfig(num_attention_heads=heads, num_key_value_heads=heads // 2, **shape)
        model = StockDiffLlama._from_config(config, attn_implementation="sdpa", dtype=dtype)
    else:
        variant, _, implementation = name.partition(" ")
        if variant == "v1":
            heads //= 2
        config = DiffLlamaConfig(variant=variant, num_attention_heads=heads, num_key_value_heads=heads // 2, **shape)
        chosen = {"attn_implementation": implementation} if implementation else {}
        model = DiffLlamaForCausalLM._from_config(config, dtype=dtype, **chosen)
    return model.to(device)


def build_all(shape: dict[str, int], dtype: torch.dtype, device: str) -> dict[str, PreTrainedModel]:
    """Every model of MODELS; weights that have the same name and shape in LLaMA are LLaMA's tensors."""
    models = {name: build(name, shape, dtype, device) for name in MODELS}
    llama = models["llama"].state_dict()
    for name, model in models.items():
        if name != "llama":
            own = model.state_dict()
            equal = {key: value for key, value in llama.items() if key in own and own[key].shape == value.shape}
            model.load_state_dict(equal, strict=False, assign=True)
    return models


def check(shape: dict[str, int], device: str) -> float:
    """
    Largest difference in logits and gradients, relative to the largest value, of each path from `eager`.

    The gradient of V1's lambda, one sum over all tokens that cancels, counts a hundredth: its summands are larger.
    """
    paths = ["diff_auto", "sdpa"] + (["diff_triton"] if triton_can_run(device) is None else [])
    worst = 0.0
    for name in ("v1", "v2"):
        model = build(name, shape, torch.float32, device)
        ids = torch.randint(shape["vocab_size"], (2, 200), device=device)
        results = []
        for implementation in ("eager", *paths):
            model.set_attn_implementation(implementation)
            model.zero_grad()
            output = model(ids, labels=ids)
            output.loss.backward()
            gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
            results.append({"logits": output.logits.detach()} | gradients)
        for of_path, (key, expected) in product(results[1:], results[0].items()):
            difference = ((of_path[key] - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
            worst = max(worst, difference / 100 if ".diff_lambda." in key else difference)
    return worst


def training_step(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def decode(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> None:
    """Steps of one token each after a filled cache, which is put back as it was."""
    for _ in range(DECODED):
        model(ids[:, :1], logits_to_keep=1, **cache_argument(cache))
    cache.crop(-DECODED)


def compiled_decode(model: PreTrainedModel, prompt: torch.Tensor, rounds: int) -> Callable[[], None]:
    """The same compiled, on the way through a static cache that is long enough for `rounds` after the first two."""
    cache = StaticCache(model.config, max_cache_len=prompt.shape[1] + DECODED * (rounds + 2))
    model(prompt, logits_to_keep=1, **cache_argument(cache))
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    token = prompt[:, :1].clone()

    def run() -> None:
        for _ in range(DECODED):
            step(input_ids=token, logits_to_keep=1, **cache_argument(cache))

    run()
    return run


def time_decoding(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds per token."""
    return {name: value / DECODED for name, value in time_interleaved(steps, rounds, device).items()}


def make_prompt(models: dict[str, PreTrainedModel], length: int, device: str) -> torch.Tensor:
    vocab_size = next(iter(models.values())).config.vocab_size
    return torch.randint(vocab_size, (1 if device == "cpu" else 4, length), device=device)


def measure(models: dict[str, PreTrainedModel], length: int, rounds: int, device: str) -> Seconds:
    """Median seconds of each phase and model: a prompt, decode after it, training on two texts."""
    prompt = make_prompt(models, length, device)
    batch = make_prompt(models, length, device).view(2, -1) if device == "cpu" else prompt[:2]
    seconds = {}
    with torch.no_grad():
        prefill = {name: (lambda m=model: m(prompt, logits_to_keep=1)) for name, model in models.items()}
        seconds["prefill"] = time_interleaved(prefill, rounds, device)
        caches = {name: output_cache(model(prompt, logits_to_keep=1)) for name, model in models.items()}
        steps = {name: (lambda m=model, n=name: decode(m, prompt, caches[n])) for name, model in models.items()}
        seconds["decode"] = time_decoding(steps, 3 * rounds, device)
    training = {name: (lambda m=model: training_step(m, batch)) for name, model in models.items()}
    seconds["training"] = time_interleaved(training, rounds, device)
    return seconds


@torch.no_grad()
def measure_compiled(models: dict[str, PreTrainedModel], length: int, rounds: int, device: str) -> Seconds:
    """Median seconds of a step of decoding, compiled."""
    prompt = make_prompt(models, length, device)
    steps = {name: compiled_decode(model, prompt, 3 * rounds) for name, model in models.items()}
    return {"compiled decode": time_decoding(steps, 3 * rounds, device)}


def peak_training_bytes(arguments: argparse.Namespace) -> int:
    """Returns what one training step of 1 x length adds to the memory of the loaded model, at its peak."""
    shape = arguments.shape
    device = arguments.device
    model = build(arguments.peak_of, shape, getattr(torch, arguments.dtype), device)
    training_step(model, torch.randint(shape["vocab_size"], (1, 16), device=device))
    ids = torch.randint(shape["vocab_size"], (1, arguments.length), device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        training_step(model, ids)
        return torch.cuda.max_memory_allocated() - before
    # A peak before this one, such as of building the model, would hide as much of it.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    training_step(model, ids)
    return resident_bytes("VmHWM") - before


def resident_bytes(name: str) -> int:
    """VmRSS, the memory now resident, or VmHWM, its peak since the last reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{name}:"))


def memory_table(arguments: argparse.Namespace) -> dict[str, int]:
    """Peak bytes of each model's training step, in a process of its own."""
    peaks = {}
    for name in MODELS:
        command = [
            sys.executable,
            __file__,
            "--peak-of",
            name,
            "--dtype",
            arguments.dtype,
            "--device",
            arguments.device,
        ]
        command += ["--length", str(arguments.length)] + (["--smoke"] if arguments.smoke else [])
        peaks[name] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return peaks


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add_device(parser)
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="dtype of the models")
    add("--length", type=int, default=1024, help="tokens of a prompt; a CPU trains on 2 x half of it")
    add("--rounds", type=int, default=15, help="interleaved rounds of which the median is taken")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--compile", action="store_true", help="compiled decode instead, half a minute per model")
    instead.add_argument("--memory", action="store_true", help="peak memory of a training step instead of times")
    add_output(parser, "model_<kind>_<dtype>_<length>.csv and .json")
    add("--smoke", action="store_true", help="a small model, in seconds")
    add("--peak-of", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.shape = GPU_SHAPE if arguments.device == "cuda" else SHAPE
    if arguments.smoke:
        arguments.shape = SMOKE_SHAPE
        arguments.length = min(arguments.length, 64)
        arguments.rounds = 2
    arguments.kind = "memory" if arguments.memory else "compiled" if arguments.compile else "time"
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.peak_of:
        print(peak_training_bytes(arguments))
        return
    stem = file_stem(arguments.kind, arguments.dtype, arguments.length)
    with one_line_errors(__file__), output_folder(arguments, [f"{stem}.json", f"{stem}.csv"]) as folder:
        run(arguments, folder)


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Checks every path, then measures what was asked for and writes it."""
    worst = check(SMOKE_SHAPE, arguments.device)
    if not worst <= 1e-4:  # float32; sums in another order differ by 1e-6 to 1e-5 of the largest value
        sys.exit(f"A path differs from its definition by {worst:.1e}: no speed is reported.")
    record = {"environment": environment(arguments.device), "kind": arguments.kind}
    record |= {"dtype": arguments.dtype, "length": arguments.length}
    record["largest_relative_difference"] = worst
    if arguments.memory:
        record["peak_training_bytes"] = memory_table(arguments)
        rows = {"peak of a training step (MiB)": {k: v / 2**20 for k, v in record["peak_training_bytes"].items()}}
    else:
        keep_freed_memory()
        models = build_all(arguments.shape, getattr(torch, arguments.dtype), arguments.device)
        function = measure_compiled if arguments.compile else measure
        record["seconds"] = function(models, arguments.length, arguments.rounds, arguments.device)
        rows = {f"{phase} (ms)": {k: 1000 * v for k, v in times.items()} for phase, times in record["seconds"].items()}
    report(rows, record, folder)


def file_stem(kind: str, dtype: str, length: int) -> str:
    return f"model_{kind}_{dtype}_{length}"


def report(rows: dict[str, dict[str, float]], record: dict, folder: Path) -> None:
    """Prints the table with ratios to LLaMA, writes it as CSV and the record as JSON."""
    print(json.dumps({key: value for key, value in record.items() if key != "seconds"}))
    header = ["", *(column for name in MODELS for column in (name, "ratio"))]
    lines = []
    for phase, row in rows.items():
        llama = row["llama"] or float("nan")
        lines.append([phase, *(text for name in MODELS for text in (f"{row[name]:.2f}", f"{row[name] / llama:.3f}"))])
    for line in (header, *lines):
        print("  ".join(f"{cell:>16}" if i == 0 else f"{cell:>15}" for i, cell in enumerate(line)))
    stem = file_stem(record["kind"], record["dtype"], record["length"])
    (folder / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    with open(folder / f"{stem}.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *lines])


if __name__ == "__main__":
    main()
