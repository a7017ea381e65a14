"""What examples write: never over their input, and over earlier results only when asked."""

import argparse
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


def add_output(parser: argparse.ArgumentParser, name: str, holds: str) -> None:
    """
    Adds --output and --overwrite.

    Args:
        parser: The script's parser.
        name: File or folder below `out` that is written by default.
        holds: What is written there, for --help.
    """
    parser.set_defaults(output_name=name)
    parser.add_argument("--output", type=Path, help=f"{holds} (default: out/{name})")
    add_overwrite(parser)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Adds --overwrite alone, for scripts whose output is optional or has another name."""
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run")


def settle_output(
    arguments: argparse.Namespace, results: Iterable[str] = (), inputs: Iterable[str | Path | None] = ()
) -> None:
    """
    Fills in `arguments.output` and makes room for the results.

    `--smoke` alone writes next to the default and replaces what an earlier `--smoke` left there.

    Args:
        arguments: Of a parser that went through `add_output`.
        results: Patterns of what the script writes in its output folder.
        inputs: Folders and files that the script reads; Hub ids among them are passed over.

    Raises:
        ValueError: The output is an input, lies in one or holds one, or has results and --overwrite is not given.
    """
    overwrite = arguments.overwrite
    if arguments.output is None:
        name = Path(arguments.output_name)
        if getattr(arguments, "smoke", False):
            name = name.with_stem(f"{name.stem}-smoke")
            overwrite = True
        arguments.output = "out" / name
    output = arguments.output.resolve()
    for path in (Path(given).resolve() for given in inputs if given is not None):
        if path.exists() and (path == output or path in output.parents or output in path.parents):
            raise ValueError(f"--output {arguments.output}: what is written there would mix with {path}; name another")
    make_room([path for pattern in results for path in sorted(arguments.output.glob(pattern))], overwrite)


def room_or_exit(paths: Iterable[Path], overwrite: bool) -> None:
    """Does what `make_room` does, and ends the script with its one line where there is none."""
    try:
        make_room(paths, overwrite)
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")


def make_room(paths: Iterable[Path], overwrite: bool) -> None:
    """
    Removes results of an earlier run.

    Args:
        paths: Files and folders that will be written; those that are not there are passed over.
        overwrite: Whether the user allowed it.

    Raises:
        ValueError: One of them is there, and the user did not.
    """
    found = [path for path in paths if path.exists()]
    if found and not overwrite:
        raise ValueError(f"{found[0]} is there: add --overwrite to replace it, or name another --output")
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
