"""Differential Transformer models for transformers; importing this registers them with the auto classes."""

from transformers import AutoConfig

from .configuration_diff_llama import DiffLlamaConfig
from .diff_attention import AttentionMaps, diff_attention_reference
from .modeling_diff_llama import (
    DiffLlamaForCausalLM,
    DiffLlamaForQuestionAnswering,
    DiffLlamaForSequenceClassification,
    DiffLlamaForTokenClassification,
    DiffLlamaModel,
    DiffLlamaPreTrainedModel,
)


__version__ = "0.1.0"
AutoConfig.register(DiffLlamaConfig.model_type, DiffLlamaConfig, exist_ok=True)


__all__ = [
    "AttentionMaps",
    "DiffLlamaConfig",
    "DiffLlamaForCausalLM",
    "DiffLlamaForQuestionAnswering",
    "DiffLlamaForSequenceClassification",
    "DiffLlamaForTokenClassification",
    "DiffLlamaModel",
    "DiffLlamaPreTrainedModel",
    "diff_attention_reference",
]
