"""Where a source is: a folder here, or a repository of the Hub, of which weights and texts come down and no code."""

from collections.abc import Mapping
from dataclasses import dataclass
from glob import escape as escape_pattern
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from conversion.checkpoint.companions import COMPANIONS
from conversion.checkpoint.reader import (
    ADAPTER_CONFIG,
    INDEX_SUFFIX,
    PICKLE,
    SAFETENSORS,
    no_weights,
    pickles_refused,
    read_index,
)
from conversion.errors import ConversionError, typed
from conversion.source.gguf_file import SUFFIX, UnpackedFile, unpack_gguf
from conversion.source.hub_address import parse_address


INDICES = (SAFETENSORS + INDEX_SUFFIX, PICKLE + INDEX_SUFFIX)
TEXT_PATTERNS = (
    *("config.json", ADAPTER_CONFIG, "conversion.json", "README.md", *INDICES),
    *(pattern for patterns in COMPANIONS.values() for pattern in patterns),
)


@dataclass(frozen=True)
class SourceFolder:
    """A checkpoint on this machine. `hub_id` and `revision` (a commit) say where it came from, None for a folder.

    `unpacked` is the GGUF file that it was made of, whose folder goes with the last of these objects.
    """

    folder: Path
    hub_id: str | None = None
    revision: str | None = None
    unpacked: UnpackedFile | None = None

    @property
    def name(self) -> str:
        """What may be published of where it came from: the Hub id, or the folder's name without its path."""
        return self.unpacked.path.name if self.unpacked else self.hub_id or self.folder.resolve().name


def locate_source(
    source: str | Path,
    revision: str | None = None,
    allow_pickle: bool = False,
    config_only: bool = False,
    recorded: Mapping[str, Any] | None = None,
) -> SourceFolder:
    """Returns the folder that `source` names, downloaded through the Hub's cache if it is no folder here.

    Args:
        source: A folder, a GGUF file, or a repository in one of the forms of `parse_address`.
        revision: Branch, tag or commit of a repository, if `source` names none itself.
        allow_pickle: Let pickled weights come down where there are no others.
        config_only: Let nothing but config.json come down.
        recorded: The source of a record, whose commit is taken for its own repository if no other is named.

    Raises:
        ConversionError: A path or repository under which nothing can be had.
    """
    folder = Path(source).expanduser()
    address = None if folder.exists() else parse_address(str(source))
    if address is None:
        if revision is not None:
            raise ConversionError(
                f"{typed('revision', revision)}: {source} is a local path, and only Hub ids have revisions"
            )
        if folder.suffix.lower() == SUFFIX and folder.is_file():
            unpacked = unpack_gguf(folder, config_only)
            return SourceFolder(Path(unpacked.folder.name), unpacked=unpacked)
        return SourceFolder(folder)
    if revision is not None and address.revision not in (None, revision):
        raise ConversionError(
            f"{source}: names revision {address.revision}, and {typed('revision', revision)} another; leave out one"
        )
    wanted = address.revision or revision
    if wanted is None and recorded is not None and recorded["hub_id"] == address.hub_id:
        wanted = recorded["revision"]
    if config_only:
        return _download(address.hub_id, wanted, ["config.json"])
    return _download_checkpoint(address.hub_id, wanted, allow_pickle)


def locate_recorded(source: str | Path, record: Mapping[str, Any]) -> SourceFolder:
    """Returns the source that a conversion was made of, read as it was then.

    Args:
        source: As `locate_source`.
        record: Of the conversion.

    Raises:
        ConversionError: As `locate_source`.
    """
    # Converted from pickles, it was allowed to read them.
    pickles = not any(name.endswith(".safetensors") for name in record["source"]["sha256"])
    return locate_source(source, allow_pickle=pickles, recorded=record["source"])


def _download_checkpoint(hub_id: str, revision: str | None, allow_pickle: bool) -> SourceFolder:
    """Texts first, among them the index, which says what the weight files are called."""
    found = _download(hub_id, revision, list(TEXT_PATTERNS))
    for single in (SAFETENSORS, PICKLE):
        index = found.folder / (single + INDEX_SUFFIX)
        if single == PICKLE and not allow_pickle:
            if index.exists():
                raise pickles_refused(hub_id)
            continue
        weights = {single} | (set(read_index(index).values()) if index.exists() else set())
        # The same commit again, in which the texts are there already.
        found = _download(hub_id, found.revision, [*TEXT_PATTERNS, *sorted(escape_pattern(name) for name in weights)])
        if index.exists() or (found.folder / single).exists():
            return found
    names = _remote_names(found)
    if PICKLE in names and not allow_pickle:
        raise pickles_refused(hub_id)
    raise no_weights(hub_id, names)


def _remote_names(found: SourceFolder) -> list[str]:
    """Returns what the repository holds at its top, to say why nothing of it can be used; asked only then.

    Raises:
        ConversionError: A Hub that cannot be asked.
    """
    try:
        names = HfApi().list_repo_files(str(found.hub_id), revision=found.revision)
        return [name for name in names if "/" not in name]
    except (HfHubHTTPError, HTTPError, OSError, OfflineModeIsEnabled) as error:
        raise ConversionError(
            f"{found.hub_id}: no {SAFETENSORS} and no index of shards came down, and the Hub cannot be asked what "
            f"else is there ({type(error).__name__}); if it is {PICKLE} alone, {typed('allow_pickle', True)} reads it"
        ) from error


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
