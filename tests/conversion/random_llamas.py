"""Random two-layer models on disk: what the tests of the conversion convert."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tiny_models import KINDS, SIZES, random_ids


SMALL = SIZES | {"rms_norm_eps": 1e-5}
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
    "mistral": (*KINDS["mistral"], {"sliding_window": None}),
    "qwen2": (*KINDS["qwen2"], {}),
    "qwen3": (*KINDS["qwen3"], {"head_dim": 16}),
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


def random_llama(seed: int = 0, **changes: Any) -> Any:
    model_class, config_class = KINDS["llama"]
    return random_model(model_class, config_class(**(SMALL | changes)), seed)


def random_relative(model_type: str, seed: int = 0, **changes: Any) -> Any:
    model_class, config_class, fields = RELATIVES[model_type]
    return random_model(model_class, config_class(**(SMALL | fields | changes)), seed)


def random_diffllama(seed: int = 0, **changes: Any) -> Any:
    model_class, config_class = KINDS["diffllama"]
    return random_model(model_class, config_class(**(SMALL | changes)), seed)


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def write_rows(path: Path, num_rows: int, length: int, seed: int = 3) -> Path:
    """JSON lines of token ids, as a source without a tokenizer needs them."""
    rows = token_ids(length, num_rows, seed).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def edit_json(path: Path, /, without: Iterable[str] = (), **fields: Any) -> None:
    """Removes the fields named in `without` from a JSON object on disk, and sets others."""
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name not in without}
    path.write_text(json.dumps(kept | fields))


def token_ids(length: int = 24, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return random_ids(batch, length, seed, lowest=0)
