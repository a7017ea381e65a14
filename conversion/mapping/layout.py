"""Pure tensor rules: what a checkpoint's tensors are called, and what becomes of each; knows no files and no models.

V vocabulary, C hidden, I intermediate, H LLaMA heads, G LLaMA KV heads, d or D map_dim.
`TENSORS` is the one table of names; a layout says what becomes of the rows and columns of the attention.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from conversion.mapping.heads import HeadPairing, Sizes


# Name, shape in the letters above (Q = H d, K = G d), role, and the field of `Sizes` on which it depends. A bias has
# the rows of its weight.
TENSORS = (
    ("model.embed_tokens.weight", "VC", "keep", ""),
    ("model.layers.{layer}.input_layernorm.weight", "C", "keep", ""),
    ("model.layers.{layer}.self_attn.q_proj.weight", "QC", "queries", ""),
    ("model.layers.{layer}.self_attn.q_proj.bias", "Q", "queries", "attention_bias"),
    ("model.layers.{layer}.self_attn.k_proj.weight", "KC", "keys", ""),
    ("model.layers.{layer}.self_attn.k_proj.bias", "K", "keys", "attention_bias"),
    ("model.layers.{layer}.self_attn.q_norm.weight", "D", "keep", "qk_norm"),
    ("model.layers.{layer}.self_attn.k_norm.weight", "D", "keep", "qk_norm"),
    ("model.layers.{layer}.self_attn.v_proj.weight", "KC", "values", ""),
    ("model.layers.{layer}.self_attn.v_proj.bias", "K", "values", "attention_bias"),
    ("model.layers.{layer}.self_attn.o_proj.weight", "CQ", "outputs", ""),
    ("model.layers.{layer}.self_attn.o_proj.bias", "C", "keep", "attention_out_bias"),
    ("model.layers.{layer}.post_attention_layernorm.weight", "C", "keep", ""),
    ("model.layers.{layer}.mlp.gate_proj.weight", "IC", "keep", ""),
    ("model.layers.{layer}.mlp.gate_proj.bias", "I", "keep", "mlp_bias"),
    ("model.layers.{layer}.mlp.up_proj.weight", "IC", "keep", ""),
    ("model.layers.{layer}.mlp.up_proj.bias", "I", "keep", "mlp_bias"),
    ("model.layers.{layer}.mlp.down_proj.weight", "CI", "keep", ""),
    ("model.layers.{layer}.mlp.down_proj.bias", "C", "keep", "mlp_bias"),
    ("model.norm.weight", "C", "keep", ""),
    ("lm_head.weight", "VC", "keep", "lm_head"),
)


def llama_tensors(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...], str, int | None]]:
    """Yields every tensor of a LLaMA of these sizes, in file order: name, shape, role, and layer, if it is in one."""
    present = [tensor for tensor in TENSORS if not tensor[3] or getattr(sizes, tensor[3])]
    of_layers = [tensor for tensor in present if "{layer}" in tensor[0]]
    for template, letters, role, _ in present:
        if template == of_layers[0][0]:
            for layer in range(sizes.num_layers):
                for name, shape, part, _ in of_layers:
                    yield name.format(layer=layer), sizes.shape(shape), part, layer
        if "{layer}" not in template:
            yield template, sizes.shape(letters), role, None


ZEROS = -1  # in an order of blocks


class Transform(Protocol):
    """A rule for one tensor, which knows its own inverse and the shape it makes."""

    def __call__(self, tensor: torch.Tensor, /) -> torch.Tensor: ...
    def shape(self, shape: tuple[int, ...], /) -> tuple[int, ...]: ...
    def inverse(self) -> "Transform": ...


@dataclass(frozen=True)
class Keep:
    """Leaves a tensor unchanged."""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def inverse(self) -> "Keep":
        return self


@dataclass(frozen=True)
class Scale:
    """Multiplies by a factor, in float64, so that the result is rounded once, by whoever stores it."""

    factor: float

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() * self.factor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def inverse(self) -> "Scale":
        return Scale(1 / self.factor)


@dataclass(frozen=True)
class TakeBlocks:
    """Takes blocks of a tensor in another order: a permutation, or a mirror where blocks repeat.

    The inverse of a mirror takes the first of each block's copies.

    Attributes:
        axis: Dimension along which the blocks lie.
        width: Size of a block.
        order: Indices of blocks; `ZEROS` is a block of zeros.
    """

    axis: int
    width: int
    order: tuple[int, ...]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.order == tuple(range(tensor.shape[self.axis] // self.width)):
            return tensor
        blocks = tensor.unflatten(self.axis, (-1, self.width))
        order = torch.tensor(self.order, device=tensor.device)
        taken = blocks.index_select(self.axis, order.clamp_min(0))
        if ZEROS in self.order:
            taken.index_fill_(self.axis, (order == ZEROS).nonzero()[:, 0], 0)
        return taken.flatten(self.axis, self.axis + 1)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[: self.axis], len(self.order) * self.width, *shape[self.axis + 1 :])

    def inverse(self) -> "TakeBlocks":
        first = {block: position for position, block in reversed(list(enumerate(self.order))) if block != ZEROS}
        return TakeBlocks(self.axis, self.width, tuple(first[block] for block in range(len(first))))


def paired_layout(pairing: HeadPairing, num_heads: int, num_kv_heads: int, map_dim: int) -> dict[str, Transform]:
    """Returns the layout LLaMA -> V1: rows of q, k, v and the columns of o move together.

    An idle head writes nothing. Its rows are those of its partner: both maps of the pair are then equal, their
    difference is the partner's map times 1 - lambda, and gradients separate them. Rows of zeros would get none.

    Args:
        pairing: Which heads become one.
        num_heads: LLaMA's heads, without idle ones.
        num_kv_heads: LLaMA's KV heads, without idle ones.
        map_dim: Width of a LLaMA head.
    """
    kv_heads = _partners_for_idle(pairing.kv_heads, num_kv_heads)
    return {
        "queries": TakeBlocks(0, map_dim, _partners_for_idle(pairing.query_heads, num_heads)),
        "keys": TakeBlocks(0, map_dim, kv_heads),
        "values": TakeBlocks(0, map_dim, kv_heads),
        "outputs": TakeBlocks(1, map_dim, tuple(head if head < num_heads else ZEROS for head in pairing.query_heads)),
    }


def _partners_for_idle(heads: tuple[int, ...], count: int) -> tuple[int, ...]:
    return tuple(head if head < count else heads[position ^ 1] for position, head in enumerate(heads))


def mirrored_layout(num_heads: int, map_dim: int, lambda_bias: float) -> dict[str, Transform]:
    """Returns the layout LLaMA -> V2: each query head twice, o_proj over 1 - sigmoid(lambda_bias).

    Args:
        num_heads: LLaMA's heads.
        map_dim: Width of a LLaMA head.
        lambda_bias: The bias of `lambda_proj`; o_proj is multiplied by 1 + exp(lambda_bias).
    """
    return {
        "queries": TakeBlocks(0, map_dim, tuple(head for head in range(num_heads) for _ in (0, 1))),
        "outputs": Scale(1 + math.exp(lambda_bias)),
    }


def halves_layout(num_heads: int, num_kv_heads: int, map_dim: int) -> dict[str, Transform]:
    """Returns the layout transformers' `diffllama` -> V1: its o_proj already reads [v1; v2] head by head."""
    pairing = HeadPairing.halves(num_heads, num_kv_heads)
    return paired_layout(pairing, num_heads, num_kv_heads, map_dim) | {"outputs": Keep()}


def interleaved_layout(num_heads: int, num_kv_heads: int, map_dim: int) -> dict[str, Transform]:
    """Returns the layout of the authors' V1 flash files -> V1: rotary pairs (2j, 2j + 1) become (j, j + d / 2)."""

    def split_pairs(num_maps: int) -> TakeBlocks:
        rows = torch.arange(num_maps * map_dim).view(num_maps, map_dim // 2, 2).transpose(1, 2)
        return TakeBlocks(0, 1, tuple(rows.flatten().tolist()))

    return {"queries": split_pairs(num_heads), "keys": split_pairs(num_kv_heads)}
