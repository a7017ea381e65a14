"""Checkpoints on disk: the lazy reader and the atomic sharded writer, in one import. Knows files, no models."""

from conversion.checkpoint.output_folder import check_target
from conversion.checkpoint.reader import CheckpointReader, TensorInfo, count_nonfinite
from conversion.checkpoint.writer import CheckpointWriter, Shard, TensorSpec, plan_shards


__all__ = [
    "CheckpointReader",
    "CheckpointWriter",
    "Shard",
    "TensorInfo",
    "TensorSpec",
    "check_target",
    "count_nonfinite",
    "plan_shards",
]
