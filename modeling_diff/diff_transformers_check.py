"""
Checks that the installed transformers calls this code as it expects.

Structure: what LLaMA's layers pass to attention, caches and mask functions is read from transformers' source when the
model file is imported. Behavior: under a release that was not tested, tiny models are compared with the definition
before anything is computed, as the kernels are in `diff_attention_triton_check.py`.

B batch, T tokens, H heads, K key-value heads, d map_dim, D head_dim, C hidden size.
"""

import ast
import inspect
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .diff_attention import attention_maps
from .diff_transformers_compat import (
    CACHE_NAME,
    NEWEST_TESTED_TRANSFORMERS,
    TRANSFORMERS,
    TRANSFORMERS_VERSION,
    UnsupportedTransformersError,
    cache_argument,
    release,
)


SKIP_VARIABLE = "DIFF_LLAMA_SKIP_CHECKS"

# In the order of LlamaAttention.forward, which is the order of ours.
ATTENTION_PARAMETERS = ["hidden_states", "position_embeddings", "attention_mask", CACHE_NAME]
# What LLaMA's model hands to a layer, and a layer to attention.
LAYER_ARGUMENTS = {*ATTENTION_PARAMETERS, "position_ids", "use_cache"}
UPDATE_PARAMETERS = ["key_states", "value_states", "layer_idx"]
UPDATE_ARGUMENTS = {"kwargs"}  # 5.24
MASK_ARGUMENTS = {
    *("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"),
    *("allow_is_causal_skip", "allow_torch_fix", "dtype", "config", "use_vmap", "device"),
}

# Logits of the model below are about 3; float32 in another order moves them by 1e-5, a lost cache or mask by 0.1.
TOLERANCE = 1e-3


def skip_checks() -> bool:
    """Returns whether the user switched the checks off; warns about it."""
    if not os.environ.get(SKIP_VARIABLE):
        return False
    warnings.warn(
        f"{SKIP_VARIABLE} is set: DiffLlama is not checked against transformers {TRANSFORMERS_VERSION}, and may "
        "compute wrong tokens without an error.",
        stacklevel=2,
    )
    return True


# Set before the first check, so that the models of the check itself do not ask again.
_behavior_checked = release(NEWEST_TESTED_TRANSFORMERS) >= TRANSFORMERS


def check_structure() -> None:
    """
    Checks what transformers' LLaMA passes on against what this code knows, in a few milliseconds.

    Where transformers is installed without its source, the behavior is checked instead, at the first use.

    Raises:
        UnsupportedTransformersError: Something is passed that would be lost here, or something is missing.
    """
    global _behavior_checked
    if skip_checks():
        return
    try:
        difference = structural_difference()
    except OSError:
        _behavior_checked = False
        return
    if difference is not None:
        raise UnsupportedTransformersError(difference)


def structural_difference() -> str | None:
    """Returns the first thing that this code does not know, in words, or None."""
    for attention in (LlamaAttention, Qwen3Attention):  # of plain layers, without norms on queries and keys and with
        parameters = [
            name
            for name, parameter in inspect.signature(attention.forward).parameters.items()
            if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
        ]
        if parameters != ATTENTION_PARAMETERS:
            return (
                f"{attention.__name__}.forward takes {', '.join(parameters)}, expected "
                f"{', '.join(ATTENTION_PARAMETERS)}"
            )
    required = [
        name
        for name, parameter in inspect.signature(Cache.update).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if required[1:] != UPDATE_PARAMETERS:
        return f"Cache.update takes {', '.join(required[1:])}, expected {', '.join(UPDATE_PARAMETERS)}"
    for function, callee, num_positional, known in (
        (LlamaModel.forward, "decoder_layer", 1, LAYER_ARGUMENTS),
        (LlamaDecoderLayer.forward, "self_attn", len(ATTENTION_PARAMETERS), LAYER_ARGUMENTS),
        (LlamaAttention.forward, "update", len(UPDATE_PARAMETERS), UPDATE_ARGUMENTS),
        (Qwen3Attention.forward, "update", len(UPDATE_PARAMETERS), UPDATE_ARGUMENTS),
        (create_causal_mask, "mask_interface", 0, MASK_ARGUMENTS),
    ):
        call = find_call(function, callee)
        if call is None:
            return f"{function.__qualname__} has no call of {callee} that can be read"
        if len(call.args) > num_positional or any(isinstance(argument, ast.Starred) for argument in call.args):
            return f"{function.__qualname__} passes {len(call.args)} positional arguments to {callee}"
        for keyword in call.keywords:
            if keyword.arg is not None and keyword.arg not in known:
                return f"{function.__qualname__} passes {keyword.arg!r} to {callee}"
    return None


def find_call(function: Callable, callee: str) -> ast.Call | None:
    """Returns the call of `callee`, a name or an attribute, in a function's source, or None if it has none."""
    source = inspect.getsource(inspect.unwrap(function))
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.Call) and callee == getattr(node.func, "attr", getattr(node.func, "id", None)):
            return node
    return None


def check_behavior_when_used(model: nn.Module, causal_lm_class: Any) -> None:
    """
    Checks an untested transformers once per process: now, or before the model's first forward pass.

    Args:
        model: The model that is being built.
        causal_lm_class: DiffLlamaForCausalLM, of the code that builds it.

    Raises:
        UnsupportedTransformersError: A tiny model's logits or tokens differ from the definition.
    """
    if _behavior_checked:
        return
    if torch.empty(0).device.type == "meta":
        model.register_forward_pre_hook(partial(_check_before_forward, causal_lm_class))
    else:
        check_behavior(causal_lm_class)


def _check_before_forward(causal_lm_class: Any, model: nn.Module, inputs: Any) -> None:
    check_behavior(causal_lm_class)


@torch.compiler.assume_constant_result  # not traced: what is compiled is the model alone
def check_behavior(causal_lm_class: Any) -> None:
    """
    Compares tiny models of both variants with the definition, once per process; tens of milliseconds.

    Args:
        causal_lm_class: DiffLlamaForCausalLM.

    Raises:
        UnsupportedTransformersError: Their logits or tokens differ.
    """
    global _behavior_checked
    if _behavior_checked:
        return
    _behavior_checked = True
    if skip_checks():
        return
    # In a thread of its own there is no autocast, no inference mode and no default device.
    with ThreadPoolExecutor(1) as thread:
        difference = thread.submit(behavioral_difference, causal_lm_class).result()
    if difference is not None:
        _behavior_checked = False  # the next use is refused, too
        raise UnsupportedTransformersError(difference)
    if TRANSFORMERS[:2] > release(NEWEST_TESTED_TRANSFORMERS)[:2]:
        warnings.warn(
            f"DiffLlama was tested with transformers up to {NEWEST_TESTED_TRANSFORMERS}, found "
            f"{TRANSFORMERS_VERSION}: a check on a tiny model just passed.",
            stacklevel=2,
        )


def behavioral_difference(causal_lm_class: Any) -> str | None:
    """Returns what tiny models compute wrongly, in words, or None."""
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for variant in ("v1", "v2"):
                model = tiny_model(causal_lm_class, variant)
                input_ids, visible = padded_batch()
                expected = logits_by_definition(model, input_ids, visible)
                for implementation in ("eager", "sdpa", "diff_auto"):
                    model.set_attn_implementation(implementation)
                    error = (decoded_logits(model, input_ids, visible).double() - expected)[visible.bool()].abs().max()
                    if not error <= TOLERANCE:  # NaN, too
                        return f"{variant} with {implementation}: logits are off by {error:.3g}"
                if not generates_by_definition(model, input_ids, visible):
                    return f"{variant}: generate gives other tokens"
    except Exception as error:  # whatever an unknown release raises means that it is not supported
        return getattr(error, "difference", f"{type(error).__name__}: {error}")
    finally:
        torch.set_default_dtype(dtype)
    return None


def tiny_model(causal_lm_class: Any, variant: str) -> Any:
    """
    Builds two layers with random weights, the second one plain.

    V1's is LLaMA's attention, V2's Qwen3's, with norms on queries and keys and the biases of Qwen2.
    """
    config = causal_lm_class.config_class(
        variant=variant,
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        differential_layers=[0],
        use_qk_norm=variant == "v2",
        attention_bias=variant == "v2",
        attention_out_bias=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = causal_lm_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.5 * noise)
    return model


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids (2, 7) of a full and a left-padded sequence, and 1 where a token is no padding."""
    input_ids = torch.tensor([[5, 9, 2, 7, 7, 3, 11], [0, 0, 4, 8, 1, 6, 2]])
    return input_ids, (input_ids != 0).long()


def decoded_logits(model: Any, input_ids: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Computes the logits (B, T, vocabulary) of a prefill and two decode steps through the cache."""
    cache = DynamicCache(config=model.config)
    logits = []
    for start, end in ((0, 5), (5, 6), (6, 7)):
        step = model(input_ids[:, start:end], attention_mask=visible[:, :end], use_cache=True, **cache_argument(cache))
        logits.append(step.logits)
    return torch.cat(logits, dim=1)


def generates_by_definition(model: Any, input_ids: torch.Tensor, visible: torch.Tensor) -> bool:
    """Returns whether `generate` gives the two tokens of the largest logits by definition."""
    generated = model.generate(input_ids, attention_mask=visible, max_new_tokens=2, do_sample=False)
    for _ in range(2):
        logits = logits_by_definition(model, input_ids, visible)
        input_ids = torch.cat((input_ids, logits[:, -1:].argmax(-1)), dim=1)
        visible = nn.functional.pad(visible, (0, 1), value=1)
    return torch.equal(generated, input_ids)


def logits_by_definition(model: Any, input_ids: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Computes the logits (B, T, vocabulary) in float64 from the weights and the papers' formulas alone."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    causal = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
    mask = (causal & visible[:, None, :].bool())[:, None]  # (B, 1, T, T)

    hidden_states = weights["model.embed_tokens.weight"][input_ids]
    for layer_idx in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer_idx}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        normed = _rms_norm(hidden_states, layer["input_layernorm.weight"], config.rms_norm_eps)
        heads = torch.cat(list(_heads_by_definition(config, layer_idx, layer, normed, mask)), dim=-1)
        hidden_states = hidden_states + heads @ layer["self_attn.o_proj.weight"].T
        normed = _rms_norm(hidden_states, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = nn.functional.silu(normed @ layer["mlp.gate_proj.weight"].T)
        hidden_states = (
            hidden_states + gate * (normed @ layer["mlp.up_proj.weight"].T) @ layer["mlp.down_proj.weight"].T
        )
    hidden_states = _rms_norm(hidden_states, weights["model.norm.weight"], config.rms_norm_eps)
    return hidden_states @ weights["lm_head.weight"].T


def _heads_by_definition(config, layer_idx, layer, normed, mask) -> Iterator[torch.Tensor]:
    """Yields each head's output, (B, T, D)."""
    map_dim = config.map_dim
    head_dim = config.head_dim

    def project(name: str, width: int) -> torch.Tensor:
        states = normed @ layer[f"self_attn.{name}_proj.weight"].T + layer.get(f"self_attn.{name}_proj.bias", 0)
        states = states.unflatten(-1, (-1, width))
        norm = layer.get(f"self_attn.{name}_norm.weight")
        return states if norm is None else _rms_norm(states, norm, config.rms_norm_eps)

    query = _rotate(project("q", map_dim), config)
    key = _rotate(project("k", map_dim), config)
    value = project("v", head_dim).transpose(1, 2)
    if config.variant == "v2" and not config.is_differential(layer_idx):
        query = query.repeat_interleave(2, dim=2)  # one map per head, twice
    key = key.flatten(2).unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, K, T, D)
    positive, negative = attention_maps(query.transpose(1, 2), key, mask, scaling=map_dim**-0.5)  # (B, H, T, T) each
    for head in range(config.num_attention_heads):
        head_value = value[:, head // (config.num_attention_heads // config.num_key_value_heads)]
        added = positive[:, head] @ head_value
        subtracted = negative[:, head] @ head_value
        if not config.is_differential(layer_idx):  # in V2 both are equal
            yield torch.cat((added[..., :map_dim], subtracted[..., map_dim:]), dim=-1)
        elif config.variant == "v2":
            yield added - (normed @ layer["self_attn.lambda_proj.weight"][head]).sigmoid()[..., None] * subtracted
        else:
            vectors = [layer[f"self_attn.diff_lambda.lambda_{name}"] for name in ("q1", "k1", "q2", "k2")]
            lambda_init = config.lambda_init[layer_idx]
            diff_lambda = (vectors[0] @ vectors[1]).exp() - (vectors[2] @ vectors[3]).exp() + lambda_init
            norm_eps = config.layer_sub_norm_eps(layer_idx)
            normalized = _rms_norm(added - diff_lambda * subtracted, layer["self_attn.sub_norm.weight"], norm_eps)
            yield (1 - lambda_init) * normalized


def _rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * hidden_states * (hidden_states.square().mean(-1, keepdim=True) + eps).rsqrt()


def _rotate(states: torch.Tensor, config: Any) -> torch.Tensor:
    """Rotates components j and j + d/2 of (B, T, maps, d) by t theta^(-2j/d)."""
    half = config.map_dim // 2
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(states.shape[1])[:, None, None] * frequencies  # (T, 1, d/2)
    first = states[..., :half]
    second = states[..., half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )
