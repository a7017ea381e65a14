"""A random LLaMA, its conversions and rows to train on: what the tests of healing share. Not a test module."""

from pathlib import Path

from random_llamas import random_llama, saved, write_rows
from safetensors.torch import load_file

from conversion import convert_checkpoint
from conversion.heal import heal_checkpoint
from conversion.healing.options import HealingOptions


CONTEXT = 16
BATCH_ROWS = 4
TOY = {
    "max_length": CONTEXT,
    "per_device_train_batch_size": BATCH_ROWS,
    "max_steps": 6,
    "held_out_rows": 4,
    "eval_steps": 0.5,
    "learning_rate": 5e-3,
}


def write_training_rows(path: Path, num_rows: int = 40, seed: int = 3) -> Path:
    return write_rows(path, num_rows, CONTEXT, seed)


def make_toys(folder: Path) -> Path:
    """`folder` with llama/, v1/, v1-neutral/, v2/ and data.jsonl in it."""
    saved(random_llama(), folder / "llama")
    convert_checkpoint(folder / "llama", folder / "v1", "v1", uncalibrated=True)
    convert_checkpoint(folder / "llama", folder / "v1-neutral", "v1", uncalibrated=True, norm="neutral")
    convert_checkpoint(folder / "llama", folder / "v2", "v2")
    write_training_rows(folder / "data.jsonl")
    return folder


def heal(toys: Path, output: Path, student: str = "v1", *, arguments: dict | None = None, **options):
    given = {"data": toys / "data.jsonl", "teacher": toys / "llama"} | (arguments or {})
    return heal_checkpoint(toys / student, output, HealingOptions(**(TOY | options)), **given)


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")
