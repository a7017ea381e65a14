"""The command line called within the test's process. Not a test module."""

from click.testing import Result
from typer.testing import CliRunner

from conversion.cli import app


def run(*arguments) -> Result:
    """Runs `diff-llama` with arguments of any type, on a terminal too wide for any line to be broken."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300", "TERM": "dumb"})
