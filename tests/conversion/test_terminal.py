"""Results that cannot be shown: the exit code tells of the run, and no traceback follows a whole output."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from conversion.console import terminal


ROOT = Path(__file__).parents[2]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")


def run(*arguments, shell="", **environment):
    """In a process of its own; `shell` is a redirection."""
    command = " ".join(f"'{argument}'" for argument in (sys.executable, "-m", "conversion", *arguments))
    return subprocess.run(
        ["bash", "-c", f"{command} {shell}"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_ascii_terminal_shows_every_result(tmp_path, llama):
    output = tmp_path / "é λ"
    converted = run("convert", llama, output, "--variant", "v2", PYTHONIOENCODING="ascii")
    assert (converted.returncode, converted.stderr) == (0, "")
    assert "wrote " in converted.stdout and "\\xe9 \\u03bb" in converted.stdout
    assert (output / "config.json").exists()
    shown = run("inspect", output, PYTHONIOENCODING="ascii")
    assert (shown.returncode, shown.stderr) == (0, "") and "\\xe9 \\u03bb" in shown.stdout


@needs_full
def test_full_output_leaves_a_finished_run_finished(tmp_path, llama):
    converted = run("convert", llama, tmp_path / "v2", "--variant", "v2", shell=">/dev/full")
    assert converted.returncode == 0 and (tmp_path / "v2" / "config.json").exists()
    assert "the work is done" in converted.stderr and os.strerror(errno.ENOSPC) in converted.stderr
    assert converted.stderr.count("\n") == 1


@needs_full
def test_exit_code_tells_of_the_run_and_not_of_the_terminal(tmp_path, llama):
    assert run("convert", llama, tmp_path / "v2", "--variant", "v2", shell=">&- 2>&-").returncode == 0
    assert run("convert", llama, tmp_path / "v2", "--variant", "v2", shell=">/dev/full 2>/dev/full").returncode == 3
    (tmp_path / "v2" / "config.json").write_text((tmp_path / "v2" / "config.json").read_text() + " ")
    assert run("verify", tmp_path / "v2", shell=">/dev/full").returncode == 1


@needs_full
def test_command_whose_result_is_all_it_gives_fails_without_it(llama):
    shown = run("inspect", llama, "--json", shell=">/dev/full")
    assert shown.returncode == 3 and shown.stderr.startswith("error: ") and shown.stderr.count("\n") == 1


def test_reader_that_has_read_enough_ends_nothing(llama):
    shown = run("inspect", llama, shell="| true; exit ${PIPESTATUS[0]}")
    assert (shown.returncode, shown.stderr) == (0, "")


def test_progress_outlives_its_terminal(monkeypatch):
    """A terminal that hangs up fails every write with EIO, those of the bar's own thread as well."""

    class HungUp:
        encoding = "utf-8"

        def isatty(self):
            return True

        def write(self, text):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def flush(self):
            self.write("")

        def fileno(self):
            raise OSError("no file")

    monkeypatch.setattr(sys, "stderr", HungUp())
    monkeypatch.setattr(terminal.STDERR, "failure", None)
    with Progress(console=terminal.err, transient=True) as bar:
        task = bar.add_task("converting", total=2)
        bar.update(task, completed=1)
        bar.refresh()
    assert isinstance(terminal.STDERR.failure, OSError)
