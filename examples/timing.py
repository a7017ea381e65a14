"""Times functions against each other in one process: rounds interleaved, medians; and says on what machine."""

import ctypes
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from modeling_diff.diff_attention_triton import triton


GPU_CALLS = 5  # at once: an event is exact to 0.5 us, a step of decoding takes 10
GPU_BUSY_CYCLES = 20_000_000  # 10 ms at 2 GHz, in which the host launches them


def time_interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, device: str, gpu_only: bool = False
) -> dict[str, float]:
    """
    Median seconds a call of each function; every round calls each once, so that drift hits all alike.

    With `gpu_only` on CUDA, what the GPU takes for calls that the host has launched ahead: no launch is waited for.
    """
    measure = _gpu_seconds if gpu_only and device == "cuda" else _seconds
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(measure(function, device))
    return {name: statistics.median(times) for name, times in seconds.items()}


def _seconds(function: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def _gpu_seconds(function: Callable[[], object], device: str) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    synchronize(device)
    torch.cuda._sleep(GPU_BUSY_CYCLES)
    start.record()
    for _ in range(GPU_CALLS):
        function()
    end.record()
    synchronize(device)
    return start.elapsed_time(end) / 1000 / GPU_CALLS


def keep_freed_memory() -> None:
    """
    Has glibc keep what is freed for the next allocation, as other allocators do (mallopt(3)); nothing elsewhere.

    By itself it gives large blocks back to the system and gets them again as fresh pages, more or less often as chance
    has it: a model's prefill on a CPU varied by 8 % with it, in either direction.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def environment(device: str) -> dict[str, str | int | float]:
    """Date, machine, load, versions and commit, to stand beside every number."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "machine": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": "none" if triton is None else triton.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
