"""LLaMA's relatives to V2: bit-equal to transformers' own classes, and what of them is refused."""

import json
import subprocess
import sys

import pytest
import torch
from random_llamas import LONGROPE, RELATIVES, edit_json, random_llama, random_relative, saved, token_ids
from safetensors.torch import load_file, save_file

from conversion import ConversionError, convert_checkpoint, verify_checkpoint
from conversion.describe import describe_checkpoint
from modeling_diff import DiffLlamaForCausalLM


SHAPES = {
    "gqa": {},
    "mha, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FLAVORS = {
    **{f"{name}, {shape}": (name, changes) for name in RELATIVES for shape, changes in SHAPES.items()},
    **{f"{name}, mha, yarn": (name, {"num_key_value_heads": 4, "rope_parameters": YARN}) for name in RELATIVES},
    "mistral, rope of llama3": ("mistral", {"rope_parameters": LLAMA3}),
    "qwen2, linear rope": ("qwen2", {"rope_parameters": YARN | {"rope_type": "linear"}}),
    "qwen3, longrope": (
        "qwen3",
        {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
    ),
    "mistral, window as long as the text": ("mistral", {"sliding_window": 128}),
    "qwen2, windows from a layer that is not there": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3, heads that do not divide the hidden size": ("qwen3", {"num_attention_heads": 6, "head_dim": 8}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
}


@torch.no_grad()
def assert_equal_to_the_bit(source, output, model_class, dtype, implementation):
    theirs, ours = (
        loaded.from_pretrained(folder, dtype=dtype, attn_implementation=implementation).eval()
        for loaded, folder in ((model_class, source), (DiffLlamaForCausalLM, output))
    )
    mask = torch.ones_like(token_ids())
    mask[0, :5] = 0
    for arguments in ({}, {"attention_mask": mask}):
        assert torch.equal(*(model(token_ids(), **arguments).logits for model in (theirs, ours)))
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **arguments}
        assert torch.equal(*(model.generate(token_ids(), **settings) for model in (theirs, ours)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flavor", FLAVORS)
def test_v2_is_its_source_to_the_bit(tmp_path, flavor, dtype):
    name, changes = FLAVORS[flavor]
    source = saved(random_relative(name, **changes).to(dtype), tmp_path / "source")
    convert_checkpoint(source, tmp_path / "v2", "v2")
    for implementation in ("sdpa", "eager"):
        assert_equal_to_the_bit(source, tmp_path / "v2", RELATIVES[name][0], dtype, implementation)


@pytest.mark.parametrize("name", RELATIVES)
def test_layers_left_out_are_the_source_to_the_bit(tmp_path, name):
    source = saved(random_relative(name), tmp_path / "source")
    convert_checkpoint(source, tmp_path / "v2", "v2", layers=[0])
    assert_equal_to_the_bit(source, tmp_path / "v2", RELATIVES[name][0], torch.float32, "sdpa")


@pytest.mark.parametrize("name", RELATIVES)
def test_verify_and_inspect_know_the_source(tmp_path, name):
    source = saved(random_relative(name), tmp_path / "source")
    convert_checkpoint(source, tmp_path / "v2", "v2")
    report = verify_checkpoint(tmp_path / "v2", against=source)
    assert report.passed and {"logits", "tokens", "liveness"} <= {check.name for check in report.checks}
    described = describe_checkpoint(source)
    assert (described["model_type"], described["heads"]) == (name, 4)
    assert described["head_dim"] == (16 if name == "qwen3" else 8)
    assert describe_checkpoint(tmp_path / "v2")["conversion"]["source"]["model_type"] == name


def test_output_loads_with_its_own_code(tmp_path):
    """In a process that cannot import this package."""
    source = saved(random_relative("qwen3"), tmp_path / "source")
    convert_checkpoint(source, tmp_path / "v2", "v2")
    torch.save(token_ids(), tmp_path / "ids.pt")
    code = """
import torch
from transformers import AutoModelForCausalLM
ids = torch.load("ids.pt")
source = AutoModelForCausalLM.from_pretrained("source", attn_implementation="sdpa").eval()
v2 = AutoModelForCausalLM.from_pretrained("v2", attn_implementation="sdpa", trust_remote_code=True).eval()
assert "transformers_modules" in type(v2).__module__, type(v2)
assert v2.model.layers[0].self_attn.q_norm.weight.std() > 0
with torch.no_grad():
    assert torch.equal(source(ids).logits, v2(ids).logits)
"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path, timeout=300)


def test_llamafied_qwen_is_converted(tmp_path):
    """As its weights are published: model_type llama, biases of queries, keys and values, and none of o_proj."""
    source = saved(random_relative("qwen2"), tmp_path / "source")
    fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True}
    edit_json(source / "config.json", without=["layer_types", "sliding_window"], **fields)
    convert_checkpoint(source, tmp_path / "v2", "v2")
    edit_json(source / "config.json", model_type="qwen2")
    assert_equal_to_the_bit(source, tmp_path / "v2", RELATIVES["qwen2"][0], torch.float32, "sdpa")


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias", "use_qk_norm", "attention_out_bias"])
def test_field_that_the_source_does_not_read_changes_nothing(tmp_path, field):
    source = saved(random_relative("mistral"), tmp_path / "source")
    edit_json(source / "config.json", **{field: True})
    convert_checkpoint(source, tmp_path / "v2", "v2")
    assert_equal_to_the_bit(source, tmp_path / "v2", RELATIVES["mistral"][0], torch.float32, "sdpa")


def test_head_counts_that_the_file_leaves_out_are_those_of_the_class(tmp_path):
    """Qwen3 has heads 128 wide unless it says otherwise, where LLaMA divides its width among them."""
    source = saved(random_relative("qwen3", head_dim=128), tmp_path / "source")
    edit_json(source / "config.json", without=["head_dim"])
    convert_checkpoint(source, tmp_path / "v2", "v2")
    assert_equal_to_the_bit(source, tmp_path / "v2", RELATIVES["qwen3"][0], torch.float32, "sdpa")


REFUSED = {
    "short window": ("mistral", {"sliding_window": 64}, "sliding_window is 64, below max_position_embeddings 128"),
    "default window": ("mistral", {"sliding_window": "", "max_position_embeddings": 8192}, "sliding_window is 4096"),
    "windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1, "layer_types": None},
        r"sliding_window is 32, below max_position_embeddings 128: 1 of 2 layers read no further back",
    ),
    "layers of another kind": ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    "layer types of mistral": ("mistral", {"layer_types": ["sliding_attention"] * 2}, "layer_types is"),
    "experts": ("qwen3", {"model_type": "qwen3_moe"}, r"model_type is 'qwen3_moe'.*it has experts.*Supported: llama"),
    "gemma": ("qwen3", {"model_type": "gemma2"}, r"model_type is .gemma2.*it caps logits.*Supported: llama"),
    "norms under another type": (
        "qwen3",
        {"model_type": "mistral"},
        r"self_attn.k_norm.weight' is unknown.*only qwen3",
    ),
    "no biases under qwen2": ("mistral", {"model_type": "qwen2"}, r"k_proj.bias is missing.*calls for it"),
    "biases under mistral": (
        "qwen2",
        {"model_type": "mistral"},
        r"k_proj.bias' is unknown.*the model has no bias there",
    ),
    "wrong type": ("qwen3", {"head_dim": "wide"}, "head_dim is 'wide', expected a whole number above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_model_that_differs_is_refused_in_one_line(tmp_path, case):
    name, changes, message = REFUSED[case]
    source = saved(random_relative(name), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | changes
    config = {field: value for field, value in config.items() if value not in (None, "")}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message) as caught:
        convert_checkpoint(source, tmp_path / "v2", "v2")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "v2").exists()


def test_norm_that_is_missing_is_refused(tmp_path):
    source = saved(random_relative("qwen3"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"layers.1.self_attn.q_norm.weight is missing"):
        convert_checkpoint(source, tmp_path / "v2", "v2")


def test_window_that_texts_stay_within_is_the_named_way_out(tmp_path):
    source = saved(random_relative("mistral", sliding_window=64), tmp_path / "source")
    with pytest.raises(ConversionError, match=r"set max_position_embeddings to 64 in a copy"):
        convert_checkpoint(source, tmp_path / "v2", "v2")
    edit_json(source / "config.json", max_position_embeddings=64)
    convert_checkpoint(source, tmp_path / "v2", "v2")
    assert_equal_to_the_bit(source, tmp_path / "v2", RELATIVES["mistral"][0], torch.float32, "sdpa")


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_export_to_diffllama_names_what_it_cannot_say(tmp_path, name):
    from conversion import export_checkpoint

    source = saved(random_relative(name), tmp_path / "source")
    convert_checkpoint(source, tmp_path / "v1", "v1", uncalibrated=True, lambda_init="paper")
    with pytest.raises(ConversionError, match="attention_out_bias is False" if name == "qwen2" else "use_qk_norm"):
        export_checkpoint(tmp_path / "v1", tmp_path / "theirs")


def test_llama_has_no_extra_tensors(tmp_path):
    """Fields that LLaMA does not read: its own class ignores them."""
    source = saved(random_llama(), tmp_path / "source")
    edit_json(source / "config.json", use_qk_norm=True, attention_out_bias=True)
    report = convert_checkpoint(source, tmp_path / "v2", "v2")
    assert not any(
        "norm.weight" in name and "self_attn" in name for name in load_file(tmp_path / "v2/model.safetensors")
    )
    assert report.record["promise"]["kind"] == "bit-exact"
