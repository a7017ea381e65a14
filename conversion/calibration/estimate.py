"""Estimates what a calibration takes: operations from sizes, seconds from this machine's own rate."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from conversion.calibration.calibrate import DEFAULT_STAGES, VALIDATION_SHARE, Stage
from conversion.calibration.candidates import RIDGES
from conversion.calibration.closed_form import CARRIER_SHARES, LAMBDA_GRID
from conversion.calibration.gradient_fit import LocalFit
from conversion.calibration.head_trials import FITTED_TOKENS, JUDGING_TOKENS
from conversion.calibration.problem import SAMPLE_TOKENS
from conversion.calibration.speed import faster_in_bfloat16, product_rate
from modeling_diff.diff_llama_fields import padded_counts


# What is no matrix product grows with the hidden size, products with its square. CPU time over that of the products:
# 2.26 for tiny-llama (hidden size 256), 1.36 for two layers of SmolLM2-135M (576), 1.30 for the closed-form stages of
# a layer of 0.5B shape (896).
ELEMENTWISE = 320
GPU_OVERHEAD = 2.0  # assumed: no calibration has been timed on one
# A third of the batches are halved, and checks may skip a part of the schedule.
SHARE_OF_STEPS = 0.8
CORE_SHARE = 0.8  # of a core's speed that each of several adds


@dataclass(frozen=True)
class Work:
    """Numbers of operations.

    Attributes:
        float32: Of float32 matrix products.
        float64: Of float64 matrix products.
        fast: Of products in bfloat16 where that is faster, else in float32.
    """

    float32: float = 0.0
    float64: float = 0.0
    fast: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.float32 + other.float32, self.float64 + other.float64, self.fast + other.fast)

    def times(self, count: float) -> "Work":
        """Returns `count` times this work."""
        return Work(count * self.float32, count * self.float64, count * self.fast)


@dataclass(frozen=True)
class CalibrationEstimate:
    """What a calibration takes.

    Attributes:
        work: Operations.
        memory_bytes: Peak memory on the device.
        disk_bytes: Size of the work folder.
        seconds: Time, good to a factor of about two.
    """

    work: Work
    memory_bytes: int
    disk_bytes: int
    seconds: float


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer on which its work depends; operations are per token where nothing else is said.

    Attributes:
        hidden: Hidden size.
        heads: LLaMA's heads.
        kv_heads: LLaMA's KV heads.
        map_dim: Width of a head.
        intermediate: Width of the MLP.
        row_tokens: Tokens per sequence.
    """

    hidden: int
    heads: int
    kv_heads: int
    map_dim: int
    intermediate: int
    row_tokens: int

    @property
    def width(self) -> int:
        """Columns of o_proj."""
        return self.heads * self.map_dim

    @property
    def attention_parameters(self) -> int:
        """Weights of the four projections."""
        return 2 * self.hidden * (self.width + self.kv_heads * self.map_dim)

    @property
    def mlp_parameters(self) -> int:
        """Weights of the MLP."""
        return 3 * self.hidden * self.intermediate

    @property
    def maps(self) -> int:
        """Operations of causal attention maps: half of Q K' and of a product with V of twice its width."""
        return 3 * self.row_tokens * self.width

    @property
    def attention(self) -> int:
        """Operations of the attention's forward pass."""
        return 2 * self.attention_parameters + self.maps

    @property
    def units(self) -> int:
        """Heads of a layer that are chosen together, in number of such units."""
        return self.kv_heads // 2

    @property
    def sums(self) -> int:
        """Operations of the sums of normal equations."""
        return self.width * (self.width + 2 * self.hidden)

    @property
    def solutions(self) -> float:
        """Operations of one refit in all, for all ridges."""
        return len(RIDGES) * (self.width**3 / 3 + 8 * self.width**2 * self.hidden)


def layer_work(shape: Shape, num_tokens: int, stages: Collection[Stage], local: LocalFit) -> Work:
    """Counts the operations of the stages of one layer.

    Args:
        shape: Sizes of the layer.
        num_tokens: Tokens of the text.
        stages: The stages that are run.
        local: Of the gradient stage.
    """
    sample = min(SAMPLE_TOKENS, num_tokens)
    judged = num_tokens / VALIDATION_SHARE
    whole = shape.attention + 2 * shape.mlp_parameters
    # Every stage is judged.
    work = Work(float32=len(stages) * judged * whole)
    refit = refit_work(shape, num_tokens)
    trial = Work(judged * 2 * shape.mlp_parameters)
    refitted_trial = trial + Work((sample + judged) * shape.sums, shape.solutions)
    work += Work(2 * (sample + judged) * shape.attention)
    work += (refitted_trial if Stage.REFIT in stages else trial).times(len(LAMBDA_GRID))
    if Stage.PAIRING in stages:
        pairs = shape.heads * (shape.heads - shape.heads // shape.kv_heads)
        outputs = 2 * shape.row_tokens * shape.width * shape.kv_heads
        work += Work(sample * (shape.attention + outputs + pairs * 2 * (4 * shape.map_dim) ** 2))
    if Stage.REFIT in stages:
        work += refit
    if Stage.VALUES in stages:
        gathered = num_tokens * (shape.attention + shape.sums + shape.hidden**2)
        work += refit + refitted_trial.times(len(CARRIER_SHARES))
        work += Work(gathered + (sample + judged) * shape.attention)
    if Stage.LOCAL in stages:
        # Forward and backward, without gradients of frozen weights and of the layer's input.
        projections = 4 * shape.attention_parameters + 2 * shape.width * shape.hidden
        per_token = projections + 4 * shape.mlp_parameters + 3.5 * shape.maps
        # Muon's five steps of three products each.
        orthogonal = 30 * shape.attention_parameters * min(shape.hidden, shape.width)
        steps = SHARE_OF_STEPS * local.steps
        checks = 1 + steps / local.check_steps
        work += Work(fast=checks * min(local.batch_tokens, judged) * whole)
        work += Work(fast=steps * (min(local.batch_tokens, num_tokens) * per_token + orthogonal))
    return work


def refit_work(shape: Shape, num_tokens: int) -> Work:
    """Counts the operations of a least-squares fit of one layer's o_proj.

    Args:
        shape: Sizes of the layer.
        num_tokens: Tokens of the text.
    """
    read = num_tokens + num_tokens / VALIDATION_SHARE
    return Work(read * (shape.attention + shape.sums), shape.solutions)


def choice_work(shape: Shape, num_tokens: int, num_layers: int, vocab_size: int, local: LocalFit) -> Work:
    """Counts the operations of a choice of heads: each unit is fitted, and half of the model is run after it.

    Args:
        shape: Sizes of a layer.
        num_tokens: Tokens of the text.
        num_layers: Of the model.
        vocab_size: Of the model.
        local: Of the gradient stage, which a choice does without.
    """
    sample = min(num_tokens, FITTED_TOKENS + JUDGING_TOKENS)
    judging = min(num_tokens, JUDGING_TOKENS)
    layer = shape.attention + 2 * shape.mlp_parameters
    judged = judging * (num_layers / 2 * layer + 2 * shape.hidden * vocab_size)
    # Two walks through LLaMA: one to measure costs, one to fit heads that are chosen together.
    per_layer = layer_work(shape, sample, (Stage.PAIRING,), local) + Work(float32=2 * sample * layer)
    per_layer += refit_work(shape, sample)
    per_unit = refit_work(shape, sample) + Work(float32=judged)
    return (per_layer + per_unit.times(shape.units)).times(num_layers)


def estimate_calibration(
    config: PreTrainedConfig,
    num_tokens: int,
    row_tokens: int,
    *,
    stages: Collection[Stage] = DEFAULT_STAGES,
    local: LocalFit = LocalFit(),  # noqa: B008 (frozen)
    device: torch.device | str = "cpu",
    num_layers: int | None = None,
    written: bool = False,
    chosen: bool = False,
) -> CalibrationEstimate:
    """Returns what a calibration takes: seconds good to a factor of about two, on a machine that does nothing else.

    Args:
        config: The source's, with every field of a plain LLaMA.
        num_tokens: Tokens of the text.
        row_tokens: Tokens per sequence.
        stages: The stages that are run.
        local: Of the gradient stage.
        device: Where it is to run; a short probe measures its rate.
        num_layers: Number of layers that are calibrated; all by default.
        written: Whether the source writes the text first.
        chosen: Whether the heads are chosen first.

    Returns:
        Operations, seconds, memory and disk.
    """
    device = torch.device(device)
    heads, kv_heads = padded_counts(config.num_attention_heads, config.num_key_value_heads)
    shape = Shape(
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        map_dim=config.head_dim,
        intermediate=config.intermediate_size,
        row_tokens=row_tokens,
    )
    layers = config.num_hidden_layers
    calibrated = layers if num_layers is None else num_layers
    work = layer_work(shape, num_tokens, stages, local).times(calibrated)
    streams = 2 * num_tokens * (shape.attention + 2 * shape.mlp_parameters)
    work += Work(float32=layers * streams)
    if written:
        head = shape.hidden * config.vocab_size
        work += Work(float32=2 * num_tokens * (layers * (shape.attention_parameters + shape.mlp_parameters) + head))

    kept = (calibrated + len(stages)) * shape.attention_parameters
    states = 0
    if chosen:
        work += choice_work(shape, num_tokens, layers, config.vocab_size, local)
        kept += layers * (shape.attention_parameters + shape.units * shape.width * shape.hidden)
        states = layers * shape.units * min(num_tokens, JUDGING_TOKENS) * shape.hidden
    floats = 2 * (shape.attention_parameters + shape.mlp_parameters) + 5 * num_tokens * shape.hidden
    floats += states  # of the models with one unit each
    floats += 3 * shape.attention_parameters + 6 * SAMPLE_TOKENS * shape.width
    floats += local.batch_tokens * (12 * shape.hidden + 6 * shape.width + 5 * shape.intermediate)
    doubles = 4 * shape.width * (shape.width + shape.hidden)
    if Stage.PAIRING in stages:
        doubles += shape.heads**2 * 16 * shape.map_dim**2
    return CalibrationEstimate(
        work=work,
        memory_bytes=4 * floats + 8 * doubles,
        disk_bytes=4 * kept + 8 * num_tokens * written,
        seconds=overhead(shape, device) * seconds_of(work, device),
    )


def overhead(shape: Shape, device: torch.device) -> float:
    """Returns a calibration's time over that of its matrix products alone."""
    return 1 + ELEMENTWISE / shape.hidden if device.type == "cpu" else GPU_OVERHEAD


def seconds_of(work: Work, device: torch.device) -> float:
    """Returns the seconds that products take on a device, all of its cores together, at its measured rates."""
    fast = torch.bfloat16 if faster_in_bfloat16(device.type) else torch.float32
    rated = ((work.float32, torch.float32), (work.float64, torch.float64), (work.fast, fast))
    seconds = sum(operations / product_rate(device.type, dtype) for operations, dtype in rated)
    return seconds / (1 + CORE_SHARE * (torch.get_num_threads() - 1)) if device.type == "cpu" else seconds


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
