"""Where a healing keeps its work: rows and Trainer checkpoints, beside the target, for a run that continues it."""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open

from conversion.checkpoint import CheckpointReader
from conversion.checkpoint.kept_work import folder_bytes, keep_note, read_state, state_to_go_on_from, write_state
from conversion.checkpoint.output_folder import check_space, locked, parents_made
from conversion.checkpoint.writer import SMALL_FILES_BYTES
from conversion.errors import file_errors
from conversion.healing.data import HELD_OUT_ROWS, map_rows, pack_rows, rows_to_read, split_rows
from conversion.healing.options import HealingOptions, HealOptimizer, HealStage, Trained
from conversion.healing.output import stored_specs


KEPT_CHECKPOINTS = 2
IDENTITY, COUNTS, TRAINER = "identity.json", "rows.json", "trainer"


def processes() -> PartialState:
    """The processes of this run; without an accelerator, accelerate joins them only if it is told to use the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


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
def opened(
    folder: Path, identity: Callable[[], Mapping[str, Any]], resume: bool | None, num_bytes: int
) -> Iterator[None]:
    """
    The folder, empty and with room for `num_bytes`, or as an earlier run of the same identity left it.

    `checkpoint.kept_work` says which, by `resume`. It is held against other runs, and stays only with a Trainer
    checkpoint in it, from which a run can continue.
    Raises FilesError for a folder of another run, naming what differs, for one in use, and for too little room.
    """
    state = processes()
    with parents_made(folder), locked(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            _open(folder, identity(), resume, num_bytes)
        state.wait_for_everyone()
        try:
            yield
        except BaseException as error:
            if state.is_main_process and last_checkpoint(folder / TRAINER) is not None:
                keep_note(error, folder)
            elif state.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _open(folder: Path, identity: Mapping[str, Any], resume: bool | None, num_bytes: int) -> None:
    costly = last_checkpoint(folder / TRAINER) is not None
    if state_to_go_on_from(folder / IDENTITY, identity, resume, costly=costly) is not None:
        check_space(folder, num_bytes - folder_bytes(folder))
        return
    with file_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        check_space(folder, num_bytes)
        folder.mkdir()
    write_state(folder / IDENTITY, identity)


def last_checkpoint(trainer_folder: Path) -> Path | None:
    """The newest Trainer checkpoint that is whole."""
    found = {}
    for path in trainer_folder.glob("checkpoint-*"):
        try:
            step = json.loads((path / "trainer_state.json").read_text())["global_step"]
            _check_whole(path)
        except (OSError, ValueError, KeyError, SafetensorError, zipfile.BadZipFile):  # killed while it was written
            continue
        found[step] = path
    return found[max(found)] if found else None


def _check_whole(checkpoint: Path) -> None:
    """Raises for a file that is cut short: safetensors begin with their sizes, torch's archives end with a list."""
    for path in checkpoint.iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth"):
            zipfile.ZipFile(path).close()


def packed_rows(
    folder: Path,
    data: Sequence[Path],
    held_out: Sequence[Path],
    tokenizer: Any,
    *,
    row_tokens: int,
    vocab_size: int,
    max_rows: int | None,
    held_out_rows: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rows (R, T) to train on, `max_rows` at most, and rows to measure on: of `held_out`, or else the first of the data.

    Packed by one process into the work folder, once. Raises ConversionError for data that will not do.
    """
    counts = folder / COUNTS
    files = {"train": folder / "rows", "held_out": folder / "held-out-rows"}
    if processes().is_main_process and not counts.exists():
        wanted = max_rows if held_out else rows_to_read(max_rows, held_out_rows)
        packed = {"train": len(pack_rows(data, tokenizer, row_tokens, vocab_size, wanted, files["train"]))}
        if held_out:
            most = held_out_rows or HELD_OUT_ROWS
            rows = pack_rows(held_out, tokenizer, row_tokens, vocab_size, most, files["held_out"])
            packed["held_out"] = len(rows)
        write_state(counts, packed)
    processes().wait_for_everyone()
    sizes = read_state(counts)
    rows = map_rows(files["train"], sizes["train"], row_tokens)
    if not held_out:
        return split_rows(rows, held_out_rows)
    return rows, map_rows(files["held_out"], sizes["held_out"], row_tokens)
