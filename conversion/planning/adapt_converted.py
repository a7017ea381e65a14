"""An adapter of a LLaMA for a checkpoint that was converted from it before: `convert CONVERTED OUTPUT --adapter`."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.checkpoint.companions import read_object
from conversion.checkpoint.output_folder import check_target, locked, partial_folder, swap_in, sync_folder
from conversion.checkpoint.reader import CheckpointReader
from conversion.errors import ConversionError, file_errors
from conversion.mapping.heads import HeadPairing, Sizes
from conversion.mapping.rules import Rule, llama_v1_rules, llama_v2_rules
from conversion.options import ConversionConfig
from conversion.planning.adapter_output import AdapterOutput, adapter_files
from conversion.record import RECORD
from conversion.source.adapter import read_adapter
from conversion.source.config import read_config
from conversion.source.model import CONFIG_ERRORS
from modeling_diff import DiffLlamaConfig
from modeling_diff.diff_llama_fields import padded_counts


def is_converted(source: str | Path) -> bool:
    """Returns whether a source is a checkpoint of ours on this machine."""
    return read_object(Path(source) / "config.json").get("model_type") == DiffLlamaConfig.model_type


def check_nothing_else(source: str | Path, config: ConversionConfig) -> None:
    """Checks that only what an adapter takes is asked of a source that is converted already.

    Raises:
        ConversionError: An option that means something only where weights are written.
    """
    given = (config.variant, config.calibration, config.layers, config.heads, config.lambda_init, config.pairings)
    if config.uncalibrated or any(option is not None for option in (*given, config.dtype)):
        raise ConversionError(
            f"{source}: converted already, so only its adapter is written; leave out all options but --adapter, "
            "--allow-pickle, --allow-nonfinite, --overwrite and --dry-run"
        )


def adapt_converted(
    base: Path,
    output: Path,
    adapter: str | Path,
    *,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> tuple[dict[str, Any], list[str], int]:
    """Writes the adapter of a LLaMA for a checkpoint that was converted from it.

    Args:
        base: Folder of the converted checkpoint.
        output: Folder to create; the adapter is in it.
        adapter: Folder of the LLaMA's adapter.
        allow_pickle: Whether adapter_model.bin is read.
        allow_nonfinite: Whether NaN and infinite numbers are carried over.
        overwrite: Whether `output` may replace what is there.
        dry_run: Whether nothing is written.

    Returns:
        A record of what was done, notes for the user, and bytes.

    Raises:
        ConversionError: The adapter is not one of that LLaMA, or the checkpoint is no rearrangement of it.
        FilesError: The disk or the folder.
    """
    try:
        config = DiffLlamaConfig.from_dict(read_config(base))
    except CONFIG_ERRORS as error:
        raise ConversionError(f"{base / 'config.json'}: {' '.join(str(error).split())}") from error
    made: Mapping[str, Any] = read_object(base / RECORD)
    sizes = _llama_sizes(config, made.get("padding") or {})
    found = read_adapter(adapter, sizes, allow_pickle=allow_pickle, allow_nonfinite=allow_nonfinite)
    rules = _rules(base, config, sizes, made)
    real = check_target(output, source=base, overwrite=overwrite)
    files = adapter_files(found, rules, str(base))
    if not dry_run:
        write_adapter(files, real, overwrite)
    record = {
        "adapter": AdapterOutput(found, merged=False, base=str(base)).record,
        "promise": {"kind": "equal", "text": f"the same change of {base} as the adapter makes of its LLaMA"},
    }
    notes = [f"an adapter for {base}: PeftModel.from_pretrained(model, that folder)"]
    return record, notes, sum(map(len, files.values()))


def _llama_sizes(config: Any, padding: Mapping[str, int]) -> Sizes:
    """Returns the sizes of the LLaMA that a checkpoint was converted from, which had no idle heads."""
    maps = 2 if config.variant == "v1" else 1  # that a head of ours takes the place of
    return Sizes.from_fields(
        config.to_dict(),
        num_heads=maps * config.num_attention_heads - padding.get("heads", 0),
        num_kv_heads=maps * config.num_key_value_heads - padding.get("key_value_heads", 0),
        map_dim=config.map_dim,
    )


def _rules(base: Path, config: DiffLlamaConfig, sizes: Sizes, record: Mapping[str, Any]) -> list[Rule]:
    """Returns the rules by which the checkpoint was made."""
    if record.get("source", {}).get("kind") != "llama":
        raise ConversionError(
            f"{base / RECORD}: does not say that a LLaMA was converted, whose adapter could be carried over; convert "
            "the LLaMA itself with --adapter"
        )
    layers = [layer for layer in range(sizes.num_layers) if config.is_differential(layer)]
    if config.variant == "v2":
        return llama_v2_rules(sizes, layers, _lambda_bias(base, config, layers))
    if record.get("pairing") not in ("adjacent", "given"):
        raise ConversionError(
            f"{base}: its layers were calibrated, so no adapter of the LLaMA fits them; merge it first, by converting "
            "the LLaMA again with --calibration and --adapter"
        )
    default = HeadPairing.adjacent(*padded_counts(sizes.num_heads, sizes.num_kv_heads))
    given = {
        int(layer): HeadPairing(tuple(pair["query_heads"]), tuple(pair["kv_heads"]))
        for layer, pair in (record["options"].get("pairings") or {}).items()
    }
    pairings = [given.get(layer, default) for layer in range(sizes.num_layers)]
    return llama_v1_rules(sizes, pairings, layers, [1.0] * sizes.num_layers, lambda_std=0.0, seed=0)


def _lambda_bias(base: Path, config: DiffLlamaConfig, layers: list[int]) -> float | None:
    """Returns the bias that lambda started from, by which o_proj was scaled: as stored, for all heads and layers."""
    if not config.lambda_bias or not layers:
        return None
    reader = CheckpointReader(base)
    names = [name for name in reader.tensors if name.endswith("self_attn.lambda_proj.bias")]
    values = {value for name in names for value in reader.read(name).tolist()}
    if len(values) != 1:
        raise ConversionError(
            f"{base}: lambda_proj.bias was trained since the conversion, so the scale of o_proj is not known; convert "
            "the LLaMA again with --adapter"
        )
    return float(values.pop())


def write_adapter(files: Mapping[str, bytes], real: Path, overwrite: bool) -> None:
    """Writes an adapter as a folder of its own, which appears whole or not at all.

    Args:
        files: As from `adapter_files`.
        real: The folder, as from `check_target`.
        overwrite: Whether it may replace what is there.

    Raises:
        FilesError: The disk or the folder.
    """
    partial = partial_folder(real)
    tree = partial / "tree"
    with file_errors(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
    with locked(partial), file_errors(partial):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            tree.mkdir(parents=True)
            for name, data in files.items():
                with (tree / name).open("xb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
            sync_folder(tree)
            swap_in(tree, real, partial / "aside", overwrite)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
