"""The target folder of a conversion: whether it can be used, the lock on it, and the swap that makes it appear."""

import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from conversion.checkpoint.kept_work import calibration_folder, folder_bytes, partial_folder
from conversion.errors import FilesError, file_errors


CHECKPOINT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
AT_FDCWD = -100  # Linux, <linux/fcntl.h>
RENAME_EXCHANGE = 2  # <linux/fs.h>


def check_target(target: Path, *, source: Path | None, overwrite: bool) -> Path:
    """Checks that a target can take a checkpoint, and touches nothing.

    Args:
        target: The folder, whether it is there or not.
        source: Folder that is read from, if there is one.
        overwrite: Whether an existing checkpoint may be replaced.

    Returns:
        The real path, with links followed.

    Raises:
        FilesError: A file, a mount point, the source or in or around it, not writable; not empty without
            `overwrite`, and not a checkpoint with it.
    """
    try:
        real = Path(target).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise FilesError(f"{target}: cannot be resolved ({error}); choose another target") from error
    with file_errors(real):
        if source is not None:
            _check_apart(target, real, source)
        if real.exists():
            _check_replaceable(target, real, overwrite)
        parent = next(folder for folder in real.parents if folder.exists())
        if not parent.is_dir():
            raise FilesError(f"{target}: {parent} is a file, expected a folder; choose another target")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise FilesError(f"{target}: no permission to write in {parent}; choose another target")
    return real


def _check_apart(target: Path, real: Path, source: Path) -> None:
    home = Path(source).resolve()
    # Compared as the file system does: bind mounts and case-insensitive disks give one folder several names.
    inside_target = any(_same(real, folder) for folder in home.parents)
    inside_source = any(_same(home, folder) for folder in real.parents)
    if inside_target:
        relation = "contains"
    elif inside_source:
        relation = "is inside"
    elif _same(real, home):
        relation = "is"
    else:
        return
    raise FilesError(f"{target}: {relation} the source {source}, which is never changed; choose another target")


def _same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def _check_replaceable(target: Path, real: Path, overwrite: bool) -> None:
    if not real.is_dir():
        raise FilesError(f"{target}: is a file, expected a folder or a new name; choose another target")
    if os.path.ismount(real):
        raise FilesError(f"{target}: is a mount point, which cannot be swapped in one step; choose a folder inside it")
    if not any(real.iterdir()):
        return
    if not overwrite:
        raise FilesError(f"{target}: exists and is not empty; choose another target, or overwrite it (--overwrite)")
    # Overwriting removes all that is there; a mistyped path must not cost someone their home folder.
    if not any(next(real.glob(pattern), None) for pattern in CHECKPOINT_FILES):
        raise FilesError(f"{target}: is not empty and no checkpoint (no config.json or weights); empty it yourself")


def check_space(folder: Path, num_bytes: int) -> None:
    """Checks that the disk that will hold `folder` has `num_bytes` free.

    Raises:
        FilesError: It has fewer.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    with file_errors(existing):
        free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise FilesError(
            f"{folder}: {num_bytes / 1e9:.3f} GB are needed, {free / 1e9:.3f} GB are free; "
            "free space there, or choose another target"
        )


def check_room(real: Path, num_bytes: int) -> None:
    """Checks that `num_bytes` fit next to the target `real`, in addition to what an earlier run has left there.

    What it has left is kept as a part of them, or removed before they are written.

    Raises:
        FilesError: They do not fit.
    """
    left = [folder_bytes(folder) for folder in (partial_folder(real), calibration_folder(real))]
    check_space(real, num_bytes - sum(left))


@contextmanager
def parents_made(path: Path) -> Iterator[None]:
    """Makes the parent folders of `path`, and at the end removes those of them that are empty."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        with file_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Locks `partial` against other runs, until the process ends if need be.

    Raises:
        FilesError: Another run has it.
    """
    path = partial.with_name(partial.name + ".lock")
    while True:
        with file_errors(path):
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A run that just ended has removed the file under us: then this is a lock on nothing.
                if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                    break
            except BlockingIOError as error:
                os.close(descriptor)
                raise FilesError(f"{path}: another run is writing this target; wait for it to end") from error
            os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def swap_in(built: Path, real: Path, aside: Path, overwrite: bool) -> None:
    """Makes the folder `built` appear as `real` in one step; what was at `real` ends up at `built` or `aside`.

    Where the system cannot exchange two folders there is a moment without `real`; `restore` repairs a run that was
    killed in it.
    """
    with file_errors(real):
        if not (overwrite and real.exists()):
            os.rename(built, real)  # replaces an empty folder; fails if someone has filled it meanwhile
        elif not _exchange(built, real):
            os.rename(real, aside)
            try:
                os.rename(built, real)
            except BaseException:
                restore(real, aside)
                raise
        sync_folder(real.parent)


def restore(real: Path, aside: Path) -> None:
    """Puts back what `swap_in` moved aside, if nothing came in its place."""
    if aside.exists() and not real.exists():
        os.rename(aside, real)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two paths in one step, and returns whether the system and the file system can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that the names in it outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Replaces a small file of a finished checkpoint in one step.

    Raises:
        FilesError: The disk; the old file then stays.
    """
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Replaces a file, or writes it, whole or not at all.

    Raises:
        FilesError: The disk; the old file then stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    with file_errors(path):
        try:
            with partial.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def record_text(record: Mapping[str, Any]) -> str:
    """Returns a record as conversion.json has it."""
    return json.dumps(record, indent=2, sort_keys=True) + "\n"
