"""Where a healing keeps its work: rows and Trainer checkpoints, beside the target, for a run that takes them up."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from conversion.checkpoint import CheckpointReader
from conversion.errors import FilesError, file_errors
from conversion.healing.data import map_rows, pack_rows, split_rows
from conversion.healing.options import HealingOptions, HealOptimizer, HealStage, Trained
from conversion.healing.output import stored_specs
from conversion.target import check_space, locked, partial_folder
from conversion.writer import SMALL_FILES_BYTES


KEPT_CHECKPOINTS = 2
IDENTITY, COUNTS, TRAINER = "identity.json", "rows.json", "trainer"


def processes() -> PartialState:
    """The processes of this run; without an accelerator, accelerate joins them only if it is told to use the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def work_folder(real: Path) -> Path:
    """Where a healing for the target `real` keeps what it can go on from."""
    return partial_folder(real).with_suffix(".healing")


def least_bytes(reader: CheckpointReader, options: HealingOptions, steps: int | None) -> int:
    """
    What a healing needs on disk at the least: the output beside Trainer checkpoints.

    These are float32 weights and the optimiser's moments of those that are trained: two with AdamW, one with Muon,
    the few adapters' not counted. `steps` None: as many as there are checkpoints to save.
    """
    output = sum(spec.num_bytes for spec in stored_specs(reader, options.dtype).values()) + SMALL_FILES_BYTES
    if options.lora:
        return output
    sizes = {name: torch.Size(info.shape).numel() for name, info in reader.tensors.items()}
    attention_alone = options.stage == HealStage.LOCAL or options.train == Trained.ATTENTION
    trained = sum(size for name, size in sizes.items() if not attention_alone or ".self_attn." in name)
    moments = 1 if options.optimizer == HealOptimizer.MUON else 2
    checkpoint = 4 * (sum(sizes.values()) + moments * trained)
    saved = min(options.checkpoints, steps or options.checkpoints)
    # The oldest goes when the newest is whole; when the output is written, the newest ones are still there.
    return max(min(saved, KEPT_CHECKPOINTS + 1) * checkpoint, min(saved, KEPT_CHECKPOINTS) * checkpoint + output)


@contextmanager
def opened(folder: Path, identity: Mapping[str, Any], resume: bool, num_bytes: int) -> Iterator[None]:
    """
    The folder, empty and with room for `num_bytes`, or with `resume` as an earlier run of the same identity left it.

    It is held against other runs, and stays behind only with a Trainer checkpoint in it, from which a run can go on.
    Raises FilesError for a folder of another run, naming what differs, for one in use, and for too little room.
    """
    state = processes()
    with file_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            with file_errors(folder):
                _open(folder, json.loads(json.dumps(identity)), resume, num_bytes)
        state.wait_for_everyone()
        try:
            yield
        finally:
            if state.is_main_process and last_checkpoint(folder / TRAINER) is None:
                shutil.rmtree(folder, ignore_errors=True)


def _open(folder: Path, identity: Mapping[str, Any], resume: bool, num_bytes: int) -> None:
    path = folder / IDENTITY
    if resume and path.is_file():
        earlier = json.loads(path.read_text())
        if differing := sorted(key for key in identity if earlier.get(key) != identity[key]):
            raise FilesError(
                f"{folder}: belongs to another run, with different {', '.join(differing)}; repeat what that run was "
                "given, or leave out --resume to start afresh"
            )
        return
    shutil.rmtree(folder, ignore_errors=True)
    check_space(folder, num_bytes)
    folder.mkdir()
    path.write_text(json.dumps(identity))


def file_identity(paths: Sequence[Path]) -> list[Any]:
    """Names, sizes and times of files, and of the files in folders."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def last_checkpoint(trainer_folder: Path) -> Path | None:
    """The newest Trainer checkpoint that is whole: its state is written last."""
    found = {}
    for path in trainer_folder.glob("checkpoint-*"):
        try:
            found[json.loads((path / "trainer_state.json").read_text())["global_step"]] = path
        except (OSError, ValueError, KeyError):  # killed while it was being written
            continue
    return found[max(found)] if found else None


def packed_rows(
    folder: Path,
    data: Sequence[Path],
    held_out: Sequence[Path],
    tokenizer: Any,
    *,
    row_tokens: int,
    vocab_size: int,
    max_rows: int | None,
    held_out_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rows (R, T) to train on, `max_rows` at most, and rows to measure on: of `held_out`, or else the first of the data.

    Packed by one process into the work folder, once. Raises ConversionError for data that will not do.
    """
    counts = folder / COUNTS
    files = {"train": folder / "rows", "held_out": folder / "held-out-rows"}
    if processes().is_main_process and not counts.exists():
        wanted = None if max_rows is None else max_rows + (held_out_rows if not held_out else 0)
        packed = {"train": len(pack_rows(data, tokenizer, row_tokens, vocab_size, wanted, files["train"]))}
        if held_out:
            rows = pack_rows(held_out, tokenizer, row_tokens, vocab_size, held_out_rows, files["held_out"])
            packed["held_out"] = len(rows)
        counts.write_text(json.dumps(packed))
    processes().wait_for_everyone()
    sizes = json.loads(counts.read_text())
    rows = map_rows(files["train"], sizes["train"], row_tokens)
    if not held_out:
        return split_rows(rows, held_out_rows)
    return rows, map_rows(files["held_out"], sizes["held_out"], row_tokens)
