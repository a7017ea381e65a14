"""A small checkpoint for the tests of the writer, and what they ask of it."""

from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from conversion.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec, plan_shards
from conversion.checkpoint.safetensors_format import DTYPES
from conversion.errors import ConversionError, FilesError


TENSORS = {f"layer.{n}": torch.full((n + 1, 4), float(n)) for n in range(6)} | {
    "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 2),
}


def drawn_tensors(max_name: int):
    """Hypothesis: tensors by name, of any dtype and shape that a file may hold, which count from 1."""
    names = st.text(min_size=1, max_size=max_name).filter(lambda name: name != "__metadata__")
    specs = st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3))
    return st.dictionaries(names, specs.map(lambda spec: counting(*spec)), min_size=1, max_size=6)


def counting(dtype: str, shape: list[int]) -> torch.Tensor:
    return torch.arange(1, 28)[: torch.Size(shape).numel()].reshape(shape).to(DTYPES[dtype])


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
