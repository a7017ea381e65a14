"""Lazy reader of checkpoint folders: checks every file before it hands out a tensor; knows files, no models."""

import hashlib
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from copy import copy
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open

from conversion.checkpoint.file_identity import file_state
from conversion.checkpoint.json_files import parse_json, read_small
from conversion.checkpoint.safetensors_format import LFS_POINTER, TensorInfo, read_header
from conversion.errors import (
    ConversionError,
    FilesError,
    MemoryLimitError,
    file_errors,
    memory_errors,
    quote,
    typed,
)


SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
INDEX_SUFFIX = ".index.json"
# Names about which index and shards may disagree, as old code and tied models make them: buffers and the head. Where
# one of them is needed and nowhere, whoever needs it says so.
LOOSELY_LISTED = re.compile(r"(.*\.)?(rotary_emb\.\w+|masked_bias|causal_mask|lm_head\.weight)")
NO_WEIGHTS = {
    "adapter_model.*": "an adapter; convert its base model, with this folder as --adapter",
    "*.gguf": "GGUF; convert from the original Hugging Face checkpoint",
    "consolidated.*": "Meta's own format; use the Hugging Face checkpoint of the same model",
    "model-*-of-*.safetensors": "shards without model.safetensors.index.json; download the index",
    "pytorch_model-*-of-*.bin": "shards without pytorch_model.bin.index.json; download the index",
}
CHUNK_ENTRIES = 1 << 24


class CheckpointReader:
    """The tensors of a checkpoint folder, by name.

    Opening reads and checks the index and every header (offsets, sizes, names, links) and no tensor data.
    `tensors` is sorted by name, `files` are the weight files in order. Safetensors are preferred; pickles need
    `allow_pickle` and are loaded with weights_only. Rotary inv_freq tensors are listed if a file holds them.

    Args:
        folder: Where config.json and the weight files are.
        allow_pickle: Whether pytorch_model.bin is read where there are no safetensors.
        with_adapter: Whether an adapter may lie next to the weights, because the caller takes care of it.

    Raises:
        ConversionError: The folder is not one sound checkpoint, or an adapter lies next to the weights.
        FilesError: It cannot be read.
    """

    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]

    def __init__(self, folder: Path, *, allow_pickle: bool = False, with_adapter: bool = False) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            found = "is a file" if self.folder.exists() else "does not exist"
            raise ConversionError(f"{folder}: {found}, expected a checkpoint folder; check the path")
        single, listed = _find_weights(self.folder)
        if not with_adapter and (self.folder / ADAPTER_CONFIG).is_file():
            raise ConversionError(
                f"{folder}: {ADAPTER_CONFIG} next to whole weights: from_pretrained applies this adapter where PEFT "
                f"is installed; carry it over with `convert --adapter {folder}`, or remove {ADAPTER_CONFIG} to take "
                "the weights alone"
            )
        self.is_pickle = single == PICKLE
        if self.is_pickle and not allow_pickle:
            raise pickles_refused(folder)
        names = sorted(set(listed.values())) or [single]
        self._paths = {name: checked_path(self.folder, name) for name in names}
        with file_errors(self.folder):
            self._states = {name: file_state(path.stat()) for name, path in self._paths.items()}
        self._pickles: dict[str, dict[str, torch.Tensor]] = {}
        self._offsets: dict[str, int] = {}
        infos = [info for name in names for info in self._open(name)]
        self.tensors = MappingProxyType(_checked_tensors(self.folder, infos, listed))
        self.files = tuple(self._paths.values())

    def _open(self, file: str) -> Iterable[TensorInfo]:
        path = self._paths[file]
        if self.is_pickle:
            self._pickles[file] = load_pickle(path)
            return [
                TensorInfo(name, tuple(tensor.shape), tensor.dtype, tensor.nbytes, file)
                for name, tensor in self._pickles[file].items()
            ]
        placed = read_header(path, file)
        try:
            # A second opinion: what we accept, everyone who loads with the safetensors library accepts.
            with memory_errors(path), safe_open(path, framework="pt") as library:
                library.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise ConversionError(f"{path}: refused by safetensors ({error}); download it again") from error
        self._offsets |= {info.name: offset for info, offset in placed.items()}
        return placed

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor, in memory of its own (safetensors) or mapped from the file (pickles).

        May be called by several threads.

        Args:
            name: One of `tensors`.

        Raises:
            KeyError: There is no tensor of that name.
            ConversionError: The file has changed since it was opened.
        """
        info = self.tensors[name]
        if not info.file:
            return torch.zeros(info.shape, dtype=info.dtype)
        path = self._paths[info.file]
        if self.is_pickle:
            with file_errors(path):
                self._check_unchanged(info.file, path.stat())
            return self._pickles[info.file][info.name]
        # Read, not mapped: mapped pages count as the process's memory until the file is closed, and a file cut short
        # under a map kills the process.
        with memory_errors(f"{path}: tensor {quote(info.name)} of {info.num_bytes:,} bytes"):
            data = torch.empty(info.num_bytes, dtype=torch.uint8)
        with file_errors(path), path.open("rb", buffering=0) as stream:
            stream.seek(self._offsets[info.name])
            view = data.numpy().data
            while view:
                count = stream.readinto(view)
                if not count:
                    raise ConversionError(f"{path}: ends within tensor {quote(info.name)}; it changed meanwhile")
                view = view[count:]
            # After the last byte: then what was read, and what `sha256` reads, is what was opened.
            self._check_unchanged(info.file, os.fstat(stream.fileno()))
        return data.view(info.dtype).reshape(info.shape)

    def selected(self, names: Mapping[str, str], zeros: Iterable[TensorInfo] = ()) -> "CheckpointReader":
        """Returns a reader of the same files that knows fewer tensors, and these by other names.

        Args:
            names: The tensors to keep: from their new names to the stored ones.
            zeros: Tensors that are in no file (`file` is empty) and are read as zeros.
        """
        reader = copy(self)
        tensors = {name: self.tensors[stored] for name, stored in names.items()} | {info.name: info for info in zeros}
        reader.tensors = MappingProxyType(dict(sorted(tensors.items())))
        return reader

    def sha256(self) -> dict[str, str]:
        """Returns the hex digest of each weight file by its relative path; reads every byte, may run in a thread.

        Raises:
            ConversionError: A file has changed since it was opened.
        """
        digests = {}
        for file, path in self._paths.items():
            with file_errors(path), path.open("rb") as stream:
                digests[file] = hashlib.file_digest(stream, "sha256").hexdigest()
                self._check_unchanged(file, os.fstat(stream.fileno()))
        return digests

    def content(self) -> dict[str, str]:
        """Returns digests of all that the tensors are read from: those of `sha256`, and of what else `read` uses."""
        return self.sha256()

    def check_unchanged(self) -> None:
        """Checks the files once more after all was read: a pickle is mapped, and its data come after `read`.

        Raises:
            ConversionError: A file has changed since it was opened.
        """
        for file, path in self._paths.items():
            with file_errors(path):
                self._check_unchanged(file, path.stat())

    def _check_unchanged(self, file: str, now: os.stat_result) -> None:
        if file_state(now) != self._states[file]:
            raise ConversionError(
                f"{self._paths[file]}: changed while being read; leave the source alone and run again"
            )


def count_nonfinite(tensor: torch.Tensor) -> tuple[int, tuple[int, ...] | None]:
    """Counts the entries of a tensor that are NaN or infinite.

    Args:
        tensor: Of any shape and dtype.

    Returns:
        Their number, and the index of the first; None where there are none.
    """
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0, None
    count = 0
    first = None
    # In chunks, so that the copies and masks stay small next to the tensor.
    for index, chunk in enumerate(tensor.detach().reshape(-1).split(CHUNK_ENTRIES)):
        if chunk.dtype.itemsize == 1:
            chunk = chunk.float()
        if not chunk.is_complex() and all(extreme.isfinite() for extreme in torch.aminmax(chunk)):
            continue
        places = chunk.isfinite().logical_not_().nonzero().flatten()
        if first is None and len(places):
            first = index * CHUNK_ENTRIES + int(places[0])
        count += len(places)
    if first is None:
        return 0, None
    return count, tuple(int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape))


def _find_weights(folder: Path) -> tuple[str, dict[str, str]]:
    """Returns the name of a single weight file in the format found, and the index's map from tensor to file."""
    for single in (SAFETENSORS, PICKLE):
        index = single + INDEX_SUFFIX
        # lexists: a dangling link, as in a Hub cache that lost a blob, is a missing file, not another format.
        has_single = os.path.lexists(folder / single)
        if os.path.lexists(folder / index):
            listed = read_index(checked_path(folder, index))
            if has_single and single not in listed.values():
                raise ConversionError(f"{folder}: both {single} and {index} are there; remove the outdated one")
            return single, listed
        if has_single:
            return single, {}
    with file_errors(folder):
        raise no_weights(folder, sorted(path.name for path in folder.iterdir()))


def no_weights(place: object, names: Iterable[str]) -> ConversionError:
    """Returns the error for a folder or repository, `place`, none of whose files, `names`, are weights to read."""
    for pattern, advice in NO_WEIGHTS.items():
        if found := next((name for name in names if fnmatch(name, pattern)), None):
            return ConversionError(f"{place}/{found}: {advice}")
    return ConversionError(
        f"{place}: no weights, expected {SAFETENSORS} or {SAFETENSORS}{INDEX_SUFFIX}; check the path"
    )


def pickles_refused(place: object) -> ConversionError:
    """Returns the error for a folder or repository, `place`, with nothing but pickled weights."""
    return ConversionError(
        f"{place}: only pickled weights here, which can carry code; "
        f"get the safetensors version, or allow pickles ({typed('allow_pickle', True)})"
    )


def read_index(path: Path) -> dict[str, str]:
    """Returns the file of each tensor, as an index of shards lists it.

    Raises:
        ConversionError: It is not such an index.
    """
    data = read_small(path)
    if data.startswith(LFS_POINTER):
        raise ConversionError(f"{path}: a git-lfs pointer, not the index; run `git lfs pull` in its folder")
    listed = parse_json(data, path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ConversionError(f"{path}: weight_map is {quote(listed)}, expected an object from tensor names to files")
    for name, file in listed.items():
        if not isinstance(file, str) or not file:
            raise ConversionError(f"{path}: tensor {quote(name)} is in {quote(file)}, expected a file name")
    return listed


def checked_path(folder: Path, file: str) -> Path:
    """Returns the path of a file that is there and, with links followed, inside the folder.

    A Hub cache is the one exception: its snapshots link to blobs/ next to them.

    Args:
        folder: The checkpoint.
        file: Path relative to it, as an index or a user names it.

    Raises:
        ConversionError: It is missing, outside, or not a regular file.
        FilesError: It cannot be read.
    """
    path = folder / file
    if Path(file).is_absolute() or ".." in Path(file).parts or "\\" in file or not file.isprintable():
        raise ConversionError(
            f"{folder}: index names {quote(file)}, expected a file inside the folder; download the index again"
        )
    try:
        home = folder.resolve()
        real = path.resolve(strict=True)
    except FileNotFoundError as error:
        raise ConversionError(f"{path}: missing; download it again") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise FilesError(f"{path}: cannot be read ({error}); check permissions and links") from error
    caches = (parent.parent for parent in home.parents if parent.name == "snapshots")
    home = next((cache for cache in caches if cache.name.startswith("models--")), home)
    if not real.is_relative_to(home):
        raise ConversionError(f"{path}: links to {real}, outside the folder; copy the file itself here")
    if not real.is_file():
        raise ConversionError(f"{path}: not a regular file; download it again")
    return path


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a pickled state dict, mapped from the file where its format allows.

    Raises:
        ConversionError: The file is damaged, or holds anything but dense tensors.
    """
    with file_errors(path), path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ConversionError(f"{path}: a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
    try:
        # The format before torch 1.6 is no zip archive and cannot be mapped: it is in memory whole.
        with memory_errors(path):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryLimitError:
        raise
    except Exception as error:  # a damaged or hostile file can fail anywhere in the unpickler
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(
            f"{path}: refused by torch.load ({reason[:200]}); get the safetensors version"
        ) from error
    if not isinstance(state, dict):
        raise ConversionError(f"{path}: holds a {type(state).__name__}, expected a state dict; save the state dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ConversionError(f"{path}: {quote(name)} holds a {type(tensor).__name__}, expected a dense tensor")
    return {name: tensor.detach() for name, tensor in state.items()}


def _checked_tensors(folder: Path, infos: Iterable[TensorInfo], listed: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Returns tensors by sorted name, after comparing the shards with each other and with the index."""
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        if info.name in tensors:
            raise ConversionError(
                f"{folder}: tensor {quote(info.name)} is in both {tensors[info.name].file} and {info.file}; "
                "remove outdated shards or download again"
            )
        tensors[info.name] = info
    if not tensors:
        raise ConversionError(f"{folder}: the weight files hold no tensors; download them again")
    if listed:
        for name in sorted(listed.keys() | tensors.keys()):
            there = tensors[name].file if name in tensors else "no file"
            if there != listed.get(name) and not LOOSELY_LISTED.fullmatch(name):
                raise ConversionError(
                    f"{folder}: tensor {quote(name)} is in {there}, the index says {listed.get(name, 'nothing')}; "
                    "index and shards are of different checkpoints, download them again"
                )
    return dict(sorted(tensors.items()))
