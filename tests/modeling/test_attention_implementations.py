"""What can be asked for by name, what is refused and with which words, and what analysis gets from `eager`."""

from importlib import metadata

import pytest
import torch
from transformers import modeling_flash_attention_utils
from transformers.integrations import sdpa_attention

from modeling_diff import AttentionMaps, DiffLlamaForCausalLM, diff_attention


# Rows of float32 maps sum to 1 within a few steps of 2^-23.
ROW_SUM_ATOL = 1e-5


@pytest.mark.parametrize("road", ["config", "from_pretrained", "set_attn_implementation"])
@pytest.mark.parametrize(
    ("name", "package", "message"),
    [
        ("no_such_attention", None, 'attn_implementation="no_such_attention"` is not supported.*eager.*sdpa'),
        ("flash_attention_2", "flash_attn", "package for FlashAttention2 doesn't seem to be installed"),
        ("flash_attention_3", "flash_attn_interface", "package for FlashAttention3 doesn't seem to be installed"),
        ("flash_attention_4", "flash_attn", "package for FlashAttention4 doesn't seem to be installed"),
        ("kernels-community/flash-attn", "kernels", "`kernels` is either not installed"),
    ],
)
def test_implementation_that_cannot_run_is_refused_by_name(
    tiny_model, tiny_config, variant, tmp_path, monkeypatch, name, package, message, road
):
    # With `kernels`, transformers takes flash attention from the Hub.
    if package and {package, "kernels"} & set(metadata.packages_distributions()):
        pytest.skip(f"{package} or kernels is installed")
    # transformers 5.17 takes a kernel that failed to load for loaded when it is asked for again.
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    # transformers 5.6 stumbles over the version of a package that is not there.
    with pytest.raises((ValueError, ImportError), match=f"{message}|Invalid version: 'N/A'"):
        if road == "config":
            DiffLlamaForCausalLM(tiny_config(variant, attn_implementation=name))
        elif road == "from_pretrained":
            tiny_model(variant).save_pretrained(tmp_path)
            DiffLlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        else:
            tiny_model(variant).set_attn_implementation(name)


def test_refused_name_leaves_the_model_as_it_was(tiny_model, variant, random_ids):
    model = tiny_model(variant)
    input_ids = random_ids(1, 5)
    before = model(input_ids).logits
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match="no_such_attention"):
        model.set_attn_implementation("no_such_attention")
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(input_ids).logits, before)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="only the CPU lacks a backward of FlexAttention")
def test_flex_attention_training_on_the_cpu_is_refused(tiny_model, variant, random_ids):
    model = tiny_model(variant, attn_implementation="flex_attention").train()
    with pytest.raises(NotImplementedError, match="FlexAttention does not support backward on CPU"):
        model(random_ids(1, 5), labels=random_ids(1, 5)).loss.backward()


def test_default_on_the_cpu_is_diff_chunked(tiny_model, variant, random_ids):
    model = tiny_model(variant)
    input_ids = random_ids(2, 20)
    assert model.config._attn_implementation == "diff_auto"
    logits = model(input_ids).logits
    model.set_attn_implementation("diff_chunked")
    assert torch.equal(model(input_ids).logits, logits)


def test_implementation_set_at_run_time_is_the_one_that_runs(tiny_model, variant, random_ids):
    model = tiny_model(variant, attn_implementation="sdpa")
    input_ids = random_ids(2, 9)
    expected = model(input_ids).logits
    for implementation in ("eager", "diff_chunked", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        # float32 logits of up to about 6.
        torch.testing.assert_close(model(input_ids).logits, expected, rtol=0, atol=2e-5)
    model.set_attn_implementation("eager")
    assert model(input_ids, output_attentions=True).attentions[0] is not None


def test_attentions_are_positive_minus_lambda_negative(tiny_model, variant, random_ids):
    model = tiny_model(variant, attn_implementation="eager")
    maps = {}
    attentions = model(random_ids(2, 9), output_attentions=True, attention_maps_by_layer=maps).attentions
    assert sorted(maps) == [0, 1]
    for layer_idx, weights in enumerate(attentions):
        layer = maps[layer_idx]
        assert isinstance(layer, AttentionMaps)
        assert weights.shape == layer.positive.shape == layer.negative.shape == (2, 4, 9, 9)
        ones = torch.ones(2, 4, 9)
        torch.testing.assert_close(layer.positive.sum(-1), ones, rtol=0, atol=ROW_SUM_ATOL)
        torch.testing.assert_close(layer.negative.sum(-1), ones, rtol=0, atol=ROW_SUM_ATOL)
        by_row = layer.diff_lambda if variant == "v1" else layer.diff_lambda.transpose(1, 2)
        assert layer.diff_lambda.shape == (() if variant == "v1" else (2, 9, 4))
        torch.testing.assert_close(weights.sum(-1), ones - by_row, rtol=0, atol=ROW_SUM_ATOL)
        assert torch.equal(weights, layer.positive - by_row[..., None] * layer.negative)


def test_returned_attentions_are_in_the_graph(tiny_model, variant, random_ids):
    model = tiny_model(variant, attn_implementation="eager")
    output = model(random_ids(2, 9), output_attentions=True)
    for weights in output.attentions:
        weights.retain_grad()
    output.logits.square().mean().backward()
    for weights in output.attentions:
        assert weights.grad.abs().max() > 0


def test_raw_maps_are_in_the_graph(tiny_model, variant, random_ids):
    model = tiny_model(variant, attn_implementation="eager")
    maps = {}
    output = model(random_ids(2, 9), attention_maps_by_layer=maps)
    gradients = torch.autograd.grad(output.logits.square().mean(), [maps[0].positive, maps[0].negative])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("implementation", ["sdpa", "diff_chunked"])
def test_raw_maps_are_refused_where_there_are_none(tiny_model, variant, random_ids, implementation):
    model = tiny_model(variant, attn_implementation=implementation)
    with pytest.raises(ValueError, match=rf"{implementation}.*never holds whole maps.*set_attn_implementation"):
        model(random_ids(1, 5), attention_maps_by_layer={})


def test_attentions_of_layers_that_kept_llama_attention_are_theirs(tiny_model, variant, random_ids):
    model = tiny_model(variant, attn_implementation="eager", differential_layers=[1])
    maps = {}
    attentions = model(random_ids(2, 9), output_attentions=True, attention_maps_by_layer=maps).attentions
    assert sorted(maps) == [1]
    assert attentions[0].shape == (2, 8 if variant == "v1" else 4, 9, 9)
    rows = attentions[0].sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=ROW_SUM_ATOL)
    assert attentions[1].shape == (2, 4, 9, 9)


@pytest.fixture
def warnings_given(monkeypatch):
    """The texts given to `warning_once` by our attention and by `sdpa`, also those given before."""
    texts = []
    for module in (diff_attention, sdpa_attention):
        monkeypatch.setattr(module.logger, "warning_once", texts.append)
    return texts


@pytest.mark.parametrize("differential_layers", [None, [1], []], ids=str)
@pytest.mark.parametrize("name", [None, "diff_chunked", "sdpa"])
def test_attentions_asked_of_a_path_without_maps_are_warned_of_as_in_llama(
    tiny_model, variant, random_ids, warnings_given, name, differential_layers
):
    given = {} if name is None else {"attn_implementation": name}
    model = tiny_model(variant, differential_layers=differential_layers, **given)
    llama = tiny_model("llama", num_hidden_layers=1)
    expected = llama(random_ids(1, 5), output_attentions=True).attentions
    assert len(warnings_given) == 1  # of LLaMA
    assert model(random_ids(1, 5), output_attentions=True).attentions == expected == ()
    ours = warnings_given[1:]
    assert ours and all("does not support `output_attentions=True`" in text and "`eager`" in text for text in ours)
    warnings_given.clear()
    model(random_ids(1, 5))
    model.set_attn_implementation("eager")
    assert len(model(random_ids(1, 5), output_attentions=True).attentions) == model.config.num_hidden_layers
    assert warnings_given == []
