"""
Attention of the Differential Transformer as its difference from transformers' LLaMA, and the names that it registers.

B batch, T queries, S keys, H heads, K key-value heads, d map_dim, D head_dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_eager_attention_forward
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .configuration_diff_llama import DiffLlamaConfig
from .diff_attention import (
    eager_attention_forward,
    is_exporting,
    mix_heads,
    own_halves,
    place_queries,
    runs_of_heads,
    subtract_maps,
)
from .diff_attention_auto import auto_attention_forward, auto_attention_mask, fastest_path
from .diff_attention_chunked import chunked_attention_forward
from .diff_attention_triton_interface import fused_attention_forward, fused_attention_mask
from .diff_engines import check_engine_heads
from .diff_sub_norm import SubNorm
from .diff_transformers_check import check_structure
from .diff_transformers_compat import append_to_cache


check_structure()


# What takes unpadded queries and lambda, and gives heads' outputs. Looked up here before transformers' own registry:
# another revision of this code, loaded next to this one, registers its functions under the same names.
DIFFERENTIAL_ATTENTION_FUNCTIONS: dict[str, Callable] = {
    "eager": eager_attention_forward,
    "diff_chunked": chunked_attention_forward,
    "diff_triton": fused_attention_forward,
}
DEFAULT_ATTENTION = "diff_auto"
# Without a mask function of its own, a name gets no mask at all, even for a padded batch.
for name, function, mask_function in (
    ("diff_auto", auto_attention_forward, auto_attention_mask),
    ("diff_chunked", chunked_attention_forward, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]),
    ("diff_triton", fused_attention_forward, fused_attention_mask),
):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_function)


class DiffLambda(nn.Module):
    """
    lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init, a scalar (arXiv:2410.05258, eq. 2).

    A module of its own, as adapters can train modules but not bare parameters. It stays float32 when the model is cast
    or loaded in less: bfloat16 would round lambda, and the steps by which it learns, to 1/256.
    """

    def __init__(self, config: DiffLlamaConfig, layer_idx: int):
        super().__init__()
        self.lambda_init = config.lambda_init[layer_idx]
        self.lambda_q1 = nn.Parameter(torch.empty(config.map_dim, dtype=torch.float32))
        self.lambda_k1 = nn.Parameter(torch.empty(config.map_dim, dtype=torch.float32))
        self.lambda_q2 = nn.Parameter(torch.empty(config.map_dim, dtype=torch.float32))
        self.lambda_k2 = nn.Parameter(torch.empty(config.map_dim, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        # Independent of its input; PEFT 0.18's wrapper of modules to save has to be called with one.
        vectors = [self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2]
        if self.lambda_q1.dtype in (torch.float16, torch.bfloat16):  # set so past `_apply`, as accelerate does
            vectors = [vector.float() for vector in vectors]
        return vectors[0].dot(vectors[1]).exp() - vectors[2].dot(vectors[3]).exp() + self.lambda_init

    def _apply(self, fn, recurse=True):
        def keep_wide(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(keep_wide, recurse)


class PlainAttention(LlamaAttention):
    """LLaMA's attention with what its relatives add: biases without one on `o_proj`, norms on queries and keys."""

    sliding_window = None  # Qwen3's forward hands it on

    def __init__(self, config: DiffLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.attention_out_bias != config.attention_bias:
            self.o_proj = nn.Linear(self.o_proj.in_features, config.hidden_size, bias=config.attention_out_bias)
        if config.use_qk_norm:
            self.q_norm = LlamaRMSNorm(config.map_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(config.map_dim, eps=config.rms_norm_eps)


class PlainNormedAttention(PlainAttention):
    """The same with its norms, where every map is a head: Qwen3's attention."""

    forward = Qwen3Attention.forward


class DiffLlamaAttention(PlainAttention):
    """
    Differential attention in one standard attention call and one cache update.

    V1: y_i = (1 - lambda_init) RMSNorm(O_i) of O_i = (A1 - lambda A2) v with one lambda per layer (arXiv:2410.05258).
    V2: O_i = A_2i v - sigmoid(w_i . x) A_2i+1 v, without a norm.
    """

    differential_functions = DIFFERENTIAL_ATTENTION_FUNCTIONS

    def __init__(self, config: DiffLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.map_dim = config.map_dim
        self.scaling = self.map_dim**-0.5
        self.num_key_value_groups *= 2  # read by every backend: query heads, two per head, to one key-value head
        if config.variant == "v2":
            num_queries = 2 * config.num_attention_heads * self.map_dim
            self.q_proj = nn.Linear(config.hidden_size, num_queries, bias=config.attention_bias)
            self.lambda_proj = nn.Linear(config.hidden_size, config.num_attention_heads, bias=config.lambda_bias)
        else:
            self.diff_lambda = DiffLambda(config, layer_idx)
            self.sub_norm = SubNorm(self.head_dim, eps=config.layer_sub_norm_eps(layer_idx))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]

        # -1, not the config's counts: under tensor parallelism a rank holds only its share of the heads.
        query_states = self.q_proj(hidden_states).view(*input_shape, -1, self.map_dim)  # (B, T, 2H, d)
        key_states = self.k_proj(hidden_states).view(*input_shape, -1, self.map_dim)  # (B, T, 2K or K, d)
        value_states = self.v_proj(hidden_states).view(*input_shape, -1, self.head_dim)  # (B, T, K, D)
        if self.config.use_qk_norm:
            query_states = self.q_norm(query_states)
            key_states = self.k_norm(key_states)

        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin, unsqueeze_dim=2)
        key_states = key_states.reshape(*input_shape, -1, self.head_dim)  # (B, T, K, D), in V1 [k1; k2]
        query_states, key_states, value_states = (
            states.transpose(1, 2) for states in (query_states, key_states, value_states)
        )

        key_states, value_states = append_to_cache(
            key_states, value_states, self.layer_idx, cache, past_key_values, kwargs
        )

        implementation, attention_mask = self.choose_implementation(
            query_states, key_states, value_states, attention_mask, kwargs
        )
        if implementation in self.differential_functions:
            attn_output, attn_weights = self.attend(
                implementation, query_states, key_states, value_states, attention_mask, hidden_states, **kwargs
            )
        else:
            # Inference engines read this call in the source: one per layer, its interface under a local name, and the
            # scaling as written here. What they put in its place may return two dimensions, (tokens, 2HD).
            attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                implementation, llama_eager_attention_forward
            )
            check_engine_heads(kwargs.get("attention_instances"), self.layer_idx, query_states.shape[1])
            attn_output, attn_weights = attention_interface(
                self,
                place_queries(query_states, self.head_dim),  # (B, 2H, T, D)
                key_states,
                value_states,
                attention_mask,
                scaling=self.scaling,
                **kwargs,
            )
            attn_output = attn_output.reshape(*input_shape, -1, self.head_dim)  # (B, T, 2H, D)
            attn_output, attn_weights = self.combine(attn_output, attn_weights, hidden_states)

        attn_output = attn_output.to(hidden_states.dtype).reshape(*input_shape, -1)
        attn_output = self.o_proj(attn_output)
        return attn_output, attn_weights

    def choose_implementation(
        self,
        query_states: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[str, torch.Tensor | None]:
        """Returns the attention implementation of this call, and the mask as that one reads it."""
        implementation = self.config._attn_implementation
        if implementation != "eager" and kwargs.get("attention_maps_by_layer") is not None:
            raise ValueError(
                f"attention_maps_by_layer: attn_implementation={implementation!r} never holds whole maps; call "
                'set_attn_implementation("eager") first.'
            )
        if implementation == DEFAULT_ATTENTION:
            implementation, attention_mask = fastest_path(
                self, query_states, key_states, value_states, attention_mask, 2, kwargs.get("is_causal")
            )
        if implementation == "diff_chunked" and is_exporting():
            implementation = "sdpa"  # equal, and without a loop over blocks that would fix the exported length
        return implementation, attention_mask

    def attend(
        self,
        implementation: str,
        query_states: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        hidden_states: torch.Tensor,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Computes heads' outputs (B, T, H, D) by a function of this project.

        From `eager` the weights A1 - lambda A2 (B, H, T, S) come with them.
        """
        norm = self.fusable_norm() if implementation == "diff_triton" else {}
        attn_output, attn_weights = self.differential_functions[implementation](
            *(self, query_states, key_states, value_states, attention_mask),
            scaling=self.scaling,
            diff_lambda=self.compute_lambda(hidden_states),
            **norm,
            **kwargs,
        )
        return attn_output if norm else self.normalize(attn_output), attn_weights

    def combine(
        self, attn_output: torch.Tensor, attn_weights: torch.Tensor | None, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes heads' outputs (B, T, H, D) from both maps' of the one standard call, (B, T, 2H, D)."""
        return self.normalize(subtract_maps(attn_output, self.compute_lambda(hidden_states))), None

    def compute_lambda(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Computes lambda, () in V1, (B, T, H) in V2; float32 or wider."""
        if self.config.variant == "v1":
            return self.diff_lambda(hidden_states)
        lambda_logits = self.lambda_proj(hidden_states)
        return lambda_logits.to(torch.promote_types(lambda_logits.dtype, torch.float32)).sigmoid()

    def normalize(self, attn_output: torch.Tensor) -> torch.Tensor:
        """Applies (1 - lambda_init) RMSNorm over each head's D components in V1, nothing in V2."""
        if self.config.variant == "v2":
            return attn_output
        return (1 - self.diff_lambda.lambda_init) * self.sub_norm(attn_output)

    def fusable_norm(self) -> dict[str, torch.Tensor | float]:
        """Returns what a kernel needs to normalize itself; nothing without a norm, or where the module does more."""
        # An adapter replaces the module; tensor parallelism and offloading wrap its forward.
        if self.config.variant == "v2" or type(self.sub_norm) is not SubNorm or "forward" in vars(self.sub_norm):
            return {}
        scale = 1 - self.diff_lambda.lambda_init
        return {"norm_weight": self.sub_norm.weight, "norm_eps": self.sub_norm.eps, "norm_scale": scale}


class PairedLlamaAttention(DiffLlamaAttention):
    """
    LLaMA's attention in V1's weights and cache, for layers that are not differential: head i holds LLaMA's heads
    2i and 2i + 1 side by side, and each of its maps weighs its own half of the value.
    """

    differential_functions = {}

    def __init__(self, config: DiffLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.diff_lambda, self.sub_norm

    def choose_implementation(self, query_states, key_states, value_states, attention_mask, kwargs):
        """Returns the name as it is registered: without lambda, the project's own are plain attention."""
        kwargs.pop("attention_maps_by_layer", None)  # for differential layers; these maps are never subtracted
        return self.config._attn_implementation, attention_mask

    def combine(self, attn_output, attn_weights, hidden_states):
        """Takes from each map the half of the value that it weighs."""
        return own_halves(attn_output, self.map_dim), attn_weights


class MixedAttention(DiffLlamaAttention):
    """
    V1's attention where some heads are differential; the others hold LLaMA's heads, as in `PairedLlamaAttention`.

    Which ones are is a plain attribute, not a buffer, which loading on meta devices or casts could leave unset.
    """

    differential_functions = {}
    choose_implementation = PairedLlamaAttention.choose_implementation

    def __init__(self, config: DiffLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads = config.differential_heads_of(layer_idx)
        self.is_differential_head = [head in heads for head in range(config.num_attention_heads)]

    def keep_heads_of_rank(self, rank: int, num_ranks: int) -> None:
        """Keeps the heads that a rank of tensor parallelism holds, before its weights are sharded."""
        num_heads = len(self.is_differential_head) // num_ranks
        self.is_differential_head = self.is_differential_head[rank * num_heads : (rank + 1) * num_heads]

    def combine(self, attn_output, attn_weights, hidden_states):
        """Takes the normalized difference of differential heads, and both halves of the others."""
        difference, _ = super().combine(attn_output, attn_weights, hidden_states)
        if difference.shape[2] != len(self.is_differential_head):
            raise ValueError(
                f"differential_heads: layer {self.layer_idx} holds {difference.shape[2]} heads and knows of "
                f"{len(self.is_differential_head)} whether they are differential: ranks that share heads have to be "
                'those of transformers (tp_plan="auto"), or of the vLLM model that `pip install diff-llama` brings.'
            )
        runs = runs_of_heads(self.is_differential_head)
        return mix_heads(difference, own_halves(attn_output, self.map_dim), runs), attn_weights
