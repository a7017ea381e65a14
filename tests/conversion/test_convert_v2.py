"""LLaMA -> V2: the same logits to the last bit, and maps that separate at the first step."""

import pytest
import torch
from random_llamas import FLAVOURS, edit_json, random_llama, saved, token_ids
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForQuestionAnswering, LlamaForSequenceClassification, LlamaModel

from conversion import ConversionError, convert_checkpoint
from modeling_diff import DiffLlamaForCausalLM, DiffLlamaModel


LENGTH = "original_max_position_embeddings"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ROTARY = {
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA3},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.1, 2.2, 2.3],
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def both(folder, output, dtype=torch.float32):
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    llama = LlamaForCausalLM.from_pretrained(folder, **options).eval()
    return llama, DiffLlamaForCausalLM.from_pretrained(output, **options).eval()


@torch.no_grad()
def assert_equal_to_the_bit(llama, model, ids):
    assert torch.equal(llama(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_mirror_is_llama_to_the_bit(tmp_path, flavour, dtype):
    source = saved(random_llama(**FLAVOURS[flavour]).to(dtype), tmp_path / "llama")
    convert_checkpoint(source, tmp_path / "v2", "v2")
    llama, model = both(source, tmp_path / "v2", dtype)
    assert_equal_to_the_bit(llama, model, token_ids())
    continuations = [
        m.generate(token_ids(), max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (llama, model)
    ]
    assert torch.equal(*continuations)


@pytest.mark.parametrize("name", ROTARY)
def test_every_rotary_setting_is_kept(tmp_path, name):
    """100 tokens: beyond the 32 that the scaled types were pretrained for."""
    source = saved(random_llama(rope_parameters=ROTARY[name]), tmp_path / "llama")
    convert_checkpoint(source, tmp_path / "v2", "v2")
    llama, model = both(source, tmp_path / "v2")
    assert model.config.rope_parameters == llama.config.rope_parameters
    assert_equal_to_the_bit(llama, model, token_ids(length=100))


# As LLaMA 3.x was published: rope_scaling beside rope_theta. As Phi3 is: the length of pretraining beside both.
OLD_SPELLINGS = {
    "rope_scaling": {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
    **{
        f"length beside {name}": {
            "rope_theta": 10000.0,
            "rope_scaling": {key: value for key, value in ROTARY[name].items() if key not in ("rope_theta", LENGTH)},
            LENGTH: 32,
        }
        for name in ("yarn", "llama3", "longrope", "dynamic")
    },
    "length beside rope_parameters": {
        "rope_parameters": {key: value for key, value in ROTARY["yarn"].items() if key != LENGTH},
        LENGTH: 32,
    },
}


@pytest.mark.parametrize("spelling", OLD_SPELLINGS)
def test_old_rotary_spelling_is_understood(tmp_path, spelling):
    """transformers' own LLaMA says what it means."""
    source = saved(random_llama(), tmp_path / "llama")
    edit_json(source / "config.json", without=["rope_parameters"], **OLD_SPELLINGS[spelling])
    report = convert_checkpoint(source, tmp_path / "v2", "v2")
    llama, model = both(source, tmp_path / "v2")
    assert model.config.rope_parameters == llama.config.rope_parameters
    assert_equal_to_the_bit(llama, model, token_ids(length=100))
    assert any(LENGTH in note for note in report.notes) == ("dynamic" in spelling), "said if it means nothing"


def test_parameter_count_is_llamas_and_the_second_queries(tmp_path):
    llama = random_llama()
    report = convert_checkpoint(saved(llama, tmp_path / "llama"), tmp_path / "v2", "v2")
    config = llama.config
    added = config.num_attention_heads * (config.head_dim + 1) * config.hidden_size
    assert report.record["parameters"]["output"] == llama.num_parameters() + 2 * added


def test_layers_left_out_are_llamas_own(tmp_path):
    source = saved(random_llama(), tmp_path / "llama")
    convert_checkpoint(source, tmp_path / "v2", "v2", layers=[0])
    llama, model = both(source, tmp_path / "v2")
    names = dict(model.named_parameters())
    assert names["model.layers.1.self_attn.q_proj.weight"].shape == (32, 32)
    assert "model.layers.1.self_attn.lambda_proj.weight" not in names
    assert_equal_to_the_bit(llama, model, token_ids())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lambda_start", [0.1, 0.8])
def test_any_lambda_to_start_from_keeps_the_function(tmp_path, lambda_start, dtype):
    source = saved(random_llama().to(dtype), tmp_path / "llama")
    convert_checkpoint(source, tmp_path / "v2", "v2", lambda_start=lambda_start)
    llama, model = both(source, tmp_path / "v2")  # widened to float32: what is tested is the weights
    bias = model.model.layers[0].self_attn.lambda_proj.bias
    assert torch.allclose(bias.sigmoid(), torch.tensor(lambda_start), atol=5e-3)
    expected, found = llama(token_ids()).logits, model(token_ids()).logits
    # bfloat16 rounds o_proj once more; a scale from the unrounded bias would be off by up to 1 % a layer at 0.8
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def rewritten(folder, change):
    """The folder with its tensors (in one file) as `change` makes them."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_lambda_keeps_the_function_where_queries_are_of_another_dtype(tmp_path):
    """The bias is stored in the queries' dtype: one that rounds it more than the rest of the model must not tell."""
    name = "model.layers.0.self_attn.q_proj.weight"
    source = saved(random_llama(), tmp_path / "llama")
    rewritten(source, lambda weights: weights.update({name: weights[name].bfloat16()}))
    convert_checkpoint(source, tmp_path / "v2", "v2", lambda_start=0.99)
    llama, model = both(source, tmp_path / "v2")
    expected, found = llama(token_ids()).logits, model(token_ids()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_exact_to_the_source_in_that_dtype(tmp_path, dtype):
    """And says so. Entries below 6e-5, which float16 rounds in steps of 6e-8, double exactly as well."""
    source = saved(random_llama(), tmp_path / "llama")
    rewritten(source, lambda weights: weights["model.layers.0.self_attn.o_proj.weight"].mul_(1e-6))
    report = convert_checkpoint(source, tmp_path / "v2", "v2", dtype=dtype)
    assert f"as the source rounded to {dtype}, and" in report.record["promise"]["text"]
    assert f"as the source rounded to {dtype}, and" in (tmp_path / "v2" / "README.md").read_text()
    llama, model = both(source, tmp_path / "v2", getattr(torch, dtype))
    assert_equal_to_the_bit(llama.float(), model.float(), token_ids())
    report = convert_checkpoint(tmp_path / "llama", tmp_path / "same", "v2", dtype="float32")
    assert "as the source, and" in report.record["promise"]["text"]


@pytest.mark.parametrize(
    ("dtype", "entry", "options", "message"),
    [
        (torch.float16, 40000.0, {}, r"o_proj\.weight .* 80000, more than float16 holds \(65504\); .* bfloat16"),
        (torch.float16, 1.0, {"lambda_start": 0.99999}, "more than float16 holds .* --dtype bfloat16"),
        (torch.float32, 3.4e38, {"dtype": "bfloat16"}, r"more than bfloat16 holds \(3.3895e\+38\)"),
        (torch.float32, 3.4e38, {}, "more than float32 holds"),
    ],
)
def test_what_grows_beyond_its_dtype_is_refused(tmp_path, dtype, entry, options, message):
    source = saved(random_llama().to(dtype), tmp_path / "llama")
    rewritten(source, lambda weights: weights["model.layers.1.self_attn.o_proj.weight"][3].fill_(entry))
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(source, tmp_path / "v2", "v2", **options)
    if dtype == torch.float16:
        convert_checkpoint(source, tmp_path / "v2", "v2", **options, dtype="bfloat16")
        assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "v2" / "model.safetensors").values())


def test_maps_separate_at_the_first_step(tmp_path):
    """dq_2i = g and dq_2i+1 = -g / 2, and lambda_proj has a gradient: nothing is dead, nothing stays a mirror."""
    convert_checkpoint(saved(random_llama(), tmp_path / "llama"), tmp_path / "v2", "v2")
    model = DiffLlamaForCausalLM.from_pretrained(tmp_path / "v2")
    model(token_ids(), labels=token_ids()).loss.backward()
    for layer in model.model.layers:
        first, second = layer.self_attn.q_proj.weight.grad.unflatten(0, (-1, 2, 8)).unbind(1)
        assert first.abs().max() > 0
        torch.testing.assert_close(second, -first / 2, rtol=1e-3, atol=1e-6)
        assert (layer.self_attn.lambda_proj.weight.grad != 0).all()


@pytest.mark.parametrize("model_class", [LlamaForSequenceClassification, LlamaForQuestionAnswering, LlamaModel])
def test_backbone_is_converted_only_when_asked(tmp_path, model_class):
    """A task head is left out only on request; a headless source, whose names lack `model.`, has none to leave."""
    torch.manual_seed(0)
    llama = model_class(random_llama().config).eval()
    source = saved(llama, tmp_path / "llama")
    with pytest.raises(ConversionError, match="--backbone-only"):
        convert_checkpoint(source, tmp_path / "v2", "v2")
    convert_checkpoint(source, tmp_path / "v2", "v2", backbone_only=True)
    backbone = DiffLlamaModel.from_pretrained(tmp_path / "v2", attn_implementation="sdpa").eval()
    expected = llama.base_model
    with torch.no_grad():
        ours, theirs = (m(token_ids()).last_hidden_state for m in (backbone, expected))
    assert torch.equal(ours, theirs)


def test_converted_checkpoint_is_not_converted_again(tmp_path):
    convert_checkpoint(saved(random_llama(), tmp_path / "llama"), tmp_path / "v2", "v2")
    with pytest.raises(ConversionError, match="converted already"):
        convert_checkpoint(tmp_path / "v2", tmp_path / "again", "v2")
