"""The terminal: foreign text is escaped, and a stream that cannot be written to does not end the run."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.console import Console

from conversion.errors import FilesError, escape


class Stream:
    """Writes to sys.stdout or sys.stderr; keeps the first error, after which what is written goes nowhere."""

    def __init__(self, name: str) -> None:
        """Takes "stdout" or "stderr", looked up at each use."""
        self.name = name
        self.failure: Exception | None = None

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "rich_proxied_file":  # which would have rich write past this class
            raise AttributeError(attribute)
        return getattr(self._stream(), attribute)

    def _stream(self) -> Any:
        stream = getattr(sys, self.name) or io.StringIO()  # None: closed before the start
        return getattr(stream, "rich_proxied_file", stream)  # not rich's own stand-in during a progress bar

    def write(self, text: str) -> int:
        """Writes the text, if it can."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, if it can."""
        self._try("flush")

    def _try(self, method: str, *arguments: str) -> None:
        stream = self._stream()
        if self.failure:
            return
        try:
            getattr(stream, method)(*arguments)
        except (OSError, ValueError) as error:  # full, closed, a reader that went away, a terminal that hung up
            self.failure = error
            # What stays in its buffer would fail again when the interpreter ends, and change the exit code.
            with suppress(OSError, ValueError):
                sink = os.open(os.devnull, os.O_WRONLY)
                os.dup2(sink, stream.fileno())
                os.close(sink)


STDOUT = Stream("stdout")
STDERR = Stream("stderr")
# Neither markup nor emoji: paths may hold [brackets] and :colons:.
out = Console(file=STDOUT, markup=False, emoji=False, highlight=False)  # type: ignore[arg-type]
err = Console(file=STDERR, stderr=True, markup=False, emoji=False, highlight=False)  # type: ignore[arg-type]


def say(text: object, style: str | None = None, console: Console = out) -> None:
    """Prints one line, whatever is in the text."""
    console.print(escape(text), style=style, soft_wrap=True)


class NoteHandler(logging.Handler):
    """Prints what a run logs as notes, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        say(f"note: {record.getMessage()}", "yellow", err)


@contextmanager
def results_shown(only_result: bool = False) -> Iterator[None]:
    """Makes of a result that cannot be shown a line on stderr: the exit code tells of the run, which is finished.

    Args:
        only_result: What is shown is all that the command gives, and without it the command has failed.

    Raises:
        typer.Exit: With the code of file errors, for `only_result`. Never for a reader that has read enough.
    """
    STDOUT.failure = None
    yield
    STDOUT.flush()
    failure = STDOUT.failure
    if failure is None or isinstance(failure, BrokenPipeError):
        return
    reason = failure.strerror if isinstance(failure, OSError) else str(failure)
    if only_result:
        say(f"error: the result cannot be written to the standard output ({reason})", "red", err)
        raise typer.Exit(FilesError.exit_code)
    say(f"the work is done, but its result cannot be written to the standard output ({reason})", "yellow", err)
