"""
A teacher's most likely tokens on disk, computed once: later runs on the same rows need no teacher in memory.

R rows, T tokens per row, K tokens kept per position, V vocabulary.
"""

import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from conversion.checkpoint.file_identity import content_identity
from conversion.checkpoint.kept_work import folder_bytes
from conversion.checkpoint.output_folder import check_space, locked
from conversion.errors import file_errors
from conversion.healing.losses import IGNORED, LogitTargets, Targets, TopTargets, chunks_of, next_tokens
from conversion.healing.teacher import LiveTeacher, weight_files


@dataclass(frozen=True)
class CachedTeacher:
    """Ids (R, T, K), log-probabilities (R, T, K) and -log p of the next token (R, T), mapped from files."""

    ids: torch.Tensor
    log_probs: torch.Tensor
    next_losses: torch.Tensor

    def targets(self, ids: torch.Tensor, numbers: torch.Tensor) -> Targets:
        numbers = numbers.cpu()
        return TopTargets(
            self.ids[numbers].to(ids.device).flatten(0, 1),
            self.log_probs[numbers].to(ids.device).flatten(0, 1),
            self.next_losses[numbers].to(ids.device).flatten(),
        )


def cache_path(folder: Path, teacher: Path, rows: torch.Tensor, *, num_kept: int, dtype: str | None) -> Path:
    """Returns where the cache of these rows is or will be: the name holds teacher, rows, K and precision."""
    files = content_identity(weight_files(teacher))
    digest = hashlib.sha256(json.dumps([files, list(rows.shape), num_kept, dtype]).encode())
    digest.update(rows.contiguous().numpy().tobytes())
    return folder / digest.hexdigest()[:24]


def open_cache(path: Path, shape: tuple[int, int, int]) -> CachedTeacher:
    """Returns the cache at `path`, which is complete if it is there; shape (R, T, K)."""
    return CachedTeacher(
        *(
            torch.from_file(str(path / name), shared=False, size=torch.Size(size).numel(), dtype=dtype).view(size)
            for name, dtype, size in _files(shape)
        )
    )


def fill_cache(
    path: Path,
    teacher: LiveTeacher,
    rows: torch.Tensor,
    *,
    num_kept: int,
    batch_rows: int,
) -> None:
    """Writes the cache of rows (R, T); it appears under its name when it is whole, and a stopped run keeps its part.

    Args:
        path: Where it will be.
        teacher: The teacher in memory.
        rows: Token ids, (R, T).
        num_kept: Tokens to keep per position.
        batch_rows: How many rows to compute at once.

    Raises:
        FilesError: The disk fails, or another run writes the same cache.
    """
    partial = path.with_name(path.name + ".partial")
    with file_errors(partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            if path.exists():  # another run's, meanwhile
                return
            try:
                _write_cache(partial, teacher, rows, num_kept=num_kept, batch_rows=batch_rows)
            except BaseException as error:
                if folder_bytes(partial):
                    error.add_note(f"kept: {partial} (a teacher's logits, {folder_bytes(partial) / 1e6:,.1f} MB)")
                else:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            os.rename(partial, path)


def _write_cache(folder: Path, teacher: LiveTeacher, rows: torch.Tensor, *, num_kept: int, batch_rows: int) -> None:
    """Writes what an earlier run that was stopped has not: a folder's name says what it is of."""
    folder.mkdir(exist_ok=True)
    files = _files((*rows.shape, num_kept))
    row_bytes = {name: torch.Size(size[1:]).numel() * dtype.itemsize for name, dtype, size in files}
    paths = {name: folder / name for name in row_bytes}
    for path in paths.values():
        path.touch()
    done = min(paths[name].stat().st_size // num_bytes for name, num_bytes in row_bytes.items())
    done -= done % batch_rows  # the same batches, and so the same bits, as without the stop
    check_space(folder, (len(rows) - done) * sum(row_bytes.values()))
    device = next(teacher.model.parameters()).device
    with ExitStack() as opened:
        streams = [opened.enter_context(path.open("r+b")) for path in paths.values()]
        for stream, num_bytes in zip(streams, row_bytes.values(), strict=True):
            stream.truncate(done * num_bytes)
            stream.seek(0, os.SEEK_END)
        for start in range(done, len(rows), batch_rows):
            batch = rows[start : start + batch_rows].long().to(device)
            kept = most_likely(teacher.targets(batch, batch), batch, num_kept)
            for stream, part in zip(streams, kept, strict=True):
                stream.write(part.cpu().contiguous().numpy().tobytes())


def most_likely(
    targets: Targets, rows: torch.Tensor, num_kept: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns ids and log-probabilities (N, K) of the K most likely tokens, and -log p (N,) of the next tokens.

    Args:
        targets: The teacher's logits on the rows.
        rows: Token ids, (B, T).
        num_kept: K.
    """
    assert isinstance(targets, LogitTargets)
    labels = next_tokens(rows)
    ids = []
    log_probs = []
    losses = []
    for tokens in chunks_of(*targets.logits.shape):
        top = targets.logits[tokens].float().log_softmax(-1).topk(num_kept, dim=-1)
        ids.append(top.indices.int())
        log_probs.append(top.values)
        logits = targets.logits[tokens].float()
        losses.append(cross_entropy(logits, labels[tokens], ignore_index=IGNORED, reduction="none"))
    return torch.cat(ids), torch.cat(log_probs), torch.cat(losses)


def _files(shape: tuple[int, int, int]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [
        ("ids", torch.int32, shape),
        ("log_probs", torch.float32, shape),
        ("next_losses", torch.float32, shape[:2]),
    ]
