"""Signals that stop a run: each unwinds it once, so that what is finished is kept and the rest removed."""

import signal
import sys
from types import FrameType


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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


def stop_on_signals() -> None:
    """Raises `Stopped` in the main thread for each of STOPPING; those ignored from the start (nohup) stay ignored."""
    for signum in STOPPING:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _stop)


def ignore_signals() -> None:
    """For the end of a process, which has nothing left to unwind."""
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)


def stopped_by(error: BaseException | None) -> Stopped | None:
    """The `Stopped` that is or led to `error`."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


def _stop(signum: int, frame: FrameType | None) -> None:
    # A second Ctrl-C while the first one is being handled would stop the clean-up. One that a library has swallowed
    # is no longer being handled, and the next is raised.
    if stopped_by(sys.exception()) is None:
        raise Stopped(signum)
