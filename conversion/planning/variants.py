"""What a source becomes: the rules of its tensors, the config fields that LLaMA does not have, what is promised."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

import torch

from conversion.checkpoint import CheckpointReader
from conversion.errors import ConversionError, typed
from conversion.mapping.heads import Sizes
from conversion.mapping.rules import Rule, diffllama_rules, llama_v1_rules, llama_v2_rules, unilm_rules
from conversion.options import ConversionConfig, ConversionOptions
from conversion.record import PROMISES
from conversion.source.config import SourceKind, SourceModel
from modeling_diff.diff_llama_fields import padded_counts


LAMBDA_STD = 0.1  # the paper's
# Measured by examples/scripts/quickstart.py on examples/assets/tiny-llama.
UNCALIBRATED = (
    "the plain copy subtracts attention maps that were trained to be added, and loses most of the function (held-out "
    "loss of examples/assets/tiny-llama: 5.06 nats after 3.18, and no recall of the context); heal it before use"
)


def check_uncalibrated(config: ConversionConfig) -> None:
    """Checks that `uncalibrated` is said of nothing that is calibrated, nor of V2.

    Raises:
        ConversionError: It is.
    """
    if config.uncalibrated and config.calibration is not None:
        raise ConversionError("--uncalibrated and --calibration exclude each other; leave one of them out")
    if config.uncalibrated and config.variant == "v2":
        raise ConversionError("--uncalibrated belongs to variant v1; v2 is exact without calibration, leave it out")


def variant_of_import(kind: SourceKind, variant: Literal["v1"] | None) -> Literal["v1"]:
    """Returns "v1", which every source is that is differential already.

    Raises:
        ConversionError: A LLaMA, of which both variants can be made, for V1 with calibration or without.
    """
    if kind != "llama":
        return "v1"
    if variant is None:
        raise ConversionError(
            "--variant is missing, expected v2 or v1: v2 computes the LLaMA's function to the last bit and adds query "
            "weights, take it to use or train the model at once; v1, the paper's, keeps the LLaMA's size and cache "
            "and only comes near its function, take it where size or that architecture matters, with --calibration "
            "TEXT"
        )
    raise ConversionError(
        f"--variant v1 needs --calibration TEXT, on which its layers are fitted; without, {UNCALIBRATED}. Pass "
        "--uncalibrated if that is wanted, or choose --variant v2, which loses nothing"
    )


def rules_and_fields(
    model: SourceModel, reader: CheckpointReader, options: ConversionOptions
) -> tuple[list[Rule], dict[str, Any]]:
    """Returns the tensors' rules and the config fields that LLaMA does not have."""
    if model.kind == "llama":
        return _llama_v1(model, options) if options.variant == "v1" else _llama_v2(model, reader, options)
    nothing: dict[str, Any] = dict.fromkeys(("layers", "heads", "share", "max_kl", "lambda_init", "pairings"))
    plain = replace(options, variant="v1", norm="strict", **nothing)
    if options.recorded() != plain.recorded():
        raise ConversionError(f"the source is {model.kind}, differential already: it is taken over whole, unchanged")
    config = model.config
    if model.kind == "unilm":
        ours = {name: getattr(config, name) for name in ("variant", "lambda_init", "lambda_init_std", "sub_norm_eps")}
        return unilm_rules(model.sizes), ours
    fields = {"variant": "v1", "lambda_init_std": config.lambda_std_dev, "sub_norm_eps": config.rms_norm_eps}
    return diffllama_rules(model.sizes), fields


def _llama_v1(model: SourceModel, options: ConversionOptions) -> tuple[list[Rule], dict[str, Any]]:
    sizes = model.sizes
    layers = options.differential_layers(sizes.num_layers)
    lambda_init = options.lambda_init_list(sizes.num_layers)
    weights = options.norm_weights(lambda_init)
    rules = llama_v1_rules(sizes, options.layer_pairings(sizes), layers, weights, LAMBDA_STD, options.seed)
    fields: dict[str, Any] = {
        "variant": "v1",
        "lambda_init": lambda_init,
        "lambda_init_std": LAMBDA_STD,
        "sub_norm_eps": options.sub_norm_eps(),
    }
    if options.mixed_heads(sizes):
        fields["differential_heads"] = options.heads
    else:
        fields["differential_layers"] = None if len(layers) == sizes.num_layers else layers
    return rules, fields


def padding(sizes: Sizes) -> dict[str, int] | None:
    """Returns for conversion.json the idle heads of each layer and the parameters of all; None where heads pair."""
    num_heads, num_kv_heads = padded_counts(sizes.num_heads, sizes.num_kv_heads)
    heads = num_heads - sizes.num_heads
    kv_heads = num_kv_heads - sizes.num_kv_heads
    if not kv_heads:
        return None
    rows = (heads + 2 * kv_heads) * (sizes.hidden_size + sizes.attention_bias) + heads * sizes.hidden_size
    return {"heads": heads, "key_value_heads": kv_heads, "parameters": rows * sizes.map_dim * sizes.num_layers}


def padding_note(sizes: Sizes) -> str:
    """Returns what the user is told of `--pad-heads`."""
    counts = f"{sizes.num_heads} heads on {sizes.num_kv_heads} key-value heads"
    if (added := padding(sizes)) is None:
        return f"{typed('pad_heads', True)} does nothing here: {counts} pair without it"
    num_heads, num_kv_heads = padded_counts(sizes.num_heads, sizes.num_kv_heads)
    return (
        f"idle heads: {counts} become {num_heads} on {num_kv_heads} in every layer, which costs "
        f"{added['parameters']:,} parameters"
    )


def _llama_v2(
    model: SourceModel, reader: CheckpointReader, options: ConversionOptions
) -> tuple[list[Rule], dict[str, Any]]:
    sizes = model.sizes
    layers = options.differential_layers(sizes.num_layers)
    bias = None
    if options.lambda_start != 0.5:
        logit = torch.logit(torch.tensor(options.lambda_start, dtype=torch.float64))
        # Rounded first: o_proj is scaled by what the stored bias gives, not by what was asked for. One for all layers,
        # so that all of the dtypes it is stored in can hold it.
        for dtype in [options.torch_dtype] if options.torch_dtype else _query_dtypes(reader):
            logit = logit.to(dtype)
        bias = logit.item()
    fields = {
        "variant": "v2",
        "lambda_bias": bias is not None,
        "differential_layers": None if len(layers) == sizes.num_layers else layers,
    }
    return llama_v2_rules(sizes, layers, bias), fields


def _query_dtypes(reader: CheckpointReader) -> list[torch.dtype]:
    return [info.dtype for name, info in reader.tensors.items() if name.endswith("q_proj.weight")]


def promise(model: SourceModel, options: ConversionOptions, stored: Collection[torch.dtype]) -> dict[str, str]:
    """Returns for conversion.json what is promised: of the source, or of its values in `dtype` if that is narrower."""
    asked = options.torch_dtype
    narrowed = asked is not None and any(torch.promote_types(dtype, asked) != asked for dtype in stored)
    source = f"the source rounded to {options.dtype}" if narrowed else "the source"
    kind = _promise_kind(model, options)
    return {"kind": kind, "text": PROMISES[kind].format(source=source)}


def _promise_kind(model: SourceModel, options: ConversionOptions) -> str:
    if model.kind != "llama":
        return "equal"
    if options.variant == "v1":
        return "parity"
    return "bit-exact" if options.lambda_start == 0.5 else "equal"
