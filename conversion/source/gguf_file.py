"""
A GGUF file as a source: unpacked into an ordinary checkpoint, one tensor in memory at a time.

Its numbers are what the output computes: a 4-bit file gives the 4-bit model, in float32.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from conversion.checkpoint.file_identity import file_sha256
from conversion.errors import ConversionError, FilesError, file_errors, quote
from conversion.mapping.layout import Keep, interleaved_layout, llama_tensors
from conversion.source.architectures import ARCHITECTURES, unsupported
from conversion.source.config import read_source_model
from conversion.source.model import BUILD_ERRORS, one_line


SUFFIX = ".gguf"
# Architectures of GGUF that are sources, by their names there, and those that are called otherwise here.
SUPPORTED = ("llama", "qwen2", "qwen3")
OTHER_NAMES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text", "llama4": "llama4_text"}
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
WIDTHS = ("rope.dimension_count", "attention.value_length")  # which have to be heads'
# field: what of it changes nothing; None for whatever it says
HARMLESS: Mapping[str, Any] = {
    "vocab_size": None,
    "tensor_data_layout": None,
    **dict.fromkeys(WIDTHS),
    "rope.scaling.type": "none",
    "rope.scaling.finetuned": None,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
}
ROPE_FACTORS = "rope_freqs.weight"
# What of Llama 3.1 to 3.3 the factors do not say.
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# What a broken file makes the package raise, which trusts every number in it.
READ_ERRORS = (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError, MemoryError, OSError)


@dataclass(frozen=True)
class UnpackedFile:
    """Where a GGUF file was unpacked, as long as this lives, and what it was."""

    path: Path
    folder: TemporaryDirectory
    record: Mapping[str, Any]
    notes: tuple[str, ...]


def unpack_gguf(path: Path, config_only: bool = False) -> UnpackedFile:
    """Writes what a GGUF file says as config.json, safetensors files and a tokenizer in a temporary folder.

    Args:
        path: The file.
        config_only: Write config.json alone.

    Raises:
        ConversionError: A file that is broken, of another architecture, or says what config.json cannot say.
        FilesError: No room for the weights in float32.
    """
    reader = _open(path)
    values = {name: _value(path, field) for name, field in reader.fields.items()}
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    raw = _config(path, values, shapes, reader)
    folder = TemporaryDirectory(prefix="gguf-")
    unpacked = Path(folder.name)
    (unpacked / "config.json").write_text(json.dumps(raw))
    bits = 8 * sum(int(tensor.n_bytes) for tensor in reader.tensors) / sum(map(_count, shapes.values()))
    kinds = Counter({tensor.tensor_type.name: 0 for tensor in reader.tensors})
    for tensor in reader.tensors:
        kinds[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = kinds.most_common(1)[0][0]
    record = {"file": path.name, "type": kind, "bits_per_weight": round(bits, 2)}
    notes = [f"{path.name}: {kind}, {bits:.1f} bits per weight; what these numbers compute is converted, in float32"]
    if not config_only:
        record["sha256"] = file_sha256(path)
        _write_tensors(path, reader, unpacked, shapes, raw)
        notes += _write_tokenizer(path, unpacked, values)
    return UnpackedFile(path, folder, record, tuple(notes))


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConversionError(f"{path}: reading it needs the package gguf: pip install gguf") from error
    try:
        reader = GGUFReader(path)
    except READ_ERRORS as error:
        raise ConversionError(f"{path}: no sound GGUF file ({one_line(error)}); download it again") from error
    if not reader.tensors:
        raise ConversionError(f"{path}: holds no tensors; give the model's own file")
    return reader


def _value(path: Path, field: Any) -> Any:
    try:
        return field.contents()
    except READ_ERRORS as error:
        raise ConversionError(
            f"{path}: {quote(field.name)} cannot be read ({one_line(error)}); download it again"
        ) from error


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _config(
    path: Path, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], reader: Any
) -> dict[str, Any]:
    """Returns config.json of the model; ConversionError for a field that it could not say."""
    name = values.get("general.architecture")
    if name not in SUPPORTED:
        raise unsupported(OTHER_NAMES.get(str(name), str(name)), f"{path}: general.architecture")
    if values.get("split.count", 1) > 1:
        raise ConversionError(f"{path}: one of {values['split.count']} parts; merge them first (llama-gguf-split)")
    architecture = ARCHITECTURES[name]
    raw: dict[str, Any] = {"model_type": name, "architectures": [architecture.model_class.__name__]}
    own = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
    for key, value in own.items():
        if key in FIELDS:
            raw[FIELDS[key]] = value
        elif key not in HARMLESS or HARMLESS[key] not in (None, value):
            raise ConversionError(
                f"{path}: {name}.{quote(key)[1:-1]} is {quote(value)}, which changes what the model computes and "
                "is not known here; convert the original Hugging Face checkpoint"
            )
    head_dim = raw.get("head_dim") or raw.get("hidden_size", 0) // max(1, raw.get("num_attention_heads") or 1)
    for key in WIDTHS:
        if own.get(key, head_dim) != head_dim:
            raise ConversionError(
                f"{path}: {name}.{key} is {quote(own[key])}, and heads are {head_dim} wide; there is no conversion "
                "for such a model"
            )
    raw |= {ours: values.get(f"tokenizer.ggml.{theirs}") for theirs, ours in TOKENS.items()}
    if "token_embd.weight" not in shapes:
        raise ConversionError(f"{path}: tensor token_embd.weight is missing; give the model's own file")
    raw |= {
        "head_dim": head_dim,
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "dtype": "float32",
    }
    return raw | _rotary(path, raw, reader)


def _rotary(path: Path, raw: Mapping[str, Any], reader: Any) -> dict[str, Any]:
    """Returns the rotary settings of Llama 3.1 and later, which a file has as the resulting factors."""
    tensor = next((tensor for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
    if tensor is None:
        return {}
    factors = _dequantized(path, tensor).double()
    if (factors == 1).all():
        return {}
    theta = raw.get("rope_theta", 10000.0)
    settings = LLAMA3 | {"rope_theta": theta, "factor": round(float(factors.max()), 4)}
    config: Any = LlamaConfig(
        hidden_size=raw["head_dim"], num_attention_heads=1, head_dim=raw["head_dim"], rope_parameters=dict(settings)
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** (-torch.arange(0, raw["head_dim"], 2, dtype=torch.float64) / raw["head_dim"])
    if factors.shape != plain.shape or not torch.allclose(plain / factors, scaled.double(), rtol=1e-4, atol=0):
        raise ConversionError(
            f"{path}: {ROPE_FACTORS} scales the rotary embedding in a way that is not that of Llama 3.1; convert the "
            "original Hugging Face checkpoint"
        )
    return {"rope_parameters": settings}


def _write_tensors(
    path: Path, reader: Any, folder: Path, shapes: Mapping[str, tuple[int, ...]], raw: Mapping[str, Any]
) -> None:
    """Writes one safetensors file per layer, and one for each other tensor, under LLaMA's names."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    sizes = read_source_model(folder).sizes
    needed = 4 * sum(map(_count, shapes.values()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FilesError(
            f"{folder.parent}: {needed / 1e9:.3f} GB are needed to unpack {path.name}, {free / 1e9:.3f} GB are free; "
            "free space there, or set TMPDIR to a folder on another disk"
        )
    names = get_tensor_name_map(MODEL_ARCH[str(raw["model_type"]).upper()], sizes.num_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors if tensor.name != ROPE_FACTORS}
    # llama.cpp rotates neighboring components of LLaMA's heads, and the halves of Qwen's.
    rotated = (
        interleaved_layout(sizes.num_heads, sizes.num_kv_heads, sizes.map_dim) if raw["model_type"] == "llama" else {}
    )
    files: dict[str, dict[str, torch.Tensor]] = {}
    index: dict[str, str] = {}

    def write(file: str) -> None:
        with file_errors(folder / file):
            save_file(files.pop(file), folder / file, metadata={"format": "pt"})

    for name, shape, role, layer in llama_tensors(sizes):
        tensor = stored.pop(names.get_name(name, try_suffixes=(".weight", ".bias")), None)
        if tensor is None:
            continue  # whether it may be missing is judged where every source is
        if shapes[tensor.name] != shape:
            raise ConversionError(
                f"{path}: tensor {tensor.name} has shape {shapes[tensor.name]}, and its fields make it {shape}; one "
                "is wrong"
            )
        file = f"model-{name}.safetensors" if layer is None else f"model-layer-{layer:05}.safetensors"
        for finished in [other for other in files if other != file]:
            write(finished)
        files.setdefault(file, {})[name] = rotated.get(role, Keep())(_dequantized(path, tensor)).contiguous()
        index[name] = file
    for file in list(files):
        write(file)
    if stored:
        raise ConversionError(
            f"{path}: tensor {quote(min(stored))} is unknown ({len(stored)} in all), so this is another model than "
            f"general.architecture says; convert the original Hugging Face checkpoint"
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _dequantized(path: Path, tensor: Any) -> torch.Tensor:
    from gguf.quants import dequantize

    try:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
    except (*READ_ERRORS, NotImplementedError) as error:
        raise ConversionError(
            f"{path}: tensor {quote(tensor.name)} of type {tensor.tensor_type.name} cannot be read ({one_line(error)})"
            "; convert the original Hugging Face checkpoint"
        ) from error


def _write_tokenizer(path: Path, folder: Path, values: Mapping[str, Any]) -> Iterator[str]:
    """Writes the tokenizer, if there is one; yields notes."""
    if "tokenizer.ggml.tokens" not in values:
        return
    try:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    except (*BUILD_ERRORS, OSError, NotImplementedError) as error:
        yield f"{path.name}: its tokenizer cannot be read ({one_line(error)}); copy that of the original next to it"
