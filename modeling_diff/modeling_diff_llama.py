"""
The Differential Transformer as its difference from transformers' LLaMA, in LLaMA's class order.

B batch, T tokens, S keys, H heads, d map_dim, C hidden size.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_diff_llama import DiffLlamaConfig
from .diff_adapters import check_adapter_to_load, check_adapters_in_state
from .diff_attention_modules import (
    DEFAULT_ATTENTION,
    DiffLambda,
    DiffLlamaAttention,
    MixedAttention,
    PairedLlamaAttention,
    PlainAttention,
    PlainNormedAttention,
)
from .diff_attention_triton import triton_can_run
from .diff_engines import prepare_for_engine
from .diff_parallel import check_tensor_parallel_size, keep_heads_of_rank
from .diff_saved_card import retire_card
from .diff_transformers_check import check_behavior_when_used


if TYPE_CHECKING:
    # From a local folder, transformers 5.6 copies the files that this one names, not those that they name in turn.
    from .diff_attention import place_queries  # noqa: F401
    from .diff_attention_auto import fastest_path  # noqa: F401
    from .diff_attention_chunked import chunked_attention_forward  # noqa: F401
    from .diff_attention_chunked_blocks import Blocks  # noqa: F401
    from .diff_attention_triton_backward_kernels import bwd_pre_kernel  # noqa: F401
    from .diff_attention_triton_check import kernels_agree  # noqa: F401
    from .diff_attention_triton_interface import fused_attention_forward  # noqa: F401
    from .diff_attention_triton_kernels import fwd_kernel  # noqa: F401
    from .diff_attention_triton_launches import launch_forward  # noqa: F401
    from .diff_attention_triton_tiles import padded_widths  # noqa: F401
    from .diff_llama_fields import shared_fields  # noqa: F401
    from .diff_sub_norm import SubNorm  # noqa: F401
    from .diff_transformers_compat import append_to_cache  # noqa: F401


# Adapters train these in full, which quantized weights cannot be.
NEVER_QUANTIZED = {".*lambda_proj", "score", "qa_outputs"}


class DiffLlamaRotaryEmbedding(LlamaRotaryEmbedding):
    """LLaMA's rotary embedding for maps: it rotates the d components of every map."""

    def __init__(self, config: DiffLlamaConfig):
        super().__init__(config.rotary_config())


class DiffLlamaDecoderLayer(LlamaDecoderLayer):
    """LLaMA's layer around the attention that the config names for it."""

    def __init__(self, config: DiffLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        attention_class: type[PlainAttention]
        if config.is_mixed(layer_idx):
            attention_class = MixedAttention
        elif config.is_differential(layer_idx):
            attention_class = DiffLlamaAttention
        elif config.variant == "v1":
            attention_class = PairedLlamaAttention
        else:
            attention_class = PlainNormedAttention if config.use_qk_norm else PlainAttention
        self.self_attn = attention_class(config, layer_idx)


class DiffLlamaPreTrainedModel(LlamaPreTrainedModel):
    """
    Holds what the heads share: how weights are initialized, loaded, quantized and saved.

    V1 is that of arXiv:2410.05258, V2 that of Microsoft's note of January 2026. Initial values:

    | parameter | distribution |
    |---|---|
    | `diff_lambda.lambda_{q1,k1,q2,k2}` (V1) | N(0, `lambda_init_std`) |
    | `sub_norm.weight` (V1), all other norms | 1 |
    | `lambda_proj.weight` (V2), all projections, embeddings | N(0, `initializer_range`) |
    | biases | 0 |

    Args:
        config: The model's config.
    """

    config: DiffLlamaConfig
    _no_split_modules = ["DiffLlamaDecoderLayer"]
    _keep_in_fp32_modules_strict = {"diff_lambda"}
    _can_record_outputs = {"hidden_states": DiffLlamaDecoderLayer, "attentions": LlamaAttention}

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention == "diff_triton" and (reason := triton_can_run("cuda")) is not None:
            raise ImportError(f'attn_implementation="diff_triton" cannot run here: {reason}.')
        return super().get_correct_attn_implementation(requested_attention or DEFAULT_ATTENTION, is_init_check)

    def post_init(self):
        if self.config.variant == "v2":
            self._keep_in_fp32_modules_strict = set()  # no lambda vectors
        if getattr(self.config, "quantization_config", None) is not None:
            self._keep_in_fp32_modules = NEVER_QUANTIZED  # every quantizer leaves alone what it finds here
        super().post_init()

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name not in NEVER_QUANTIZED}

    def load_adapter(self, peft_model_id=None, adapter_name=None, peft_config=None, adapter_state_dict=None, **kwargs):
        """Loads an adapter as transformers does, but refuses one made for another model, such as the LLaMA."""
        check_adapter_to_load(self, peft_model_id, peft_config, adapter_state_dict, **kwargs)
        return super().load_adapter(peft_model_id, adapter_name, peft_config, adapter_state_dict, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        check_adapters_in_state(self, state_dict, prefix)  # on this road PEFT brings an adapter's weights
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """Saves as transformers does; a conversion's card in that folder is retired, as it is of other weights."""
        if is_main_process:
            retire_card(Path(save_directory))  # before: it must not outlive its weights if this is stopped half-way
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh):
        if distributed_config is not None and mesh is not None:
            check_tensor_parallel_size(model.config, distributed_config.tp_size)
            if distributed_config.tp_size > 1:
                keep_heads_of_rank(model, mesh)
        return super().maybe_distribute_model(model, distributed_config, mesh)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DiffLambda):
            for parameter in module.parameters():
                init.normal_(parameter, mean=0.0, std=self.config.lambda_init_std)


class DiffLlamaModel(DiffLlamaPreTrainedModel, LlamaModel):
    """
    Computes hidden states: LLaMA's decoder with (A1 - lambda A2) V for attention (arXiv:2410.05258, eq. 1).

    `forward` takes what LLaMA's takes: `input_ids` (B, T) or `inputs_embeds` (B, T, C); `attention_mask` (B, S), 1 for
    visible; `position_ids` (B, T), in a packed row from 0 in every document; `use_cache` and `cache` (before
    transformers 5.24 `past_key_values`). It returns `last_hidden_state` (B, T, C), the cache, and on request
    `hidden_states`. With `attn_implementation="eager"`, `attentions` are A1 - lambda A2, (B, H, T, S), and a
    dictionary given as `attention_maps_by_layer` receives both maps of each differential layer as `AttentionMaps`.

    Args:
        config: The model's config. `attn_implementation`, a keyword of `from_pretrained` as well, is `diff_auto` by
            default: the fastest exact path of each call.

    Raises:
        ValueError: Fields of the config that were set since it was built do not go together.
        ImportError: `diff_triton` was asked for and cannot run here, or the installed transformers is newer than any
            that was tested and fails the check on a tiny model.
    """

    def __init__(self, config: DiffLlamaConfig):
        config.check()  # its fields may have been set since it was built
        prepare_for_engine(config)
        super(LlamaModel, self).__init__(config)  # not LlamaModel's, which would build and initialize LLaMA's layers
        check_behavior_when_used(self, DiffLlamaForCausalLM)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [DiffLlamaDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DiffLlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


# GenerationMixin is named again because transformers looks for it among the direct bases.
class DiffLlamaForCausalLM(DiffLlamaPreTrainedModel, LlamaForCausalLM, GenerationMixin):
    """
    Predicts the next token, and generates as every causal language model of transformers.

    `forward` takes what `DiffLlamaModel` takes, `labels` (B, T) with -100 where there is no loss, and
    `logits_to_keep`, the number of last positions to compute logits of. It returns `logits` (B, T, vocab_size), with
    labels the mean `loss` in nats/token, and what `DiffLlamaModel` returns but for the last hidden states.

    Args:
        config: The model's config.
    """

    def __init__(self, config: DiffLlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = DiffLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs):
        """Paged caches are written inside transformers' attention calls, so batches run through the standard call."""
        if self.config._attn_implementation.startswith("diff_"):
            self.set_attn_implementation("sdpa")
        return super().init_continuous_batching(*args, **kwargs)

    @contextmanager
    def continuous_batching_context_manager(self, *args, **kwargs):
        implementation = self.config._attn_implementation
        try:
            with super().continuous_batching_context_manager(*args, **kwargs) as manager:
                yield manager
        finally:
            self.set_attn_implementation(implementation)


# The three generic heads name their backbone, as their parents' constructors ask AutoModel for it: that looks up the
# config's class, and code loaded from a folder holds two, one imported as the config and one next to the model.
class DiffLlamaForSequenceClassification(GenericForSequenceClassification, DiffLlamaPreTrainedModel):
    """
    Classifies sequences, or gives them numbers, by their last token that is no padding.

    `forward` takes what `DiffLlamaModel` takes, and `labels` (B,): classes, or numbers where `num_labels` is 1. It
    returns `logits` (B, num_labels) and, with labels, the `loss`. Batches of several sequences need `pad_token_id`.

    Args:
        config: The model's config, with `num_labels`.
    """

    def __init__(self, config: DiffLlamaConfig):
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = DiffLlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class DiffLlamaForQuestionAnswering(GenericForQuestionAnswering, DiffLlamaPreTrainedModel):
    """
    Finds where in a text an answer begins and ends.

    `forward` takes what `DiffLlamaModel` takes, and `start_positions` and `end_positions` (B,). It returns
    `start_logits` and `end_logits` (B, T) and, with positions, the mean of both losses.

    Args:
        config: The model's config.
    """

    def __init__(self, config: DiffLlamaConfig):
        super(GenericForQuestionAnswering, self).__init__(config)
        self.model = DiffLlamaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


class DiffLlamaForTokenClassification(GenericForTokenClassification, DiffLlamaPreTrainedModel):
    """
    Classifies every token.

    `forward` takes what `DiffLlamaModel` takes, and `labels` (B, T) with -100 where there is no loss. It returns
    `logits` (B, T, num_labels) and, with labels, the mean `loss`.

    Args:
        config: The model's config, with `num_labels` and, if it is not to be 0.1, `classifier_dropout`.
    """

    def __init__(self, config: DiffLlamaConfig):
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = DiffLlamaModel(config)
        dropouts = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in dropouts if rate is not None), 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


# Here and not in __init__.py, which stays behind: without an entry under this very class, AutoModel would
# find transformers' own DiffLlama by the config's class name.
for auto_class, model_class in (
    (AutoModel, DiffLlamaModel),
    (AutoModelForCausalLM, DiffLlamaForCausalLM),
    (AutoModelForSequenceClassification, DiffLlamaForSequenceClassification),
    (AutoModelForTokenClassification, DiffLlamaForTokenClassification),
    (AutoModelForQuestionAnswering, DiffLlamaForQuestionAnswering),
):
    auto_class.register(DiffLlamaConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)


__all__ = [
    "DiffLlamaForCausalLM",
    "DiffLlamaForQuestionAnswering",
    "DiffLlamaForSequenceClassification",
    "DiffLlamaForTokenClassification",
    "DiffLlamaModel",
    "DiffLlamaPreTrainedModel",
]
