"""
The native vLLM model: vLLM's LLaMA with differential attention, in one attention layer with 2H query heads.

T tokens of all sequences, H heads and K key-value heads of this rank, d map_dim, D head_dim, C hidden size.
"""

from collections.abc import Iterable
from typing import Any

import torch
import vllm
from torch import nn

from ..configuration_diff_llama import DiffLlamaConfig
from ..diff_attention import mix_heads, own_halves, place_queries, runs_of_heads, subtract_maps
from ..diff_attention_modules import DiffLambda
from ..diff_parallel import check_tensor_parallel_size
from ..diff_sub_norm import SubNorm
from .quantized_weights import with_whole_lambda
from .versions import unsupported_vllm


try:
    from vllm.config import VllmConfig
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
    from vllm.model_executor.models.utils import extract_layer_index
except ImportError as error:
    raise ImportError(unsupported_vllm(vllm.__version__, error)) from error


class DiffLlamaAttention(nn.Module):
    """
    Both maps of every head in one call, subtracted after it; the cache is as wide as LLaMA's.

    Layers that are not differential ask with 2H heads as well, as engines plan their kernels once for all layers.
    """

    def __init__(
        self,
        config: DiffLlamaConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int = 8192,
        quant_config: Any = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: Any = None,
        prefix: str = "",
        attn_type: Any = None,
    ):
        super().__init__()
        layer_idx = extract_layer_index(prefix)
        tp_size = get_tensor_model_parallel_world_size()
        check_tensor_parallel_size(config, tp_size)
        self.variant = config.variant
        self.is_differential = config.is_differential(layer_idx)
        self.num_heads = num_heads // tp_size
        first = get_tensor_model_parallel_rank() * self.num_heads
        differential = config.differential_heads_of(layer_idx)
        self.head_runs = runs_of_heads([head in differential for head in range(first, first + self.num_heads)])
        self.is_mixed = config.is_mixed(layer_idx)
        self.map_dim = config.map_dim
        self.head_dim = config.head_dim
        # Queries in widths of D: in V1 both maps of a head together, in V2 one map.
        total_num_queries = num_heads * (2 if self.variant == "v2" and self.is_differential else 1)
        self.q_size = total_num_queries // tp_size * self.head_dim
        self.kv_size = num_kv_heads // tp_size * self.head_dim

        self.qkv_proj = QKVParallelLinear(
            hidden_size=hidden_size,
            head_size=self.head_dim,
            total_num_heads=total_num_queries,
            total_num_kv_heads=num_kv_heads,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            input_size=num_heads * self.head_dim,
            output_size=hidden_size,
            bias=config.attention_out_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.use_qk_norm = config.use_qk_norm
        if self.use_qk_norm:
            self.q_norm = RMSNorm(self.map_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.map_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            self.map_dim,
            max_position=max_position_embeddings,
            rope_parameters=config.rope_parameters,
            is_neox_style=True,
        )
        self.attn = Attention(
            2 * self.num_heads,
            self.head_dim,
            self.map_dim**-0.5,
            num_kv_heads=num_kv_heads // tp_size,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        if self.is_differential and self.variant == "v2":
            self.lambda_proj = ColumnParallelLinear(
                hidden_size, num_heads, bias=config.lambda_bias, quant_config=None, prefix=f"{prefix}.lambda_proj"
            )
        elif self.is_differential:
            self.diff_lambda = DiffLambda(config, layer_idx)  # float32 whatever the model's dtype
            self.sub_norm = SubNorm(self.head_dim, eps=config.layer_sub_norm_eps(layer_idx))

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.use_qk_norm:
            query = self.q_norm(query.unflatten(-1, (-1, self.map_dim))).flatten(1)
            key = self.k_norm(key.unflatten(-1, (-1, self.map_dim))).flatten(1)
        query, key = self.rotary_emb(positions, query, key)  # maps of width d, as they come
        query = query.reshape(-1, self.q_size // self.map_dim, 1, self.map_dim)  # (T, 2H, 1, d)
        if self.variant == "v2" and not self.is_differential:
            query = query.repeat_interleave(2, dim=1)
        query = place_queries(query, self.head_dim).flatten(1)  # (T, 2HD)
        attn_output = self.attn(query, key, value).view(-1, 2 * self.num_heads, self.head_dim)
        attn_output = self.combine(attn_output, hidden_states).to(hidden_states.dtype)  # (T, H, D)
        output, _ = self.o_proj(attn_output.flatten(1))
        return output

    def combine(self, attn_output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Computes heads' outputs (T, H, D) from those of the positive and the negative map, (T, 2H, D)."""
        attn_output = attn_output.unsqueeze(1)  # (T, 1, 2H, D)
        if not self.is_differential:
            return own_halves(attn_output, self.map_dim).squeeze(1)  # in V2 both maps are equal
        if self.variant == "v1":
            diff_lambda = self.diff_lambda()
        else:
            lambda_logits, _ = self.lambda_proj(hidden_states)
            diff_lambda = lambda_logits.float().sigmoid().unsqueeze(1)  # (T, 1, H)
        heads = subtract_maps(attn_output, diff_lambda)
        if self.variant == "v1":
            heads = (1 - self.diff_lambda.lambda_init) * self.sub_norm(heads)
        if self.is_mixed:
            heads = mix_heads(heads, own_halves(attn_output, self.map_dim), self.head_runs)
        return heads.squeeze(1)


class DiffLlamaDecoderLayer(LlamaDecoderLayer):
    """vLLM's LLaMA layer around differential attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None):
        super().__init__(vllm_config, prefix, config, attn_layer_type=DiffLlamaAttention)


class DiffLlamaForCausalLM(LlamaForCausalLM):
    """V1 and V2, whichever heads are differential; weights load under the names of the checkpoint, as LLaMA's do."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        if not isinstance(config, DiffLlamaConfig):  # of the checkpoint's own code, which may be older
            vllm_config.model_config.hf_config = DiffLlamaConfig.from_dict(config.to_dict())
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=DiffLlamaDecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(with_whole_lambda(weights))
