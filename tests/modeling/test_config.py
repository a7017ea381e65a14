"""The configuration: what it derives, what it saves, and the message of everything it refuses."""

import math

import pytest
import torch
from diff_llama_by_definition import logits_by_definition
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


def test_derived_widths_follow_the_variant(tiny_config):
    v1, v2 = tiny_config("v1"), tiny_config("v2")
    assert (v1.head_dim, v1.map_dim) == (8, 4)
    assert (v2.head_dim, v2.map_dim) == (8, 8)


def test_defaults_are_llama_defaults():
    ours = DiffLlamaConfig()
    theirs = LlamaConfig()
    shared = set(theirs.to_dict()) - {"model_type", "architectures"}
    assert {name: getattr(ours, name) for name in shared} == {name: getattr(theirs, name) for name in shared}


def test_lambda_init_defaults_to_the_paper_schedule():
    config = DiffLlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4)
    expected = [0.2, 0.8 - 0.6 * math.exp(-0.3), 0.8 - 0.6 * math.exp(-0.6)]
    assert config.lambda_init == pytest.approx(expected)


def test_motif_schedule_counted_from_minus_one_is_accepted_as_given(tiny_config):
    assert tiny_config("v1", lambda_init=[-0.0099, 0.2]).lambda_init == [-0.0099, 0.2]


def test_config_survives_saving_and_loading(tiny_config, variant, tmp_path):
    config = tiny_config(variant, differential_layers=[1])
    config.save_pretrained(tmp_path)
    loaded = DiffLlamaConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.model_type == "diff_llama"


def test_parameter_shapes_are_those_of_the_design(tiny_model):
    shapes = {
        variant: {
            name.removeprefix("model.layers.0.self_attn."): tuple(weight.shape)
            for name, weight in tiny_model(variant).state_dict().items()
            if "layers.0.self_attn" in name
        }
        for variant in ("v1", "v2")
    }
    heads = 4
    key_value_heads = 2
    hidden_size = 32
    assert shapes["v1"] == {
        "q_proj.weight": (heads * 2 * 4, hidden_size),
        "k_proj.weight": (key_value_heads * 2 * 4, hidden_size),
        "v_proj.weight": (key_value_heads * 8, hidden_size),
        "o_proj.weight": (hidden_size, heads * 8),
        "sub_norm.weight": (8,),
        **{f"diff_lambda.lambda_{name}": (4,) for name in ("q1", "k1", "q2", "k2")},
    }
    assert shapes["v2"] == {
        "q_proj.weight": (heads * 2 * 8, hidden_size),
        "k_proj.weight": (key_value_heads * 8, hidden_size),
        "v_proj.weight": (key_value_heads * 8, hidden_size),
        "o_proj.weight": (hidden_size, heads * 8),
        "lambda_proj.weight": (heads, hidden_size),
    }


def test_biases_are_where_the_config_asks_for_them(tiny_model):
    names = [name for name, _ in tiny_model("v2", lambda_bias=True, attention_bias=True).named_parameters()]
    biased = {name.split(".")[-2] for name in names if "layers.0" in name and name.endswith(".bias")}
    assert biased == {"q_proj", "k_proj", "v_proj", "o_proj", "lambda_proj"}


@pytest.mark.parametrize("settings", [{"sub_norm_eps": [0.5, 0.02]}, {"lambda_init": [0.7, -0.3]}], ids=str)
def test_values_given_by_layer_reach_their_layers(tiny_model, random_ids, settings):
    model = tiny_model("v1", **settings)
    input_ids = random_ids(2, 9)
    expected = logits_by_definition(model.state_dict(), model.config, input_ids)
    # float32 logits of up to about 6.
    torch.testing.assert_close(model(input_ids).logits.double(), expected, rtol=0, atol=2e-5)


INVALID = {
    "unknown_variant": ({"variant": "v3"}, r"variant='v3' is unknown: use \"v1\""),
    "no_heads": ({"num_attention_heads": 0, "head_dim": 8}, "num_attention_heads=0: must be at least 1"),
    "no_key_value_heads": ({"num_key_value_heads": 0}, "num_key_value_heads=0: must be at least 1"),
    "no_width": ({"head_dim": 0}, "head_dim=0: must be at least 1"),
    "no_layers": ({"num_hidden_layers": 0}, "num_hidden_layers=0: must be at least 1"),
    "uneven_groups": (
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        "num_attention_heads=4 is not a multiple of num_key_value_heads=3",
    ),
    "odd_head": ({"head_dim": 7}, "head_dim=7 is odd"),
    "odd_map_v1": ({"head_dim": 6}, "head_dim=6 gives maps 3 wide.*multiple of 4"),
    "odd_map_v2": ({"variant": "v2", "head_dim": 7}, "head_dim=7 gives maps 7 wide.*multiple of 2"),
    "layer_beyond": ({"differential_layers": [0, 2]}, r"differential_layers=\[0, 2\].*num_hidden_layers=2"),
    "layer_negative": ({"differential_layers": [-1]}, r"differential_layers=\[-1\].*counted from 0"),
    "layers_unsorted": ({"differential_layers": [1, 0]}, r"differential_layers=\[1, 0\].*ascending"),
    "layer_twice": ({"differential_layers": [1, 1]}, r"differential_layers=\[1, 1\].*once"),
    "heads_short": ({"differential_heads": [[0]]}, r"differential_heads has 1 lists for num_hidden_layers=2: .* \[\]"),
    "head_beyond": ({"differential_heads": [[0], [4]]}, r"differential_heads\[1\]=\[4\].*num_attention_heads=4"),
    "head_negative": ({"differential_heads": [[-1], []]}, r"differential_heads\[0\]=\[-1\].*counted from 0"),
    "heads_unsorted": ({"differential_heads": [[], [1, 0]]}, r"differential_heads\[1\]=\[1, 0\].*ascending"),
    "head_twice": ({"differential_heads": [[2, 2], []]}, r"differential_heads\[0\]=\[2, 2\].*once"),
    "heads_v2": ({"variant": "v2", "differential_heads": [[0], [1]]}, 'differential_heads: V2 .* variant="v1"'),
    "heads_and_layers": (
        {"differential_heads": [[0], [1]], "differential_layers": [0, 1]},
        r"differential_layers=\[0, 1\] next to differential_heads.* one of them",
    ),
    "lambda_init_short": ({"lambda_init": [0.2]}, "lambda_init has 1 values for num_hidden_layers=2"),
    "lambda_init_nan": ({"lambda_init": [0.2, math.nan]}, r"lambda_init\[1\]=nan: must be finite"),
    "lambda_init_infinite": ({"lambda_init": [-math.inf, 0.2]}, r"lambda_init\[0\]=-inf: must be finite"),
    "lambda_init_one": ({"lambda_init": [1.0, 0.2]}, r"lambda_init\[0\]=1.0: must be finite and below 1"),
    "lambda_init_std_negative": ({"lambda_init_std": -0.1}, "lambda_init_std=-0.1"),
    "lambda_init_std_nan": ({"lambda_init_std": math.nan}, "lambda_init_std=nan"),
    "sub_norm_eps_short": ({"sub_norm_eps": [1e-5]}, "sub_norm_eps has 1 values for num_hidden_layers=2"),
    "sub_norm_eps_zero": ({"sub_norm_eps": 0.0}, "sub_norm_eps=0.0: must be finite and above 0"),
    "sub_norm_eps_nan": ({"sub_norm_eps": [1e-5, math.nan]}, r"sub_norm_eps=\[1e-05, nan\]: must be finite"),
    "lambda_bias_v1": ({"lambda_bias": True}, "lambda_bias=True: V1 has no lambda_proj"),
    "lambda_init_v2": ({"variant": "v2", "lambda_init": [0.2, 0.3]}, r"lambda_init=\[0.2, 0.3\]: V2 has neither"),
    "sub_norm_eps_v2": ({"variant": "v2", "sub_norm_eps": 1e-5}, "sub_norm_eps=1e-05: V2 has neither"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1: the paper defines no dropout"),
    "transformers_own_field": ({"lambda_std_dev": 0.1}, "lambda_std_dev is a field of transformers' own diffllama"),
    "unknown_rope": ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type='spiral'"),
}


@pytest.mark.parametrize(("settings", "message"), INVALID.values(), ids=INVALID)
def test_invalid_config_says_what_is_wrong(tiny_config, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("v1", **settings)


SET_AFTERWARDS = {
    "more_layers": ({"num_hidden_layers": 4}, "lambda_init has 2 values for num_hidden_layers=4"),
    "lambda_init_short": ({"lambda_init": [0.2]}, "lambda_init has 1 values"),
    "layer_beyond": ({"differential_layers": [99]}, r"differential_layers=\[99\]"),
    "head_beyond": ({"differential_heads": [[0], [99]]}, r"differential_heads\[1\]=\[99\]"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1: the paper defines no dropout"),
}


@pytest.mark.parametrize(("settings", "message"), SET_AFTERWARDS.values(), ids=SET_AFTERWARDS)
def test_fields_set_on_a_config_are_checked_where_it_is_used(tiny_model, settings, message, tmp_path):
    model = tiny_model("v1")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        DiffLlamaForCausalLM.from_pretrained(tmp_path, **settings)
    for name, value in settings.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        DiffLlamaForCausalLM(model.config)
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        model.save_pretrained(tmp_path / "again")
    assert not list(tmp_path.glob("again/*.safetensors"))


PER_LAYER = [
    {},
    {"sub_norm_eps": [0.5, 0.02], "differential_layers": [0, 1]},
    {"differential_heads": [[1, 2], [0]]},
]


@pytest.mark.parametrize("settings", PER_LAYER, ids=str)
def test_fewer_layers_are_loaded_with_the_values_of_the_first(tiny_model, settings, random_ids, tmp_path):
    model = tiny_model("v1", **settings)
    input_ids = random_ids(1, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1)
    model.model.layers = model.model.layers[:1]
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    assert loaded.config.lambda_init == model.config.lambda_init[:1]


def test_variant_of_weight_files_is_not_taken_for_ours(tiny_model, variant, random_ids, tmp_path):
    """`from_pretrained` has a keyword of our field's name, for files such as model.fp16.safetensors."""
    model = tiny_model(variant)
    input_ids = random_ids(1, 9)
    model.save_pretrained(tmp_path, variant="fp16")
    for auto_class in (AutoModelForCausalLM, DiffLlamaForCausalLM):
        loaded = auto_class.from_pretrained(tmp_path, variant="fp16")
        assert loaded.config.variant == variant
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    with pytest.raises(OSError, match=r"model\.bf16\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path, variant="bf16")
    assert AutoConfig.from_pretrained(tmp_path, variant=None).variant == variant


def test_variant_given_to_an_auto_config_is_ours(tiny_config, tmp_path):
    tiny_config("v2").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, variant="v1")
    assert (config.variant, config.map_dim, len(config.lambda_init)) == ("v1", 4, 2)


@pytest.mark.parametrize("rope_parameters", [{"type": "linear", "factor": 2.0, "rope_theta": 500.0}, None], ids=str)
def test_rope_given_on_loading_may_be_spelled_as_in_a_constructor(
    tiny_model, variant, rope_parameters, random_ids, tmp_path
):
    input_ids = random_ids(1, 9)
    tiny_model(variant).save_pretrained(tmp_path)
    loaded = DiffLlamaForCausalLM.from_pretrained(tmp_path, rope_parameters=rope_parameters)
    built = tiny_model(variant, rope_parameters=rope_parameters)
    assert torch.equal(loaded(input_ids).logits, built(input_ids).logits)


def test_hidden_size_that_heads_do_not_divide_is_refused(tiny_config):
    with pytest.raises(ValueError, match=r"hidden_size=34 is not a multiple of num_attention_heads=4: .* head_dim"):
        tiny_config("v2", hidden_size=34)


def test_hidden_size_that_heads_do_not_divide_works_with_a_head_dim(tiny_model, variant, random_ids, tmp_path):
    model = tiny_model(variant, hidden_size=34, head_dim=8)
    model.save_pretrained(tmp_path)
    input_ids = random_ids(1, 9)
    assert torch.equal(DiffLlamaForCausalLM.from_pretrained(tmp_path)(input_ids).logits, model(input_ids).logits)


def test_bias_of_o_proj_follows_attention_bias_unless_given(tiny_config, variant):
    assert [tiny_config(variant, attention_bias=bias).attention_out_bias for bias in (False, True)] == [False, True]
    assert tiny_config(variant, attention_bias=True, attention_out_bias=False).attention_out_bias is False


FIELDS = ["variant", "lambda_init", "differential_layers", "differential_heads", "lambda_bias", "sub_norm_eps"]


@pytest.mark.parametrize("field", FIELDS)
def test_value_of_a_wrong_type_is_refused_by_field_name(tiny_config, field):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"field '{field}'"):
        tiny_config("v1", **{field: object()})


def test_generation_settings_do_not_leak_into_the_config(tiny_model, variant, tmp_path):
    model = tiny_model(variant)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    assert "max_new_tokens" not in DiffLlamaConfig.from_pretrained(tmp_path).to_dict()
    assert torch.is_tensor(model(torch.tensor([[3]])).logits)
