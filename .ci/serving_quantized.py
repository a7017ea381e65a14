"""Quantized checkpoints for .ci/serving_checks.py: what compressed-tensors writes, rounded to the nearest."""

import copy
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


EIGHT_BITS = {"num_bits": 8, "symmetric": True}
# Those that vLLM 0.32 runs LLaMA with on a CPU; 576 inputs of an MLP are no multiple of the usual 128.
SCHEMES = {
    "w8a8": {
        "weights": EIGHT_BITS | {"type": "int", "strategy": "channel"},
        "input_activations": EIGHT_BITS | {"type": "int", "strategy": "token", "dynamic": True},
    },
    "fp8": {
        "weights": EIGHT_BITS | {"type": "float", "strategy": "channel"},
        "input_activations": EIGHT_BITS | {"type": "float", "strategy": "token", "dynamic": True},
    },
    "w4a16": {
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True},
    },
}
NOT_QUANTIZED = ["lm_head", "re:.*lambda_proj"]


@torch.no_grad()
def quantize(folder: Path, base: str, name: str, scheme: str, ignore: list[str]) -> torch.nn.Module:
    """Writes a quantized checkpoint, and returns a model of the weights in it that computes in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder / base, dtype=torch.float32).eval()
    groups = {"group_0": QuantizationScheme(targets=["Linear"], **SCHEMES[scheme])}
    apply_quantization_config(
        model, QuantizationConfig(config_groups=groups, ignore=ignore, quantization_status=QuantizationStatus.FROZEN)
    )
    quantized = [module for module in model.modules() if hasattr(module, "quantization_scheme")]
    for module in quantized:
        args = module.quantization_scheme.weights
        weight = module.weight
        by_scale = weight.unflatten(-1, (-1, args.group_size or weight.shape[-1]))
        scale, zero_point = calculate_qparams(by_scale.amin(-1), by_scale.amax(-1), args)
        module.weight_scale.copy_(scale)
        weight.copy_(fake_quantize(weight, scale, zero_point, args))
    expected = copy.deepcopy(model)
    for module in expected.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_status = QuantizationStatus.COMPRESSED  # its weights are rounded; inputs are to be
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(folder / base).save_pretrained(folder / name)
    compressor.update_config(str(folder / name))
    return expected


def check_untouched(folder: Path, base: str, name: str) -> None:
    """Checks that lambda and V1's norm are those of the base."""
    before = load_file(folder / base / "model.safetensors")
    after = load_file(folder / name / "model.safetensors")
    kept = [key for key in before if "lambda" in key or "sub_norm" in key]
    changed = [key for key in kept if key not in after or not torch.equal(before[key], after[key])]
    if changed:
        raise ValueError(f"{name}: {changed[0]} was quantized")
