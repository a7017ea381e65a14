"""What becomes of a LLaMA's adapter: carried over to the converted checkpoint, or merged before the conversion."""

import json
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from safetensors.torch import save

from conversion.checkpoint.reader import CheckpointReader
from conversion.errors import ConversionError, quote
from conversion.mapping.layout import Keep, Scale, TakeBlocks
from conversion.mapping.rules import Rule
from conversion.mapping.stream import Plan
from conversion.source.adapter import CONFIG, LORA, MERGE, PREFIX, WEIGHTS, Adapter, llama_name
from modeling_diff.diff_adapters import NEW_MODULES


FOLDER = "adapter"  # of an output, in which its adapter is


@dataclass(frozen=True)
class AdapterOutput:
    """A LLaMA's adapter in a conversion: `merged` into the weights, or carried over for the checkpoint `base`."""

    adapter: Adapter
    merged: bool
    base: str

    @property
    def record(self) -> dict[str, Any]:
        """What conversion.json says of it."""
        name = self.adapter.folder.resolve().name
        return {"name": name, "merged": self.merged, "sha256": dict(self.adapter.sha256)}

    @property
    def note(self) -> str:
        """What the user is told of it."""
        if self.merged:
            return "the adapter was merged into the LLaMA first, as calibrated layers are no rearrangement of its own"
        return f"the adapter was carried over to {self.base}/{FOLDER}: PeftModel.from_pretrained(model, that folder)"

    def place(self, plan: Plan) -> Plan:
        """Returns the same plan with the adapter in it."""
        if self.merged:
            return replace(plan, reader=merge_adapter(plan.reader, self.adapter))
        files = adapter_files(self.adapter, plan.rules, self.base)
        return replace(plan, blobs={f"{FOLDER}/{name}": data for name, data in files.items()})


def adapter_files(adapter: Adapter, rules: Sequence[Rule], base: str) -> dict[str, bytes]:
    """Returns the files of the adapter for the checkpoint that `rules` make of its LLaMA.

    W becomes T(W), so W + s B A becomes T(W) + s T(B) A where T moves, repeats or scales rows, and T(W) + s B T(A)
    where it moves columns. DoRA's magnitudes are of rows, and go with them.

    Args:
        adapter: Of the source.
        rules: What becomes of the source's tensors.
        base: Name of the converted checkpoint, for `base_model_name_or_path`.
    """
    transforms = {rule.target: rule.build for rule in rules if rule.sources}
    tensors = {}
    for name, tensor in adapter.tensors.items():
        match = LORA.fullmatch(name)
        weight = f"{llama_name(match['module'])}.weight" if match else llama_name(name)
        carried = _carried(transforms.get(weight, Keep()), tensor, match)
        tensors[PREFIX + name] = carried.to(tensor.dtype).contiguous().clone()
    config = json.dumps(_carried_config(adapter, base), indent=2, sort_keys=True) + "\n"
    return {CONFIG: config.encode(), WEIGHTS: save(tensors, metadata={"format": "pt"})}


def _carried(transform: Any, tensor: torch.Tensor, match: re.Match[str] | None) -> torch.Tensor:
    """Returns an adapter's tensor transformed as its module's weight is; without a match it is a whole weight."""
    assert isinstance(transform, Keep | Scale | TakeBlocks)  # what the rules of a LLaMA are made of
    of_columns = isinstance(transform, TakeBlocks) and transform.axis == 1
    if match is None or of_columns == (match["part"] == "lora_A"):
        # A scale undoes what was done to the inputs, and a bias is added after it.
        is_kept = match is not None and match["kind"] == "bias" and isinstance(transform, Scale)
        return tensor if is_kept else transform(tensor)
    return tensor


def _carried_config(adapter: Adapter, base: str) -> dict[str, Any]:
    """Returns adapter_config.json for another base: it may not name LLaMA, or match a module that LLaMA has not."""
    changes: dict[str, Any] = {
        "base_model_name_or_path": base,
        "revision": None,
        "auto_mapping": None,  # names LLaMA's class
        "task_type": adapter.config.get("task_type") or "CAUSAL_LM",
        "fan_in_fan_out": False,  # which PEFT ignores for these layers
        "init_lora_weights": True,  # the numbers are in the file
        "inference_mode": True,
    }
    if isinstance(adapter.config.get("target_modules"), str):  # an expression that could match lambda_proj
        modules = {match["module"] for name in adapter.tensors if (match := LORA.fullmatch(name))}
        changes |= {"target_modules": sorted(modules), "layers_to_transform": None, "layers_pattern": None}
    saved = adapter.config.get("modules_to_save") or ()
    if any(module.endswith(entry) for module in chain(*NEW_MODULES.values()) for entry in saved):
        whole = {llama_name(name).rpartition(".")[0] for name in adapter.tensors if not LORA.fullmatch(name)}
        changes["modules_to_save"] = sorted(whole)
    return {**adapter.config, **changes}


def merge_adapter(reader: CheckpointReader, adapter: Adapter) -> CheckpointReader:
    """Returns a reader of the same checkpoint with the adapter merged into it, as by PEFT's merge_and_unload.

    Args:
        reader: Tensors by LLaMA's own names.
        adapter: Of this checkpoint.

    Raises:
        ConversionError: The adapter has a tensor for which the checkpoint has no place.
    """
    merged = copy(reader)
    merged.__class__ = _MergedReader
    assert isinstance(merged, _MergedReader)
    merged.adapter = adapter
    merged.parts = {}
    for name, tensor in adapter.tensors.items():
        match = LORA.fullmatch(name)
        if match is None:
            target = llama_name(name)
        else:
            target = f"{llama_name(match['module'])}.{'bias' if match['kind'] == 'bias' else 'weight'}"
        if target not in reader.tensors or (match and match["kind"] == "bias"):
            raise ConversionError(
                f"{adapter.folder}: tensor {quote(name)} has no place in the weights of the source; {MERGE}"
            )
        merged.parts.setdefault(target, {})[match["part"] if match else "whole"] = tensor
    return merged


class _MergedReader(CheckpointReader):
    """A reader that adds to each weight what an adapter adds; computed in float32 or wider."""

    adapter: Adapter
    parts: dict[str, dict[str, torch.Tensor]]

    def content(self) -> dict[str, str]:
        return super().content() | {f"{FOLDER}/{name}": digest for name, digest in self.adapter.sha256.items()}

    def read(self, name: str) -> torch.Tensor:
        weight = super().read(name)
        if (parts := self.parts.get(name)) is None:
            return weight
        if (whole := parts.get("whole")) is not None:
            return whole.to(weight.dtype)
        wide = torch.promote_types(weight.dtype, torch.float32)
        is_embedding = "lora_embedding_A" in parts
        first, second = (parts[f"lora_embedding_{x}" if is_embedding else f"lora_{x}"].to(wide) for x in "AB")
        delta = second @ first
        delta = (delta.T if is_embedding else delta) * self.adapter.scaling(name.removesuffix(".weight"), len(first))
        merged = weight.to(wide) + delta
        if (magnitude := parts.get("lora_magnitude_vector")) is not None:
            rows = 0 if is_embedding else 1  # the axis that a row of the projection runs along
            merged = merged * (magnitude.to(wide) / torch.linalg.norm(merged, dim=rows)).unsqueeze(rows)
        return merged.to(weight.dtype)
