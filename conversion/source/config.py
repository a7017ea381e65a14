"""What a source's config.json must say, checked on the file's own text before transformers fills its gaps."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from conversion.checkpoint.json_files import read_json
from conversion.checkpoint.safetensors_format import TensorInfo
from conversion.errors import ConversionError, quote, typed
from conversion.mapping.heads import Sizes
from conversion.source.architectures import (
    ARCHITECTURES,
    Architecture,
    SourceKind,
    check_windows,
    unsupported,
)
from conversion.source.config_fields import check_neutral
from conversion.source.model import original_config
from conversion.source.rope import PRETRAINED, SPELLINGS, check_rotary, with_pretrained_length
from conversion.source.tensors import LAYER
from modeling_diff.diff_llama_fields import LLAMA_FIELDS, shared_fields


NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
WHOLE_NUMBERS = (*NEEDED, "num_key_value_heads", "head_dim", "max_position_embeddings", PRETRAINED)
# Far above any model's, so that no loop over layers and no table of tensors outgrows the machine.
MAX_LAYERS = 10_000
MAX_SIZE = 2**31 - 1
MAX_FIELDS = 10_000
DTYPES = ("float32", "bfloat16", "float16", "float64")
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
INTERRUPTED_UPDATE = ".update-code"  # what `update-code` leaves in a folder if it is killed while config.json is away
TASK_HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


@dataclass(frozen=True)
class SourceModel:
    """A source's config, checked: as it stands in the file, as transformers' model reads it, the sizes it means."""

    raw: Mapping[str, Any]
    config: PreTrainedConfig
    sizes: Sizes

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.config.model_type]

    @property
    def kind(self) -> SourceKind:
        return self.architecture.kind


def read_source_model(
    folder: Path, layout: Literal["auto", "unilm"] = "auto", backbone_only: bool = False
) -> SourceModel:
    """Reads and checks config.json of a source folder; no weights are read.

    `layout` "unilm" means the authors' tensor names and rotary order, described by a config.json of our own type.
    Raises ConversionError for everything that is not a model of `ARCHITECTURES` through and through.
    """
    raw = read_config(folder)
    architecture = _check_architecture(raw, layout)
    check_neutral(raw, architecture.own_fields)
    _check_fields(raw)
    if not backbone_only and any(head in str(raw.get("architectures")) for head in TASK_HEADS):
        raise ConversionError(
            f"config.json: architectures is {raw['architectures']}, a task head, expected a language model; "
            "convert the backbone alone with --backbone-only"
        )
    maps = _check_heads(raw, architecture)
    raw = with_pretrained_length(raw)
    check_rotary(raw, maps.map_dim)
    config: Any = original_config(raw)
    check_windows(config)
    if architecture.kind == "unilm" and (config.use_qk_norm or config.attention_out_bias != config.attention_bias):
        raise ConversionError(
            "config.json: use_qk_norm is true, or attention_out_bias is not attention_bias, which the authors' layout "
            "(unilm) has no tensors for; correct it"
        )
    sizes = Sizes.from_fields(
        shared_fields(config),
        num_heads=maps.num_heads,
        num_kv_heads=maps.num_kv_heads,
        map_dim=maps.map_dim,
        lm_head=not (config.tie_word_embeddings or backbone_only),
    )
    return SourceModel(raw, config, sizes)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns config.json of a model folder unchanged, never a default.

    Raises:
        ConversionError: It is missing, or not a JSON object.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ConversionError(f"{folder}: {found}, expected a checkpoint folder; check the path")
    path = folder / "config.json"
    if path.exists() and not path.is_file():
        raise ConversionError(f"{path}: not a regular file; put the file itself there")
    if not path.is_file():
        raise ConversionError(f"{path}: missing; {_without_config(folder)}")
    raw = read_json(path, nonfinite=True)
    if len(raw) > MAX_FIELDS:
        raise ConversionError(f"{path}: has {len(raw):,} fields, expected at most {MAX_FIELDS:,}; is this a model?")
    if not isinstance(raw.get("model_type"), str):
        raise ConversionError(f'{path}: model_type is {raw.get("model_type")!r}, expected "llama"; is this a model?')
    return raw


def _without_config(folder: Path) -> str:
    """Returns what a folder without config.json most likely is."""
    if (folder / INTERRUPTED_UPDATE).exists():
        return "an update of its code was interrupted, complete it (`diff-llama update-code FOLDER`)"
    if (folder / "adapter_config.json").exists():
        return "this is an adapter, so convert its base model, with this folder as --adapter"
    if any(folder.glob("*.gguf")):
        return "for a GGUF file, give the path of the file itself"
    if any(folder.glob("consolidated.*")) or (folder / "params.json").exists():
        return "this is Meta's own format, use the Hugging Face checkpoint of the same model"
    return "expected a folder written by save_pretrained"


def _check_architecture(raw: Mapping[str, Any], layout: Literal["auto", "unilm"]) -> Architecture:
    model_type = raw["model_type"]
    if raw.get("quantization_config") is not None:
        raise ConversionError(
            "config.json: quantization_config is set, and quantized weights cannot be rearranged; convert the original"
        )
    if layout == "unilm":
        if model_type != "diff_llama" or raw.get("variant") != "v1":
            raise ConversionError(
                f"config.json: model_type is {model_type!r}; the authors' layout (unilm) needs a config.json of type "
                '"diff_llama", variant "v1", that describes the model'
            )
    elif model_type == "diff_llama":
        raise ConversionError(
            "config.json: model_type is 'diff_llama', which is converted already; load it with from_pretrained, or "
            "use `export` for transformers' own diffllama"
        )
    if model_type not in ARCHITECTURES:
        raise unsupported(model_type)
    return ARCHITECTURES[model_type]


def check_sizes(raw: Mapping[str, Any]) -> None:
    """Raises ConversionError for a size that is no whole number above 0, or far above any model's."""
    for field in WHOLE_NUMBERS:
        value = raw.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConversionError(f"config.json: {field} is {quote(value)}, expected a whole number above 0")
        largest = MAX_LAYERS if field == "num_hidden_layers" else MAX_SIZE
        if value is not None and value > largest:
            raise ConversionError(f"config.json: {field} is {quote(value)}, expected at most {largest}; correct it")


def _check_fields(raw: Mapping[str, Any]) -> None:
    for field in NEEDED:
        if raw.get(field) is None:
            raise ConversionError(
                f"config.json: {field} is missing; a default would be a guess, write it into the file"
            )
    check_sizes(raw)
    for field in sorted(LLAMA_FIELDS.union(SPELLINGS) & raw.keys()):
        if not _is_finite(raw[field]):
            raise ConversionError(f"config.json: {field} is {quote(raw[field])}, expected finite numbers; correct it")
    activation = raw.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise ConversionError(f"config.json: hidden_act is {quote(activation)}, which transformers does not know")
    for field in ("dtype", "torch_dtype"):
        if raw.get(field) is not None and raw[field] not in DTYPES:
            raise ConversionError(
                f"config.json: {field} is {quote(raw[field])}, expected one of {', '.join(DTYPES)}; correct it"
            )
    for field in FLAGS:
        if not isinstance(raw.get(field, False), bool):
            raise ConversionError(f"config.json: {field} is {raw[field]!r}, expected true or false")


@dataclass(frozen=True)
class Maps:
    """Counts of maps, as in LLaMA's config, and their width."""

    num_heads: int
    num_kv_heads: int
    map_dim: int


def _check_heads(raw: Mapping[str, Any], architecture: Architecture) -> Maps:
    heads = raw["num_attention_heads"]
    kv_heads, head_dim = (
        raw.get(name, getattr(architecture.config_class, name, None)) for name in ("num_key_value_heads", "head_dim")
    )
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise ConversionError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim is None and raw["hidden_size"] % heads:
        raise ConversionError(
            f"config.json: hidden_size {raw['hidden_size']} is not a multiple of num_attention_heads {heads} and "
            "there is no head_dim; write head_dim into the file"
        )
    head_dim = head_dim or raw["hidden_size"] // heads
    maps = Maps(heads, kv_heads, head_dim)
    if architecture.kind == "unilm":
        maps = Maps(2 * heads, 2 * kv_heads, head_dim // 2)
    if maps.map_dim % 2:
        raise ConversionError(f"config.json: heads are {maps.map_dim} wide, expected an even width (rotary embedding)")
    return maps


def check_against_weights(sizes: Sizes, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises ConversionError for more layers or other heads, over which loops run, than the weights have."""
    found = max((int(match[1]) for name in tensors if (match := LAYER.search(name))), default=-1) + 1
    if 0 < found < sizes.num_layers:
        raise ConversionError(
            f"config.json: num_hidden_layers is {sizes.num_layers}, but the weights have {found} layers; correct the "
            "config or get the complete checkpoint"
        )
    rows = sizes.num_heads * sizes.map_dim
    for name, info in tensors.items():
        if name.endswith("self_attn.q_proj.weight") and info.shape[:1] != (rows,):
            raise ConversionError(
                f"tensor {name} has shape {info.shape}, but config.json makes its rows {rows}; one is wrong"
            )


def check_pairs(num_heads: int, num_kv_heads: int) -> None:
    """Checks that heads and KV heads come in pairs, as V1 needs.

    Raises:
        ConversionError: They do not; the message names the ways out.
    """
    for field, count in (("num_attention_heads", num_heads), ("num_key_value_heads", num_kv_heads)):
        if count % 2:
            raise ConversionError(
                f"config.json: {field} is {count}, and v1 needs pairs; add idle heads until they pair "
                f"({typed('pad_heads', True)}), or convert to v2, which is exact for any count (--variant v2)"
            )


def _is_finite(value: Any) -> bool:
    """Returns whether no number in it is NaN or Infinity, or would be as a float."""
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    if isinstance(value, int) and not isinstance(value, bool):
        return -(2**63) <= value < 2**63
    return not isinstance(value, float) or isfinite(value)
