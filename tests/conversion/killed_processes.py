"""Processes that die by SIGKILL at a step of their work or after a time. Not a test module."""

import itertools
import multiprocessing
import os
import signal
from typing import Any


# A fork server has what victims need imported once and no threads: each is a clean process, started in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "command_line", "random_llamas", "saved_checkpoints", "conversion.push"])


def no_sync(descriptor):
    """For fsync: a killed process, unlike a power cut, loses nothing that was written."""


def die_at_step(step: int | None, *functions: tuple[Any, str]) -> None:
    """Replaces functions, each an owner and a name: this process dies at the `step`th call of any of them."""
    calls = itertools.count(1)

    def counted(function):
        def call(*args, **kwargs):
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in functions:
        setattr(owner, name, counted(getattr(owner, name)))


def run_victim(function, *args, kill_after_s=None, **options) -> int:
    """Returns the exit code of a process that calls a function; it is killed after a time, if one is given."""
    process = PROCESSES.Process(target=function, args=args, kwargs=options)
    process.start()
    process.join(kill_after_s)
    if kill_after_s is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode
