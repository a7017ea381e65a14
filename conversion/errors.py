"""What a conversion refuses, and the exit code of each refusal; usage errors and signals are the command line's."""

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any


class ConversionError(Exception):
    """Bad input. The message is one line: file, tensor or field, what was found, what was expected, the way out."""

    exit_code = 1

    def __init__(self, message: object) -> None:
        """Escapes the message: most name something out of a file."""
        super().__init__(escape(message))


class FilesError(ConversionError):
    """Disk, permissions or the target folder. The message is one line, as above."""

    exit_code = 3


class MemoryLimitError(ConversionError):
    """The memory of the machine, or what this process may use of it. The message is one line, as above."""

    exit_code = 3


# On the command line: its options by the names that their values have in Python. None: called from Python.
_OPTIONS: ContextVar[Mapping[str, str] | None] = ContextVar("options", default=None)


def typed(argument: str, value: Any = None) -> str:
    """Returns an argument as the user typed it: `lambda_start` in Python is `--lambda` on the command line.

    Args:
        argument: The name in Python.
        value: What to give it, for a way out: `dtype='float32'` in Python is `--dtype float32` on the command line.
    """
    options = _OPTIONS.get()
    if options is None:
        return argument if value is None else f"{argument}={value!r}"
    option = options.get(argument, f"--{argument.replace('_', '-')}")
    return option if value is None or value is True else f"{option} {value}"


@contextmanager
def typed_as(options: Mapping[str, str]) -> Iterator[None]:
    """Lets `typed` name arguments by these options, as long as a command runs."""
    before = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(before)


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


def memory_error(error: BaseException, what: object) -> MemoryLimitError | None:
    """Returns a lack of memory in one line that begins with `what`, None for any other error.

    Python, torch and the libraries below them each have their own way of saying so.
    """
    lacking = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    said = isinstance(error, RuntimeError) and re.search(
        r"out of memory|(can't|cannot) allocate memory", str(error), re.I
    )
    # Of a library that is loaded when memory is short: ctypes and an import each pass on the dynamic linker's words.
    linked = isinstance(error, (ImportError, OSError)) and re.search(
        r"failed to map segment from shared object|cannot map zero-fill pages", str(error)
    )
    if not lacking and not said and not linked:
        return None
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return MemoryLimitError(
        f"{what}: not enough memory ({reason[:200]}); free some, raise this process's limit (ulimit -v), or ask for "
        "less at once"
    )


@contextmanager
def memory_errors(what: object) -> Iterator[None]:
    """Turns a lack of memory into a MemoryLimitError that begins with `what`."""
    try:
        yield
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        if lacking := memory_error(error, what):
            raise lacking from error
        raise


def escape(text: object) -> str:
    """Returns the text on one line, with `\\x1b`, `\\n`, `\\u202e` in place of what cannot be seen.

    Everything foreign passes through here before it is printed, logged, raised as an error or put into a card.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)


def quote(name: object) -> str:
    """Returns a name out of a file, safe to print: one line, quoted, shortened."""
    text = repr(name)
    return text if len(text) <= 120 else text[:117] + "..."


# The form of the Hub's user tokens.
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
