"""A healed student as a plain checkpoint: weights in the dtypes they came in, tokenizer, code, card and record."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from conversion.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec, plan_shards
from conversion.checkpoint.companions import companion_files
from conversion.errors import ConversionError
from conversion.healing.options import HealingOptions
from conversion.options import torch_dtype
from conversion.record import RECORD, versions
from conversion.source.location import SourceFolder
from modeling_diff import DiffLlamaConfig


PROMISE = {"kind": "parity", "text": "healed: trained end to end, near its source and not equal to it"}
MEASURED = ("loss", "kl", "greedy_agreement", "recovered")


def stored_specs(reader: CheckpointReader, dtype: str | None) -> dict[str, TensorSpec]:
    """Returns what will be written: the tensors of `reader`, in its dtypes or `dtype`; lambda unchanged."""
    return {
        name: TensorSpec(info.shape, torch_dtype(dtype) if dtype and "diff_lambda" not in name else info.dtype)
        for name, info in reader.tensors.items()
    }


def stored_tensors(
    reader: CheckpointReader, state: Mapping[str, torch.Tensor], dtype: str | None
) -> dict[str, torch.Tensor]:
    """Returns tensors as they will be written.

    Args:
        reader: The checkpoint that was trained.
        state: The student's tensors by name.
        dtype: dtype of the output; None keeps each tensor's own.

    Raises:
        ConversionError: An entry is NaN or infinite; names the tensor.
    """
    tensors = {}
    for name, spec in stored_specs(reader, dtype).items():
        tensor = state[name].detach().to("cpu", spec.dtype).contiguous()
        if not tensor.isfinite().all():
            raise ConversionError(f"tensor {name} has NaN or infinite entries after healing; lower the learning rate")
        tensors[name] = tensor
    return tensors


def write_healed(
    output: Path,
    source: Path,
    config: DiffLlamaConfig,
    *,
    tensors: Mapping[str, torch.Tensor],
    record: Mapping[str, Any],
    card: str,
    code: Mapping[str, Path],
    max_shard_bytes: int,
    overwrite: bool,
) -> dict[str, Any]:
    """Writes the checkpoint with the tokenizer of its `source`; it appears whole or not at all. Returns its record."""
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    shards = plan_shards(specs, max_shard_bytes)
    files, _ = companion_files(source)
    with CheckpointWriter(
        output, shards, source=source, overwrite=overwrite, resume=False, fingerprint=None
    ) as writer:
        for shard in shards:
            writer.write_shard(shard, tensors)
        for name, path in {**files, **code}.items():
            writer.copy_file(path, name)
        writer.write_text("config.json", config.to_json_string())
        writer.write_text("README.md", card)
        written = writer.write_record(RECORD, record)
        writer.commit()
    return written


def healed_config(start: DiffLlamaConfig, end: DiffLlamaConfig, dtype: str | None) -> DiffLlamaConfig:
    """Returns the final config, with the start's architecture and the dtype of the weights as they are written."""
    stored = torch_dtype(dtype) if dtype else start.dtype
    return DiffLlamaConfig.from_dict(end.to_dict() | {"architectures": start.architectures, "dtype": stored})


def healing_entry(
    options: HealingOptions,
    *,
    teacher: SourceFolder | None,
    teacher_is_source: bool | None,
    data: Sequence[Path],
    steps: int,
    tokens: int,
    seconds: float,
    table: Sequence[Mapping[str, Any]],
    held_out: Sequence[Path],
    held_out_rows: int,
) -> dict[str, Any]:
    """Returns one healing for the list in conversion.json: names without paths, options, held-out numbers."""
    return {
        "stage": str(options.stage),
        "teacher": teacher and teacher.name,
        "teacher_is_source": teacher_is_source,
        "data": [path.name for path in data],
        "held_out": {"text": [path.name for path in held_out] or "first rows of the data", "rows": held_out_rows},
        "steps": steps,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "options": options.recorded(),
        "versions": versions(),
        "start": _measured(table[0]),
        "end": _measured(table[-1]),
        "table": list(table),
    }


def _measured(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in MEASURED if row[name] is not None}
