"""Builds the tiny models of the tests: one set of sizes, of which a test names what it changes. Not a test module."""

from functools import partial
from typing import Any

import torch
import transformers

from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # LLaMA's 0.02 would leave every map uniform at this width
}
# Class of the causal language model and its config, by kind: "v1" and "v2" are ours.
KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
    "diffllama": (transformers.DiffLlamaForCausalLM, transformers.DiffLlamaConfig),
    "v1": (DiffLlamaForCausalLM, partial(DiffLlamaConfig, variant="v1")),
    "v2": (DiffLlamaForCausalLM, partial(DiffLlamaConfig, variant="v2")),
}


def tiny_config(kind: str, **changes: Any) -> Any:
    return KINDS[kind][1](**(SIZES | changes))


def tiny_model(kind: str, model_class: Any = None, *, seed: int = 0, noise: float = 0.0, **changes: Any) -> Any:
    """
    Builds a seeded model in evaluation mode, a causal language model unless another class is given.

    `noise` is the standard deviation of what is added to every vector, so that no norm is one and no bias zero.
    """
    torch.manual_seed(seed)
    model = (model_class or KINDS[kind][0])(tiny_config(kind, **changes))
    if noise:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(noise * torch.randn_like(parameter))
    return model.eval()


def random_ids(batch_size: int = 2, num_tokens: int = 9, seed: int = 0, lowest: int = 3) -> torch.Tensor:
    """Draws token ids (B, T); from 3 on, so that none is padding, beginning or end of a text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lowest, SIZES["vocab_size"], (batch_size, num_tokens), generator=generator)
