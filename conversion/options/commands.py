"""Options of the smaller commands; the functions behind them have the same names and defaults as arguments."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conversion.options.values import (
    allow_pickle_option,
    dtype_option,
    held_out_option,
    option,
    overwrite_option,
    resume_option,
    shard_size_option,
    with_field_help,
)


@with_field_help
@dataclass(frozen=True)
class VerifyConfig:
    """Configures `diff-llama verify`: what a converted checkpoint is compared with."""

    against: str | None = option(help="Folder or Hub id of the LLaMA it was converted from, to compare with.")
    held_out: str | Path | None = held_out_option()
    certificate: str | Path | None = option(
        help="Run a fixed suite on both models and write its results to this JSON file. Needs --against. As "
        "certificate.json in the checkpoint's folder, `push` uploads it and shows it on the model card."
    )
    check: str | Path | None = option(
        help="Run the suite of this certificate again and say what differs. Needs --against."
    )
    overwrite: bool = option(False, help="Replace an earlier certificate.")


@with_field_help
@dataclass(frozen=True)
class ExportConfig:
    """Configures `diff-llama export`: how a V1 checkpoint is written for transformers' own class."""

    format: Literal["diffllama"] = option("diffllama", help="diffllama: transformers' own DiffLlama class.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = dtype_option()
    max_shard_size: str | int = shard_size_option()
    overwrite: bool = overwrite_option()
    resume: bool | None = resume_option()


@with_field_help
@dataclass(frozen=True)
class InspectConfig:
    """Configures `diff-llama inspect`: what may be read of a checkpoint."""

    allow_pickle: bool = allow_pickle_option()


@with_field_help
@dataclass(frozen=True)
class PushConfig:
    """Configures `diff-llama push`: how a checkpoint is uploaded."""

    private: bool | None = option(
        help="Visibility of a new repository. Private by default where the base model's license restricts access.",
        flag="--private/--public",
    )
    revision: str | None = option(help="Branch to upload to, created if it does not exist. main by default.")
    create_pr: bool = option(False, help="Upload as a pull request in place of a commit to main.")
    format: Literal["native", "diffllama"] = option(
        "native",
        help="native: the checkpoint with its code. diffllama: exported to transformers' own class, without code.",
    )
    verification: Path | None = option(
        help="File with the output of `verify --json`, whose numbers go into the model card."
    )
    dry_run: bool = option(False, help="List the files and their sizes, contact nothing.")


@with_field_help
@dataclass(frozen=True)
class UpdateCodeConfig:
    """Configures `diff-llama update-code`: how the code next to a checkpoint is renewed."""

    dry_run: bool = option(False, help="Say what would change, and change nothing.")
    force: bool = option(False, help="Replace files that were edited or are newer, too.")
    revision: str | None = option(help="Branch on the Hub. main by default.")
    create_pr: bool = option(False, help="Open a pull request on the Hub in place of a commit.")


@with_field_help
@dataclass(frozen=True)
class HealFilesConfig:
    """Configures the files of `diff-llama heal`; what is learned is in `HealingOptions`."""

    teacher: str | None = option(help="Folder or Hub id of the LLaMA it was converted from; stage lm needs none.")
    held_out: Path | None = option(help="Text to measure on. The first rows of --data by default.")
    allow_pickle: bool = allow_pickle_option()
    max_shard_size: str | int = shard_size_option()
    overwrite: bool = overwrite_option()
    resume: bool | None = resume_option()
