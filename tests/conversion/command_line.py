"""The command line called within the test's process. Not a test module."""

from contextlib import ExitStack
from unittest.mock import patch

from click.testing import Result
from typer.testing import CliRunner

from conversion.cli import app
from conversion.console import terminal


COLUMNS = 300


def run(*arguments) -> Result:
    """Runs `diff-llama` with arguments of any type, on a terminal too wide for any line to be broken.

    Help reads the width each time; the consoles took theirs when they were first imported, which may have been in any
    test.
    """
    with ExitStack() as wide:
        for console in (terminal.out, terminal.err):
            wide.enter_context(patch.object(console, "_width", COLUMNS))
        environment = {"COLUMNS": str(COLUMNS), "TERM": "dumb"}
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
