"""
The story of a calibrated parity conversion: one LLaMA layer after the other becomes differential attention that does,
on calibration text, as nearly as can be what the layer did.

A layer is fitted on the converted model's own stream against LLaMA's, so it repairs what earlier layers got wrong.
Every stage is kept only if it brings held-back rows no further from LLaMA. Memory: one layer, the two streams (R, T,
C), and Gram matrices. Results go to a folder layer by layer, from which an interrupted run goes on.

R rows, T tokens a row, C hidden.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig

from conversion.calibration.closed_form import (
    LAMBDA_GRID,
    choose_lambda,
    choose_pairing,
    refit_outputs,
    refit_values,
)
from conversion.calibration.gradient_fit import LocalFit, fit_layer
from conversion.calibration.problem import LayerProblem, Norm
from conversion.calibration.speed import faster_in_bfloat16
from conversion.calibration.store import CalibrationStore, run_identity
from conversion.calibration.streams import LayerWeights, LlamaLayers, Streams
from conversion.checkpoint.reader import CheckpointReader
from conversion.errors import ConversionError
from conversion.mapping.heads import HeadPairing, padded_counts
from conversion.options import STRICT_EPS
from conversion.source.architectures import plain_config
from conversion.source.config import check_pairs
from modeling_diff.analysis.tokens import token_fault
from modeling_diff.configuration_diff_llama import paper_lambda_init


class Stage(StrEnum):
    """What is done to a layer, in this order. A stage that is left out is skipped; the first is always there."""

    COPY = "copy"  # permuted weights, lambda chosen, norm scaled to the heads' output
    PAIRING = "pairing"  # heads matched by least-squares cost, instead of neighbors
    REFIT = "refit"  # o_proj by least squares
    VALUES = "values"  # values in a basis in which the norm hardly bends the output
    LOCAL = "local"  # gradient descent on the attention parameters


DEFAULT_STAGES = tuple(Stage)
VALIDATION_SHARE = 16  # one row in so many judges, and is not fitted

# (layer, number of layers, stage, share of the stage done)
Progress = Callable[[int, int, Stage, float], None]


@dataclass(frozen=True)
class CalibrationResult:
    """What a converted config and checkpoint need; tensors are read from disk when they are asked for."""

    pairings: tuple[HeadPairing, ...]
    lambda_init: tuple[float, ...]
    sub_norm_eps: tuple[float, ...]
    records: tuple[dict[str, Any], ...]  # for each layer: residual and seconds a stage, lambda reached
    store: CalibrationStore
    _folder: TemporaryDirectory | None = None  # lives as long as the result if nobody named a folder

    @property
    def names(self) -> frozenset[str]:
        """The tensors of the converted checkpoint that are replaced: all of `self_attn` in the calibrated layers."""
        return self.store.names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.store.tensor(name)


def calibrate(
    source: CheckpointReader | Path,
    config: PreTrainedConfig,
    tokens: torch.Tensor,
    *,
    stages: Collection[Stage] = DEFAULT_STAGES,
    lambda_init: Literal["grid", "paper"] | float | Sequence[float] = "grid",
    norm: Norm = "strict",
    layers: Collection[int] | None = None,
    dtype: torch.dtype | None = None,
    pad_heads: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    local: LocalFit = LocalFit(),  # noqa: B008 (frozen)
    work_folder: Path | None = None,
    resume: bool | None = None,
    progress: Progress = lambda layer, num_layers, stage, done: None,
) -> CalibrationResult:
    """
    Differential attention for every layer of `layers` (all by default), fitted on `tokens` (R, T).

    `dtype` is that of the checkpoint to be written (the source's by default): layers are rounded to it before the
    next is fitted. No stage takes lambda below `local.lambda_floor`. A `work_folder` of the same source, tokens and
    options is continued where it was left, one of others refused; both are discarded if `resume` is False.
    Raises ConversionError for heads that do not pair, tokens that are too few or unknown, activations not finite.
    """
    reader = source if isinstance(source, CheckpointReader) else CheckpointReader(source)
    config = plain_config(config)
    stages = tuple(stage for stage in Stage if stage in stages or stage is Stage.COPY)
    counts = padded_counts(config.num_attention_heads, config.num_key_value_heads)
    if not pad_heads:
        check_pairs(config.num_attention_heads, config.num_key_value_heads)
    check_tokens(config, tokens, stages)
    options: dict[str, Any] = {"stages": stages, "lambda": lambda_init, "norm": norm, "seed": seed}
    options |= {
        "local": asdict(local),
        "layers": sorted(layers) if layers is not None else None,
        "dtype": dtype,
        "device": device,
        "bfloat16": faster_in_bfloat16(torch.device(device).type),
    }
    temporary = TemporaryDirectory(prefix="calibration-") if work_folder is None else None
    folder = work_folder or Path(temporary.name if temporary else "")
    identity = run_identity(reader, config, tokens, options) if work_folder else {}
    store = CalibrationStore(folder, identity, resume)
    llama = LlamaLayers(reader, config, torch.device(device))
    streams = Streams.start(llama.embed(tokens))
    chosen = []
    for index in range(config.num_hidden_layers):
        tensors = llama.tensors(index)
        layer = llama.layer(index, tensors)
        streams.look_ahead(llama, layer, index)
        converted: nn.Module = layer
        if layers is None or index in layers:
            lambdas = lambdas_to_try(lambda_init, index, local.lambda_floor)
            judges = max(1, len(tokens) // VALIDATION_SHARE)
            problem = LayerProblem(index, llama, tensors, layer, streams, seed, norm, lambdas, judges)
            weights = fit_stages(problem, stages, local, store, dtype, progress)
            converted = problem.diff_layer(weights)
        else:
            pairing = HeadPairing.adjacent(*counts)
            weights = LayerWeights(pairing, paper_lambda_init(index), STRICT_EPS, {})
        chosen.append(weights)
        streams.advance(llama, converted)
    return CalibrationResult(
        pairings=tuple(weights.pairing for weights in chosen),
        lambda_init=tuple(weights.lambda_init for weights in chosen),
        sub_norm_eps=tuple(weights.sub_norm_eps for weights in chosen),
        records=tuple(store.records.get(index, {}) for index in range(len(chosen))),
        store=store,
        _folder=temporary,
    )


def fit_stages(
    problem: LayerProblem,
    stages: Sequence[Stage],
    local: LocalFit,
    store: CalibrationStore,
    dtype: torch.dtype | None,
    progress: Progress,
) -> LayerWeights:
    """One layer through its stages, or what is left of them; float32 tensors that `dtype` can hold."""
    device = problem.llama.device
    num_layers = problem.llama.config.num_hidden_layers
    if done := store.load(problem.index, None, device):
        return _as_float(done[0])
    weights, residual = None, float("inf")
    record: dict[str, Any] = {}
    for stage in stages:
        if stage is Stage.COPY and Stage.PAIRING in stages:
            continue  # the pairing starts from a copy of its own
        if done := store.load(problem.index, stage, device):
            weights, record = done
            residual = record[stage]["residual"]
            continue
        began = time.monotonic()
        progress(problem.index, num_layers, stage, 0.0)
        tried = run_stage(problem, stage, weights, stages, local, partial(progress, problem.index, num_layers, stage))
        reached = problem.residual(tried)
        if weights is None or reached <= residual:
            weights, residual = tried, reached
        record = {**record, stage: {"residual": residual, "tried": reached, "seconds": time.monotonic() - began}}
        store.save(problem.index, weights, record, stage)
        progress(problem.index, num_layers, stage, 1.0)
    assert weights is not None
    source_dtype = problem.llama.reader.tensors[f"model.layers.{problem.index}.self_attn.q_proj.weight"].dtype
    weights = _rounded(weights, dtype or source_dtype)
    reached_lambda = problem.diff_layer(_as_float(weights)).get_submodule("self_attn.diff_lambda")()
    store.save(problem.index, weights, {"stages": record, "lambda": float(reached_lambda)}, None)
    return _as_float(weights)


def run_stage(
    problem: LayerProblem,
    stage: Stage,
    weights: LayerWeights | None,
    stages: Collection[Stage],
    local: LocalFit,
    progress: Callable[[float], None],
) -> LayerWeights:
    """What one stage makes of the weights of the stage before."""
    config = problem.llama.config
    if stage is Stage.COPY:
        pairing = HeadPairing.adjacent(*padded_counts(config.num_attention_heads, config.num_key_value_heads))
        return choose_lambda(problem, pairing, refit=Stage.REFIT in stages)
    if stage is Stage.PAIRING:
        return choose_lambda(problem, choose_pairing(problem), refit=Stage.REFIT in stages)
    assert weights is not None
    if stage is Stage.REFIT:
        return refit_outputs(problem, weights)
    if stage is Stage.VALUES:
        return refit_values(problem, weights)
    return fit_layer(problem, weights, local, lambda step: progress(step / local.steps))


def lambdas_to_try(
    choice: Literal["grid", "paper"] | float | Sequence[float], index: int, floor: float
) -> tuple[float, ...]:
    """Returns the values of lambda_init from which the layer's is chosen, none below `floor`.

    Raises:
        ConversionError: A number that is none of lambda_init, or is below `floor`.
    """
    if choice == "grid":
        return (floor, *(value for value in LAMBDA_GRID if value > floor))
    if choice == "paper":
        return (paper_lambda_init(index),)
    value = choice[index] if isinstance(choice, Sequence) else choice
    if isinstance(value, str) or not 0 <= value < 1:
        raise ConversionError(
            f'lambda_init {value!r}: expected "grid", "paper" or numbers from 0 to below 1, one for all layers or each'
        )
    if value < floor:
        raise ConversionError(
            f"--lambda-init {value} is below --lambda-floor {floor}, which keeps every layer of a calibrated V1 "
            f"differential; choose a larger one, or --lambda-floor {value} as well"
        )
    return (float(value),)


def check_tokens(config: PreTrainedConfig, tokens: torch.Tensor, stages: Collection[Stage]) -> None:
    """ConversionError for tokens (R, T) unknown to the model, in rows too long for it, or too few for a refit."""
    if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64) or not tokens.numel():
        raise ConversionError(
            f"calibration tokens: {tokens.dtype} of shape {tuple(tokens.shape)}, expected rows of ids"
        )
    if fault := token_fault(tokens, config.vocab_size):
        raise ConversionError(f"calibration tokens: {fault}")
    if tokens.shape[1] > config.max_position_embeddings:
        raise ConversionError(
            f"calibration tokens: rows of {tokens.shape[1]}, but max_position_embeddings is "
            f"{config.max_position_embeddings}; use shorter rows"
        )
    check_enough(config, tokens.shape[0], tokens.shape[1], stages)


def check_enough(config: PreTrainedConfig, num_rows: int, row_tokens: int, stages: Collection[Stage]) -> None:
    """ConversionError for fewer tokens than a refit needs, next to a sequence that judges it."""
    # Least squares with fewer tokens than o_proj has columns fits them exactly and says nothing of others.
    columns = padded_counts(config.num_attention_heads, config.num_key_value_heads)[0] * config.head_dim
    needed = columns if set(stages) - {Stage.COPY, Stage.PAIRING} else 0
    fitted = (num_rows - max(1, num_rows // VALIDATION_SHARE)) * row_tokens
    if num_rows < 2 or fitted < needed:
        raise ConversionError(
            f"calibration tokens: {num_rows * row_tokens} in {num_rows} rows, of which {fitted} are fitted, but the "
            f"refit needs {max(needed, 1)} and one row to judge by; give more text (--calibration-tokens)"
        )


def _rounded(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    narrow = {name: tensor.to(dtype) for name, tensor in weights.tensors.items() if not name.startswith("diff_lambda")}
    return weights.replaced(tensors=narrow)


def _as_float(weights: LayerWeights) -> LayerWeights:
    return weights.replaced(tensors={name: tensor.float() for name, tensor in weights.tensors.items()})
