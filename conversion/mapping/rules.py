"""One rule per tensor of the target, for each conversion, made from `TENSORS` and the layouts of `layout.py`."""

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
    """How one tensor of the target is made: `build(*sources)`.

    Attributes:
        target: Its name.
        shape: Its shape.
        sources: Names and shapes of the source's tensors that it is made of; none for a new tensor.
        build: Makes it of these tensors.
        dtype_of: The source's tensor whose dtype it has; None for float32 whatever the model's dtype is.
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
    """Returns the rules LLaMA -> V1.

    The exponentials of the lambda vectors cancel exactly, and their gradients do not.

    Args:
        sizes: Sizes of the LLaMA.
        pairings: Which heads become one, per layer.
        layers: Indices of the differential layers. The others are paired as well, but get no new tensors: they keep
            LLaMA's attention.
        norm_weights: What fills `sub_norm.weight`, per layer.
        lambda_std: Standard deviation of the lambda vectors.
        seed: Of the lambda vectors.
    """
    head_sizes = (sizes.num_heads, sizes.num_kv_heads, sizes.map_dim)
    rules = _transform_rules(sizes, [paired_layout(pairing, *head_sizes) for pairing in pairings])
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
    """Returns the rules LLaMA -> V2; `lambda_proj` starts at zero.

    Args:
        sizes: Sizes of the LLaMA.
        layers: Indices of the differential layers; the others keep LLaMA's attention.
        lambda_bias: lambda starts at sigmoid(lambda_bias); at 1/2 without a bias (None).
    """
    mirrored = mirrored_layout(sizes.num_heads, sizes.map_dim, lambda_bias or 0.0)
    rules = _transform_rules(sizes, [mirrored if layer in layers else {} for layer in range(sizes.num_layers)])
    for layer in sorted(layers):
        like = _attention(layer, "q_proj.weight")
        weight = _attention(layer, "lambda_proj.weight")
        bias = _attention(layer, "lambda_proj.bias")
        rules.append(_constant_rule(weight, (sizes.num_heads, sizes.hidden_size), 0.0, like))
        if lambda_bias is not None:
            rules.append(_constant_rule(bias, (sizes.num_heads,), lambda_bias, like))
    return rules


def diffllama_rules(sizes: Sizes) -> list[Rule]:
    """Returns the rules transformers' `diffllama` -> V1; it has no norm weight, and ours is all ones."""
    layout = halves_layout(sizes.num_heads, sizes.num_kv_heads, sizes.map_dim)
    rules = _transform_rules(sizes, [layout] * sizes.num_layers)
    for layer in range(sizes.num_layers):
        rules += [_copy_lambda(sizes, layer, f"diff_lambda.{name}", name) for name in LAMBDA_VECTORS]
        like = _attention(layer, "o_proj.weight")
        rules.append(_constant_rule(_attention(layer, "sub_norm.weight"), (2 * sizes.map_dim,), 1.0, like))
    return rules


def diffllama_export_rules(sizes: Sizes) -> list[Rule]:
    """Returns the rules V1 -> transformers' `diffllama`, the inverse; o_proj is multiplied by the norm's weight."""
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
    """Returns the rules authors' V1 -> V1: names and rows of MultiheadFlashDiff2 in a model with LLaMA's names."""
    layout = interleaved_layout(sizes.num_heads, sizes.num_kv_heads, sizes.map_dim)
    rules = _transform_rules(sizes, [layout] * sizes.num_layers)
    rules = rename_sources(rules, lambda name: name.replace("self_attn.o_proj", "self_attn.out_proj"))
    for layer in range(sizes.num_layers):
        rules += [_copy_lambda(sizes, layer, f"diff_lambda.{name}", name) for name in LAMBDA_VECTORS]
        norm = _attention(layer, "subln.weight")
        shape = (2 * sizes.map_dim,)
        rules.append(Rule(_attention(layer, "sub_norm.weight"), shape, ((norm, shape),), Keep(), norm))
    return rules


def fold_norm(o_proj: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns o_proj (C, heads 2d) with each head's columns times the norm's weight (2d,), in float32."""
    return (o_proj.float().unflatten(1, (-1, weight.shape[0])) * weight.float()).flatten(1)


def rename_sources(rules: Sequence[Rule], rename: Callable[[str], str]) -> list[Rule]:
    """Returns the same rules for a source with other tensor names, which `rename` makes of ours."""
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
