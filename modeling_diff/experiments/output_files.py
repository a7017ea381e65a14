"""What scripts write: never over their input, and over earlier results only when asked and once the new ones exist."""

import argparse
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def add_output(parser: argparse.ArgumentParser, holds: str, name: str | None = None) -> None:
    """
    Adds --output and --overwrite.

    Args:
        parser: The script's parser.
        holds: What is written there, for --help.
        name: Folder below `out` that is written by default; None keeps nothing without --output.
    """
    default = "nothing is kept" if name is None else f"out/{name}; with --smoke nothing is kept"
    parser.set_defaults(output_name=name)
    parser.add_argument("--output", type=Path, help=f"folder for {holds} (default: {default})")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results once the new are complete")


@contextmanager
def output_folder(
    arguments: argparse.Namespace,
    results: Iterable[str],
    inputs: Iterable[str | Path | None] = (),
    resume: bool = False,
    main_process: bool = True,
) -> Iterator[Path]:
    """
    Yields the folder to write results in, and fills in `arguments.output`.

    Earlier results stay until the block has ended: the folder is then one next to --output, whose content takes their
    place. A block that fails leaves its folder, unless that is empty.

    Args:
        arguments: Of a parser that went through `add_output`.
        results: Names, or patterns where they vary, of the files and folders that the script writes.
        inputs: Folders and files that the script reads; Hub ids among them are passed over.
        resume: Whether to continue in the folder of a stopped run.
        main_process: Whether this process changes folders; of several processes one does.

    Raises:
        ValueError: The output is an input, lies in one or holds one, or has results and --overwrite is not given.
    """
    if arguments.output is None and (arguments.output_name is None or getattr(arguments, "smoke", False)):
        with tempfile.TemporaryDirectory() as temporary:
            arguments.output = Path(temporary)
            yield arguments.output
        return
    output = arguments.output = arguments.output or Path("out") / arguments.output_name
    check_inputs(output, inputs)
    found = [path for pattern in results for path in sorted(output.glob(pattern))]
    if found and not resume and not arguments.overwrite:
        others = ", --resume to continue it" if hasattr(arguments, "resume") else ""
        raise ValueError(f"{found[0]} is there: add --overwrite to replace it{others}, or name another --output")
    replaces = bool(found) and arguments.overwrite
    folder = part_of(output) if replaces else output
    if main_process:
        if replaces and not resume:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        if main_process and not any(folder.iterdir()):
            folder.rmdir()
        raise
    if replaces and main_process:
        swap(folder, output, found)


def part_of(output: Path) -> Path:
    """Returns the folder next to `output` in which results are made that replace those in it."""
    output = output.resolve()
    return output.with_name(f"{output.name}.part")


def check_inputs(output: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raises `ValueError` if what is written to `output` would mix with one of `inputs`."""
    resolved = output.resolve()
    for path in (Path(given).resolve() for given in inputs if given is not None):
        if path.exists() and (path == resolved or path in resolved.parents or resolved in path.parents):
            raise ValueError(f"--output {output}: what is written there would mix with {path}; name another")


def swap(folder: Path, output: Path, earlier: Iterable[Path]) -> None:
    """Puts what is in `folder` in `output`, in the place of the `earlier` results there, and removes `folder`."""
    written = sorted(folder.iterdir())
    for old in {*earlier, *(output / path.name for path in written)}:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    for path in written:
        shutil.move(path, output / path.name)
    folder.rmdir()
