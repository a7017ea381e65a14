"""
Attention maps of chosen layers, heads and tokens, computed next to the model in blocks of queries.

B batch, T tokens, S keys, H chosen heads, Q chosen queries, d map_dim, C hidden.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .tokens import visible_tokens


LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")  # q_proj and k_proj, LLaMA's rotary embedding, one softmax
QK_NORMS = {"q_norm", "k_norm"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
DIFFERENTIAL_MODULES = {"diff_lambda", "sub_norm", "lambda_proj"}


@dataclass(frozen=True)
class LayerMaps:
    """
    A layer's softmax maps in float32 or wider; weights of a query sum to 1, those of a padding token to 0.

    Heads are differential heads where the layer subtracts, else query heads. Logits are scaled scores before softmax,
    -inf where masked, and None unless asked for.

    Attributes:
        layer: The layer, from 0.
        heads: The chosen heads, (H,).
        queries: Positions of the chosen queries, (Q,).
        positive: A1, or LLaMA's A, (B, H, Q, S).
        negative: A2, (B, H, Q, S); None where the layer subtracts nothing.
        diff_lambda: lambda, (B, H, Q, 1); None where the layer subtracts nothing.
        positive_logits: Logits of A1, (B, H, Q, S).
        negative_logits: Logits of A2, (B, H, Q, S).
    """

    layer: int
    heads: torch.Tensor
    queries: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor | None = None
    diff_lambda: torch.Tensor | None = None
    positive_logits: torch.Tensor | None = None
    negative_logits: torch.Tensor | None = None

    def difference(self) -> torch.Tensor:
        """Returns A1 - lambda A2, what weighs the values (arXiv:2410.05258, eq. 1), or LLaMA's A: (B, H, Q, S)."""
        if self.negative is None:
            return self.positive
        return self.positive - self.diff_lambda * self.negative


@dataclass(frozen=True)
class AttentionLayer:
    """
    A layer's attention module with the number and kind of its heads.

    Attributes:
        index: The layer, from 0.
        module: The attention module.
        num_heads: Differential heads where the layer subtracts, else query heads.
        is_differential: Whether the layer subtracts a negative map, in some heads at least.
        heads_with_maps: The heads whose maps are computed: all, or the differential ones where only some heads are.
    """

    index: int
    module: Any
    num_heads: int
    is_differential: bool
    heads_with_maps: tuple[int, ...]


Heads = Sequence[int] | Mapping[int, Sequence[int]]


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """
    Finds the attention layers of a LLaMA-like or differential model, whatever heads or adapters it carries.

    Args:
        model: A model of transformers or of this project, or one that PEFT wrapped.

    Returns:
        The layers in their order.

    Raises:
        ValueError: The model's maps are not known here.
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
    """Returns the model without its language head and without PEFT's wrapper; adapters stay in its modules."""
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"{type(model).__name__} with {model.active_peft_config.peft_type}: learned prompts are not tokens of "
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
    num_heads = num_maps // 2 if is_differential else num_maps
    heads = list(range(num_heads))
    if hasattr(module, "is_differential_head"):
        heads = [head for head in heads if module.is_differential_head[head]]
    return AttentionLayer(index, module, num_heads, is_differential, tuple(heads))


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
    Computes maps in one forward pass, and hands them over in blocks.

    Maps come from the module's own projections and rotary embedding, so the model itself may run any attention path.
    Only one block is held at a time. The model's training mode is unchanged.

    Args:
        model: A LLaMA-like or differential model.
        input_ids: Texts, (B, T).
        visit: Called with each block, layer by layer.
        attention_mask: 0 for padding, else 1, (B, T). Defaults to no padding.
        layers: The layers. Defaults to all, or to those that `heads` names.
        heads: The heads of every layer, or a mapping from layer to its heads. Defaults to all; where only some of them
            are differential, to these, as maps of the others are not computed.
        queries: Positions of queries. Defaults to all.
        block: Queries per block, at least 1.
        logits: Whether blocks hold logits as well.

    Raises:
        ValueError: The model's maps are not known, or layers, heads, queries or lengths are out of range.
    """
    chosen = _choose_layers(attention_layers(model), layers, heads)
    decoder = decoder_of(model)
    visible = visible_tokens(decoder.config, input_ids, attention_mask)
    positions = _choose(queries, input_ids.shape[1], "queries", "tokens")
    if block < 1:
        raise ValueError(f"block={block}: at least one query at a time.")
    settings: dict[str, Any] = {"positions": positions, "visible": visible, "block": block, "logits": logits}
    with ExitStack() as hooks:
        for layer, layer_heads in chosen:
            _check_window(layer, input_ids.shape[1])

            def hook(module, args, kwargs, layer=layer, layer_heads=layer_heads):
                hidden_states = args[0] if args else kwargs["hidden_states"]
                embeddings = args[1] if len(args) > 1 else kwargs["position_embeddings"]
                for maps in _layer_blocks(hidden_states, embeddings, layer=layer, heads=layer_heads, **settings):
                    visit(maps)

            handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        with torch.no_grad():
            decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def collect_maps(model: nn.Module, input_ids: torch.Tensor, **choices: Any) -> list[LayerMaps]:
    """
    Computes maps and returns all of them.

    This holds B H Q S floats per layer and map: 537 MB for one head of 8192 tokens with all queries and both maps.

    Args:
        model: A LLaMA-like or differential model.
        input_ids: Texts, (B, T).
        choices: Keyword arguments of `visit_maps`.

    Returns:
        One entry per chosen layer.

    Raises:
        ValueError: As `visit_maps`.
    """
    blocks: dict[int, list[LayerMaps]] = {}
    visit_maps(model, input_ids, lambda maps: blocks.setdefault(maps.layer, []).append(maps), **choices)
    return [_join(blocks.pop(layer)) for layer in sorted(blocks)]


def _join(blocks: list[LayerMaps]) -> LayerMaps:
    if len(blocks) == 1:
        return blocks[0]
    names = ("positive", "negative", "diff_lambda", "positive_logits", "negative_logits")
    parts = {name: [getattr(block, name) for block in blocks] for name in names}
    joined: dict[str, Any] = {name: torch.cat(part, dim=2) for name, part in parts.items() if part[0] is not None}
    return replace(blocks[0], queries=torch.cat([block.queries for block in blocks]), **joined)


def _layer_blocks(
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    *,
    layer: AttentionLayer,
    heads: list[int],
    positions: list[int],
    visible: torch.Tensor | None,
    block: int,
    logits: bool,
) -> Iterator[LayerMaps]:
    """Computes a layer's maps from its input (B, T, C) and from cosines and sines (B or 1, T, d)."""
    module = layer.module
    device = hidden_states.device
    chosen = torch.tensor(heads, device=device)
    maps = torch.stack((2 * chosen, 2 * chosen + 1), dim=1).flatten() if layer.is_differential else chosen
    key_states = _rotated(module, "k", hidden_states, position_embeddings)  # (B, S, 2K or K, d)
    keys = key_states[:, :, _key_of_map(module, maps, key_states.shape[2])].permute(0, 2, 3, 1)  # (B, maps, d, S)
    for queries in torch.tensor(positions, device=device).split(block):
        query_inputs = hidden_states[:, queries]
        embeddings = tuple(part[:, queries] for part in position_embeddings)
        query_states = _rotated(module, "q", query_inputs, embeddings)[:, :, maps].transpose(1, 2)
        with torch.autocast(device.type, enabled=False):
            scores = query_states @ keys * module.scaling  # (B, maps, Q, S)
            allowed = _allowed(queries, scores.shape[-1], visible)
            scores = scores.masked_fill_(~allowed, float("-inf"))
            # A query without any key would be NaN; other NaNs are the model's own and stay.
            attention = scores.softmax(-1).masked_fill_(~allowed, 0.0)
        kept = scores if logits else None
        found = LayerMaps(layer.index, chosen, queries, positive=attention, positive_logits=kept)
        yield _split_pairs(found, module, query_inputs) if layer.is_differential else found


def _split_pairs(found: LayerMaps, module: Any, query_inputs: torch.Tensor) -> LayerMaps:
    """Splits maps (B, 2H, Q, S) of a differential layer into A1 and A2, and adds lambda of the queries (B, Q, C)."""
    diff_lambda = module.compute_lambda(query_inputs)  # () in V1, (B, Q, all heads) in V2
    if diff_lambda.dim() == 3:
        diff_lambda = diff_lambda[:, :, found.heads].transpose(1, 2)[..., None]
    attention = found.positive
    logits = found.positive_logits
    return replace(
        found,
        positive=attention[:, 0::2],
        negative=attention[:, 1::2],
        diff_lambda=diff_lambda.to(attention.dtype).expand(len(query_inputs), len(found.heads), len(found.queries), 1),
        positive_logits=None if logits is None else logits[:, 0::2],
        negative_logits=None if logits is None else logits[:, 1::2],
    )


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
    """Returns which of the layer's keys each map reads. In V1 a KV head has two, one for each map of a head."""
    num_maps = module.q_proj.out_features // _map_dim(module)
    groups = num_maps // num_keys
    if module.head_dim == _map_dim(module):
        return maps // groups
    return 2 * (maps // 2 // groups) + maps % 2


def _allowed(queries: torch.Tensor, num_keys: int, visible: torch.Tensor | None) -> torch.Tensor:
    """Returns True where a query may attend, (1 or B, 1, Q, S). A padding token attends to nothing."""
    allowed = (torch.arange(num_keys, device=queries.device) <= queries[:, None])[None, None]
    if visible is None:
        return allowed
    visible = visible.to(queries.device)
    return allowed & visible[:, None, None, :] & visible[:, None, queries, None]


def _check_window(layer: AttentionLayer, num_tokens: int) -> None:
    config_window = getattr(layer.module.config, "sliding_window", None)
    window = getattr(layer.module, "sliding_window", config_window)  # Qwen2 has one per layer
    if window is not None and window < num_tokens:
        raise ValueError(
            f"sliding_window={window} in layer {layer.index}: maps are those of full attention; give at most {window} "
            "tokens."
        )


def _choose_layers(
    layers: list[AttentionLayer], chosen: Sequence[int] | None, heads: Heads | None
) -> list[tuple[AttentionLayer, list[int]]]:
    if chosen is None:
        chosen = list(heads) if isinstance(heads, Mapping) else range(len(layers))
    picked = []
    for index in _choose(chosen, len(layers), "layers", "layers"):
        layer = layers[index]
        of_layer = heads.get(index) if isinstance(heads, Mapping) else heads
        if of_layer is None:
            of_layer = layer.heads_with_maps
        of_layer = _choose(of_layer, layer.num_heads, "heads", f"heads in layer {index}")
        if not set(of_layer) <= set(layer.heads_with_maps):
            raise ValueError(
                f"heads={of_layer}: in layer {index} only heads {list(layer.heads_with_maps)} are differential, and "
                "maps of the others are not computed."
            )
        picked.append((layer, of_layer))
    return picked


def _choose(chosen: Sequence[int] | None, count: int, field: str, what: str) -> list[int]:
    if chosen is None:
        return list(range(count))
    picked = [int(index) for index in chosen]
    if not picked or len(set(picked)) < len(picked) or any(not 0 <= index < count for index in picked):
        raise ValueError(f"{field}={picked}: there are {count} {what}; list each once, from 0 to {count - 1}.")
    return picked
