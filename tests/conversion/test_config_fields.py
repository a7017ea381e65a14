"""What a source's config.json says: computed as transformers' LLaMA computes it, or refused by field and value."""

import json

import pytest
import torch
from random_llamas import LONGROPE, RELATIVES, edit_json, random_llama, random_relative, saved, token_ids
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from conversion import ConversionError, convert_checkpoint
from conversion.describe import describe_checkpoint
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


@pytest.fixture
def copied(llama):
    """Without generation settings, which a test may write."""
    (llama / "generation_config.json").unlink()
    return llama


@torch.no_grad()
def answers(model):
    """Logits of a plain and of a left-padded batch, and tokens by the model's own generation settings."""
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0)
    generated = getattr(generated, "sequences", generated)
    return [model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()], generated]


def assert_same_answers(source, output):
    """Loaded by default: in whatever dtype the files ask for."""
    theirs = AutoModelForCausalLM.from_pretrained(source).eval()
    ours = AutoModelForCausalLM.from_pretrained(output, attn_implementation="sdpa").eval()
    assert type(ours) is DiffLlamaForCausalLM
    for expected, found in zip(answers(theirs), answers(ours), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"is_causal": False},
        {"is_causal": True},
        {"output_attentions": False},
        {"output_hidden_states": True},
        {"tie_last_hidden_states": False},
        {"use_cache": False},
        {"layer_types": ["full_attention"] * 2},
        {"attribute_map": {}, "per_layer_config": {}, "configuration_files": ["config.json"]},
        {"quantization_config": None, "sliding_window": None, "attention_chunk_size": None},
        {"pad_token_id": -1},
        {"eos_token_id": [3, 7]},
        {"rms_norm_eps": 0.0},
        {"rms_norm_eps": -1e-3},
        {"pretraining_tp": 2, "chunk_size_feed_forward": 4},
        {"num_key_value_heads": 2, "head_dim": None},
        {"rope_parameters": LONGROPE},
        {"rope_parameters": None, "rope_theta": 500.0},
        {"nonsense": float("nan"), "x": float("inf"), "skip": ["mlp"], "unpadded_vocab_size": 50},
    ],
    ids=lambda fields: ",".join(fields),
)
@pytest.mark.transformers(since="5.16", reason="its config does not take a quantization_config of null")
def test_field_means_what_llama_makes_of_it(copied, tmp_path, fields):
    edit_json(copied / "config.json", **fields)
    convert_checkpoint(copied, tmp_path / "v2", "v2")
    assert_same_answers(copied, tmp_path / "v2")


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 3.0}, {"num_beams": 3, "length_penalty": 2.0}, {"do_sample": False, "min_length": 40}],
    ids=lambda settings: ",".join(settings),
)
def test_settings_of_generate_in_config_json_decode_as_in_llama(copied, tmp_path, settings):
    """transformers reads them there where there is no generation_config.json, and so does not with ours."""
    edit_json(copied / "config.json", **settings)
    notes = convert_checkpoint(copied, tmp_path / "v2", "v2").notes
    assert "config.json: its settings of generate are written to generation_config.json" in notes
    assert not any("not kept" in note for note in notes)
    assert_same_answers(copied, tmp_path / "v2")


def test_no_settings_of_generate_make_no_file(copied, tmp_path):
    convert_checkpoint(copied, tmp_path / "v2", "v2")
    assert not (tmp_path / "v2" / "generation_config.json").exists()


@pytest.mark.parametrize("text", ['{"max_new_tokens": -1}', "{", "[1]"])
def test_settings_of_generate_that_cannot_be_loaded_are_refused(copied, tmp_path, text):
    (copied / "generation_config.json").write_text(text)
    with pytest.raises(ConversionError, match=r"generation_config\.json") as caught:
        convert_checkpoint(copied, tmp_path / "v2", "v2")
    assert "\n" not in str(caught.value) and not (tmp_path / "v2").exists()


WINDOW = "windows"
REFUSED = [
    ({"is_causal": None}, "is_causal is None.*true and false"),
    ({"is_causal": 0}, "is_causal is 0"),
    ({"is_causal": "no"}, "is_causal is 'no'"),
    ({"output_attentions": True}, "output_attentions is True.*callers can ask"),
    ({"return_dict": False}, "return_dict is False.*remove it"),
    ({"return_dict": None}, "return_dict is None"),
    ({"pad_token_id": 96}, "pad_token_id is 96.*within num_embeddings"),
    ({"pad_token_id": -97}, "pad_token_id is -97"),
    ({"pad_token_id": 1.5}, "pad_token_id"),
    ({"rope_theta": None, "rope_parameters": None}, "rope_theta is None"),
    ({"rope_theta": 1e999, "rope_parameters": None}, "rope_theta is inf"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}}, "rope_parameters is .*finite"),
    ({"rope_parameters": LONGROPE | {"attention_factor": "x"}}, "attention_factor 'x'"),
    ({"rms_norm_eps": 1e999}, "rms_norm_eps is inf, expected finite"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ({"initializer_range": 1e999}, "initializer_range is inf"),
    ({"attention_dropout": 1e999}, "attention_dropout is inf"),
    ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]"),
    ({"hidden_act": {"silu": 1}}, "hidden_act is"),
    ({"hidden_act": None}, "hidden_act is None"),
    ({"hidden_act": "prelu"}, "hidden_act with weights of its own"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most"),
    ({"num_hidden_layers": 9_999}, "num_hidden_layers is 9999, but the weights have 2"),
    (
        dict.fromkeys(("hidden_size", "num_attention_heads", "num_key_value_heads"), 2**24) | {"head_dim": 2},
        "q_proj.weight has shape",
    ),
    ({"hidden_size": 10**30}, "hidden_size is 1000000000000000000000000000000, expected at most"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ({"partial_rotary_factor": 0.5}, "whole heads"),
    ({"sliding_window": 8}, WINDOW),
    ({"sliding_window": 0}, WINDOW),
    ({"attention_chunk_size": 8}, WINDOW),
    ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}, WINDOW),
    ({"layer_types": ["full_attention", "sliding_attention"]}, WINDOW),
    ({"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types"),
    ({"per_layer_config": {"0": {"rms_norm_eps": 1.0}}}, "per_layer_config is"),
    ({"attribute_map": {"rms_norm_eps": "initializer_range"}}, "attribute_map is"),
    ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files is"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights is 'other.safetensors'"),
    ({"quantization_config": {}}, "quantization_config is set"),
    ({"text_config": {}}, "text_config is"),
    ({"decoder": {"num_hidden_layers": 1}}, "decoder is"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true'"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings is None"),
    ({"num_key_value_heads": None}, "k_proj.weight has shape"),
    ({"use_cache": "yes"}, "use_cache"),
    ({"id2label": {"first": "x"}}, "id2label is"),
    ({"to_dict": 5}, "to_dict is 5"),
    ({"base_model_tp_plan": 3}, "base_model_tp_plan is 3"),
    ({"dtype": "nn"}, "dtype is 'nn', expected one of float32"),
    ({"dtype": "torch.float32"}, "dtype is 'torch.float32'"),
    ({"dtype": "int8"}, "dtype is 'int8'"),
    ({"dtype": {"": "float32"}}, "dtype is"),
    ({"torch_dtype": "auto"}, "torch_dtype is 'auto'"),
    ({f"x{number}": 0 for number in range(10_001)}, "fields, expected at most 10,000"),
]


@pytest.mark.parametrize(
    ("fields", "message"), REFUSED, ids=lambda value: ",".join(value)[:60] if isinstance(value, dict) else ""
)
def test_field_with_which_llama_computes_something_else_or_nothing_is_refused(copied, tmp_path, fields, message):
    edit_json(copied / "config.json", **fields)
    with pytest.raises(ConversionError, match=message) as caught:
        convert_checkpoint(copied, tmp_path / "v2", "v2")
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)
    assert not (tmp_path / "v2").exists()


def test_many_unread_fields_make_few_notes_and_strange_names_are_quoted(copied, tmp_path):
    edit_json(copied / "config.json", **{f"unread{number:04}": 0 for number in range(2000)}, **{"a\nb": 1})
    notes = convert_checkpoint(copied, tmp_path / "v2", "v2", dry_run=True).notes
    about_fields = [note for note in notes if note.startswith("config.json")]
    assert about_fields[0] == r"config.json: 'a\nb' is not kept" and len(about_fields) == 9
    assert about_fields[-1] == "config.json: 1993 more fields that LLaMA does not read are not kept"


def test_sizes_of_our_own_config_are_bounded_too(copied, tmp_path):
    convert_checkpoint(copied, tmp_path / "v2", "v2")
    edit_json(tmp_path / "v2" / "config.json", num_hidden_layers=10**9)
    with pytest.raises(ConversionError, match="num_hidden_layers is 1000000000"):
        describe_checkpoint(tmp_path / "v2")


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_bidirectional_model_is_bidirectional_on_every_attention_path(copied, tmp_path, variant, layers):
    """Against eager, whose mask is transformers' own; LLaMA itself is the reference of the test above."""
    edit_json(copied / "config.json", is_causal=False)
    uncalibrated = {"uncalibrated": True} if variant == "v1" else {}
    convert_checkpoint(copied, tmp_path / "ours", variant, layers=layers, **uncalibrated)
    ids = token_ids()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 96
    logits = {}
    for name in ("eager", "sdpa", "diff_chunked", "diff_auto"):
        model = DiffLlamaForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation=name).eval()
        logits[name] = answers(model)
        with torch.no_grad():
            assert not torch.equal(model(ids).logits[:, 0], model(changed).logits[:, 0]), (
                "the first token sees the last"
            )
        for expected, found in zip(logits["eager"], logits[name], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # float32, two orders of summation


@pytest.mark.parametrize(
    ("said", "stored"),
    [
        ("float32", "bfloat16"),
        ("float16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float64", "float32"),
        (None, "float16"),
    ],
)
@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_output_loads_in_the_dtype_in_which_llama_loads(copied, tmp_path, said, stored, spelling):
    LlamaForCausalLM.from_pretrained(copied, dtype=stored).save_pretrained(copied)
    (copied / "generation_config.json").unlink()
    edit_json(copied / "config.json", without=("dtype", "torch_dtype"))
    if said:
        edit_json(copied / "config.json", **{spelling: said})
    convert_checkpoint(copied, tmp_path / "v2", "v2")
    assert_same_answers(copied, tmp_path / "v2")
    assert json.loads((tmp_path / "v2" / "config.json").read_text())["dtype"] == (said or stored)


def test_of_two_spellings_of_dtype_the_one_llama_follows_counts(copied, tmp_path):
    edit_json(copied / "config.json", dtype="float32", torch_dtype="bfloat16")
    convert_checkpoint(copied, tmp_path / "v2", "v2")
    assert_same_answers(copied, tmp_path / "v2")


def test_dtype_asked_for_is_the_one_the_output_loads_in(copied, tmp_path):
    edit_json(copied / "config.json", dtype="float32")
    convert_checkpoint(copied, tmp_path / "v2", "v2", dtype="bfloat16")
    assert DiffLlamaForCausalLM.from_pretrained(tmp_path / "v2").dtype == torch.bfloat16


def test_sizes_in_a_mixture_of_dtypes_without_a_config_dtype_follow_llama(copied, tmp_path):
    """transformers takes the first floating tensor of the first file, not what most bytes are stored in."""
    from safetensors.torch import load_file, save_file

    weights = {name: tensor.bfloat16() for name, tensor in load_file(copied / "model.safetensors").items()}
    weights["lm_head.weight"] = weights["lm_head.weight"].float()
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    edit_json(copied / "config.json", without=("dtype",))
    convert_checkpoint(copied, tmp_path / "v2", "v2")
    assert_same_answers(copied, tmp_path / "v2")


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("name", ["llama", *RELATIVES])
def test_written_config_is_that_of_from_llama(tmp_path, name, variant):
    model = random_llama(attention_bias=True) if name == "llama" else random_relative(name)
    source = saved(model, tmp_path / "source")
    options = {"uncalibrated": True, "lambda_init": "paper"} if variant == "v1" else {}
    convert_checkpoint(source, tmp_path / "output", variant, **options)
    expected = DiffLlamaConfig.from_llama(
        AutoConfig.from_pretrained(source), variant=variant, architectures=["DiffLlamaForCausalLM"], dtype="float32"
    )
    expected.save_pretrained(tmp_path / "expected")
    written = json.loads((tmp_path / "output" / "config.json").read_text())
    assert written == json.loads((tmp_path / "expected" / "config.json").read_text())
