"""What the command line shows: results as tables or JSON, and errors in one line."""

import json
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from conversion.console.signals import Stopped
from conversion.console.terminal import STDOUT, err, out, results_shown, say
from conversion.console.usage import command_line
from conversion.errors import TOKEN, ConversionError, escape, memory_error


if TYPE_CHECKING:
    from conversion.calibration.step import Calibration
    from conversion.evaluation.verification import VerificationReport
    from conversion.push import PushReport
    from conversion.record import ConversionReport
    from conversion.update_code import UpdateReport


ASKED_SECONDS = 3600  # a calibration that takes longer is asked about on a terminal
COLORS = {"passed": "green", "failed": "red", "measured": "cyan", "skipped": "yellow"}


@contextmanager
def one_line_errors(verbose: bool, target: Path | None = None) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, Stopped) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        say(f"{stopped}; {left_behind(target, getattr(error, '__notes__', ()))}", "red", err)
        raise typer.Exit(stopped.exit_code) from error
    except Exception as raised:
        error = memory_error(raised, "this command") or raised
        if verbose:
            for line in traceback.format_exc().splitlines():
                say(f"| {line}", console=err)  # a message in it may be of many lines, some like ours
        known = isinstance(error, ConversionError)
        message = str(error) if known else f"unexpected {type(error).__name__}: {error}; --verbose shows where"
        # Of what a run has kept; a refusal about kept work has named it already.
        notes = [note for note in getattr(raised, "__notes__", ()) if note.removeprefix("kept: ") not in message]
        message = TOKEN.sub("<token>", "; ".join([message, *notes]))
        say(f"error: {message}", "red", err)
        raise typer.Exit(error.exit_code if isinstance(error, ConversionError) else 1) from raised


def left_behind(target: Path | None, notes: Iterable[str]) -> str:
    """Returns what a stopped command has kept, for `target` or by its notes, and the command that continues it."""
    from conversion.checkpoint.kept_work import described, kept_work

    folders = [described(folder) for folder in kept_work(target)] if target else []
    kept = ", ".join(dict.fromkeys([*folders, *(note.removeprefix("kept: ") for note in notes)]))
    if not kept:
        return "nothing half done was left"
    program, command, *arguments = command_line.get()
    typed = [argument for argument in arguments if argument not in ("--resume", "--no-resume")]
    # Options come first: after `--` they would be taken for names.
    again = f"{program} {shlex.join([command, '--resume', *typed])}"
    return f"kept: {kept}; to continue: {again}; --no-resume discards it"


@contextmanager
def quiet_client() -> Iterator[None]:
    """Silences the Hub client's warnings, which name signed addresses, and its bars where there is no terminal."""
    from huggingface_hub import logging as hub_logging
    from huggingface_hub.utils import disable_progress_bars

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    if not err.is_terminal:
        disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


def ask_before_calibration(agreed: bool) -> Callable[["Calibration"], None]:
    """Returns what prints a calibration's estimate and, unless `agreed`, asks on a terminal before a long one.

    Raises:
        ConversionError: Where the answer is no.
    """

    def ask(calibration: "Calibration") -> None:
        say(calibration.note, console=err)
        if agreed or calibration.estimate.seconds <= ASKED_SECONDS or not sys.stdin.isatty():
            return
        if not typer.confirm("Start it?", default=True, err=True):
            raise ConversionError(
                "not started, and nothing was written; --effort quick and --calibration-tokens make it shorter, and a "
                "GPU is used where there is one"
            )

    return ask


@results_shown()
def show_conversion(report: "ConversionReport", as_json: bool, verb: str) -> None:
    from conversion.record import measured_text

    if as_json:
        shown = {"output": str(report.output), "num_bytes": report.num_bytes, "notes": list(report.notes)}
        _print_json(shown | {"record": report.record})
        return
    say(f"{verb} {report.output} ({report.num_bytes / 1e6:,.1f} MB)")
    say(f"promise: {report.record['promise']['text']}")
    if found := measured_text(report.record.get("measured")):
        say(found if found.startswith("not measured") else f"measured: {found}")
    _show_notes(report.notes)


@results_shown()
def show_verification(report: "VerificationReport", as_json: bool) -> None:
    if as_json:
        _print_json(report.to_dict())
        return
    table = Table("check", "outcome", "detail", title=escape(f"{report.output} ({report.promise})"), box=None)
    for check in report.checks:
        outcome = Text(check.outcome, style=COLORS[check.outcome])
        table.add_row(escape(check.name), outcome, escape(check.detail))
    out.print(table)


@results_shown(only_result=True)
def show_description(description: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(description)
        return
    table = Table(Column(), Column(overflow="fold"), show_header=False, box=None)
    for key, value in description.items():
        if isinstance(value, Mapping) and any(isinstance(part, Mapping) for part in value.values()):
            for name, part in value.items():
                table.add_row(escape(f"{key}.{name}"), escape(_text(part)))
        else:
            table.add_row(escape(key), escape(_text(value)))
    out.print(table)


def _text(value: Any) -> str:
    """Returns a value of `inspect` on as few lines as it takes."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(_text(part) for part in value)
    return "-" if value is None else str(value)


@results_shown()
def show_push(report: "PushReport", as_json: bool) -> None:
    if as_json:
        _print_json(asdict(report) | {"num_bytes": report.num_bytes})
        return
    verb = "uploaded to" if report.commit else "would upload to"
    title = escape(f"{verb} {report.repo_id}, {report.revision}")
    table = Table("file", Column("bytes", justify="right"), title=title, box=None)
    for name, num_bytes in report.files.items():
        table.add_row(escape(name), f"{num_bytes:,}")
    table.add_row(f"{len(report.files)} files", f"{report.num_bytes:,}", style="bold")
    out.print(table)
    if report.url:
        say(report.url)
    _show_notes(report.notes)


@results_shown()
def show_update(report: "UpdateReport", as_json: bool) -> None:
    if as_json:
        _print_json(asdict(report))
        return
    verb = "updated" if report.written or report.removed else "left"
    if report.dry_run:
        verb = "would update"
    say(f"{verb} {report.target}")
    say(f"code before: {report.before}")
    for name, num_bytes in report.written.items():
        say(f"  {name} ({num_bytes:,} bytes)")
    for name in report.removed:
        say(f"  {name} (removed)")
    if report.url:
        say(report.url)
    _show_notes(report.notes)


@results_shown()
def show_healing(report: Any, as_json: bool) -> None:
    if as_json:
        _print_json({"output": str(report.output), "notes": list(report.notes), "record": report.record})
        return
    say(f"wrote {report.output}")
    table = Table("tokens", "loss", "KL", "greedy", "recovered", "lambda per layer", title="held-out text", box=None)
    for row in report.table:
        shown = [
            "" if row[name] is None else f"{row[name]:.4f}" for name in ("loss", "kl", "greedy_agreement", "recovered")
        ]
        table.add_row(f"{row['tokens']:,}", *shown, " ".join(f"{value:.3f}" for value in row["lambda"]))
    out.print(table)
    _show_notes(report.notes)


def _show_notes(notes: Iterable[str]) -> None:
    for note in notes:
        say(f"note: {note}", "yellow")


def _print_json(value: Any) -> None:
    STDOUT.write(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")  # ASCII: nothing to be escaped
