"""The model card of a converted checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from conversion.source import SourceFolder
from modeling_diff import DiffLlamaConfig


INHERITED = ("license", "license_name", "license_link", "language")  # stated by the source, or not at all
BODY = """
# {title}

A [Differential Transformer](https://arxiv.org/abs/2410.05258) ({variant}), converted from {origin} by `diff-llama`.

{status}

| | |
|---|---|
| heads | {heads} differential heads, {kv_heads} key-value heads, maps {map_dim} wide |
| differential layers | {layers} |
| parameters | {parameters:,} (source: {source_parameters:,}) |

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{title}", trust_remote_code=True)
```

`conversion.json` records the source, its checksums and every option.
"""
STATUS = {
    "bit-exact": "It computes the same function as its source: the same logits to the last bit in float32. "
    "The second maps separate from the first once it is trained.",
    "equal": "It computes the same function as its source, up to rounding.",
    "parity": "**A raw conversion, not a usable model**: it has its source's size and weights, but subtracts "
    "attention maps that were trained to be added, and needs healing (distillation from its source) first.",
    "calibrated": "**Near its source, not equal to it**: it has its source's size; its attention was fitted, layer by "
    "layer, on {tokens} tokens of text, and nothing was trained end to end. Measure it before use; healing "
    "(distillation from its source) brings it nearer.",
}


def model_card(found: SourceFolder, config: DiffLlamaConfig, record: Mapping[str, Any]) -> str:
    """README.md: a metadata block that the Hub accepts, and what this checkpoint is, plainly."""
    inherited = {key: value for key, value in source_metadata(found.folder).items() if key in INHERITED}
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["differential-transformer", "diff_llama"],
        base_model=found.hub_id,
        **inherited,
    )
    count, calibration = config.num_hidden_layers, record.get("calibration")
    status = STATUS["calibrated"].format(**calibration) if calibration else STATUS[record["promise"]["kind"]]
    body = BODY.format(
        title=f"{found.name.split('/')[-1]}-diff-{config.variant}",
        variant=config.variant.upper(),
        origin=f"[{found.hub_id}](https://huggingface.co/{found.hub_id})" if found.hub_id else f"`{found.name}`",
        status=status,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        map_dim=config.map_dim,
        layers=f"all {count}" if config.differential_layers is None else f"{config.differential_layers} of {count}",
        parameters=record["parameters"]["output"],
        source_parameters=record["parameters"]["source"],
    )
    return f"---\n{metadata.to_yaml()}\n---\n{body}"


def export_card(found: SourceFolder) -> str:
    """README.md of an export to transformers' own class."""
    inherited = {key: value for key, value in source_metadata(found.folder).items() if key in INHERITED}
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["differential-transformer"], **inherited
    )
    return (
        f"---\n{metadata.to_yaml()}\n---\n\n# {found.name}-diffllama\n\n"
        "A [Differential Transformer](https://arxiv.org/abs/2410.05258) in the format of transformers' own "
        f"`DiffLlamaForCausalLM`, exported from `{found.name}` by `diff-llama`. It needs no custom code.\n"
    )


def source_metadata(folder: Path) -> dict[str, Any]:
    """The metadata block of the source's own card; empty without one, or if it cannot be read."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        return metadata_load(card) or {}
    except (ValueError, OSError):  # a card is no part of a checkpoint: a broken one must not stop a conversion
        return {}
