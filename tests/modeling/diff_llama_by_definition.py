"""
The papers' formulae written out with loops over heads, sharing no code with the package: what its tests compare with.

B batch, T queries, S keys, H heads, K key-value heads, d map_dim, D head_dim, C hidden size.
"""

import math

import torch


def attention_by_definition(query, key, value, diff_lambda, scaling, additive_mask=None):
    """
    Head i of (B, 2H, T, d) queries over (B, K, S, D) keys and values, one softmax row at a time -> (B, T, H, D).

    `diff_lambda` () or (B, T, H); `additive_mask` (B, T, S).
    """
    batch_size, num_maps, num_queries, map_dim = query.shape
    num_heads = num_maps // 2
    head_dim = value.shape[-1]
    outputs = []
    for b in range(batch_size):
        for t in range(num_queries):
            for i in range(num_heads):
                group = i // (num_heads // key.shape[1])
                rows = []
                for m in range(2):
                    first = m * map_dim if key.shape[-1] == 2 * map_dim else 0
                    keys = key[b, group, :, first : first + map_dim]  # (S, d)
                    scores = scaling * (keys * query[b, 2 * i + m, t]).sum(-1)
                    scores = scores if additive_mask is None else scores + additive_mask[b, t]
                    exponentials = (scores - scores.max()).exp()
                    rows.append(exponentials / exponentials.sum())
                subtracted = diff_lambda if diff_lambda.dim() == 0 else diff_lambda[b, t, i]
                weights = rows[0] - subtracted * rows[1]
                outputs.append((weights[:, None] * value[b, group]).sum(0))
    return torch.stack(outputs).view(batch_size, num_queries, num_heads, head_dim)


def rms_norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rotate(x, positions, theta):
    """Turns components j and j + d/2 of (B, T, d) by the angle position * theta^(-2j/d)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[..., None].double() * frequencies
    first = x[..., :half]
    second = x[..., half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def differential_heads(x, weights, config, layer_idx, positions, additive_mask):
    """
    The concatenated heads of one layer, (B, T, C) -> (B, T, H D), from LLaMA's names for its weights.

    A layer without lambda is plain: head h reads key h // G, in V1's order of keys and values. So are heads that
    `differential_heads` leaves out.
    """
    is_v1 = config.variant == "v1"
    head_dim = config.head_dim
    map_dim = head_dim // 2 if is_v1 else head_dim
    theta = config.rope_parameters["rope_theta"]

    def project(name, index, width):
        rows = slice(index * width, (index + 1) * width)
        states = x @ weights[f"{name}.weight"][rows].T
        if f"{name}.bias" in weights:
            states = states + weights[f"{name}.bias"][rows]
        norm = weights.get(name.replace("proj", "norm.weight"))
        return states if norm is None else rms_norm(states, norm, config.rms_norm_eps)

    def attend(query_map, key_map):
        query, key = (
            rotate(project(name, index, map_dim), positions, theta)
            for name, index in (("q_proj", query_map), ("k_proj", key_map))
        )
        return (query @ key.transpose(-1, -2) / math.sqrt(map_dim) + additive_mask).softmax(-1)

    if not {"lambda_proj.weight", "sub_norm.weight"} & weights.keys():
        num_maps = (2 if is_v1 else 1) * config.num_attention_heads
        shared = config.num_attention_heads // config.num_key_value_heads
        key_maps = [2 * (h // 2 // shared) + h % 2 if is_v1 else h // shared for h in range(num_maps)]
        return torch.cat(
            [attend(h, key_maps[h]) @ project("v_proj", key_maps[h], map_dim) for h in range(num_maps)], -1
        )
    if is_v1:
        vectors = (weights[f"diff_lambda.lambda_{name}"] for name in ("q1", "k1", "q2", "k2"))
        q1, k1, q2, k2 = vectors
        init = config.lambda_init[layer_idx]
        diff_lambda = (q1 @ k1).exp() - (q2 @ k2).exp() + init
    heads = []
    for i in range(config.num_attention_heads):
        group = i // (config.num_attention_heads // config.num_key_value_heads)
        maps = []
        for m in range(2):
            maps.append(attend(2 * i + m, 2 * group + m if is_v1 else group))
        if not is_v1:
            diff_lambda = project("lambda_proj", i, 1).sigmoid()
        if config.differential_heads is not None and i not in config.differential_heads[layer_idx]:
            heads += [maps[m] @ project("v_proj", 2 * group + m, map_dim) for m in range(2)]
            continue
        head = (maps[0] - diff_lambda * maps[1]) @ project("v_proj", group, head_dim)
        if is_v1:
            eps = config.sub_norm_eps[layer_idx] if isinstance(config.sub_norm_eps, list) else config.sub_norm_eps
            head = (1 - init) * rms_norm(head, weights["sub_norm.weight"], eps)
        heads.append(head)
    return torch.cat(heads, dim=-1)


def logits_by_definition(weights, config, input_ids, visible=None):
    """
    The whole causal language model in float64 from a state dict, without a bias on o_proj and with default rope type.

    `visible` (B, T) is 1 where a token is no padding.
    """
    weights = {name: weight.double() for name, weight in weights.items()}
    num_tokens = input_ids.shape[1]
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril().expand(len(input_ids), -1, -1)
    if visible is not None:
        mask = mask & visible[:, None, :].bool()
    additive_mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30)
    positions = torch.arange(num_tokens)[None]
    x = weights["model.embed_tokens.weight"][input_ids]
    for layer_idx in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer_idx}."
        layer = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        attention = {
            name.removeprefix("self_attn."): weight for name, weight in layer.items() if name.startswith("self_attn.")
        }
        normed = rms_norm(x, layer["input_layernorm.weight"], config.rms_norm_eps)
        heads = differential_heads(normed, attention, config, layer_idx, positions, additive_mask)
        x = x + heads @ attention["o_proj.weight"].T
        normed = rms_norm(x, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = normed @ layer["mlp.gate_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (normed @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
    return rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T
