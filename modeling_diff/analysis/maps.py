"""
Attention maps of chosen layers, heads and tokens, computed beside the model in blocks of queries.

B batch, T tokens, S keys, H chosen heads, Q chosen queries, d map_dim.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .tokens import token_fault


LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")  # q_proj and k_proj, LLaMA's rotary embedding, one softmax
QK_NORMS = {"q_norm", "k_norm"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
DIFFERENTIAL_MODULES = {"diff_lambda", "sub_norm", "lambda_proj"}


@dataclass(frozen=True)
class LayerMaps:
    """
    A layer's softmax maps, float32 or wider; rows sum to 1, those of padding tokens to 0.

    Heads are differential heads where the layer subtracts, else query heads. Logits are scaled scores before softmax,
    -inf where masked, and None unless asked for.
    """

    layer: int
    heads: torch.Tensor  # (H,)
    queries: torch.Tensor  # (Q,) positions
    first: torch.Tensor  # (B, H, Q, S) A1, or LLaMA's A
    second: torch.Tensor | None = None  # (B, H, Q, S) A2
    diff_lambda: torch.Tensor | None = None  # (B, H, Q, 1)
    first_logits: torch.Tensor | None = None  # (B, H, Q, S)
    second_logits: torch.Tensor | None = None  # (B, H, Q, S)

    def difference(self) -> torch.Tensor:
        """A1 - lambda A2, what weighs the values (arXiv:2410.05258, eq. 1), or LLaMA's A: (B, H, Q, S)."""
        return self.first if self.second is None else self.first - self.diff_lambda * self.second


@dataclass(frozen=True)
class AttentionLayer:
    """A layer's attention module, and how many heads of which kind it has."""

    index: int
    module: Any
    num_heads: int
    is_differential: bool


Heads = Sequence[int] | Mapping[int, Sequence[int]]


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """
    The attention layers of a LLaMA-like or differential model, whatever heads or adapters it carries.

    Raises ValueError for a model whose maps are not known here.
    """
    decoder = decoder_of(model)
    known = (*LLAMA_LIKE, "diff_llama")
    if decoder.config.model_type not in known or not hasattr(decoder, "layers"):
        raise ValueError(
            f"{type(decoder).__name__} of model_type={decoder.config.model_type!r}: how it attends is not known here; "
            f"maps are those of {', '.join(known)}. transformers' own diffllama comes over with `diff-llama convert`."
        )
    return [_attention_layer(index, layer.self_attn) for index, layer in enumerate(decoder.layers)]


def decoder_of(model: Any) -> Any:
    """The model without its language head and without peft's wrapping; adapters stay, as they are in its modules."""
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"{type(model).__name__} with {model.active_peft_config.peft_type}: learned prompts are no tokens of "
                "the text; look at the model without them."
            )
        model = model.get_base_model()
    if not hasattr(model, "base_model") or not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__}: not a model of transformers; load one with AutoModel classes.")
    return model.base_model


def _attention_layer(index: int, module: Any) -> AttentionLayer:
    children = {name for name, _ in module.named_children()}
    if not children >= PROJECTIONS or children - PROJECTIONS - QK_NORMS - DIFFERENTIAL_MODULES:
        raise ValueError(
            f"{type(module).__name__} in layer {index} consists of {sorted(children)}: maps are computed from "
            f"{sorted(PROJECTIONS)} alone; load the model's ordinary attention."
        )
    num_maps = module.q_proj.out_features // _map_dim(module)
    is_differential = hasattr(module, "diff_lambda") or hasattr(module, "lambda_proj")
    return AttentionLayer(index, module, num_maps // 2 if is_differential else num_maps, is_differential)


def _map_dim(module: Any) -> int:
    return getattr(module, "map_dim", module.head_dim)


def visit_maps(
    model: nn.Module,
    input_ids: torch.Tensor,
    visit: Callable[[LayerMaps], None],
    *,
    attention_mask: torch.Tensor | None = None,
    layers: Sequence[int] | None = None,
    heads: Heads | None = None,
    queries: Sequence[int] | None = None,
    block: int = 256,
    logits: bool = False,
) -> None:
    """
    One forward pass over `input_ids` (B, T); `visit` gets each layer's maps, `block` queries at a time.

    Maps come from the module's own projections and rotary embedding, so the model itself may run any attention path;
    no more than one block of them is held. `attention_mask` (B, T) is 1 where a token is no padding; `heads` are
    those of every layer, or a mapping from layer to its heads; None is all. The model's training mode is left as it
    is.

    Raises ValueError for a model whose maps are not known, and for layers, heads, queries or lengths out of range.
    """
    chosen = _choose_layers(attention_layers(model), layers, heads)
    decoder = decoder_of(model)
    visible = _check_tokens(decoder.config, input_ids, attention_mask)
    positions = _choose(queries, input_ids.shape[1], "queries", "tokens")
    if block < 1:
        raise ValueError(f"block={block}: at least one query at a time.")
    with ExitStack() as hooks:
        for layer, layer_heads in chosen:
            _check_window(layer, input_ids.shape[1])

            def hook(module, args, kwargs, layer=layer, layer_heads=layer_heads):
                hidden_states = args[0] if args else kwargs["hidden_states"]
                embeddings = args[1] if len(args) > 1 else kwargs["position_embeddings"]
                rows = (layer, layer_heads, positions, visible, block, logits)
                for maps in _layer_blocks(hidden_states, embeddings, *rows):
                    visit(maps)

            handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        with torch.no_grad():
            decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def collect_maps(model: nn.Module, input_ids: torch.Tensor, **choices: Any) -> list[LayerMaps]:
    """
    The maps of `visit_maps`, with its choices and errors, one `LayerMaps` a layer.

    Holds B H Q S floats a layer and map: 537 MB for one head of 8192 tokens with all its queries and both its maps.
    """
    blocks: dict[int, list[LayerMaps]] = {}
    visit_maps(model, input_ids, lambda maps: blocks.setdefault(maps.layer, []).append(maps), **choices)
    return [_join(blocks.pop(layer)) for layer in sorted(blocks)]


def _join(blocks: list[LayerMaps]) -> LayerMaps:
    if len(blocks) == 1:
        return blocks[0]
    names = ("first", "second", "diff_lambda", "first_logits", "second_logits")
    parts = {name: [getattr(block, name) for block in blocks] for name in names}
    joined: dict[str, Any] = {name: torch.cat(part, dim=2) for name, part in parts.items() if part[0] is not None}
    return replace(blocks[0], queries=torch.cat([block.queries for block in blocks]), **joined)


def _layer_blocks(
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    layer: AttentionLayer,
    heads: list[int],
    positions: list[int],
    visible: torch.Tensor | None,
    block: int,
    logits: bool,
) -> Iterator[LayerMaps]:
    """What a layer attends to, from what enters it: (B, T, C) and cosines and sines (B or 1, T, d)."""
    module, device = layer.module, hidden_states.device
    chosen = torch.tensor(heads, device=device)
    maps = torch.stack((2 * chosen, 2 * chosen + 1), dim=1).flatten() if layer.is_differential else chosen
    key_states = _rotated(module, "k", hidden_states, position_embeddings)  # (B, S, 2K or K, d)
    keys = key_states[:, :, _key_of_map(module, maps, key_states.shape[2])].permute(0, 2, 3, 1)  # (B, maps, d, S)
    for rows in torch.tensor(positions, device=device).split(block):
        asking = hidden_states[:, rows]
        embeddings = tuple(part[:, rows] for part in position_embeddings)
        query_states = _rotated(module, "q", asking, embeddings)[:, :, maps].transpose(1, 2)
        with torch.autocast(device.type, enabled=False):
            scores = query_states @ keys * module.scaling  # (B, maps, Q, S)
            allowed = _allowed(rows, scores.shape[-1], visible)
            scores = scores.masked_fill_(~allowed, float("-inf"))
            # A row without any key would be NaN; other NaNs are the model's own and stay.
            attention = scores.softmax(-1).masked_fill_(~allowed, 0.0)
        yield _block(layer, chosen, rows, asking, attention, scores if logits else None)


def _block(
    layer: AttentionLayer,
    heads: torch.Tensor,
    rows: torch.Tensor,
    asking: torch.Tensor,
    attention: torch.Tensor,
    scores: torch.Tensor | None,
) -> LayerMaps:
    if not layer.is_differential:
        return LayerMaps(layer.index, heads, rows, attention, first_logits=scores)
    diff_lambda = layer.module.compute_lambda(asking)  # () in V1, (B, Q, all heads) in V2
    if diff_lambda.dim() == 3:
        diff_lambda = diff_lambda[:, :, heads].transpose(1, 2)[..., None]
    diff_lambda = diff_lambda.to(attention.dtype).expand(len(asking), len(heads), len(rows), 1)
    first_logits, second_logits = (None, None) if scores is None else (scores[:, 0::2], scores[:, 1::2])
    pair = (attention[:, 0::2], attention[:, 1::2])
    return LayerMaps(layer.index, heads, rows, *pair, diff_lambda, first_logits, second_logits)


def _rotated(
    module: Any, name: str, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Computes queries ("q") or keys ("k") of every map from (B, T, C): (B, T, maps, d), float32 or wider."""
    states = getattr(module, f"{name}_proj")(hidden_states).unflatten(-1, (-1, _map_dim(module)))
    if hasattr(module, f"{name}_norm"):
        states = getattr(module, f"{name}_norm")(states)
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    cos, sin = (part.to(states.dtype) for part in position_embeddings)
    return apply_rotary_pos_emb(states, states[:, :, :0], cos, sin, unsqueeze_dim=2)[0]


def _key_of_map(module: Any, maps: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Which of the layer's keys each map reads. In V1's weights a KV head has two, one for each map of a head."""
    num_maps = module.q_proj.out_features // _map_dim(module)
    groups = num_maps // num_keys
    if module.head_dim == _map_dim(module):
        return maps // groups
    return 2 * (maps // 2 // groups) + maps % 2


def _allowed(rows: torch.Tensor, num_keys: int, visible: torch.Tensor | None) -> torch.Tensor:
    """True where a query may look: (1 or B, 1, Q, S). A padding token looks nowhere."""
    allowed = (torch.arange(num_keys, device=rows.device) <= rows[:, None])[None, None]
    if visible is None:
        return allowed
    visible = visible.to(rows.device)
    return allowed & visible[:, None, None, :] & visible[:, None, rows, None]


def _check_tokens(config: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids of shape {tuple(input_ids.shape)}: give (batch, tokens) with at least one token.")
    if fault := token_fault(input_ids, config.vocab_size):
        raise ValueError(f"input_ids: {fault}.")
    limit = config.max_position_embeddings
    if input_ids.shape[1] > limit:
        raise ValueError(
            f"{input_ids.shape[1]} tokens, and the model reads max_position_embeddings={limit}: shorten the text."
        )
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: give one number a token, "
            f"{tuple(input_ids.shape)}, 1 or 0 for padding."
        )
    return attention_mask.bool()


def _check_window(layer: AttentionLayer, num_tokens: int) -> None:
    config_window = getattr(layer.module.config, "sliding_window", None)
    window = getattr(layer.module, "sliding_window", config_window)  # Qwen2 has one a layer
    if window is not None and window < num_tokens:
        raise ValueError(
            f"sliding_window={window} in layer {layer.index}: maps are those of full attention; give at most {window} "
            "tokens."
        )


def _choose_layers(
    layers: list[AttentionLayer], chosen: Sequence[int] | None, heads: Heads | None
) -> list[tuple[AttentionLayer, list[int]]]:
    if chosen is None and isinstance(heads, Mapping):
        chosen = list(heads)
    picked = []
    for index in _choose(chosen, len(layers), "layers", "layers"):
        of_layer = heads.get(index) if isinstance(heads, Mapping) else heads
        picked.append((layers[index], _choose(of_layer, layers[index].num_heads, "heads", f"heads in layer {index}")))
    return picked


def _choose(chosen: Sequence[int] | None, count: int, field: str, what: str) -> list[int]:
    if chosen is None:
        return list(range(count))
    picked = [int(index) for index in chosen]
    if not picked or len(set(picked)) < len(picked) or any(not 0 <= index < count for index in picked):
        raise ValueError(f"{field}={picked}: there are {count} {what}; list each once, from 0 to {count - 1}.")
    return picked
