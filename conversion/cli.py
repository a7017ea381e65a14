"""The command line: arguments only. `diff-llama --help`."""

import io
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from transformers.utils import logging as transformers_logging

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
from conversion.console.signals import EXIT_CODES, Stopped, end_stopped, stop_on_signals
from conversion.console.terminal import NoteHandler, err, say
from conversion.console.usage import PlainCommand, PlainGroup, parsed
from conversion.convert import convert_checkpoint
from conversion.describe import describe_checkpoint
from conversion.export import export_checkpoint
from conversion.healing.options import HealingOptions, HealOptimizer, HealStage, LambdaMode, Trained
from conversion.options import (
    CALIBRATION_TOKENS,
    DTYPES,
    LAMBDA_FLOOR,
    STAGES,
    chosen_dtype,
    parse_lambda_init,
    parse_layers,
    parse_size,
    parse_stages,
)
from conversion.push import push_checkpoint
from conversion.record import read_report
from conversion.update_code import update_checkpoint_code
from conversion.verify import verify_checkpoint


app = typer.Typer(
    name="diff-llama",
    cls=PlainGroup,
    help="Differential Transformers from LLaMA checkpoints: convert them, train, check, publish and keep them.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
DEFAULTS = HealingOptions()

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="On an error, print the traceback.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUTPUT, in one step at the end.")]
Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume",
        help="Continue from the work that a stopped run has kept, or discard it. By default the work of the same "
        "run is continued, and layers and checkpoints of another run are refused.",
    ),
]


def _size(text: str) -> str:
    parse_size(text)
    return text


HeldOutText = Annotated[
    Path | None,
    typer.Option("--held-out", help="Text or JSON lines to measure on. By default a standard text of this package."),
]


def _dtype(argument: str, help: str) -> Any:
    """An option for a dtype, by any of its usual names."""
    return typer.Option(
        parser=parsed(lambda text: chosen_dtype(argument, text)), metavar=f"<{'|'.join(DTYPES)}>", help=help
    )


Dtype = Annotated[Any, _dtype("dtype", "Cast the weights. By default each tensor keeps its own dtype.")]
Pickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Also read pytorch_model.bin, of which only the tensors are taken."),
]
ShardSize = Annotated[
    Any,
    typer.Option(parser=parsed(_size), metavar="<size>", help="Largest size of a weight file, such as 5GB or 200MiB."),
]


@app.command(cls=PlainCommand)
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a LLaMA or transformers DiffLlama checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to create.")],
    variant: Annotated[
        Literal["v1", "v2"] | None,
        typer.Option(
            case_sensitive=False,
            help="Needed for a LLaMA. v2: the same function exactly, with more query weights. v1: the same size, near "
            "the function once calibrated.",
        ),
    ] = None,
    layers: Annotated[
        Any,
        typer.Option(
            parser=parsed(parse_layers),
            metavar="0,4-7",
            help="Layers to make differential, counted from 0. All by default.",
        ),
    ] = None,
    lambda_init: Annotated[
        Any,
        typer.Option(
            parser=parsed(parse_lambda_init),
            metavar="paper|FLOAT|LIST",
            help="v1: lambda at the start, one number for all layers or one per layer. 0.05 by default.",
        ),
    ] = None,
    norm: Annotated[
        Literal["strict", "neutral"],
        typer.Option(
            case_sensitive=False,
            help="v1: strict is the paper's norm over heads; neutral has an epsilon that makes it the identity.",
        ),
    ] = "strict",
    lambda_start: Annotated[
        float,
        typer.Option("--lambda", help="v2: lambda at the start, between 0 and 1. Other values than 0.5 add a bias."),
    ] = 0.5,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="v1: text, JSON lines or a datasets folder on which each layer is fitted, so that little is lost."
        ),
    ] = None,
    uncalibrated: Annotated[
        bool,
        typer.Option(
            "--uncalibrated", help="v1: the plain copy, which loses most of the function and has to be healed."
        ),
    ] = False,
    calibration_tokens: Annotated[
        int, typer.Option(help="Number of tokens of the calibration text to read.")
    ] = CALIBRATION_TOKENS,
    stages: Annotated[
        Any,
        typer.Option(
            parser=parsed(parse_stages),
            metavar=",".join(STAGES),
            help="Calibration stages to run. All by default.",
        ),
    ] = None,
    lambda_floor: Annotated[
        float,
        typer.Option(help="Lowest lambda of any calibrated layer. 0 allows layers that are not differential."),
    ] = LAMBDA_FLOOR,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure the finished conversion next to its source.")
    ] = True,
    held_out: HeldOutText = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Start calibrations of more than an hour without a question.")
    ] = False,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    seed: Annotated[int, typer.Option(help="v1: seed from which the lambda vectors are drawn.")] = 0,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a LoRA of the LLaMA, to carry over to OUTPUT/adapter. With --calibration it is merged "
            "into the LLaMA first. Where SOURCE is converted already, OUTPUT is the adapter."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, where SOURCE is a Hub id.")] = None,
    source_layout: Annotated[
        Literal["auto", "unilm"],
        typer.Option(
            case_sensitive=False,
            help="unilm: the tensor names and interleaved rotary order of the authors' own V1 code.",
        ),
    ] = "auto",
    backbone_only: Annotated[
        bool, typer.Option("--backbone-only", help="Convert the model without its head (lm_head or a task head).")
    ] = False,
    allow_pickle: Pickle = False,
    allow_nonfinite: Annotated[
        bool,
        typer.Option("--allow-nonfinite", help="Carry NaN and Inf in the weights over, in place of refusing them."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything but the numbers in the weights, and write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    resume: Resume = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Convert a LLaMA checkpoint into a Differential Transformer."""
    with one_line_errors(verbose, output), layer_progress() as on_layer, byte_progress("converting") as progress:
        report = convert_checkpoint(
            source, output, variant, layers=layers, lambda_init=lambda_init, norm=norm, lambda_start=lambda_start,
            calibration=calibration, uncalibrated=uncalibrated, calibration_tokens=calibration_tokens, stages=stages,
            lambda_floor=lambda_floor, dtype=dtype, max_shard_size=max_shard_size, seed=seed, adapter=adapter,
            revision=revision, source_layout=source_layout, backbone_only=backbone_only, allow_pickle=allow_pickle,
            allow_nonfinite=allow_nonfinite, dry_run=dry_run, overwrite=overwrite, resume=resume, progress=progress,
            measure=measure, held_out=held_out, before_calibration=ask_before_calibration(yes or as_json),
            calibration_progress=on_layer,
        )  # fmt: skip
    show_conversion(report, as_json, "would write" if dry_run else "wrote")


@app.command(cls=PlainCommand)
def verify(
    output: Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")],
    against: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the LLaMA it was converted from, to compare with.")
    ] = None,
    held_out: HeldOutText = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check the files of a converted checkpoint and what was promised of it. Exit code 1 if a check fails."""
    with one_line_errors(verbose):
        report = verify_checkpoint(output, against, held_out=held_out)
    show_verification(report, as_json)
    raise typer.Exit(0 if report.passed else 1)


@app.command(cls=PlainCommand)
def export(
    output: Annotated[Path, typer.Argument(help="Folder of a V1 checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to create.")],
    format: Annotated[
        Literal["diffllama"], typer.Option(case_sensitive=False, help="diffllama: transformers' own DiffLlama class.")
    ] = "diffllama",
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    resume: Resume = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint for transformers' own class, which needs no custom code: lossless, or refused."""
    with one_line_errors(verbose, target), byte_progress("exporting") as progress:
        report = export_checkpoint(
            output, target, format, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, resume=resume,
            progress=progress,
        )  # fmt: skip
    show_conversion(report, as_json, "wrote")


@app.command(cls=PlainCommand)
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of a LLaMA, diffllama or diff_llama checkpoint.")],
    allow_pickle: Pickle = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what a checkpoint is: heads, widths, parameters, lambda per layer, which conversion made it."""
    with one_line_errors(verbose):
        description = describe_checkpoint(folder, allow_pickle)
    show_description(description, as_json)


@app.command(cls=PlainCommand)
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint, an export or an adapter.")],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub, created if it does not exist.")
    ],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Visibility of a new repository. Private by default where the base model's license restricts access.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to, created if it does not exist. main by default.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Upload as a pull request in place of a commit to main.")
    ] = False,
    format: Annotated[
        Literal["native", "diffllama"],
        typer.Option(
            case_sensitive=False,
            help="native: the checkpoint with its code. diffllama: exported to transformers' own class, without code.",
        ),
    ] = "native",
    verification: Annotated[
        Path | None,
        typer.Option(help="File with the output of `verify --json`, whose numbers go into the model card."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and their sizes, contact nothing.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Upload a checkpoint to the Hub in one commit, with all that loading needs. Log in first: `hf auth login`."""
    with one_line_errors(verbose), quiet_client():
        report = push_checkpoint(
            folder, repo, private=private, revision=revision, create_pr=create_pr, dry_run=dry_run, format=format,
            verification=None if verification is None else read_report(verification),
        )  # fmt: skip
    show_push(report, as_json)


@app.command("update-code", cls=PlainCommand)
def update_code(
    target: Annotated[
        str, typer.Argument(metavar="FOLDER_OR_REPO", help="Folder or Hub id of a diff_llama checkpoint.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that were edited or are newer, too.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch on the Hub. main by default.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request on the Hub in place of a commit.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Put the model code of this diff-llama next to a checkpoint's weights, which are not touched."""
    with one_line_errors(verbose), quiet_client():
        report = update_checkpoint_code(target, dry_run=dry_run, force=force, revision=revision, create_pr=create_pr)
    show_update(report, as_json)


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
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        app()
    except Stopped as stopped:  # before the command's work was begun, or after its end
        say(f"{stopped}; nothing half done was left", "red", err)
        end_stopped(stopped.exit_code)
    except SystemExit as error:
        if error.code in EXIT_CODES:
            end_stopped(int(error.code))
        raise
