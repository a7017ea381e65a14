"""Atomic writer of sharded checkpoints: built next to the target, synced, renamed last; knows files, no models."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch

from conversion.checkpoint.file_identity import fields_sha256, file_sha256
from conversion.checkpoint.kept_work import keep_note, partial_folder, state_to_go_on_from, write_state
from conversion.checkpoint.output_folder import (
    check_space,
    check_target,
    locked,
    parents_made,
    record_text,
    restore,
    swap_in,
    sync_folder,
)
from conversion.checkpoint.reader import checked_path
from conversion.checkpoint.safetensors_format import TensorSpec
from conversion.checkpoint.shards import Shard, TensorSource
from conversion.errors import ConversionError, FilesError, file_errors, quote


RECORD = "conversion.json"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
JOURNAL = "journal.json"
HASHED_BEHIND_BYTES = 2**28  # smaller tensors are hashed while the next one is read: more speed for little memory
SMALL_FILES_BYTES = 32 * 2**20  # room kept for tokenizer, config, code


class CheckpointWriter:
    """Writes a checkpoint folder that appears whole or not at all.

    with CheckpointWriter(...) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, tensors)       # streams: tensors[name] is looked up once, written, dropped
        writer.copy_file(...)
        writer.write_text("config.json", ...)        # required, and kept for last
        writer.write_record("conversion.json", ...)  # after all that it records
        writer.commit()

    What stops a run (a signal, a full disk, an error that is not of the input) leaves the finished shards in
    `.TARGET.partial`, as SIGKILL does. Another run keeps those whose SHA-256 still is what it was, and writes the
    rest; `kept_work` says when, by `resume`.

    The partial folder holds `journal.json` (finished shards), `shards/` (under names no loader looks for) and `tree/`,
    which becomes the target; `aside` is the old target where two folders cannot be exchanged in one step.

    Args:
        target: Folder to create.
        shards: The weight files, in order.
        source: Folder that is read from and must not be written to, if there is one.
        overwrite: Whether to replace an existing checkpoint.
        resume: True continues the work of the same run and refuses that of another; False discards it; None
            continues its own and replaces the rest.
        fingerprint: Names source and options, so that only the very same work is continued; without one shards are
            never kept.

    Raises:
        FilesError: On entering: the target cannot be used, another run is writing it, or the disk is too small.
    """

    def __init__(
        self,
        target: Path,
        shards: list[Shard],
        *,
        source: Path | None,
        overwrite: bool,
        resume: bool | None,
        fingerprint: str | None,
    ) -> None:
        self.target = Path(target)
        self.shards = shards
        self.source = source
        self.overwrite = overwrite
        self.resume = resume if fingerprint else False
        # The plan is part of the identity: shards cut elsewhere are other files under the same names.
        plan = hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest()
        self._identity = {"source or options": fingerprint, "dtypes, shapes or shard size": plan}
        self.checksums: dict[str, str] = {}  # SHA-256 of every finished shard, by file name
        self._config: str | None = None
        self._committed = False
        self._held = ExitStack()

    def __enter__(self) -> Self:
        self._real = check_target(self.target, source=self.source, overwrite=self.overwrite)
        self._partial = partial_folder(self._real)
        self._tree = self._partial / "tree"
        self._aside = self._partial / "aside"
        with self._held as held, file_errors(self._partial):
            held.enter_context(parents_made(self._real))
            held.enter_context(locked(self._partial))
            restore(self._real, self._aside)
            check_target(self.target, source=self.source, overwrite=self.overwrite)
            journal = self._partial / JOURNAL
            earlier = state_to_go_on_from(journal, self._identity, self.resume, costly=False)
            held.push(self._clean_up)
            self._open_partial(None if earlier is None else earlier.get("checksums"))
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with file_errors(self._partial):
            self._held.__exit__(kind, error, trace)

    def pending(self) -> Iterator[Shard]:
        """Yields the shards that are not there yet; those kept by a stopped run were verified."""
        return (shard for shard in self.shards if shard.file_name not in self.checksums)

    def write_shard(self, shard: Shard, tensors: TensorSource) -> None:
        """Looks each of `shard.names` up once, in that order, and streams it to disk; memory: one tensor at a time.

        A tensor handed over must not be changed before this returns.

        Args:
            shard: One of `pending()`.
            tensors: Gives each tensor by its name.

        Raises:
            ConversionError: A tensor does not have the planned shape and dtype.
            FilesError: The disk.
        """
        path = self._part(shard)
        digest = hashlib.sha256()
        with file_errors(path), path.open("wb") as stream, ThreadPoolExecutor(1) as hasher:
            hashing: Future[None] | None = None

            def append(data: bytes | memoryview) -> None:
                nonlocal hashing
                if hashing is not None:
                    hashing.result()
                hashing = hasher.submit(digest.update, data)  # outside the interpreter lock, as the write is
                stream.write(data)
                if len(data) > HASHED_BEHIND_BYTES:
                    hashing.result()

            append(shard.header)
            for name in shard.names:
                append(_data(name, shard.specs[name], tensors[name]))
            _sync(stream)
        # The hasher is done here: the `with` has waited for it.
        self.checksums[shard.file_name] = digest.hexdigest()
        self._save_journal()

    def write_text(self, name: str, text: str) -> None:
        """Writes a UTF-8 file; `name` may have folders.

        Raises:
            FilesError: It was written before, or the disk.
        """
        if name == CONFIG:
            self._config = text
        else:
            self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file; `name` may have folders.

        Raises:
            FilesError: It was written before, or the disk.
        """
        with self._new_file(name) as stream:
            stream.write(data)

    def write_record(self, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a record as JSON, with the SHA-256 of all that computes: weights, config.json (and fields) and code.

        Args:
            name: Its file.
            record: All but the checksums.

        Returns:
            The record with the checksums.
        """
        assert self._config is not None, "config.json comes before the record"
        config = hashlib.sha256(self._config.encode()).hexdigest()
        code = {path.name: file_sha256(path) for path in self._tree.glob("*.py")}
        fields = fields_sha256(json.loads(self._config))
        written = {**record, "config_fields": fields, "sha256": {**self.checksums, CONFIG: config, **code}}
        self.write_text(name, record_text(written))
        return written

    def copy_file(self, path: Path, name: str | None = None) -> None:
        """Copies a file's contents (not its mode), as `name` if given.

        Raises:
            ConversionError: A file of the source is a link out of it.
            FilesError: The disk.
        """
        path = Path(path)
        if self.source is not None and path.is_relative_to(self.source):
            checked_path(Path(self.source), str(path.relative_to(self.source)))
        with file_errors(path), path.open("rb") as original, self._new_file(name or path.name) as stream:
            shutil.copyfileobj(original, stream)

    def commit(self) -> None:
        """Writes index and config.json, syncs, and renames the folder to the target; then removes an old checkpoint.

        Raises:
            ValueError: A shard or config.json was not written.
            FilesError: The disk, or someone has filled the target meanwhile.
        """
        missing = [shard.file_name for shard in self.pending()]
        if missing or self._config is None:
            raise ValueError(f"{', '.join(missing) or CONFIG} was not written; write every pending shard and {CONFIG}")
        with file_errors(self._partial):
            for shard in self.shards:
                os.rename(self._part(shard), self._tree / shard.file_name)
            if len(self.shards) > 1:
                self.write_bytes(INDEX, self._index().encode())
            self.write_bytes(CONFIG, self._config.encode())
            for folder, _, _ in os.walk(self._tree):
                sync_folder(Path(folder))
            swap_in(self._tree, self._real, self._aside, self.overwrite)
        self._committed = True
        try:
            shutil.rmtree(self._partial)
        except OSError as error:
            raise FilesError(f"{self.target}: complete, but {self._partial} stayed ({error}); remove it") from error

    def _open_partial(self, checksums: Any) -> None:
        """Readies the partial folder: empty, or with the finished shards of an earlier run, verified."""
        if isinstance(checksums, dict):
            self.checksums = checksums
        elif self._partial.exists():
            shutil.rmtree(self._partial)
        for folder in (self._partial, self._partial / "shards", self._tree):
            folder.mkdir(exist_ok=True)
        for shard in self.shards:
            if (moved := self._tree / shard.file_name).exists():  # killed within commit
                os.rename(moved, self._part(shard))
            digest = self.checksums.get(shard.file_name)
            if digest is None or digest != self._sha256(shard):
                self.checksums.pop(shard.file_name, None)
                self._part(shard).unlink(missing_ok=True)
        for folder in (self._tree, self._aside):
            shutil.rmtree(folder, ignore_errors=True)
        self._tree.mkdir()
        self._save_journal()
        check_space(self._partial, sum(shard.file_bytes for shard in self.pending()) + SMALL_FILES_BYTES)

    def _clean_up(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves nothing but finished shards, and those only where the same run could continue."""
        restore(self._real, self._aside)
        bad_input = isinstance(error, ConversionError) and not isinstance(error, FilesError)
        named = self._identity["source or options"] is not None
        if self._committed or bad_input or not named or not self.checksums:
            # What failed before is the error to report, not that its remains are stubborn.
            shutil.rmtree(self._partial, ignore_errors=True)
        elif error is not None:
            keep_note(error, self._partial)

    def _sha256(self, shard: Shard) -> str | None:
        path = self._part(shard)
        if not path.exists() or path.stat().st_size != shard.file_bytes:
            return None
        return file_sha256(path)

    def _save_journal(self) -> None:
        write_state(self._partial / JOURNAL, self._identity | {"checksums": self.checksums})

    def _part(self, shard: Shard) -> Path:
        return self._partial / "shards" / f"{shard.file_name}.part"

    def _index(self) -> str:
        weight_map = {name: shard.file_name for shard in self.shards for name in shard.names}
        total = sum(shard.num_bytes for shard in self.shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @contextmanager
    def _new_file(self, name: str) -> Iterator[BinaryIO]:
        path = self._tree / name
        with file_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as stream:
                yield stream
                _sync(stream)


def _data(name: str, spec: TensorSpec, tensor: torch.Tensor) -> memoryview:
    """Returns the tensor's bytes, without a copy where it is contiguous and on the CPU."""
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
        raise ConversionError(
            f"tensor {quote(name)}: {tensor.dtype} {tuple(tensor.shape)}, planned {spec.dtype} {spec.shape}; "
            "write what was planned"
        )
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
