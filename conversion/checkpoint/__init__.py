"""Checkpoints on disk: the lazy reader and the atomic sharded writer, in one import. Knows files, no models."""

from conversion.checkpoint.output_folder import check_target
from conversion.checkpoint.reader import CheckpointReader, count_nonfinite
from conversion.checkpoint.safetensors_format import TensorInfo, TensorSpec
from conversion.checkpoint.shards import Shard, plan_shards
from conversion.checkpoint.writer import CheckpointWriter


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
