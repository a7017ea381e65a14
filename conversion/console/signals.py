"""Signals that stop a run: each unwinds it once, so that what is finished is kept and the rest removed."""

import atexit
import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import NoReturn


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEATED_SECONDS = 1.0
_last_seconds = float("-inf")  # when the last signal came


class Stopped(BaseException):
    """A signal that stops the run, by its number; as text, how the command line says it.

    No KeyboardInterrupt: libraries, that of the command line among them, turn those into exit codes of their own.
    """

    def __init__(self, signum: int) -> None:
        super().__init__("interrupted" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """As a shell has it."""
        return 128 + self.signum


EXIT_CODES = frozenset(Stopped(signum).exit_code for signum in STOPPING)


def stop_on_signals() -> None:
    """Raises `Stopped` in the main thread for each of STOPPING; those ignored from the start (nohup) stay ignored."""
    for signum in STOPPING:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _stop)


def end_stopped(exit_code: int) -> NoReturn:
    """Ends the process of a run that was stopped and unwound, at once.

    The interpreter would wait for every thread first, and for one whose start the signal has interrupted, forever.
    Temporary folders are removed all the same.
    """
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def stopped_by(error: BaseException | None) -> Stopped | None:
    """Returns the `Stopped` that is or led to `error`."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


def _stop(signum: int, frame: FrameType | None) -> None:
    """Raises, unless an earlier signal is at work: a second Ctrl-C would stop the clean-up.

    One that a library has swallowed is not, and after REPEATED_SECONDS the next is raised.
    """
    global _last_seconds
    repeated = time.monotonic() - _last_seconds < REPEATED_SECONDS
    _last_seconds = time.monotonic()
    if not repeated and stopped_by(sys.exception()) is None:
        raise Stopped(signum)
