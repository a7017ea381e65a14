"""A source as one object: where it lies, what its config says, and a reader of its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conversion.checkpoint import CheckpointReader
from conversion.source.config import SourceModel, read_source_model
from conversion.source.location import SourceFolder, locate_source


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be converted; nothing of its weights but the headers has been read.

    Attributes:
        location: Its folder, and the Hub id and commit that it came from.
        model: Its config, checked, and the sizes that it means.
        reader: Its tensors by the names that the files give them.
    """

    location: SourceFolder
    model: SourceModel
    reader: CheckpointReader

    @property
    def folder(self) -> Path:
        """The folder on this machine."""
        return self.location.folder


def open_source(
    source: str | Path,
    *,
    revision: str | None = None,
    layout: Literal["auto", "unilm"] = "auto",
    backbone_only: bool = False,
    allow_pickle: bool = False,
    adapter: str | Path | None = None,
) -> Source:
    """Finds a source, downloads it if it is on the Hub, and checks its config and the headers of its weights.

    Args:
        source: A folder or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        layout: "unilm" for the tensor names and the rotary order of the authors' own V1 code.
        backbone_only: Leave out a language model head or task head.
        allow_pickle: Read pytorch_model.bin where there is no safetensors file.
        adapter: Folder of an adapter, whose files may lie among those of the source.

    Returns:
        The source, of whose weights only the headers were read.

    Raises:
        ConversionError: Anything but a checkpoint that can be converted.
        FilesError: A file cannot be read.
    """
    location = locate_source(source, revision, allow_pickle)
    model = read_source_model(location.folder, layout, backbone_only)
    with_adapter = adapter is not None and Path(adapter).resolve() == location.folder.resolve()
    return Source(
        location, model, CheckpointReader(location.folder, allow_pickle=allow_pickle, with_adapter=with_adapter)
    )
