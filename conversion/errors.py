"""What a conversion refuses, and the exit code of each refusal; usage errors and signals are the command line's."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ConversionError(Exception):
    """Bad input. The message is one line: file, tensor or field, what was found, what was expected, the way out."""

    exit_code = 1


class FilesError(ConversionError):
    """Disk, permissions or the target folder. The message is one line, as above."""

    exit_code = 3


WAYS_OUT = {
    errno.ENOSPC: "free space there, or choose another target",
    errno.EDQUOT: "free space there, or choose another target",
    errno.EFBIG: "the file system or a limit forbids files of this size: choose a smaller --max-shard-size",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose another place",
    errno.ENOTEMPTY: "another program filled it meanwhile: choose another target",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into a FilesError of one line; `path` is named where the OSError names none."""
    try:
        yield
    except OSError as error:
        way_out = WAYS_OUT.get(error.errno or 0, "check the disk and run again")
        raise FilesError(
            f"{error.filename2 or error.filename or path}: {error.strerror or error}; {way_out}"
        ) from error
