"""Which models can be converted, and what becomes of the others: the one list, for messages and for documentation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conversion.checkpoint.safetensors_format import quote
from conversion.errors import ConversionError


# model_type, and the models that have it
SUPPORTED = {
    "llama": "LLaMA: Llama 1 to 3.3, Code Llama, TinyLlama, SmolLM and all others of this type",
    "diffllama": "transformers' own DiffLlama",
    "diff_llama": "the authors' V1 files, described by a config.json of ours (--source-layout unilm)",
}
AS_LLAMA = 'then set model_type to "llama" in a copy of the folder'


@dataclass(frozen=True)
class Architecture:
    """What another model does that LLaMA does not, and how to convert it all the same (empty: not at all)."""

    difference: str
    way_out: str = ""


EXPERTS = Architecture("it has experts in place of the MLP")
LATENT = Architecture("it has experts and keys of its own, made from a latent")
NORMS = Architecture("it normalises queries and keys")
MULTIMODAL = Architecture(
    "it reads images as well", "save its language model alone, and convert that if it is a LLaMA"
)
OTHERS = {
    "mistral": Architecture(
        "it is a LLaMA with sliding windows",
        f"where texts stay within its window, set sliding_window to null, {AS_LLAMA}",
    ),
    "qwen2": Architecture(
        "its query, key and value projections have biases and o_proj has none",
        f"unless use_sliding_window is true, set attention_bias to true, remove sliding_window, {AS_LLAMA}",
    ),
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt_oss": EXPERTS,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "qwen3": NORMS,
    "gemma": Architecture("it scales embeddings and norms in another way"),
    "gemma2": Architecture("it caps logits, alternates windows and norms twice"),
    "gemma3_text": Architecture("it normalises queries and keys and alternates windows"),
    "gemma3": MULTIMODAL,
    "phi3": Architecture("it fuses the query, key and value projections"),
    "olmo2": Architecture("it normalises queries and keys, and after attention"),
    "granite": Architecture("it scales embeddings, attention and residuals"),
    "smollm3": Architecture("some of its layers have no rotary embedding"),
    "llama4": MULTIMODAL,
    "llama4_text": Architecture("it has experts and another attention"),
    "mllama": MULTIMODAL,
}
ELSE = Architecture("it computes something else than LLaMA")


def unsupported(raw: Mapping[str, Any]) -> ConversionError:
    """Returns the refusal of a config.json whose model is no LLaMA: what differs, the way out, what is supported."""
    model_type = raw["model_type"]
    found = OTHERS.get(model_type, ELSE)
    # Left out, it is 4096 in Mistral.
    if model_type == "mistral" and raw.get("sliding_window", 4096) is None:
        found = Architecture("without windows it computes what LLaMA computes", AS_LLAMA.removeprefix("then "))
    way_out = found.way_out or "there is no conversion for it; choose another model"
    supported = "; ".join(f"{name} ({models})" for name, models in SUPPORTED.items())
    return ConversionError(
        f"config.json: model_type is {quote(model_type)}, expected 'llama': {found.difference}; {way_out}. "
        f"Supported: {supported}"
    )
