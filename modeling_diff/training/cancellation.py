"""
Cancellation: how much of the positive map the negative one takes away, measured inside a training step.

B batch, T queries, S keys, H heads, K key-value heads, d map_dim.
"""

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_diff.diff_attention import attention_maps, lambda_over_maps
from modeling_diff.diff_attention_triton_interface import is_key_ranges, mask_of_key_ranges

from .lambda_values import in_training, layer_lambda, trained_module


class CancelledShare:
    """
    Share of attention cancelled in one layer: the sum over keys of min(A1, lambda A2).

    It lies between 0 and lambda, as A1 sums to 1, and is 0 where lambda is negative. It is the mean over differential
    heads and evenly spaced queries of the first sequence of the first batch after `measure`. It is computed from the
    outputs of the projections in that forward pass, so adapters count.

    Args:
        attention: A differential attention module, which gets forward hooks (`hooks`).
        num_queries: The largest number of queries.

    Attributes:
        value: The share, a scalar tensor; None before the first measurement.
    """

    def __init__(self, attention: Any, num_queries: int = 64):
        self.num_queries = num_queries
        self.due = True
        self.value: torch.Tensor | None = None
        self.seen: dict[str, torch.Tensor] = {}
        self.names = [name for name in ("q_proj", "k_proj", "lambda_proj") if hasattr(attention, name)]
        self.hooks = [getattr(attention, name).register_forward_hook(self.keep(name)) for name in self.names]
        self.hooks.append(attention.register_forward_hook(self.after_attention, with_kwargs=True))

    def measure(self) -> None:
        """Requests a measurement in the next forward pass of training."""
        self.due = True

    def keep(self, name: str) -> Any:
        """Returns a forward hook that keeps the first sequence of a projection's output."""

        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            if self.due and in_training(module):
                self.seen[name] = output.detach()[:1]

        return hook

    @torch.no_grad()
    def after_attention(self, attention: Any, inputs: tuple, settings: dict[str, Any], output: Any) -> None:
        """Computes the share once all projections have been seen, as a forward hook."""
        if self.seen.keys() != set(self.names):
            return
        states = [self.seen[name].unflatten(-1, (-1, attention.map_dim)) for name in ("q_proj", "k_proj")]
        if attention.config.use_qk_norm:
            states = [attention.q_norm(states[0]), attention.k_norm(states[1])]
        cos, sin = (part[:1] for part in settings["position_embeddings"])
        query, key = apply_rotary_pos_emb(*states, cos, sin, unsqueeze_dim=2)  # (1, T, 2H, d), (1, T, 2K or K, d)
        num_tokens = query.shape[1]
        positions = torch.linspace(0, num_tokens - 1, min(num_tokens, self.num_queries), device=query.device).long()
        key = key.reshape(1, num_tokens, -1, attention.head_dim).transpose(1, 2)
        mask = visible(settings.get("attention_mask"), positions, num_tokens)
        query = query[:, positions].transpose(1, 2)
        positive, negative = attention_maps(query, key, mask, scaling=attention.scaling)
        if "lambda_proj" in self.seen:
            diff_lambda = lambda_over_maps(self.seen["lambda_proj"][:, positions].to(positive.dtype).sigmoid())
        else:
            diff_lambda = positive.new_tensor(layer_lambda(trained_module(attention.diff_lambda)))
        cancelled = torch.minimum(positive, diff_lambda.clamp(min=0) * negative).sum(-1)  # (1, H, T)
        if hasattr(attention, "is_differential_head"):
            cancelled = cancelled[:, attention.is_differential_head]
        self.value = cancelled.mean() if cancelled.numel() else None  # a rank may hold none
        self.due = False
        self.seen = {}


def visible(attention_mask: Any, queries: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Returns which keys each query sees in the first sequence, (1, 1, T, S); causal where the mask does not say more.

    Args:
        attention_mask: As any implementation gets it: of four dimensions, key ranges for kernels, or a `BlockMask`.
        queries: Positions of the queries, (T,).
        num_tokens: Length of the sequence.
    """
    keys = torch.arange(num_tokens, device=queries.device)
    if isinstance(attention_mask, BlockMask):
        zero = queries.new_zeros(())  # the first sequence, and its first head
        return attention_mask.mask_mod(zero, zero, queries[:, None], keys)[None, None]
    if attention_mask is not None and attention_mask.dim() == 4:
        if is_key_ranges(attention_mask):
            attention_mask = mask_of_key_ranges(attention_mask, num_tokens, num_tokens, is_causal=True)
        return attention_mask[:1, :, queries, :num_tokens]
    return (keys <= queries[:, None])[None, None]
