"""
One decoder layer at a time, and the hidden states between layers, of the LLaMA and of the converted model on the
calibration tokens.

R sequences, T tokens per sequence, C hidden, H LLaMA heads, K LLaMA KV heads, d map_dim.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from conversion.calibration.speed import faster_in_bfloat16
from conversion.checkpoint.reader import CheckpointReader
from conversion.errors import ConversionError
from conversion.mapping.heads import HeadPairing
from conversion.mapping.layout import TENSORS, Keep, paired_layout
from conversion.options import STRICT_EPS
from conversion.source.architectures import plain_config
from modeling_diff import DiffLlamaConfig
from modeling_diff.modeling_diff_llama import DiffLlamaDecoderLayer


# Epsilon of a neutral norm over the heads' mean square; the norm then changes no output by more than 0.05 %.
NEUTRAL_RATIO = 1000.0
ROLES = {name.partition(".self_attn.")[2]: role for name, _, role, _ in TENSORS if ".self_attn." in name}


@dataclass(frozen=True)
class LayerWeights:
    """Differential attention of one layer.

    Attributes:
        pairing: Which of LLaMA's heads became one.
        lambda_init: The config's value for this layer.
        sub_norm_eps: The config's epsilon of the norm over heads.
        tensors: Its tensors, by name below `self_attn`.
        heads: The heads that are differential, ascending; None for all. The others are LLaMA's, in pairs.
    """

    pairing: HeadPairing
    lambda_init: float
    sub_norm_eps: float
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    heads: tuple[int, ...] | None = None

    def replaced(self, tensors: Mapping[str, torch.Tensor], **changes: Any) -> "LayerWeights":
        """Returns a copy with some tensors replaced, and the fields in `changes`."""
        return replace(self, tensors={**self.tensors, **tensors}, **changes)

    def as_float(self) -> "LayerWeights":
        """Returns a copy with float32 tensors."""
        return self.replaced({name: tensor.float() for name, tensor in self.tensors.items()})

    @property
    def kept_heads(self) -> tuple[int, ...]:
        """Returns the heads that are not differential."""
        return () if self.heads is None else tuple(sorted({*range(self.pairing.num_heads)} - {*self.heads}))


class LlamaLayers:
    """A checkpoint of a LLaMA or a relative, of which one layer is in memory at a time, in float32.

    Args:
        reader: Its weights.
        config: Its config.
        device: Where layers are computed.
    """

    def __init__(self, reader: CheckpointReader, config: PreTrainedConfig, device: torch.device):
        self.reader = reader
        self.device = device
        self.config: Any = plain_config(config)  # Any: LlamaConfig declares as optional what it always fills in
        self.config._attn_implementation = "sdpa"
        self.rotary = LlamaRotaryEmbedding(self.config.rotary_config()).to(device)  # type: ignore[arg-type]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns hidden states (R, T, C) before the first layer, of tokens (R, T)."""
        name = "model.embed_tokens.weight"
        table = self.reader.read(name if name in self.reader.tensors else "lm_head.weight")  # tied: one of the two
        return nn.functional.embedding(tokens.cpu(), table).to(self.device, torch.float32)

    def tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Reads a layer's tensors, by their names below `model.layers.N`, without rotary buffers."""
        prefix = f"model.layers.{index}."
        names = [name for name in self.reader.tensors if name.startswith(prefix) and "rotary_emb" not in name]
        return {name.removeprefix(prefix): self.reader.read(name).to(self.device, torch.float32) for name in names}

    def layer(self, index: int, tensors: Mapping[str, torch.Tensor]) -> LlamaDecoderLayer:
        """Returns a layer as the source computes it.

        Args:
            index: Index of the layer.
            tensors: As `tensors` reads them.
        """
        with torch.device("meta"):
            layer = DiffLlamaDecoderLayer(self.config, index)
        layer.load_state_dict(dict(tensors), assign=True)
        return layer.requires_grad_(False).eval()

    def diff_layer(
        self, index: int, tensors: Mapping[str, torch.Tensor], weights: LayerWeights
    ) -> DiffLlamaDecoderLayer:
        """Returns the converted layer.

        Args:
            index: Index of the layer.
            tensors: LLaMA's, of which all but the attention are taken.
            weights: The converted attention.
        """
        config = diff_config(self.config, weights, self.config.num_hidden_layers)
        # With gradients on a CPU, bfloat16, 512 tokens per sequence: 0.21 s per step of 4,096 tokens, sdpa 0.33 s.
        config._attn_implementation = "diff_chunked" if self.device.type == "cpu" else "sdpa"
        with torch.device("meta"):
            layer = DiffLlamaDecoderLayer(config, index)
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("self_attn.")}
        attention = {f"self_attn.{name}": tensor.clone() for name, tensor in weights.tensors.items()}
        layer.load_state_dict(rest | attention, assign=True)
        return layer.requires_grad_(False).eval()

    def run(self, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Returns float32 hidden states (R, T, C) after a layer; both kinds of layer have the same rotary angles.

        Args:
            layer: LLaMA's or a converted one.
            states: Hidden states (R, T, C) before it.
        """
        positions = torch.arange(states.shape[1], device=states.device)[None]
        with precision(self.device):
            return layer(states, position_embeddings=self.rotary(states, positions), position_ids=positions).float()

    def attention_maps(self, layer: LlamaDecoderLayer, states: torch.Tensor) -> torch.Tensor:
        """Returns LLaMA's attention maps (R, H, T, T) for hidden states (R, T, C) before the layer."""
        num_tokens = states.shape[1]
        mask = torch.full((num_tokens, num_tokens), -torch.inf, device=states.device).triu(1)[None, None]
        positions = torch.arange(num_tokens, device=states.device)[None]
        config = layer.self_attn.config
        layer.self_attn.config = deepcopy(self.config)
        layer.self_attn.config._attn_implementation = "eager"
        try:
            normed = layer.input_layernorm(states)
            rotated = self.rotary(states, positions)
            return layer.self_attn(normed, position_embeddings=rotated, attention_mask=mask)[1].float()
        finally:
            layer.self_attn.config = config


def precision(device: torch.device) -> AbstractContextManager:
    """Returns a context of bfloat16 products on a GPU, float32 on a CPU; sums and hidden states stay float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def fast_precision(device: torch.device) -> AbstractContextManager:
    """Returns a context of bfloat16 products where those are faster; gradients differ more between batches."""
    return torch.autocast(device.type, torch.bfloat16) if faster_in_bfloat16(device.type) else nullcontext()


def diff_config(config: Any, weights: LayerWeights, num_layers: int) -> DiffLlamaConfig:
    """Returns a V1 config from which one layer can be built.

    Args:
        config: The source's, with every field of a plain LLaMA.
        weights: The layer's attention.
        num_layers: Number of layers of the model.
    """
    return DiffLlamaConfig.from_llama(
        config,
        variant="v1",
        pad_heads=True,
        lambda_init=[weights.lambda_init] * num_layers,
        sub_norm_eps=weights.sub_norm_eps,
        num_hidden_layers=num_layers,
        **({} if weights.heads is None else {"differential_heads": [list(weights.heads)] * num_layers}),
    )


def copied_weights(
    tensors: Mapping[str, torch.Tensor],
    config: Any,
    pairing: HeadPairing,
    lambda_init: float,
    seed: int,
    heads: tuple[int, ...] | None = None,
) -> LayerWeights:
    """Returns LLaMA's attention with rows and columns in the order of a pairing, and a norm of weight 1.

    The lambda vectors are random with q2 = q1 and k2 = k1: their exponentials cancel exactly, and the gradients do
    not.

    Args:
        tensors: LLaMA's tensors of the layer.
        config: The source's, with every field of a plain LLaMA.
        pairing: Which heads become one.
        lambda_init: The config's value for this layer.
        seed: Of the lambda vectors.
        heads: The heads that are differential; all by default.
    """
    map_dim = config.head_dim
    layout = paired_layout(pairing, config.num_attention_heads, config.num_key_value_heads, map_dim)
    attention = {}
    for name, tensor in tensors.items():
        if name.startswith("self_attn."):
            below = name.removeprefix("self_attn.")
            attention[below] = layout.get(ROLES[below], Keep())(tensor)
    device = attention["q_proj.weight"].device
    generator = torch.Generator().manual_seed(seed)
    for name in ("lambda_q", "lambda_k"):
        drawn = (0.1 * torch.randn(map_dim, generator=generator)).to(device)
        attention[f"diff_lambda.{name}1"] = drawn
        attention[f"diff_lambda.{name}2"] = drawn.clone()
    attention["sub_norm.weight"] = torch.ones(2 * map_dim, device=device)
    return LayerWeights(pairing, lambda_init, STRICT_EPS, attention, heads)


def chunks(num_rows: int, num_tokens: int, max_chunk_tokens: int = 8192) -> Iterator[slice]:
    """Yields slices of sequences, each of about `max_chunk_tokens` tokens.

    Args:
        num_rows: Number of sequences.
        num_tokens: Tokens per sequence.
        max_chunk_tokens: Tokens of a slice, or one sequence if that is longer.
    """
    step = max(1, max_chunk_tokens // num_tokens)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[Callable[[], torch.Tensor]]:
    """Watches a module: the function it yields returns the first argument of the module's last call."""
    seen: list[torch.Tensor] = []

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[:] = [args[0]]

    handle = module.register_forward_pre_hook(note)
    try:
        yield lambda: seen[0]
    finally:
        handle.remove()


@dataclass
class Streams:
    """Hidden states around the current layer: all (R, T, C), float32.

    Each layer is fitted on `converted` against LLaMA's `after_attention` and `after_layer`, so that errors of earlier
    layers are part of what it repairs.

    Attributes:
        original: LLaMA's, before the layer.
        converted: The converted model's, before the layer.
        after_attention: LLaMA's, after the layer's attention.
        after_layer: LLaMA's, after the layer.
    """

    original: torch.Tensor
    converted: torch.Tensor
    after_attention: torch.Tensor
    after_layer: torch.Tensor

    @classmethod
    def start(cls, embedded: torch.Tensor) -> "Streams":
        """Returns the hidden states before the first layer, from embedded tokens (R, T, C)."""
        return cls(embedded, embedded.clone(), torch.empty_like(embedded), torch.empty_like(embedded))

    def look_ahead(self, llama: LlamaLayers, layer: LlamaDecoderLayer, index: int) -> None:
        """Computes LLaMA's hidden states after this layer's attention and after the layer.

        Args:
            llama: The source's layers.
            layer: This one.
            index: Its index, for messages.

        Raises:
            ConversionError: They are not finite.
        """
        with torch.no_grad(), inputs_of(layer.post_attention_layernorm) as after_attention:
            for rows in chunks(*self.original.shape[:2]):
                self.after_layer[rows] = llama.run(layer, self.original[rows])
                self.after_attention[rows] = after_attention()
        if not self.after_layer.isfinite().all():
            row, token = (~self.after_layer.isfinite()).any(-1).nonzero()[0].tolist()
            raise ConversionError(
                f"layer {index}: LLaMA's own activations are NaN or Inf on the calibration text (first in sequence "
                f"{row}, token {token}); look for NaN in its weights, or convert without calibration"
            )

    def advance(self, llama: LlamaLayers, converted_layer: nn.Module) -> None:
        """Moves both models' hidden states to the next layer.

        Args:
            llama: The source's layers.
            converted_layer: This layer as converted.
        """
        with torch.no_grad():
            for rows in chunks(*self.converted.shape[:2]):
                self.converted[rows] = llama.run(converted_layer, self.converted[rows])
        self.original, self.after_layer = self.after_layer, self.original

    def stay_original(self) -> None:
        """Moves both models' hidden states to the next layer, with this layer left as it is."""
        self.converted.copy_(self.after_layer)
        self.original, self.after_layer = self.after_layer, self.original
