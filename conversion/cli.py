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
    byte_progress,
    layer_progress,
    one_line_errors,
    quiet_client,
    show_conversion,
    show_description,
    show_healing,
    show_push,
    show_update,
    show_verification,
    step_progress,
)
from conversion.console.options import with_options
from conversion.console.signals import EXIT_CODES, Stopped, end_stopped, stop_on_signals
from conversion.console.terminal import NoteHandler, err, say
from conversion.console.usage import PlainCommand, PlainGroup, parsed
from conversion.healing.options import HealingOptions, HealOptimizer, HealStage, LambdaMode, Trained
from conversion.options import (
    DTYPES,
    ConversionConfig,
    ExportConfig,
    InspectConfig,
    PushConfig,
    UpdateCodeConfig,
    VerifyConfig,
    chosen_dtype,
)
from conversion.options.values import ALLOW_PICKLE, OVERWRITE, RESUME, checked_size


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
@with_options(ConversionConfig)
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
@with_options(VerifyConfig)
def verify(
    output: Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")],
    config: VerifyConfig,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check the files of a converted checkpoint and what was promised of it. Exit code 1 if a check fails."""
    with one_line_errors(verbose):
        from conversion.verify import verify_checkpoint

        report = verify_checkpoint(output, **vars(config))
    show_verification(report, as_json)
    raise typer.Exit(0 if report.passed else 1)


@app.command(cls=PlainCommand)
@with_options(ExportConfig)
def export(
    output: Annotated[Path, typer.Argument(help="Folder of a V1 checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to create.")],
    config: ExportConfig,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint for transformers' own class, which needs no custom code: lossless, or refused."""
    with one_line_errors(verbose, target), byte_progress("exporting") as progress:
        from conversion.export import export_checkpoint

        report = export_checkpoint(output, target, progress=progress, **vars(config))
    show_conversion(report, as_json, "wrote")


@app.command(cls=PlainCommand)
@with_options(InspectConfig)
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
@with_options(PushConfig)
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
@with_options(UpdateCodeConfig)
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


# Until the options of a healing are derived from its config as well.
DEFAULTS = HealingOptions()
Pickle = Annotated[bool, typer.Option("--allow-pickle", help=ALLOW_PICKLE)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)]
Resume = Annotated[bool | None, typer.Option("--resume/--no-resume", help=RESUME)]
ShardSize = Annotated[
    Any,
    typer.Option(
        parser=parsed(checked_size), metavar="<size>", help="Largest size of a weight file, such as 5GB or 200MiB."
    ),
]


def _dtype(argument: str, help: str) -> Any:
    """An option for a dtype, by any of its usual names."""
    return typer.Option(
        parser=parsed(lambda text: chosen_dtype(argument, text)), metavar=f"<{'|'.join(DTYPES)}>", help=help
    )


Dtype = Annotated[Any, _dtype("dtype", "Cast the weights. By default each tensor keeps its own dtype.")]


@app.command(cls=PlainCommand)
def heal(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to create.")],
    data: Annotated[
        list[Path],
        typer.Option(metavar="<path>", help="Text, JSON lines or a datasets folder; may be given several times."),
    ],
    teacher: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the LLaMA it was converted from; stage lm needs none.")
    ] = None,
    stage: Annotated[
        HealStage,
        typer.Option(
            case_sensitive=False,
            help="What is learned from. local: the teacher, layer by layer. kl: its logits. lm: the text alone.",
        ),
    ] = HealStage.KL,
    held_out: Annotated[
        Path | None, typer.Option(help="Text to measure on. The first rows of --data by default.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Number of tokens to train on. Once through the data by default.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of optimizer steps, in place of --tokens.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens per row. 1024 by default, or what the model can read if that is less.")
    ] = None,
    batch_rows: Annotated[int, typer.Option(help="Rows per step, over all devices.")] = DEFAULTS.batch_rows,
    micro_rows: Annotated[
        int | None, typer.Option(help="Rows that a device computes at once. By default as many as make 8,192 tokens.")
    ] = None,
    optimizer: Annotated[
        HealOptimizer,
        typer.Option(case_sensitive=False, help="muon: Muon for the matrices of the layers, AdamW for the rest."),
    ] = DEFAULTS.optimizer,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate. By default 1e-3 with muon, 2e-4 with adamw.")
    ] = None,
    lambda_learning_rate: Annotated[
        float, typer.Option(help="Learning rate of lambda.")
    ] = DEFAULTS.lambda_learning_rate,
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay, never applied to lambda, norms and biases.")
    ] = DEFAULTS.weight_decay,
    train: Annotated[
        Trained, typer.Option(case_sensitive=False, help="What is trained: all parameters, or attention alone.")
    ] = DEFAULTS.train,
    lambda_mode: Annotated[
        LambdaMode,
        typer.Option(
            "--lambda",
            case_sensitive=False,
            help="v1: lambda is free, held at or above --lambda-floor, or annealed to the paper's schedule.",
        ),
    ] = DEFAULTS.lambda_mode,
    lambda_floor: Annotated[
        float, typer.Option(help="v1: the least value of lambda under --lambda floor.")
    ] = DEFAULTS.lambda_floor,
    norm_share: Annotated[
        float,
        typer.Option(help="v1: share of the steps in which a neutral norm is annealed to the paper's, from 0 to 1."),
    ] = DEFAULTS.norm_share,
    hidden_weight: Annotated[
        float, typer.Option(help="Stage kl: weight of the distance between hidden states in the loss.")
    ] = 0.0,
    cross_entropy_weight: Annotated[
        float, typer.Option(help="Stage kl: weight of the next token of the text in the loss, from 0 to 1.")
    ] = 0.0,
    teacher_dtype: Annotated[
        Any,
        _dtype(
            "teacher_dtype", "Precision of the teacher in memory. bfloat16 on a GPU and float32 on a CPU by default."
        ),
    ] = None,
    cached_logits: Annotated[
        int | None,
        typer.Option(
            help="Store this many of the teacher's likeliest tokens per position on disk, and unload the teacher."
        ),
    ] = None,
    lora: Annotated[int | None, typer.Option(help="Train adapters of this rank, merged at the end.")] = None,
    allow_pickle: Pickle = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Recompute activations: less memory, about a third more time."),
    ] = False,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    seed: Annotated[int, typer.Option(help="Seed of the order of rows.")] = 0,
    overwrite: Overwrite = False,
    resume: Resume = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a converted checkpoint towards the LLaMA that it was made from, one stage per run."""
    with one_line_errors(verbose, output), step_progress() as progress:
        from conversion.heal import heal_checkpoint  # with the Trainer: seconds that other commands need not wait for

        options = HealingOptions(
            stage=stage, tokens=tokens, steps=steps, context=context, batch_rows=batch_rows, micro_rows=micro_rows,
            optimizer=optimizer, learning_rate=learning_rate, lambda_learning_rate=lambda_learning_rate,
            weight_decay=weight_decay, train=train, lambda_mode=lambda_mode, lambda_floor=lambda_floor,
            norm_share=norm_share, hidden_weight=hidden_weight, cross_entropy_weight=cross_entropy_weight,
            teacher_dtype=teacher_dtype, cached_logits=cached_logits, lora=lora,
            gradient_checkpointing=gradient_checkpointing, dtype=dtype, seed=seed,
        )  # fmt: skip
        report = heal_checkpoint(
            checkpoint, output, options, data=data, teacher=teacher, held_out=held_out, allow_pickle=allow_pickle,
            max_shard_size=max_shard_size, overwrite=overwrite, resume=resume, progress=progress,
        )  # fmt: skip
    show_healing(report, as_json)


def main() -> None:
    """The console script `diff-llama`."""
    stop_on_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it was closed before the start
            stream.reconfigure(errors="backslashreplace")  # a terminal without our letters
    logging.getLogger("conversion").addHandler(NoteHandler())
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that nothing here asks for
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before it is imported
    try:
        app()
    except Stopped as stopped:  # before the command's work was begun, or after its end
        say(f"{stopped}; nothing half done was left", "red", err)
        end_stopped(stopped.exit_code)
    except SystemExit as error:
        if error.code in EXIT_CODES:
            end_stopped(int(error.code))
        raise
