"""How far a long run is: a bar on a terminal; elsewhere, as in the log of a batch job, a line per minute."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from conversion.console.terminal import err, say
from conversion.options import CHOICE, STAGES


SECONDS_PER_LINE = 60.0


@contextmanager
def byte_progress(what: str) -> Iterator[Any]:
    """Yields a progress callback: bytes, rate and time left."""
    with _progress(DownloadColumn(), TransferSpeedColumn()) as show:
        yield lambda done, total: show(what, done, total)


@contextmanager
def layer_progress() -> Iterator[Any]:
    """Yields a calibration's progress callback: layer, stage and time left; the choice of heads is counted apart."""
    # A layer's last stage takes about half of its time.
    starts = {name: place / (2 * len(STAGES) - 2) for place, name in enumerate(STAGES)}
    with _progress() as show:

        def update(layer: int, num_layers: int, stage: str, done: float) -> None:
            if stage == CHOICE:
                what = f"layer {layer + 1} of {num_layers}" if layer < num_layers else "KL of each"
                show(f"choosing heads, {what}", layer + done, num_layers + 1)
                return
            width = 0.5 if stage == STAGES[-1] else 0.5 / (len(STAGES) - 1)
            what = f"calibrating layer {layer + 1} of {num_layers}, {stage}"
            show(what, layer + starts[stage] + width * done, num_layers)

        yield update


@contextmanager
def step_progress() -> Iterator[Any]:
    """Yields a healing's progress callback: steps and time left."""
    with _progress() as show:
        yield lambda done, total: show(f"healing, step {done} of {total}", done, total)


@contextmanager
def suite_progress() -> Iterator[Any]:
    """Yields a certificate's progress callback: the task, the share that is done and the time left."""
    with _progress() as show:
        yield lambda percent, what: show(f"certifying, {what}", percent, 100)


@contextmanager
def _progress(*columns: ProgressColumn) -> Iterator[Callable[[str, float, float], None]]:
    """Yields what takes a description, what is done and of how much. A bar starts then: a question may come before."""
    columns = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    bar = Progress(*columns, console=err, disable=not err.is_terminal, transient=True)
    task = bar.add_task("", total=None)
    log = _Log()

    def show(what: str, done: float, total: float) -> None:
        bar.start()
        bar.update(task, description=what, completed=done, total=total)
        if not err.is_terminal and total:
            log.add(what, done / total)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()


class _Log:
    """Lines with what is done and about how long the rest takes, by the time since the first call."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None  # time and share; a resumed run starts with some of it done
        self.last_line = 0.0
        self.share = 0.0

    def add(self, what: str, share: float) -> None:
        """Writes a line if the last one is a minute old."""
        now = time.monotonic()
        if self.first is None:
            self.last_line = now
        if self.first is None or share < self.share:  # something else has begun
            self.first = (now, share)
        self.share = share
        if now - self.last_line < SECONDS_PER_LINE:
            return
        self.last_line = now
        started, share_before = self.first
        left = ""
        if share > share_before:
            seconds = (now - started) * (1 - share) / (share - share_before)
            left = f", about {timedelta(seconds=round(seconds))} left"
        say(f"{what}: {share:.0%}{left}", console=err)
