"""What a calibration will take, before it is begun: operations from sizes, seconds from this machine's own rate."""

import time
from collections.abc import Collection
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from conversion.calibration.calibrate import DEFAULT_STAGES, Stage
from conversion.calibration.closed_form import LAMBDA_GRID, SAMPLE_TOKENS
from conversion.calibration.gradient_fit import LocalFit
from conversion.calibration.streams import precision


PROBE_SIZE = 1024
# Measured on tiny-llama and on small random models: what is not a matrix product takes about as long again.
OVERHEAD = 2.0


@dataclass(frozen=True)
class CalibrationEstimate:
    """Of one whole calibration."""

    product_flops: float  # matrix products of layers, in the dtype the device runs them in
    gram_flops: float  # sums over tokens in float64
    memory_bytes: int  # peak, on the device
    disk_bytes: int  # of the work folder, in float32
    seconds: float


def estimate_calibration(
    config: PreTrainedConfig,
    num_tokens: int,
    row_tokens: int,
    *,
    stages: Collection[Stage] = DEFAULT_STAGES,
    local: LocalFit = LocalFit(),  # noqa: B008 (frozen)
    device: torch.device | str = "cpu",
) -> CalibrationEstimate:
    """Good to a factor of about two: the rate is that of one matrix product, tried out here and now."""
    device = torch.device(device)
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = heads * config.head_dim  # columns of o_proj
    attention = 2 * hidden * (width + config.num_key_value_heads * config.head_dim)
    parameters = attention + 3 * hidden * config.intermediate_size
    maps = 4 * row_tokens * width  # a token's operations in both maps of a pair; half of them are masked
    sample = min(SAMPLE_TOKENS, num_tokens)
    gram = 2 * width * (width + hidden)  # a token's

    full_passes = 2 * num_tokens  # LLaMA's and ours
    attention_passes = (1 + 2 * len(LAMBDA_GRID)) * sample
    gram_tokens = len(LAMBDA_GRID) * sample
    if Stage.REFIT in stages:
        attention_passes, gram_tokens = attention_passes + num_tokens, gram_tokens + num_tokens
    if Stage.VALUES in stages:
        attention_passes, gram_tokens = attention_passes + 4 * num_tokens, gram_tokens + 3 * num_tokens
    if Stage.LOCAL in stages:
        full_passes += 3 * local.steps * local.batch_tokens
    product_flops = full_passes * (2 * parameters + maps) + attention_passes * (2 * attention + maps)
    if Stage.PAIRING in stages:
        product_flops += sample * heads * heads * 32 * config.head_dim**2
    layers = config.num_hidden_layers
    product_rate, gram_rate = _rate(device, torch.float32), _rate(device, torch.float64)
    seconds = OVERHEAD * layers * (product_flops / product_rate + gram_tokens * gram / gram_rate)

    floats = 2 * parameters + 5 * num_tokens * hidden + 3 * attention
    floats += local.batch_tokens * (12 * hidden + 6 * width + 5 * config.intermediate_size)
    doubles = 2 * width * (width + hidden) + 2 * hidden * hidden
    if Stage.PAIRING in stages:
        doubles += heads * heads * 16 * config.head_dim**2
    return CalibrationEstimate(
        product_flops=layers * product_flops,
        gram_flops=layers * gram_tokens * gram,
        memory_bytes=4 * floats + 8 * doubles,
        disk_bytes=4 * (layers + len(stages)) * attention,  # a layer under way is there once per stage
        seconds=seconds,
    )


def duration_text(seconds: float) -> str:
    """Returns a time in words, as finely as an estimate is worth: "40 seconds", "12 minutes", "3 hours 10 minutes"."""
    if round(seconds) < 60:
        return _counted(max(1, round(seconds)), "second")
    minutes = round(seconds / 60)
    if minutes < 60:
        return _counted(minutes, "minute")
    if minutes < 48 * 60:
        hours, rest = divmod(round(minutes, -1), 60)
        return " ".join([_counted(hours, "hour"), *([_counted(rest, "minute")] if rest else [])])
    days, hours = divmod(round(minutes / 60), 24)
    return " ".join([_counted(days, "day"), *([_counted(hours, "hour")] if hours else [])])


def _counted(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product."""
    matrix = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        with precision(device) if dtype is torch.float32 else torch.no_grad():
            # reading one number waits for the device
            float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * PROBE_SIZE**3 / best
