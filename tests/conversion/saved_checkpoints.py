"""A small checkpoint for the tests of the writer, and what they ask of it."""

from pathlib import Path

import pytest
import torch

from conversion.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec, plan_shards
from conversion.errors import ConversionError, FilesError


TENSORS = {f"layer.{n}": torch.full((n + 1, 4), float(n)) for n in range(6)} | {
    "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 2),
}


def specs_of(tensors):
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def writer_for(target, max_shard_bytes=150, tensors=TENSORS, **options):
    options = {"source": None, "overwrite": False, "resume": False, "fingerprint": "run 1"} | options
    return CheckpointWriter(target, plan_shards(specs_of(tensors), max_shard_bytes), **options)


def write(target, tensors=TENSORS, **options):
    with writer_for(target, tensors=tensors, **options) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, tensors)
        writer.write_text("config.json", "{}")
        writer.commit()


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refusal(action, *args, **options):
    with pytest.raises(FilesError) as caught:
        action(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in shape, dtype and bits, so that NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def read_refusal(folder: Path, error: type[ConversionError] = ConversionError, **options: bool) -> str:
    with pytest.raises(ConversionError) as caught:
        CheckpointReader(folder, **options)
    message = str(caught.value)
    assert type(caught.value) is error
    assert message and "\n" not in message
    return message
