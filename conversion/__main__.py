"""The command line: arguments only. `python -m conversion --help`."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from transformers.utils import logging as transformers_logging

from conversion.checkpoint import parse_size
from conversion.convert import convert_checkpoint
from conversion.describe import describe_checkpoint
from conversion.display import (
    ask_before_calibration,
    byte_progress,
    layer_progress,
    one_line_errors,
    quiet_client,
    show_conversion,
    show_description,
    show_healing,
    show_push,
    show_verification,
    step_progress,
)
from conversion.errors import ConversionError
from conversion.export import export_checkpoint
from conversion.healing.options import HealingOptions, HealOptimizer, HealStage, LambdaMode, Trained
from conversion.hub import push_checkpoint, read_verification
from conversion.options import CALIBRATION_TOKENS, LAMBDA_FLOOR, STAGES, parse_lambda_init, parse_layers, parse_stages
from conversion.verify import verify_checkpoint


app = typer.Typer(
    name="diff-llama",
    help="Differential Transformers from LLaMA checkpoints: convert, heal, verify, export, inspect, push.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
DEFAULTS = HealingOptions()

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
        Literal["v1", "v2"] | None,
        typer.Option(
            help="Needed for a LLaMA. v2: the same function exactly, with more query weights. v1: the same size, near "
            "the function once calibrated."
        ),
    ] = None,
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
    uncalibrated: Annotated[
        bool,
        typer.Option(
            "--uncalibrated", help="v1: the plain copy, which loses most of the function and has to be healed."
        ),
    ] = False,
    calibration_tokens: Annotated[int, typer.Option(help="How much of it is read.")] = CALIBRATION_TOKENS,
    stages: Annotated[
        Any,
        typer.Option(
            parser=parse_stages, metavar=",".join(STAGES), help="Of the calibration, some of these; all by default."
        ),
    ] = None,
    lambda_floor: Annotated[
        float,
        typer.Option(help="Lowest lambda of any calibrated layer. 0 allows layers that are not differential."),
    ] = LAMBDA_FLOOR,
    yes: Annotated[
        bool, typer.Option("--yes", help="Start calibrations of more than an hour without a question.")
    ] = False,
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all but the weights' numbers, write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Convert a LLaMA checkpoint into a Differential Transformer."""
    with one_line_errors(verbose, output), layer_progress() as on_layer, byte_progress("converting") as progress:
        report = convert_checkpoint(
            source, output, variant, layers=layers, lambda_init=lambda_init, norm=norm, lambda_start=lambda_start,
            calibration=calibration, uncalibrated=uncalibrated, calibration_tokens=calibration_tokens, stages=stages,
            lambda_floor=lambda_floor, dtype=dtype, max_shard_size=max_shard_size, seed=seed, revision=revision,
            source_layout=source_layout, backbone_only=backbone_only, allow_pickle=allow_pickle,
            allow_nonfinite=allow_nonfinite, dry_run=dry_run, overwrite=overwrite, resume=resume, progress=progress,
            before_calibration=ask_before_calibration(yes or as_json), calibration_progress=on_layer,
        )  # fmt: skip
    show_conversion(report, as_json, "would write" if dry_run else "wrote")


@app.command()
def verify(
    output: Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")],
    against: Annotated[str | None, typer.Option(help="Its source, folder or Hub id, to compare with.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check files, tensors and checksums, then what was promised of the function. Exit code 1 if a check fails."""
    with one_line_errors(verbose):
        report = verify_checkpoint(output, against)
    show_verification(report, as_json)
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
    with one_line_errors(verbose, target), byte_progress("exporting") as progress:
        report = export_checkpoint(
            output, target, format, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, resume=resume,
            progress=progress,
        )  # fmt: skip
    show_conversion(report, as_json, "wrote")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of a LLaMA, diffllama or diff_llama checkpoint.")],
    allow_pickle: Pickle = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what a checkpoint is: heads, widths, parameters, lambda a layer, which conversion made it."""
    with one_line_errors(verbose):
        description = describe_checkpoint(folder, allow_pickle)
    show_description(description, as_json)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint, an export or an adapter.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub, made if it is not there.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new repository. Private if the base's licence gates it."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to, made if it is not there.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request with it.")] = False,
    format: Annotated[
        Literal["native", "diffllama"],
        typer.Option(help="As it is, with its code; or exported to transformers' own class, which needs none."),
    ] = "native",
    verification: Annotated[
        Path | None, typer.Option(help="Output of verify --json, whose numbers go into the model card.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and bytes, ask and send nothing.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Upload to the Hub, in one commit, all that a stranger needs to load it. The token comes from `hf auth login`."""
    with one_line_errors(verbose), quiet_client():
        report = push_checkpoint(
            folder, repo, private=private, revision=revision, create_pr=create_pr, dry_run=dry_run, format=format,
            verification=None if verification is None else read_verification(verification),
        )  # fmt: skip
    show_push(report, as_json)


@app.command()
def heal(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a converted checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to create.")],
    data: Annotated[
        list[Path], typer.Option(help="Text, JSON lines or a datasets folder; may be given several times.")
    ],
    teacher: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the LLaMA it was converted from; stage lm needs none.")
    ] = None,
    stage: Annotated[
        HealStage, typer.Option(help="local: layer by layer. kl: the teacher's logits. lm: the text itself.")
    ] = HealStage.KL,
    held_out: Annotated[
        Path | None, typer.Option(help="Text to measure on. The first rows of the data by default.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="How long. Once through the data by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="The same in steps.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a row (1024, or what the model can read).")] = None,
    batch_rows: Annotated[int, typer.Option(help="Rows a step, over all devices.")] = DEFAULTS.batch_rows,
    micro_rows: Annotated[int | None, typer.Option(help="Rows a device takes at once.")] = None,
    optimizer: Annotated[
        HealOptimizer, typer.Option(help="muon: Muon for the layers' matrices, AdamW for the rest.")
    ] = DEFAULTS.optimizer,
    learning_rate: Annotated[
        float | None, typer.Option(help="Its peak; by default one that suits the optimiser.")
    ] = None,
    lambda_learning_rate: Annotated[float, typer.Option(help="Of lambda.")] = DEFAULTS.lambda_learning_rate,
    weight_decay: Annotated[float, typer.Option(help="Not of lambda, norms and biases.")] = DEFAULTS.weight_decay,
    train: Annotated[Trained, typer.Option(help="All parameters, or attention alone.")] = DEFAULTS.train,
    lambda_mode: Annotated[
        LambdaMode,
        typer.Option("--lambda", help="v1: free, held at --lambda-floor, or annealed to the paper's schedule."),
    ] = DEFAULTS.lambda_mode,
    lambda_floor: Annotated[float, typer.Option(help="v1: lambda is held at or above it.")] = DEFAULTS.lambda_floor,
    norm_share: Annotated[
        float, typer.Option(help="v1: share of the steps in which a neutral norm becomes the paper's.")
    ] = DEFAULTS.norm_share,
    hidden_weight: Annotated[float, typer.Option(help="kl: of the distance between hidden states.")] = 0.0,
    cross_entropy_weight: Annotated[float, typer.Option(help="kl: of the text itself, from 0 to 1.")] = 0.0,
    teacher_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Precision of the teacher in memory.")
    ] = None,
    cached_logits: Annotated[
        int | None, typer.Option(help="Keep the teacher's K likeliest tokens on disk, in place of the teacher.")
    ] = None,
    lora: Annotated[int | None, typer.Option(help="Train adapters of this rank, merged at the end.")] = None,
    allow_pickle: Pickle = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    seed: Annotated[int, typer.Option(help="Of the order of rows.")] = 0,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from a stopped run, to the same weights.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a converted checkpoint towards the LLaMA that it was made from: one stage a run."""
    from conversion.heal import heal_checkpoint  # with the Trainer: seconds that the other commands need not wait for

    with one_line_errors(verbose, output), step_progress() as progress:
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
