"""
LLaMAs built by hand, head by head: it is known what each of them attends to, and what the model says.

The stream holds one-hot blocks: a token's identity, the token before it, what is predicted, and a one for all.
Rotary positions turn every component but the slowest by their whole angle, so heads that look at content use only the
slowest pairs, and the previous-token head is a rotation by one place.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


VOCABULARY = 32
MAP_DIM = 128
HEADS = 4
CONTEXT = 128
FIRST = 0  # the token that stands before every text
IDENTITY, PREVIOUS, ANSWER = (slice(i * VOCABULARY, (i + 1) * VOCABULARY) for i in range(3))
ONE = 3 * VOCABULARY  # one for every token
HIDDEN = 3 * VOCABULARY + 8
PREVIOUS_HEAD = (0, 2)
FIRST_HEAD = (0, 1)
UNIFORM_HEAD = (0, 3)
COPY_HEAD = (1, 2)
SHARP = 30.0


def planted_llama() -> LlamaForCausalLM:
    """
    Two layers of four heads that write nothing but what is planted: layer 0 has a head that attends to the previous
    token and writes it down, and one that attends to the first; layer 1 an induction head, which attends to the token
    whose predecessor equals the asking one, and says it.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=MAP_DIM,
        max_position_embeddings=CONTEXT,
        bos_token_id=FIRST,
        eos_token_id=None,
        pad_token_id=None,
        rms_norm_eps=1e-12,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    model.model.embed_tokens.weight[:, IDENTITY] = torch.eye(VOCABULARY)
    model.model.embed_tokens.weight[:, ONE] = 1.0
    model.lm_head.weight[:, ANSWER] = SHARP * torch.eye(VOCABULARY)
    first, second = (layer.self_attn for layer in model.model.layers)
    plant_previous(first, PREVIOUS_HEAD[1])
    plant_first(first, FIRST_HEAD[1])
    plant_copy(second, COPY_HEAD[1])
    return model


def rows_of(head):
    return slice(head * MAP_DIM, (head + 1) * MAP_DIM)


def rotary_angles():
    return 1e9 ** (-torch.arange(MAP_DIM // 2) / (MAP_DIM // 2))


def plant_previous(attention, head):
    """Keys all alike, queries alike but turned one place back: the scores peak where the distance is one."""
    half = MAP_DIM // 2
    angles = rotary_angles()
    scale = SHARP / 4
    keys, queries = attention.k_proj.weight[rows_of(head)], attention.q_proj.weight[rows_of(head)]
    keys[:half, ONE] = scale
    queries[:half, ONE] = scale * angles.cos()
    queries[half:, ONE] = -scale * angles.sin()
    attention.v_proj.weight[rows_of(head)][:VOCABULARY, IDENTITY] = torch.eye(VOCABULARY)
    attention.o_proj.weight[PREVIOUS, rows_of(head)][:, :VOCABULARY] = torch.eye(VOCABULARY)


def plant_first(attention, head):
    """The slowest pair hardly turns: a query of one asks for a key that only the first token has."""
    slowest = head * MAP_DIM + MAP_DIM // 2 - 1
    attention.q_proj.weight[slowest, ONE] = SHARP
    attention.k_proj.weight[slowest, FIRST] = SHARP


def plant_copy(attention, head):
    """Asks with its own identity for whom has it written down as previous, on the slowest pairs, and says that one."""
    places = [half * MAP_DIM // 2 + MAP_DIM // 2 - 1 - i for half in (0, 1) for i in range(VOCABULARY // 2)]
    queries, keys = attention.q_proj.weight[rows_of(head)], attention.k_proj.weight[rows_of(head)]
    for token, place in enumerate(places):
        queries[place, token] = SHARP
        keys[place, PREVIOUS.start + token] = SHARP
    attention.v_proj.weight[rows_of(head)][:VOCABULARY, IDENTITY] = torch.eye(VOCABULARY)
    attention.o_proj.weight[ANSWER, rows_of(head)][:, :VOCABULARY] = torch.eye(VOCABULARY)
