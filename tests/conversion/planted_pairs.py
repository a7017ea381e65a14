"""Small LLaMAs built so that it is known which heads belong together, and how far a model is from one."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conversion.calibration.candidates import HeadOutputs, with_norm
from conversion.calibration.problem import LayerProblem
from conversion.calibration.streams import LlamaLayers, Streams
from conversion.checkpoint.reader import CheckpointReader
from conversion.mapping.heads import HeadPairing
from conversion.source.architectures import plain_config


HEADS = 8
MAP_DIM = 8
HIDDEN = 48
CONTEXT = 48
VOCABULARY = 96


def planted_llama(kind, num_kv_heads, num_layers=2, seed=0, model_class=LlamaForCausalLM, config_class=LlamaConfig):
    """
    A LLaMA or a relative on whose attention its predictions depend, and the pairs of KV heads planted in it.

    "twins": heads of a planted pair of KV heads have equal maps, in a hidden order of heads.
    "idle": one KV head of each pair has heads that write nothing.
    "plain": nothing is planted.
    """
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=num_kv_heads,
        head_dim=MAP_DIM,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = model_class(config).eval().requires_grad_(False)
    pairs = []
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection, gain in (("q_proj", 1.6), ("k_proj", 1.6), ("v_proj", 1.0), ("o_proj", 1.0)):
            weight = getattr(attention, projection).weight
            weight.normal_(0, gain / weight.shape[1] ** 0.5)
        for name, parameter in attention.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1 if "norm" in name else 0, 0.2)
        layer.mlp.down_proj.weight.normal_(0, 0.1)
        order = torch.randperm(num_kv_heads).view(-1, 2).tolist()
        for first, second in order:
            if kind == "twins":
                plant_twins(attention, first, second, HEADS // num_kv_heads)
            elif kind == "idle":
                plant_idle(attention, first, second, HEADS // num_kv_heads)
        pairs.append({frozenset(pair) for pair in order})
    model.model.embed_tokens.weight.normal_(0, 1)
    model.lm_head.weight.normal_(0, 2 / HIDDEN**0.5)
    return model, pairs


def first_layer(folder, **fields):
    """The problem of the first layer of a plain planted LLaMA: 4 sequences judge, 28 are fitted."""
    llama, _ = planted_llama("plain", 4)
    llama.save_pretrained(folder)
    layers = LlamaLayers(CheckpointReader(folder), plain_config(llama.config), torch.device("cpu"))
    streams = Streams.start(layers.embed(random_tokens(32)))
    tensors = layers.tensors(0)
    layer = layers.layer(0, tensors)
    streams.look_ahead(layers, layer, 0)
    return LayerProblem(0, layers, tensors, layer, streams, 0, "strict", (0.05,), 4, **fields)


def copied_first_layer(problem):
    """Its permuted copy with heads next to each other paired, and the norm scaled to what they give."""
    weights = problem.start(HeadPairing.adjacent(HEADS, 4), 0.05)
    return with_norm(problem, weights, HeadOutputs.gather(problem, weights).mean_square)


def plant_twins(attention, first, second, group):
    order = torch.randperm(group)
    for kind in {"weight", "bias"} & attention.q_proj.state_dict().keys():
        queries = getattr(attention.q_proj, kind).unflatten(0, (-1, group, MAP_DIM))
        keys = getattr(attention.k_proj, kind).unflatten(0, (-1, MAP_DIM))
        keys[second] = keys[first]
        queries[second] = queries[first][order]


def plant_idle(attention, first, second, group):
    columns = attention.o_proj.weight.unflatten(1, (-1, group * MAP_DIM))
    columns[:, second] = 0


def random_tokens(num_rows, seed=1):
    return torch.randint(VOCABULARY, (num_rows, CONTEXT), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def kl_nats(llama, converted, tokens):
    """Mean KL of the converted model's predictions from LLaMA's, in nats/token."""
    ours, theirs = (model(input_ids=tokens).logits.double().log_softmax(-1) for model in (converted, llama))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
