"""Where a source is: a local folder, or a Hub id, of which weights and small files come down and never any code."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from conversion.companions import COMPANIONS
from conversion.errors import ConversionError


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TEXT_PATTERNS = ("*.json", "README.md", *(pattern for patterns in COMPANIONS.values() for pattern in patterns))
WEIGHT_PATTERNS = ("model*.safetensors",)
PICKLE_PATTERNS = ("pytorch_model*.bin",)


@dataclass(frozen=True)
class SourceFolder:
    """A checkpoint on this machine. `hub_id` and `revision` (a commit) say where it came from, None for a folder."""

    folder: Path
    hub_id: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """What may be published of where it came from: the Hub id, or the folder's name without its path."""
        return self.hub_id or self.folder.resolve().name


def locate_source(
    source: str | Path, revision: str | None = None, allow_pickle: bool = False, config_only: bool = False
) -> SourceFolder:
    """The folder that `source` names, downloaded through the Hub's cache if it is a Hub id (`owner/name`).

    With `config_only` nothing but config.json comes down.
    Raises ConversionError for a path or id under which nothing can be had.
    """
    folder = Path(source).expanduser()
    if folder.exists() or not HUB_ID.fullmatch(str(source)) or str(source).startswith("."):
        if revision is not None:
            raise ConversionError(f"--revision {revision}: {source} is a local path, and only Hub ids have revisions")
        return SourceFolder(folder)
    patterns = [*TEXT_PATTERNS, *WEIGHT_PATTERNS, *(PICKLE_PATTERNS if allow_pickle else ())]
    return _download(str(source), revision, ["config.json"] if config_only else patterns)


def _download(hub_id: str, revision: str | None, patterns: list[str]) -> SourceFolder:
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ConversionError(
            f"{hub_id}: access is restricted; accept its terms on the Hub and log in (`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise ConversionError(
            f"{hub_id}: has no revision {revision!r}; check the name of the branch or commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConversionError(
            f"{hub_id}: neither a local folder nor a Hub repository you can see; check the name, or log in"
        ) from error
    except HFValidationError as error:
        raise ConversionError(f"{hub_id}: neither a local folder nor a possible Hub id; check the name") from error
    except ValueError as error:  # such as a file name that leads out of the folder
        raise ConversionError(
            f"{hub_id}: the Hub's client refuses what it finds there ({' '.join(str(error).split())})"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise ConversionError(
            f"{hub_id}: not a local folder, and the Hub cannot be reached; check the path or the network, or download "
            f"it first ({type(error).__name__})"
        ) from error
    return SourceFolder(folder, hub_id, folder.name)
