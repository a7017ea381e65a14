"""From a reader through rules into a writer: one tensor at a time, whatever the size of the model."""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from conversion.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec, count_nonfinite, plan_shards
from conversion.checkpoint.file_identity import quick_identity
from conversion.checkpoint.writer import RECORD
from conversion.errors import ConversionError
from conversion.mapping.rules import Rule
from modeling_diff import DiffLlamaConfig


Progress = Callable[[int, int], None]  # bytes written so far, bytes in all

WIDER = {torch.float16: "bfloat16", torch.bfloat16: "float32"}  # what holds larger numbers


@dataclass(frozen=True)
class Plan:
    """All that a run will write, settled before the first byte of data is read.

    Attributes:
        reader: The source's weights.
        rules: One per tensor of the target.
        dtype: Dtype to cast the weights to; None where each tensor keeps its own.
        allow_nonfinite: Whether NaN and infinite entries are carried over.
        max_shard_bytes: Largest size of a weight file.
        record: Content of conversion.json, without checksums.
        texts: Text files, by name.
        files: Files to copy, by the name they get.
        blobs: Other files as bytes, by name.
        specs: Shape and dtype of every tensor of the target.

    Raises:
        ConversionError: The source's weights are quantized.
    """

    reader: CheckpointReader
    rules: Sequence[Rule]
    dtype: torch.dtype | None
    allow_nonfinite: bool
    max_shard_bytes: int
    record: Mapping[str, Any]
    texts: Mapping[str, str]
    files: Mapping[str, Path]
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    specs: dict[str, TensorSpec] = field(init=False)

    def __post_init__(self) -> None:
        specs = {rule.target: TensorSpec(rule.shape, self._dtype(rule)) for rule in self.rules}
        object.__setattr__(self, "specs", specs)

    def _dtype(self, rule: Rule) -> torch.dtype:
        if rule.dtype_of is None:
            return torch.float32
        stored = self.reader.tensors[rule.dtype_of].dtype
        if not stored.is_floating_point or stored.itemsize == 1:
            raise ConversionError(
                f"tensor {rule.dtype_of} is {stored}: quantized weights cannot be rearranged; convert the original"
            )
        return self.dtype or stored

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(spec.num_bytes for spec in self.specs.values())

    @property
    def num_blob_bytes(self) -> int:
        """Bytes of the files in `blobs`."""
        return sum(map(len, self.blobs.values()))


class ConvertedTensors:
    """The target's tensors by name, each computed when it is read.

    Args:
        plan: What is written.
        done_bytes: Bytes that a stopped run has written.
        progress: Called with bytes written so far, and bytes in all.
    """

    def __init__(self, plan: Plan, done_bytes: int, progress: Progress | None) -> None:
        self.plan = plan
        self.done_bytes = done_bytes
        self.progress = progress
        self.rules = {rule.target: rule for rule in plan.rules}

    def __getitem__(self, name: str) -> torch.Tensor:
        rule = self.rules[name]
        spec = self.plan.specs[name]
        # With another dtype, what is promised holds of the source in that dtype: it is rounded first.
        rounded = spec.dtype if self.plan.dtype else None
        sources = [self._read(source, rounded) for source, _ in rule.sources]
        tensor = rule.build(*sources)
        del sources
        converted = _cast(name, tensor, spec.dtype)
        self.done_bytes += spec.num_bytes
        if self.progress:
            self.progress(self.done_bytes, self.plan.num_bytes)
        return converted.contiguous()

    def _read(self, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        tensor = self.plan.reader.read(name)
        count, first = count_nonfinite(tensor)
        if count and not self.plan.allow_nonfinite:
            raise ConversionError(
                f"tensor {name} has {count} NaN or infinite entries, the first at {first}; the checkpoint is damaged, "
                "get it again or pass --allow-nonfinite"
            )
        return tensor if dtype is None else _cast(name, tensor, dtype)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    converted = tensor.to(dtype)
    if converted is not tensor and count_nonfinite(converted)[0] > count_nonfinite(tensor)[0]:
        way_out = f"choose --dtype {WIDER[dtype]}" if dtype in WIDER else "the checkpoint is damaged, get it again"
        raise ConversionError(
            f"tensor {name} has entries up to {tensor.abs().max().item():.5g}, more than {str(dtype).split('.')[-1]} "
            f"holds ({torch.finfo(dtype).max:.5g}); {way_out}"
        )
    return converted


def write_plan(
    plan: Plan, output: Path, source: Path, *, overwrite: bool, resume: bool | None, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes a checkpoint; after an error nothing is left that looks complete.

    Args:
        plan: What to write.
        output: Folder to create.
        source: Folder that is read from, and not written to.
        overwrite: Whether to replace an existing checkpoint.
        resume: What to do with work that a stopped run has kept: `conversion.checkpoint.kept_work`.
        progress: Called with bytes written so far, and bytes in all.

    Returns:
        The record, which is also in the checkpoint as conversion.json.

    Raises:
        ConversionError: Entries of a tensor are not finite, or too large for the dtype; the source has changed.
        FilesError: The disk or the target folder.
    """
    digests = _in_background(plan.reader.sha256)  # next to the work: hashing reads every byte as well
    shards = plan_shards(plan.specs, plan.max_shard_bytes)
    fingerprint = _fingerprint(plan)
    with CheckpointWriter(
        output, shards, source=source, overwrite=overwrite, resume=resume, fingerprint=fingerprint
    ) as writer:
        pending = list(writer.pending())
        done_bytes = plan.num_bytes - sum(shard.num_bytes for shard in pending)
        tensors = ConvertedTensors(plan, done_bytes, progress)
        for shard in pending:
            writer.write_shard(shard, tensors)
        for name, path in plan.files.items():
            writer.copy_file(path, name)
        for name, data in plan.blobs.items():
            writer.write_bytes(name, data)
        for name, text in plan.texts.items():
            writer.write_text(name, text)
        source_record = {**plan.record["source"], "sha256": digests()}
        plan.reader.check_unchanged()
        record = writer.write_record(RECORD, {**plan.record, "source": source_record})
        writer.commit()
    return record


def _fingerprint(plan: Plan) -> str:
    """Returns a digest of source and options, so that only the very same work is continued."""
    files = quick_identity(plan.reader.files)
    texts = sorted(plan.texts.items())
    identity = json.dumps([plan.record, files, texts, str(plan.dtype), plan.max_shard_bytes], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def _in_background(work: Callable[[], dict[str, str]]) -> Callable[[], dict[str, str]]:
    """Starts `work` in a thread; the function returned waits for its result, or raises what it raised.

    A daemon thread rather than a pool: an interrupted conversion must end at once, not after gigabytes are hashed.
    """
    results: list[dict[str, str]] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> dict[str, str]:
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    return wait


def planned_config(plan: Plan) -> DiffLlamaConfig:
    """Returns the config that `plan` will write."""
    return DiffLlamaConfig.from_dict(json.loads(plan.texts["config.json"]))
