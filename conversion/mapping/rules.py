"""One rule per tensor of the target, for each conversion, made from the table and the layouts of `layout.py`."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from conversion.mapping.heads import HeadPairing, Sizes
from conversion.mapping.layout import (
    Keep,
    Transform,
    halves_layout,
    interleaved_layout,
    llama_tensors,
    mirrored_layout,
    paired_layout,
)


LAMBDA_VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


@dataclass(frozen=True)
class Rule:
    """How one tensor of the target comes about: `build(*sources)`, in the dtype of the source's tensor `dtype_of`.

    `sources` are names and shapes, none for a new tensor. `dtype_of` None means float32 whatever the model's dtype is.
    """

    target: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    build: Callable[..., torch.Tensor]
    dtype_of: str | None


def llama_v1_rules(
    sizes: Sizes,
    pairings: Sequence[HeadPairing],
    layers: Collection[int],
    norm_weights: Sequence[float],
    lambda_std: float,
    seed: int,
) -> list[Rule]:
    """LLaMA -> V1. Layers not in `layers` are paired as well and get no new tensors: they stay LLaMA's attention.

    The lambda vectors are such that their exponentials cancel exactly while gradients live; `norm_weights`, one a
    layer, fill `sub_norm.weight`.
    """
    counts = sizes.num_heads, sizes.num_kv_heads, sizes.map_dim
    rules = _transform_rules(sizes, [paired_layout(pairing, *counts) for pairing in pairings])
    for layer in sorted(layers):
        for name in LAMBDA_VECTORS:
            drawn_as = _attention(layer, f"diff_lambda.{name[:-1]}1")
            target = _attention(layer, f"diff_lambda.{name}")
            rules.append(_random_rule(target, (sizes.map_dim,), lambda_std, f"{seed}:{drawn_as}"))
        like = _attention(layer, "o_proj.weight")
        norm = _attention(layer, "sub_norm.weight")
        rules.append(_constant_rule(norm, (2 * sizes.map_dim,), norm_weights[layer], like))
    return rules


def llama_v2_rules(sizes: Sizes, layers: Collection[int], lambda_bias: float | None) -> list[Rule]:
    """LLaMA -> V2. lambda_proj starts at zero, so lambda is sigmoid(lambda_bias), and 1/2 without a bias (None)."""
    mirrored = mirrored_layout(sizes.num_heads, sizes.map_dim, lambda_bias or 0.0)
    rules = _transform_rules(sizes, [mirrored if layer in layers else {} for layer in range(sizes.num_layers)])
    for layer in sorted(layers):
        like = _attention(layer, "q_proj.weight")
        weight, bias = _attention(layer, "lambda_proj.weight"), _attention(layer, "lambda_proj.bias")
        rules.append(_constant_rule(weight, (sizes.num_heads, sizes.hidden_size), 0.0, like))
        if lambda_bias is not None:
            rules.append(_constant_rule(bias, (sizes.num_heads,), lambda_bias, like))
    return rules


def diffllama_rules(sizes: Sizes) -> list[Rule]:
    """transformers' `diffllama` -> V1. It has no norm weight: ours is all ones."""
    layout = halves_layout(sizes.num_heads, sizes.num_kv_heads, sizes.map_dim)
    rules = _transform_rules(sizes, [layout] * sizes.num_layers)
    for layer in range(sizes.num_layers):
        rules += [_copy_lambda(sizes, layer, f"diff_lambda.{name}", name) for name in LAMBDA_VECTORS]
        like = _attention(layer, "o_proj.weight")
        rules.append(_constant_rule(_attention(layer, "sub_norm.weight"), (2 * sizes.map_dim,), 1.0, like))
    return rules


def diffllama_export_rules(sizes: Sizes) -> list[Rule]:
    """V1 -> transformers' `diffllama`: the inverse, with the norm's weight taken up by o_proj's columns."""
    layout = halves_layout(sizes.num_heads, sizes.num_kv_heads, sizes.map_dim)
    inverse = {role: transform.inverse() for role, transform in layout.items()}
    rules = []
    for rule in _transform_rules(sizes, [inverse] * sizes.num_layers):
        if rule.target.endswith("self_attn.o_proj.weight"):
            norm = (rule.target.replace("o_proj", "sub_norm"), (2 * sizes.map_dim,))
            rule = replace(rule, sources=(*rule.sources, norm), build=fold_norm)
        rules.append(rule)
    for layer in range(sizes.num_layers):
        rules += [_copy_lambda(sizes, layer, name, f"diff_lambda.{name}") for name in LAMBDA_VECTORS]
    return rules


def unilm_rules(sizes: Sizes) -> list[Rule]:
    """The authors' V1 (MultiheadFlashDiff2's names and rows inside an otherwise LLaMA-named model) -> V1."""
    layout = interleaved_layout(sizes.num_heads, sizes.num_kv_heads, sizes.map_dim)
    rules = _transform_rules(sizes, [layout] * sizes.num_layers)
    rules = rename_sources(rules, lambda name: name.replace("self_attn.o_proj", "self_attn.out_proj"))
    for layer in range(sizes.num_layers):
        rules += [_copy_lambda(sizes, layer, f"diff_lambda.{name}", name) for name in LAMBDA_VECTORS]
        norm, shape = _attention(layer, "subln.weight"), (2 * sizes.map_dim,)
        rules.append(Rule(_attention(layer, "sub_norm.weight"), shape, ((norm, shape),), Keep(), norm))
    return rules


def fold_norm(o_proj: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """o_proj (C, heads 2d), each head's columns times the norm's weight (2d,): float32 (C, heads 2d)."""
    return (o_proj.float().unflatten(1, (-1, weight.shape[0])) * weight.float()).flatten(1)


def rename_sources(rules: Sequence[Rule], rename: Callable[[str], str]) -> list[Rule]:
    """The same rules for a source that calls its tensors otherwise."""
    return [
        replace(
            rule,
            sources=tuple((rename(name), shape) for name, shape in rule.sources),
            dtype_of=rename(rule.dtype_of) if rule.dtype_of else None,
        )
        for rule in rules
    ]


def _transform_rules(sizes: Sizes, layouts: Sequence[Mapping[str, Transform]]) -> list[Rule]:
    rules = []
    for name, shape, role, layer in llama_tensors(sizes):
        transform = Keep() if layer is None else layouts[layer].get(role, Keep())
        rules.append(Rule(name, transform.shape(shape), ((name, shape),), transform, name))
    return rules


def _attention(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.{name}"


def _constant_rule(target: str, shape: tuple[int, ...], value: float, dtype_of: str) -> Rule:
    return Rule(target, shape, (), lambda: torch.full(shape, value), dtype_of)


def _copy_lambda(sizes: Sizes, layer: int, target: str, source: str) -> Rule:
    shape = (sizes.map_dim,)
    return Rule(_attention(layer, target), shape, ((_attention(layer, source), shape),), Keep(), None)


def _random_rule(target: str, shape: tuple[int, ...], std: float, key: str) -> Rule:
    def build() -> torch.Tensor:
        # Drawn from the key alone, so that neither the order of work nor a resumed run changes it.
        digest = hashlib.sha256(key.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(shape, generator=generator) * std

    return Rule(target, shape, (), build, None)
