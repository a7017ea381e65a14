"""Times functions against each other in one process: rounds interleaved, medians."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


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
