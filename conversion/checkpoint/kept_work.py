"""
What a stopped run keeps next to its target for one that continues it: shards, layers, checkpoints, each in a folder.

Every folder has a state file, written atomically, that says whose work it is. `resume` says what a run does with work
it finds: True continues it, and refuses that of another run; False discards it; None continues its own, refuses
where hours of another run's would be lost, and replaces the rest, and says so.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.checkpoint.json_files import read_json
from conversion.errors import ConversionError, FilesError, file_errors


KINDS = {"partial": "finished shards", "calibration": "finished layers", "healing": "checkpoints"}

logger = logging.getLogger(__name__)


def partial_folder(real: Path) -> Path:
    """Returns where a checkpoint for the target `real` is built: next to it, so that a rename can move it there."""
    name = real.name
    if len(os.fsencode(name)) > 200:  # names end at 255 bytes, and ours is longer
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return real.with_name(f".{name}.partial")


def calibration_folder(real: Path) -> Path:
    """Returns where a calibration for the target `real` keeps what it has fitted."""
    return partial_folder(real).with_suffix(".calibration")


def healing_folder(real: Path) -> Path:
    """Returns where a healing for the target `real` keeps rows and Trainer checkpoints."""
    return partial_folder(real).with_suffix(".healing")


def kept_work(target: Path) -> list[Path]:
    """Returns the folders next to `target` in which stopped runs have kept their work."""
    partial = partial_folder(target.resolve())
    return [folder for kind in KINDS if (folder := partial.with_suffix(f".{kind}")).exists()]


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of the files in a folder; 0 if it is not there."""
    with file_errors(folder):
        return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def described(folder: Path) -> str:
    """Returns a folder of kept work with what it holds: `/out/.v1.calibration (finished layers, 12.3 MB)`."""
    kind = KINDS.get(folder.suffix.removeprefix("."), "finished layers")  # in a folder that a caller has named
    return f"{folder} ({kind}, {folder_bytes(folder) / 1e6:,.1f} MB)"


def keep_note(error: BaseException, folder: Path) -> None:
    """Adds to the error that stops a run what it has kept: the command line prints it."""
    error.add_note(f"kept: {described(folder)}")


def state_to_go_on_from(
    path: Path, identity: Mapping[str, Any], resume: bool | None, *, costly: bool
) -> dict[str, Any] | None:
    """Returns the state that a run of the same identity has left; logs what is continued or replaced.

    Args:
        path: The state file.
        identity: All that the results of a run depend on.
        resume: What to do with work that is there, as this module says.
        costly: Whether what lies in the folder took more than minutes.

    Returns:
        The state; None where there is none, or it is to be discarded.

    Raises:
        FilesError: The state is of another run (the message names what differs) or damaged, and not to be replaced.
    """
    folder = path.parent
    if resume is False or not (path.exists() or costly):
        return None
    wanted = json.loads(json.dumps(identity, default=str))
    try:
        state = read_state(path)
        differing = [part for part, value in wanted.items() if state.get(part) != value]
        if differing:
            raise FilesError(
                f"{described(folder)}: belongs to another run, with different {', '.join(differing)}; repeat what "
                "that run was given, or discard its work (--no-resume)"
            )
    except FilesError as error:
        if resume or costly:
            raise
        logger.warning("%s; replaced", error)
        return None
    if resume is None:
        logger.warning("continuing from %s, kept by a stopped run; --no-resume starts afresh", described(folder))
    return state


def read_state(path: Path) -> dict[str, Any]:
    """Returns the content of a state file.

    Raises:
        FilesError: It is missing, cannot be read or is damaged; the message has the way out.
    """
    advice = "expected the state of a stopped run; discard its work (--no-resume)"
    if not path.exists():
        raise FilesError(f"{path}: missing, {advice}")
    try:
        return read_json(path)
    except FilesError:
        raise
    except ConversionError as error:
        raise FilesError(f"{path}: damaged, {advice}") from error


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes the state as JSON, whole or not at all, whenever the process or the machine stops."""
    fresh = path.with_name(path.name + ".new")
    with file_errors(path):
        with fresh.open("wb") as stream:
            stream.write(json.dumps(state, default=str).encode())
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(fresh, path)
