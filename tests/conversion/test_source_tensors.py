"""Tensors of a source: what transformers' LLaMA loads is converted to the bit, all else is refused with its cause."""

import json
import re

import pytest
import torch
from random_llamas import SMALL, edit_json, random_llama, saved, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conversion import ConversionError, convert_checkpoint
from modeling_diff import DiffLlamaForCausalLM


ROTARY = "model.layers.{}.self_attn.rotary_emb.{}"
Q_BIAS = "model.layers.{}.self_attn.q_proj.bias"
BIASES = {"q": SMALL["hidden_size"], "k": SMALL["hidden_size"] // 2, "v": SMALL["hidden_size"] // 2}


def source_with(tmp_path, change, config=None, **llama):
    """A random LLaMA whose tensors are as `change` makes them, with other fields in its config."""
    folder = saved(random_llama(**llama), tmp_path / "llama")
    weights = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def logits(model_class, folder):
    model = model_class.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(token_ids()).logits


def assert_converted_as_loaded(source, output, **options):
    """The oracle is what transformers' own LLaMA computes from the very same folder."""
    report = convert_checkpoint(source, output, "v2", **options)
    assert torch.equal(logits(AutoModelForCausalLM, source), logits(DiffLlamaForCausalLM, output))
    return report


def refusal(source, tmp_path, **options):
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(source, tmp_path / "output", "v2", **options)
    message = str(caught.value)
    assert "\n" not in message and not (tmp_path / "output").exists()
    return message


def base_names(weights):
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def with_head(weights):
    return weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}


def head_alone(weights):
    return {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in weights.items()}


def mixed_names(weights):
    return {name.replace("model.norm", "norm").replace("model.layers.1", "layers.1"): t for name, t in weights.items()}


def model_twice(weights):
    return {f"model.{name}": tensor for name, tensor in weights.items()}


NAMES = {
    "base": (base_names, False),
    "mixed": (mixed_names, False),
    "model twice": (model_twice, False),
    "tied base": (base_names, True),
    "tied base with head": (lambda weights: base_names(with_head(weights)), True),
    "tied base with head alone": (lambda weights: base_names(head_alone(weights)), True),
    "tied model twice with head": (lambda weights: model_twice(with_head(weights)), True),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_found_as_transformers_finds_them(tmp_path, name):
    change, tied = NAMES[name]
    assert_converted_as_loaded(source_with(tmp_path, change, tie_word_embeddings=tied), tmp_path / "v2")


def biased(weights, roles="qkv", layers=(0, 1)):
    return weights | {
        f"model.layers.{layer}.self_attn.{role}_proj.bias": torch.linspace(-1, 1, BIASES[role])
        for layer in layers
        for role in roles
    }


@pytest.mark.parametrize("roles", ["qkv", "q", "kv"])
def test_biases_of_some_projections_only_are_zeros_elsewhere(tmp_path, roles):
    source = source_with(tmp_path, lambda weights: biased(weights, roles), {"attention_bias": True})
    report = assert_converted_as_loaded(source, tmp_path / "v2")
    assert any("layers.*.self_attn.o_proj.bias is in no layer and becomes zeros" in note for note in report.notes)
    written = load_file(tmp_path / "v2" / "model.safetensors")
    assert not written["model.layers.1.self_attn.o_proj.bias"].any()


def test_mlp_biases_of_some_projections_only_are_zeros_elsewhere(tmp_path):
    bias = {f"model.layers.{layer}.mlp.up_proj.bias": torch.linspace(-1, 1, 48) for layer in (0, 1)}
    source = source_with(tmp_path, lambda weights: weights | bias, {"mlp_bias": True})
    assert_converted_as_loaded(source, tmp_path / "v2")


def test_biases_without_their_flag_lead_to_a_config_that_converts(tmp_path):
    source = source_with(tmp_path, biased, {"attention_bias": False})
    assert "set attention_bias to true" in refusal(source, tmp_path)
    edit_json(source / "config.json", attention_bias=True)
    assert_converted_as_loaded(source, tmp_path / "v2")


def test_biases_that_only_some_layers_have_are_refused(tmp_path):
    source = source_with(tmp_path, lambda weights: biased(weights, layers=[1]), {"attention_bias": True})
    assert "layers.0.self_attn.k_proj.bias is missing" in refusal(source, tmp_path)


def test_flag_of_biases_that_no_layer_has_leads_to_a_config_that_converts(tmp_path):
    source = source_with(tmp_path, dict, {"attention_bias": True})
    assert "set attention_bias to false" in refusal(source, tmp_path)


LEFT_OUT = [
    *(ROTARY.format(layer, name) for layer in (0, 1) for name in ("inv_freq", "cos_cached", "sin_cached")),
    "model.rotary_emb.original_inv_freq",
    "rope.freqs",
    "model.causal_mask",
    "model.layers.0.self_attn.masked_bias",
    "model.layers.0.self_attn.q_proj._extra_state",
    "v_head.summary.weight",
    "v_head.summary.bias",
]


def test_what_transformers_drops_without_loss_is_left_out_with_one_note_per_reason(tmp_path):
    source = source_with(tmp_path, lambda weights: weights | {name: torch.ones(4) for name in LEFT_OUT})
    report = assert_converted_as_loaded(source, tmp_path / "v2")
    assert report.record["left_out"] == sorted(LEFT_OUT)
    notes = [note for note in report.notes if note.startswith("left out")]
    assert len(notes) == 4 and any("(and 7 more): rotary tables" in note for note in notes)


ZERO_BIASES = {
    "lm_head.bias": 96,
    "model.norm.bias": 32,
    "model.layers.0.input_layernorm.bias": 32,
    Q_BIAS.format(0): 32,
}


@pytest.mark.parametrize("name", ZERO_BIASES)
def test_bias_that_llama_has_not_is_left_out_where_it_is_zeros_only(tmp_path, name):
    zeros = torch.zeros(ZERO_BIASES[name])
    source = source_with(tmp_path, lambda weights: weights | {name: zeros})
    report = assert_converted_as_loaded(source, tmp_path / "v2")
    assert f"left out: {name!r}: a bias of zeros" in report.notes
    zeros[-1] = 1e-30
    save_file(load_file(source / "model.safetensors") | {name: zeros}, source / "model.safetensors")
    message = refusal(source, tmp_path)
    assert ("attention_bias" in message) == (name == Q_BIAS.format(0))
    assert "transformers" in message and name in message


WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "model.module.save_pretrained",
    "base_model.model.": "merge_and_unload",
    "_fsdp_wrapped_module.": "FSDP",
    "module._orig_mod.": "model.module.save_pretrained",
    "pretrained_model.": "TRL",
    "language_model.": "save the language model alone",
    "transformer.": "--backbone-only",
}


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("inner", [dict, base_names])
def test_wrapped_names_are_refused_by_their_wrapper(tmp_path, prefix, inner):
    source = source_with(tmp_path, lambda weights: {prefix + name: t for name, t in inner(weights).items()})
    message = refusal(source, tmp_path)
    assert WRAPPERS[prefix] in message and "complete checkpoint" not in message


def test_wrapper_within_a_name_is_named(tmp_path):
    source = source_with(tmp_path, lambda w: {n.replace("layers.1.", "layers.1._orig_mod."): t for n, t in w.items()})
    assert "torch.compile" in refusal(source, tmp_path)


CHANGES = {
    "missing": ({"model.norm.weight": None}, "model.norm.weight is missing: .*get the complete checkpoint"),
    "head": ({"lm_head.weight": None}, r"tie_word_embeddings.*\(convert --backbone-only\)"),
    "shape": ({"model.norm.weight": 31}, r"\(31,\).*\(32,\)"),
    "q_norm": ({"model.layers.0.self_attn.q_norm.weight": 8}, "only qwen3 has norms on queries and keys"),
    "bias": ({Q_BIAS.format(0): 32}, "set attention_bias to true"),
    "mlp bias": ({"model.layers.0.mlp.up_proj.bias": 48}, "set mlp_bias to true"),
    "score": ({"score.weight": 32, "lm_head.weight": None}, "--backbone-only"),
    "lora": ({"model.layers.1.self_attn.q_proj.lora_A.weight": 32}, "adapter.*merge_and_unload"),
    "unmerged": (
        {
            "model.layers.1.self_attn.q_proj.weight": None,
            "model.layers.1.self_attn.q_proj.base_layer.weight": 32,
        },
        "adapter.*merge_and_unload",
    ),
    "quantized": (
        {"model.layers.1.mlp.up_proj.weight": None, "model.layers.1.mlp.up_proj.qweight": 32},
        "qweight.*quantized",
    ),
    "fused": (
        {"model.layers.1.self_attn.q_proj.weight": None, "model.layers.1.self_attn.W_pack.weight": 32},
        "W_pack.*another model",
    ),
    "experts": ({"model.layers.1.mlp.experts.0.up_proj.weight": 32}, "no experts"),
    "layers": ({"model.layers.2.input_layernorm.weight": 32}, "num_hidden_layers is 2.*weights have 3 layers"),
    "huge layer": ({f"model.layers.{'9' * 5000}.input_layernorm.weight": 32}, "no tensor of this model"),
    "unknown": ({"something.else": 1}, "no tensor of this model.*remove it"),
    "twice": ({"norm.weight": 32}, "'model.norm.weight' and 'norm.weight' are both model.norm.weight"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensor_that_does_not_fit_is_refused_with_its_cause(tmp_path, name):
    changes, message = CHANGES[name]

    def change(weights):
        weights |= {name: torch.ones(size) for name, size in changes.items() if size}
        return {name: tensor for name, tensor in weights.items() if changes.get(name, 1)}

    found = refusal(source_with(tmp_path, change), tmp_path)
    assert re.search(message, found) and len(found) < 600


@pytest.mark.parametrize("head", ["v_head.summary.weight", "lm_head.bias", "score.weight"])
def test_backbone_only_leaves_out_every_head(tmp_path, head):
    source = source_with(tmp_path, lambda weights: weights | {head: torch.ones(96)})
    report = convert_checkpoint(source, tmp_path / "v2", "v2", backbone_only=True)
    assert report.record["left_out"] == sorted(["lm_head.weight", head])


def in_two_shards(folder, listed):
    """The tensors in two files, with an index that lists `listed` besides; the head, if any, in the second."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {True: "model-00001-of-00002.safetensors", False: "model-00002-of-00002.safetensors"}
    first = {name: "embed" in name for name in weights}
    for part, file in files.items():
        save_file({name: tensor for name, tensor in weights.items() if first[name] == part}, folder / file)
    index = {name: files[part] for name, part in first.items()} | {name: files[part] for name, part in listed.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.parametrize("stored", [False, True])
def test_index_may_list_a_tied_head_wherever_it_is(tmp_path, stored):
    source = source_with(tmp_path, with_head if stored else dict, tie_word_embeddings=True)
    assert_converted_as_loaded(in_two_shards(source, {"lm_head.weight": True}), tmp_path / "v2")


def test_index_that_lists_an_untied_head_which_is_nowhere_is_refused(tmp_path):
    source = source_with(tmp_path, lambda weights: {n: t for n, t in weights.items() if n != "lm_head.weight"})
    assert "lm_head.weight is missing" in refusal(in_two_shards(source, {"lm_head.weight": False}), tmp_path)


def test_pickle_of_the_format_before_zip_archives_is_converted(tmp_path):
    source = source_with(tmp_path, dict)
    weights = load_file(source / "model.safetensors")
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (source / "model.safetensors").unlink()
    assert_converted_as_loaded(source, tmp_path / "v2", allow_pickle=True)
