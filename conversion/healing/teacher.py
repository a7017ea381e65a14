"""The frozen LLaMA that a student learns from: found, checked against the student, placed, asked."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import fully_shard

from conversion.checkpoint import CheckpointReader
from conversion.checkpoint.companions import read_tokenizer
from conversion.errors import ConversionError, typed
from conversion.healing.completeness import check_whole
from conversion.healing.losses import LogitTargets, Targets
from conversion.healing.options import HealingOptions, TrainerOptions
from conversion.healing.streams import LayerStreams, decoder_layers
from conversion.healing.work_folder import processes
from conversion.options import torch_dtype
from conversion.record import adapter_merged, changed_files
from conversion.source.config import SourceModel, read_config, read_source_model
from conversion.source.location import SourceFolder, locate_source
from conversion.source.model import load_original
from modeling_diff import DiffLlamaConfig


logger = logging.getLogger(__name__)


class Teacher(Protocol):
    """What a stage and a measurement ask: targets of rows (B, T), known by their numbers as well."""

    def targets(self, ids: torch.Tensor, numbers: torch.Tensor) -> Targets: ...


class LiveTeacher:
    """A model in memory. `states` are its hidden states before, between and after its layers, each (B, T, C)."""

    def __init__(self, model: Any, wants_states: bool):
        self.model = model.requires_grad_(False).eval()
        self.streams = LayerStreams(model) if wants_states else None

    def place(self, accelerator: Accelerator) -> None:
        """Moves the model to the device; under FSDP2 in shards, one unit per layer."""
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is None or plugin.fsdp_version != 2:
            self.model.to(accelerator.device)
            return
        for layer in decoder_layers(self.model):
            fully_shard(layer)
        fully_shard(self.model)

    @torch.no_grad()
    def targets(self, ids: torch.Tensor, numbers: torch.Tensor) -> Targets:
        return LogitTargets(self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1))

    @torch.no_grad()
    def last_states(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns what the language model's head reads, (B, T, C)."""
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def states(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Returns the hidden states alone: the stage LOCAL has no use for targets."""
        assert self.streams is not None
        self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return self.streams.take()

    @torch.no_grad()
    def targets_and_states(self, ids: torch.Tensor) -> tuple[Targets, list[torch.Tensor]]:
        assert self.streams is not None
        targets = self.targets(ids, ids)
        return targets, self.streams.take()


def find_teacher(
    source: str | Path,
    student: DiffLlamaConfig,
    folder: Path,
    options: HealingOptions,
    allow_pickle: bool = False,
) -> SourceFolder:
    """Finds a LLaMA that can teach a student; the files of its weights are checked, none is loaded.

    Args:
        source: Its folder or Hub id.
        student: The student's config.
        folder: The student's folder.
        options: The healing's options.
        allow_pickle: Whether pickled weights may be read.

    Raises:
        ConversionError: It is no whole LLaMA, or does not fit: vocabulary, tokenizer or, where hidden states are
            compared, layers or width differ.
    """
    found = locate_source(source, allow_pickle=allow_pickle)
    model = _read_llama(source, found.folder)
    config: Any = model.config
    check_fit(config, student, options, f"{typed('teacher')} {source}")
    _check_tokenizers(source, found.folder, folder)
    CheckpointReader(found.folder, allow_pickle=allow_pickle)
    check_whole(found.folder, model.architecture.model_class, config)
    return found


def _read_llama(source: str | Path, folder: Path) -> SourceModel:
    raw = read_config(folder)
    if raw["model_type"] == DiffLlamaConfig.model_type:
        raise ConversionError(
            f"{typed('teacher')} {source}: model_type is {raw['model_type']!r}, a converted checkpoint, expected "
            "'llama'; give the LLaMA that it was converted from"
        )
    try:
        model = read_source_model(folder)
    except ConversionError as error:
        fault = str(error).partition("; ")[0]  # what comes after it is advice for a conversion
        raise ConversionError(f"{typed('teacher')} {source}: {fault}; give the LLaMA that was converted") from error
    if model.kind != "llama":
        raise ConversionError(
            f"{typed('teacher')} {source}: model_type is {raw['model_type']!r}, expected 'llama'; give the LLaMA that "
            "was converted, or choose stage lm, which needs none"
        )
    return model


def is_recorded_source(teacher: SourceFolder, folder: Path, record: Mapping[str, Any]) -> bool:
    """Returns whether a teacher's weights are those that a checkpoint was converted from; logs a note if not.

    Args:
        teacher: The teacher.
        folder: The checkpoint that it is to teach.
        record: Its conversion.json.

    Raises:
        ConversionError: They are, and the checkpoint has an adapter that they are without.
    """
    same = not changed_files(teacher.folder, record["source"])
    merged = adapter_merged(record)
    if same and merged:
        raise ConversionError(
            f"{folder}: an adapter was merged before the conversion, and {typed('teacher')} {teacher.name} is without "
            "it, which would train it away; merge it into the LLaMA and give that, or train on text alone "
            f"({typed('stage', 'lm')}, no teacher)"
        )
    if not same and processes().is_main_process:
        logger.warning(
            "the teacher %s is not what %s was converted from (%s%s): distances are those from this teacher",
            *(teacher.name, folder, record["source"]["name"], ", with an adapter merged into it" if merged else ""),
        )
    return same


def check_fit(teacher: Any, student: Any, options: TrainerOptions, name: str) -> None:
    """Checks that the outputs of teacher and student compare.

    Args:
        teacher: The teacher's config.
        student: The student's config.
        options: What is compared.
        name: What the teacher is called in messages.

    Raises:
        ConversionError: Vocabulary or, where hidden states are compared, layers or width differ.
    """
    needed = ["vocab_size"]
    if options.compares_hidden_states:
        needed += ["num_hidden_layers", "hidden_size"]
    for field in needed:
        theirs = getattr(teacher, field)
        ours = getattr(student, field)
        if theirs != ours:
            raise ConversionError(
                f"{name}: {field} is {theirs}, and the checkpoint's is {ours}; give the LLaMA that was converted, or "
                "one of its kind"
            )


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of a checkpoint's weights: safetensors, or pickles where there is nothing else."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _check_tokenizers(source: str | Path, teacher: Path, student: Path) -> None:
    theirs = read_tokenizer(teacher)
    ours = read_tokenizer(student)
    if theirs is None or ours is None or theirs.get_vocab() == ours.get_vocab():
        return
    differing = set(theirs.get_vocab().items()) ^ set(ours.get_vocab().items())
    raise ConversionError(
        f"{typed('teacher')} {source}: its tokenizer has other tokens than the checkpoint's (such as "
        f"{min(differing)[0]!r}), so their distributions do not compare; give the LLaMA that was converted"
    )


def load_teacher(folder: Path, options: HealingOptions) -> LiveTeacher:
    """Loads a teacher, on the CPU still."""
    default = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    dtype = torch_dtype(options.teacher_dtype) if options.teacher_dtype else default
    model: nn.Module = load_original(folder, read_source_model(folder).config, dtype=dtype)
    return LiveTeacher(model, options.compares_hidden_states)
