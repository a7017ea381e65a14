"""Options of the smaller commands; the functions behind them have the same names and defaults as arguments."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conversion.options.values import (
    ALLOW_PICKLE,
    DTYPES,
    OVERWRITE,
    RESUME,
    checked_size,
    option,
    parse_dtype,
)


@dataclass(frozen=True)
class VerifyConfig:
    """Options of `diff-llama verify`."""

    against: str | None = option(help="Folder or Hub id of the LLaMA it was converted from, to compare with.")
    held_out: str | Path | None = option(
        help="Text or JSON lines to measure on. By default a standard text of this package."
    )


@dataclass(frozen=True)
class ExportConfig:
    """Options of `diff-llama export`."""

    format: Literal["diffllama"] = option("diffllama", help="diffllama: transformers' own DiffLlama class.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        help="Cast the weights. By default each tensor keeps its own dtype.",
        parse=parse_dtype,
        metavar=f"<{'|'.join(DTYPES)}>",
    )
    max_shard_size: str | int = option(
        "5GB", help="Largest size of a weight file, such as 5GB or 200MiB.", parse=checked_size, metavar="<size>"
    )
    overwrite: bool = option(False, help=OVERWRITE)
    resume: bool | None = option(help=RESUME, flag="--resume/--no-resume")


@dataclass(frozen=True)
class InspectConfig:
    """Options of `diff-llama inspect`."""

    allow_pickle: bool = option(False, help=ALLOW_PICKLE)


@dataclass(frozen=True)
class PushConfig:
    """Options of `diff-llama push`."""

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


@dataclass(frozen=True)
class UpdateCodeConfig:
    """Options of `diff-llama update-code`."""

    dry_run: bool = option(False, help="Say what would change, and change nothing.")
    force: bool = option(False, help="Replace files that were edited or are newer, too.")
    revision: str | None = option(help="Branch on the Hub. main by default.")
    create_pr: bool = option(False, help="Open a pull request on the Hub in place of a commit.")
