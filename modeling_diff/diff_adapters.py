"""PEFT's adapters: the modules that they target, and a check that they belong to a model. PEFT is never imported."""

import json
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file


MODEL_TYPE = "diff_llama"
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Few and small: they are trained in full. A bare lambda vector could not be named here, as PEFT takes only modules.
NEW_MODULES = {"v1": ["diff_lambda", "sub_norm"], "v2": ["lambda_proj"]}
# Keywords that say where on the Hub a file is, and which one.
WHERE = ("token", "revision", "cache_dir", "local_files_only", "subfolder", "proxies")
MAX_HEADER_BYTES = 100_000_000  # as safetensors allows
ABSENT = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


def register_with_peft() -> None:
    """
    Registers default targets with every PEFT method, once PEFT is imported: LoRA's as above, the others' as for LLaMA.
    Norm tuning includes V1's norm over heads, and those of queries and keys.

    PEFT looks them up by model type right after it has read a config with `to_dict`, which calls this. So it works in
    any order of importing PEFT, this code and a checkpoint, and costs nothing without PEFT.
    """
    for name, targets in list(vars(sys.modules.get("peft.utils.constants", object)).items()):
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(targets, dict) and "llama" in targets:
            ours = targets["llama"]
            if name == "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING":
                ours = list(LORA_TARGETS)
            elif name == "TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING":
                ours = [*ours, "sub_norm", "q_norm", "k_norm"]
            targets.setdefault(MODEL_TYPE, ours)


def check_adapter_fits(
    model: Any, adapter: str, config: Mapping[str, Any], shapes: Mapping[str, Iterable[int]]
) -> None:
    """
    Refuses an adapter that was made for another model; warns of one whose model cannot be found out.

    A LLaMA and its V1 have tensors of equal shapes in another order, so that nothing else would tell.

    Args:
        model: The base model, with or without the adapter's layers.
        adapter: What the adapter is called in messages.
        config: `base_model_name_or_path` and `modules_to_save` of its adapter_config.json.
        shapes: Shape of each of its tensors, by name.

    Raises:
        ValueError: It was made for a model of another type or variant, or its tensors have other shapes.
    """
    variant = model.config.variant
    made_for = _variant_trained(config.get("modules_to_save"), shapes)
    if made_for not in (None, variant):
        raise ValueError(
            f"{adapter}: an adapter of variant {made_for!r}, and the model is {variant!r}; load it on the model that "
            "it was trained on."
        )
    base = str(config.get("base_model_name_or_path") or "")
    own = str(model.name_or_path or "")
    found = {} if made_for or base == own else _base_config(base)
    model_type = found.get("model_type")
    if model_type == MODEL_TYPE and found.get("variant") != variant:
        model_type = f"{MODEL_TYPE} {found.get('variant')}"
    if model_type not in (None, MODEL_TYPE):
        raise ValueError(
            f"{adapter}: made for {base} (model_type {model_type}), and this model is {MODEL_TYPE} {variant}, whose "
            f"heads are stored in another way; {_way_out(base, variant)}"
        )
    _check_shapes(model, adapter, base, shapes)
    if not made_for and base != own and model_type is None:
        warnings.warn(
            f"{adapter}: made for {base or 'a model that it does not name'}, which is not on this machine, and this "
            f"model is {own or 'not named'}. If that was the LLaMA that this {MODEL_TYPE} {variant} was converted "
            f"from, the outputs are wrong: {_way_out(base or 'LLAMA', variant)}",
            stacklevel=2,
        )


def check_adapter_to_load(
    model: Any,
    folder: str | None,
    peft_config: Any = None,
    adapter_state_dict: Mapping[str, Any] | None = None,
    adapter_kwargs: Mapping[str, Any] | None = None,
    load_config: Any = None,
    **options: Any,
) -> None:
    """Checks, by `check_adapter_fits`, what the keywords of transformers' `load_adapter` name."""
    folder = folder or getattr(load_config, "pretrained_model_name_or_path", None)
    shapes: Mapping[str, Iterable[int]] = {}
    if peft_config is None and folder is not None:
        given = {**(getattr(load_config, "download_kwargs", None) or {}), **options, **(adapter_kwargs or {})}
        peft_config, shapes = read_adapter(str(folder), **{name: given[name] for name in WHERE if name in given})
    elif hasattr(peft_config, "to_dict"):
        peft_config = peft_config.to_dict()
    if adapter_state_dict is not None:
        shapes = {name: tensor.shape for name, tensor in adapter_state_dict.items()}
    if peft_config:
        check_adapter_fits(model, str(folder or "adapter_state_dict"), peft_config, shapes)


def check_adapters_in_state(model: Any, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Checks, by `check_adapter_fits`, those adapters whose tensors a state dict brings to a model that PEFT holds."""
    for adapter, config in (vars(model).get("peft_config") or {}).items():
        shapes = {
            name.removeprefix(prefix).replace(f".{adapter}.", "."): tensor.shape
            for name, tensor in state_dict.items()
            if name.startswith(prefix) and f".{adapter}." in f"{name}."
        }
        if shapes:
            check_adapter_fits(model, f"adapter {adapter!r}", vars(config), shapes)


def read_adapter(folder: str, **options: Any) -> tuple[dict[str, Any], dict[str, Iterable[int]]]:
    """
    Reads the config of a saved adapter, from a folder or the Hub, and the shapes of its tensors if they are on disk.

    `options` are those of transformers' `cached_file`. Without a config, which whoever loads it will miss, both are
    empty.
    """
    path = cached_file(folder, "adapter_config.json", **options, **ABSENT)
    weights = cached_file(folder, "adapter_model.safetensors", **options | {"local_files_only": True}, **ABSENT)
    return _read_json(path), _shapes(weights) if weights else {}


def _variant_trained(modules_to_save: Iterable[str] | None, shapes: Iterable[str]) -> str | None:
    """Returns the variant whose own modules the adapter trained; None if none of them."""
    names = {part for name in [*(modules_to_save or ()), *shapes] for part in name.split(".")}
    return next((variant for variant, modules in NEW_MODULES.items() if names & set(modules)), None)


def _base_config(base: str) -> dict[str, Any]:
    """Reads config.json of a model on this machine, from a folder or the Hub's cache; empty if it is not there."""
    if not base:
        return {}
    if Path(base).is_dir():
        return _read_json(Path(base) / "config.json")
    try:
        return _read_json(cached_file(base, "config.json", local_files_only=True, **ABSENT))
    except OSError:  # no possible name of a repository, such as the path of a folder that is gone
        return {}


def _read_json(path: str | Path | None) -> dict[str, Any]:
    if path is None or not Path(path).is_file():
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:  # whoever loads the file will say so
        return {}
    return found if isinstance(found, dict) else {}


def _shapes(weights: str) -> dict[str, Iterable[int]]:
    """Reads the shapes of tensors from the header of a safetensors file."""
    with open(weights, "rb") as stream:
        length = min(int.from_bytes(stream.read(8), "little"), MAX_HEADER_BYTES)
        try:
            header = json.loads(stream.read(length))
        except ValueError:  # whoever loads the file will say so
            return {}
    return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}


def _check_shapes(model: Any, adapter: str, base: str, shapes: Mapping[str, Iterable[int]]) -> None:
    """Raises `ValueError` if LoRA's second matrix has another number of rows than its projection."""
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        path, found, _ = name.removeprefix("base_model.model.").partition(".lora_B.")
        rows = next(iter(shape), None)
        expected = getattr(modules.get(path), "out_features", None)
        if found and expected is not None and rows != expected:
            variant = model.config.variant
            raise ValueError(
                f"{adapter}: {path} has {rows} rows in it, and {expected} in this {MODEL_TYPE} {variant}: it was made "
                f"for another model ({base or 'not named'}); if that was the LLaMA that this one was converted from, "
                f"{_way_out(base or 'LLAMA', variant)}"
            )


def _way_out(base: str, variant: str) -> str:
    return f"carry it over with `diff-llama convert {base} OUTPUT --variant {variant} --adapter ADAPTER`."
