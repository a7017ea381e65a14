"""`DiffLlamaConfig.from_llama`: the differential model that a LLaMA or a relative becomes."""

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
SIZES = tiny_models.SIZES | HEADS | {"num_hidden_layers": 3, "rms_norm_eps": 1e-5}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0, "original_max_position_embeddings": 64}
# Fields of another class that stand in a config, and that it does not read, must not come over.
SOURCES = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, use_qk_norm=True),
    "llama, wide heads": LlamaConfig(**SIZES, head_dim=16, rope_parameters=YARN),
    "mistral": MistralConfig(**SIZES, sliding_window=None, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES, attention_bias=False),
    "qwen3": Qwen3Config(**SIZES, head_dim=8, mlp_bias=True),
}
ODD = LlamaConfig(**(SIZES | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}))


@pytest.fixture(params=SOURCES)
def source(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SOURCES[request.param]).eval()


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def test_without_differential_layers_v2_computes_the_source(source, random_ids):
    """Every field that its layers read came over: the weights fit by name and shape, and the logits are equal."""
    ours = DiffLlamaForCausalLM(DiffLlamaConfig.from_llama(source.config, variant="v2", differential_layers=[]))
    ours.load_state_dict(source.state_dict())
    for model in (ours, source):
        model.set_attn_implementation("sdpa")
    input_ids = random_ids(2, 100)
    assert torch.equal(ours.eval()(input_ids).logits, source(input_ids).logits)


def test_v1_adds_only_lambda_and_norm_to_the_parameters(source):
    """Four lambda vectors of d, and a norm of 2d, per layer."""
    config = DiffLlamaConfig.from_llama(source.config, variant="v1")
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    map_dim = getattr(source.config, "head_dim", 4)  # Qwen2 has none: hidden_size / num_attention_heads
    assert (config.map_dim, config.head_dim) == (map_dim, 2 * map_dim)
    assert count(DiffLlamaForCausalLM(config)) == count(source) + 3 * 6 * map_dim


def test_v2_adds_only_queries_and_lambda_to_the_parameters(source):
    config = DiffLlamaConfig.from_llama(source.config, variant="v2")
    queries = source.model.layers[0].self_attn.q_proj
    lambdas = 8 * 32
    assert count(DiffLlamaForCausalLM(config)) == count(source) + 3 * (count(queries) + lambdas)


def test_given_fields_win_over_those_of_the_llama():
    llama = LlamaConfig(**SIZES, attention_dropout=0.1)
    config = DiffLlamaConfig.from_llama(llama, variant="v1", num_hidden_layers=2, sub_norm_eps=1e-3, dtype="bfloat16")
    assert (config.num_hidden_layers, config.sub_norm_eps, config.dtype) == (2, 1e-3, torch.bfloat16)
    assert config.attention_dropout == 0  # undefined on differences of maps
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        DiffLlamaConfig.from_llama(llama, variant="v1", attention_dropout=0.1)


@pytest.mark.parametrize("name", SOURCES)
def test_differential_model_stands_for_the_llama_of_its_maps(name):
    source = SOURCES[name]
    v1 = DiffLlamaConfig.from_llama(source, variant="v1")
    assert DiffLlamaConfig.from_llama(v1, variant="v1").to_dict() == v1.to_dict()
    v2 = DiffLlamaConfig.from_llama(source, variant="v2")
    assert DiffLlamaConfig.from_llama(v1, variant="v2").to_dict() == v2.to_dict()


def test_heads_that_do_not_pair_are_refused_or_padded():
    with pytest.raises(ValueError, match=r'num_key_value_heads=3: .*; pad_heads=True .* variant="v2"'):
        DiffLlamaConfig.from_llama(ODD, variant="v1")
    padded = DiffLlamaConfig.from_llama(ODD, variant="v1", pad_heads=True)
    assert (padded.num_attention_heads, padded.num_key_value_heads, padded.head_dim) == (4, 2, 16)
    v2 = DiffLlamaConfig.from_llama(ODD, variant="v2")
    assert (v2.num_attention_heads, v2.num_key_value_heads, v2.head_dim) == (6, 3, 8)


def test_model_of_another_type_or_variant_is_refused_by_name():
    with pytest.raises(ValueError, match=r"model_type='gemma': .* expected one of llama, mistral, qwen2, qwen3"):
        DiffLlamaConfig.from_llama(GemmaConfig(), variant="v2")
    with pytest.raises(ValueError, match="variant='v3' is unknown"):
        DiffLlamaConfig.from_llama(SOURCES["llama"], variant="v3")
