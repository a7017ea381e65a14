"""Where a healing keeps its work next to the target, rows and Trainer checkpoints, for a run that continues it."""

import json
import math
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
from conversion.data.text import map_rows, pack_rows
from conversion.errors import file_errors
from conversion.healing.config import KEPT_CHECKPOINTS
from conversion.healing.options import HealingOptions, HealOptimizer, HealStage, Trained
from conversion.healing.output import stored_specs
from conversion.healing.rows import HELD_OUT_ROWS, rows_to_read, split_rows


IDENTITY = "identity.json"
COUNTS = "rows.json"
TRAINER = "trainer"


def processes() -> PartialState:
    """Returns the processes of this run; without an accelerator, accelerate joins them only if told to use the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def least_bytes(reader: CheckpointReader, options: HealingOptions, steps: int | None) -> int:
    """Returns what a healing needs on disk at the least: the output next to Trainer checkpoints.

    These are float32 weights and the optimizer's moments of those that are trained: two with AdamW, one with Muon,
    the few of adapters not counted.

    Args:
        reader: The checkpoint.
        options: The healing's options.
        steps: How many steps it has; None: not known yet, so as many as there are checkpoints.
    """
    output = sum(spec.num_bytes for spec in stored_specs(reader, options.dtype).values()) + SMALL_FILES_BYTES
    if options.lora_r:
        return output
    sizes = {name: torch.Size(info.shape).numel() for name, info in reader.tensors.items()}
    attention_alone = options.stage == HealStage.LOCAL or options.train == Trained.ATTENTION
    trained = sum(size for name, size in sizes.items() if not attention_alone or ".self_attn." in name)
    moments = 1 if options.optimizer == HealOptimizer.MUON else 2
    checkpoint = 4 * (sum(sizes.values()) + moments * trained)
    saved = _num_checkpoints(options.save_steps, steps)
    # The oldest goes when the newest is whole; when the output is written, the newest ones are still there.
    return max(min(saved, KEPT_CHECKPOINTS + 1) * checkpoint, min(saved, KEPT_CHECKPOINTS) * checkpoint + output)


def _num_checkpoints(save_steps: float, steps: int | None) -> int:
    """Returns how many checkpoints are saved, as the Trainer counts them: the last step has one, too."""
    if save_steps < 1:
        interval = save_steps if steps is None else math.ceil(save_steps * steps) / steps
        return math.ceil(1 / interval)
    return KEPT_CHECKPOINTS + 1 if steps is None else math.ceil(steps / save_steps)


@contextmanager
def opened(
    folder: Path, identity: Callable[[], Mapping[str, Any]], resume: bool | None, num_bytes: int
) -> Iterator[None]:
    """Opens the folder, empty or as an earlier run of the same identity left it.

    It is held against other runs, and stays only with a Trainer checkpoint in it, from which a run can continue.

    Args:
        folder: The folder.
        identity: Tells what two runs have in common where one continues the other.
        resume: What becomes of work that is there, as `checkpoint.kept_work` says.
        num_bytes: Room that an empty folder needs.

    Raises:
        FilesError: The folder is another run's, naming what differs, or in use, or there is too little room.
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
    """Returns the newest Trainer checkpoint that is whole, None without one."""
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
    """Raises for a file that is cut short: safetensors begin with their sizes, archives of torch end with a list."""
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
    """Returns rows (R, T) to train on and rows to measure on; one process packs them into the work folder, once.

    Args:
        folder: The work folder.
        data: Text to train on.
        held_out: Text to measure on; without it, the first rows of the data.
        tokenizer: The checkpoint's tokenizer.
        row_tokens: Tokens per row.
        vocab_size: Number of tokens that the model knows.
        max_rows: Most rows to train on; None: all there are.
        held_out_rows: Rows to measure on; None: as `split_rows` chooses.

    Raises:
        ConversionError: The data will not do.
    """
    counts = folder / COUNTS
    files = {"train": folder / "rows", "held_out": folder / "held-out-rows"}
    if processes().is_main_process and not counts.exists():
        shape = {"tokenizer": tokenizer, "row_tokens": row_tokens, "vocab_size": vocab_size}
        wanted = max_rows if held_out else rows_to_read(max_rows, held_out_rows)
        packed = {"train": len(pack_rows(data, max_rows=wanted, file=files["train"], **shape))}
        if held_out:
            most = held_out_rows or HELD_OUT_ROWS
            packed["held_out"] = len(pack_rows(held_out, max_rows=most, file=files["held_out"], **shape))
        write_state(counts, packed)
    processes().wait_for_everyone()
    sizes = read_state(counts)
    rows = map_rows(files["train"], sizes["train"], row_tokens)
    if not held_out:
        return split_rows(rows, held_out_rows)
    return rows, map_rows(files["held_out"], sizes["held_out"], row_tokens)
