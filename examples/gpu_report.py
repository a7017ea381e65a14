"""
Everything worth doing on a GPU, in one command and under nine minutes: tests, accuracy, speed, fine-tuning.

    PYTHONPATH=. python examples/gpu_report.py --output examples/results/gpu

1. `pytest -m gpu`: the kernels' outputs and gradients against float64, and what of transformers needs a GPU.
2. benchmark_attention.py and benchmark_model.py in bfloat16: each checks correctness before it prints any time.
3. LoRA and full fine-tuning of a model of Llama-3.2-1B's shape with random weights, on Python's standard library read
   as bytes: loss, tokens a second and peak memory of DIFF V1, exact V2 and LLaMA. Every loss is to fall.
4. compare_lora.py: what LoRA learns on the trained LLaMA of this repository and on its conversions.

Prints a table and writes report.json; parts that failed say so and do not stop the others. `--smoke` tries all of it
on a CPU in a minute or two with tiny models, where its times mean nothing.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch
from compare_lora import adapter
from peft import get_peft_model
from timing import environment, synchronize
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


EXAMPLES = Path(__file__).parent
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
    """Loss at the first and over the last steps, tokens a second after the first step, peak bytes (CUDA)."""
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
                model = get_peft_model(model, adapter(model, rank=16))
            label = f"{method} {name} {implementation or 'default'}"
            rate = 1e-3 if method == "lora" or arguments.smoke else 2e-5
            results[label] = fine_tune(model, ids, batch_size, length, steps, rate)
            results[label]["loss_fell"] = results[label]["last_loss"] < results[label]["first_loss"]
            del model
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
    return results


def run(command: list[str], log: Path) -> str:
    """Runs a part in a process of its own, its output kept in `log`. Returns "ok" or how it ended."""
    result = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log.write_text(result.stdout)
    print(result.stdout[-6000:])
    return "ok" if result.returncode == 0 else f"failed with exit code {result.returncode}, see {log.name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/gpu_report"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny, and on a CPU as well")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.smoke:
        sys.exit("There is no CUDA GPU here; --smoke tries the script on a CPU.")
    arguments.models = [("llama", None), ("v1", None), ("v2", None)]
    if arguments.device == "cuda":
        arguments.models += [("v1", "sdpa"), ("v2", "sdpa")]
    arguments.output.mkdir(parents=True, exist_ok=True)

    smoke, out = (["--smoke"] if arguments.smoke else []), str(arguments.output)
    dtype = ["--dtype", "float32" if arguments.smoke else "bfloat16", "--device", arguments.device, "--output", out]
    attention, model = str(EXAMPLES / "benchmark_attention.py"), str(EXAMPLES / "benchmark_model.py")
    parts = {
        "tests": ["-m", "pytest", "-q", "-m", "gpu", str(EXAMPLES.parent / "tests")],
        "attention": [attention, *dtype, "--lengths", "1024", "4096", "16384", *smoke],
        "model": [model, *dtype, "--length", "4096", *smoke],
        "memory": [model, *dtype, "--length", "4096", "--memory", *smoke],
        "lora": [str(EXAMPLES / "compare_lora.py"), "--device", arguments.device, "--output", out, *smoke],
    }
    record = {"environment": environment(arguments.device), "seconds": {}, "parts": {}}
    for name, command in parts.items():
        start = time.perf_counter()
        record["parts"][name] = run(command, arguments.output / f"{name}.log")
        record["seconds"][name] = time.perf_counter() - start
    start = time.perf_counter()
    record["fine_tuning"] = fine_tuning(arguments)
    record["seconds"]["fine_tuning"] = time.perf_counter() - start
    (arguments.output / "report.json").write_text(json.dumps(record, indent=1) + "\n")

    print(f"{'':>24} {'first loss':>10} {'last loss':>10} {'tokens/s':>10} {'peak GiB':>9}")
    for label, r in record["fine_tuning"].items():
        print(f"{label:>24} {r['first_loss']:10.3f} {r['last_loss']:10.3f} {r['tokens_per_second']:10.0f} "
              f"{r['peak_bytes'] / 2**30:9.2f}")  # fmt: skip
    for name, outcome in record["parts"].items():
        print(f"{name}: {outcome}, {record['seconds'][name]:.0f} s")
    failed = [name for name, outcome in record["parts"].items() if outcome != "ok"]
    failed += [label for label, r in record["fine_tuning"].items() if not r["loss_fell"]]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
