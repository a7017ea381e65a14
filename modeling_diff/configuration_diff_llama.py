"""Configuration of the Differential Transformer on LLaMA: V1 (arXiv:2410.05258) and V2 (Microsoft, January 2026)."""

import math
from copy import deepcopy
from typing import Any, Literal

from .diff_transformers_compat import HAS_TENSOR_PARALLEL, check_versions


check_versions()  # before what older releases lack is imported

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers import LlamaConfig, PreTrainedConfig  # noqa: E402

from .diff_adapters import MODEL_TYPE, register_with_peft  # noqa: E402
from .diff_engines import register_with_vllm  # noqa: E402
from .diff_llama_fields import check_differential_heads, head_fields, shared_fields  # noqa: E402


ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

# Every saved config names every head, whichever was saved: `register_for_auto_class` alone would record that one.
AUTO_MAP = {
    "AutoConfig": "configuration_diff_llama.DiffLlamaConfig",
    "AutoModel": "modeling_diff_llama.DiffLlamaModel",
    "AutoModelForCausalLM": "modeling_diff_llama.DiffLlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_diff_llama.DiffLlamaForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_diff_llama.DiffLlamaForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_diff_llama.DiffLlamaForQuestionAnswering",
}


# Written to every config.json instead of a number: transformers' own DiffLlama has our class names, and a tool that
# takes a class by the name under "architectures" would load a V1 checkpoint into it without an error, and compute
# something else. With this text it stops, and says why.
WRONG_CLASS_GUARD = {
    "lambda_std_dev": "This is not a checkpoint of transformers' own DiffLlama: load it through the auto classes with "
    "trust_remote_code=True, or with modeling_diff; a tool that takes a class by its name, such as TRL given a path, "
    "has to be given the model itself."
}


def paper_lambda_init(layer_idx: int) -> float:
    """Computes lambda_init = 0.8 - 0.6 exp(-0.3 l) of layer l, counted from 0 (arXiv:2410.05258, section 2.1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_idx)


@strict
class DiffLlamaConfig(LlamaConfig):
    r"""
    LLaMA's configuration with LLaMA's names and defaults; every count is of *differential heads*, each of two maps.

    `head_dim` is the width of a head's value and output, `map_dim` (derived) that of one map's query and key:
    `head_dim / 2` in V1, `head_dim` in V2. Rotary frequencies are computed from `map_dim`.

    Args:
        variant: `"v1"`: lambda is one learned scalar per layer, a head's value is twice as wide as its maps and is
            normalized. `"v2"`: lambda is a sigmoid per token and head; no norm, and both maps of a head read the same
            key.
        lambda_init: The constant part of lambda, one value per layer (V1). Defaults to the paper's
            `0.8 - 0.6 exp(-0.3 l)`, l from 0.
        lambda_init_std: Standard deviation from which the four lambda vectors of a layer are drawn (V1).
        sub_norm_eps: Epsilon of the norm over a head's output, one value for all layers or one per layer (V1).
            Defaults to 1e-5.
        lambda_bias: Whether `lambda_proj` has a bias (V2).
        differential_layers: The layers with differential attention. Defaults to all. The others keep LLaMA's
            attention, in the same weight and cache shapes; with V1 their heads are stored in pairs as well.
        differential_heads: The differential heads of each layer, one ascending list per layer (V1), instead of
            `differential_layers`. The others hold a pair of LLaMA's heads; with `[]` the whole layer does.
        attention_out_bias: Whether `o_proj` has a bias; `attention_bias` is then for queries, keys and values only, as
            in Qwen2. Defaults to `attention_bias`.
        use_qk_norm: Whether the queries and keys of each map are normalized before the rotary embedding, as in Qwen3:
            RMSNorm over `map_dim` components with `rms_norm_eps`, and weights `q_norm` and `k_norm` that a layer's
            maps share.
        kwargs: LLaMA's own fields.

    Raises:
        ValueError: A combination has no meaning; names the field, its value and the way out.

    ```python
    >>> from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM

    >>> config = DiffLlamaConfig(hidden_size=512, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4)
    >>> config.head_dim, config.map_dim
    (128, 64)
    >>> model = DiffLlamaForCausalLM(config)
    ```"""

    model_type = MODEL_TYPE

    variant: str = "v1"
    lambda_init: list[float | int] | None = None
    lambda_init_std: float | int = 0.1
    sub_norm_eps: float | list[float] | None = None
    lambda_bias: bool = False
    differential_layers: list[int] | None = None
    differential_heads: list[list[int]] | None = None
    attention_out_bias: bool | None = None
    use_qk_norm: bool = False

    def __post_init__(self, **kwargs):
        if (model_type := kwargs.get("model_type", self.model_type)) != self.model_type:
            raise ValueError(
                f"model_type={model_type!r} is another architecture, whose weights mean something else here: a LLaMA "
                "checkpoint comes over with `diff-llama convert`."
            )
        if isinstance(kwargs.pop("lambda_std_dev", None), int | float):  # a text is the guard, of any revision
            raise ValueError(
                "lambda_std_dev is a field of transformers' own diffllama, which computes something else in another "
                "weight order: here it is lambda_init_std, and checkpoints come over with `diff-llama convert`."
            )
        if self.head_dim is None and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}: "
                "change one of them, or give head_dim."
            )
        super().__post_init__(**kwargs)
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        self._check_variant()  # before what depends on it is filled in
        if self.variant == "v1":
            self._fill_v1()
        self.check()
        self.base_model_tp_plan = self._tensor_parallel_plan()
        register_with_vllm()

    @classmethod
    def from_llama(
        cls, llama_config: PreTrainedConfig, *, variant: Literal["v1", "v2"], pad_heads: bool = False, **fields: Any
    ) -> "DiffLlamaConfig":
        """
        Returns the config of the differential model that a LLaMA becomes, as `diff-llama convert` writes it.

        V1 has as many parameters: two heads become one, with `head_dim` doubled. V2 has the LLaMA's heads, and a
        second set of queries. Fields that LLaMA's layers do not read are left out, without the checks by which
        `diff-llama convert` refuses what they would change, such as a sliding window.

        Args:
            llama_config: Config of a `llama`, `mistral`, `qwen2` or `qwen3` model. One of a differential model stands
                for the LLaMA whose heads are its maps.
            variant: "v1" or "v2".
            pad_heads: Whether V1 gets idle heads where those of the LLaMA do not pair.
            fields: Fields of the new config, which win over the LLaMA's. `attention_dropout` is 0 if it is not one.

        Raises:
            ValueError: The model is of another type, its heads do not pair, or the fields do not go together.
        """
        ours = {"variant": variant, "attention_dropout": 0.0} | head_fields(llama_config, variant, pad_heads=pad_heads)
        return cls(**{**shared_fields(llama_config), **ours, **fields})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        Builds a config as LLaMA's does, and checks fields given as keywords together with all others.

        Fewer layers keep the first values of each list. `variant` is also a keyword of `from_pretrained`, for names of
        weight files: other values than ours are passed on to it.
        """
        weights_variant = {} if kwargs.get("variant", "v1") in ("v1", "v2") else {"variant": kwargs.pop("variant")}
        config_dict = config_dict | {name: kwargs[name] for name in ("variant", "num_hidden_layers") if name in kwargs}
        if "num_hidden_layers" in kwargs:
            config_dict = cls._first_layers(config_dict)
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.check()
        return (config, loaded[1] | weights_variant) if isinstance(loaded, tuple) else config

    @staticmethod
    def _first_layers(config_dict: dict[str, Any]) -> dict[str, Any]:
        """Cuts lists with one value per layer to `num_hidden_layers`."""
        num_layers = config_dict["num_hidden_layers"]
        lists = {name: config_dict.get(name) for name in ("lambda_init", "sub_norm_eps", "differential_heads")}
        cut = {name: values[:num_layers] for name, values in lists.items() if isinstance(values, list)}
        if (layers := config_dict.get("differential_layers")) is not None:
            cut["differential_layers"] = [layer for layer in layers if layer < num_layers]
        return config_dict | cut

    def validate_differential(self) -> None:
        """Checks before transformers saves: fields may have been set since the config was built."""
        self.check()

    def check(self) -> None:
        """Raises `ValueError` for a combination of fields that has no meaning."""
        self._check_variant()
        self._check_heads()
        check_differential_heads(self)
        if self.variant == "v1":
            self._check_v1()
        else:
            self._check_v2()
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout={self.attention_dropout}: the paper defines no dropout on differences of maps; "
                "set attention_dropout=0.0."
            )
        self._check_rope_type()

    @property
    def map_dim(self) -> int:
        """Returns the width of one map's query and key."""
        return self.head_dim // 2 if self.variant == "v1" else self.head_dim

    def is_differential(self, layer_idx: int) -> bool:
        """Returns whether a head of the layer subtracts a negative map; else the layer keeps LLaMA's attention."""
        return bool(self.differential_heads_of(layer_idx))

    def is_mixed(self, layer_idx: int) -> bool:
        """Returns whether some heads of the layer are differential and some are not (V1)."""
        return 0 < len(self.differential_heads_of(layer_idx)) < self.num_attention_heads

    def differential_heads_of(self, layer_idx: int) -> list[int]:
        """Returns the heads of the layer that subtract a negative map, in ascending order."""
        if self.differential_heads is not None:
            return list(self.differential_heads[layer_idx])
        is_differential = self.differential_layers is None or layer_idx in self.differential_layers
        return list(range(self.num_attention_heads)) if is_differential else []

    def layer_sub_norm_eps(self, layer_idx: int) -> float:
        """Returns the epsilon of one layer's norm over heads (V1)."""
        return self.sub_norm_eps[layer_idx] if isinstance(self.sub_norm_eps, list) else self.sub_norm_eps

    def rotary_config(self) -> LlamaConfig:
        """Returns a LLaMA configuration whose heads are this model's maps, to compute rotary frequencies from."""
        return LlamaConfig(
            hidden_size=self.hidden_size,
            num_attention_heads=1,  # unread, as head_dim is given, but has to divide hidden_size
            head_dim=self.map_dim,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=deepcopy(self.rope_parameters),
        )

    def validate_architecture(self) -> None:
        """Checks nothing: LLaMA wants heads that divide `hidden_size`, which matters only if `head_dim` is derived."""

    def validate_rope(self) -> None:
        """Checks the rope settings against `map_dim`, not `head_dim`; building the LLaMA configuration checks them."""
        self.rotary_config()

    def to_dict(self) -> dict[str, Any]:
        register_with_peft()  # which looks up `model_type` right after
        return super().to_dict() | {"auto_map": dict(AUTO_MAP)} | WRONG_CLASS_GUARD

    def _check_variant(self) -> None:
        if self.variant not in ("v1", "v2"):
            raise ValueError(
                f'variant={self.variant!r} is unknown: use "v1" (arXiv:2410.05258, lambda per layer, norm over heads) '
                'or "v2" (lambda per token, no norm).'
            )

    def _check_heads(self) -> None:
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}: each key-value head serves equally many heads."
            )
        if self.variant == "v1" and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd: in V1 a head holds two maps of head_dim / 2 each; use an even one."
            )
        if self.map_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} gives maps {self.map_dim} wide, and rotary embedding rotates pairs of "
                f"components: use a head_dim that is a multiple of {4 if self.variant == 'v1' else 2}."
            )

    def _fill_v1(self) -> None:
        if self.lambda_init is None:
            self.lambda_init = [paper_lambda_init(layer_idx) for layer_idx in range(self.num_hidden_layers)]
        if self.sub_norm_eps is None:
            self.sub_norm_eps = 1e-5

    def _check_v1(self) -> None:
        if len(self.lambda_init) != self.num_hidden_layers:
            raise ValueError(
                f"lambda_init has {len(self.lambda_init)} values for num_hidden_layers={self.num_hidden_layers}: give "
                "one per layer, or leave it out for the paper's schedule."
            )
        for layer_idx, value in enumerate(self.lambda_init):
            if not math.isfinite(value) or value >= 1:
                raise ValueError(
                    f"lambda_init[{layer_idx}]={value}: must be finite and below 1, as a head's output is scaled by "
                    "1 - lambda_init."
                )
        if not math.isfinite(self.lambda_init_std) or self.lambda_init_std < 0:
            raise ValueError(f"lambda_init_std={self.lambda_init_std}: a standard deviation is finite and at least 0.")
        epsilons = self.sub_norm_eps if isinstance(self.sub_norm_eps, list) else [self.sub_norm_eps]
        if isinstance(self.sub_norm_eps, list) and len(epsilons) != self.num_hidden_layers:
            raise ValueError(
                f"sub_norm_eps has {len(epsilons)} values for num_hidden_layers={self.num_hidden_layers}: give one "
                "per layer, or a single float."
            )
        if any(not math.isfinite(eps) or eps <= 0 for eps in epsilons):
            raise ValueError(f"sub_norm_eps={self.sub_norm_eps}: must be finite and above 0, as in 1e-5.")
        if self.lambda_bias:
            raise ValueError(
                'lambda_bias=True: V1 has no lambda_proj to carry a bias; use variant="v2" or leave it out.'
            )

    def _check_v2(self) -> None:
        for name in ("lambda_init", "sub_norm_eps"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)}: V2 has neither a schedule nor a norm over heads; use "
                    'variant="v1" or leave it out.'
                )

    def _check_rope_type(self) -> None:
        rope_type = self.rotary_config().rope_parameters["rope_type"]  # however a field set later spells it
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_parameters has rope_type={rope_type!r}: LLaMA knows {', '.join(ROPE_TYPES)}.")

    def _tensor_parallel_plan(self) -> dict[str, str] | None:
        """Returns LLaMA's plan; the gradient of what a layer's heads share is summed over ranks."""
        if not HAS_TENSOR_PARALLEL:
            return None
        plan = dict(LlamaConfig.base_model_tp_plan)
        if self.variant == "v2":
            plan["layers.*.self_attn.lambda_proj"] = "colwise"
        shared = ["diff_lambda", "sub_norm"] if self.variant == "v1" else []
        shared += ["q_norm", "k_norm"] if self.use_qk_norm else []
        return plan | {f"layers.*.self_attn.{name}": "shared_by_heads" for name in shared}  # of diff_parallel.py


DiffLlamaConfig.register_for_auto_class()


__all__ = ["DiffLlamaConfig"]
