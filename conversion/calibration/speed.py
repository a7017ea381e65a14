"""How fast this machine multiplies matrices, measured once by a short probe; other load does not change it."""

import time
from collections.abc import Callable
from functools import lru_cache

import torch


PROBE_SIZE = 768
ROUNDS = 5
WORTH_IT = 1.3  # below it, conversions to and from bfloat16 cost what its products save


@lru_cache
def product_rate(device_type: str, dtype: torch.dtype) -> float:
    """Measures operations per second of a matrix product: of one CPU core in its own time, or of a whole GPU.

    Args:
        device_type: "cpu", "cuda" or another of torch's.
        dtype: Dtype of the product.

    Returns:
        Operations per second; a multiplication and an addition count as two.
    """
    matrix = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype, device=device_type)

    def multiply() -> None:
        float((matrix @ matrix)[0, 0])  # reading one number waits for the device

    clock = time.thread_time if device_type == "cpu" else time.perf_counter
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return 2 * PROBE_SIZE**3 / least_seconds(multiply, clock)
    finally:
        torch.set_num_threads(threads)


def least_seconds(function: Callable[[], None], clock: Callable[[], float]) -> float:
    """Returns the seconds of the shortest of a few calls by `clock`, after one that warms up."""
    function()
    seconds = []
    for _ in range(ROUNDS):
        began = clock()
        function()
        seconds.append(clock() - began)
    return max(min(seconds), 1e-9)


def faster_in_bfloat16(device_type: str) -> bool:
    """Returns whether bfloat16 products are faster by enough to pay for converting: AMX, AVX-512 BF16 and CUDA."""
    if device_type not in ("cpu", "cuda"):
        return False
    return product_rate(device_type, torch.bfloat16) > WORTH_IT * product_rate(device_type, torch.float32)
