"""What a finished conversion computes, measured at its end: V2 against its source's bits, V1 by how near it came."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from conversion.checkpoint.companions import read_tokenizer
from conversion.data.held_out import HeldOut, read_held_out
from conversion.errors import ConversionError
from conversion.evaluation.metrics import text_metrics, window_logits
from conversion.mapping.lambdas import differential_layers
from conversion.mapping.stream import Plan, planned_config
from conversion.record import ADAPTER_MERGED, adapter_merged
from conversion.source import Source
from conversion.source.model import load_converted, load_original
from modeling_diff import DiffLlamaConfig


logger = logging.getLogger(__name__)
# In float32, as one CPU computes it: 1 B parameters are 4 GB, and two passes over 4,096 tokens 16 TFLOP, some three
# minutes of two cores. 8 B would be 32 GB and half an hour, more than a conversion that streams should ever cost.
CPU_PARAMETERS = 10**9
# float32, two ways of computing one thing; a wrong conversion is off by 0.1 and more
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Measurement:
    """What will be measured: on which text, on which device; without a text, `reason` says why nothing will be."""

    held_out: HeldOut | None
    device: str = "cpu"
    reason: str = ""


def plan_measurement(source: Source, plan: Plan, text: Path | None) -> Measurement:
    """Returns how the conversion of `plan` will be measured, before anything is written.

    Raises:
        ConversionError: A `text` that cannot be read.
    """
    record = plan.record
    config = planned_config(plan)
    parity = record["promise"]["kind"] == "parity"
    # Bits are compared on the CPU: a GPU's products of other widths add in other orders.
    device = "cuda" if parity and torch.cuda.is_available() else "cpu"
    parameters = record["parameters"]["output"]
    if config.architectures == ["DiffLlamaModel"]:
        return Measurement(None, reason="a backbone without a language model head")
    if adapter_merged(record):
        return Measurement(None, reason=ADAPTER_MERGED)
    if source.model.kind == "unilm":
        return Measurement(None, reason="transformers has no model for the authors' own files")
    if not _fits(parameters, device):
        where = "a CPU" if device == "cpu" else "this GPU's free memory"
        way_out = "`diff-llama verify OUTPUT --against SOURCE` measures all the same"
        reason = f"{parameters / 1e9:.1f} B parameters are many for {where}; {way_out}"
        return Measurement(None, reason=reason)
    try:
        tokenizer = read_tokenizer(source.folder)
        if tokenizer is None and text is None:
            if parity:
                return Measurement(None, reason="no tokenizer")
            return Measurement(_random_ids(config), device)
        return Measurement(read_held_out(tokenizer, config.vocab_size, config.max_position_embeddings, text), device)
    except ConversionError as error:
        if text is not None:
            raise
        logger.warning("not measured: %s", error)  # such as a damaged tokenizer, whose files travel all the same
        return Measurement(None, reason="the source's tokenizer cannot be used")


def measure_output(
    measurement: Measurement, source: Source, output: Path, record: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what conversion.json says of it: the text, its tokens and the numbers, or why there are none.

    Reasons are published with it: they name no paths. What an error says besides is logged.

    Raises:
        ConversionError: Logits that are not those that were promised.
    """
    if measurement.held_out is None:
        return {"not_measured": measurement.reason}
    windows = measurement.held_out.windows
    dtype = record["options"]["dtype"]
    try:
        with torch.no_grad():
            llama = load_in_float32(source.folder, dtype, source.model.config).to(measurement.device)
            source_logits = [logits.cpu() for logits in window_logits(llama, windows)]
            del llama
            if not all(logits.isfinite().all() for logits in source_logits):
                return {"not_measured": "the source's own logits are not finite"}
            converted = load_in_float32(output, dtype).to(measurement.device)
            logits = (logits.cpu() for logits in window_logits(converted, windows))
            parity = record["promise"]["kind"] == "parity"
            numbers = (
                _parity(converted, logits, windows, source_logits) if parity else _difference(logits, source_logits)
            )
    except (ConversionError, ValueError, RuntimeError, MemoryError, OSError, ImportError) as error:
        # The checkpoint is whole: what keeps a model from being run here, memory above all, must not undo it.
        logger.warning("not measured: %s", error)
        return {"not_measured": f"{type(error).__name__} when source and conversion were run"}
    scale = max(logits.abs().max().item() for logits in source_logits)
    difference = numbers["values"].get("largest_difference", 0)
    # What is only equal up to rounding may be rounded in 16 bits, by more than a float32 tolerance.
    if record["promise"]["kind"] == "bit-exact" and not difference <= TOLERANCE * max(scale, 1):
        raise ConversionError(
            f"{output}: its logits differ from the source's by {difference:.3g}, expected the same "
            "bits; do not use it, and report this with its conversion.json"
        )
    return {"text": measurement.held_out.name, "tokens": measurement.held_out.num_tokens, **numbers}


def load_in_float32(folder: Path, rounded: str | None, original: PreTrainedConfig | None = None) -> Any:
    """Returns a model as a conversion to the dtype `rounded` has it, computing in float32 with sdpa.

    Args:
        original: The source's config, where `folder` is the source.

    Raises:
        ConversionError: Weights that lack a tensor, which transformers would fill with random numbers.
    """
    # Loaded in the narrow dtype and widened: .to(dtype) of a whole model would round the rotary frequencies as well.
    options: dict[str, Any] = {"dtype": rounded or "float32", "output_loading_info": True}
    loaded: Any = (
        load_converted(folder, attn_implementation="sdpa", **options)
        if original is None
        else load_original(folder, original, **options)
    )
    model, report = loaded
    if absent := sorted(report["missing_keys"]):
        raise ConversionError(f"{folder}: transformers finds no tensor {absent[0]} in it, so nothing can be compared")
    return model.float().eval()


def _parity(
    model: Any, logits: Iterable[torch.Tensor], windows: list[torch.Tensor], source_logits: list[torch.Tensor]
) -> dict[str, Any]:
    layers = differential_layers(model.config)
    lambdas = {str(layer): model.model.layers[layer].self_attn.diff_lambda().item() for layer in layers}
    values = text_metrics(logits, windows, source_logits).to_dict()
    return {"values": values, "lambda": {layer: round(value, 6) for layer, value in lambdas.items()}}


def _difference(logits: Iterable[torch.Tensor], source_logits: list[torch.Tensor]) -> dict[str, Any]:
    pairs = zip(source_logits, logits, strict=True)
    return {"values": {"largest_difference": max((theirs - ours).abs().max().item() for theirs, ours in pairs)}}


def _fits(parameters: int, device: str) -> bool:
    if device == "cpu":
        return parameters <= CPU_PARAMETERS
    return 5 * parameters < torch.cuda.mem_get_info()[0]  # float32, and a quarter of it for the logits of a window


def _random_ids(config: DiffLlamaConfig) -> HeldOut:
    """Numbers of a text they are not, but a function is equal on any ids or on none."""
    generator = torch.Generator().manual_seed(0)
    length = min(64, config.max_position_embeddings)
    return HeldOut("random ids (no tokenizer)", [torch.randint(config.vocab_size, (1, length), generator=generator)])
