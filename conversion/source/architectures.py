"""The models that can be converted, one row for each model_type, and what becomes of the others; docs show it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from transformers import PreTrainedConfig

from conversion.errors import ConversionError, quote
from modeling_diff import DiffLlamaConfig


SourceKind = Literal["llama", "diffllama", "unilm"]


@dataclass(frozen=True)
class Architecture:
    """A model that can be converted.

    models: Which published models it is.
    config_class, model_class: transformers' own; no model class means that transformers has none.
    kind: "llama" for plain attention, of which both variants can be made; the others are V1 already.
    own_fields: Fields of its config.json that LLaMA does not read, and that are checked by `check_windows`.
    adds: What its layers have that LLaMA's have not.
    limits: What of it is refused.
    """

    models: str
    config_class: Any
    model_class: Any
    kind: SourceKind = "llama"
    own_fields: frozenset[str] = frozenset()
    adds: str = ""
    limits: str = ""


QWEN_WINDOWS = frozenset(["sliding_window", "use_sliding_window", "max_window_layers", "layer_types"])
QWEN_LIMITS = "use_sliding_window must be false, or the window as long as max_position_embeddings"
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "Llama 1 to 3.3, Code Llama, TinyLlama, SmolLM, SmolLM2 and all others of this type",
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
    ),
    "mistral": Architecture(
        "Mistral 7B from v0.2, Nemo, Small",
        transformers.MistralConfig,
        transformers.MistralForCausalLM,
        own_fields=frozenset(["sliding_window"]),
        limits="sliding_window must be null or as long as max_position_embeddings (7B v0.1 has shorter ones)",
    ),
    "qwen2": Architecture(
        "Qwen1.5, Qwen2, Qwen2.5, Qwen2.5-Coder, R1-Distill-Qwen",
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        own_fields=QWEN_WINDOWS,
        adds="biases of queries, keys and values",
        limits=QWEN_LIMITS,
    ),
    "qwen3": Architecture(
        "Qwen3, the dense ones",
        transformers.Qwen3Config,
        transformers.Qwen3ForCausalLM,
        own_fields=QWEN_WINDOWS,
        adds="norms on queries and keys",
        limits=QWEN_LIMITS,
    ),
    "diffllama": Architecture(
        "transformers' own DiffLlama", transformers.DiffLlamaConfig, transformers.DiffLlamaForCausalLM, "diffllama"
    ),
    "diff_llama": Architecture(
        "the authors' V1 files, described by a config.json of ours (--source-layout unilm)",
        DiffLlamaConfig,
        None,
        "unilm",
    ),
}


@dataclass(frozen=True)
class Unsupported:
    """What another model does that no row above does, and how to convert it all the same (empty: not at all)."""

    difference: str
    way_out: str = ""


EXPERTS = Unsupported("it has experts in place of the MLP")
LATENT = Unsupported("it has experts and keys of its own, made from a latent")
MULTIMODAL = Unsupported(
    "it reads images as well", "save its language model alone, and convert that if it is of a supported type"
)
UNSUPPORTED: Mapping[str, Unsupported] = {
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "qwen3_next": Unsupported("it has experts, and linear attention in most layers"),
    "gpt_oss": EXPERTS,
    "olmoe": EXPERTS,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "ministral": Unsupported("it alternates windows"),
    "gemma": Unsupported("it scales embeddings and norms in another way"),
    "gemma2": Unsupported("it caps logits, alternates windows and norms twice"),
    "gemma3_text": Unsupported("it alternates windows and norms twice"),
    "gemma3": MULTIMODAL,
    "phi": Unsupported("it runs attention and MLP next to each other, and rotates a part of each head"),
    "phi3": Unsupported("it fuses the query, key and value projections"),
    "olmo": Unsupported("its norms have no weights"),
    "olmo2": Unsupported("it normalizes whole queries and keys, and after attention"),
    "olmo3": Unsupported("it normalizes whole queries and keys, and after attention, and alternates windows"),
    "granite": Unsupported("it scales embeddings, attention and residuals"),
    "cohere": Unsupported("it runs attention and MLP next to each other, and scales logits"),
    "smollm3": Unsupported("some of its layers have no rotary embedding"),
    "llama4": MULTIMODAL,
    "llama4_text": Unsupported("it has experts and another attention"),
    "mistral3": MULTIMODAL,
    "mllama": MULTIMODAL,
    "qwen2_vl": MULTIMODAL,
    "qwen2_5_vl": MULTIMODAL,
    "qwen3_vl": MULTIMODAL,
}
ELSE = Unsupported("it computes something else than LLaMA and its relatives")


def unsupported(model_type: str, where: str = "config.json: model_type") -> ConversionError:
    """Returns the refusal of a model of another type: what differs, the way out, what is supported."""
    found = UNSUPPORTED.get(model_type, ELSE)
    way_out = found.way_out or "there is no conversion for it; choose another model"
    supported = "; ".join(f"{name} ({row.models})" for name, row in ARCHITECTURES.items())
    return ConversionError(
        f"{where} is {quote(model_type)}, expected a supported one: {found.difference}; {way_out}. "
        f"Supported: {supported}"
    )


def check_windows(config: Any) -> None:
    """Checks that a layer reads all that comes before, in any text that the model can read.

    Args:
        config: What transformers' own class makes of the config.json.

    Raises:
        ConversionError: A window is shorter than `max_position_embeddings`.
    """
    kinds = getattr(config, "layer_types", None) or ()
    if unknown := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        raise ConversionError(
            f"config.json: layer_types has {quote(unknown[0])}, expected full_attention throughout; this is another "
            "model"
        )
    window = getattr(config, "sliding_window", None)
    longest = config.max_position_embeddings
    num_windowed = kinds.count("sliding_attention") if kinds else config.num_hidden_layers
    if window is None or window >= longest or not num_windowed:
        return
    raise ConversionError(
        f"config.json: sliding_window is {window}, below max_position_embeddings {longest}: {num_windowed} of "
        f"{config.num_hidden_layers} layers read no further back, which differential attention here does not; where "
        f"texts stay within the window, set max_position_embeddings to {window} in a copy of the folder"
    )


def plain_config(config: PreTrainedConfig) -> Any:
    """Returns a source's config in our terms: a V2 none of whose layers is differential, which computes the same."""
    # Any: LlamaConfig declares as optional what it always fills in.
    return DiffLlamaConfig.from_llama(config, variant="v2", differential_layers=[])
