"""Random two-layer models on disk: what the tests of the conversion convert."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
# What LLaMAs differ in, as changes to SMALL.
FLAVOURS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "wide-heads": {"head_dim": 16},
}
# LLaMA's relatives, by model type: classes and what of SMALL they change.
RELATIVES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def random_model(model_class: Any, config: Any, seed: int = 0) -> Any:
    """Weights large enough for attention to be far from uniform, biases and norms away from their initial values."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 if "lambda" in name or parameter.dim() == 1 else 0.3
            parameter.copy_(torch.randn_like(parameter) * spread + ("norm" in name))
    return model


def random_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    return random_model(LlamaForCausalLM, LlamaConfig(**{**SMALL, **changes}), seed)


def random_relative(model_type: str, seed: int = 0, **changes: Any) -> Any:
    model_class, config_class, fields = RELATIVES[model_type]
    return random_model(model_class, config_class(**{**SMALL, **fields, **changes}), seed)


def random_diffllama(seed: int = 0, **changes: Any) -> DiffLlamaForCausalLM:
    return random_model(DiffLlamaForCausalLM, DiffLlamaConfig(**{**SMALL, **changes}), seed)


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def token_ids(length: int = 24, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL["vocab_size"], (batch, length), generator=generator)
