"""Layers in which some heads are differential and the others hold those of LLaMA (V1)."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM
from modeling_diff.diff_attention_modules import DiffLlamaAttention, MixedAttention, PairedLlamaAttention


HEADS = [[0, 2], [1, 2, 3]]
# float32 logits of up to about 6; the same sums in another order.
FLOAT32_ATOL = 2e-5


def attention_classes(model):
    return [type(layer.self_attn) for layer in model.model.layers]


def test_config_answers_for_each_layer(tiny_config):
    config = tiny_config("v1", num_hidden_layers=3, differential_heads=[[1, 3], [], [0, 1, 2, 3]])
    assert [config.differential_heads_of(layer) for layer in range(3)] == [[1, 3], [], [0, 1, 2, 3]]
    assert [config.is_differential(layer) for layer in range(3)] == [True, False, True]
    assert [config.is_mixed(layer) for layer in range(3)] == [True, False, False]


def test_config_answers_alike_where_layers_are_given(tiny_config, variant):
    config = tiny_config(variant, differential_layers=[1])
    assert [config.differential_heads_of(layer) for layer in range(2)] == [[], [0, 1, 2, 3]]
    assert [config.is_mixed(layer) for layer in range(2)] == [False, False]
    assert tiny_config(variant).differential_heads_of(0) == [0, 1, 2, 3]


@pytest.mark.parametrize("heads", [HEADS, [[0, 1, 2, 3], []], [[], []]], ids=str)
def test_config_keeps_the_heads_as_they_were_given(tiny_config, tmp_path, heads):
    tiny_config("v1", differential_heads=heads).save_pretrained(tmp_path)
    loaded = DiffLlamaConfig.from_pretrained(tmp_path)
    assert (loaded.differential_heads, loaded.differential_layers) == (heads, None)


def test_layer_is_mixed_only_where_some_heads_are_differential(tiny_model):
    model = tiny_model("v1", num_hidden_layers=3, differential_heads=[[1, 3], [], [0, 1, 2, 3]])
    assert attention_classes(model) == [MixedAttention, PairedLlamaAttention, DiffLlamaAttention]


@pytest.mark.parametrize(
    ("heads", "layers"), [([[0, 1, 2, 3]] * 2, None), ([[], []], []), ([[], [0, 1, 2, 3]], [1])], ids=str
)
def test_all_heads_or_none_equal_whole_layers_bit_for_bit(tiny_model, random_ids, heads, layers):
    by_heads = tiny_model("v1", differential_heads=heads)
    by_layers = tiny_model("v1", differential_layers=layers)
    assert by_heads.state_dict().keys() == by_layers.state_dict().keys()
    by_heads.load_state_dict(by_layers.state_dict())
    input_ids = random_ids(2, 9)
    assert torch.equal(by_heads(input_ids).logits, by_layers(input_ids).logits)


@pytest.mark.parametrize("low_memory", [{}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}], ids=str)
def test_loaded_model_knows_its_heads(tiny_model, random_ids, tmp_path, low_memory):
    model = tiny_model("v1", differential_heads=HEADS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **low_memory)
    assert attention_classes(loaded) == [MixedAttention] * 2
    input_ids = random_ids(2, 9)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_model_built_without_memory_knows_its_heads(tiny_model, random_ids):
    """As tools do that build on the meta device and fill in parameters alone; LLaMA's own buffer has to be given."""
    model = tiny_model("v1", differential_heads=HEADS)
    with torch.device("meta"):
        empty = DiffLlamaForCausalLM(model.config)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    empty.model.rotary_emb = model.model.rotary_emb
    input_ids = random_ids(2, 9)
    assert torch.equal(empty.eval()(input_ids).logits, model(input_ids).logits)
