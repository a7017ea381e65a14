"""
The story of a calibrated parity conversion: one LLaMA layer after the other becomes differential attention that does,
on calibration text, as nearly as possible what the layer did.

A layer is fitted on the converted model's own hidden states against LLaMA's, so it repairs the errors of earlier
layers. A stage is kept only if it brings the held-back sequences no further from LLaMA. Memory: one layer, hidden
states of both models (R, T, C), and Gram matrices. Results go to a folder layer by layer; a stopped run continues
from it.

R sequences, T tokens per sequence, C hidden.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
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
    choose_lambda,
    choose_pairing,
    lambdas_to_try,
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
from conversion.mapping.heads import HeadPairing
from conversion.options import STRICT_EPS
from conversion.source.architectures import plain_config
from conversion.source.config import check_pairs
from modeling_diff.analysis.tokens import token_fault
from modeling_diff.configuration_diff_llama import paper_lambda_init
from modeling_diff.diff_llama_fields import padded_counts


class Stage(StrEnum):
    """
    What is done to a layer, in this order. A stage that is left out is skipped; COPY is always there.

    COPY: permuted weights, lambda chosen from a grid, the norm scaled to the heads' output.
    PAIRING: heads matched by least-squares cost, in place of neighbors.
    REFIT: o_proj by least squares.
    VALUES: values in a basis in which the norm is nearly linear, then o_proj again.
    LOCAL: gradient descent on the attention parameters.
    """

    COPY = "copy"
    PAIRING = "pairing"
    REFIT = "refit"
    VALUES = "values"
    LOCAL = "local"


DEFAULT_STAGES = tuple(Stage)
VALIDATION_SHARE = 16  # one sequence in so many is held back from the fit, and judges it

# (layer, number of layers, stage, share of the stage done)
Progress = Callable[[int, int, str, float], None]


@dataclass(frozen=True)
class CalibrationResult:
    """What a converted config and checkpoint need: `result[name]` reads a tensor from disk.

    Attributes:
        pairings: Which heads become one, per layer.
        lambda_init: The config's value of each layer.
        sub_norm_eps: The epsilon of each layer's norm over heads.
        records: Per layer: residual and seconds of each stage, and the lambda that was reached. Empty for a layer
            that was not calibrated.
        store: Where the tensors are.
    """

    pairings: tuple[HeadPairing, ...]
    lambda_init: tuple[float, ...]
    sub_norm_eps: tuple[float, ...]
    records: tuple[dict[str, Any], ...]
    store: CalibrationStore
    _folder: TemporaryDirectory | None = None  # lives as long as the result if nobody named a folder

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors that were fitted: all of `self_attn` in the calibrated layers."""
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
    heads: Mapping[int, Collection[int]] | None = None,
    pairings: Mapping[int, HeadPairing] | None = None,
    dtype: torch.dtype | None = None,
    pad_heads: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    local: LocalFit = LocalFit(),  # noqa: B008 (frozen)
    work_folder: Path | None = None,
    resume: bool | None = None,
    progress: Progress = lambda layer, num_layers, stage, done: None,
) -> CalibrationResult:
    """Fits differential attention of variant V1 to a LLaMA's attention on text, layer by layer.

    Args:
        source: The LLaMA's weights, or the folder that has them.
        config: Its config.
        tokens: Token ids (R, T), all sequences of one length. One sequence in 16 is held back to judge the others.
        stages: What is done to each layer; the copy is always part of it.
        lambda_init: "grid" chooses per layer what leaves least; "paper", a number, or one number per layer.
        norm: "strict" for the paper's norm over heads, "neutral" for one that hardly differs from the identity.
        layers: Indices of the layers to fit; all by default.
        heads: By layer, the heads that become differential, where not all of a layer do; counted as its pairing has
            them. The others stay LLaMA's.
        pairings: By layer, which heads become one, where that is not to be chosen.
        dtype: Dtype of the checkpoint to be written; the source's by default. Layers are rounded to it before the
            next is fitted.
        pad_heads: Whether idle heads may be added where heads or KV heads do not pair.
        seed: Of the lambda vectors and of the order of the sequences.
        device: Where the layers are computed.
        local: How long and how fast the gradient stage goes, and the lowest lambda of every stage.
        work_folder: Where finished layers are kept for a run that continues this one; by default a temporary folder.
        resume: None and True continue the work of the same source, tokens and options, and refuse that of others;
            False discards both.
        progress: Called with layer, number of layers, stage, and how much of the stage is done (0 to 1).

    Returns:
        The fitted attention, by layer.

    Raises:
        ConversionError: Heads do not pair, tokens are too few or unknown, or activations are not finite.
        FilesError: The work folder cannot be used.
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
        "heads": {layer: sorted(chosen) for layer, chosen in (heads or {}).items()},
        "pairings": pairings or {},
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
            problem = LayerProblem(
                index=index,
                llama=llama,
                tensors=tensors,
                layer=layer,
                streams=streams,
                seed=seed,
                norm=norm,
                lambdas=lambdas,
                num_validation_rows=judges,
                pairing=(pairings or {}).get(index),
                heads=tuple(sorted(heads[index])) if heads and index in heads else None,
            )
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
    """Takes one layer through its stages, or those that a stopped run has left; float32, in values of `dtype`."""
    device = problem.llama.device
    num_layers = problem.llama.config.num_hidden_layers
    if done := store.load(problem.index, None, device):
        return done[0].as_float()
    weights: LayerWeights | None = None
    residual = float("inf")
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
            weights = tried
            residual = reached
        record = {**record, stage: {"residual": residual, "tried": reached, "seconds": time.monotonic() - began}}
        store.save(problem.index, weights, record, stage)
        progress(problem.index, num_layers, stage, 1.0)
    assert weights is not None
    weights = problem.rounded(weights, dtype)
    reached_lambda = problem.diff_layer(weights.as_float()).get_submodule("self_attn.diff_lambda")()
    store.save(problem.index, weights, {"stages": record, "lambda": float(reached_lambda)}, None)
    return weights.as_float()


def run_stage(
    problem: LayerProblem,
    stage: Stage,
    weights: LayerWeights | None,
    stages: Collection[Stage],
    local: LocalFit,
    progress: Callable[[float], None],
) -> LayerWeights:
    """Returns what one stage makes of the weights of the stage before; the first one has none."""
    config = problem.llama.config
    if stage is Stage.COPY:
        adjacent = HeadPairing.adjacent(*padded_counts(config.num_attention_heads, config.num_key_value_heads))
        return choose_lambda(problem, problem.pairing or adjacent, refit=Stage.REFIT in stages)
    if stage is Stage.PAIRING:
        return choose_lambda(problem, choose_pairing(problem), refit=Stage.REFIT in stages)
    assert weights is not None
    if stage is Stage.REFIT:
        return refit_outputs(problem, weights)
    if stage is Stage.VALUES:
        return refit_values(problem, weights)
    return fit_layer(problem, weights, local, lambda step: progress(step / local.steps))


def check_tokens(config: PreTrainedConfig, tokens: torch.Tensor, stages: Collection[Stage]) -> None:
    """Checks tokens to calibrate on.

    Args:
        config: The source's.
        tokens: Token ids (R, T).
        stages: What is done to each layer.

    Raises:
        ConversionError: They are unknown to the model, in sequences too long for it, or too few for a refit.
    """
    if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64) or not tokens.numel():
        raise ConversionError(
            f"calibration tokens: {tokens.dtype} of shape {tuple(tokens.shape)}, expected token ids, (R, T)"
        )
    if fault := token_fault(tokens, config.vocab_size):
        raise ConversionError(f"calibration tokens: {fault}")
    if tokens.shape[1] > config.max_position_embeddings:
        raise ConversionError(
            f"calibration tokens: sequences of {tokens.shape[1]}, but max_position_embeddings is "
            f"{config.max_position_embeddings}; use shorter sequences"
        )
    check_enough(config, tokens.shape[0], tokens.shape[1], stages)


def check_enough(config: PreTrainedConfig, num_rows: int, row_tokens: int, stages: Collection[Stage]) -> None:
    """Checks that there are tokens enough for a refit, in addition to a sequence that judges it.

    Args:
        config: The source's.
        num_rows: Number of sequences.
        row_tokens: Tokens per sequence.
        stages: What is done to each layer.

    Raises:
        ConversionError: There are too few.
    """
    # Least squares with fewer tokens than o_proj has columns fits them exactly and says nothing of others.
    columns = padded_counts(config.num_attention_heads, config.num_key_value_heads)[0] * config.head_dim
    needed = columns if set(stages) - {Stage.COPY, Stage.PAIRING} else 0
    fitted = (num_rows - max(1, num_rows // VALIDATION_SHARE)) * row_tokens
    if num_rows < 2 or fitted < needed:
        raise ConversionError(
            f"calibration tokens: {num_rows * row_tokens} in {num_rows} sequences, of which {fitted} are fitted, but "
            f"the refit needs {max(needed, 1)} and one sequence to judge by; give more text (--calibration-tokens)"
        )
