"""
One layer to be fitted: what its converted attention sees, and how far from LLaMA it ends.

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
    """A chunk of tokens on their way through the attention.

    Attributes:
        inputs: What enters modules (N, F), by the module's name.
        targets: What the attention should add to the hidden states (N, C).
        token_weights: Weight of each token (N,).
    """

    inputs: Mapping[str, torch.Tensor]
    targets: torch.Tensor
    token_weights: torch.Tensor


@dataclass
class LayerProblem:
    """One layer to be fitted.

    Attributes:
        index: Index of the layer.
        llama: The source's layers.
        tensors: Tensors of this one.
        layer: This layer, as the source computes it.
        streams: Hidden states around it.
        seed: Of the calibration.
        norm: "strict" or "neutral", the norm over heads.
        lambdas: Values of lambda_init to choose from.
        num_validation_rows: Number of sequences, the first ones, that are held back to judge.
        pairing: Which heads become one, if that is not to be chosen.
        heads: The heads that become differential, counted as the pairing has them; None for all.
        token_weights: (R, T): one over the mean square after the layer, as the next norm divides by it.
    """

    index: int
    llama: LlamaLayers
    tensors: Mapping[str, torch.Tensor]
    layer: LlamaDecoderLayer
    streams: Streams
    seed: int
    norm: Norm
    lambdas: tuple[float, ...]
    num_validation_rows: int
    pairing: HeadPairing | None = None
    heads: tuple[int, ...] | None = None
    token_weights: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.token_weights = 1 / self.streams.after_layer.square().mean(-1).add(1e-6)

    @property
    def training_rows(self) -> slice:
        """The sequences that are fitted."""
        return slice(self.num_validation_rows, None)

    @property
    def validation_rows(self) -> slice:
        """The held-back sequences."""
        return slice(0, self.num_validation_rows)

    @property
    def sample_rows(self) -> slice:
        """The training sequences on which candidates are compared."""
        num_tokens = self.streams.converted.shape[1]
        return slice(self.num_validation_rows, self.num_validation_rows + max(2, SAMPLE_TOKENS // num_tokens))

    def diff_layer(self, weights: LayerWeights) -> DiffLlamaDecoderLayer:
        """Returns the converted layer with these weights."""
        return self.llama.diff_layer(self.index, self.tensors, weights)

    def start(self, pairing: HeadPairing, lambda_init: float) -> LayerWeights:
        """Returns the permuted copy, with a norm that is not fitted yet."""
        seed = self.seed * 1000 + self.index
        return copied_weights(self.tensors, self.llama.config, pairing, lambda_init, seed, self.heads)

    def rounded(self, weights: LayerWeights, dtype: torch.dtype | None) -> LayerWeights:
        """Returns weights as they are stored: in `dtype`, or in the source's; lambda vectors stay float32."""
        source = self.llama.reader.tensors[f"model.layers.{self.index}.self_attn.q_proj.weight"].dtype
        narrow = {
            name: tensor.to(dtype or source)
            for name, tensor in weights.tensors.items()
            if not name.startswith("diff_lambda")
        }
        return weights.replaced(narrow)

    @torch.no_grad()
    def attend(self, weights: LayerWeights, rows: slice, *modules: str) -> Iterator["AttentionInputs"]:
        """Yields what enters modules of the converted attention, chunk by chunk, all modules in one pass.

        The target is what the attention must add to the converted hidden states to reach LLaMA's.

        Args:
            weights: The converted attention.
            rows: Sequences to go through.
            modules: Names below `self_attn`.
        """
        layer = self.diff_layer(weights)
        states = self.streams.converted[rows]
        after = self.streams.after_attention[rows]
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
        """Returns the mean square distance to LLaMA's hidden states after the layer, relative per token.

        Args:
            reached: Hidden states (R, T, C) after the layer.
            rows: Which sequences they are of.
        """
        error = (reached - self.streams.after_layer[rows]).square().mean(-1)
        return float((error * self.token_weights[rows]).double().mean())

    @torch.no_grad()
    def residual(self, weights: LayerWeights) -> float:
        """Returns the `distance` of the held-back sequences after the converted layer."""
        layer = self.diff_layer(weights)
        states = self.streams.converted[self.validation_rows]
        reached = [self.llama.run(layer, states[part]) for part in chunks(*states.shape[:2])]
        return self.distance(torch.cat(reached), self.validation_rows)
