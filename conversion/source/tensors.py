"""The tensors of a source under LLaMA's own names: what transformers' LLaMA loads is taken, all else named."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from conversion.checkpoint import CheckpointReader, TensorInfo
from conversion.errors import ConversionError, quote
from conversion.mapping.rules import Rule


BACKBONE = "model."
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
LAYER = re.compile(r"\blayers\.(\d{1,9})\.")
# What transformers drops from a checkpoint of LLaMA, with or without a warning, and what it is.
LEFT_OUT = (
    (
        re.compile(r"(.*\.)?(rotary_emb\.\w+|rope\.freqs|freqs_(cis|cos|sin)|(cos|sin)_cached)"),
        "rotary tables, which follow from config.json",
    ),
    (
        re.compile(r"(.*\.)?(causal_mask|attention_mask|masked_bias|self_attn\.(bias|mask)|position_ids)"),
        "masks and positions, which every call makes itself",
    ),
    (re.compile(r"(.*\.)?_extra_state"), "state of a training library"),
    (re.compile(r"(pretrained_model\.)?v(alue)?_head\..+"), "a value head, which no logit depends on"),
)
TASK_HEADS = re.compile(r"(lm_head|score|qa_outputs|classifier)\.(weight|bias)")
# What other programs put around LLaMA's names, and how to take it off. transformers finds no tensor under such names.
SAVED_INSIDE = "was saved with the model inside a wrapper; save the inner model"
WRAPPERS = {
    "_orig_mod": f"torch.compile: it {SAVED_INSIDE} (model._orig_mod.save_pretrained)",
    "module": f"DistributedDataParallel or DeepSpeed: it {SAVED_INSIDE} (model.module.save_pretrained)",
    "_fsdp_wrapped_module": f"FSDP: it {SAVED_INSIDE}'s full state dict",
    "_checkpoint_wrapped_module": f"activation checkpointing: it {SAVED_INSIDE}",
    "base_model.model": "PEFT: save the model that merge_and_unload() returns",
    "pretrained_model": f"TRL's models with a value head: it {SAVED_INSIDE} (model.pretrained_model.save_pretrained)",
    "language_model": "models for several kinds of input: save the language model alone",
    "transformer": "models for question answering: convert the backbone alone with --backbone-only",
}
WRAPPER = re.compile(rf"(?:^|(?<=\.))({'|'.join(map(re.escape, WRAPPERS))})\.")
BIAS_FIELDS = (
    (re.compile(r".*self_attn\.[qkvo]_proj\.bias"), "attention_bias"),
    (re.compile(r".*mlp\.(gate|up|down)_proj\.bias"), "mlp_bias"),
)
BiasFields = Sequence[tuple[re.Pattern[str], str]]


@dataclass(frozen=True)
class SourceTensors:
    """The tensors that rules read, by the names in the rules; `left_out` are names in the files."""

    reader: CheckpointReader
    left_out: Sequence[str]
    notes: Sequence[str]


def match_tensors(
    rules: Sequence[Rule],
    reader: CheckpointReader,
    num_layers: int,
    *,
    tied: bool = False,
    backbone_only: bool = False,
    fixed_fields: Collection[str] = (),
) -> SourceTensors:
    """Finds what the rules read as transformers' LLaMA would: with or without `model.`, a tied head by either name.

    A bias that no layer has, while other biases that config.json speaks of are there, is zeros, as in transformers.

    Args:
        rules: What becomes of the source's tensors.
        reader: The checkpoint as it is stored.
        num_layers: Layers that config.json speaks of.
        tied: Whether the head is the embedding (tie_word_embeddings).
        backbone_only: Whether heads are left out.
        fixed_fields: Fields of config.json that the architecture does not read: no advice names them.

    Returns:
        A reader of exactly the tensors that the rules read, and what was left out.

    Raises:
        ConversionError: For a tensor that is missing, unknown, there twice, or of another shape than config.json says.
    """
    wanted = {name: shape for rule in rules for name, shape in rule.sources}
    names = _stored_names(reader, {*wanted, HEAD}, backbone_only)
    left_out: dict[str, str] = {}
    if HEAD in names and HEAD not in wanted:
        if tied and EMBEDDING not in names:  # the one tensor under its other name
            names[EMBEDDING] = names.pop(HEAD)
        else:
            if tied and not backbone_only:
                _check_tied(reader, names)
            left_out[names.pop(HEAD)] = "a copy of the embedding" if tied else "a head"
    rest = sorted(reader.tensors.keys() - set(names.values()) - left_out.keys())
    left_out |= _left_out(rest, reader, wanted, backbone_only)
    unknown = [name for name in rest if name not in left_out]
    missing = sorted(wanted.keys() - names.keys())
    zeros = _absent_biases(missing, wanted, names, reader)
    bias_fields = [(pattern, field) for pattern, field in BIAS_FIELDS if field not in fixed_fields]
    _refuse(unknown, [name for name in missing if name not in zeros], reader, wanted, num_layers, bias_fields)
    for name, stored in names.items():
        if (shape := reader.tensors[stored].shape) != wanted[name]:
            raise ConversionError(
                f"tensor {name} has shape {shape}, but config.json makes it {wanted[name]}; one is wrong"
            )
    notes = [*_grouped(left_out), *_zero_notes(zeros)]
    return SourceTensors(reader.selected(names, zeros.values()), sorted(left_out), notes)


def _stored_names(reader: CheckpointReader, known: Collection[str], backbone_only: bool) -> dict[str, str]:
    """Maps known names to the names in the files. transformers adds and removes `model.` name by name."""
    names: dict[str, str] = {}
    for stored in reader.tensors:
        bare = stored.removeprefix(BACKBONE)
        if backbone_only:  # transformers' model for questions has another prefix
            bare = bare.removeprefix("transformer.")
        candidates = (bare if bare != stored else "", f"{BACKBONE}{bare}", stored)
        own = next((name for name in candidates if name in known), None)
        if own is None:
            continue
        if own in names:
            raise ConversionError(
                f"tensors {quote(names[own])} and {quote(stored)} are both {own}; remove the outdated one"
            )
        names[own] = stored
    return names


def _check_tied(reader: CheckpointReader, names: Mapping[str, str]) -> None:
    tied = [reader.read(names[name]) for name in (HEAD, EMBEDDING)]
    # Their bytes as well: two NaN are not equal, and yet a copy.
    if not torch.equal(*tied) and not torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in tied)):
        raise ConversionError(
            "config.json: tie_word_embeddings is true, but lm_head.weight is not the embedding; set it to false to "
            "keep the head, or remove the head from the weights"
        )


def _left_out(
    rest: Sequence[str], reader: CheckpointReader, wanted: Mapping[str, tuple[int, ...]], backbone_only: bool
) -> dict[str, str]:
    """Returns names that may be dropped without a change of what transformers' LLaMA computes, with what they are."""
    left_out = {}
    for name in rest:
        reason = next((reason for pattern, reason in LEFT_OUT if pattern.fullmatch(name)), None)
        if reason is None and backbone_only and TASK_HEADS.fullmatch(name):
            reason = "a head"
        if reason is None and _is_zero_bias(name, reader, wanted):
            reason = "a bias of zeros"
        if reason:
            left_out[name] = reason
    return left_out


def _is_zero_bias(name: str, reader: CheckpointReader, wanted: Mapping[str, tuple[int, ...]]) -> bool:
    """Returns whether it is the bias of one of the model's modules and adds nothing."""
    if not name.endswith(".bias"):
        return False
    weight = name.removesuffix("bias") + "weight"
    rows = next((wanted[known][:1] for known in (weight, BACKBONE + weight) if known in wanted), None)
    return reader.tensors[name].shape == rows and not reader.read(name).any()


def _absent_biases(
    missing: Sequence[str],
    wanted: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    reader: CheckpointReader,
) -> dict[str, TensorInfo]:
    """Biases that no layer has while other biases are there: transformers makes them zeros (Qwen saved as LLaMA)."""
    roles = {LAYER.sub("layers.", name) for name in names}
    zeros = {}
    for name in missing:
        weight = name.removesuffix("bias") + "weight"
        block = LAYER.sub("layers.", name).rsplit(".", 2)[0]  # ...self_attn or ...mlp
        siblings = any(role.startswith(f"{block}.") and role.endswith(".bias") for role in roles)
        if name.endswith("_proj.bias") and LAYER.sub("layers.", name) not in roles and siblings and weight in names:
            dtype = reader.tensors[names[weight]].dtype
            num_bytes = torch.Size(wanted[name]).numel() * dtype.itemsize
            zeros[name] = TensorInfo(name, wanted[name], dtype, num_bytes, file="")
    return zeros


def _refuse(
    unknown: Sequence[str],
    missing: Sequence[str],
    reader: CheckpointReader,
    wanted: Mapping[str, tuple[int, ...]],
    num_layers: int,
    bias_fields: BiasFields,
) -> None:
    """Refuses what does not fit, the cause before its consequences (ConversionError)."""
    for name in unknown:
        if wrapper := WRAPPER.search(name):
            bare = WRAPPER.sub("", name)
            if bare in wanted or BACKBONE + bare in wanted:
                raise ConversionError(
                    f"tensor {quote(name)}{_others(unknown)}: `{wrapper[1]}.` is a prefix of {WRAPPERS[wrapper[1]]}; "
                    "under these names transformers loads no weights at all"
                )
    for name in unknown:
        if reason := _another_kind(name):
            raise ConversionError(f"tensor {quote(name)} is unknown{_others(unknown)}: {reason}")
    layers = max((int(match[1]) for name in reader.tensors if (match := LAYER.search(name))), default=-1) + 1
    if layers != num_layers and (layers or not unknown):
        raise ConversionError(
            f"config.json: num_hidden_layers is {num_layers}, but the weights have {layers} layers; correct the "
            "config or get the complete checkpoint"
        )
    if unknown:
        raise ConversionError(
            f"tensor {quote(unknown[0])} is unknown{_others(unknown)}: {_why_unknown(unknown, missing, bias_fields)}"
        )
    if missing:
        why = _why_missing(missing, wanted, bias_fields)
        raise ConversionError(f"tensor {missing[0]} is missing{_others(missing)}: {why}")


def _others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _why_missing(missing: Sequence[str], wanted: Mapping[str, tuple[int, ...]], bias_fields: BiasFields) -> str:
    name = missing[0]
    if name == HEAD:
        return (
            "set tie_word_embeddings to true in config.json if it is shared; otherwise get the complete checkpoint, "
            "or leave out the head (convert --backbone-only)"
        )
    for pattern, field in bias_fields:
        biases = {bias for bias in wanted if pattern.fullmatch(bias)}
        if name in biases and biases <= set(missing):
            return f"config.json says {field}, and no layer has one; set {field} to false there"
    return "config.json calls for it; get the complete checkpoint"


def _another_kind(name: str) -> str | None:
    """Returns the kind of checkpoint that has such a tensor, if known: all else about it is then a consequence."""
    if re.search(r"lora_|\.base_layer\.|adapter", name):
        return "this is an adapter that was not merged; save the model that PEFT's merge_and_unload() returns"
    if re.search(r"qweight|scales|qzeros|absmax|quant|weight_scale", name):
        return "quantized weights cannot be rearranged; convert the original checkpoint"
    if re.search(r"[qk]_norm", name):
        return "only qwen3 has norms on queries and keys, so this is another model; check model_type in config.json"
    if re.search(r"experts\.|block_sparse_moe", name):
        return "LLaMA has no experts, so this is another model; convert a LLaMA"
    return None


def _why_unknown(unknown: Sequence[str], missing: Sequence[str], bias_fields: BiasFields) -> str:
    name = unknown[0]
    if TASK_HEADS.fullmatch(name) and name != "lm_head.bias":
        return "a task head has no place in a language model; convert the backbone alone with --backbone-only"
    for pattern, field in bias_fields:
        if pattern.fullmatch(name):
            return (
                f"config.json denies it, so transformers leaves it out; set {field} to true there if the bias is "
                "real (biases that no layer has are zeros)"
            )
    if name.endswith(".bias"):
        return (
            "the model has no bias there, and transformers drops it, which changes what the model computes; remove it "
            "from the weights if that is meant, or convert a LLaMA"
        )
    if missing:
        return f"LLaMA has no such tensor, and {missing[0]} is missing, so this is another model; convert a LLaMA"
    return (
        "it is no tensor of this model, and transformers drops it, which could change what the model computes; remove "
        "it from the weights if that is meant"
    )


def _grouped(left_out: Mapping[str, str]) -> Iterator[str]:
    """Returns one note per reason."""
    for reason in dict.fromkeys(left_out.values()):
        names = sorted(name for name, why in left_out.items() if why == reason)
        yield f"left out: {quote(names[0])}{_others(names)}: {reason}"


def _zero_notes(zeros: Collection[str]) -> Iterator[str]:
    for role in sorted({LAYER.sub("layers.*.", name) for name in zeros}):
        yield f"{role} is in no layer and becomes zeros, which is what transformers makes of it"
