"""The header of a safetensors file, read with every check and written as the safetensors library writes it."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from conversion.checkpoint.json_files import parse_json
from conversion.errors import ConversionError, file_errors, quote


DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
DTYPE_ORDER = list(DTYPES.values())  # the library's own order, by width
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_DIMS = 64  # torch's own limit
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says of one tensor.

    Attributes:
        name: Its name in the weight file.
        shape: Its shape.
        dtype: Its dtype.
        num_bytes: Bytes of its data.
        file: Path of the weight file, relative to the folder; empty for a tensor of zeros that is in no file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int
    file: str


def read_header(path: Path, file: str) -> dict[TensorInfo, int]:
    """Reads the header of a safetensors file, and no tensor data.

    Args:
        path: The file.
        file: Its path relative to the checkpoint, for the TensorInfo.

    Returns:
        Every tensor, with the byte of the file at which its data begin.

    Raises:
        ConversionError: The file is damaged, or its tensors do not fill it without gap, overlap or rest.
        FilesError: It cannot be read.
    """
    with file_errors(path), path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(len(LFS_POINTER))
        length = _header_length(path, start, size)
        stream.seek(8)
        header = parse_json(stream.read(length), f"{path}: header")
    header.pop("__metadata__", None)
    placed = sorted(
        (_placed_tensor(path, file, name, entry) for name, entry in header.items()),
        key=lambda item: (item[1], item[1] + item[0].num_bytes),
    )
    _check_coverage(path, placed, size - 8 - length)
    return {info: 8 + length + begin for info, begin in placed}


def _header_length(path: Path, start: bytes, size: int) -> int:
    if start == LFS_POINTER:
        raise ConversionError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
    if size < 10:
        raise ConversionError(f"{path}: {size} bytes, too short for a safetensors file; download it again")
    length = int.from_bytes(start[:8], "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ConversionError(
            f"{path}: announces a header of {length} bytes in a file of {size} (limit {MAX_HEADER_BYTES}); "
            "not a safetensors file, or truncated: download it again"
        )
    return length


def _placed_tensor(path: Path, file: str, name: str, entry: object) -> tuple[TensorInfo, int]:
    """Checks one header entry; returns it, and where its data begin, counted from the end of the header."""
    label = f"{path}: tensor {quote(name)}"
    if not isinstance(entry, dict):
        raise ConversionError(f"{label}: header entry is a {type(entry).__name__}, expected an object; save it again")
    shape = entry.get("shape")
    offsets = entry.get("data_offsets")
    if not _is_naturals(shape):
        raise ConversionError(
            f"{label}: shape {quote(shape)}, expected at most {MAX_DIMS} whole numbers; save it again"
        )
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ConversionError(f"{label}: data_offsets {quote(offsets)}, expected [begin, end]; save it again")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
    if dtype is None:
        raise ConversionError(f"{label}: dtype {quote(entry.get('dtype'))}, expected one of {', '.join(DTYPES)}")
    spec = TensorSpec(tuple(shape), dtype)
    begin, end = offsets
    if end - begin != spec.num_bytes:
        raise ConversionError(
            f"{label}: data_offsets span {end - begin} bytes, but shape {quote(shape)} of {entry['dtype']} takes "
            f"{spec.num_bytes}; download the file again"
        )
    return TensorInfo(name, spec.shape, dtype, spec.num_bytes, file), begin


def _is_naturals(value: object) -> TypeGuard[list[int]]:
    # type, not isinstance: true and false are no sizes.
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        return False
    return all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_coverage(path: Path, placed: list[tuple[TensorInfo, int]], data_bytes: int) -> None:
    end = 0
    for info, begin in placed:
        if begin != end:
            fault = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise ConversionError(
                f"{path}: tensor {quote(info.name)} starts at data byte {begin}, expected {end}: it {fault}; "
                "download the file again"
            )
        end = begin + info.num_bytes
    if end > data_bytes:
        raise ConversionError(
            f"{path}: truncated: tensor {quote(placed[-1][0].name)} ends at data byte {end} of {data_bytes}; "
            "download it again"
        )
    if end < data_bytes:
        raise ConversionError(f"{path}: {data_bytes - end} trailing bytes after the last tensor; download it again")


def file_order(specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Returns names in the order of their data: widest dtype first, which keeps each tensor aligned, then by name."""
    return tuple(sorted(specs, key=lambda name: (-DTYPE_ORDER.index(specs[name].dtype), name)))


def encode_header(specs: Mapping[str, TensorSpec]) -> bytes:
    """Returns all that precedes the data of a file with these tensors in `file_order`, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in file_order(specs):
        begin = end
        end += specs[name].num_bytes
        header[name] = {
            "dtype": DTYPE_NAMES[specs[name].dtype],
            "shape": list(specs[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
