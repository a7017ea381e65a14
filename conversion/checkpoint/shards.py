"""Which tensors go into which weight file, and the order of their data in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from conversion.checkpoint.safetensors_format import DTYPE_NAMES, TensorSpec, encode_header, file_order
from conversion.errors import ConversionError, quote


@dataclass(frozen=True)
class Shard:
    """One output file and its tensors.

    Attributes:
        file_name: Name of the file in the checkpoint folder.
        specs: Shape and dtype of each tensor, by name.
    """

    file_name: str
    specs: Mapping[str, TensorSpec]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names in the order they are written (and looked up in `write_shard`)."""
        return file_order(self.specs)

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data, without the header."""
        return sum(spec.num_bytes for spec in self.specs.values())

    @cached_property
    def header(self) -> bytes:
        """All that precedes the tensor data in the file."""
        return encode_header(self.specs)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.num_bytes


class TensorSource(Protocol):
    """Anything with `source[name]`: a dict, or an object that computes the tensor when it is asked for it."""

    def __getitem__(self, name: str, /) -> torch.Tensor: ...


def plan_shards(tensors: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[Shard]:
    """Fills shards in the order given, under Hugging Face names.

    Args:
        tensors: Shape and dtype of each tensor, by name.
        max_shard_bytes: Largest size of the tensor data of a file; a larger tensor gets a file of its own.

    Returns:
        The files, one without a number if all tensors fit in it.

    Raises:
        ConversionError: The format lacks a dtype, or the limit is below 1.
    """
    if max_shard_bytes < 1:
        raise ConversionError(f"max_shard_bytes {max_shard_bytes}: expected at least 1; such as 5 * 10**9")
    groups: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in tensors.items():
        if spec.dtype not in DTYPE_NAMES:
            raise ConversionError(f"tensor {quote(name)}: safetensors has no {spec.dtype}; choose another --dtype")
        if groups[-1] and filled + spec.num_bytes > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += spec.num_bytes
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", group) for number, group in enumerate(groups, 1)
    ]
