"""
One layer to be fitted, and what its converted attention sees and leaves.

R sequences, T tokens per sequence, N tokens, C hidden, D = 2d head_dim.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from conversion.calibration.streams import (
    LayerWeights,
    LlamaLayers,
    Streams,
    chunks,
    copied_weights,
    inputs_of,
    precision,
)
from conversion.mapping.heads import HeadPairing
from modeling_diff.modeling_diff_llama import DiffLlamaDecoderLayer


Norm = Literal["strict", "neutral"]
SAMPLE_TOKENS = 8192  # enough for a choice among a few candidates


class AttentionInputs(NamedTuple):
    """Of a chunk of tokens: what enters modules by name (N, F), targets (N, C), and the weight of each token (N,)."""

    inputs: Mapping[str, torch.Tensor]
    targets: torch.Tensor
    token_weights: torch.Tensor


@dataclass
class LayerProblem:
    """One layer to be fitted: LLaMA's layer and tensors, the streams around it, and which rows judge the outcome."""

    index: int
    llama: LlamaLayers
    tensors: Mapping[str, torch.Tensor]
    layer: LlamaDecoderLayer
    streams: Streams
    seed: int
    norm: Norm
    lambdas: tuple[float, ...]
    num_validation_rows: int
    token_weights: torch.Tensor = field(init=False)  # (R, T): one over the mean square, as the next norm divides by it

    def __post_init__(self) -> None:
        self.token_weights = 1 / self.streams.after_layer.square().mean(-1).add(1e-6)

    @property
    def training_rows(self) -> slice:
        return slice(self.num_validation_rows, None)

    @property
    def validation_rows(self) -> slice:
        return slice(0, self.num_validation_rows)

    @property
    def sample_rows(self) -> slice:
        num_tokens = self.streams.converted.shape[1]
        return slice(self.num_validation_rows, self.num_validation_rows + max(2, SAMPLE_TOKENS // num_tokens))

    def diff_layer(self, weights: LayerWeights) -> DiffLlamaDecoderLayer:
        return self.llama.diff_layer(self.index, self.tensors, weights)

    def start(self, pairing: HeadPairing, lambda_init: float) -> LayerWeights:
        """The permuted copy, with a norm that is not fitted yet."""
        seed = self.seed * 1000 + self.index
        return copied_weights(self.tensors, self.llama.config, pairing, lambda_init, seed)

    @torch.no_grad()
    def attend(self, weights: LayerWeights, rows: slice, *modules: str) -> Iterator["AttentionInputs"]:
        """
        What enters each of `modules` of the converted attention, chunk by chunk, all in one pass.

        The target is what the attention must add to the converted stream to end where LLaMA's is.
        """
        layer = self.diff_layer(weights)
        states, after = self.streams.converted[rows], self.streams.after_attention[rows]
        token_weights = self.token_weights[rows]
        positions = torch.arange(states.shape[1], device=states.device)[None]
        rotated = self.llama.rotary(states[:1], positions)
        with ExitStack() as hooks:
            seen = {name: hooks.enter_context(inputs_of(layer.self_attn.get_submodule(name))) for name in modules}
            for part in chunks(*states.shape[:2]):
                with precision(self.llama.device):
                    layer.self_attn(layer.input_layernorm(states[part]), position_embeddings=rotated)
                target = (after[part] - states[part]).flatten(0, 1)
                inputs = {name: noted().reshape(len(target), -1) for name, noted in seen.items()}
                yield AttentionInputs(inputs, target, token_weights[part].flatten())

    @torch.no_grad()
    def distance(self, reached: torch.Tensor, rows: slice) -> float:
        """Mean square distance of states (R, T, C) after the layer to LLaMA's, relative, token by token."""
        error = (reached - self.streams.after_layer[rows]).square().mean(-1)
        return float((error * self.token_weights[rows]).double().mean())

    @torch.no_grad()
    def residual(self, weights: LayerWeights) -> float:
        """`distance` of what the layer makes of the held-back sequences."""
        layer = self.diff_layer(weights)
        states = self.streams.converted[self.validation_rows]
        reached = [self.llama.run(layer, states[part]) for part in chunks(*states.shape[:2])]
        return self.distance(torch.cat(reached), self.validation_rows)
