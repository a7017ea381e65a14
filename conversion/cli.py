"""The command line: `diff-llama --help`. Each command imports what it needs when it runs."""

import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from conversion.console.display import (
    ask_before_calibration,
    one_line_errors,
    quiet_client,
    show_conversion,
    show_description,
    show_healing,
    show_push,
    show_update,
    show_verification,
)
from conversion.console.options import with_options
from conversion.console.progress import byte_progress, layer_progress, step_progress, suite_progress
from conversion.console.signals import EXIT_CODES, Stopped, end_stopped, stop_on_signals
from conversion.console.terminal import NoteHandler, err, say
from conversion.console.usage import PlainCommand, PlainGroup, parsed
from conversion.errors import typed_as
from conversion.healing.options import HealingOptions, refuse_renamed
from conversion.options import (
    ConversionConfig,
    ExportConfig,
    HealFilesConfig,
    InspectConfig,
    PushConfig,
    UpdateCodeConfig,
    VerifyConfig,
)


app = typer.Typer(
    name="diff-llama",
    cls=PlainGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="On an error, print the traceback.")]


def _show_versions(asked: bool) -> None:
    if not asked:
        return
    from conversion.record import versions
    from modeling_diff import __version__

    for name, release in {"diff-llama": __version__, **versions()}.items():
        say(f"{name} {release}")
    raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_versions, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    """Differential Transformers from LLaMA checkpoints: convert them, train, check, publish and keep them."""


@app.command(cls=PlainCommand)
@with_options(config=ConversionConfig)
def convert(
    source: Annotated[
        str,
        typer.Argument(help="Folder, GGUF file or Hub id of a LLaMA, Mistral, Qwen or transformers DiffLlama."),
    ],
    output: Annotated[Path, typer.Argument(help="Folder to create.")],
    config: ConversionConfig,
    yes: Annotated[
        bool, typer.Option("--yes", help="Start calibrations of more than an hour without a question.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Convert a LLaMA checkpoint into a Differential Transformer."""
    with one_line_errors(verbose, output), layer_progress() as on_layer, byte_progress("converting") as progress:
        from conversion.convert import convert_checkpoint

        report = convert_checkpoint(
            source,
            output,
            config=config,
            progress=progress,
            before_calibration=ask_before_calibration(yes or as_json),
            calibration_progress=on_layer,
        )
    show_conversion(report, as_json, "would write" if config.dry_run else "wrote")


@app.command(cls=PlainCommand)
@with_options(config=VerifyConfig)
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")],
    config: VerifyConfig,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check the files of a converted checkpoint and what was promised of it. Exit code 1 if a check fails."""
    with one_line_errors(verbose), suite_progress() as progress:
        from conversion.verify import verify_checkpoint

        report = verify_checkpoint(checkpoint, progress=progress, **vars(config))
    show_verification(report, as_json)
    raise typer.Exit(0 if report.passed else 1)


@app.command(cls=PlainCommand)
@with_options(config=ExportConfig)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a V1 checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to create.")],
    config: ExportConfig,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint for transformers' own class, which needs no custom code: lossless, or refused."""
    with one_line_errors(verbose, output), byte_progress("exporting") as progress:
        from conversion.export import export_checkpoint

        report = export_checkpoint(checkpoint, output, progress=progress, **vars(config))
    show_conversion(report, as_json, "wrote")


@app.command(cls=PlainCommand)
@with_options(config=InspectConfig)
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of a LLaMA, diffllama or diff_llama checkpoint.")],
    config: InspectConfig,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what a checkpoint is: heads, widths, parameters, lambda per layer, which conversion made it."""
    with one_line_errors(verbose):
        from conversion.describe import describe_checkpoint

        description = describe_checkpoint(folder, **vars(config))
    show_description(description, as_json)


@app.command(cls=PlainCommand)
@with_options(config=PushConfig)
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint, an export or an adapter.")],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub, created if it does not exist.")
    ],
    config: PushConfig,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Upload a checkpoint to the Hub in one commit, with all that loading needs. Log in first: `hf auth login`."""
    with one_line_errors(verbose), quiet_client():
        from conversion.push import push_checkpoint
        from conversion.record import read_report

        options: dict[str, Any] = dict(vars(config))
        if config.verification is not None:
            options["verification"] = read_report(config.verification)
        report = push_checkpoint(folder, repo, **options)
    show_push(report, as_json)


@app.command("update-code", cls=PlainCommand)
@with_options(config=UpdateCodeConfig)
def update_code(
    target: Annotated[
        str, typer.Argument(metavar="FOLDER_OR_REPO", help="Folder or Hub id of a diff_llama checkpoint.")
    ],
    config: UpdateCodeConfig,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Put the model code of this diff-llama next to a checkpoint's weights, which are not touched."""
    with one_line_errors(verbose), quiet_client():
        from conversion.update_code import update_checkpoint_code

        report = update_checkpoint_code(target, **vars(config))
    show_update(report, as_json)


class _HealCommand(PlainCommand):
    """A command that says what options of earlier versions are called now."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        names = [arg.partition("=")[0][2:].replace("-", "_") for arg in args if arg.startswith("--")]
        with typed_as(self._options(ctx)):
            for name in names:
                parsed(refuse_renamed)(name)
        return super().parse_args(ctx, args)


@app.command(cls=_HealCommand)
@with_options(config=HealingOptions, files=HealFilesConfig)
def heal(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to create.")],
    data: Annotated[
        list[Path],
        typer.Option(metavar="<path>", help="Text, JSON lines or a datasets folder; may be given several times."),
    ],
    config: HealingOptions,
    files: HealFilesConfig,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a converted checkpoint towards the LLaMA that it was made from, one stage per run."""
    with one_line_errors(verbose, output), step_progress() as progress:
        from conversion.heal import heal_checkpoint  # with the Trainer: seconds that other commands need not wait for

        report = heal_checkpoint(checkpoint, output, config, data=data, progress=progress, **vars(files))
    show_healing(report, as_json)


def main() -> None:
    """Runs the console script `diff-llama`."""
    stop_on_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it was closed before the start
            stream.reconfigure(errors="backslashreplace")  # a terminal without our letters
    logging.getLogger("conversion").addHandler(NoteHandler())
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that nothing here asks for
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_error()
    try:
        app()
    except Stopped as stopped:  # before the command's work was begun, or after its end
        say(f"{stopped}; nothing half done was left", "red", err)
        end_stopped(stopped.exit_code)
    except SystemExit as error:
        if error.code in EXIT_CODES:
            end_stopped(int(error.code))
        raise
