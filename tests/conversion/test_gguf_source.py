"""GGUF files as sources: against transformers' own reader of them, and what of them is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from random_llamas import random_llama, random_relative, saved, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from conversion import ConversionError, convert_checkpoint, verify_checkpoint
from conversion.errors import FilesError
from conversion.source.location import locate_source
from modeling_diff import DiffLlamaForCausalLM


gguf = pytest.importorskip("gguf", reason="gguf is not installed")

# Blocks of 32 in every row.
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_0")}
SOURCES = {
    "llama": lambda **changes: random_llama(**SHAPE, **changes),
    "qwen2": lambda **changes: random_relative("qwen2", **SHAPE, **changes),
    "qwen3": lambda **changes: random_relative("qwen3", **(SHAPE | {"head_dim": 32} | changes)),
}


def rotate_neighbors(weight, num_heads):
    """As llama.cpp stores LLaMA's queries and keys: components j and j + d / 2 next to each other."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(path, model, kind="Q8_0", extra_fields=(), extra_tensors=(), architecture=None):
    """The file that llama.cpp's converter writes, without a tokenizer."""
    config = model.config
    name = architecture or config.model_type
    writer = gguf.GGUFWriter(path, name)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for key, value in extra_fields:
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for key, tensor in tensors.items():
        if config.model_type == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            tensor = rotate_neighbors(tensor, heads)
        stored = TYPES[kind] if tensor.dim() == 2 else TYPES["F32"]
        data = gguf.quants.quantize(tensor.numpy(), stored)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), data, raw_dtype=stored)
    for key, tensor in extra_tensors:
        writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantized(path, folder):
    """What transformers makes of the file."""
    options = {"gguf_file": path.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # these releases keep the quantized weights unless told
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    return saved(model, folder)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", SOURCES)
def test_file_converts_as_its_dequantized_folder(tmp_path, name, kind):
    path = write_gguf(tmp_path / "model.gguf", SOURCES[name](tie_word_embeddings=kind == "Q4_0"), kind)
    report = convert_checkpoint(path, tmp_path / "v2", "v2")
    folder = dequantized(path, tmp_path / "folder") if name != "qwen3" else reference(path, tmp_path / "folder", name)
    convert_checkpoint(folder, tmp_path / "expected", "v2")
    found, expected = (load_file(tmp_path / output / "model.safetensors") for output in ("v2", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    models = [
        model_class.from_pretrained(f, attn_implementation="sdpa", dtype=torch.float32).eval()
        for model_class, f in ((AutoModelForCausalLM, folder), (DiffLlamaForCausalLM, tmp_path / "v2"))
    ]
    with torch.no_grad():
        assert torch.equal(*(model(token_ids()).logits for model in models))
    bits = {"F32": 32, "F16": 16, "Q8_0": 8.5, "Q4_0": 4.5}[kind]
    assert report.record["source"]["name"] == "model.gguf"
    assert report.record["source"]["gguf"]["type"] == kind
    assert report.record["source"]["gguf"]["bits_per_weight"] == pytest.approx(bits, rel=0.1)  # norms are in float32
    assert "bits per weight)" in (tmp_path / "v2/README.md").read_text()
    assert any("bits per weight" in note for note in report.notes)


def reference(path, folder, name):
    """Where transformers' reader refuses or misreads the file: the numbers that the gguf package itself gives."""
    model = SOURCES[name]()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], 2)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = {}
    for key in model.state_dict():
        known = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if known in stored:
            weights[key] = torch.from_numpy(
                gguf.quants.dequantize(stored[known].data, stored[known].tensor_type).copy()
            )
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.config.tie_word_embeddings = True
    model.load_state_dict(weights)
    return saved(model, folder)


def test_v1_is_verified_against_the_file(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", SOURCES["llama"]())
    convert_checkpoint(path, tmp_path / "v1", "v1", uncalibrated=True)
    report = verify_checkpoint(tmp_path / "v1", against=path)
    assert report.passed and {check.name: check.outcome for check in report.checks}["source"] == "passed"


def test_unpacked_folder_goes_with_its_last_user(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", SOURCES["llama"]())
    located = locate_source(path)
    folder = located.folder
    assert (folder / "config.json").is_file()
    del located
    assert not folder.exists()
    folder = locate_source(path, config_only=True)
    assert [file.name for file in folder.folder.iterdir()] == ["config.json"]


def rope_factors(factor, head_dim=16):
    settings = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_parameters=dict(settings))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return settings, (10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim) / scaled).float()


def test_rotary_factors_of_llama_3_become_its_settings(tmp_path):
    settings, factors = rope_factors(8.0)
    path = write_gguf(tmp_path / "model.gguf", SOURCES["llama"](), extra_tensors=[("rope_freqs.weight", factors)])
    convert_checkpoint(path, tmp_path / "v2", "v2")
    assert DiffLlamaForCausalLM.from_pretrained(tmp_path / "v2").config.rope_parameters == settings


BROKEN = {
    "no GGUF": (lambda data: b"not a model" * 100, "no sound GGUF file"),
    "empty": (lambda data: b"", "no sound GGUF file"),
    "header alone": (lambda data: data[:24], "no sound GGUF file"),
    "fields cut": (lambda data: data[:300], "no sound GGUF file"),
    "tensors cut": (lambda data: data[: len(data) // 2], "no sound GGUF file"),
    "a count beyond the file": (lambda data: data[:8] + b"\xff" * 7 + b"\x00" + data[16:], "no sound GGUF file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_refused_in_one_line(tmp_path, case):
    breaks, message = BROKEN[case]
    path = write_gguf(tmp_path / "model.gguf", SOURCES["llama"]())
    path.write_bytes(breaks(path.read_bytes()))
    assert_refused(path, tmp_path / "v2", message)


def assert_refused(path, output, message):
    with pytest.raises(ConversionError, match=message) as caught:
        convert_checkpoint(path, output, "v2")
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    assert not output.exists()


REFUSED = {
    "gemma": ({"architecture": "gemma2"}, r"general.architecture is 'gemma2', .*caps logits.*Supported: llama"),
    "experts": ({"architecture": "qwen3moe"}, r"general.architecture is 'qwen3_moe', .*experts"),
    "experts in llama": ({"extra_fields": [("llama.expert_count", 8)]}, "llama.expert_count is 8, which changes"),
    "scaled rope": ({"extra_fields": [("llama.rope.scaling.type", "yarn")]}, "llama.rope.scaling.type is 'yarn'"),
    "unknown field": ({"extra_fields": [("llama.logit_scale", 2.0)]}, "llama.logit_scale is 2.0"),
    "part": ({"extra_fields": [("split.count", 2)]}, "one of 2 parts"),
    "unknown tensor": ({"extra_tensors": [("blk.0.attn_sinks.weight", torch.ones(4))]}, "attn_sinks.*is unknown"),
    "other rope factors": (
        {"extra_tensors": [("rope_freqs.weight", torch.linspace(1, 9, 8))]},
        "not that of Llama 3.1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_file_of_another_model_is_refused_in_one_line(tmp_path, case):
    options, message = REFUSED[case]
    assert_refused(write_gguf(tmp_path / "model.gguf", SOURCES["llama"](), **options), tmp_path / "v2", message)


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert_refused(tmp_path / "model.gguf", tmp_path / "v2", "needs the package gguf: pip install gguf")


def test_folder_with_a_file_names_the_way(tmp_path):
    write_gguf(tmp_path / "model.gguf", SOURCES["llama"]())
    with pytest.raises(ConversionError, match="for a GGUF file, give the path of the file itself"):
        convert_checkpoint(tmp_path, tmp_path / "v2", "v2")


def test_room_for_the_weights_is_asked_for_first(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", SOURCES["llama"]())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(FilesError, match=r"GB are needed to unpack model.gguf, 0.000 GB are free; .* TMPDIR"):
        convert_checkpoint(path, tmp_path / "v2", "v2")
    assert not (tmp_path / "v2").exists()


def test_stopped_command_leaves_no_unpacked_folder(tmp_path):
    """A signal ends the process without the interpreter's own clean-up."""
    path = write_gguf(tmp_path / "model.gguf", SOURCES["llama"]())
    code = f"""
from conversion.console.signals import end_stopped
from conversion.source.location import locate_source
located = locate_source({str(path)!r})
print(located.folder, flush=True)
end_stopped(143)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 143 and done.stdout.strip()
    assert not Path(done.stdout.strip()).exists()
