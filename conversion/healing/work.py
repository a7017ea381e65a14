"""Where a healing keeps its work: rows and Trainer checkpoints, beside the target, for a run that takes them up."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from conversion.errors import FilesError, file_errors
from conversion.healing.data import map_rows, pack_rows, split_rows
from conversion.target import locked


IDENTITY, COUNTS = "identity.json", "rows.json"


def processes() -> PartialState:
    """The processes of this run; without an accelerator, accelerate joins them only if it is told to use the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def work_folder(output: Path) -> Path:
    real = output.absolute()
    return real.with_name(f".{real.name}.healing")


@contextmanager
def opened(folder: Path, identity: Mapping[str, Any], resume: bool) -> Iterator[None]:
    """
    The folder, empty, or with `resume` as an earlier run of the same identity left it; held against other runs.

    Raises FilesError for a folder of another run, naming what differs, and for one in use.
    """
    state = processes()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            with file_errors(folder):
                _open(folder, json.loads(json.dumps(identity)), resume)
        state.wait_for_everyone()
        yield


def _open(folder: Path, identity: Mapping[str, Any], resume: bool) -> None:
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
