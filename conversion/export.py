"""V1 checkpoints to transformers' own `diffllama`, which loads without custom code: lossless, or refused."""

from pathlib import Path
from typing import Literal

from conversion.checkpoint import check_target
from conversion.hub.model_card import export_card
from conversion.mapping.stream import Progress, write_plan
from conversion.options import chosen
from conversion.planning.diffllama import plan_export
from conversion.record import ConversionReport


def export_checkpoint(
    source: str | Path,
    output: str | Path,
    format: Literal["diffllama"] = "diffllama",
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    resume: bool | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Writes a V1 checkpoint of ours as transformers' DiffLlama.

    The weight of the norm over heads is multiplied into o_proj, rounded once in the dtype written: give float32 to
    keep a bfloat16 model's trained norm without that rounding.

    Args:
        source: Folder of a V1 checkpoint.
        output: Folder to create.
        format: "diffllama": transformers' own DiffLlama class.
        dtype: Cast the weights; by default each tensor keeps its own dtype.
        max_shard_size: Largest size of a weight file.
        overwrite: Whether to replace an existing output, in one step at the end.
        resume: Continue from the work that a stopped run has kept, or discard it (False).
        progress: Called with bytes written so far, and bytes in all.

    Returns:
        What was written, with notes for the user.

    Raises:
        ConversionError: Bad input, or a checkpoint that DiffLlama cannot express.
        FilesError: The disk or the target folder.
    """
    chosen("format", format, ("diffllama",))
    folder = Path(source)
    check_target(Path(output), source=folder, overwrite=overwrite)
    plan, notes = plan_export(folder, export_card(folder), dtype=dtype, max_shard_size=max_shard_size)
    written = write_plan(plan, Path(output), folder, overwrite=overwrite, resume=resume, progress=progress)
    return ConversionReport(Path(output), written, notes, plan.num_bytes)
