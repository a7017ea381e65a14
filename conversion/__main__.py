"""The command line: arguments only. `python -m conversion --help`."""

import json
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from conversion.checkpoint import parse_size
from conversion.convert import ConversionReport, convert_checkpoint
from conversion.describe import describe_checkpoint
from conversion.errors import ConversionError
from conversion.export import export_checkpoint
from conversion.options import CALIBRATION_TOKENS, STAGES, parse_lambda_init, parse_layers, parse_stages
from conversion.verify import VerificationReport, verify_checkpoint


app = typer.Typer(
    name="diff-llama",
    help="Differential Transformers from LLaMA checkpoints: convert, verify, export, inspect.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)
COLOURS = {"passed": "green", "failed": "red", "measured": "cyan", "skipped": "yellow"}

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="On an error, print the traceback.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUTPUT, in one step at the end.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep finished shards if stopped, and go on from them.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Cast the weights. By default each tensor keeps its own dtype."),
]


def _size(text: str) -> str:
    try:
        parse_size(text)
    except ConversionError as error:
        raise typer.BadParameter(str(error)) from error
    return text


Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin, weights only.")]
ShardSize = Annotated[str, typer.Option(callback=_size, help="Largest size of a weight file, such as 5GB or 200MiB.")]


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a LLaMA or transformers DiffLlama checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to create.")],
    variant: Annotated[
        Literal["v1", "v2"],
        typer.Option(help="v1: same size, has to be healed. v2: same function exactly, some more query weights."),
    ] = "v1",
    layers: Annotated[
        Any,
        typer.Option(parser=parse_layers, metavar="0,4-7", help="Layers to make differential. All by default."),
    ] = None,
    lambda_init: Annotated[
        Any,
        typer.Option(parser=parse_lambda_init, metavar="paper|FLOAT|LIST", help="v1: lambda at the start (0.05)."),
    ] = None,
    norm: Annotated[
        Literal["strict", "neutral"],
        typer.Option(help="v1: the paper's norm over heads, or one whose epsilon makes it the identity."),
    ] = "strict",
    lambda_start: Annotated[
        float,
        typer.Option("--lambda", help="v2: lambda at the start, between 0 and 1; through a bias if not 0.5."),
    ] = 0.5,
    calibration: Annotated[
        Path | None,
        typer.Option(help="v1: text, JSON lines or a datasets folder; layers are fitted on it, and little is lost."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="How much of it is read.")] = CALIBRATION_TOKENS,
    stages: Annotated[
        Any,
        typer.Option(parser=parse_stages, metavar="|".join(STAGES), help="Stages of the calibration; all by default."),
    ] = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    seed: Annotated[int, typer.Option(help="v1: of the lambda vectors.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    source_layout: Annotated[
        Literal["auto", "unilm"],
        typer.Option(help="unilm: the authors' V1 tensor names and interleaved rotary order."),
    ] = "auto",
    backbone_only: Annotated[bool, typer.Option("--backbone-only", help="Leave out any head.")] = False,
    allow_pickle: Pickle = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Carry NaN and Inf over.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Convert a LLaMA checkpoint into a Differential Transformer."""
    with _one_line_errors(verbose), _layer_progress() as layer_progress, _progress("converting") as progress:
        report = convert_checkpoint(
            source, output, variant, layers=layers, lambda_init=lambda_init, norm=norm, lambda_start=lambda_start,
            calibration=calibration, calibration_tokens=calibration_tokens, stages=stages, dtype=dtype,
            max_shard_size=max_shard_size, seed=seed, revision=revision, source_layout=source_layout,
            backbone_only=backbone_only, allow_pickle=allow_pickle, allow_nonfinite=allow_nonfinite, dry_run=dry_run,
            overwrite=overwrite, resume=resume, progress=progress, calibration_progress=layer_progress,
        )  # fmt: skip
    _show_conversion(report, as_json, "would write" if dry_run else "wrote")


@app.command()
def verify(
    output: Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")],
    against: Annotated[str | None, typer.Option(help="Its source, folder or Hub id, to compare with.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check files, tensors and checksums, then what was promised of the function. Exit code 1 if a check fails."""
    with _one_line_errors(verbose):
        report = verify_checkpoint(output, against)
    _show_verification(report, as_json)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def export(
    output: Annotated[Path, typer.Argument(help="Folder of a V1 checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to create.")],
    format: Annotated[Literal["diffllama"], typer.Option(help="transformers' own DiffLlama.")] = "diffllama",
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint for transformers' own class, which needs no custom code: lossless, or refused."""
    with _one_line_errors(verbose), _progress("exporting") as progress:
        report = export_checkpoint(
            output, target, format, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, resume=resume,
            progress=progress,
        )  # fmt: skip
    _show_conversion(report, as_json, "wrote")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of a LLaMA, diffllama or diff_llama checkpoint.")],
    allow_pickle: Pickle = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what a checkpoint is: heads, widths, parameters, lambda a layer, which conversion made it."""
    with _one_line_errors(verbose):
        description = describe_checkpoint(folder, allow_pickle)
    if as_json:
        _print_json(description)
        return
    table = Table(show_header=False, box=None)
    for key, value in description.items():
        table.add_row(key, json.dumps(value) if isinstance(value, dict | list) else str(value))
    out.print(table)


@contextmanager
def _one_line_errors(verbose: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        err.print("interrupted; nothing half done was left", style="red", highlight=False)
        raise typer.Exit(130) from error
    except Exception as error:
        if verbose:
            traceback.print_exc()
        known = isinstance(error, ConversionError)
        message = str(error) if known else f"unexpected {type(error).__name__}: {error}; --verbose shows where"
        err.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code if isinstance(error, ConversionError) else 1) from error


@contextmanager
def _progress(what: str) -> Iterator[Any]:
    """A progress callback: bytes, rate and time left on a terminal, silence elsewhere."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _layer_progress() -> Iterator[Any]:
    """A calibration's progress: layer, stage and time left on a terminal, silence elsewhere."""
    columns = (TextColumn("calibrating {task.fields[where]}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("calibrating", total=None, where="", visible=False)

        def update(layer: int, num_layers: int, stage: str, done: float) -> None:
            # A layer's last stage takes about half of its time.
            share = {name: place / (2 * len(STAGES) - 2) for place, name in enumerate(STAGES)}
            width = 0.5 if stage == STAGES[-1] else 0.5 / (len(STAGES) - 1)
            where = f"layer {layer + 1} of {num_layers}, {stage}"
            completed = layer + share[stage] + width * done
            bar.update(task, completed=completed, total=num_layers, where=where, visible=True)

        yield update


def _show_conversion(report: ConversionReport, as_json: bool, verb: str) -> None:
    if as_json:
        shown = {"output": str(report.output), "num_bytes": report.num_bytes, "notes": list(report.notes)}
        _print_json(shown | {"record": report.record})
        return
    out.print(f"{verb} {report.output} ({report.num_bytes / 1e6:,.1f} MB)", highlight=False, soft_wrap=True)
    out.print(f"promise: {report.record['promise']['text']}", highlight=False, soft_wrap=True)
    for note in report.notes:
        out.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _show_verification(report: VerificationReport, as_json: bool) -> None:
    if as_json:
        _print_json(report.to_dict())
        return
    table = Table("check", "outcome", "detail", title=f"{report.output} ({report.promise})", box=None)
    for check in report.checks:
        table.add_row(check.name, f"[{COLOURS[check.outcome]}]{check.outcome}[/]", check.detail)
    out.print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True, default=str))


def _terminate(signum: int, frame: Any) -> None:
    sys.exit(128 + signum)  # unwinds, so that the writer cleans up


def main() -> None:
    """The console script `diff-llama`."""
    signal.signal(signal.SIGTERM, _terminate)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    app()


if __name__ == "__main__":
    main()
