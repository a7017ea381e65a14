"""LoRA adapters of a LLaMA, read and checked in every tensor before anything is made of them."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from conversion.checkpoint.companions import read_object, whole_file
from conversion.checkpoint.file_identity import file_sha256
from conversion.checkpoint.reader import count_nonfinite, load_pickle
from conversion.errors import ConversionError, quote
from conversion.mapping.heads import Sizes
from conversion.mapping.layout import llama_tensors


CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MERGE = "merge it into the LLaMA (PEFT: merge_and_unload, save_pretrained) and convert the result"
PREFIX = "base_model.model."
LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?P<kind>weight|bias))?"
)
OTHER = {"A": "B", "B": "A"}  # of the two matrices of a LoRA
TASK_HEADS = re.compile(r"(score|qa_outputs|classifier)\.(weight|bias)")
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")  # which PEFT saves unasked where tokens were added
# What changes a LoRA's function beyond its matrices. `bias` trains the base's own biases.
REFUSED_FIELDS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Values of `init_lora_weights` that leave the base unchanged. PiSSA, OLoRA, CorDA, LoftQ and their like change it, by
# what they compute from its matrices, each time the adapter is loaded.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Adapter:
    """A LoRA of a LLaMA. `tensors` are by the names in its file, without PEFT's prefix; `sha256` is by file."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    sha256: Mapping[str, str]

    def scaling(self, module: str, rank: int) -> float:
        """Returns the factor of B A in a module, whose name may be matched by a pattern."""
        patterns = self.config.get("alpha_pattern") or {}
        matching = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
        alpha = next(matching, self.config.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def read_adapter(
    folder: str | Path, sizes: Sizes, *, allow_pickle: bool = False, allow_nonfinite: bool = False
) -> Adapter:
    """Reads a LoRA and checks that it is one of this LLaMA.

    Args:
        folder: What PEFT's save_pretrained wrote.
        sizes: The LLaMA's.
        allow_pickle: Whether adapter_model.bin is read where there are no safetensors.
        allow_nonfinite: Whether NaN and infinite numbers are taken.

    Raises:
        ConversionError: The folder holds no such adapter, or one of a kind that cannot be carried over.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ConversionError(
            f"{folder}: {found}, expected the folder of an adapter; check --adapter, or download it from the Hub first"
        )
    if not (folder / CONFIG).is_file():
        raise ConversionError(f"{folder / CONFIG}: missing, expected a folder that PEFT's save_pretrained wrote")
    config = read_object(whole_file(folder, CONFIG))
    _check_config(folder / CONFIG, config)
    path, stored = _load(folder, allow_pickle)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    _check_tensors(path, tensors, config, sizes)
    for name, tensor in tensors.items():
        count, first = count_nonfinite(tensor)
        if count and not allow_nonfinite:
            raise ConversionError(
                f"{path}: tensor {quote(name)} has {count} NaN or infinite entries, the first at {first}; get the "
                "adapter again or pass --allow-nonfinite"
            )
    return Adapter(folder, config, tensors, {found.name: file_sha256(found) for found in (folder / CONFIG, path)})


def llama_name(name: str) -> str:
    """Returns the name that LLaMA's language model gives to a module or tensor in an adapter's file."""
    bare = name.replace(".base_layer", "")
    return f"model.{bare}" if bare.startswith(("layers.", "embed_tokens", "norm.")) else bare


def _load(folder: Path, allow_pickle: bool) -> tuple[Path, dict[str, torch.Tensor]]:
    if os.path.lexists(folder / WEIGHTS):
        path = whole_file(folder, WEIGHTS)
        try:
            return path, load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ConversionError(f"{path}: refused by safetensors ({error}); get the adapter again") from error
    if not os.path.lexists(folder / PICKLE):
        raise ConversionError(f"{folder / WEIGHTS}: missing; get the adapter's weights as well")
    if not allow_pickle:
        raise ConversionError(
            f"{folder / PICKLE}: only pickled weights here, which can carry code; save the adapter as safetensors, or "
            "allow pickles (--allow-pickle)"
        )
    path = whole_file(folder, PICKLE)
    return path, load_pickle(path)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ConversionError(
            f"{path}: peft_type is {quote(config.get('peft_type'))}, and only LORA can be carried over; {MERGE}"
        )
    if config.get("bias", "none") != "none":
        raise ConversionError(
            f"{path}: bias is {quote(config['bias'])}, expected none: biases of the base cannot be carried over in an "
            f"adapter; {MERGE}"
        )
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        raise ConversionError(
            f"{path}: init_lora_weights is {quote(start)}, which changes the base itself as well; {MERGE}"
        )
    if named := next((field for field in REFUSED_FIELDS if config.get(field)), None):
        raise ConversionError(f"{path}: {named} is {quote(config[named])}, which cannot be carried over; {MERGE}")
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field, 8), int | float):
            raise ConversionError(f"{path}: {field} is {quote(config[field])}, expected a number")
    for field in ("alpha_pattern", "rank_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise ConversionError(
                f"{path}: {field} is {quote(config[field])}, expected an object of numbers by module"
            )


def _check_tensors(path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], sizes: Sizes) -> None:
    """Checks that every tensor is a LoRA's, of a module that this LLaMA has in this shape, or was trained whole."""
    shapes = {name: shape for name, shape, _, _ in llama_tensors(replace(sizes, lm_head=True))}
    ranks: dict[tuple[str, str], set[int]] = {}
    for name, tensor in tensors.items():
        match = LORA.fullmatch(name)
        if match is None:
            _check_whole(path, name, tensor, config, shapes)
            continue
        module = llama_name(match["module"])
        if (base := shapes.get(f"{module}.weight")) is None or len(base) != 2:
            raise ConversionError(
                f"{path}: tensor {quote(name)} belongs to {quote(module)}, which a LLaMA has not; give the adapter of "
                "the LLaMA that is converted"
            )
        part = match["part"]
        rows = base[0]
        if match["kind"] == "bias":
            _check_shape(path, name, tensor, (rows,))
        elif part == "lora_magnitude_vector":
            _check_shape(path, name, tensor, (base[1 if "embed_tokens" in module else 0],))
        else:
            # An embedding's matrices are stored the other way round: A is (r, V), B is (C, r).
            wide = base[1] if part in ("lora_A", "lora_embedding_B") else rows
            rank_first = part.endswith("A")
            rank = 0
            if tensor.dim() == 2:
                rank = tensor.shape[0] if rank_first else tensor.shape[1]
            _check_shape(path, name, tensor, (rank, wide) if rank_first else (wide, rank))
            ranks.setdefault((module, part[:-1]), set()).add(rank)
    for (module, _), rank_of_each in ranks.items():
        if len(rank_of_each) != 1:
            raise ConversionError(f"{path}: matrices of {module} have ranks {sorted(rank_of_each)}, expected one rank")
    if not tensors:
        raise ConversionError(f"{path}: holds no tensors; get the adapter again")
    for name in tensors:
        other = re.sub(r"\.(lora_(?:embedding_)?)([AB])\b", lambda found: f".{found[1]}{OTHER[found[2]]}", name)
        if not name.endswith(".bias") and other not in tensors:
            raise ConversionError(f"{path}: tensor {quote(other)} is missing next to {quote(name)}; get it again")


def _check_whole(
    path: Path, name: str, tensor: torch.Tensor, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks a tensor of a module that was trained whole (modules_to_save)."""
    if TASK_HEADS.fullmatch(name):
        return
    canonical = llama_name(name)
    module = canonical.rpartition(".")[0]
    saved = config.get("modules_to_save") or ()
    listed = any(module.endswith(entry) for entry in saved) or canonical in EMBEDDINGS  # as PEFT compares them
    if canonical not in shapes or not listed:
        raise ConversionError(
            f"{path}: tensor {quote(name)} is neither a LoRA's nor of a module of a LLaMA that modules_to_save lists; "
            f"{MERGE}"
        )
    _check_shape(path, name, tensor, shapes[canonical])


def _check_shape(path: Path, name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ConversionError(
            f"{path}: tensor {quote(name)} has shape {tuple(tensor.shape)}, and the LLaMA makes it {expected}; give "
            "the adapter of the LLaMA that is converted"
        )
