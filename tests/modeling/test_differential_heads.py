"""Layers in which some heads are differential and the others hold those of LLaMA (V1)."""

import pytest
import torch

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


def test_model_built_without_memory_knows_its_heads(tiny_model, random_ids):
    """Tools that build on the meta device fill in parameters alone: buffers, such as LLaMA's own, are left unset."""
    model = tiny_model("v1", differential_heads=HEADS)
    with torch.device("meta"):
        empty = DiffLlamaForCausalLM(model.config)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    empty.model.rotary_emb = model.model.rotary_emb
    input_ids = random_ids(2, 9)
    assert torch.equal(empty.eval()(input_ids).logits, model(input_ids).logits)


def test_attentions_of_mixed_layers_are_the_maps_of_llama_heads(tiny_model, random_ids):
    model = tiny_model("v1", attn_implementation="eager", differential_heads=[[0, 2], [0, 1, 2, 3]])
    whole = tiny_model(
        "v1", attn_implementation="eager"
    )  # of the same weights, so that the first layer's input is equal
    maps: dict = {}
    expected: dict = {}
    input_ids = random_ids(2, 9)
    attentions = model(input_ids, output_attentions=True, attention_maps_by_layer=maps).attentions
    whole(input_ids, attention_maps_by_layer=expected)
    assert sorted(maps) == [1]
    interleaved = torch.stack((expected[0].positive, expected[0].negative), dim=2).flatten(1, 2)  # (B, 2H, T, S)
    torch.testing.assert_close(attentions[0], interleaved, rtol=0, atol=FLOAT32_ATOL)
    assert attentions[1].shape == (2, 4, 9, 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_difference_is_normalized_before_it_is_rounded(tiny_model, dtype):
    """Maps that nearly cancel: their rounded difference, of a few steps of the dtype, would be off by tenths."""
    attention = tiny_model("v1", differential_heads=HEADS).to(dtype).model.layers[0].self_attn
    torch.manual_seed(0)
    outputs = torch.randn(1, 3, 4, 1, 8).expand(-1, -1, -1, 2, -1).flatten(2, 3).to(dtype)
    attention.diff_lambda.lambda_init = 0.99
    for vector in attention.diff_lambda.parameters():
        vector.data.zero_()
    attention.sub_norm.weight.data.fill_(100)
    attention.sub_norm.eps = 1e-12
    mixed, _ = attention.combine(outputs, None, None)
    wide = outputs.double()[:, :, ::2]
    normalized = wide / wide.pow(2).mean(-1, keepdim=True).sqrt()
    expected = wide.clone()
    expected[:, :, HEADS[0]] = normalized[:, :, HEADS[0]]
    assert mixed.dtype == torch.float32
    # float32 arithmetic on 0.01 of values that are exact in the dtype.
    torch.testing.assert_close(mixed.double(), expected, rtol=2e-4, atol=2e-5)
