"""The command line of a script: help with its defaults, errors in one line, and the command for its record."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a docstring, and appends the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or action.default == []:
            return action.help
        return super()._get_help_string(action)


def script_parser(script: str, description: str | None) -> argparse.ArgumentParser:
    """
    Returns the parser of a script.

    Args:
        script: The script's `__file__`.
        description: Its docstring, which holds the exact commands.
    """
    return argparse.ArgumentParser(prog=Path(script).name, description=description, formatter_class=HelpFormatter)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device, CUDA where there is a GPU."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="device that the models run on")


def typed_command(script: str, argv: Sequence[str] | None) -> str:
    """
    Returns the command for a record, as it is typed at the root of this repository.

    Args:
        script: The script's `__file__`.
        argv: Its arguments, None for those of the process. Of absolute paths only the last part is kept.
    """
    words = sys.argv[1:] if argv is None else argv
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return shlex.join(["python", "/".join(Path(script).resolve().parts[-3:]), *words])


@contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """
    Ends a script with one line where its input is wrong, not with a traceback.

    Args:
        script: The script's `__file__`; its name begins the line.

    Raises:
        SystemExit: A `ValueError`, `OSError` or `ImportError` was raised inside, or an error with an exit code, as
            those of conversion/ are.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, ImportError | OSError | ValueError) and not hasattr(error, "exit_code"):
            raise
        sys.exit(f"{Path(script).stem}: {error}")
