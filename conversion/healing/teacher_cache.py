"""
A teacher's answers on disk, computed once: later runs on the same rows need no teacher in memory.

Of rows to train on the most likely tokens are kept, which are few bytes of many rows; of rows to measure on what all
logits are made of, so that what is measured is not short of the unlikely ones.

R rows to train on, M to measure on, T tokens per row, K tokens kept per position, C hidden size, V vocabulary.
"""

import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch.nn.functional import cross_entropy, linear

from conversion.checkpoint.file_identity import content_identity
from conversion.checkpoint.kept_work import folder_bytes
from conversion.checkpoint.output_folder import check_space, locked
from conversion.errors import file_errors
from conversion.healing.losses import IGNORED, LogitTargets, Targets, TopTargets, chunks_of, next_tokens
from conversion.healing.teacher import LiveTeacher, weight_files


HELD_OUT = "held-out.safetensors"
LAYOUT = 2  # of the files: 1 had the most likely tokens of all rows


@dataclass(frozen=True)
class CachedTeacher:
    """
    Ids (R, T, K), log-probabilities (R, T, K) and -log p of the next token (R, T) of rows to train on, mapped from
    files; the last hidden states (M, T, C) of the rows to measure on, which are numbered after them, and the matrix
    (V, C) that makes logits of those.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    next_losses: torch.Tensor
    states: torch.Tensor
    lm_head: torch.Tensor

    def targets(self, ids: torch.Tensor, numbers: torch.Tensor) -> Targets:
        numbers = numbers.cpu()
        held_out = numbers - len(self.ids)
        if (held_out >= 0).all():
            states = self.states[held_out].to(ids.device).flatten(0, 1)
            return LogitTargets(linear(states, self.lm_head.to(ids.device)))
        return TopTargets(
            self.ids[numbers].to(ids.device).flatten(0, 1),
            self.log_probs[numbers].to(ids.device).flatten(0, 1),
            self.next_losses[numbers].to(ids.device).flatten(),
        )


def cache_path(
    folder: Path,
    teacher: Path,
    rows: torch.Tensor,
    held_out_rows: torch.Tensor,
    *,
    num_kept: int,
    dtype: str | None,
) -> Path:
    """Returns where the cache of these rows is or will be: the name holds teacher, rows, K and precision."""
    files = content_identity(weight_files(teacher))
    shapes = [list(rows.shape), list(held_out_rows.shape)]
    digest = hashlib.sha256(json.dumps([LAYOUT, files, shapes, num_kept, dtype]).encode())
    for part in (rows, held_out_rows):
        digest.update(part.contiguous().numpy().tobytes())
    return folder / digest.hexdigest()[:24]


def open_cache(path: Path, shape: tuple[int, int, int]) -> CachedTeacher:
    """Returns the cache at `path`, which is complete if it is there; shape (R, T, K)."""
    return CachedTeacher(
        *(
            torch.from_file(str(path / name), shared=False, size=torch.Size(size).numel(), dtype=dtype).view(size)
            for name, dtype, size in _files(shape)
        ),
        **load_file(path / HELD_OUT),
    )


def fill_cache(
    path: Path,
    teacher: LiveTeacher,
    rows: torch.Tensor,
    held_out_rows: torch.Tensor,
    *,
    num_kept: int,
    batch_rows: int,
) -> None:
    """Writes the cache; it appears under its name when it is whole, and a stopped run keeps its part.

    Args:
        path: Where it will be.
        teacher: The teacher in memory.
        rows: Token ids to train on, (R, T).
        held_out_rows: Token ids to measure on, (M, T).
        num_kept: Tokens to keep per position of those to train on.
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
                _write_cache(partial, teacher, rows, held_out_rows, num_kept=num_kept, batch_rows=batch_rows)
            except BaseException as error:
                if folder_bytes(partial):
                    error.add_note(f"kept: {partial} (a teacher's logits, {folder_bytes(partial) / 1e6:,.1f} MB)")
                else:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            os.rename(partial, path)


def _write_cache(
    folder: Path,
    teacher: LiveTeacher,
    rows: torch.Tensor,
    held_out_rows: torch.Tensor,
    *,
    num_kept: int,
    batch_rows: int,
) -> None:
    """Writes what an earlier run that was stopped has not: a folder's name says what it is of."""
    folder.mkdir(exist_ok=True)
    lm_head = teacher.model.lm_head.weight.detach()
    held_out_bytes = (held_out_rows.numel() * lm_head.shape[1] + lm_head.numel()) * lm_head.element_size()
    files = _files((*rows.shape, num_kept))
    row_bytes = {name: torch.Size(size[1:]).numel() * dtype.itemsize for name, dtype, size in files}
    paths = {name: folder / name for name in row_bytes}
    for path in paths.values():
        path.touch()
    done = min(paths[name].stat().st_size // num_bytes for name, num_bytes in row_bytes.items())
    done -= done % batch_rows  # the same batches, and so the same bits, as without the stop
    check_space(folder, (len(rows) - done) * sum(row_bytes.values()) + held_out_bytes)
    device = lm_head.device
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
    # What logits are made of is many times smaller than they are, and as exact.
    states = [teacher.last_states(batch.long().to(device)).cpu() for batch in held_out_rows.split(batch_rows)]
    (folder / HELD_OUT).write_bytes(save({"states": torch.cat(states), "lm_head": lm_head.cpu()}))


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
