"""What a source is: where it lies, its config, its tensors, transformers' own model of it."""

from conversion.source.opened import Source, open_source


__all__ = ["Source", "open_source"]
